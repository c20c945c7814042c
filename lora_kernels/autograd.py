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
from lora_kernels.formulas import Needs, Saved
from lora_kernels.operands import Adapter, Groups, Scale, Weight, groups_of
from lora_kernels.plan import Plan, plan_call

ALPHA_IS_NO_PARAMETER = "alpha must not require grad: it is a run-time value, no parameter"


class Call:
    """The backend that a call names, and its plan; a plan of None is made when the product runs."""

    __slots__ = ("backend", "plan")

    def __init__(self, backend: str, plan: Plan | None = None) -> None:
        self.backend, self.plan = backend, plan


class LoRALinear(torch.autograd.Function):
    """(x, weight, A, B, bias, scale, dropout_p, seed, call, offsets, c) -> (y, s), as `formulas.forward` on 2-D x.

    With a column scale c z is a third result, so that a saved z is still connected to its operands.
    """

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
        column_scale: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        dropout, groups = as_dropout(dropout_p, seed), groups_of(offsets, weight, bias)
        plan = call.plan
        if plan is None:
            masked = dropout is not None
            plan = call.plan = plan_call(call.backend, x, weight, A, bias, masked, groups)
        adapter = Adapter(A, B, scale, dropout, column_scale=column_scale)
        return _forward(plan.products.bound(groups), x, plan.readable(weight), adapter, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        x, weight, A, B, bias, scale, ctx.dropout_p, seed, ctx.call, *given = inputs
        offsets, column_scale = (*given, None, None)[:2]
        if ctx.needs_input_grad[5]:  # `check_operands` cannot see it in a transform's wrapper
            raise ValueError(ALPHA_IS_NO_PARAMETER)
        ctx.needs = Needs(*ctx.needs_input_grad[:5])
        ctx.dtype, ctx.adapter_dtype, (ctx.K, ctx.R) = x.dtype, A.dtype, A.shape[-2:]
        groups = groups_of(offsets, weight, bias)
        ctx.owned = None if groups is None else (groups.own_weight, groups.own_bias)
        ctx.scale = None if isinstance(scale, Tensor) else scale
        scale_tensor = scale if isinstance(scale, Tensor) else None
        ctx.set_materialize_grads(False)
        kept = formulas.keep(ctx.needs, x, weight, A, B, output[1])
        packed: tuple[Tensor, ...] = ()
        ctx.weight = None
        if not isinstance(weight, Tensor):
            ctx.weight, packed = weight, weight.tensors
            kept = kept._replace(weight=None)
            weight = None
        packed = packed if ctx.needs.x else ()
        needs_c = column_scale is not None and ctx.needs_input_grad[10]
        rest = scale_tensor, seed, column_scale
        ctx.save_for_backward(*kept, *rest, output[2] if needs_c else None, offsets, *packed)
        ctx.save_for_forward(x, weight, A, B, *rest)

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, ds: Tensor | None, dz: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        *grads, dc = gradients(ctx, dy, ds, dz, _fused)
        return (*grads, None, None, None, None, None, dc)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        x, weight, A, B, scale, seed, c = ctx.saved_tensors
        adapter = _adapter(ctx, A, B, scale, seed)
        if c is None:
            return formulas.jvp(COMPOSITE, x, weight, adapter, tangents[:6])
        of_z = (*tangents[:4], None, tangents[5])
        return formulas.scaled_jvp(
            COMPOSITE, x, weight, adapter._replace(column_scale=c), of_z, tangents[4], tangents[10]
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple[tuple[Tensor, ...], tuple]:
        results = torch.vmap(transparent, in_dims=in_dims)(*args)
        return results, (0,) * len(results)


def apply(*args: Any) -> tuple[Tensor, ...]:
    """LoRALinear.apply without inspecting forward's signature: that takes longer than a small product."""
    if torch._C._are_functorch_transforms_active():
        return LoRALinear.apply(*args)
    args = torch._functorch.utils.unwrap_dead_wrappers(args)
    return super(torch.autograd.Function, LoRALinear).apply(*args)  # type: ignore[misc]


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
    column_scale: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """`LoRALinear.forward` by plain ATen, which every transform can differentiate; no backend is chosen."""
    adapter = Adapter(A, B, scale, as_dropout(dropout_p, seed), column_scale=column_scale)
    products = COMPOSITE.bound(groups_of(offsets, weight, bias))
    return _forward(products, x, weight, adapter, bias)


def _forward(
    products: Products, x: Tensor, weight: Weight, adapter: Adapter, bias: Tensor | None
) -> tuple[Tensor, ...]:
    """(y, s), or (y, s, z) with a column scale."""
    if adapter.column_scale is None:
        return formulas.forward(products, x, weight, adapter, bias)
    return formulas.scaled_forward(products, x, weight, adapter, bias, keeps_z=True)  # type: ignore[return-value]


def gradients(
    ctx: Any,
    dy: Tensor | None,
    ds: Tensor | None,
    dz: Tensor | None,
    fused: Callable[..., tuple[Tensor | None, ...]],
) -> tuple[Tensor | None, ...]:
    """(dx, dW, dA, dB, dbias, dc) of what `LoRALinear.setup_context` kept: by `fused`, or by ATen, to be differentiated.

    dz is a gradient that z itself received.
    """
    tensors = ctx.saved_tensors  # read once: a checkpoint unpacks each tensor only once
    *saved, scale, seed, c, z, offsets = tensors[:10]
    kept = Saved(*saved)
    if ctx.weight is not None and ctx.needs.x:
        kept = kept._replace(weight=ctx.weight.with_tensors(tensors[10:]))
    if dy is None:
        if dz is not None:
            dy = torch.zeros_like(dz)
        elif ds is None or kept.B is None:  # without x's or A's gradient nothing depends on s
            return (None,) * 6
        else:
            dy = ds.new_zeros((ds.shape[0], kept.B.shape[-1]), dtype=ctx.dtype)
    adapter = _adapter(ctx, kept.A, kept.B, scale, seed)._replace(column_scale=c)
    groups = None if offsets is None else Groups(offsets, *ctx.owned)
    again = torch.is_grad_enabled() or ds is not None or dz is not None
    if again or _under_transform(dy) or any_dual(dy, *saved, c, z):
        products = COMPOSITE.bound(groups)
        return _backward(products, dy, z, kept, ctx, adapter, ds, dz)
    return fused(ctx, dy, z, kept, adapter, groups)


def _backward(
    products: Products,
    dy: Tensor,
    z: Tensor | None,
    kept: Saved,
    ctx: Any,
    adapter: Adapter,
    ds: Tensor | None = None,
    dz: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """(dx, dW, dA, dB, dbias, dc)."""
    rest = kept, ctx.needs, adapter, ctx.adapter_dtype, ds
    if adapter.column_scale is None:
        return (*formulas.backward(products, dy, *rest), None)
    return formulas.scaled_backward(products, dy, z, *rest, dz)


def _fused(
    ctx: Any, dy: Tensor, z: Tensor | None, kept: Saved, adapter: Adapter, groups: Groups | None
) -> tuple[Tensor | None, ...]:
    products: Products = COMPOSITE  # plain ATen operators, which modes can count and record
    plan = ctx.call.plan
    if plan is not None and not modes_are_active():
        products = plan.adjoint.products
        if kept.weight is not None:
            kept = kept._replace(weight=plan.adjoint.readable(kept.weight))
    return _backward(products.bound(groups), dy, z, kept, ctx, adapter)


def as_dropout(p: float, seed: Tensor | None) -> Dropout | None:
    """The Dropout of an operator's two flat arguments."""
    return None if seed is None or p == 0.0 else Dropout(p, seed)


def _adapter(
    ctx: Any, A: Tensor | None, B: Tensor | None, scale: Tensor | None, seed: Tensor | None
) -> Adapter:
    """The forward's adapter over what was saved of it."""
    dropout = as_dropout(ctx.dropout_p, seed)
    return Adapter(A, B, ctx.scale if scale is None else scale, dropout)  # type: ignore[arg-type]


def any_dual(*tensors: Tensor | None) -> bool:
    """Whether one of them carries a tangent of forward mode."""
    return forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    )


def modes_are_active() -> bool:
    """Whether a mode counts, records or traces operators, as FlopCounterMode and make_fx do."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._dispatch_tls_is_dispatch_key_included(torch._C.DispatchKey.PreDispatch)
    )


def _under_transform(t: Tensor) -> bool:
    """Whether t is a wrapper of a function transform (vmap of a backward), which only plain ATen can compute."""
    functorch = torch._C._functorch
    return functorch.is_functorch_wrapped_tensor(t) or functorch.is_legacy_batchedtensor(t)
