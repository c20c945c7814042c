"""Several projections that read one x, as q, k and v or gate and up do: one call that reads x for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels import formulas, functional
from lora_kernels.arguments import Arguments, number
from lora_kernels.autograd import any_dual, as_dropout, modes_are_active, under_transform
from lora_kernels.backends.base import ProjectionProducts
from lora_kernels.backends.composite import PRODUCTS as COMPOSITE
from lora_kernels.formulas import Needs, Saved
from lora_kernels.operands import Adapter, Scale, Weight, adapters_as_used
from lora_kernels.plan import JointPlan, plan_projections


class Projection(NamedTuple):
    """weight·x + bias + scale·(dropout(x)·A)·B: the operands of `lora_linear` without x, and its mask."""

    weight: Weight  # [N, K]
    A: Tensor  # [K, R]
    B: Tensor  # [R, N]
    scale: Scale
    bias: Tensor | None = None  # [N]
    dropout_p: float = 0.0
    seed: int | Tensor | None = None


_LEAST = len(Projection._fields) - len(Projection._field_defaults)


def lora_projections(
    x: Tensor, projections: Sequence[Projection | tuple], *, backend: str = "auto"
) -> tuple[Tensor, ...]:
    """y_p = x·weight_pᵀ + bias_p + scale_p·(dropout_p(x)·A_p)·B_p for each projection p of one x, with every derivative.

    x [..., K]; a projection is (weight [N, K], A [K, R], B [R, N], scale, bias [N] or None, dropout_p, seed), of which the
    last three may be left out: N, R, scale and dropout are its own. The result is a tuple of y [..., N]. Dtypes, sums,
    autocast and `backend` are those of `lora_linear`, and so is what each projection computes. The gradient of x is the
    sum over the projections; on a CPU it is summed in float32 and rounded once.

    Each projection drops elements by a mask of its own; those with the same integer as `seed` share one. The results of
    one call share one backward.

    It is one call where the backend's products of one x are faster together (`cpu`), and a call for each projection
    elsewhere: in compiled code, over a quantised weight, with a tensor as scale, under function transforms.

    ValueError or TypeError names the projection, the argument, its value and the rule.

    >>> x, q, k = torch.randn(4, 8), torch.nn.Linear(8, 6), torch.nn.Linear(8, 2)
    >>> A, B = torch.randn(8, 3), torch.randn(3, 6)
    >>> of_q = Projection(q.weight, A, B, 0.5, q.bias)
    >>> of_k = Projection(k.weight, A[:, :1], B[:1, :2], 2.0, k.bias)
    >>> y, z = lora_projections(x, [of_q, of_k])
    >>> torch.allclose(y, q(x) + 0.5 * (x @ A @ B), atol=1e-5), list(z.shape)
    (True, [4, 2])
    """
    parts, half = [], None
    for place, given in enumerate(projections):
        if not isinstance(given, tuple) or not _LEAST <= len(given) <= len(Projection._fields):
            raise TypeError(
                f"projections[{place}] must be a tuple of {Projection._fields}, got {given!r}"
            )
        part = Projection(*given)
        parts.append(part)
        try:
            half = functional.check_call(Arguments(x, *part, backend))
        except (TypeError, ValueError) as error:
            raise type(error)(f"projections[{place}]: {error}") from None
    if half is not None:
        x, parts = x.to(half), [_cast(part, half) for part in parts]
    with nullcontext() if half is None else torch.autocast(x.device.type, enabled=False):
        ys = together(x, parts, backend)
        return ys or tuple(functional.apply(Arguments(x, *part, backend)) for part in parts)


def _cast(part: Projection, dtype: torch.dtype) -> Projection:
    bias = None if part.bias is None else part.bias.to(dtype)
    return part._replace(weight=part.weight.to(dtype), bias=bias)


def together(
    x: Tensor, parts: Sequence[Projection], backend: str = "auto"
) -> tuple[Tensor, ...] | None:
    """`lora_projections` of checked and cast operands in one call, or None where each is to be computed for itself."""
    if len(parts) < 2 or functional.is_differentiated_elsewhere():
        return None
    weights, As, Bs, scales, biases, ps, seeds = map(list, zip(*parts, strict=True))
    if functional.is_traced(x, *weights, *As, *Bs, *biases):  # as with a quantised weight
        return None
    if any(isinstance(scale, Tensor) for scale in scales) or any(
        A.dtype != As[0].dtype for A in As
    ):
        return None
    if As[0].dtype != x.dtype:
        cast = [adapters_as_used(*each, x.dtype) for each in zip(As, Bs, strict=True)]
        As, Bs = map(list, zip(*cast, strict=True))
    rows = functional.rows_of(x)
    operands = *weights, *As, *Bs, *biases
    trains = torch.is_grad_enabled() and torch._C._any_requires_grad(rows, *operands)
    # With dropout a forward that is to be computed again, with gradients, draws its seeds in the same order.
    drops = any(ps)
    plan = plan_projections(
        backend, rows, weights, As, biases, [p > 0 for p in ps], trains or drops
    )
    if plan.products is None:
        return None
    seeds = [functional.seed_on(s, x.device) if p else None for s, p in zip(seeds, ps, strict=True)]
    call = Call(plan, [number(scale) for scale in scales], ps)
    if trains:
        ys = LoRAProjections.apply(call, rows, *operands, *seeds)[:-1]
    else:
        ys, _ = call.forward(rows, weights, As, Bs, biases, seeds)
    return tuple(functional.like(y, x) for y in ys)


class Call(NamedTuple):
    """What `LoRAProjections` is given beside tensors: the plan, and a scale and a dropout for each projection."""

    plan: JointPlan
    scales: list[float]
    dropout_ps: list[float]

    def forward(
        self,
        x: Tensor,
        weights: Sequence[Tensor],
        A: Sequence[Tensor],
        B: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        seeds: Sequence[Tensor | None],
    ) -> tuple[list[Tensor], Tensor]:
        """(y of each, s), by the plan's products."""
        products: Any = self.plan.products
        return formulas.projections_forward(
            products, x, weights, self.adapters(A, B, seeds), biases
        )

    def adapters(
        self, A: Sequence[Any], B: Sequence[Any], seeds: Sequence[Tensor | None]
    ) -> list[Adapter]:
        """The adapter of each over its tensors, of which some may be None."""
        masks = map(as_dropout, self.dropout_ps, seeds)
        return list(map(Adapter, A, B, self.scales, masks))


