"""The autograd.Function of eager mode: first and higher derivatives, forward mode, vmap and torch.func.

Products may have an operator of their own for the usual case, see `Products.layer`; this Function serves all others.

Derivatives that must themselves be differentiated, and those under a function transform, run `formulas` on the composite
products, which autograd can differentiate. s is an output of the Function, so that a saved s is still connected to x and A.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lora_kernels import formulas
from lora_kernels.backends.base import Products
from lora_kernels.backends.composite import PRODUCTS as COMPOSITE
from lora_kernels.dropout import Dropout
from lora_kernels.formulas import Gradients, Needs, Saved
from lora_kernels.operands import Adapter, Groups, Scale, Weight, groups_of
from lora_kernels.plan import Plan, plan_call

# Looked up once: to find the key takes longer than to ask for it.
_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch
ALPHA_IS_NO_PARAMETER = "alpha must not require grad: it is a run-time value, no parameter"


class Call:
    """The backend that a call names, and its plan; a plan of None is made when the product runs."""

    __slots__ = ("backend", "plan")

    def __init__(self, backend: str, plan: Plan | None = None) -> None:
        self.backend, self.plan = backend, plan


class LoRALinear(torch.autograd.Function):
    """(x, weight, A, B, bias, scale, dropout_p, seed, call, offsets) -> (y, s), as `formulas.forward` on 2-D x."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Weight,
        A: Tensor,
        B: Tensor,
        bias: Tensor | None,
        scale: Scale,
        dropout_p: float,
        seed: Tensor | None,
        call: Call,
        offsets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        dropout, groups = as_dropout(dropout_p, seed), groups_of(offsets, weight, bias)
        plan = call.plan
        if plan is None:
            masked = dropout is not None
            plan = call.plan = plan_call(call.backend, x, weight, A, bias, masked, groups)
        adapter, products = Adapter(A, B, scale, dropout), plan.products.bound(groups)
        return formulas.forward(products, x, plan.readable(weight), adapter, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        x, weight, A, B, bias, scale, ctx.dropout_p, seed, ctx.call, *given = inputs
        offsets = given[0] if given else None
        ctx.K, ctx.R = A.shape[-2:]
        groups = groups_of(offsets, weight, bias)
        ctx.owned = None if groups is None else (groups.own_weight, groups.own_bias)
        save(ctx, inputs, output[1], seed, offsets)
        weight, scale = (t if isinstance(t, Tensor) else None for t in (weight, scale))
        ctx.save_for_forward(x, weight, A, B, scale, seed)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, ds: Tensor | None) -> tuple[Tensor | None, ...]:
        return (*gradients(ctx, dy, ds, _fused), None, None, None, None, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, Tensor]:
        x, weight, A, B, scale, seed = ctx.saved_tensors
        scale = ctx.scale if scale is None else scale
        adapter = Adapter(A, B, scale, as_dropout(ctx.dropout_p, seed))
        return formulas.jvp(COMPOSITE, x, weight, adapter, tangents[:6])

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple[tuple[Tensor, Tensor], tuple]:
        return torch.vmap(transparent, in_dims=in_dims)(*args), (0, 0)


def save(ctx: Any, inputs: tuple, s: Tensor, *others: Tensor | None) -> None:
    """Keep for `saved` what the gradients of (x, weight, A, B, bias, scale, ...) read, and two other tensors."""
    x, weight, A, B, _, scale, *_ = inputs
    if ctx.needs_input_grad[5]:  # `arguments.check` cannot see it in a transform's wrapper
        raise ValueError(ALPHA_IS_NO_PARAMETER)
    ctx.needs = Needs(*ctx.needs_input_grad[:5])
    ctx.dtype, ctx.adapter_dtype = x.dtype, A.dtype
    ctx.set_materialize_grads(False)
    kept = formulas.keep(ctx.needs, x, weight, A, B, s)
    packed: tuple[Tensor, ...] = ()
    ctx.weight = None
    if not isinstance(weight, Tensor):
        ctx.weight, kept = weight, kept._replace(weight=None)
        packed = weight.tensors if ctx.needs.x else ()
    ctx.scale, scale = (None, scale) if isinstance(scale, Tensor) else (scale, None)
    ctx.save_for_backward(*kept, scale, *others, *packed)


