"""The product y = x·w + bias + s·b in Gluon, persistent: the rank tail is one more step of the sum over K.

One program on each multiprocessor computes tile after tile. Tensor copies fill a ring of stages with blocks of x and w; the
last steps of a tile's sum are blocks of s and b on the same accumulator, in bfloat16 as x is, or in bfloat16 parts beside
any half x (parts.py); the first steps of the next tile are copied meanwhile. What lies outside of an operand is copied as
zeros, so that no size needs a mask. Dropout of dx, which is on s·b alone, takes that step apart: a product of 64 columns
after the other is masked and added. Forward and dx are one kernel, with w and b described as they lie in memory. The kernel
here is that of sm_90; the one of sm_100, in `persistent_tcgen05.py`, takes the same arguments.

The launch may compute s = alpha·x·a as well. The programs that start first take block of rows after block of rows from a
counter, and store and release each one's s; they go on to their tiles when there is no block left. Any program waits for
the s of a tile after its loop over K. So a program that runs computes what others wait for, however many run at one time.

Gluon is experimental: this file is imported only with a Triton that it was tried with (`untried` in `configs.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from lora_kernels.backends.triton.expand import Shrink, describable, tma_applies
from lora_kernels.backends.triton.in_gluon import block, gdc_launch_dependents, gdc_wait, ordered
from lora_kernels.backends.triton.launch import (
    Mask,
    cdiv,
    launch,
    needs_int64,
    rank_operand,
    scale_argument,
)
from lora_kernels.backends.triton.tiles import keep_groups, scale_value
from lora_kernels.dropout import Dropout
from lora_kernels.tuning.config import (
    FUSED_RANK,
    TileConfig,
    masks_no_tail,
    rank_block,
    shrinking_programs,
)

_keep_groups = gluon.jit(keep_groups.fn)
_scale_value = gluon.jit(scale_value.fn)
# Gluon's other names of copies, up to Triton 3.7, and of a barrier, in 3.6.
_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
_barrier = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.jit
def _multiply(
    left, right, acc, lefts, rights, bars, done, STAGES: gl.constexpr, RIGHT_K_MAJOR: gl.constexpr
):
    """acc + the product of step `done`, which is under way, and no other: the slots of the steps before are free."""
    slot = done % STAGES
    mbarrier.wait(bars.index(slot), (done // STAGES) & 1)
    left_slot = lefts.index(slot)
    right_block = block(rights.index(slot), right)
    if RIGHT_K_MAJOR:
        right_block = right_block.permute((1, 0))
    acc = warpgroup_mma(block(left_slot, left), right_block, acc, is_async=True)
    return warpgroup_mma_init(warpgroup_mma_wait(1, (acc,)))


@gluon.jit
def _copy(left, right, row, col, k, go, lefts, rights, bars, slot, RIGHT_K_MAJOR: gl.constexpr):
    """Starts the copies of one step's blocks, of x and w or of s and b, into a slot of the ring; nothing unless `go`."""
    left_slot, right_slot, bar = lefts.index(slot), rights.index(slot), bars.index(slot)
    mbarrier.expect(bar, left.block_type.nbytes + right.block_type.nbytes, pred=go)
    _load(left, [row, k], bar, block(left_slot, left), pred=go)
    if RIGHT_K_MAJOR:
        _load(right, [col, k], bar, block(right_slot, right), pred=go)
    else:
        _load(right, [k, col], bar, block(right_slot, right), pred=go)


@gluon.jit
def _copy_ahead(
    x, w, s, b, lefts, rights, bars, copied, row, col, next_row, next_col, more,
    NUMBER: gl.constexpr, RANK_STEPS: gl.constexpr, STAGES: gl.constexpr, BLOCK_K: gl.constexpr,
    BLOCK_R: gl.constexpr, W_K_MAJOR: gl.constexpr, B_K_MAJOR: gl.constexpr,
):  # fmt: skip
    """`_copy` of the step that is NUMBER steps behind a tile's sum over K: of s and b, then of the next tile."""
    slot = copied % STAGES
    if NUMBER < RANK_STEPS:
        _copy(s, b, row, col, NUMBER * BLOCK_R, True, lefts, rights, bars, slot, B_K_MAJOR)
    else:
        k = (NUMBER - RANK_STEPS) * BLOCK_K
        _copy(x, w, next_row, next_col, k, more, lefts, rights, bars, slot, W_K_MAJOR)


