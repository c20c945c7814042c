"""What DoRA's column scale adds to a backward, where `shrink_wgrad` does not: dz = c∘dy and dc = Σ dy∘z, in one pass."""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.backends.triton.launch import cdiv, launch, needs_int64
from lora_kernels.backends.triton.partials import sum_partials
from lora_kernels.backends.triton.tiles import as_int64, scaled_tile
from lora_kernels.tuning.config import TileConfig


@triton.jit(do_not_specialize=["M", "split"])
def _scale_kernel(
    dy_ptr,  # [M, N]
    c_ptr,  # [N] float32, contiguous
    z_ptr,  # [M, N], contiguous
    dz_ptr,  # [M, N], contiguous
    dc_ptr,  # [split, N] float32
    split,
    M,
    N,
    stride_dm,
    stride_dn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INT64: tl.constexpr,
):
    pid = tl.program_id(0)
    part = pid % split
    offs_n = pid // split * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    col = as_int64(offs_n, INT64)
    c = tl.load(c_ptr + offs_n, mask=mask_n, other=0.0)
    dc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    per_part = tl.cdiv(tl.cdiv(M, BLOCK_M), split) * BLOCK_M
    for m in range(part * per_part, min((part + 1) * per_part, M), BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        row = as_int64(offs_m, INT64)
        mask = (offs_m < M)[:, None] & mask_n[None, :]
        dy_ptrs = dy_ptr + row[:, None] * stride_dm + col[None, :] * stride_dn
        dy = tl.load(dy_ptrs, mask=mask, other=0.0)
        at = row[:, None] * N + col[None, :]
        product = scaled_tile(dy, c, z_ptr, dz_ptr, at, mask)
        if z_ptr is not None:
            dc += product
    if z_ptr is not None:
        tl.store(dc_ptr + part.to(tl.int64) * N + offs_n, tl.sum(dc, 0), mask=mask_n)


def scaled_gradient(
    dy: Tensor, c: Tensor, z: Tensor | None, config: TileConfig
) -> tuple[Tensor, Tensor | None]:
    """(dz [M, N] in dy's dtype, dc [N] float32 with z): dy and z [M, N], any strides, c [N] float32, none empty."""
    config = replace(config, block_m=16)  # dy, z, dz and the sums take registers each
    M, N = dy.shape
    split = min(config.split, cdiv(M, config.block_m))
    dz = dy.new_empty((M, N))
    parts = None if z is None else dy.new_empty((split, N), dtype=torch.float32)
    launch(
        _scale_kernel,
        cdiv(N, config.block_n) * split,
        config,
        dy.device,
        dy,
        c.contiguous(),
        None if z is None else z.contiguous(),
        dz,
        parts,
        split,
        M,
        N,
        *dy.stride(),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        INT64=needs_int64(dy, dz),
    )
    return dz, None if parts is None else sum_partials(parts, parts.new_empty(N), config)
