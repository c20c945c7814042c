"""Several projections that read one x, as q, k and v or gate and up do: one call that reads x for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels import formulas, functional
from lora_kernels.autograd import any_dual, as_dropout, modes_are_active, under_transform
from lora_kernels.backends.base import ProjectionProducts
from lora_kernels.backends.composite import PRODUCTS as COMPOSITE
from lora_kernels.formulas import Needs, Saved
from lora_kernels.operands import Adapter, Scale, Weight, adapters_as_used
from lora_kernels.plan import Plan, plan_call


class Projection(NamedTuple):
    """weight·x + bias + scale·(dropout(x)·A)·B: the operands of `lora_linear` without x, and its mask."""

    weight: Weight  # [N, K]
    A: Tensor  # [K, R]
    B: Tensor  # [R, N]
    scale: Scale
    bias: Tensor | None = None  # [N]
    dropout_p: float = 0.0
    seed: int | Tensor | None = None


def lora_projections(
    x: Tensor, projections: Sequence[Projection | tuple], *, backend: str = "auto"
) -> tuple[Tensor, ...]:
    """y_p = x·weight_pᵀ + bias_p + scale_p·(dropout_p(x)·A_p)·B_p for each projection p of one x, with every derivative.

    x [..., K]; a projection is (weight [N, K], A [K, R], B [R, N], scale, bias [N] or None, dropout_p, seed), of which the
    last three may be left out: N, R, scale and dropout are its own. The result is a tuple of y [..., N]. Dtypes, sums,
    autocast and `backend` are those of `lora_linear`, and so is what each projection computes. The gradient of x is the
    sum over the projections; on a CPU it is summed in float32 and rounded once.

    Each projection drops elements by a mask of its own; those with the same integer as `seed` share one.

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
    parts = [Projection(*part) for part in projections]
    half = None
    for place, part in enumerate(parts):
        try:
            half = functional.check_call(x, *part, backend)
        except (TypeError, ValueError) as error:
            raise type(error)(f"projections[{place}]: {error}") from None
    if half is not None:
        x, parts = x.to(half), [_cast(part, half) for part in parts]
    with nullcontext() if half is None else torch.autocast(x.device.type, enabled=False):
        plans = _plans(x, parts, backend)
        if plans is not None:
            return _together(x, parts, plans)
        return tuple(functional.apply(x, *part, backend) for part in parts)


def _cast(part: Projection, dtype: torch.dtype) -> Projection:
    bias = None if part.bias is None else part.bias.to(dtype)
    return part._replace(weight=part.weight.to(dtype), bias=bias)


def _plans(x: Tensor, parts: list[Projection], backend: str) -> list[Plan] | None:
    """The plan of each projection, or None where they are not computed together."""
    operands = [t for part in parts for t in (part.weight, part.A, part.B, part.bias)]
    if (
        len(parts) < 2
        or not all(t is None or isinstance(t, Tensor) for t in operands)
        or functional.is_traced(x, *operands)  # type: ignore[arg-type]
        or functional.is_differentiated_elsewhere()
        or any(isinstance(part.scale, Tensor) for part in parts)
        or len({part.A.dtype for part in parts}) > 1
    ):
        return None
    plans = [
        plan_call(backend, x, part.weight, part.A, part.bias, part.dropout_p > 0) for part in parts
    ]
    if len({plan.backend for plan in plans}) > 1 or any(plan.problem.empty for plan in plans):
        return None
    return None if _products(plans) is None else plans


def _products(plans: Sequence[Plan]) -> ProjectionProducts | None:
    each = [plan.products for plan in plans]
    return each[0].together(each)


def _together(x: Tensor, parts: list[Projection], plans: list[Plan]) -> tuple[Tensor, ...]:
    """y of each, by the products of `plans` together."""
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    flat: list[Tensor | None] = []
    for part in parts:
        A, B = adapters_as_used(part.A, part.B, x.dtype)
        seed = functional.seed_on(part.seed, x.device) if part.dropout_p else None
        flat += [part.weight, A, B, part.bias, seed]  # type: ignore[list-item]
    scales = [functional.as_number(part.scale) for part in parts]
    call = Call(plans, scales, [part.dropout_p for part in parts])
    if torch.is_grad_enabled() and torch._C._any_requires_grad(rows, *flat):
        ys = LoRAProjections.apply(call, rows, *flat)[:-1]
    else:
        ys, _ = call.forward(rows, flat)
    if x.ndim == 2:
        return tuple(ys)
    return tuple(y.reshape(*x.shape[:-1], y.shape[1]) for y in ys)


