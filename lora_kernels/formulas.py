"""The algebra of a LoRA linear layer, once, over the products of any backend.

forward    y, s = x·Wᵀ + bias + s·B,  s = alpha·(mask∘x)·A
backward   dx   = dy·W + mask∘(q·Aᵀ),  q = alpha·dy·Bᵀ      the forward's product with other operands
           dA   = (mask∘x)ᵀ·q
           dB   = sᵀ·dy
           dW   = dyᵀ·x,  dbias = Σ dy                       when the base is trained

x [M, K], weight W [N, K] as nn.Linear stores it, A [K, R], B [R, N], bias [N], y and dy [M, N], s and q [M, R]. The
adjoint of a LoRA linear is a LoRA linear, so one product serves both directions. See Hu et al., "LoRA: low-rank
adaptation of large language models", ICLR 2022, for the layer.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor

from lora_kernels.backends.base import Backend, Scale
from lora_kernels.backends.base import accumulated as accumulated  # for the layers above
from lora_kernels.dropout import Dropout

# (dx, dW, dA, dB, dbias), each None where it is not needed.
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class Needs(NamedTuple):
    """Which gradients somebody asked for."""

    x: bool
    weight: bool
    A: bool
    B: bool
    bias: bool


class Saved(NamedTuple):
    """What backward reads; each is None where no gradient that is needed reads it."""

    x: Tensor | None
    weight: Tensor | None
    A: Tensor | None
    B: Tensor | None
    s: Tensor | None


def keep(needs: Needs, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, s: Tensor) -> Saved:
    """What to save for `backward`: only what a needed gradient reads."""
    return Saved(
        x if needs.weight or needs.A else None,
        weight if needs.x else None,
        A if needs.x else None,
        B if needs.x or needs.A else None,
        s if needs.B else None,
    )


def forward(
    backend: Backend,
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None,
    alpha: Scale,
    dropout: Dropout | None,
) -> tuple[Tensor, Tensor]:
    """y [M, N] and s [M, R]."""
    return backend.expand(x, weight.t(), A, B, alpha, bias, dropout_in=dropout)


def backward(
    backend: Backend,
    dy: Tensor,
    saved: Saved,
    needs: Needs,
    alpha: Scale,
    dropout: Dropout | None,
    adapter_dtype: torch.dtype,
    ds: Tensor | None = None,
) -> Gradients:
    """(dx, dW, dA, dB, dbias), each None where it is not needed; `ds` is a gradient that s itself received."""
    x, weight, A, B, s = cast(tuple[Tensor, ...], saved)  # `keep` kept what is needed
    dx = dW = dA = dB = q = None
    if needs.B and (needs.x or needs.A):
        q, dB = backend.shrink_wgrad(dy, B.t(), alpha, s, adapter_dtype)
    elif needs.B:
        dB = backend.wgrad(s, dy, adapter_dtype)
    elif (needs.A and not needs.x) or (needs.x and ds is not None):
        q = backend.shrink(dy, B.t(), alpha)
    if ds is not None and q is not None:
        q = q + alpha * ds
    if needs.x:
        dx, q = backend.expand(dy, weight, B.t(), A.t(), alpha, s=q, dropout_out=dropout)
    if needs.A:
        assert q is not None
        dA = backend.wgrad(x, q, adapter_dtype, dropout)
    if needs.weight:
        dW = dy.t() @ x
    dbias = dy.sum(0) if needs.bias else None
    return dx, dW, dA, dB, dbias


def jvp(
    backend: Backend,
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    alpha: Scale,
    dropout: Dropout | None,
    tangents: tuple[Tensor | None, ...],
) -> tuple[Tensor, Tensor]:
    """The tangents of (y, s) for those of (x, weight, A, B, bias, alpha), by the product rule; None is a zero tangent."""
    tx, tweight, tA, tB, tbias, talpha = tangents
    s = backend.shrink(x, A, alpha, dropout)
    ts = torch.zeros_like(s)
    if tx is not None:
        ts = ts + backend.shrink(tx, A, alpha, dropout)
    if tA is not None:
        ts = ts + backend.shrink(x, tA, alpha, dropout)
    if talpha is not None:
        ts = ts + backend.shrink(x, A, talpha, dropout)
    base = torch.zeros_like(x) if tx is None else tx
    ty, _ = backend.expand(base, weight.t(), A, B, alpha, tbias, s=ts)
    if tweight is not None:
        ty = ty + x @ tweight.t()
    if tB is not None:
        ty = ty + (s @ tB.to(s.dtype)).to(ty.dtype)
    return ty, ts
