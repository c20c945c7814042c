"""Few rows in one launch: y = x·w + bias + (alpha·x·a)·b for M <= 64, w streamed once.

Weights are the tall operand of the matrix instruction, so that a tile of w is not repeated in every warp. The sum over K is
split, because N alone gives too few programs; each part adds its own s·b, as the product is linear. The program that
arrives last at a block of columns, found by an integer counter, adds the parts in index order: which one it is does not
change a bit of the result. Each call makes and clears its own counters, which is one more, tiny, launch.

A quantised w is decoded in the loop, to the bits of its dense copy: W's packed bytes are all that is read of it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.backends.triton.dequantise import bytes_arguments, nf4_arguments
from lora_kernels.backends.triton.launch import (
    base_precision,
    cdiv,
    launch,
    mixed_precision,
    needs_int64,
    scale_argument,
    shrink_precision,
)
from lora_kernels.backends.triton.tiles import (
    as_int64,
    fp8_scale,
    fp8_value,
    int8_scale,
    nf4_scale,
    scale_value,
)
from lora_kernels.operands import Scale, Weight
from lora_kernels.problem import DENSE
from lora_kernels.tuning.config import TileConfig, rank_block


@triton.jit
def _decoded_nf4(
    w_ptr,  # int32 [N, K / 8]: eight codes each
    absmax_ptr,
    code_ptr,
    code2_ptr,
    absmax2_ptr,
    offset_ptr,
    col,
    mask_n,
    k,
    K,
    DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Rows `col` of W [N, K] and columns k to k + BLOCK_K, of one block of 64: [BLOCK_N, BLOCK_K]. 64 divides K."""
    word = k // 8 + tl.arange(0, BLOCK_K // 8)
    words = tl.load(w_ptr + col[:, None] * (K // 8) + word[None, :], mask=mask_n[:, None], other=0)
    scale = nf4_scale(
        absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, col * (K // 64) + k // 64, mask_n
    )
    # A thread keeps the eight codes of a word, and so few scales, because their axis is the slowest. Within a byte the
    # first code is the high nibble.
    place = tl.arange(0, 8)
    shift = 8 * (place // 2) + 4 - 4 * (place % 2)
    nibble = (words[None, :, :] >> shift[:, None, None]) & 15
    w = (tl.load(code_ptr + nibble) * scale[None, :, None]).to(DTYPE)
    return tl.reshape(tl.permute(w, (1, 2, 0)), (BLOCK_N, BLOCK_K))


@triton.jit(do_not_specialize=["M", "split"])
def _decode_kernel(
    x_ptr,  # [M, K]
    w_ptr,  # [K, N], or the codes of a quantised one
    absmax_ptr,  # its scales, as its format has them
    code_ptr,
    code2_ptr,
    absmax2_ptr,
    offset_ptr,
    a_ptr,  # [K, R]
    b_ptr,  # [R, N]
    c_ptr,  # [N] float32, contiguous
    bias_ptr,  # [N]
    y_ptr,  # [M, N], contiguous
    z_ptr,  # like y: the sum before c and bias
    s_ptr,  # [M, R] float32, contiguous
    y_parts_ptr,  # [split, M, N] float32
    s_parts_ptr,  # [split, M, R] float32
    arrived_ptr,  # int32 [blocks of columns], zero before; None where K is whole
    alpha,
    split,
    M,
    N,
    K,
    R,
    stride_xm,
    stride_xk,
    stride_wk,
    stride_wn,
    stride_ak,
    stride_ar,
    stride_br,
    stride_bn,
    stride_bias,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    FORMAT: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE_COLS: tl.constexpr,
    PRECISION: tl.constexpr,
    SHRINK_PRECISION: tl.constexpr,
    TAIL_PRECISION: tl.constexpr,
    ALPHA_IS_PTR: tl.constexpr,
    INT64: tl.constexpr,
):
    pid = tl.program_id(0)
    part = pid % split
    pid_n = pid // split
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    mask_m = offs_m < M
    mask_n = offs_n < N
    mask_r = offs_r < R
    row = as_int64(offs_m, INT64)
    col = as_int64(offs_n, INT64)
    rank = as_int64(offs_r, INT64)
    if FORMAT == "int8":
        scale = int8_scale(absmax_ptr, col, mask_n)

    per_part = tl.cdiv(tl.cdiv(K, BLOCK_K), split) * BLOCK_K
    k_start = part * per_part
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    s = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
    for k in range(k_start, min(k_start + per_part, K), BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        term = as_int64(offs_k, INT64)
        x_ptrs = x_ptr + term[:, None] * stride_xk + row[None, :] * stride_xm
        a_ptrs = a_ptr + rank[:, None] * stride_ar + term[None, :] * stride_ak
        x = tl.load(x_ptrs, mask=mask_k[:, None] & mask_m[None, :], other=0.0)
        if FORMAT == "nf4":
            w = _decoded_nf4(
                w_ptr, absmax_ptr, code_ptr, code2_ptr, absmax2_ptr, offset_ptr, col, mask_n, k, K,
                x_ptr.dtype.element_ty, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        else:
            w_ptrs = w_ptr + col[:, None] * stride_wn + term[None, :] * stride_wk
            w = tl.load(w_ptrs, mask=mask_n[:, None] & mask_k[None, :], other=0)
            if FORMAT == "int8":
                w = (w.to(tl.float32) * scale[:, None]).to(x_ptr.dtype.element_ty)
            elif FORMAT == "fp8":
                if SCALE_COLS % BLOCK_K == 0:
                    of_row = fp8_scale(absmax_ptr, col, k, mask_n, K, SCALE_ROWS, SCALE_COLS)
                    scale = of_row[:, None]
                else:
                    mask_w = mask_n[:, None] & mask_k[None, :]
                    scale = fp8_scale(
                        absmax_ptr, col[:, None], term[None, :], mask_w, K, SCALE_ROWS, SCALE_COLS
                    )
                w = (fp8_value(w) * scale).to(x_ptr.dtype.element_ty)
        a = tl.load(a_ptrs, mask=mask_r[:, None] & mask_k[None, :], other=0.0)
        acc = tl.dot(w, x, acc, input_precision=PRECISION)
        s = tl.dot(a, x.to(a.dtype), s, input_precision=SHRINK_PRECISION)

    # An infinite x makes a padded rank NaN (inf·0), which must not reach y.
    s = tl.where(mask_r[:, None], s * scale_value(alpha, ALPHA_IS_PTR), 0.0)
    b_ptrs = b_ptr + col[:, None] * stride_bn + rank[None, :] * stride_br
    b = tl.load(b_ptrs, mask=mask_n[:, None] & mask_r[None, :], other=0.0)
    acc = tl.dot(b.to(tl.float32), s, acc, input_precision=TAIL_PRECISION)

    y_offs = row[None, :] * N + col[:, None]
    s_offs = offs_m[None, :] * R + offs_r[:, None]
    mask_y = mask_n[:, None] & mask_m[None, :]
    mask_s = mask_r[:, None] & mask_m[None, :]
    last = True
    if arrived_ptr is not None:
        tl.store(y_parts_ptr + part.to(tl.int64) * M * N + y_offs, acc, mask=mask_y)
        if pid_n == 0:
            tl.store(s_parts_ptr + part * M * R + s_offs, s, mask=mask_s)
        tl.debug_barrier()  # every thread's parts are written before one of them announces this program
        last = tl.atomic_add(arrived_ptr + pid_n, 1, sem="acq_rel") == split - 1
        if last:
            acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            s = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
            y_part = y_parts_ptr + y_offs
            s_part = s_parts_ptr + s_offs
            for _ in range(split):
                acc += tl.load(y_part, mask=mask_y, other=0.0, cache_modifier=".cg")
                y_part += M.to(tl.int64) * N
                if pid_n == 0:
                    s += tl.load(s_part, mask=mask_s, other=0.0, cache_modifier=".cg")
                    s_part += M * R
    if last:
        if z_ptr is not None:
            tl.store(z_ptr + y_offs, acc.to(z_ptr.dtype.element_ty), mask=mask_y)
        if c_ptr is not None:
            acc *= tl.load(c_ptr + offs_n, mask=mask_n, other=0.0)[:, None]
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + col * stride_bias, mask=mask_n, other=0.0)
            acc += bias.to(tl.float32)[:, None]
        tl.store(y_ptr + y_offs, acc.to(y_ptr.dtype.element_ty), mask=mask_y)
        if pid_n == 0:
            tl.store(s_ptr + s_offs, s, mask=mask_s)


def decode(
    x: Tensor,
    w: Weight,
    a: Tensor,
    b: Tensor,
    alpha: Scale,
    bias: Tensor | None,
    config: TileConfig,
    *,
    c: Tensor | None = None,
    z: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(y [M, N], s [M, R] float32): x [M, K] with M <= 64, w [K, N], a [K, R] with R <= 64, b [R, N], any strides.

    K may be zero; M, N and R may not. `c` and `z` as in `expand`. w may be the transpose of int8 rows, of fp8 blocks, or of
    an NF4 weight whose rows are whole blocks.
    """
    (M, K), N, R = x.shape, w.shape[1], a.shape[1]
    split = min(config.split, max(1, cdiv(K, config.block_k)))
    blocks = cdiv(N, config.block_n)
    y = x.new_empty((M, N))
    s = x.new_empty((M, R), dtype=torch.float32)
    y_parts = s_parts = x.new_empty((split, M, N) if split > 1 else 0, dtype=torch.float32)
    if split > 1:
        s_parts = x.new_empty((split, M, R), dtype=torch.float32)
    # Each call has its own: kept ones would be a CUDA graph's memory, or be counted in by two calls at once.
    arrived = x.new_zeros(blocks, dtype=torch.int32) if split > 1 else None
    scale, alpha_is_ptr = scale_argument(alpha)
    weight_format, codes, scales, strides, block = _parts(w)
    launch(
        _decode_kernel,
        blocks * split,
        config,
        x.device,
        x,
        codes,
        *scales,
        a,
        b,
        None if c is None else c.contiguous(),
        bias,
        y,
        z,
        s,
        y_parts,
        s_parts,
        arrived,
        scale,
        split,
        M,
        N,
        K,
        R,
        *x.stride(),
        *strides,
        *a.stride(),
        *b.stride(),
        0 if bias is None else bias.stride(0),
        contract=weight_format != "nf4",
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        BLOCK_R=rank_block(R, config.rank_chunk),
        FORMAT=weight_format,
        SCALE_ROWS=block[0],
        SCALE_COLS=block[1],
        PRECISION=base_precision(x.dtype),
        SHRINK_PRECISION=shrink_precision(x.dtype, a.dtype),
        TAIL_PRECISION=mixed_precision(x.dtype, b.dtype),
        ALPHA_IS_PTR=alpha_is_ptr,
        INT64=needs_int64(x, codes, a, b, bias, y),
    )
    return y, s


_Pair = tuple[int, int]


def _parts(w: Any) -> tuple[str, Tensor, tuple[Tensor | None, ...], _Pair, _Pair]:
    """(format, what w_ptr reads, five tensors of its scales, strides along K and N, sizes of a block of w.t())."""
    if isinstance(w, Tensor):
        return DENSE, w, (None,) * 5, w.stride(), (1, 1)  # type: ignore[return-value]
    assert w.transposed  # [K, N]: scales run along N, as `fits` demands
    if w.format != "nf4":
        codes, scales, block = bytes_arguments(w)
        return w.format, codes, (scales, *(None,) * 4), codes.t().stride(), block  # type: ignore[return-value]
    packed, values = nf4_arguments(w)
    if packed.storage_offset() % 4:  # a word must not straddle its alignment
        packed = packed.clone()
    return w.format, packed.view(torch.int32), values, (0, 0), (1, 64)
