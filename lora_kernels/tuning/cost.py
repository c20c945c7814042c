"""Predicted time of one LoRA linear on a GPU, by algorithm: what a plan compares and `explain` prints.

With P the achievable rate, W the achievable bandwidth and e an element's bytes:

frozen      max(2·M·N·K / P, bytes / 0.92·W)
two_kernel  product + shrink + gap                              shrink = max(e·M·K / 0.9·W, 2·M·K·R / P, e·M·K·latency /
                                                                bytes on their way), see lowrank.py; overlapped in part
                                                                on sm_90+
persistent  product + shrink + gap, overlapped likewise         or beside each other, see `_beside_us`; + a launch and a gap
                                                                where s·b is in parts, which b is made into
one_launch  product + a clearing of its flags + gap             its first programs compute s, see `_first_us`
persistent_one_launch  the same of persistent
lorafusion  product + shrink + gap                              LoRAFusion's structure: pointer loads, no overlap; its
                                                                shrink, and the library's below, without latency
one_pass    product, x·a in its loop
decode      (bytes + re-read a) / 0.92·W                        of a quantised w the packed bytes; or the loop's instructions
cuda_decode the same by the CUDA C++ kernel, + 0.5 us; x·a is a launch of its own where the kernel does not fuse it
eager       frozen + shrink + 1.25 passes over y + 2 gaps       y = s·b + bias, then y += x·w by the vendor's library
addmm       frozen + shrink + 2 passes over y + 2 gaps          the usual hand-written form: y = x·w, then y += s·b
reference   frozen + shrink + 6 passes over y + 4 gaps          one PyTorch operation after the other: s·b is written, read
                                                                and written by alpha·, two are read and one written by +

A product by one of these kernels takes the cycles that were counted from its compiled code (cycles.py), for the busiest
multiprocessor, over those that its share of 2·M·N·K takes the matrix pipe, and over the middle of `Target.reaches`. For the
library's product only the matrix pipe counts. A last wave that is not full slows it as it slows the best of the counted
tiles; it may split its sum, these kernels do not.

A backward's problem (x is dy, y is dx) adds dA, one reading of its other side, to every algorithm, and dB, a second reading
of dy, to all but lorafusion, and two_kernel and persistent up to rank 32 of half types, which get q and dB from one. Where
all of them run beside persistent, `_beside_us` has their time. addmm computes x·a again, another reading of the other side.
reference has alpha·dy, 2 passes over dy; q·aᵀ is written and dx is summed, 4 passes over dx.

Passes over y beside s·b take no less than its 2·M·N·R / P.

A mask costs eager the operations that compute it, and passes over a float32 copy of what is masked, see `_mask_us`. These
kernels compute it where they read x or store s·b; so does tail_first, eager's formula by their shrink and their s·b.

A quantised weight costs all but decode a launch before, which reads it and writes a dense copy, and a gap. The
others are predicted for a dense weight: `plan` adds the copy that they are given.
Over groups of rows, taken as equally many in each: a product fills its blocks of rows for each group, bytes are those of
each W, A and B that has rows, and nothing is hidden but what the kernels hide. There is no library product to
hold the cycles against: a product takes them, or frozen where that is longer. two_kernel reads dy a second time for dB.
tail_first, for one W of all groups, is eager's formula without groups; eager is the batched form, of up to twice as many
blocks as groups: each gets a copy of its W, and passes over x and y fill blocks, convert and gather. `tune` times no
groups: these predictions decide.

These are predictions of the algorithm's own costs: a device's clocks, heat and other work are not in them.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace

from lora_kernels.problem import DENSE, ITEMSIZE, Problem
from lora_kernels.tuning.config import (
    CUDA_DECODE_COLUMNS,
    TileConfig,
    cuda_decode_blocks,
    cuda_decode_fuses,
    one_reading_columns,
    one_reading_moves_less,
    row_blocks,
    runs_beside,
    shrinking_programs,
    smem_bytes,
    splits_shrink,
    tail_in_parts,
    waits_us,
    wgrad_beside_us,
)
from lora_kernels.tuning.cycles import INSTRUCTIONS, L2_BYTES, Tile, cycles, flops_per_clock, tiles
from lora_kernels.tuning.lowrank import lowrank_us
from lora_kernels.tuning.targets import Target

ALGORITHMS = (
    "two_kernel",
    "one_launch",
    "one_pass",
    "decode",
    "persistent",
    "persistent_one_launch",
    "cuda_decode",
    "eager",
)
TAIL_FIRST = "tail_first"  # over groups of one weight, and with dropout
OTHERS = ("frozen", "addmm", "reference", "lorafusion")  # predicted for comparison
MIN_KERNEL_US = 2.0
_STREAMED = 0.92  # of the copy bandwidth, by a product that is bound by reading W
_LIBRARY_SPLITS = (1, 2, 4, 8)
_MOST_TIMES = 16384
# (passes over x, passes over y, further launches) beside the library's product, forward and backward.
_PASSES = {
    "eager": ((0.0, 1.25, 2), (0.0, 1.25, 2)),
    "tail_first": ((0.0, 1.25, 2), (0.0, 1.25, 2)),
    "addmm": ((0.0, 2.0, 2), (0.0, 2.0 + 1 / 0.9, 3)),
    "reference": ((0.0, 6.0, 4), (2.0, 4.0, 4)),
}
# Instructions of `decode`'s loop for an element of a quantised W, by format and block_k: for at most 16 rows, for more.
# Counted in the machine code of sm_80 and sm_90 at rank 16 to 64. Of a dense W the bytes decide.
_DECODE_INSTRUCTIONS = {
    ("nf4", 64): (16, 26),
    ("nf4", 32): (54, 62),
    ("int8", 64): (8, 16),
    ("int8", 32): (47, 62),
    ("fp8", 64): (17, 30),
    ("fp8", 32): (65, 97),
}
# The same of eager over groups: operands are widened to float32, written into blocks, and gathered again.
_BATCHED_PASSES = 18.0, 18.0, 25
# Bytes for an element, and launches, by ATen: to compute a mask, ten rounds of ten operations on int64 for four elements,
# once for forward and backward; to apply it, to a float32 copy.
_MASK_BYTES, _MASK_LAUNCHES = 470, 135
_MASKING_BYTES, _MASKING_LAUNCHES = 28, 4
# The share of shrink that runs beside the dependent product.
_HIDDEN = {"sm_90": 0.5, "sm_100": 0.5}


def frozen_us(problem: Problem, target: Target) -> float:
    """The frozen layer's own time, the floor."""
    stream = problem.frozen_bytes / (_STREAMED * target.bandwidth_gbs * 1e3)
    return max(_compute_us(problem, target), stream, MIN_KERNEL_US)


