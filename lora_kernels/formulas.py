"""The algebra of a LoRA linear layer, once, over the products of any backend.

forward    y, s = x·Wᵀ + bias + s·B,  s = alpha·(mask∘x)·A
backward   dx   = dy·W + mask∘(q·Aᵀ),  q = alpha·dy·Bᵀ      the forward's product with other operands
           dA   = (mask∘x)ᵀ·q
           dB   = sᵀ·dy
           dW   = dyᵀ·x,  dbias = Σ dy                       when the base is trained

With DoRA's column scale c [N] the y above is z, and dy is dz:

forward    y    = c∘z + bias,  c = m / n,  n = the row norms of W + alpha·(A·B)ᵀ, constants for every derivative
backward   dz   = c∘dy,  dc = Σ dy∘z,  dm = dc / n
           q    = alpha·dy·(c∘B)ᵀ,  dB = c∘(sᵀ·dy)           so that only dx and dW read dz, and no rounding of it is in q

x [M, K], weight W [N, K] as nn.Linear stores it, A [K, R], B [R, N], bias [N], y and dy [M, N], s and q [M, R]. The
adjoint of a LoRA linear is a LoRA linear, so one product serves both directions. Of several projections that read one x
dx is the sum. Over groups of rows the same lines hold
for each group: the products are bound to the groups, and operands are stacks. See Hu et al., "LoRA: low-rank adaptation of
large language models", ICLR 2022, for the layer, and Liu et al., "DoRA: weight-decomposed low-rank adaptation", ICML 2024,
for m [N] and for n as a constant (section 4.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from lora_kernels.backends.base import Products, ProjectionProducts
from lora_kernels.operands import Adapter, Weight, in_memory, lies_in_memory, transposed

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


def _readable(products: Products, *operands: Any) -> Any:
    """The operands, `in_memory` where the products read that."""
    if not products.reads_memory or lies_in_memory(*operands):
        return operands
    return map(in_memory, operands)


def forward(
    products: Products, x: Tensor, weight: Weight, adapter: Adapter, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y [M, N] and s [M, R]."""
    x, weight, adapter, bias = _readable(products, x, weight, adapter, bias)
    return products.shrink_expand(x, transposed(weight), adapter, bias)


