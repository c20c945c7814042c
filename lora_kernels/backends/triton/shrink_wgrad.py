"""Both low-rank products of the backward from one reading of dy: q = alpha·dy·b_t and dB = sᵀ·dy.

A program takes one block of columns and one part of the rows. Its contribution to q is complete over its columns only, its
contribution to dB over its rows only; both are float32 partial results, summed in index order afterwards. With DoRA's
column scale c the same reading gives dz = c∘dy and dc = Σ dy∘z, whose contribution is complete over its rows as dB's is.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.backends.triton.launch import (
    cdiv,
    launch,
    lowrank_form,
    needs_int64,
    rank_operand,
    shrink_form,
)
from lora_kernels.backends.triton.partials import sum_partials
from lora_kernels.backends.triton.tiles import as_int64, lowrank_product, lowrank_sum, scaled_tile
from lora_kernels.operands import Scale
from lora_kernels.tuning.config import TileConfig, rank_block


@triton.jit(do_not_specialize=["M", "split"])
def _shrink_wgrad_kernel(
    dy_ptr,  # [M, N]
    b_ptr,  # [N, R]
    s_ptr,  # [M, R] float32
    c_ptr,  # [N] float32, contiguous
    z_ptr,  # [M, N], contiguous
    q_ptr,  # [blocks of columns, M, R] float32
    db_ptr,  # [split, R, N] float32
    dz_ptr,  # [M, N], contiguous
    dc_ptr,  # [split, N] float32
    split,
    M,
    N,
    R,
    stride_dm,
    stride_dn,
    stride_bn,
    stride_br,
    stride_sm,
    stride_sr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    Q_FORM: tl.constexpr,
    DB_FORM: tl.constexpr,
    INT64: tl.constexpr,
):
    pid = tl.program_id(0)
    part = pid % split
    pid_n = pid // split
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    mask_n = offs_n < N
    mask_r = offs_r < R
    col = as_int64(offs_n, INT64)
    rank = as_int64(offs_r, INT64)
    b_ptrs = b_ptr + col[:, None] * stride_bn + rank[None, :] * stride_br
    b = tl.load(b_ptrs, mask=mask_n[:, None] & mask_r[None, :], other=0.0)
    if c_ptr is not None:
        c = tl.load(c_ptr + offs_n, mask=mask_n, other=0.0)
        b = (b.to(tl.float32) * c[:, None]).to(b.dtype)
        dc = tl.zeros((BLOCK_N,), tl.float32)

    per_part = tl.cdiv(tl.cdiv(M, BLOCK_M), split) * BLOCK_M
    nothing = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    db = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    small = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for m in range(part * per_part, min((part + 1) * per_part, M), BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        row = as_int64(offs_m, INT64)
        dy_ptrs = dy_ptr + row[:, None] * stride_dm + col[None, :] * stride_dn
        s_ptrs = s_ptr + row[:, None] * stride_sm + rank[None, :] * stride_sr
        dy = tl.load(dy_ptrs, mask=mask_m[:, None] & mask_n[None, :], other=0.0)
        s = tl.load(s_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0)
        q, q_small = lowrank_product(dy, b, nothing, nothing, Q_FORM)
        q = lowrank_sum(q, q_small, Q_FORM)
        db, small = lowrank_product(tl.trans(dy), s, db, small, DB_FORM)
        q_row = pid_n.to(tl.int64) * M + offs_m
        tl.store(
            q_ptr + q_row[:, None] * R + offs_r[None, :], q, mask=mask_m[:, None] & mask_r[None, :]
        )
        if c_ptr is not None:
            at, mask = row[:, None] * N + col[None, :], mask_m[:, None] & mask_n[None, :]
            product = scaled_tile(dy, c, z_ptr, dz_ptr, at, mask)
            if z_ptr is not None:
                dc += tl.sum(product, 0)

    db = lowrank_sum(db, small, DB_FORM)
    if c_ptr is not None:
        db *= c[:, None]
    db_ptrs = db_ptr + part.to(tl.int64) * R * N + col[:, None] + rank[None, :] * N
    tl.store(db_ptrs, db, mask=mask_n[:, None] & mask_r[None, :])
    if z_ptr is not None:
        tl.store(dc_ptr + part.to(tl.int64) * N + offs_n, dc, mask=mask_n)


def shrink_wgrad(
    dy: Tensor,
    b_t: Tensor,
    alpha: Scale,
    s: Tensor,
    dtype: torch.dtype,
    config: TileConfig,
    c: Tensor | None = None,
    z: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(q [M, R], dB [R, N] in `dtype`, dz, dc): dy [M, N], b_t [N, R], s [M, R] float32, any strides, none empty.

    q is float32, but bfloat16 where dy and dB are: a product then takes it as it is. With DoRA's c [N], float32, q is
    alpha·dy·(c∘b_t), dB c∘sᵀ·dy, and dz = c∘dy in dy's dtype; dc [N] float32, the sums of dy∘z over rows, with z [M, N] too.
    """
    dz = None if c is None else dy.new_empty(dy.shape)
    if c is not None:
        config = replace(config, block_m=16)  # z and dz take registers beside dy's tile
    (M, N), R = dy.shape, s.shape[1]
    blocks = cdiv(N, config.block_n)
    split = min(config.split, cdiv(M, config.block_m))
    q_parts = dy.new_empty((blocks, M, R), dtype=torch.float32)
    db_parts = dy.new_empty((split, R, N), dtype=torch.float32)
    dc_parts = None if z is None else dy.new_empty((split, N), dtype=torch.float32)
    launch(
        _shrink_wgrad_kernel,
        blocks * split,
        config,
        dy.device,
        dy,
        b_t,
        s,
        None if c is None else c.contiguous(),
        None if z is None else z.contiguous(),
        q_parts,
        db_parts,
        dz,
        dc_parts,
        split,
        M,
        N,
        R,
        *dy.stride(),
        *b_t.stride(),
        *s.stride(),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_R=rank_block(R, config.rank_chunk),
        Q_FORM=shrink_form(dy.dtype, b_t.dtype),
        DB_FORM=lowrank_form(dy.dtype, dtype),
        INT64=needs_int64(dy, b_t, s, db_parts, dz),
    )
    if dy.dtype == dtype == torch.bfloat16:
        q = rank_operand(M, R, dtype, dy.device)
    else:
        q = dy.new_empty((M, R), dtype=torch.float32)
    q = sum_partials(q_parts, q, config, alpha)
    db = sum_partials(db_parts, dy.new_empty((R, N), dtype=dtype), config)
    dc = None if dc_parts is None else sum_partials(dc_parts, dc_parts.new_empty(N), config)
    return q, db, dz, dc