def _compute_us(problem: Problem, target: Target) -> float:
    return problem.flops / (target.tflops(problem.dtype) * 1e6)


# A new number of rows has a bucket's times, which would take milliseconds again.
@functools.lru_cache(maxsize=_MOST_TIMES)
def predict_us(
    algorithm: str, problem: Problem, target: Target, config: TileConfig | None = None
) -> float:
    """Predicted time of the forward (or, for an adjoint problem, of dx) by `algorithm`, one of the names above.

    `config` is the tile; without one, a product gets the counted tile that is best for it.
    ValueError for an unknown name.
    """
    frozen = frozen_us(problem, target)
    if algorithm == "frozen":
        return frozen
    gap = target.gap_us
    x_us = problem.M * problem.K * problem.itemsize / (target.bandwidth_gbs * 1e3)
    y_us = problem.M * problem.N * problem.itemsize / (target.bandwidth_gbs * 1e3)
    once = problem.backward and _reads_dy_once(algorithm, problem)
    others = algorithm in _PASSES or algorithm == "lorafusion"  # their own kernels
    reader, sums = ("", "") if others else ("shrink_wgrad" if once else "shrink", "wgrad")
    shrink = _lowrank_us(reader, problem, target, problem.K)
    adapter_grads = 0.0
    if algorithm == "persistent" and not problem.empty:
        config = config or _best_tile("persistent", problem, target).config
        if runs_beside(config, problem, target):
            main = product_us("persistent", problem, target, config)
            beside = _beside_us(problem, target, config, main)
            return _dequantise_us(problem, target) + main + beside
    if problem.backward:
        adapter_grads = _lowrank_us(sums, problem, target, problem.N) + gap
        adapter_grads += 0.0 if once else _lowrank_us(sums, problem, target, problem.K) + gap
    if algorithm in _PASSES:
        over_x, over_y, launches = _PASSES[algorithm][problem.backward]
        if problem.groups and algorithm == "eager":
            frozen += _batching_us(problem, target)
            over_x, over_y, launches = _BATCHED_PASSES
        if problem.dropout and algorithm == "eager":
            frozen += _mask_us(problem, target)
        if algorithm == TAIL_FIRST:
            frozen += _dequantise_us(problem, target)
        passes_us = over_x * x_us + max(over_y * y_us, _rank_us(problem, target, problem.N))
        return frozen + shrink + passes_us + launches * gap + adapter_grads
    if algorithm == "decode":
        readers = math.ceil(problem.N / (config.block_n if config else 64))
        streamed = _streamed_us(problem, target, readers, max(16, problem.R), problem.packed_bytes)
        return max(streamed, _decode_issue_us(problem, target, config)) + adapter_grads
    if algorithm == "cuda_decode":
        one_half_type = problem.dtype == problem.adapter_dtype != "float32"
        fused = cuda_decode_fuses(problem.R, one_half_type, problem.w_k_major)
        tiles = math.ceil(problem.N / CUDA_DECODE_COLUMNS)
        readers = cuda_decode_blocks(tiles, target.multiprocessors) if fused and tiles else 0
        apart_us = 0.0 if fused else shrink + gap
        streamed = _streamed_us(problem, target, readers, problem.R, _dense_bytes(problem))
        return 0.5 + streamed + apart_us + adapter_grads
    if algorithm == "one_pass":
        product = product_us("one_pass", problem, target, config)
        return _dequantise_us(problem, target) + product + adapter_grads
    if algorithm in ("one_launch", "persistent_one_launch"):
        kernel = "expand" if algorithm == "one_launch" else "persistent"
        main = product_us(kernel, problem, target, config)
        first = _first_us(kernel, problem, target, config) + MIN_KERNEL_US + gap
        return _dequantise_us(problem, target) + main + first + adapter_grads
    if algorithm in ("two_kernel", "persistent", "lorafusion"):
        pointers = algorithm == "lorafusion"
        kernel = "persistent" if algorithm == "persistent" else "expand"
        main = product_us(kernel, problem, target, config, pointers)
        # In a backward q comes with dB, and nothing runs beside the product; nor does a shrink whose parts are summed.
        overlaps = not (pointers or problem.backward or splits_shrink(problem, target))
        hidden = overlaps * _HIDDEN.get(target.name, 0.0) * min(shrink + gap, main)
        if algorithm == "persistent" and tail_in_parts(problem):
            main += MIN_KERNEL_US + gap
        return _dequantise_us(problem, target) + main + shrink + gap - hidden + adapter_grads
    raise ValueError(
        f"algorithm must be one of {(*ALGORITHMS, TAIL_FIRST, *OTHERS)}, got {algorithm!r}"
    )


