"""The literal single kernel: y = c∘(x·w + (alpha·(mask∘x)·a)·b) + bias, x·a beside x·w in one loop over K.

x·a is computed again by every block of columns, in an accumulator of its own, so this wins where there are few such blocks.
Rank columns beyond the first chunk cost another reading of x.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.backends.triton.launch import (
    Mask,
    base_precision,
    cdiv,
    launch,
    needs_int64,
    rank_tail,
    scale_argument,
    shrink_precision,
)
from lora_kernels.backends.triton.tiles import (
    as_int64,
    grouped_order,
    keep_tile,
    rank_product,
    scale_value,
    store_result,
)
from lora_kernels.dropout import Dropout
from lora_kernels.operands import Scale
from lora_kernels.tuning.config import TileConfig, rank_block


@triton.jit(do_not_specialize=["M", "threshold"])
def _one_pass_kernel(
    x_ptr,  # [M, K]
    w_ptr,  # [K, N]
    a_ptr,  # [K, R]
    b_ptr,  # [R, N]
    c_ptr,  # [N] float32, contiguous
    bias_ptr,  # [N]
    y_ptr,  # [M, N], contiguous
    z_ptr,  # like y: the sum before c and bias
    s_ptr,  # [M, R] float32, contiguous
    alpha,
    seed_ptr,
    threshold,
    keep_scale,
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
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
    SHRINK_PRECISION: tl.constexpr,
    TAIL: tl.constexpr,
    ALPHA_IS_PTR: tl.constexpr,
    INT64: tl.constexpr,
):
    pid_m, pid_n = grouped_order(
        tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M
    )
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < M
    mask_n = offs_n < N
    row = as_int64(offs_m, INT64)
    col = as_int64(offs_n, INT64)
    scale = scale_value(alpha, ALPHA_IS_PTR) * keep_scale

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    s = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(0, K, BLOCK_K):
        at_k = k + offs_k
        mask_k = at_k < K
        term = as_int64(at_k, INT64)
        x_ptrs = x_ptr + row[:, None] * stride_xm + term[None, :] * stride_xk
        w_ptrs = w_ptr + term[:, None] * stride_wk + col[None, :] * stride_wn
        a_ptrs = a_ptr + term[:, None] * stride_ak + as_int64(offs_r, INT64)[None, :] * stride_ar
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        w = tl.load(w_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        a = tl.load(a_ptrs, mask=mask_k[:, None] & (offs_r < R)[None, :], other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
        if seed_ptr is not None:
            x *= keep_tile(seed_ptr, threshold, offs_m, k, K, BLOCK_M, BLOCK_K).to(x.dtype)
        s = tl.dot(x.to(a.dtype), a, s, input_precision=SHRINK_PRECISION)

    for r in tl.range(0, R, BLOCK_R, num_stages=1):
        rank = r + offs_r
        mask_r = rank < R
        at_r = as_int64(rank, INT64)
        if r > 0:
            s = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
            for k in tl.range(0, K, BLOCK_K, num_stages=1):
                at_k = k + offs_k
                mask_k = at_k < K
                term = as_int64(at_k, INT64)
                x_ptrs = x_ptr + row[:, None] * stride_xm + term[None, :] * stride_xk
                a_ptrs = a_ptr + term[:, None] * stride_ak + at_r[None, :] * stride_ar
                x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
                a = tl.load(a_ptrs, mask=mask_k[:, None] & mask_r[None, :], other=0.0)
                if seed_ptr is not None:
                    x *= keep_tile(seed_ptr, threshold, offs_m, k, K, BLOCK_M, BLOCK_K).to(x.dtype)
                s = tl.dot(x.to(a.dtype), a, s, input_precision=SHRINK_PRECISION)
        # An infinite x makes a padded column NaN (inf·0), which must not reach y.
        scaled = tl.where(mask_r[None, :], s * scale, 0.0)
        b_ptrs = b_ptr + at_r[:, None] * stride_br + col[None, :] * stride_bn
        b = tl.load(b_ptrs, mask=mask_r[:, None] & mask_n[None, :], other=0.0)
        acc = rank_product(scaled, b, acc, TAIL)
        if pid_n == 0:
            s_ptrs = s_ptr + offs_m.to(tl.int64)[:, None] * R + rank[None, :]
            tl.store(s_ptrs, scaled, mask=mask_m[:, None] & mask_r[None, :])

    store_result(
        acc, c_ptr, bias_ptr, y_ptr, z_ptr, offs_m, pid_n * BLOCK_N, M, N, stride_bias, INT64
    )


def one_pass(
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    alpha: Scale,
    bias: Tensor | None,
    config: TileConfig,
    dropout: Dropout | None = None,
    *,
    c: Tensor | None = None,
    z: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(y, s): x [M, K], w [K, N], a [K, R], b [R, N], bias [N], any strides -> y [M, N] in x's dtype, s [M, R] float32.

    K may be zero; M, N and R may not. `c` and `z` as in `expand`.
    """
    (M, K), N, R = x.shape, w.shape[1], a.shape[1]
    y = x.new_empty((M, N))
    s = x.new_empty((M, R), dtype=torch.float32)
    scale, alpha_is_ptr = scale_argument(alpha)
    launch(
        _one_pass_kernel,
        cdiv(M, config.block_m) * cdiv(N, config.block_n),
        config,
        x.device,
        x,
        w,
        a,
        b,
        None if c is None else c.contiguous(),
        bias,
        y,
        z,
        s,
        scale,
        *Mask.of(dropout),
        M,
        N,
        K,
        R,
        *x.stride(),
        *w.stride(),
        *a.stride(),
        *b.stride(),
        0 if bias is None else bias.stride(0),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        BLOCK_R=rank_block(R, config.rank_chunk),
        GROUP_M=config.group_m,
        PRECISION=base_precision(x.dtype),
        SHRINK_PRECISION=shrink_precision(x.dtype, a.dtype),
        TAIL=rank_tail(x.dtype, b.dtype, config.tma),
        ALPHA_IS_PTR=alpha_is_ptr,
        INT64=needs_int64(x, w, a, b, bias, y),
    )
    return y, s
