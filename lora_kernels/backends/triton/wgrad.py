"""The tall reduction (mask∘left)ᵀ·right over M rows: dA = xᵀ·q and dB = sᵀ·dy, split over M in a fixed order.

Over groups of rows there is one sum for each, of zeros for a group without rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.backends.base import left_is_wide
from lora_kernels.backends.triton.launch import Mask, cdiv, launch, lowrank_form, needs_int64
from lora_kernels.backends.triton.partials import sum_partials
from lora_kernels.backends.triton.tiles import (
    as_int64,
    keep_tile,
    lowrank_product,
    lowrank_sum,
    rows_of,
)
from lora_kernels.dropout import Dropout
from lora_kernels.tuning.config import TileConfig, rank_block


@triton.jit(do_not_specialize=["M", "split", "threshold", "groups"])
def _wgrad_kernel(
    wide_ptr,  # [M, C]
    lowrank_ptr,  # [M, R]
    out_ptr,  # [split, C, R], or [split, groups, C, R], by the strides below
    seed_ptr,
    threshold,
    keep_scale,
    split,
    offsets_ptr,
    groups,  # 1 without offsets
    M,
    C,
    R,
    stride_wm,
    stride_wc,
    stride_tm,
    stride_tr,
    stride_oc,
    stride_or,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WHOLE: tl.constexpr,
    FORM: tl.constexpr,
    INT64: tl.constexpr,
    BESIDE: tl.constexpr,
):
    if BESIDE:
        # The next launch may be one of these sums too: it reads nothing of this one.
        tl.extra.cuda.gdc_launch_dependents()
    pid = tl.program_id(0)
    blocks_r = tl.cdiv(R, BLOCK_R)
    part = pid // blocks_r % split
    c_start = pid // (blocks_r * split) % tl.cdiv(C, BLOCK_C) * BLOCK_C
    offs_c = c_start + tl.arange(0, BLOCK_C)
    offs_r = pid % blocks_r * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_c = offs_c < C
    mask_r = offs_r < R
    col = as_int64(offs_c, INT64)
    rank = as_int64(offs_r, INT64)

    start_m, end_m = 0, M
    if offsets_ptr is not None:
        group = pid // (blocks_r * split * tl.cdiv(C, BLOCK_C))
        start_m, end_m = rows_of(group, offsets_ptr, groups, M)
        out_ptr += group.to(tl.int64) * C * R
    per_part = tl.cdiv(tl.cdiv(end_m - start_m, BLOCK_M), split) * BLOCK_M
    start_m += part * per_part
    acc = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    small = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    for m in range(start_m, min(start_m + per_part, end_m), BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < end_m
        row = as_int64(offs_m, INT64)
        wide_ptrs = wide_ptr + row[:, None] * stride_wm + col[None, :] * stride_wc
        lowrank_ptrs = lowrank_ptr + row[:, None] * stride_tm + rank[None, :] * stride_tr
        wide = tl.load(wide_ptrs, mask=mask_m[:, None] & mask_c[None, :], other=0.0)
        lowrank = tl.load(lowrank_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0)
        if seed_ptr is not None:
            wide *= keep_tile(seed_ptr, threshold, offs_m, c_start, C, BLOCK_M, BLOCK_C).to(
                wide.dtype
            )
        acc, small = lowrank_product(tl.trans(wide), lowrank, acc, small, FORM)

    acc = lowrank_sum(acc, small, FORM)
    if WHOLE:
        acc *= keep_scale
    part_start = part.to(tl.int64) * groups * C * R
    out_ptrs = out_ptr + part_start + col[:, None] * stride_oc + rank[None, :] * stride_or
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask_c[:, None] & mask_r[None, :])
    if BESIDE and pid == 0:
        # One program that waits suffices: this launch does not end before the one that it runs beside.
        tl.extra.cuda.gdc_wait()


def wgrad(
    left: Tensor,
    right: Tensor,
    dtype: torch.dtype,
    config: TileConfig,
    dropout: Dropout | None = None,
    *,
    offsets: Tensor | None = None,
    beside: bool = False,
) -> Tensor:
    """(mask∘left)ᵀ·right: left [M, C], right [M, D], any strides -> [C, D] in `dtype`. M may be zero, C and D may not.

    One operand is wide, in the base's dtype; the other has a rank's width and is float32, or the q of `shrink_wgrad`. A
    masked left is the wide one. Both may have the base's dtype and any width. With `offsets`, as in `expand`, the result
    is [G, C, D]. `beside`: this launch runs beside those before it that let it (`release`), and ends after them. What it
    reads is written before these let it. No memory that they use may be free before this call: what is allocated here is
    written at once.
    """
    M = left.shape[0]
    wide_first = left_is_wide(left, right, dropout)
    wide, lowrank = (left, right) if wide_first else (right, left)
    C, R = wide.shape[1], lowrank.shape[1]
    split = min(config.split, max(1, cdiv(M, config.block_m)))
    block_r = rank_block(R, config.rank_chunk)
    mask = Mask.of(dropout)
    count = 1 if offsets is None else offsets.shape[0] - 1
    groups = () if offsets is None else (count,)
    out = left.new_empty((*groups, left.shape[1], right.shape[1]), dtype=dtype)
    parts = out if split == 1 else out.new_empty((split, *out.shape), dtype=torch.float32)
    launch(
        _wgrad_kernel,
        cdiv(C, config.block_n) * cdiv(R, block_r) * split * count,
        config,
        left.device,
        wide,
        lowrank,
        parts,
        *mask,
        split,
        None if offsets is None else offsets.contiguous(),
        count,
        M,
        C,
        R,
        *wide.stride(),
        *lowrank.stride(),
        *((R, 1) if wide_first else (1, C)),
        BLOCK_M=config.block_m,
        BLOCK_C=config.block_n,
        BLOCK_R=block_r,
        WHOLE=split == 1,
        FORM=lowrank_form(wide.dtype, dtype),
        INT64=needs_int64(wide, lowrank, out),
        BESIDE=beside,
        dependent=beside,
    )
    return out if split == 1 else sum_partials(parts, out, config, keep_scale=mask.keep_scale)