def _reads_dy_once(algorithm: str, problem: Problem) -> bool:
    """Whether one kernel gets q and dB from one reading of dy: ours by its tile and the bytes that it moves."""
    columns = one_reading_columns(problem)
    ours = algorithm in ("two_kernel", "persistent")
    ours = ours and one_reading_moves_less(problem.itemsize, problem.R, columns)
    return (ours or algorithm == "lorafusion") and not problem.groups


def _mask_us(problem: Problem, target: Target) -> float:
    """The time of the mask of the layer's x [M, K], in a backward of dx [M, N] and of x, by ATen's operations."""
    elements = problem.M * (problem.N if problem.backward else problem.K)
    moved, launches = 2 * _MASKING_BYTES, 2 * _MASKING_LAUNCHES
    if not problem.backward:
        moved, launches = _MASK_BYTES + _MASKING_BYTES, _MASK_LAUNCHES + _MASKING_LAUNCHES
    moved_us = moved * elements / (target.bandwidth_gbs * 1e3)
    return max(moved_us, launches * (MIN_KERNEL_US + target.gap_us))


@functools.lru_cache(maxsize=_MOST_TIMES)
def predict_range(
    algorithm: str, problem: Problem, target: Target, config: TileConfig | None = None
) -> tuple[float, float]:
    """(least, most) of `predict_us`: for the most and the least that loops are published to reach of the library's rate."""
    ends = (replace(target, reaches=(share, share)) for share in reversed(target.reaches))
    least, most = (predict_us(algorithm, problem, end, config) for end in ends)
    return least, most


