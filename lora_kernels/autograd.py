"""The autograd.Function of eager mode: first and higher derivatives, forward mode, vmap and torch.func.

A backend may have an operator of its own for the usual case, see `Backend.whole_layer`; this Function serves all others.

Derivatives that must themselves be differentiated, and those under a function transform, run `formulas` on the composite
backend, which autograd sees through. s is an output of the Function, so that a saved s is still connected to x and A.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lora_kernels import dispatch, formulas
from lora_kernels.backends.base import Backend, Scale
from lora_kernels.backends.composite import BACKEND as COMPOSITE
from lora_kernels.dropout import Dropout
from lora_kernels.formulas import Gradients, Needs, Saved

ALPHA_IS_NO_PARAMETER = "alpha must not require grad: it is a run-time value, no parameter"


class LoRALinear(torch.autograd.Function):
    """(x, weight, A, B, bias, alpha, dropout_p, seed, backend name) -> (y, s), as `formulas.forward` on 2-D x."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        A: Tensor,
        B: Tensor,
        bias: Tensor | None,
        alpha: Scale,
        dropout_p: float,
        seed: Tensor | None,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        dropout = as_dropout(dropout_p, seed)
        chosen = dispatch.resolve(backend, x, weight, A, B, bias, dropout is not None)
        return formulas.forward(chosen, x, weight, A, B, bias, alpha, dropout)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        x, weight, A, B, _, alpha, ctx.dropout_p, seed, ctx.backend = inputs
        if ctx.needs_input_grad[5]:  # a transform's wrapper may hide it from `check_operands`
            raise ValueError(ALPHA_IS_NO_PARAMETER)
        ctx.needs = Needs(*ctx.needs_input_grad[:5])
        ctx.dtype, ctx.adapter_dtype = x.dtype, A.dtype
        ctx.alpha_value = None if isinstance(alpha, Tensor) else alpha
        alpha_tensor = alpha if isinstance(alpha, Tensor) else None
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            *formulas.keep(ctx.needs, x, weight, A, B, output[1]), alpha_tensor, seed
        )
        ctx.save_for_forward(x, weight, A, B, None, alpha_tensor, seed)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, ds: Tensor | None) -> tuple[Tensor | None, ...]:
        return (*gradients(ctx, dy, ds, _fused), None, None, None, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, Tensor]:
        x, weight, A, B, _, alpha_tensor, seed = ctx.saved_tensors
        alpha = ctx.alpha_value if alpha_tensor is None else alpha_tensor
        dropout = as_dropout(ctx.dropout_p, seed)
        return formulas.jvp(COMPOSITE, x, weight, A, B, alpha, dropout, tangents[:6])

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple[tuple[Tensor, Tensor], tuple]:
        return torch.vmap(transparent, in_dims=in_dims)(*args), (0, 0)


def call(*args: Any) -> tuple[Tensor, Tensor]:
    """LoRALinear.apply without its look at forward's signature in every call, which costs more than a small product."""
    if torch._C._are_functorch_transforms_active():
        return LoRALinear.apply(*args)
    args = torch._functorch.utils.unwrap_dead_wrappers(args)
    return super(torch.autograd.Function, LoRALinear).apply(*args)  # type: ignore[misc]


def transparent(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None,
    alpha: Scale,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """`LoRALinear.forward` by plain ATen, which every transform sees through; no backend is chosen."""
    return formulas.forward(COMPOSITE, x, weight, A, B, bias, alpha, as_dropout(dropout_p, seed))


def transparent_gradients(dy: Tensor, *args: Any) -> Gradients:
    """`formulas.backward` by plain ATen."""
    return formulas.backward(COMPOSITE, dy, *args)


def gradients(
    ctx: Any, dy: Tensor | None, ds: Tensor | None, fused: Callable[..., Gradients]
) -> Gradients:
    """(dx, dW, dA, dB, dbias) of what `LoRALinear.setup_context` kept: by `fused`, or by ATen, to be differentiated."""
    *saved, alpha_tensor, seed = ctx.saved_tensors
    kept = Saved(*saved)
    if dy is None:
        if ds is None or kept.B is None:  # without x's or A's gradient nothing depends on s
            return (None,) * 5
        dy = ds.new_zeros((ds.shape[0], kept.B.shape[1]), dtype=ctx.dtype)
    alpha = ctx.alpha_value if alpha_tensor is None else alpha_tensor
    if torch.is_grad_enabled() or ds is not None or _under_transform(dy) or any_dual(dy, *saved):
        dropout = as_dropout(ctx.dropout_p, seed)
        return transparent_gradients(dy, kept, ctx.needs, alpha, dropout, ctx.adapter_dtype, ds)
    return fused(ctx, dy, kept, alpha, seed)


def _fused(ctx: Any, dy: Tensor, kept: Saved, alpha: Scale, seed: Tensor | None) -> Gradients:
    dropout = as_dropout(ctx.dropout_p, seed)
    backend: Backend = COMPOSITE  # its operators are known to whoever counts or records them
    if not modes_are_active():
        backend = dispatch.resolve_backward(
            ctx.backend, dy, kept, ctx.adapter_dtype, dropout is not None
        )
    return formulas.backward(backend, dy, kept, ctx.needs, alpha, dropout, ctx.adapter_dtype)


def as_dropout(p: float, seed: Tensor | None) -> Dropout | None:
    """The Dropout of an operator's two flat arguments."""
    return None if seed is None or p == 0.0 else Dropout(p, seed)


def any_dual(*tensors: Tensor | None) -> bool:
    """Whether one of them carries a tangent of forward mode."""
    return forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    )


def modes_are_active() -> bool:
    """Whether somebody counts, records or traces operators, as FlopCounterMode and make_fx do."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._dispatch_tls_is_dispatch_key_included(torch._C.DispatchKey.PreDispatch)
    )


def _under_transform(t: Tensor) -> bool:
    """Whether t is a wrapper of a function transform (vmap of a backward), which only plain ATen understands."""
    functorch = torch._C._functorch
    return functorch.is_functorch_wrapped_tensor(t) or functorch.is_legacy_batchedtensor(t)
