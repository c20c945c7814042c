"""The end of a split reduction: float32 partial results summed in index order, scaled and rounded once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.backends.triton.launch import cdiv, launch, scale_argument
from lora_kernels.backends.triton.tiles import scale_value
from lora_kernels.operands import Scale
from lora_kernels.tuning.config import TileConfig

_BLOCK = 1024


@triton.jit(do_not_specialize=["split", "count"])
def _sum_partials_kernel(
    partials_ptr,  # [split, count] float32
    out_ptr,  # [count]
    alpha,
    keep_scale,
    split,
    count,
    BLOCK: tl.constexpr,
    ALPHA_IS_PTR: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < count
    total = tl.zeros((BLOCK,), tl.float32)
    part_ptrs = partials_ptr + offs
    for _ in range(split):
        total += tl.load(part_ptrs, mask=mask, other=0.0)
        part_ptrs += count
    total = total * scale_value(alpha, ALPHA_IS_PTR) * keep_scale
    tl.store(out_ptr + offs, total.to(out_ptr.dtype.element_ty), mask=mask)


def sum_partials(
    partials: Tensor, out: Tensor, config: TileConfig, alpha: Scale = 1.0, keep_scale: float = 1.0
) -> Tensor:
    """out = alpha·keep_scale·Σ_i partials[i]: partials [split, ...] float32, out contiguous in any dtype; returns out."""
    alpha, alpha_is_ptr = scale_argument(alpha)
    launch(
        _sum_partials_kernel,
        cdiv(out.numel(), _BLOCK),
        config,
        out.device,
        partials,
        out,
        alpha,
        keep_scale,
        partials.shape[0],
        out.numel(),
        BLOCK=_BLOCK,
        ALPHA_IS_PTR=alpha_is_ptr,
    )
    return out
