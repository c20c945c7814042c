"""The algebra of a LoRA linear layer, once, over the products of any backend.

forward    y, s = x·Wᵀ + bias + s·B,  s = alpha·(mask∘x)·A
backward   dx   = dy·W + mask∘(q·Aᵀ),  q = alpha·dy·Bᵀ      the forward's product with other operands
           dA   = (mask∘x)ᵀ·q
           dB   = sᵀ·dy
           dW   = dyᵀ·x,  dbias = Σ dy                       when the base is trained

x [M, K], weight W [N, K] as nn.Linear stores it, A [K, R], B [R, N], bias [N], y and dy [M, N], s and q [M, R]. The
adjoint of a LoRA linear is a LoRA linear, so one product serves both directions. Over groups of rows the same lines hold
for each group: the products are bound to the groups, and operands are stacks. See Hu et al., "LoRA: low-rank adaptation of
large language models", ICLR 2022, for the layer.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor

from lora_kernels.backends.base import Products
from lora_kernels.operands import Adapter, Weight, in_memory, transposed

# (dx, dW, dA, dB, dbias), each None where it is not needed.
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class Needs(NamedTuple):
    """Which gradients are needed."""

    x: bool
    weight: bool
    A: bool
    B: bool
    bias: bool


class Saved(NamedTuple):
    """What backward reads; each is None where no gradient that is needed reads it."""

    x: Tensor | None
    weight: Weight | None
    A: Tensor | None
    B: Tensor | None
    s: Tensor | None


def keep(needs: Needs, x: Tensor, weight: Weight, A: Tensor, B: Tensor, s: Tensor) -> Saved:
    """What to save for `backward`: only what a needed gradient reads."""
    return Saved(
        x if needs.weight or needs.A else None,
        weight if needs.x else None,
        A if needs.x else None,
        B if needs.x or needs.A else None,
        s if needs.B else None,
    )


def forward(
    products: Products, x: Tensor, weight: Weight, adapter: Adapter, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y [M, N] and s [M, R]."""
    if products.reads_memory:
        x, weight, bias = map(in_memory, (x, weight, bias))
        adapter = Adapter(*map(in_memory, adapter))
    return products.shrink_expand(x, transposed(weight), adapter, bias)


def backward(
    products: Products,
    dy: Tensor,
    saved: Saved,
    needs: Needs,
    adapter: Adapter,
    adapter_dtype: torch.dtype,
    ds: Tensor | None = None,
) -> Gradients:
    """(dx, dW, dA, dB, dbias), each None where it is not needed.

    `adapter` is the forward's, with A and B of `saved`; `ds` is a gradient that s itself received.
    """
    if products.reads_memory:
        dy, saved = in_memory(dy), Saved(*map(in_memory, saved))
        adapter = Adapter(*map(in_memory, adapter))
    x, weight, s = cast(tuple[Tensor, Tensor, Tensor], (saved.x, saved.weight, saved.s))
    if dy.is_sparse:  # from an embedding or a gather with sparse gradients
        dy = dy.to_dense()
    adjoint = adapter.t()
    dx = dW = dA = dB = q = None
    if needs.B and (needs.x or needs.A):
        q, dB = products.shrink_wgrad(dy, adjoint, s, adapter_dtype)
    elif needs.B:
        dB = products.wgrad(s, dy, adapter_dtype)
    elif (needs.A and not needs.x) or (needs.x and ds is not None):
        q = products.shrink(dy, adjoint)
    if ds is not None and q is not None:
        q = q + products.scaled(ds, adapter.scale)
    if needs.x and q is None:
        dx, q = products.shrink_expand(dy, weight, adjoint)
    elif needs.x:
        dx = products.expand(dy, weight, cast(Tensor, q), adjoint)
    if needs.A:
        dA = products.wgrad(x, cast(Tensor, q), adapter_dtype, adapter.dropout_in)
    if needs.weight:
        dW = products.weight_grad(dy, x)
    dbias = products.bias_grad(dy) if needs.bias else None
    return dx, dW, dA, dB, dbias


def jvp(
    products: Products,
    x: Tensor,
    weight: Weight,
    adapter: Adapter,
    tangents: tuple[Tensor | None, ...],
) -> tuple[Tensor, Tensor]:
    """The tangents of (y, s) for those of (x, weight, A, B, bias, scale), by the product rule; None is a zero tangent."""
    tx, tweight, tA, tB, tbias, tscale = tangents
    s = products.shrink(x, adapter)
    ts = torch.zeros_like(s)
    if tx is not None:
        ts = ts + products.shrink(tx, adapter)
    if tA is not None:
        ts = ts + products.shrink(x, adapter._replace(A=tA))
    if tscale is not None:
        ts = ts + products.shrink(x, adapter._replace(scale=tscale))
    base = torch.zeros_like(x) if tx is None else tx
    ty = products.expand(base, weight.t(), ts, adapter, tbias)
    if tweight is not None:
        ty = ty + x @ tweight.t()
    if tB is not None:
        ty = ty + (s @ tB.to(s.dtype)).to(ty.dtype)
    return ty, ts
