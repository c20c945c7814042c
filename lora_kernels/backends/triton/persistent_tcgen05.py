"""The kernel of `persistent` for sm_100, in Gluon: accumulators in tensor memory, and three kinds of warps.

One warp copies blocks of x and w, then of s and b, into a ring of stages; one warp multiplies them, by tcgen05; four
warps convert and store the result. There are two accumulators, so that one tile is stored while the next is multiplied.
Barriers in shared memory say which stage and which accumulator is full, and which is free. Of two CTAs that share a tile
each has half of its rows of x, s and y and half of the columns of w and b; one warp of the first multiplies for both.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.blackwell import (
    TensorMemoryLayout,
    allocate_tensor_memory,
    tcgen05_commit,
    tcgen05_mma,
    tcgen05_mma_barrier_count,
    tensor_memory_descriptor,
)
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from lora_kernels.backends.triton.in_gluon import block, gdc_wait, ordered

_ACCUMULATORS = gl.constexpr(2)
_STORES = gl.constexpr(2)  # parts of a result in shared memory
_WARP_REGISTERS = gl.constexpr(40)  # of a thread that copies or multiplies


@gluon.aggregate
class _Slot:
    """A place in a ring of `count`, and the parity of the phase that is to be waited for there."""

    index: gl.tensor
    phase: gl.tensor
    count: gl.constexpr

    @gluon.jit
    def first(phase, count: gl.constexpr):
        """The first place. `phase` 0 waits until it is full; 1 until it is free, as it is at first."""
        return _Slot(gl.to_tensor(0), gl.to_tensor(phase), count)  # type: ignore[call-arg]

    @gluon.must_use_result
    @gluon.jit
    def next(self):
        index = self.index + 1
        last = index == self.count
        index = gl.where(last, 0, index)
        return _Slot(index, self.phase ^ last.to(gl.int32), self.count)  # type: ignore[call-arg]


@gluon.aggregate
class _Product:
    """What all warps of a program share: the arguments of the kernel, the ring, the accumulators and their barriers."""

    x: tma.tensor_descriptor
    w: tma.tensor_descriptor
    s: tma.tensor_descriptor
    b: tma.tensor_descriptor
    y: tma.tensor_descriptor
    M: gl.tensor
    N: gl.tensor
    K: gl.tensor
    lefts: gl.shared_memory_descriptor  # of each stage, a block of x or s
    rights: gl.shared_memory_descriptor  # a block of w or b
    full: gl.shared_memory_descriptor
    free: gl.shared_memory_descriptor
    accs: tensor_memory_descriptor
    acc_full: gl.shared_memory_descriptor
    acc_free: gl.shared_memory_descriptor
    BLOCK_M: gl.constexpr
    BLOCK_N: gl.constexpr
    BLOCK_K: gl.constexpr
    BLOCK_R: gl.constexpr
    RANK_STEPS: gl.constexpr
    STAGES: gl.constexpr
    GROUP_M: gl.constexpr
    W_K_MAJOR: gl.constexpr
    B_K_MAJOR: gl.constexpr
    PDL: gl.constexpr

    @gluon.jit
    def tiles(self):
        return gl.cdiv(self.M, self.BLOCK_M) * gl.cdiv(self.N, self.BLOCK_N)

    @gluon.jit
    def place(self, tile):
        """(first row, first column) of a tile."""
        blocks_m = gl.cdiv(self.M, self.BLOCK_M)
        blocks_n = gl.cdiv(self.N, self.BLOCK_N)
        block_m, block_n = ordered(tile, blocks_m, blocks_n, self.GROUP_M)
        return block_m * self.BLOCK_M, block_n * self.BLOCK_N


@gluon.jit
def _copy(p, left, right, row, col, k, at, RIGHT_K_MAJOR: gl.constexpr):
    """Starts the copies of one step's blocks, of x and w or of s and b, into the stage `at` once it is free."""
    mbarrier.wait(p.free.index(at.index), at.phase)
    bar = p.full.index(at.index)
    mbarrier.expect(bar, left.nbytes_per_cta + right.nbytes_per_cta)
    tma.async_load(left, [row, k], bar, block(p.lefts.index(at.index), left))
    right_block = block(p.rights.index(at.index), right)
    if RIGHT_K_MAJOR:
        tma.async_load(right, [col, k], bar, right_block)
    else:
        tma.async_load(right, [k, col], bar, right_block)
    return at.next()


@gluon.jit
def _copies(p):
    """The warp that copies: the blocks of each tile's steps, in the order in which they are multiplied."""
    at = _Slot.first(1, p.STAGES)
    for tile in range(gl.program_id(0), p.tiles(), gl.num_programs(0)):
        row, col = p.place(tile)
        for k in range(0, p.K, p.BLOCK_K):
            at = _copy(p, p.x, p.w, row, col, k, at, p.W_K_MAJOR)
        if p.PDL:
            # s comes from the kernel launched just before, beside which the loop above has been running.
            gdc_wait()
        for i in gl.static_range(p.RANK_STEPS):
            at = _copy(p, p.s, p.b, row, col, i * p.BLOCK_R, at, p.B_K_MAJOR)


@gluon.jit
def _multiply(p, left, right, acc, use_acc, at, RIGHT_K_MAJOR: gl.constexpr):
    """acc + one step's product, or without acc; the stage `at` is free again when that is done."""
    mbarrier.wait(p.full.index(at.index), at.phase)
    left_block = block(p.lefts.index(at.index), left)
    right_block = block(p.rights.index(at.index), right)
    if RIGHT_K_MAJOR:
        right_block = right_block.permute((1, 0))
    free = p.free.index(at.index)
    tcgen05_mma(left_block, right_block, acc, use_acc=use_acc, multicast=True, mbarriers=[free])
    return at.next()


