"""The autograd.Function of eager mode: first and higher derivatives, forward mode, vmap and torch.func.

A backend may have an operator of its own for the usual case, see `Backend.whole_layer`; this Function serves all others.

Derivatives that must themselves be differentiated, and those under a function transform, run `formulas` on the composite
backend, which autograd sees through. s is an output of the Function, so that a saved s is still connected to x and A.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_kernels import dispatch, formulas
from lora_kernels.backends.base import Backend, Scale
from lora_kernels.backends.composite import BACKEND as COMPOSITE
from lora_kernels.dropout import Dropout
from lora_kernels.formulas import Needs, Saved


class LoRALinear(torch.autograd.Function):
    """(x, weight, A, B, bias, alpha, dropout_p, seed, backend name) -> (y, s), as `formulas.forward` on 2-D x."""

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
        *saved, alpha_tensor, seed = ctx.saved_tensors
        kept = Saved(*saved)
        if dy is None:
            if ds is None or kept.B is None:  # without x's or A's gradient nothing depends on s
                return (None,) * 9
            dy = ds.new_zeros((ds.shape[0], kept.B.shape[1]), dtype=ctx.dtype)
        alpha = ctx.alpha_value if alpha_tensor is None else alpha_tensor
        dropout = as_dropout(ctx.dropout_p, seed)
        backend: Backend
        if torch.is_grad_enabled() or ds is not None or _under_transform(dy):
            backend = COMPOSITE
        else:
            backend = dispatch.resolve_backward(
                ctx.backend, dy, kept, ctx.adapter_dtype, dropout is not None
            )
        grads = formulas.backward(
            backend, dy, kept, ctx.needs, alpha, dropout, ctx.adapter_dtype, ds
        )
        return (*grads, None, None, None, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, Tensor]:
        x, weight, A, B, _, alpha_tensor, seed = ctx.saved_tensors
        alpha = ctx.alpha_value if alpha_tensor is None else alpha_tensor
        dropout = as_dropout(ctx.dropout_p, seed)
        return formulas.jvp(COMPOSITE, x, weight, A, B, alpha, dropout, tangents[:5])

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple[tuple[Tensor, Tensor], tuple]:
        def one_sample(x, weight, A, B, bias, alpha, dropout_p, seed, backend):
            return formulas.forward(
                COMPOSITE, x, weight, A, B, bias, alpha, as_dropout(dropout_p, seed)
            )

        return torch.vmap(one_sample, in_dims=in_dims)(*args), (0, 0)


def as_dropout(p: float, seed: Tensor | None) -> Dropout | None:
    """The Dropout of an operator's two flat arguments."""
    return None if seed is None or p == 0.0 else Dropout(p, seed)


def _under_transform(t: Tensor) -> bool:
    """Whether t is a wrapper of a function transform (vmap of a backward), which only plain ATen understands."""
    functorch = torch._C._functorch
    return functorch.is_functorch_wrapped_tensor(t) or functorch.is_legacy_batchedtensor(t)