@gluon.jit
def _halves(acc):
    """acc's left and right columns."""
    return acc.reshape((acc.shape[0], 2, acc.shape[1] // 2)).permute((0, 2, 1)).split()


@gluon.constexpr_function
def _groups_layout(block_m, columns, warps):
    """Of the groups of four columns in a block of a mask, each of which one call of Philox makes.

    A thread has half of a group in a multiply's result, of two rows 8 apart, and its neighbour the other halves: here each
    of the two has all of one row's group, so that they exchange a half, and no memory is needed.
    """
    registers = [[0, 2 << i] for i in range((columns // 8).bit_length() - 1)]
    lanes = [[8, 0], [0, 1], [1, 0], [2, 0], [4, 0]]
    rows = [[16 << i, 0] for i in range((block_m // 16).bit_length() - 1)]
    each = warps.bit_length() - 1
    shape = [block_m, columns // 4]
    return gl.DistributedLinearLayout(registers + rows[each:], lanes, rows[:each], [], shape)


@gluon.jit
def _masked_tail(
    acc, left_slot, right_slot, s, b, row, col, N, seed_ptr, threshold, keep_scale,
    FIRST: gl.constexpr, B_K_MAJOR: gl.constexpr,
):  # fmt: skip
    """acc + mask∘(s·b)·keep_scale of one step, for the columns of a tile from FIRST on.

    Of 64 columns at a time: more beside acc would not stay in registers.
    """
    BLOCK_M: gl.constexpr = acc.shape[0]
    COLUMNS: gl.constexpr = acc.shape[1]
    if COLUMNS > 64:
        left, right = _halves(acc)
        left = _masked_tail(
            left, left_slot, right_slot, s, b, row, col, N, seed_ptr, threshold, keep_scale, FIRST,
            B_K_MAJOR,
        )  # fmt: skip
        right = _masked_tail(
            right, left_slot, right_slot, s, b, row, col, N, seed_ptr, threshold, keep_scale,
            FIRST + COLUMNS // 2, B_K_MAJOR,
        )  # fmt: skip
        return gl.join(left, right).permute((0, 2, 1)).reshape((BLOCK_M, COLUMNS))
    else:
        warps: gl.constexpr = gl.num_warps()
        layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, COLUMNS, 16])
        right = block(right_slot, b)
        if B_K_MAJOR:  # noqa: SIM108, a constant decides which branch is compiled
            right = right.slice(FIRST, COLUMNS, 0).permute((1, 0))
        else:
            right = right.slice(FIRST, COLUMNS, 1)
        tail = warpgroup_mma_init(gl.zeros((BLOCK_M, COLUMNS), gl.float32, layout))
        tail = warpgroup_mma(block(left_slot, s), right, tail, is_async=True)
        groups: gl.constexpr = _groups_layout(BLOCK_M, COLUMNS, warps)
        offs_m = row + gl.arange(0, BLOCK_M, gl.SliceLayout(1, groups))
        offs_g = (col + FIRST) // 4 + gl.arange(0, COLUMNS // 4, gl.SliceLayout(0, groups))
        keep = _keep_groups(seed_ptr, threshold, offs_m, offs_g, N)
        keep = gl.convert_layout(keep, layout).to(gl.float32) * keep_scale
        tail = warpgroup_mma_wait(0, (tail,)) * keep
        return acc + gl.convert_layout(tail, acc.type.layout, assert_trivial=True)


@gluon.jit
def _store_s(acc, s_ptr, whole_ptr, flag_ptr, row, M, R, stride_sm):
    """Stores the s of a block of rows in both types and releases it to the programs that compute tiles of these rows."""
    layout: gl.constexpr = acc.type.layout
    offs_m = row + gl.arange(0, acc.shape[0], gl.SliceLayout(1, layout))
    offs_r = gl.arange(0, acc.shape[1], gl.SliceLayout(0, layout))
    mask = (offs_m < M)[:, None] & (offs_r < R)[None, :]
    at = offs_m.to(gl.int64)[:, None]
    gl.store(whole_ptr + at * R + offs_r[None, :], acc, mask=mask)
    gl.store(s_ptr + at * stride_sm + offs_r[None, :], acc.to(s_ptr.dtype.element_ty), mask=mask)
    _barrier()  # every thread's part is written before one of them says so
    gl.atomic_xchg(flag_ptr, 1, sem="release", scope="gpu")


@gluon.jit
def _wait_for_s(flag_ptr):
    """Waits until the s of a block of rows is released: stored by threads, to be read by a tensor copy."""
    while gl.atomic_add(flag_ptr, 0, sem="acquire", scope="gpu") == 0:
        pass
    gl.inline_asm("fence.proxy.async.global;")


@gluon.jit(do_not_specialize=["M", "shrinking", "threshold"])
def _persistent_kernel(
    x,  # describes [M, K] in blocks [BLOCK_M, BLOCK_K]
    w,  # describes [K, N] in blocks [BLOCK_K, BLOCK_N], or wᵀ where W_K_MAJOR
    s,  # describes [M, R], of b's half type, in blocks [BLOCK_M, BLOCK_R]
    b,  # describes [R, N] in blocks [BLOCK_R, BLOCK_N], or bᵀ where B_K_MAJOR
    y,  # describes [M, N], contiguous, in blocks of half a tile's columns
    bias_ptr,  # [N]
    M,
    N,
    K,
    stride_bias,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    BLOCK_R: gl.constexpr,
    RANK_STEPS: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    W_K_MAJOR: gl.constexpr,
    B_K_MAJOR: gl.constexpr,
    PDL: gl.constexpr,
    RELEASE: gl.constexpr,
    a=None,  # where this launch computes s as well: describes [K, R] in blocks [BLOCK_K, BLOCK_S], or aᵀ where A_K_MAJOR
    s_ptr=None,  # what s describes, rows of unit stride
    whole_ptr=None,  # [M, R] float32, contiguous: s before it is rounded
    state_ptr=None,  # int32, zero before: programs that have started, blocks of rows taken, a flag for each block
    alpha=None,
    shrinking=None,  # programs that compute s first
    R=None,
    stride_sm=None,
    seed_ptr=None,  # of a mask of s·b
    threshold=0,
    keep_scale=1.0,
    BLOCK_S: gl.constexpr = None,
    A_K_MAJOR: gl.constexpr = False,
    ALPHA_IS_PTR: gl.constexpr = False,
):
    SHRINKS: gl.constexpr = a is not None
    MASKED: gl.constexpr = seed_ptr is not None
    AHEAD: gl.constexpr = STAGES - 1  # steps that are under way while one is multiplied
    HALF: gl.constexpr = BLOCK_N // 2
    warps: gl.constexpr = gl.num_warps()
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, BLOCK_N, 16])
    lefts = gl.allocate_shared_memory(x.dtype, [STAGES, BLOCK_M, BLOCK_K], x.layout)
    rights = gl.allocate_shared_memory(
        x.dtype, [STAGES, w.block_shape[0], w.block_shape[1]], w.layout
    )
    out = gl.allocate_shared_memory(x.dtype, y.block_shape, y.layout)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(bars.index(i), count=1)

    blocks_m = gl.cdiv(M, BLOCK_M)
    blocks_n = gl.cdiv(N, BLOCK_N)
    tiles = blocks_m * blocks_n
    steps = gl.cdiv(K, BLOCK_K)
    if steps < AHEAD:  # further steps of a short sum are zeros
        steps = AHEAD
    copied = 0  # steps, of all tiles, whose copies were started
    done = 0  # steps that were multiplied

    tile = gl.program_id(0)
    has_tile = True
    place = tile
    if SHRINKS:
        ticket = gl.atomic_add(state_ptr, 1, sem="relaxed")
        # The last ones to start have the first tiles: the others have one less where they do not come out even.
        tile = gl.num_programs(0) - 1 - ticket
        has_tile = tile < tiles
        place = min(tile, tiles - 1)
        s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, BLOCK_S, 16])
        taken = blocks_m
        if ticket < shrinking:
            taken = gl.atomic_add(state_ptr + 1, 1, sem="relaxed")
        while taken < blocks_m:
            row = taken * BLOCK_M
            acc = warpgroup_mma_init(gl.zeros((BLOCK_M, BLOCK_S), gl.float32, s_layout))
            for i in gl.static_range(AHEAD):
                slot = copied % STAGES
                _copy(x, a, row, 0, i * BLOCK_K, True, lefts, rights, bars, slot, A_K_MAJOR)
                copied += 1
            for step in range(AHEAD, steps + AHEAD):
                acc = _multiply(x, a, acc, lefts, rights, bars, done, STAGES, A_K_MAJOR)
                done += 1
                slot = copied % STAGES
                k, go = step * BLOCK_K, step < steps
                _copy(x, a, row, 0, k, go, lefts, rights, bars, slot, A_K_MAJOR)
                copied += gl.where(go, 1, 0)
            s_block = warpgroup_mma_wait(0, (acc,)) * _scale_value(alpha, ALPHA_IS_PTR)
            _store_s(s_block, s_ptr, whole_ptr, state_ptr + 2 + taken, row, M, R, stride_sm)
            taken = gl.atomic_add(state_ptr + 1, 1, sem="relaxed")
    block_m, block_n = ordered(place, blocks_m, blocks_n, GROUP_M)
    row = block_m * BLOCK_M
    col = block_n * BLOCK_N
    for i in gl.static_range(AHEAD):
        slot = copied % STAGES
        _copy(x, w, row, col, i * BLOCK_K, has_tile, lefts, rights, bars, slot, W_K_MAJOR)
        copied += 1
    while tile < tiles:
        acc = warpgroup_mma_init(gl.zeros((BLOCK_M, BLOCK_N), gl.float32, layout))
        for step in range(AHEAD, steps):
            acc = _multiply(x, w, acc, lefts, rights, bars, done, STAGES, W_K_MAJOR)
            done += 1
            slot = copied % STAGES
            _copy(x, w, row, col, step * BLOCK_K, True, lefts, rights, bars, slot, W_K_MAJOR)
            copied += 1
        following = tile + gl.num_programs(0)
        if PDL:
            # s comes from the kernel launched just before, beside which the loop above has been running.
            gdc_wait()
        if RELEASE:
            # What is launched next runs beside all tiles but the first: it needs s as well, and not y.
            gdc_launch_dependents()
        if SHRINKS:
            _wait_for_s(state_ptr + 2 + row // BLOCK_M)
        # Behind the last tile there is no block of rows to divide by.
        last = min(following, tiles - 1)
        block_m, block_n = ordered(last, blocks_m, blocks_n, GROUP_M)
        next_row = block_m * BLOCK_M
        next_col = block_n * BLOCK_N
        # The last steps of x·w and all of s·b. What is copied meanwhile: s and b, then the next tile's first steps.
        for i in gl.static_range(AHEAD if MASKED else AHEAD + RANK_STEPS):
            if i < AHEAD:
                acc = _multiply(x, w, acc, lefts, rights, bars, done, STAGES, W_K_MAJOR)
            else:
                acc = _multiply(s, b, acc, lefts, rights, bars, done, STAGES, B_K_MAJOR)
            done += 1
            _copy_ahead(
                x, w, s, b, lefts, rights, bars, copied, row, col, next_row, next_col,
                following < tiles, i, RANK_STEPS, STAGES, BLOCK_K, BLOCK_R, W_K_MAJOR, B_K_MAJOR,
            )  # fmt: skip
            copied += 1
        total = warpgroup_mma_wait(0, (acc,))
        if MASKED:
            # What x·w has left free is filled first: a mask takes as long as several steps.
            _copy_ahead(
                x, w, s, b, lefts, rights, bars, copied, row, col, next_row, next_col,
                following < tiles, AHEAD, 1, STAGES, BLOCK_K, BLOCK_R, W_K_MAJOR, B_K_MAJOR,
            )  # fmt: skip
            copied += 1
            slot = done % STAGES
            mbarrier.wait(bars.index(slot), (done // STAGES) & 1)
            total = _masked_tail(
                total, lefts.index(slot), rights.index(slot), s, b, row, col, N, seed_ptr,
                threshold, keep_scale, 0, B_K_MAJOR,
            )  # fmt: skip
            done += 1
        halves = _halves(total)
        for i in gl.static_range(2):
            part = halves[i]
            start = col + i * HALF
            if bias_ptr is not None:
                offs = start + gl.arange(0, HALF, gl.SliceLayout(0, part.type.layout))
                # N is a multiple of 8: written so, two columns are one load.
                mask = offs < N // 8 * 8
                bias = gl.load(bias_ptr + offs * stride_bias, mask=mask, other=0.0)
                part += bias.to(gl.float32)[None, :]
            tma.store_wait(pendings=0)
            _barrier()
            out.store(part.to(x.dtype))
            fence_async_shared()
            _barrier()
            _store(y, [row, start], out)
        tile = following
        row = next_row
        col = next_col
    tma.store_wait(pendings=0)


def persistent(
    x: Tensor,
    w: Tensor,
    s: Tensor,
    b: Tensor,
    bias: Tensor | None,
    config: TileConfig,
    programs: int,
    *,
    late_wait: bool = False,
    release: bool = False,
    first: Shrink | None = None,
    shrinking: int | None = None,
    dropout: Dropout | None = None,
) -> Tensor:
    """y = x·w + bias + mask∘(s·b): x [M, K], w [K, N], s [M, R], b [R, N], bias [N], in half dtypes -> y [M, N].

    `programs`: how many run at one time, the GPU's multiprocessors. ValueError for operands that `applies` does not take;
    of x's dtype s comes from `rank_operand` and b from `fetchable`, else both from `parts`. `late_wait` as in `expand`.
    `release` lets a dependent launch that follows run beside this one, when s is there: it may read s, not y. `first`: s is
    computed by the same launch, of R up to FUSED_RANK, without a mask, `first.a`.t() from `fetchable`; by the first
    `shrinking` of its programs. Equal bits for any `programs` and `shrinking`. `dropout`: where `masks_no_tail` has nothing
    against it, beside no bias, which spills 40 bytes, and no `first`.
    """
    M, K = x.shape
    N, R = b.shape[1], b.shape[0]
    if not applies(x, w):
        raise ValueError(
            "x and w must have 16-byte aligned rows or columns and N % 8 = 0, "
            f"got strides {x.stride()}, {w.stride()}, N = {N}"
        )
    y = x.new_empty((M, N))
    block_r = rank_block(R, config.block_k)
    w_k_major, b_k_major = not describable(w), not describable(b)
    own: dict[str, Any] = {"RELEASE": release}
    kernel, parts = _persistent_kernel, 2
    if config.ctas:
        if release:
            raise ValueError(f"release is made for sm_90, not for tensor memory, got {config}")
        # Its Gluon has names that the Gluon of older Tritons has not.
        from lora_kernels.backends.triton import persistent_tcgen05

        kernel, parts, own = persistent_tcgen05._persistent_kernel, 4, {}
        programs = max(1, programs // config.ctas)
    blocks = cdiv(M, config.block_m)
    most = tiles = blocks * cdiv(N, config.block_n)
    if dropout is not None:
        if reason := masks_no_tail(config, R):
            raise ValueError(reason)
        if bias is not None:
            raise ValueError("dropout is that of dx, which has no bias, got both")
        own |= Mask.of(dropout)._asdict()
    if first is not None:
        masks = first.dropout, dropout
        if config.ctas or masks != (None, None) or R > FUSED_RANK:
            raise ValueError(
                f"s is computed without a mask, up to rank {FUSED_RANK} and by one CTA of sm_90, "
                f"got {masks}, rank {R} and {config}"
            )
        most = tiles + blocks  # a program without a tile may compute s
        shrinking = shrinking or shrinking_programs(blocks, tiles, programs, config.block_n)
        own |= _shrinking(first, s, shrinking, blocks, config)
    if bias is not None and needs_int64(bias):  # these kernels count in 32 bits
        bias = bias.contiguous()
    launch(
        kernel,
        min(programs, most),
        config,
        x.device,
        _described(x, [config.block_m, config.block_k], config),
        _right_operand(w, config.block_k, config, w_k_major),
        _described(s, [config.block_m, block_r], config),
        _right_operand(b, block_r, config, b_k_major),
        _described(y, [config.block_m, config.block_n // parts], config),
        bias,
        M,
        N,
        K,
        0 if bias is None else bias.stride(0),
        dependent=late_wait,
        **own,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        BLOCK_R=block_r,
        RANK_STEPS=cdiv(R, block_r),
        STAGES=config.num_stages,
        GROUP_M=config.group_m,
        W_K_MAJOR=w_k_major,
        B_K_MAJOR=b_k_major,
        PDL=late_wait,
    )
    return y


def _shrinking(
    first: Shrink, s: Tensor, shrinking: int, blocks: int, config: TileConfig
) -> dict[str, Any]:
    """The arguments of a launch that computes s."""
    R = first.a.shape[1]
    block_s = rank_block(R, FUSED_RANK)
    k_major = not describable(first.a)
    alpha, alpha_is_ptr = scale_argument(first.alpha)
    return {
        "a": _right_operand(first.a, config.block_k, config, k_major, block_s),
        "s_ptr": s,
        "whole_ptr": first.whole,
        "state_ptr": torch.zeros(2 + blocks, dtype=torch.int32, device=s.device),
        "alpha": alpha,
        "shrinking": shrinking,
        "R": R,
        "stride_sm": s.stride(0),
        "BLOCK_S": block_s,
        "A_K_MAJOR": k_major,
        "ALPHA_IS_PTR": alpha_is_ptr,
    }


def applies(x: Tensor, w: Tensor) -> bool:
    """Whether tensor copies can fetch x and w, and store y."""
    return tma_applies(x, w) and w.shape[1] * w.itemsize % 16 == 0


def fetchable(b: Tensor) -> Tensor:
    """b [R, N] itself where tensor copies can fetch it, else a copy that they can."""
    if describable(b) or describable(b.t()):
        return b
    R, N = b.shape
    return rank_operand(N, R, b.dtype, b.device).t().copy_(b)


def _described(t: Tensor, block: list[int], config: TileConfig, along: int = 0) -> TensorDescriptor:
    """Describes t in blocks, which two CTAs halve along the dimension `along`."""
    dtype = gl.bfloat16 if t.dtype == torch.bfloat16 else gl.float16
    halves = [[1 - along, along]] if config.ctas == 2 else []
    layout = gl.NVMMASharedLayout.get_default_for(block, dtype, cga_layout=halves)
    return TensorDescriptor.from_tensor(t, block, layout)


def _right_operand(
    t: Tensor, block_k: int, config: TileConfig, k_major: bool, columns: int = 0
) -> TensorDescriptor:
    """Describes w [K, N], b [R, N] or a [K, R]; as its transpose, whose rows are aligned then, where `k_major`.

    `columns` of a block are a tile's, if not given.
    """
    columns = columns or config.block_n
    if k_major:
        return _described(t.t(), [columns, block_k], config)
    return _described(t, [block_k, columns], config, along=1)