def _first_us(kernel: str, problem: Problem, target: Target, config: TileConfig | None) -> float:
    """By how much programs that compute s of a block of rows, before all others, delay the end of a product.

    By nothing where the last wave of tiles leaves a place free for each of them; else by the time of one. Assumed: all run
    at once, and each reads by half of a multiprocessor's port. Programs of persistent take one block after the other: by
    nothing where those with a tile less suffice, see `shrinking_programs`. Nobody waits for s longer than for his own loop.
    """
    if problem.empty:
        return 0.0
    own = Tile.of(config, problem, target.name) if config else _best_tile(kernel, problem, target)
    blocks = row_blocks(problem, own.config.block_m)
    tiles_ = blocks * math.ceil(problem.N / own.config.block_n)
    places = target.multiprocessors * (2 if _two_at_a_time(own, problem, target) else 1)
    free = blocks <= -tiles_ % places
    if kernel == "persistent":
        free = shrinking_programs(blocks, tiles_, places, own.config.block_n) < places
    if free:
        return 0.0
    clock_ghz = (
        target.half_tflops * 1e3 / target.multiprocessors / flops_per_clock(target.name, "bfloat16")
    )
    read = problem.M * problem.K * problem.itemsize / 1e3
    alone = read / blocks / (0.5 * L2_BYTES * clock_ghz)
    return max(alone * math.ceil(blocks / places), read / (0.9 * target.bandwidth_gbs))


def _beside_us(problem: Problem, target: Target, config: TileConfig, main_us: float) -> float:
    """What is added to the time of a persistent product by shrink and, in a backward, the sums of dB and dA beside it.

    What they occupy of the pipes of the busiest multiprocessor, counted as the product's own cycles are; the launch of
    shrink; and what none of it hides: shrink runs beside the first tile of every multiprocessor, the sums beside the others,
    each limited by the bandwidth and by what it has on its way. Assumed: blocks of both run on a multiprocessor at one time,
    as its registers and its shared memory allow.
    """
    own = Tile.of(config, problem, target.name)
    tiles_ = row_blocks(problem, own.config.block_m) * math.ceil(problem.N / own.config.block_n)
    each = math.ceil(tiles_ * max(1, own.config.ctas) / target.multiprocessors)
    counted = cycles(own, problem.R)
    steps = math.ceil(problem.K / own.config.block_k)
    pipes = [each * (steps * s + r) for s, r in zip(counted.step, counted.rest, strict=True)]

    (shrink,) = tiles("shrink", problem, target.name)
    read = problem.M * problem.K
    programs = math.ceil(problem.M / shrink.config.block_m)
    small = [(shrink, programs, math.ceil(problem.K / shrink.config.block_k))]
    sums_us = 0.0
    if problem.backward:
        # Counted once: its code does not depend on how the weight lies.
        (wgrad,) = tiles("wgrad", replace(problem, w_k_major=False), target.name)
        rows, columns = wgrad.config.block_m, wgrad.config.block_n
        programs = math.ceil(problem.K / columns) + math.ceil(problem.N / columns)
        small.append((wgrad, programs, math.ceil(problem.M / rows)))
        sums_us = wgrad_beside_us(problem, target)
        read += problem.M * (problem.K + problem.N)
    loaded = list(pipes)
    for tile, programs, tile_steps in small:
        turns = math.ceil(programs / target.multiprocessors)
        block = cycles(tile, problem.R)
        for i, (step, rest) in enumerate(zip(block.step, block.rest, strict=True)):
            loaded[i] += turns * (tile_steps * step + rest)
    slower = main_us * max(loaded) / max(pipes)

    first_us = main_us / each
    shrink_us = problem.M * problem.K * problem.itemsize / (0.9 * target.bandwidth_gbs * 1e3)
    shrink_us = max(shrink_us, waits_us(shrink.config, small[0][2]))
    exposed = max(0.0, shrink_us - first_us) + max(0.0, sums_us - (main_us - first_us))
    moved = problem.frozen_bytes + problem.lowrank_bytes + read * problem.itemsize
    stream_us = moved / (_STREAMED * target.bandwidth_gbs * 1e3)
    rounding_us = (MIN_KERNEL_US + target.gap_us) * problem.backward  # of s, for the sum of dB
    return max(slower, stream_us) - main_us + exposed + target.gap_us + rounding_us


