"""The column scale of DoRA, c = m / n: magnitudes over the row norms of W + alpha·(A·B)ᵀ, which are made anew in each call.

Liu et al., "DoRA: weight-decomposed low-rank adaptation", ICML 2024: n is a constant for every derivative (section 4.3).
Nothing of n is kept from call to call. A changes with every step, so that W is read for W·A in any case, and the squares of
W come out of that reading: a kept ‖W‖² would save little, and could be that of another W.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels import formulas, ops
from lora_kernels.backends.composite import PRODUCTS as COMPOSITE
from lora_kernels.operands import Adapter, Scale, Weight
from lora_kernels.plan import plan_call
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
    if isinstance(weight, Tensor):
        weight = weight.detach()
    with torch.no_grad():
        if how == "operator":
            dense = isinstance(weight, Tensor)
            packed = (
                ([weight], DENSE, [])
                if dense
                else (list(weight.tensors), weight.format, list(weight.sizes))
            )
            return ops.row_norms(*packed, weight.dtype, A, B, alpha, backend)
        if not isinstance(weight, Tensor):
            weight = weight.dense()
        adapter = Adapter(A, B, alpha)
        if how == "transparent":
            return formulas.row_norms(COMPOSITE, weight, adapter)
        plan = plan_call(backend, weight, weight, A, None, False)
        return formulas.row_norms(plan.products, weight, adapter)