class Call(NamedTuple):
    """What `LoRAProjections` is given beside tensors: a plan, scale and dropout for each projection."""

    plans: list[Plan]
    scales: list[float]
    dropout_ps: list[float]

    def forward(self, x: Tensor, flat: Sequence[Tensor | None]) -> tuple[list[Tensor], Tensor]:
        """(y of each, s), by the plans' products together; `flat`: weight, A, B, bias and seed of each."""
        weights, A, B, biases, seeds = (list(flat[i::5]) for i in range(5))
        adapters = self.adapters(A, B, seeds)
        products: Any = _products(self.plans)
        return formulas.projections_forward(products, x, weights, adapters, biases)  # type: ignore[arg-type]

    def adapters(
        self, A: Sequence[Any], B: Sequence[Any], seeds: Sequence[Tensor | None]
    ) -> list[Adapter]:
        """The adapter of each over its tensors, of which some may be None."""
        masks = map(as_dropout, self.dropout_ps, seeds)
        return list(map(Adapter, A, B, self.scales, masks))


class LoRAProjections(torch.autograd.Function):
    """(call, x, then weight, A, B, bias, seed of each) -> (y of each, s), on 2-D x.

    s [M, ΣR] is a result, so that what is saved of it is still connected to x and the A's.
    """

    @staticmethod
    def forward(ctx: Any, call: Call, x: Tensor, *flat: Tensor | None) -> tuple[Tensor, ...]:
        ys, s = call.forward(x, flat)
        ctx.call, ctx.dtype = call, x.dtype
        ctx.ranks, ctx.adapter_dtype = [A.shape[1] for A in flat[1::5]], flat[1].dtype  # type: ignore[union-attr]
        needs_x, given = ctx.needs_input_grad[1], ctx.needs_input_grad[2:]
        ctx.needs = [Needs(needs_x, *given[i : i + 4]) for i in range(0, len(flat), 5)]
        ctx.set_materialize_grads(False)
        weights, As, Bs, _, seeds = (flat[i::5] for i in range(5))
        kept = [
            formulas.keep(*each, s)  # type: ignore[arg-type]
            for each in zip(ctx.needs, [x] * len(ys), weights, As, Bs, strict=True)
        ]
        one_x = next((each.x for each in kept if each.x is not None), None)
        one_s = next((each.s for each in kept if each.s is not None), None)
        own = [t for each in kept for t in (each.weight, each.A, each.B)]
        ctx.save_for_backward(one_x, one_s, *own, *seeds)
        return (*ys, s)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *given, ds = grads
        x, s, *tensors = ctx.saved_tensors  # read once: a checkpoint unpacks each tensor only once
        P = len(given)
        dys = [dy.to_dense() if dy is not None and dy.is_sparse else dy for dy in given]
        weights, As, Bs = (tensors[i : 3 * P : 3] for i in range(3))
        adapters = ctx.call.adapters(As, Bs, tensors[3 * P :])
        saved = [Saved(x, *each, s) for each in zip(weights, As, Bs, strict=True)]
        again = torch.is_grad_enabled() or ds is not None or any_dual(x, s, *tensors, *dys)
        again = again or modes_are_active() or any(dy is not None and under_transform(dy) for dy in dys)
        products = None if again else _products([plan.adjoint for plan in ctx.call.plans])
        alike = len({(need.x, need.A, need.B) for need in ctx.needs}) == 1
        if products is None or not alike or any(dy is None for dy in dys):
            dx, each = _gradients_apart(ctx, dys, ds, saved, adapters, again)
        else:
            dx, each = _gradients_together(ctx, products, dys, saved, adapters)  # type: ignore[arg-type]
        return None, dx, *(grad for of_one in each for grad in (*of_one, None))


# (dW, dA, dB, dbias) of each projection, beside the dx of all.
_Each = list[tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]]


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
        one = ctx.call.plans[p].adjoint.products
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
    dx, each = None, []
    for p, (dy, kept, need) in enumerate(zip(dys, saved, ctx.needs, strict=True)):
        begin, rank = sum(ctx.ranks[:p]), ctx.ranks[p]
        of_s, of_ds = (None if t is None else t[:, begin : begin + rank] for t in (kept.s, ds))
        if dy is None and of_ds is not None and kept.B is not None:
            dy = of_ds.new_zeros((of_ds.shape[0], kept.B.shape[1]), dtype=ctx.dtype)
        if dy is None:
            each.append((None, None, None, None))
            continue
        products = COMPOSITE if again else ctx.call.plans[p].adjoint.products
        rest = kept._replace(s=of_s), need, adapters[p], ctx.adapter_dtype, of_ds
        own, *others = formulas.backward(products, dy, *rest)
        dx = own if dx is None or own is None else dx + own
        each.append(tuple(others))
    return dx, each
