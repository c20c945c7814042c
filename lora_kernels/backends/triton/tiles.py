"""Device helpers that the kernels share: offsets, program order, alpha at run time, scales of NF4, dropout masks."""

import triton
import triton.language as tl


@triton.jit
def widen(offsets, WIDE: tl.constexpr):
    """`offsets` in int64 where an operand's extent passes 2³¹ elements: 32-bit products are cheaper everywhere else."""
    if WIDE:
        return offsets.to(tl.int64)
    else:
        return offsets


@triton.jit
def grouped_order(pid, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(pid_m, pid_n) such that neighbours share GROUP_M blocks of rows, and both operands of a group stay in L2."""
    blocks_m = tl.cdiv(M, BLOCK_M)
    per_group = GROUP_M * tl.cdiv(N, BLOCK_N)
    first = (pid // per_group) * GROUP_M
    height = min(blocks_m - first, GROUP_M)
    within = pid % per_group
    return first + within % height, within // height


@triton.jit
def scale_value(alpha, ALPHA_IS_PTR: tl.constexpr):
    """alpha as a number: itself, or what a 0-d tensor holds now, so that a CUDA graph's replay sees new values."""
    if ALPHA_IS_PTR:
        return tl.load(alpha).to(tl.float32)
    else:
        return alpha


@triton.jit
def nf4_scale(
    absmax_ptr,
    code2_ptr,
    absmax2_ptr,
    offset_ptr,
    block,
    mask,
    DOUBLE: tl.constexpr,
):
    """The float32 scales of these blocks of 64 elements of an NF4 weight; 0 where masked.

    Where DOUBLE, code2[absmax]·absmax2 + offset: the kernel must be launched with `contract` False.
    """
    if DOUBLE:
        index = tl.load(absmax_ptr + block, mask=mask, other=0).to(tl.int32)
        code2 = tl.load(code2_ptr + index, mask=mask, other=0.0)
        return code2 * tl.load(absmax2_ptr + block // 256, mask=mask, other=0.0) + tl.load(
            offset_ptr
        )
    else:
        return tl.load(absmax_ptr + block, mask=mask, other=0.0)


@triton.jit
def int8_scale(absmax_ptr, row, mask):
    """The float32 scales of these rows of int8 codes: by the reciprocal of 127, as bitsandbytes does it."""
    return tl.load(absmax_ptr + row, mask=mask, other=0.0) * (1.0 / 127.0)


@triton.jit
def keep_tile(
    seed_ptr,
    threshold,
    offs_m,
    col_start,
    cols,
    BLOCK_M: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """The mask of `lora_kernels.dropout` for rows offs_m and BLOCK_COLS columns from col_start, a multiple of four.

    bool [BLOCK_M, BLOCK_COLS] of an input with `cols` columns; `threshold` holds a uint32's bits. One Philox call makes
    the words of four neighbouring columns.
    """
    offs_g = col_start // 4 + tl.arange(0, BLOCK_COLS // 4)
    counter = offs_m.to(tl.int64)[:, None] * tl.cdiv(cols, 4) + offs_g[None, :]
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    zero = tl.zeros((BLOCK_M, BLOCK_COLS // 4), tl.uint32)
    w0, w1, w2, w3 = tl.philox(tl.load(seed_ptr), low, high, zero, zero)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # word 2p + q stands at [..., p, q]
    return tl.reshape(words, (BLOCK_M, BLOCK_COLS)) >= threshold.to(tl.uint32, bitcast=True)
