"""The product y = c∘(x·w + mask∘(s·b)) + bias: a plain matrix product whose accumulator gets a rank-R product at the end.

The rank tail comes after the K loop: the loop is then, instruction for instruction, that of the plain product, and the
tail's operands reuse the shared memory of the loop's pipeline. Forward and dx are this one kernel with other strides. Over
groups of rows w, b and bias are those of the block's group, which the block finds itself.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lora_kernels.backends.triton.launch import (
    Mask,
    Rows,
    base_precision,
    cdiv,
    group_block,
    launch,
    needs_int64,
    rank_tail,
    scale_argument,
    strides,
)
from lora_kernels.backends.triton.tiles import (
    as_int64,
    grouped_order,
    keep_tile,
    rank_product,
    row_block,
    scale_value,
    store_result,
)
from lora_kernels.dropout import Dropout
from lora_kernels.operands import Scale
from lora_kernels.tuning.config import FUSED_RANK, TileConfig, rank_block


@triton.jit
def _halves(acc):
    """acc's left and right columns."""
    return tl.split(tl.permute(tl.reshape(acc, (acc.shape[0], 2, acc.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _rank_tail(
    acc,  # for the columns from `start` on
    s_ptr,
    b_ptr,
    offs_m,
    start,
    M,
    N,
    R,
    stride_sm,
    stride_br,
    stride_bn,
    BLOCK_R: tl.constexpr,
    TAIL: tl.constexpr,
    INT64: tl.constexpr,
):
    """acc + s·b."""
    offs_n = start + tl.arange(0, acc.shape[1])
    row, col = as_int64(offs_m, INT64), as_int64(offs_n, INT64)
    for r in tl.range(0, R, BLOCK_R, num_stages=1):
        offs_r = r + tl.arange(0, BLOCK_R)
        mask_r = offs_r < R
        s_ptrs = s_ptr + row[:, None] * stride_sm + offs_r[None, :]
        b_ptrs = b_ptr + as_int64(offs_r, INT64)[:, None] * stride_br + col[None, :] * stride_bn
        s = tl.load(s_ptrs, mask=(offs_m < M)[:, None] & mask_r[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=mask_r[:, None] & (offs_n < N)[None, :], other=0.0)
        acc = rank_product(s, b, acc, TAIL)
    return acc


@triton.jit
def _shrink_first(
    block,
    x,
    a_ptr,
    s_ptr,
    whole_ptr,
    alpha,
    state_ptr,
    seed_ptr,
    threshold,
    keep_scale,
    M,
    K,
    R,
    stride_xm,
    stride_xk,
    stride_ak,
    stride_ar,
    stride_sm,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EVEN_K: tl.constexpr,
    ALPHA_IS_PTR: tl.constexpr,
    INT64: tl.constexpr,
    TMA: tl.constexpr,
):
    """s = alpha·(mask∘x)·a of one block of rows, in both types, released to the programs that compute tiles of them."""
    start_m = block * BLOCK_M
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    row = as_int64(offs_m, INT64)
    mask_m = (offs_m < M)[:, None]
    for r in tl.range(0, R, BLOCK_R, num_stages=1):
        offs_r = r + tl.arange(0, BLOCK_R)
        mask_r = (offs_r < R)[None, :]
        acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for k in range(0, K, BLOCK_K):
            term = as_int64(k + offs_k, INT64)
            if TMA:
                x_tile = x.load([start_m, k])
            else:
                x_ptrs = x + row[:, None] * stride_xm + term[None, :] * stride_xk
                mask_x = mask_m
                if not EVEN_K:
                    mask_x = mask_x & (offs_k < K - k)[None, :]
                x_tile = tl.load(x_ptrs, mask=mask_x, other=0.0)
            a_ptrs = (
                a_ptr + term[:, None] * stride_ak + as_int64(offs_r, INT64)[None, :] * stride_ar
            )
            a = tl.load(a_ptrs, mask=(offs_k < K - k)[:, None] & mask_r, other=0.0)
            if seed_ptr is not None:
                x_tile *= keep_tile(seed_ptr, threshold, offs_m, k, K, BLOCK_M, BLOCK_K).to(
                    x_tile.dtype
                )
            acc = tl.dot(x_tile, a, acc)
        acc = acc * scale_value(alpha, ALPHA_IS_PTR) * keep_scale
        tl.store(whole_ptr + row[:, None] * R + offs_r[None, :], acc, mask=mask_m & mask_r)
        s_ptrs = s_ptr + row[:, None] * stride_sm + offs_r[None, :]
        tl.store(s_ptrs, acc.to(s_ptr.dtype.element_ty), mask=mask_m & mask_r)
    tl.debug_barrier()  # every thread's part is written before one of them says so
    tl.atomic_xchg(state_ptr + 1 + block, 1, sem="release")


@triton.jit(do_not_specialize=["M", "threshold", "row_blocks", "groups"])
def _expand_kernel(
    x,  # [M, K]: a pointer, or with TMA a descriptor of blocks [BLOCK_M, BLOCK_K]
    w,  # [K, N]: a pointer, or with TMA a descriptor of blocks of w, or of wᵀ where W_K_MAJOR
    s_ptr,  # [M, R] float32 or in x's type, rows of unit stride
    b_ptr,  # [R, N]
    c_ptr,  # [N] float32, contiguous
    bias_ptr,  # [N]; of w, b and bias, over groups, each group's lies `stride_..g` behind the last one's
    y_ptr,  # [M, N], contiguous
    z_ptr,  # like y: the sum before c and bias
    a_ptr,  # [K, R] where this launch computes s as well, else None
    whole_ptr,  # like s, float32, with a
    state_ptr,  # int32 with a, zero before: a ticket for each program, then a flag for each block of rows
    alpha,
    seed_ptr,
    threshold,
    keep_scale,
    row_blocks,
    offsets_ptr,
    groups,
    M,
    N,
    K,
    R,
    stride_xm,
    stride_xk,
    stride_wg,
    stride_wk,
    stride_wn,
    stride_sm,
    stride_bg,
    stride_br,
    stride_bn,
    stride_bias_g,
    stride_bias,
    stride_ak,
    stride_ar,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_G: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    TAIL: tl.constexpr,
    INT64: tl.constexpr,
    TMA: tl.constexpr,
    W_K_MAJOR: tl.constexpr,
    PDL: tl.constexpr,
    ALPHA_IS_PTR: tl.constexpr,
):
    SHRINKS: tl.constexpr = a_ptr is not None
    DROPOUT: tl.constexpr = seed_ptr is not None and not SHRINKS  # of s·b; else x has the mask
    pid = tl.program_id(0)
    if SHRINKS:
        # Tickets are in the order in which programs start, so that what a program waits for is done by one that runs.
        pid = tl.atomic_add(state_ptr, 1, sem="relaxed")
        if pid < row_blocks:
            _shrink_first(
                pid, x, a_ptr, s_ptr, whole_ptr, alpha, state_ptr, seed_ptr, threshold, keep_scale,
                M, K, R, stride_xm, stride_xk, stride_ak, stride_ar, stride_sm, BLOCK_M, BLOCK_K,
                BLOCK_S, EVEN_K, ALPHA_IS_PTR, INT64, TMA,
            )  # fmt: skip
            return
        pid -= row_blocks
    pid_m, pid_n = grouped_order(pid, row_blocks, tl.cdiv(N, BLOCK_N), GROUP_M)
    start_m, end_m = pid_m * BLOCK_M, M
    if offsets_ptr is not None:
        group, start_m, end_m = row_block(pid_m, offsets_ptr, groups, M, BLOCK_M, BLOCK_G)
        if start_m >= end_m:
            if PDL:
                tl.extra.cuda.gdc_wait()
            return
        group = group.to(tl.int64)
        if not TMA:
            w += group * stride_wg
        b_ptr += group * stride_bg
        if bias_ptr is not None:
            bias_ptr += group * stride_bias_g
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < end_m
    mask_n = offs_n < N
    row = as_int64(offs_m, INT64)
    col = as_int64(offs_n, INT64)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if TMA:
        for k in range(0, K, BLOCK_K):
            x_tile = x.load([start_m, k])
            if W_K_MAJOR:  # noqa: SIM108, a constant decides which branch is compiled
                w_tile = w.load([pid_n * BLOCK_N, k]).T
            else:
                w_tile = w.load([k, pid_n * BLOCK_N])
            acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION)
    else:
        offs_k = tl.arange(0, BLOCK_K)
        first_k = as_int64(offs_k, INT64)
        x_ptrs = x + row[:, None] * stride_xm + first_k[None, :] * stride_xk
        w_ptrs = w + first_k[:, None] * stride_wk + col[None, :] * stride_wn
        step = as_int64(tl.full((), BLOCK_K, tl.int32), INT64)
        for k in range(0, K, BLOCK_K):
            mask_x = mask_m[:, None]
            mask_w = mask_n[None, :]
            if not EVEN_K:
                mask_x = mask_x & (offs_k < K - k)[None, :]
                mask_w = mask_w & (offs_k < K - k)[:, None]
            x_tile = tl.load(x_ptrs, mask=mask_x, other=0.0)
            w_tile = tl.load(w_ptrs, mask=mask_w, other=0.0)
            acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION)
            x_ptrs += step * stride_xk
            w_ptrs += step * stride_wk

    if PDL:
        # s comes from the kernel launched just before, beside which the loop above has been running.
        tl.extra.cuda.gdc_wait()
    if SHRINKS:
        while tl.atomic_add(state_ptr + 1 + pid_m, 0, sem="acquire") == 0:
            pass
    start_n = pid_n * BLOCK_N
    if not DROPOUT:
        acc = _rank_tail(
            acc, s_ptr, b_ptr, offs_m, start_n, end_m, N, R, stride_sm, stride_br, stride_bn,
            BLOCK_R, TAIL, INT64,
        )  # fmt: skip
    if DROPOUT or c_ptr is not None:
        # A quarter of the columns at a time: a whole accumulator beside acc would not stay in registers, nor would
        # all of the columns' scales on sm_100.
        QUARTER: tl.constexpr = BLOCK_N // 4
        low, high = _halves(acc)
        first, second = _halves(low)
        third, fourth = _halves(high)
        for i in tl.static_range(4):
            part = (first, second, third, fourth)[i]
            at = start_n + i * QUARTER
            if DROPOUT:
                tail = _rank_tail(
                    tl.zeros((BLOCK_M, QUARTER), tl.float32), s_ptr, b_ptr, offs_m, at, end_m, N, R,
                    stride_sm, stride_br, stride_bn, BLOCK_R, TAIL, INT64,
                )  # fmt: skip
                keep = keep_tile(seed_ptr, threshold, offs_m, at, N, BLOCK_M, QUARTER)
                part += tail * (keep.to(tl.float32) * keep_scale)
            store_result(
                part, c_ptr, bias_ptr, y_ptr, z_ptr, offs_m, at, end_m, N, stride_bias, INT64
            )
    else:
        store_result(
            acc, c_ptr, bias_ptr, y_ptr, z_ptr, offs_m, start_n, end_m, N, stride_bias, INT64
        )


class Shrink(NamedTuple):
    """What the launch of a product needs to compute s as well: s = alpha·(mask∘x)·a, a [K, R] in x's type.

    `whole` [M, R] float32, contiguous, gets s before it is rounded to what the product reads.
    """

    a: Tensor
    alpha: Scale
    whole: Tensor
    dropout: Dropout | None


def expand(
    x: Tensor,
    w: Tensor,
    s: Tensor,
    b: Tensor,
    bias: Tensor | None,
    config: TileConfig,
    dropout: Dropout | None = None,
    *,
    c: Tensor | None = None,
    z: Tensor | None = None,
    offsets: Tensor | None = None,
    late_wait: bool = False,
    first: Shrink | None = None,
) -> Tensor:
    """y = x·w + bias + mask∘(s·b): x [M, K], w [K, N], s [M, R], b [R, N], bias [N] -> y [M, N].

    s is float32, or bfloat16 where x and b are, with rows of unit stride. Any strides for x, w, b and bias; K and R may be
    zero, M and N may not. `c` [N] float32 multiplies the columns of what is without bias, which is stored in `z`, like y,
    where one is given. With `offsets`, int32 [G + 1] on x's device, rows offsets[g] up to offsets[g + 1] are multiplied by
    b[g] of b [G, R, N], and by w[g] and bias[g] where these are stacks too; they stay within the operands
    whatever the offsets are. `late_wait`: s was produced by a `shrink` with `release` launched just before, and is waited
    for between loop and tail. `first`: s is computed by the same launch, and by its own programs, which start first; not
    over groups, and with no dropout beside it. `config.tma` is honoured where `tma_applies` says that
    the operands allow it.
    """
    M, K = x.shape
    N = w.shape[-1]
    R = s.shape[1]
    tail = rank_tail(x.dtype, b.dtype, config.tma, dropout is not None)
    chunk = config.rank_chunk
    if tail == "rounded" and s.dtype == torch.float32:  # it passes through registers
        chunk = min(chunk, 16)
    y = x.new_empty((M, N))
    rows = Rows.of(M, config.block_m, offsets)
    stored_w = stored(w) if config.tma and w.ndim == 2 and describable(x) else None
    tma = stored_w is not None
    w_k_major = tma and stored_w is not w
    x_operand, w_operand = x, w
    if tma:
        x_operand = TensorDescriptor.from_tensor(x, [config.block_m, config.block_k])
        w_block = [config.block_k, config.block_n]
        w_operand = TensorDescriptor.from_tensor(stored_w, w_block[::-1] if w_k_major else w_block)
    programs = rows.blocks * cdiv(N, config.block_n)
    a = whole = state = None
    alpha, alpha_is_ptr = scale_argument(1.0 if first is None else first.alpha)
    mask = Mask.of(dropout if first is None else first.dropout)
    if first is not None:
        a, whole = first.a, first.whole
        programs += rows.blocks
        state = torch.zeros(1 + rows.blocks, dtype=torch.int32, device=x.device)
    launch(
        _expand_kernel,
        programs,
        config,
        x.device,
        x_operand,
        w_operand,
        s,
        b,
        None if c is None else c.contiguous(),
        bias,
        y,
        z,
        a,
        whole,
        state,
        alpha,
        *mask,
        *rows,
        M,
        N,
        K,
        R,
        *x.stride(),
        *strides(w),
        s.stride(0),
        *strides(b),
        *((0, 0) if bias is None else strides(bias, 1)),
        *((0, 0) if a is None else a.stride()),
        dependent=late_wait,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        BLOCK_R=rank_block(R, chunk),
        BLOCK_S=rank_block(R, FUSED_RANK),
        BLOCK_G=group_block(offsets),
        GROUP_M=config.group_m,
        EVEN_K=K % config.block_k == 0,
        PRECISION=base_precision(x.dtype),
        TAIL=tail,
        INT64=needs_int64(x, w, s, a, b, bias, y),
        TMA=tma,
        W_K_MAJOR=w_k_major,
        PDL=late_wait,
        ALPHA_IS_PTR=alpha_is_ptr,
    )
    return y


def tma_applies(x: Tensor, w: Tensor) -> bool:
    """Whether the tensor memory accelerator can fetch both: unit stride in one dimension, the rest 16-byte aligned."""
    return describable(x) and stored(w) is not None


def stored(w: Tensor) -> Tensor | None:
    """w or wᵀ, whichever the tensor memory accelerator can fetch; None where it can fetch neither."""
    if describable(w):
        return w
    transposed = w.t()
    return transposed if describable(transposed) else None


def describable(t: Tensor) -> bool:
    """Whether the tensor memory accelerator can fetch the matrix t as it lies."""
    rows, columns = t.stride()
    row_bytes = rows * t.itemsize
    return columns == 1 and row_bytes > 0 and (row_bytes | t.data_ptr()) % 16 == 0 and t.numel() > 0
