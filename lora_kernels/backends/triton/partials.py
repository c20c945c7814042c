"""The end of a split reduction: float32 partial results summed in index order, scaled and rounded once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.backends.triton.launch import cdiv, launch, scale_argument
from lora_kernels.backends.triton.tiles import scale_value, store_rounded
from lora_kernels.operands import Scale
from lora_kernels.tuning.config import TileConfig

_BLOCK = 1024


@triton.jit(do_not_specialize=["split", "count"])
def _sum_partials_kernel(
    partials_ptr,  # [split, count] float32
    out_ptr,  # [count], or rows of `columns` elements, stride_out apart, where IN_ROWS
    rounded_ptr,  # the same in rows of ROUNDED·columns, in another type, where ROUNDED
    alpha,
    keep_scale,
    split,
    count,
    columns,
    stride_out,
    stride_rounded,
    BLOCK: tl.constexpr,
    ALPHA_IS_PTR: tl.constexpr,
    IN_ROWS: tl.constexpr,
    ROUNDED: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < count
    total = tl.zeros((BLOCK,), tl.float32)
    part_ptrs = partials_ptr + offs
    for _ in range(split):
        total += tl.load(part_ptrs, mask=mask, other=0.0)
        part_ptrs += count
    total = total * scale_value(alpha, ALPHA_IS_PTR) * keep_scale
    out_ptrs = out_ptr + offs
    if IN_ROWS:
        out_ptrs = out_ptr + offs // columns * stride_out + offs % columns
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=mask)
    if ROUNDED:
        rounded_ptrs = rounded_ptr + offs // columns * stride_rounded + offs % columns
        store_rounded(rounded_ptrs, total, mask, columns, ROUNDED)


def sum_partials(
    partials: Tensor,
    out: Tensor,
    config: TileConfig,
    alpha: Scale = 1.0,
    keep_scale: float = 1.0,
    *,
    rounded: Tensor | None = None,
) -> Tensor:
    """out = alpha·keep_scale·Σ_i partials[i]: partials [split, ...] float32, out in any dtype; returns out.

    out is contiguous, or a matrix with unit stride in a row; `rounded`, such a matrix too, gets the same in its own type, or
    in parts where it has three times the columns.
    """
    alpha, alpha_is_ptr = scale_argument(alpha)
    launch(
        _sum_partials_kernel,
        cdiv(out.numel(), _BLOCK),
        config,
        out.device,
        partials,
        out,
        rounded,
        alpha,
        keep_scale,
        partials.shape[0],
        out.numel(),
        out.shape[-1],
        0 if out.is_contiguous() else out.stride(0),
        0 if rounded is None else rounded.stride(0),
        BLOCK=_BLOCK,
        ALPHA_IS_PTR=alpha_is_ptr,
        IN_ROWS=not out.is_contiguous(),
        ROUNDED=0 if rounded is None else rounded.shape[1] // out.shape[1],
    )
    return out
