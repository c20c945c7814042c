"""The low-rank product s = alpha·(mask∘x)·a in float32: one reading of x, split over K where M alone is too little work."""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.backends.triton.launch import (
    Mask,
    Rows,
    cdiv,
    group_block,
    launch,
    needs_int64,
    scale_argument,
    shrink_form,
    strides,
)
from lora_kernels.backends.triton.partials import sum_partials
from lora_kernels.backends.triton.tiles import (
    as_int64,
    keep_tile,
    lowrank_product,
    lowrank_sum,
    row_block,
    scale_value,
    store_rounded,
)
from lora_kernels.dropout import Dropout
from lora_kernels.operands import Scale
from lora_kernels.tuning.config import TileConfig, rank_block


@triton.jit(do_not_specialize=["M", "split", "threshold", "groups"])
def _shrink_kernel(
    x_ptr,  # [M, K]
    a_ptr,  # [K, R]; over groups each group's lies stride_ag behind the last one's
    out_ptr,  # [split, M, R] float32
    squares_ptr,  # [split, M] float32: the sums of x² over its columns
    rounded_ptr,  # [M, ROUNDED·R] in a half type where ROUNDED
    alpha,
    seed_ptr,
    threshold,
    keep_scale,
    split,
    offsets_ptr,
    groups,
    M,
    K,
    R,
    stride_xm,
    stride_xk,
    stride_ag,
    stride_ak,
    stride_ar,
    stride_alpha,
    stride_rounded,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
    SCALED: tl.constexpr,
    EVEN_K: tl.constexpr,
    FORM: tl.constexpr,
    ALPHA_IS_PTR: tl.constexpr,
    INT64: tl.constexpr,
    ROUNDED: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        # The dependent product may start at once: it reads s only after its own K loop, behind a wait.
        tl.extra.cuda.gdc_launch_dependents()
    pid = tl.program_id(0)
    blocks_r = tl.cdiv(R, BLOCK_R)
    part = pid // blocks_r % split
    pid_m = pid // (blocks_r * split)
    start_m, end_m = pid_m * BLOCK_M, M
    if offsets_ptr is not None:
        group, start_m, end_m = row_block(pid_m, offsets_ptr, groups, M, BLOCK_M, BLOCK_G)
        if start_m >= end_m:
            return
        a_ptr += group.to(tl.int64) * stride_ag
        if ALPHA_IS_PTR:
            alpha += group * stride_alpha
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_r = pid % blocks_r * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_m = offs_m < end_m
    mask_r = offs_r < R

    per_part = tl.cdiv(tl.cdiv(K, BLOCK_K), split) * BLOCK_K
    k_start = part * per_part
    k_end = min(k_start + per_part, K)
    offs_k = tl.arange(0, BLOCK_K)
    first_k = as_int64(k_start + offs_k, INT64)
    x_ptrs = x_ptr + as_int64(offs_m, INT64)[:, None] * stride_xm + first_k[None, :] * stride_xk
    a_ptrs = a_ptr + first_k[:, None] * stride_ak + as_int64(offs_r, INT64)[None, :] * stride_ar
    step = as_int64(tl.full((), BLOCK_K, tl.int32), INT64)

    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    small = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    if squares_ptr is not None:
        squares = tl.zeros((BLOCK_M,), tl.float32)
    for k in range(k_start, k_end, BLOCK_K):
        mask_x = mask_m[:, None]
        mask_a = mask_r[None, :]
        if not EVEN_K:
            mask_x = mask_x & (offs_k < K - k)[None, :]
            mask_a = mask_a & (offs_k < K - k)[:, None]
        x = tl.load(x_ptrs, mask=mask_x, other=0.0)  # [BLOCK_M, BLOCK_K]
        a = tl.load(a_ptrs, mask=mask_a, other=0.0)  # [BLOCK_K, BLOCK_R]
        if seed_ptr is not None:
            x *= keep_tile(seed_ptr, threshold, offs_m, k, K, BLOCK_M, BLOCK_K).to(x.dtype)
        if squares_ptr is not None:
            squares += tl.sum(x.to(tl.float32) * x.to(tl.float32), 1)
        acc, small = lowrank_product(x, a, acc, small, FORM)
        x_ptrs += step * stride_xk
        a_ptrs += step * stride_ak

    acc = lowrank_sum(acc, small, FORM)
    if SCALED:
        acc = acc * scale_value(alpha, ALPHA_IS_PTR) * keep_scale
    out_row = part.to(tl.int64) * M + offs_m
    mask = mask_m[:, None] & mask_r[None, :]
    tl.store(out_ptr + out_row[:, None] * R + offs_r[None, :], acc, mask=mask)
    if ROUNDED:
        rounded_ptrs = rounded_ptr + out_row[:, None] * stride_rounded + offs_r[None, :]
        store_rounded(rounded_ptrs, acc, mask, R, ROUNDED)
    if squares_ptr is not None:  # noqa: SIM102, a constant decides which branch is compiled
        if pid % blocks_r == 0:  # every block of the rank has them
            tl.store(squares_ptr + out_row, squares, mask=mask_m)


def shrink(
    x: Tensor,
    a: Tensor,
    alpha: Scale,
    config: TileConfig,
    dropout: Dropout | None = None,
    *,
    offsets: Tensor | None = None,
    release: bool = False,
    rounded: Tensor | None = None,
    squares: Tensor | None = None,
) -> Tensor:
    """s = alpha·(mask∘x)·a: x [M, K], a [K, R], any strides -> s [M, R] float32. K may be zero, M and R may not.

    x is read once for each `config.rank_chunk` columns. With `offsets`, as in `expand`, a is [G, K, R] and alpha may be [G].
    `release` lets a dependent launch that follows start early (sm_90 and newer). `rounded` [M, R], rows of unit stride, gets
    s in its own type beside; [M, 3·R] bfloat16 gets it in parts, see `parts`. `squares` [split, M] float32 gets the sums of
    x² over the columns of each part.
    """
    M, K = x.shape
    R = a.shape[-1]
    rows = Rows.of(M, config.block_m, offsets)
    split = _split(x, config)
    block_r = rank_block(R, config.rank_chunk)
    scaled = split == 1 or offsets is not None  # a group's alpha is known where its rows are
    parts = x.new_empty((split, M, R), dtype=torch.float32)
    mask = Mask.of(dropout)
    scale, alpha_is_ptr = scale_argument(alpha)
    launch(
        _shrink_kernel,
        rows.blocks * cdiv(R, block_r) * split,
        config,
        x.device,
        x,
        a,
        parts,
        squares,
        rounded if split == 1 else None,
        scale,
        *mask,
        split,
        rows.offsets,
        rows.groups,
        M,
        K,
        R,
        *x.stride(),
        *strides(a),
        alpha.stride(0) if isinstance(alpha, Tensor) and alpha.ndim else 0,
        0 if rounded is None else rounded.stride(0),
        BLOCK_M=config.block_m,
        BLOCK_K=config.block_k,
        BLOCK_R=block_r,
        BLOCK_G=group_block(offsets),
        SCALED=scaled,
        EVEN_K=K % config.block_k == 0,
        FORM=shrink_form(x.dtype, a.dtype),
        ALPHA_IS_PTR=alpha_is_ptr,
        INT64=needs_int64(x, a),
        ROUNDED=rounded.shape[1] // R if rounded is not None and split == 1 else 0,
        PDL=release and split == 1,
    )
    if split == 1:
        return parts[0]
    whole = x.new_empty((M, R), dtype=torch.float32)
    scales = () if scaled else (alpha, mask.keep_scale)
    return sum_partials(parts, whole, config, *scales, rounded=rounded)


def shrink_squares(x: Tensor, a: Tensor, config: TileConfig) -> tuple[Tensor, Tensor]:
    """(x·a [M, R], the sums of x² over columns [M]), float32, from one reading of x for `config.rank_chunk` columns."""
    if x.dtype == torch.float32 and a.shape[1] > 32:  # the squares take registers of their own
        config = replace(config, block_m=16)
    elif config.block_m > 32:
        # Of 64 rows a warp group of sm_90 multiplies x while others read it for the squares, and Triton 3.9 fetches the next
        # x over it: the emulator finds the race.
        config = replace(config, block_m=32)
    split = _split(x, config)
    parts = x.new_empty((split, x.shape[0]), dtype=torch.float32)
    lowrank = shrink(x, a, 1.0, config, squares=parts)
    if split == 1:
        return lowrank, parts[0]
    return lowrank, sum_partials(parts, x.new_empty(x.shape[0], dtype=torch.float32), config)


def _split(x: Tensor, config: TileConfig) -> int:
    """How many parts of K are summed apart."""
    return min(config.split, max(1, cdiv(x.shape[1], config.block_k)))
