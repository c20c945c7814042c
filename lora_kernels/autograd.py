"""The autograd.Function of eager mode: first and higher derivatives, forward mode, vmap and torch.func.

Products may have an operator of their own for the usual case, see `Products.layer`; this Function serves all others.

Derivatives that must themselves be differentiated, and those under a function transform, run `formulas` on the composite
products, which autograd sees through. s is an output of the Function, so that a saved s is still connected to x and A.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_kernels import formulas, plan
from lora_kernels.backends.composite import PRODUCTS as COMPOSITE
from lora_kernels.dropout import Dropout
from lora_kernels.formulas import Needs, Saved
from lora_kernels.operands import Adapter, QuantizedWeight, Scale, Weight
from lora_kernels.plan import Plan


class Call:
    """What a call has beside its tensors: the backend it asks for, and its plan, made when the product runs."""

    __slots__ = ("backend", "dropout_p", "plan")

    def __init__(self, backend: str, dropout_p: float, plan: Plan | None = None) -> None:
        self.backend, self.dropout_p, self.plan = backend, dropout_p, plan

    def planned(self, x: Tensor, weight: Weight, A: Tensor, bias: Tensor | None) -> Plan:
        if self.plan is None:
            dropout = self.dropout_p > 0
            self.plan = plan.plan_call(self.backend, x, weight, A, bias, dropout)
        return self.plan


class LoRALinear(torch.autograd.Function):
    """(x, weight, A, B, bias, scale, seed, call) -> (y, s), as `formulas.forward` on 2-D x."""

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Function.apply without its look at forward's signature in every call, which costs more than a small product."""
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        args = torch._functorch.utils.unwrap_dead_wrappers(args)
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]

    @staticmethod
    def forward(
        x: Tensor,
        weight: Weight,
        A: Tensor,
        B: Tensor,
        bias: Tensor | None,
        scale: Scale,
        seed: Tensor | None,
        call: Call,
    ) -> tuple[Tensor, Tensor]:
        chosen = call.planned(x, weight, A, bias)
        adapter = Adapter(A, B, scale, as_dropout(call.dropout_p, seed))
        return formulas.forward(chosen.products, x, chosen.readable(weight), adapter, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        x, weight, A, B, _, scale, seed, ctx.call = inputs
        ctx.needs = Needs(*ctx.needs_input_grad[:5])
        ctx.dtype, ctx.adapter_dtype = x.dtype, A.dtype
        ctx.scale = None if isinstance(scale, Tensor) else scale
        scale_tensor = scale if isinstance(scale, Tensor) else None
        ctx.set_materialize_grads(False)
        kept = formulas.keep(ctx.needs, x, weight, A, B, output[1])
        packed: tuple[Tensor, ...] = ()
        ctx.weight = None
        if isinstance(weight, QuantizedWeight):
            ctx.weight, packed = weight, weight.tensors
            kept = kept._replace(weight=None)
            weight = None
        ctx.save_for_backward(*kept, scale_tensor, seed, *(packed if ctx.needs.x else ()))
        ctx.save_for_forward(x, weight, A, B, None, scale_tensor, seed, *packed)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, ds: Tensor | None) -> tuple[Tensor | None, ...]:
        *saved, scale, seed = ctx.saved_tensors[:7]
        kept = Saved(*saved)
        if ctx.weight is not None and ctx.needs.x:
            kept = kept._replace(weight=ctx.weight.with_tensors(ctx.saved_tensors[7:]))
        if dy is None:
            if ds is None or kept.B is None:  # without x's or A's gradient nothing depends on s
                return (None,) * 8
            dy = ds.new_zeros((ds.shape[0], kept.B.shape[1]), dtype=ctx.dtype)
        adapter = _adapter(ctx, kept.A, kept.B, scale, seed)
        products = COMPOSITE
        call = ctx.call
        if not (torch.is_grad_enabled() or ds is not None or _under_transform(dy)) and call.plan:
            chosen = call.plan.adjoint
            products = chosen.products
            if kept.weight is not None:
                kept = kept._replace(weight=chosen.readable(kept.weight))
        grads = formulas.backward(products, dy, kept, ctx.needs, adapter, ctx.adapter_dtype, ds)
        return (*grads, None, None, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, Tensor]:
        x, weight, A, B, _, scale, seed = ctx.saved_tensors[:7]
        if ctx.weight is not None:
            weight = ctx.weight.with_tensors(ctx.saved_tensors[7:])
        adapter = _adapter(ctx, A, B, scale, seed)
        return formulas.jvp(COMPOSITE, x, weight, adapter, tangents[:5])

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple[tuple[Tensor, Tensor], tuple]:
        def one_sample(x, weight, A, B, bias, scale, seed, call):
            adapter = Adapter(A, B, scale, as_dropout(call.dropout_p, seed))
            return formulas.forward(COMPOSITE, x, weight, adapter, bias)

        return torch.vmap(one_sample, in_dims=in_dims)(*args), (0, 0)


def as_dropout(p: float, seed: Tensor | None) -> Dropout | None:
    """The Dropout of an operator's two flat arguments."""
    return None if seed is None or p == 0.0 else Dropout(p, seed)


def _adapter(
    ctx: Any, A: Tensor | None, B: Tensor | None, scale: Tensor | None, seed: Tensor | None
) -> Adapter:
    """The forward's adapter over what was saved of it."""
    dropout = as_dropout(ctx.call.dropout_p, seed)
    return Adapter(A, B, ctx.scale if scale is None else scale, dropout)  # type: ignore[arg-type]


def _under_transform(t: Tensor) -> bool:
    """Whether t is a wrapper of a function transform (vmap of a backward), which only plain ATen understands."""
    functorch = torch._C._functorch
    return functorch.is_functorch_wrapped_tensor(t) or functorch.is_legacy_batchedtensor(t)