def saved(ctx: Any) -> tuple[Saved, Scale, Any, Any]:
    """What `save` kept: the operands, the scale and the two other tensors."""
    tensors = ctx.saved_tensors  # read once: a checkpoint unpacks each tensor only once
    *operands, scale, first, second = tensors[:8]
    kept = Saved(*operands)
    if ctx.weight is not None and ctx.needs.x:
        kept = kept._replace(weight=ctx.weight.with_tensors(tensors[8:]))
    return kept, ctx.scale if scale is None else scale, first, second


def apply(*args: Any) -> tuple[Tensor, Tensor]:
    """(y, s) of LoRALinear.apply, without inspecting forward's signature: that takes longer than a small product."""
    if torch._C._are_functorch_transforms_active():
        return (transparent if _is_forward_over_forward() else LoRALinear.apply)(*args)
    args = torch._functorch.utils.unwrap_dead_wrappers(args)
    return super(torch.autograd.Function, LoRALinear).apply(*args)  # type: ignore[misc]


def _is_forward_over_forward() -> bool:
    """Whether one forward mode of torch.func is within another: in a Function's jvp torch drops the outer one's tangents."""
    functorch = torch._C._functorch
    kinds = [interpreter.key() for interpreter in functorch.get_interpreter_stack()]
    return kinds.count(functorch.TransformType.Jvp) > 1


def transparent(
    x: Tensor,
    weight: Weight,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None,
    scale: Scale,
    dropout_p: float,
    seed: Tensor | None,
    _call: Call | str,
    offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(y, s) of `LoRALinear.forward` by plain ATen, which every transform can differentiate; no backend is chosen."""
    adapter = Adapter(A, B, scale, as_dropout(dropout_p, seed))
    products = COMPOSITE.bound(groups_of(offsets, weight, bias))
    return formulas.forward(products, x, weight, adapter, bias)


def gradients(
    ctx: Any, dy: Tensor | None, ds: Tensor | None, fused: Callable[..., Gradients]
) -> Gradients:
    """(dx, dW, dA, dB, dbias) of what `LoRALinear.setup_context` kept: by `fused`, or by ATen, to be differentiated."""
    kept, scale, seed, offsets = saved(ctx)
    if dy is None:
        if ds is None or kept.B is None:  # without x's or A's gradient nothing depends on s
            return (None,) * 5
        dy = ds.new_zeros((ds.shape[0], kept.B.shape[-1]), dtype=ctx.dtype)
    adapter = Adapter(kept.A, kept.B, scale, as_dropout(ctx.dropout_p, seed))  # type: ignore[arg-type]
    groups = None if offsets is None else Groups(offsets, *ctx.owned)
    if torch.is_grad_enabled() or ds is not None or under_transform(dy) or any_dual(dy, *kept):
        products = COMPOSITE.bound(groups)
        return formulas.backward(products, dy, kept, ctx.needs, adapter, ctx.adapter_dtype, ds)
    return fused(ctx, dy, kept, adapter, groups)


def _fused(ctx: Any, dy: Tensor, kept: Saved, adapter: Adapter, groups: Groups | None) -> Gradients:
    products: Products = COMPOSITE  # plain ATen operators, which modes can count and record
    plan = ctx.call.plan
    if plan is not None and not modes_are_active():
        adjoint = plan.adjoint
        products = adjoint.products
        if adjoint.dequantises:
            kept = kept._replace(weight=adjoint.readable(kept.weight))
    products = products.bound(groups)
    return formulas.backward(products, dy, kept, ctx.needs, adapter, ctx.adapter_dtype)


def as_dropout(p: float, seed: Tensor | None) -> Dropout | None:
    """The Dropout of an operator's two flat arguments."""
    return None if seed is None or p == 0.0 else Dropout(p, seed)


def any_dual(*values: Any) -> bool:
    """Whether one of them is a tensor that carries a tangent of forward mode."""
    return forward_ad._current_level >= 0 and any(
        isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None for t in values
    )


def modes_are_active() -> bool:
    """Whether a mode counts, records or traces operators, as FlopCounterMode and make_fx do."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH)
    )


def under_transform(t: Tensor) -> bool:
    """Whether t is a wrapper of a function transform (vmap of a backward), which only plain ATen can compute."""
    functorch = torch._C._functorch
    return functorch.is_functorch_wrapped_tensor(t) or functorch.is_legacy_batchedtensor(t)