def _best_tile(kernel: str, problem: Problem, target: Target) -> Tile:
    return min(
        tiles(kernel, problem, target.name), key=lambda tile: _tile_us(tile, problem, target)
    )


def _lowrank_us(kernel: str, problem: Problem, target: Target, width: int) -> float:
    """The time of a kernel that reads x or dy, of `width`, and over groups an adapter's matrix of each that has rows.

    By one of LOWRANK_KERNELS no less than it waits for x; of no such name, the library's or another's, it waits for nothing.
    """
    read = problem.M * width * problem.itemsize
    if problem.groups:
        read += problem.with_rows * width * problem.R * ITEMSIZE[problem.adapter_dtype]
    read_us = read / (0.9 * target.bandwidth_gbs * 1e3)
    waiting_us = lowrank_us(kernel, replace(problem, K=width), target) if kernel else 0.0
    return max(read_us, waiting_us, _rank_us(problem, target, width), MIN_KERNEL_US)


def _rank_us(problem: Problem, target: Target, width: int) -> float:
    """The matrix units' time for a product of M rows, of `width` and the rank."""
    return 2 * problem.M * width * problem.R / (target.tflops(problem.dtype) * 1e6)


def _batching_us(problem: Problem, target: Target) -> float:
    """What the batched product of eager takes beyond frozen: as many blocks again, and a copy of W for each."""
    if problem.weights == 1:
        return 0.0
    copies = 2 * problem.groups * problem.K * problem.N * problem.itemsize
    return _compute_us(problem, target) + 3 * copies / (target.bandwidth_gbs * 1e3)


def _dequantise_us(problem: Problem, target: Target) -> float:
    """A dense copy of a quantised W before the product: the packed bytes read once, the dense ones written once."""
    if problem.weight_format == DENSE:
        return 0.0
    moved = problem.packed_bytes + _dense_bytes(problem)
    return max(moved / (0.9 * target.bandwidth_gbs * 1e3), MIN_KERNEL_US) + target.gap_us


def _dense_bytes(problem: Problem) -> int:
    return problem.N * problem.K * problem.itemsize


def _decode_issue_us(problem: Problem, target: Target, config: TileConfig | None) -> float:
    """The instructions of `decode` that make W's elements of its codes, at the clock that the target's rate implies."""
    block_k = 32 if config and config.block_k < 64 else 64
    counted = _DECODE_INSTRUCTIONS.get((problem.weight_format, block_k))
    if counted is None:
        return 0.0
    each = counted[problem.M > 16]
    per_clock = flops_per_clock(target.name, "bfloat16") / (target.half_tflops * 1e6)
    return problem.N * problem.K * each / (32 * INSTRUCTIONS) * per_clock


def _streamed_us(
    problem: Problem, target: Target, readers: int, ranks: int, w_bytes: float
) -> float:
    """W streamed once, or A read again from L2 by each of `readers` blocks, whichever takes longer."""
    moved = problem.frozen_bytes - _dense_bytes(problem) + w_bytes + problem.lowrank_bytes
    stream_us = moved / (_STREAMED * target.bandwidth_gbs * 1e3)
    again = readers * problem.K * ranks * problem.itemsize
    return max(stream_us, again / (target.l2_gbs * 1e3), MIN_KERNEL_US)