def scaled_forward(
    products: Products,
    x: Tensor,
    weight: Weight,
    adapter: Adapter,
    bias: Tensor | None,
    keeps_z: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y [M, N], s [M, R] and, where it is kept for dc, z [M, N]: DoRA's forward."""
    x, weight, adapter, bias = _readable(products, x, weight, adapter, bias)
    return products.shrink_expand_scaled(x, weight.t(), adapter, bias, keeps_z=keeps_z)


def scaled_backward(
    products: Products,
    dy: Tensor,
    z: Tensor | None,
    saved: Saved,
    needs: Needs,
    adapter: Adapter,
    adapter_dtype: torch.dtype,
    ds: Tensor | None = None,
    dz: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """(dx, dW, dA, dB, dbias, dc): `backward` of z, which got the gradient `dz` itself; no dc where z was not kept."""
    c, plain = cast(Tensor, adapter.column_scale), adapter._replace(column_scale=None)
    dy, c, z, saved, plain = _readable(products, dy, c, z, saved, plain)
    if dy.is_sparse:
        dy = dy.to_dense()
    of_z: Tensor | None = None
    dc: Tensor | None = None
    if dz is not None:
        dbias = dy.sum(0) if needs.bias else None
        scaled, dc = products.scaled_gradient(dy, c, z)
        above = saved, needs._replace(bias=False), plain, adapter_dtype, ds
        dx, dW, dA, dB, _ = backward(products, scaled + dz, *above)
        return dx, dW, dA, dB, dbias, dc
    if needs.B and (needs.x or needs.A):
        own = plain.t(), cast(Tensor, saved.s), adapter_dtype
        q, dB, of_z, dc = products.scaled_shrink_wgrad(dy, c, z, *own)
        rest = saved, needs._replace(B=False), plain, adapter_dtype, ds, of_z, q
        dx, dW, dA, _, dbias = backward(products, dy, *rest)
        return dx, dW, dA, dB, dbias, dc
    if needs.x or needs.weight or z is not None:
        of_z, dc = products.scaled_gradient(dy, c, z)
    if plain.B is not None:
        plain = plain._replace(B=(plain.B * c).to(plain.B.dtype))
    dx, dW, dA, dB, dbias = backward(products, dy, saved, needs, plain, adapter_dtype, ds, of_z)
    return dx, dW, dA, None if dB is None else (dB * c).to(adapter_dtype), dbias, dc


def row_norms(products: Products, weight: Tensor, adapter: Adapter) -> Tensor:
    """n [N] of `Products.row_norms`, rounded to the adapter's dtype, in which PEFT makes m of it: c = 1 where m is n."""
    weight, adapter = _readable(products, weight, adapter)
    norms = products.row_norms(weight, adapter)
    return norms.to(adapter.A.dtype).to(norms.dtype)


def backward(
    products: Products,
    dy: Tensor,
    saved: Saved,
    needs: Needs,
    adapter: Adapter,
    adapter_dtype: torch.dtype,
    ds: Tensor | None = None,
    dz: Tensor | None = None,
    q: Tensor | None = None,
) -> Gradients:
    """(dx, dW, dA, dB, dbias), each None where it is not needed.

    `adapter` is the forward's, with A and B of `saved`; `ds` is a gradient that s itself received; `dz`: what dx and dW
    read in the place of dy; `q`, where the caller has it.
    """
    dy, saved, adapter = _readable(products, dy, saved, adapter)
    x, weight, s = cast(tuple[Tensor, Tensor, Tensor], (saved.x, saved.weight, saved.s))
    if dy.is_sparse:  # from an embedding or a gather with sparse gradients
        dy = dy.to_dense()
    adjoint, apart = adapter.t(), dz is not None
    dz = dy if dz is None else dz
    dx = dW = dA = dB = None
    if needs.x and needs.A and needs.B and ds is None and not apart:
        dx, dA, dB = products.gradients(dy, weight, adjoint, x, s, adapter_dtype)
        needs = Needs(False, needs.weight, False, False, needs.bias)
    if needs.B and (needs.x or needs.A):
        q, dB = products.shrink_wgrad(dy, adjoint, s, adapter_dtype)
    elif needs.B:
        dB = products.wgrad(s, dy, adapter_dtype)
    elif q is None and ((needs.A and not needs.x) or (needs.x and (ds is not None or apart))):
        q = products.shrink(dy, adjoint)
    if ds is not None and q is not None:
        q = q + products.scaled(ds, adapter.scale)
    if needs.x and q is None:
        dx, q = products.shrink_expand(dy, weight, adjoint)
    elif needs.x:
        dx = products.expand(dz, weight, cast(Tensor, q), adjoint)
    if needs.A:
        dA = products.wgrad(x, cast(Tensor, q), adapter_dtype, adapter.dropout_in)
    if needs.weight:
        dW = products.weight_grad(dz, x)
    dbias = products.bias_grad(dy) if needs.bias else None
    return dx, dW, dA, dB, dbias


def projections_forward(
    products: ProjectionProducts,
    x: Tensor,
    weights: Sequence[Tensor],
    adapters: Sequence[Adapter],
    biases: Sequence[Tensor | None],
) -> tuple[list[Tensor], Tensor]:
    """y [M, N] of each of several projections of one x, and s [M, ΣR]."""
    s = products.shrink([x], adapters)
    return products.expand(x, [transposed(w) for w in weights], s, adapters, biases), s  # type: ignore[misc]


def projections_backward(
    products: ProjectionProducts,
    dys: Sequence[Tensor],
    saved: Sequence[Saved],
    needs: Needs,
    adapters: Sequence[Adapter],
    ranks: Sequence[int],
    adapter_dtype: torch.dtype,
) -> tuple[Tensor | None, Sequence[Tensor | None], Sequence[Tensor | None]]:
    """(dx, dA of each, dB of each) of `projections_forward`, where all have a dy and the same `needs`.

    Each of `saved` has the s of all.
    """
    adjoints = [adapter.t() for adapter in adapters]
    dx = q = None
    dA: Sequence[Tensor | None] = [None] * len(dys)
    dB: Sequence[Tensor | None] = dA
    if needs.x or needs.A:
        q = products.shrink(dys, adjoints)
    if needs.x:
        weights = [cast(Tensor, each.weight) for each in saved]
        dx = products.expand_sum(dys, weights, cast(Tensor, q), adjoints)
    if needs.A:
        x, masks = cast(Tensor, saved[0].x), [adapter.dropout_in for adapter in adapters]
        dA = products.wgrad([x], cast(Tensor, q).split(ranks, 1), adapter_dtype, masks)
    if needs.B:
        dB = products.wgrad(cast(Tensor, saved[0].s).split(ranks, 1), dys, adapter_dtype)
    return dx, dA, dB


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
