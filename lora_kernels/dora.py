"""DoRA in eager mode, and its column scale c = m / n: magnitudes over the row norms of W + alpha·(A·B)ᵀ.

Liu et al., "DoRA: weight-decomposed low-rank adaptation", ICML 2024: n is a constant for every derivative (section 4.3).
Nothing of n is kept from call to call. A changes with every step, so that W is read for W·A in any case, and the squares of
W come out of that reading: a kept ‖W‖² would save little, and could be that of another W.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_kernels import formulas, ops
from lora_kernels.autograd import any_dual, save, saved, under_transform
from lora_kernels.backends.base import Products
from lora_kernels.backends.composite import PRODUCTS as COMPOSITE
from lora_kernels.operands import Adapter, Scale, Weight
from lora_kernels.plan import Plan, plan_call
from lora_kernels.problem import DENSE


def column_scale(magnitude: Tensor, norms: Tensor) -> Tensor:
    """c = m / n [N] in the dtype of sums; m's gradient is that of c, over n."""
    return magnitude.to(norms.dtype) / norms


def row_norms(
    weight: Weight, A: Tensor, B: Tensor, alpha: Scale, backend: str, *, how: str = "eager"
) -> Tensor:
    """n [N] of weight [N, K], A [K, R] and B [R, N], without a derivative: float32, or float64 for float64 operands.

    `how`: "eager" by a backend's products, "operator" by the registered one that compilers record, "transparent" by plain
    ATen, which function transforms and other kinds of tensors see through.
    """
    A, B = A.detach(), B.detach()
    weight = weight.detach() if isinstance(weight, Tensor) else weight
    with torch.no_grad():
        if how == "operator":
            packed = ([weight], DENSE, []) if isinstance(weight, Tensor) else weight.flat
            return ops.row_norms(*packed, weight.dtype, A, B, alpha, backend)
        dense = weight if isinstance(weight, Tensor) else weight.dense()
        products: Products = COMPOSITE
        if how == "eager":
            products = plan_call(backend, dense, dense, A, None, False).products
        return formulas.row_norms(products, dense, Adapter(A, B, alpha))


def dora_linear(
    x: Tensor,
    weight: Weight,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None,
    alpha: Scale,
    backend: str,
    c: Tensor,
    usual: bool,
) -> Tensor:
    """y [M, N] = c∘(x·weightᵀ + alpha·(x·A)·B) + bias for x [M, K]; with gradients where they are needed.

    `usual`: that these are no others than `Products.layer` has, where the layer is one operator.
    """
    plan = plan_call(backend, x, weight, A, bias, False)
    adapter = Adapter(A, B, alpha, column_scale=c)
    layer = plan.products.layer
    if usual and layer is not None and not plan.dequantises:
        return layer(x, weight, adapter, bias)
    operands = (x, weight, A, B, bias, alpha, c)
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*operands):
        return DoRALinear.apply(*operands, plan)[0]
    weight = plan.readable(weight)
    return formulas.scaled_forward(plan.products, x, weight, adapter, bias, keeps_z=False)[0]


class DoRALinear(torch.autograd.Function):
    """(x, weight, A, B, bias, alpha, c, plan) -> (y, s, z), as `formulas.scaled_forward` on 2-D x.

    s and z are results, so that what is saved of them is still connected to their operands. z [M, N] is kept for dc alone:
    y has not what it takes where c is 0, may be changed in place, and without z a third product with W would be needed.
    """

    @staticmethod
    def forward(
        x: Tensor,
        weight: Weight,
        A: Tensor,
        B: Tensor,
        bias: Tensor | None,
        alpha: Scale,
        c: Tensor,
        plan: Plan,
    ) -> tuple[Tensor, ...]:
        adapter = Adapter(A, B, alpha, column_scale=c)
        rest = plan.readable(weight), adapter, bias
        return formulas.scaled_forward(plan.products, x, *rest, keeps_z=True)  # type: ignore[return-value]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        c, ctx.plan = inputs[6:]
        save(ctx, inputs, output[1], c, output[2] if ctx.needs_input_grad[6] else None)

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, ds: Tensor | None, dz: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        kept, alpha, c, z = saved(ctx)
        if dy is None:
            if ds is None and dz is None:
                return (None,) * 8
            rows = len(ds if ds is not None else dz)  # type: ignore[arg-type]
            dy = c.new_zeros((rows, len(c)), dtype=ctx.dtype)
        adapter = Adapter(kept.A, kept.B, alpha, column_scale=c)  # type: ignore[arg-type]
        products: Products = COMPOSITE
        plan = ctx.plan.adjoint
        again = torch.is_grad_enabled() or ds is not None or dz is not None
        if not (again or under_transform(dy) or any_dual(dy, *kept, c, z)):
            products = plan.products
            kept = kept._replace(weight=plan.readable(kept.weight))
        rest = kept, ctx.needs, adapter, ctx.adapter_dtype, ds, dz
        *grads, dc = formulas.scaled_backward(products, dy, z, *rest)
        return (*grads, None, dc, None)