class LoRAProjections(torch.autograd.Function):
    """(call, x, every weight, every A, every B, every bias, every seed) -> (every y, s), on 2-D x.

    s [M, ΣR] is a result, so that what is saved of it is still connected to x and the A's.
    """

    @staticmethod
    def forward(ctx: Any, call: Call, x: Tensor, *flat: Any) -> tuple[Tensor, ...]:
        weights, As, Bs, _, seeds = lists = _lists(flat)
        ys, s = call.forward(x, *lists)
        ctx.call, ctx.dtype, ctx.adapter_dtype = call, x.dtype, As[0].dtype
        ctx.ranks = [A.shape[1] for A in As]
        needs_x, *given = ctx.needs_input_grad[1:]
        ctx.needs = [Needs(needs_x, *each) for each in zip(*_lists(given)[:4], strict=True)]
        ctx.set_materialize_grads(False)
        fixed = [y for y, need in zip(ys, ctx.needs, strict=True) if not any(need)]
        ctx.mark_non_differentiable(*fixed)
        operands = zip(ctx.needs, weights, As, Bs, strict=True)
        kept = [formulas.keep(need, x, weight, A, B, s) for need, weight, A, B in operands]
        xs, *each, of_all = zip(*kept, strict=True)
        shared = [next((t for t in ts if t is not None), None) for ts in (xs, of_all)]
        ctx.save_for_backward(*shared, *chain(*each), *seeds)
        return (*ys, s)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *given, ds = grads
        x, s, *tensors = ctx.saved_tensors  # read once: a checkpoint unpacks each tensor only once
        dys = [dy.to_dense() if dy is not None and dy.is_sparse else dy for dy in given]
        weights, As, Bs, seeds = _lists(tensors, 4)
        adapters = ctx.call.adapters(As, Bs, seeds)
        saved = [Saved(x, *each, s) for each in zip(weights, As, Bs, strict=True)]
        again = (
            torch.is_grad_enabled()
            or ds is not None
            or modes_are_active()
            or any_dual(x, s, *tensors, *dys)
            or any(dy is not None and under_transform(dy) for dy in dys)
        )
        products = None if again else ctx.call.plan.adjoint
        alike = len({(need.x, need.A, need.B) for need in ctx.needs}) == 1
        if products is None or not alike or any(dy is None for dy in dys):
            dx, each = _gradients_apart(ctx, dys, ds, saved, adapters, again)
        else:
            dx, each = _gradients_together(ctx, products, dys, saved, adapters)  # type: ignore[arg-type]
        return (None, dx, *chain(*zip(*each, strict=True)), *[None] * len(dys))


def _lists(flat: Sequence[Any], count: int = 5) -> list[Sequence[Any]]:
    """`count` lists of equal lengths, one after the other in `flat`."""
    each = len(flat) // count
    return [flat[i : i + each] for i in range(0, len(flat), each)]


# (dW, dA, dB, dbias) of each projection, beside the dx of all.
_Each = list[tuple[Tensor | None, ...]]


def _gradients_together(
    ctx: Any,
    products: ProjectionProducts,
    dys: list[Tensor],
    saved: list[Saved],
    adapters: list[Adapter],
) -> tuple[Tensor | None, _Each]:
    rest = ctx.needs[0], adapters, ctx.ranks, ctx.adapter_dtype
    dx, dA, dB = formulas.projections_backward(products, dys, saved, *rest)
    each: _Each = []
    for p, (need, dy) in enumerate(zip(ctx.needs, dys, strict=True)):
        one = ctx.call.plan.plans[p].adjoint.products
        dW = one.weight_grad(dy, saved[p].x) if need.weight else None
        each.append((dW, dA[p], dB[p], one.bias_grad(dy) if need.bias else None))
    return dx, each


def _gradients_apart(
    ctx: Any,
    dys: list[Tensor | None],
    ds: Tensor | None,
    saved: list[Saved],
    adapters: list[Adapter],
    again: bool,
) -> tuple[Tensor | None, _Each]:
    """By the formulas of one projection, in turn; `again`: by ATen, which can itself be differentiated."""
    dx: Tensor | None = None
    each: _Each = []
    for p, (dy, kept, need) in enumerate(zip(dys, saved, ctx.needs, strict=True)):
        begin, rank = sum(ctx.ranks[:p]), ctx.ranks[p]
        of_s, of_ds = (None if t is None else t[:, begin : begin + rank] for t in (kept.s, ds))
        if dy is None and of_ds is not None and kept.B is not None:
            dy = of_ds.new_zeros((of_ds.shape[0], kept.B.shape[1]), dtype=ctx.dtype)
        if dy is None:
            each.append((None, None, None, None))
            continue
        products = COMPOSITE if again else ctx.call.plan.plans[p].adjoint.products
        rest = need, adapters[p], ctx.adapter_dtype, of_ds
        own, *others = formulas.backward(products, dy, kept._replace(s=of_s), *rest)
        dx = own if dx is None or own is None else dx + own
        each.append(tuple(others))
    return dx, each