def product_us(
    kernel: str,
    problem: Problem,
    target: Target,
    config: TileConfig | None = None,
    pointers: bool = False,
) -> float:
    """Predicted time of `kernel`, expand, persistent or one_pass, alone. `pointers`: without tensor descriptors."""
    frozen = frozen_us(problem, target)
    if problem.empty:
        return frozen
    own = [Tile.of(config, problem, target.name)] if config else tiles(kernel, problem, target.name)
    if pointers:
        own = list({t._replace(config=replace(t.config, tma=False)) for t in own})
    ours = min(_tile_us(tile, problem, target) for tile in own)
    if problem.groups:
        return max(frozen, ours)
    return frozen * max(1.0, ours / max(_library_us(problem, target), frozen))


def _tile_us(tile: Tile, problem: Problem, target: Target) -> float:
    """The time by the busiest multiprocessor's cycles, or by the bytes and the end of a block after the last of them."""
    per_clock = flops_per_clock(target.name, problem.dtype) * target.multiprocessors
    clock_us = per_clock / (target.tflops(problem.dtype) * 1e6)
    moved = problem.frozen_bytes + problem.lowrank_bytes
    stream_us = moved / (_STREAMED * target.bandwidth_gbs * 1e3)
    end_us = max(cycles(tile, problem.R).rest) * clock_us
    reached = sum(target.reaches) / 2 * rate(tile, problem, target)
    return max(_compute_us(problem, target) / reached, stream_us + end_us)


def _library_us(problem: Problem, target: Target) -> float:
    """The time of the library's product; its last wave of blocks may not fill every multiprocessor."""
    counted = tiles("expand", problem, target.name)
    full = max(full_rate(tile, problem, target) for tile in counted)
    # Partial results of a split sum, float32, there and back.
    partials = 8 * problem.M * problem.N / (target.l2_gbs * 1e3)
    return min(
        _compute_us(problem, target) * full / rate(tile, problem, target, split)
        + (partials * split if split > 1 else 0.0)
        for tile in counted
        for split in _LIBRARY_SPLITS
    )


def rate(tile: Tile, problem: Problem, target: Target, split: int = 1) -> float:
    """The matrix pipe's cycles for the product alone over the cycles of the busiest multiprocessor.

    `split`: so many blocks share the terms of a sum.
    """
    own = tile.config
    blocks = row_blocks(problem, own.block_m) * math.ceil(problem.N / own.block_n) * split
    each = math.ceil(blocks / max(1, target.multiprocessors // max(1, own.ctas)))
    steps = math.ceil(math.ceil(problem.K / own.block_k) / split)
    matrix = problem.flops / target.multiprocessors / flops_per_clock(target.name, problem.dtype)
    return matrix / each / _block_cycles(tile, problem, target, steps, each)


def full_rate(tile: Tile, problem: Problem, target: Target) -> float:
    """`rate` where every multiprocessor has whole tiles at all times."""
    own = tile.config
    steps = math.ceil(problem.K / own.block_k)
    per_clock = flops_per_clock(target.name, problem.dtype)
    matrix = 2 * own.block_m * own.block_n * problem.K / per_clock / max(1, own.ctas)
    return matrix / _block_cycles(tile, problem, target, steps, 2)


def _block_cycles(tile: Tile, problem: Problem, target: Target, steps: int, each: int) -> float:
    """The cycles of one block of `tile`, of which a multiprocessor computes `each`, two at a time where they fit.

    Where tensor memory holds two accumulators, one is stored beside the loop of the other.
    """
    apart = tile.config.ctas > 0 or _two_at_a_time(tile, problem, target)
    return cycles(tile, problem.R).block(steps, overlapped=each > 1 and apart)


def _two_at_a_time(tile: Tile, problem: Problem, target: Target) -> bool:
    """Whether a multiprocessor has memory for two blocks, and registers for the accumulators of two 128x128 tiles."""
    own = tile.config
    both_fit = 2 * smem_bytes(own, problem, target) <= target.smem_bytes
    return both_fit and own.block_m * own.block_n <= 128 * 128
