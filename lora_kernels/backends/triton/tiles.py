"""Device helpers of the kernels: offsets, program order, groups of rows, alpha, packed weights, c∘dy, masks."""

import triton
import triton.language as tl


@triton.jit
def as_int64(offsets, INT64: tl.constexpr):
    """`offsets` in int64 where an operand's extent passes 2³¹ elements: 32-bit products are cheaper everywhere else."""
    if INT64:
        return offsets.to(tl.int64)
    else:
        return offsets


@triton.jit
def grouped_order(pid, blocks_m, blocks_n, GROUP_M: tl.constexpr):
    """(pid_m, pid_n) such that neighbours share GROUP_M blocks of rows, and both operands of a group stay in L2."""
    per_group = GROUP_M * blocks_n
    first = (pid // per_group) * GROUP_M
    height = min(blocks_m - first, GROUP_M)
    within = pid % per_group
    return first + within % height, within // height


@triton.jit
def rows_of(group, offsets_ptr, groups, M):
    """(first row, end of the rows) of one group, or of each in a block of them; within [0, M] whatever the offsets hold."""
    mask = group < groups
    first = tl.load(offsets_ptr + group, mask=mask, other=0)
    end = tl.load(offsets_ptr + group + 1, mask=mask, other=0)
    return tl.minimum(tl.maximum(first, 0), M), tl.minimum(tl.maximum(end, 0), M)


@triton.jit
def row_block(pid_m, offsets_ptr, groups, M, BLOCK_M: tl.constexpr, BLOCK_G: tl.constexpr):
    """(group, first row, end of the group's rows) of a block of rows, none of which has rows of two groups.

    Blocks count through the groups in their order; a pid_m behind the last block gets no rows.
    """
    before = 0
    group = 0
    start = 0
    stop = 0
    for g in range(0, groups, BLOCK_G):
        offs_g = g + tl.arange(0, BLOCK_G)
        first, end = rows_of(offs_g, offsets_ptr, groups, M)
        blocks = tl.cdiv(tl.maximum(end - first, 0), BLOCK_M)
        within = pid_m - before - (tl.cumsum(blocks, 0) - blocks)
        own = (within >= 0) & (within < blocks)  # of one group at most
        group += tl.sum(tl.where(own, offs_g, 0))
        start += tl.sum(tl.where(own, first + within * BLOCK_M, 0))
        stop += tl.sum(tl.where(own, end, 0))
        before += tl.sum(blocks)
    return group, start, stop


@triton.jit
def scale_value(alpha, ALPHA_IS_PTR: tl.constexpr):
    """alpha as a number: itself, or what a 0-d tensor holds now, so that a CUDA graph's replay sees new values."""
    if ALPHA_IS_PTR:
        return tl.load(alpha).to(tl.float32)
    else:
        return alpha


@triton.jit
def rank_product(left, right, acc, TAIL: tl.constexpr):
    """acc + left·right, one of them the low-rank product and the other an adapter's matrix; TAIL as `rank_tail` names it.

    "split" multiplies each as the sum of two bfloat16 numbers, but for the product of the two small ones.
    """
    if TAIL == "rounded":
        acc = tl.dot(left.to(tl.bfloat16), right.to(tl.bfloat16), acc)
    elif TAIL == "split":
        left_high, left_finite, left_low = _split(left.to(tl.float32))
        right_high, right_finite, right_low = _split(right.to(tl.float32))
        acc = tl.dot(left_low, right_finite, acc)
        acc = tl.dot(left_finite, right_low, acc)
        acc = tl.dot(left_high, right_high, acc)
    else:
        acc = tl.dot(left.to(tl.float32), right.to(tl.float32), acc, input_precision=TAIL)
    return acc


@triton.jit
def _split(values):
    """(high, high where it is finite else 0, low): bfloat16, values = high + low. Only high has what is not finite."""
    high = values.to(tl.bfloat16)
    finite = tl.abs(values) < 3.3961775e38  # what is beyond is rounded to infinity
    kept = tl.where(finite, values, 0.0)
    finite_high = kept.to(tl.bfloat16)
    return high, finite_high, (kept - finite_high.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def lowrank_product(wide, lowrank, acc, small, FORM: tl.constexpr):
    """(acc, small) + wide·lowrank, FORM as `lowrank_form` and `shrink_form` name it; `lowrank_sum` is their sum.

    "parts" are three bfloat16 numbers that hold all of a float32's 24 bits. acc sums the products of the first, small
    those of the others.
    """
    if FORM == "parts":
        high = lowrank.to(tl.bfloat16)
        rest = lowrank.to(tl.float32) - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        small = tl.dot(wide, low, small)
        small = tl.dot(wide, middle, small)
        acc = tl.dot(wide, high, acc)
    elif FORM == "rounded":
        acc = tl.dot(wide, lowrank.to(tl.bfloat16), acc)
    else:
        acc = tl.dot(wide.to(lowrank.dtype), lowrank, acc, input_precision=FORM)
    return acc, small


@triton.jit
def lowrank_sum(acc, small, FORM: tl.constexpr):
    """What `lowrank_product` summed. Where an operand is not finite small says nothing, and acc has what eager has.

    Beyond 3.396e38, where bfloat16 has infinity, a float32 counts as not finite.
    """
    if FORM == "parts":
        acc += tl.where(tl.abs(small) < float("inf"), small, 0.0)
    return acc


@triton.jit
def store_rounded(ptrs, values, mask, R, PARTS: tl.constexpr):
    """Stores float32 values of s [.., R] for the tail of a product that copies it: rounded, or the PARTS R columns apart."""
    if PARTS == 1:
        tl.store(ptrs, values.to(ptrs.dtype.element_ty), mask=mask)
    else:
        store_parts(ptrs, values, mask, R, True)


@triton.jit
def store_parts(ptrs, values, mask, step, LEFT: tl.constexpr):
    """Stores the three parts of values of a tail's left operand or its right one, `step` elements apart.

    The sum over the parts of left·right is what "split" of `rank_product` adds, in its order.
    """
    high, finite, low = _split(values)
    if LEFT:
        first, second = low, finite
    else:
        first, second = finite, low
    tl.store(ptrs, first, mask=mask)
    tl.store(ptrs + step, second, mask=mask)
    tl.store(ptrs + 2 * step, high, mask=mask)


@triton.jit
def store_result(
    acc,
    c_ptr,
    bias_ptr,
    y_ptr,
    z_ptr,
    offs_m,
    start,
    M,
    N,
    stride_bias,
    INT64: tl.constexpr,
):
    """z = acc and y = c∘acc + bias, for the columns from `start` on."""
    offs_n = start + tl.arange(0, acc.shape[1])
    mask_n = offs_n < N
    if z_ptr is not None:
        z_ptrs = z_ptr + as_int64(offs_m, INT64)[:, None] * N + as_int64(offs_n, INT64)[None, :]
        mask_z = (offs_m < M)[:, None] & mask_n[None, :]
        tl.store(z_ptrs, acc.to(z_ptr.dtype.element_ty), mask=mask_z)
    if c_ptr is not None:
        acc *= tl.load(c_ptr + offs_n, mask=mask_n, other=0.0)[None, :]
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + as_int64(offs_n, INT64) * stride_bias, mask=mask_n, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    y_ptrs = y_ptr + as_int64(offs_m, INT64)[:, None] * N + as_int64(offs_n, INT64)[None, :]
    mask = (offs_m < M)[:, None] & mask_n[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def nf4_scale(absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, block, mask):
    """The float32 scales of these blocks of 64 elements of an NF4 weight; 0 where masked.

    With code2, code2[absmax]·absmax2 + offset: the kernel must be launched with `contract` False.
    """
    if code2_ptr is not None:
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
def fp8_value(codes):
    """The float32 values of float8_e4m3fn codes, given as int8: arithmetic that every target has, where fp8 is no type.

    As a float16 the code's sign, exponent and mantissa make its value divided by 256, subnormal ones included.
    """
    bits = codes.to(tl.int16) << 7
    value = (bits & -0x4080).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where((bits & 0x3F80) == 0x3F80, float("nan"), value)


@triton.jit
def fp8_scale(scales_ptr, row, col, mask, K, SCALE_ROWS: tl.constexpr, SCALE_COLS: tl.constexpr):
    """The float32 scales of elements (row, col) of an fp8 weight [N, K], one for each SCALE_ROWS x SCALE_COLS of them."""
    return tl.load(
        scales_ptr + row // SCALE_ROWS * tl.cdiv(K, SCALE_COLS) + col // SCALE_COLS,
        mask=mask,
        other=0.0,
    )


@triton.jit
def scaled_tile(dy, c, z_ptr, dz_ptr, at, mask):
    """Stores dz = c∘dy of a tile [rows, columns] at the offsets `at`; gives dy∘z in float32, or dy where there is no z."""
    wide = dy.to(tl.float32)
    tl.store(dz_ptr + at, (wide * c[None, :]).to(dz_ptr.dtype.element_ty), mask=mask)
    if z_ptr is not None:
        wide *= tl.load(z_ptr + at, mask=mask, other=0.0).to(tl.float32)
    return wide


@triton.jit
def keep_tile(
    seed_ptr, threshold, offs_m, col_start, cols, BLOCK_M: tl.constexpr, BLOCK_COLS: tl.constexpr
):
    """The mask of `lora_kernels.dropout` for rows offs_m and BLOCK_COLS columns from col_start, a multiple of four.

    bool [BLOCK_M, BLOCK_COLS] of an input with `cols` columns; `threshold` holds a uint32's bits. One Philox call makes
    the words of four neighbouring columns.
    """
    return keep_groups(
        seed_ptr, threshold, offs_m, col_start // 4 + tl.arange(0, BLOCK_COLS // 4), cols
    )


@triton.jit
def keep_groups(seed_ptr, threshold, offs_m, offs_g, cols):
    """`keep_tile` of the groups offs_g of four columns; here without a range, which Gluon makes otherwise."""
    counter = offs_m.to(tl.int64)[:, None] * tl.cdiv(cols, 4) + offs_g[None, :]
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    zero = (counter & 0).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(tl.load(seed_ptr), low, high, zero, zero)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # word 2p + q stands at [..., p, q]
    words = tl.reshape(words, (offs_m.shape[0], 4 * offs_g.shape[0]))
    return words >= threshold.to(tl.uint32, bitcast=True)