@gluon.jit
def _multiplies(p):
    """The warp that multiplies: x·w and s·b of each tile into one accumulator."""
    at = _Slot.first(0, p.STAGES)
    acc_at = _Slot.first(1, _ACCUMULATORS)
    for _ in range(gl.program_id(0), p.tiles(), gl.num_programs(0)):
        mbarrier.wait(p.acc_free.index(acc_at.index), acc_at.phase)
        acc = p.accs.index(acc_at.index)
        use_acc = False
        for _ in range(0, p.K, p.BLOCK_K):
            at = _multiply(p, p.x, p.w, acc, use_acc, at, p.W_K_MAJOR)
            use_acc = True
        for _ in gl.static_range(p.RANK_STEPS):
            at = _multiply(p, p.s, p.b, acc, use_acc, at, p.B_K_MAJOR)
            use_acc = True
        operands = [p.lefts.index(0), p.rights.index(0)]
        tcgen05_commit(p.acc_full.index(acc_at.index), descs=operands)
        acc_at = acc_at.next()


@gluon.jit
def _stores(p, bias_ptr, stride_bias):
    """The warps that store: each accumulator part by part of its columns, with the bias."""
    PART: gl.constexpr = p.y.block_shape[1]
    out = gl.allocate_shared_memory(p.y.dtype, [_STORES, p.BLOCK_M, PART], p.y.layout)
    acc_at = _Slot.first(0, _ACCUMULATORS)
    for tile in range(gl.program_id(0), p.tiles(), gl.num_programs(0)):
        row, col = p.place(tile)
        mbarrier.wait(p.acc_full.index(acc_at.index), acc_at.phase)
        acc = p.accs.index(acc_at.index)
        for i in gl.static_range(p.BLOCK_N // PART):
            part = acc.slice(i * PART, PART).load()
            start = col + i * PART
            if bias_ptr is not None:
                offs = start + gl.arange(0, PART, gl.SliceLayout(0, part.type.layout))
                # N is a multiple of 8: written so, eight columns are one load.
                mask = offs < p.N // 8 * 8
                bias = gl.load(bias_ptr + offs * stride_bias, mask=mask, other=0.0)
                part += bias.to(gl.float32)[None, :]
            tma.store_wait(pendings=_STORES - 1)
            gl.barrier()
            out.index(i % _STORES).store(part.to(p.y.dtype))
            fence_async_shared()
            gl.barrier()
            tma.async_store(p.y, [row, start], out.index(i % _STORES))
        mbarrier.arrive(p.acc_free.index(acc_at.index))
        acc_at = acc_at.next()
    tma.store_wait(pendings=0)


@gluon.jit(do_not_specialize=["M"])
def _persistent_kernel(
    x,  # describes [M, K] in blocks [BLOCK_M, BLOCK_K]
    w,  # describes [K, N] in blocks [BLOCK_K, BLOCK_N], or wᵀ where W_K_MAJOR
    s,  # describes [M, R], of b's half type, in blocks [BLOCK_M, BLOCK_R]
    b,  # describes [R, N] in blocks [BLOCK_R, BLOCK_N], or bᵀ where B_K_MAJOR
    y,  # describes [M, N], contiguous, in blocks of a part of a tile's columns, of which there is an even number
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
):
    lefts = gl.allocate_shared_memory(x.dtype, [STAGES, BLOCK_M, BLOCK_K], x.layout)
    rights = gl.allocate_shared_memory(
        x.dtype, [STAGES, w.block_shape[0], w.block_shape[1]], w.layout
    )
    pair: gl.constexpr = gl.num_ctas() == 2
    layout: gl.constexpr = TensorMemoryLayout(
        [128, BLOCK_N], col_stride=1, cga_layout=x.layout.cga_layout, two_ctas=pair
    )
    accs = allocate_tensor_memory(gl.float32, [_ACCUMULATORS, BLOCK_M, BLOCK_N], layout)
    # Where both CTAs copy or store, they arrive at the first one's barrier; a commit arrives at both of theirs.
    commits: gl.constexpr = tcgen05_mma_barrier_count(
        [lefts.index(0), rights.index(0)], multicast=True, two_ctas=pair
    )
    full = mbarrier.allocate_mbarrier(batch=STAGES, two_ctas=pair)
    free = mbarrier.allocate_mbarrier(batch=STAGES)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=commits)
    acc_full = mbarrier.allocate_mbarrier(batch=_ACCUMULATORS)
    acc_free = mbarrier.allocate_mbarrier(batch=_ACCUMULATORS, two_ctas=pair)
    for i in gl.static_range(_ACCUMULATORS):
        mbarrier.init(acc_full.index(i), count=commits)
        mbarrier.init(acc_free.index(i), count=1)
    p = _Product(  # type: ignore[call-arg]
        x, w, s, b, y, gl.to_tensor(M), gl.to_tensor(N), gl.to_tensor(K),
        lefts, rights, full, free, accs, acc_full, acc_free,
        BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, RANK_STEPS, STAGES, GROUP_M, W_K_MAJOR, B_K_MAJOR,
        PDL,
    )  # fmt: skip
    gl.warp_specialize(
        [(_stores, (p, bias_ptr, gl.to_tensor(stride_bias))), (_copies, (p,)), (_multiplies, (p,))],
        [1, 1],
        [_WARP_REGISTERS, _WARP_REGISTERS],
    )
