"""Predicted time of one LoRA linear on a GPU, by algorithm: what `select` compares and `explain` prints.

With P the achievable rate, W the achievable bandwidth, e an element's bytes and r = max(16, R), the fewest columns that a
matrix instruction takes:

frozen      max(2·M·N·K / P, bytes / 0.92·W)
two_kernel  frozen / efficiency · (1 + r/K) + shrink + gap          shrink = e·M·K / 0.9·W, hidden in part on sm_90+
one_pass    frozen / efficiency · (1 + side + r/K)                  side: x·a again for each block of columns
decode      (bytes + re-read a) / 0.92·W
cuda_decode the same by the CUDA C++ kernel
aten        frozen + shrink + 1.25 passes over y + 2 gaps           y = s·b + bias, then y += x·w by the vendor's library
addmm       frozen + shrink + 2 passes over y + 2 gaps              the usual hand-written form
naive       frozen + shrink + 6 passes over y + 4 gaps              one PyTorch operation after the other

A backward's problem (x is dy, y is dx) adds dA, one reading of its other side, to every algorithm, and dB, a second reading
of dy, to all but two_kernel's, which gets q and dB from one.

These are predictions: of the algorithm's own costs, not of a device's mood.
"""

from __future__ import annotations

import math

from lora_kernels.problem import Problem
from lora_kernels.tuning.config import TileConfig
from lora_kernels.tuning.targets import Target

ALGORITHMS = ("two_kernel", "one_pass", "decode", "cuda_decode", "aten")
MIN_KERNEL_US = 2.0
_STREAMED = 0.92  # of the copy bandwidth, by a product that is bound by reading W
# The share of the vendor library's rate that a tile loop of these kernels reaches: published Triton results, pointer loads
# and tensor descriptors, without and with a persistent loop.
_EFFICIENCY = {
    "sm_80": 0.93,
    "sm_86": 0.93,
    "sm_89": 0.93,
    "sm_90": 0.80,
    "sm_100": 0.55,
    "sm_120": 0.90,
    "gfx942": 0.70,
    "gfx1100": 0.70,
}
_TMA_EFFICIENCY = {"sm_90": 0.90, "sm_100": 0.65}
# A tile's operands are read from shared memory or L2 once for block_m·block_n sums: small tiles read more.
_TILE_RATE = {(128, 256): 1.0, (128, 128): 0.97, (64, 256): 0.92, (64, 128): 0.88, (64, 64): 0.75}
# (passes over y beside the product's own, further launches) of the forms that end with the vendor's product.
_PASSES = {"aten": (1.25, 2), "addmm": (2.0, 2), "naive": (6.0, 4)}
_HIDDEN = {
    "sm_90": 0.5,
    "sm_100": 0.5,
}  # the share of shrink that runs beside the dependent product


def frozen_us(problem: Problem, target: Target) -> float:
    """The frozen layer's own time, the floor."""
    compute = problem.flops / (target.tflops(problem.dtype) * 1e6)
    stream = problem.frozen_bytes / (_STREAMED * target.bandwidth_gbs * 1e3)
    return max(compute, stream, MIN_KERNEL_US)


def predict_us(
    algorithm: str, problem: Problem, target: Target, config: TileConfig | None = None
) -> float:
    """Predicted time of the forward (or, for an adjoint problem, of dx) by `algorithm`, one of the names above.

    `config` is the product's tile; it decides efficiency, padding and how often one_pass computes x·a.
    ValueError for an unknown name.
    """
    frozen = frozen_us(problem, target)
    if algorithm == "frozen":
        return frozen
    size = problem.itemsize
    ranks = max(16, problem.R)
    gap = target.gap_us
    x_us = problem.M * problem.K * size / (target.bandwidth_gbs * 1e3)
    y_us = problem.M * problem.N * size / (target.bandwidth_gbs * 1e3)
    shrink = max(x_us / 0.9, MIN_KERNEL_US)
    adapter_grads = 0.0
    if problem.backward:
        adapter_grads = max(y_us / 0.9, MIN_KERNEL_US) + gap
        adapter_grads += 0.0 if algorithm == "two_kernel" else shrink + gap
    if algorithm in _PASSES:
        passes, launches = _PASSES[algorithm]
        return frozen + shrink + passes * y_us + launches * gap + adapter_grads
    if algorithm == "decode":
        block_n = config.block_n if config else 64
        return _streamed_us(problem, target, block_n, ranks, 0.0) + adapter_grads
    if algorithm == "cuda_decode":
        return _streamed_us(problem, target, 64, problem.R, 0.5) + adapter_grads
    tail = ranks / max(problem.K, 1)
    main = frozen / (efficiency(config, target) * relative_rate(problem, target, config))
    if algorithm == "two_kernel":
        hidden = _HIDDEN.get(target.name, 0.0) * min(shrink + gap, main)
        return main * (1 + tail) + shrink + gap - hidden + adapter_grads
    if algorithm == "one_pass":
        return main * (1 + side_share(ranks, config, target) + tail) + adapter_grads
    raise ValueError(
        f"algorithm must be one of {ALGORITHMS}, frozen, addmm or naive, got {algorithm!r}"
    )


def _streamed_us(
    problem: Problem, target: Target, block_n: int, ranks: int, start_us: float
) -> float:
    """W streamed once, or A read again from L2 by every block of `block_n` columns, whichever takes longer."""
    moved = problem.frozen_bytes + problem.lowrank_bytes
    stream_us = moved / (_STREAMED * target.bandwidth_gbs * 1e3)
    again = math.ceil(problem.N / block_n) * problem.K * ranks * problem.itemsize
    return max(stream_us + start_us, again / (target.l2_gbs * 1e3), MIN_KERNEL_US)


def efficiency(config: TileConfig | None, target: Target) -> float:
    """The share of the vendor library's rate that the main loop reaches."""
    if config is not None and config.tma:
        return _TMA_EFFICIENCY[target.name]
    return _EFFICIENCY[target.name]


def relative_rate(problem: Problem, target: Target, config: TileConfig | None) -> float:
    """How near the tile comes to the best of the usual tiles, at most 1: last waves that are not full hit all of them."""
    if config is None or problem.empty:
        return 1.0
    best = max(_rate(problem, target, *tile) for tile in _TILE_RATE)
    return min(1.0, _rate(problem, target, config.block_m, config.block_n) / best)


def _rate(problem: Problem, target: Target, block_m: int, block_n: int) -> float:
    """Useful share of the work of whole waves of whole tiles, times the tile's own efficiency."""
    tiles = math.ceil(problem.M / block_m) * math.ceil(problem.N / block_n)
    resident = 1 if block_m * block_n > 128 * 128 else 2
    slots = target.multiprocessors * resident
    work = math.ceil(tiles / slots) * slots * block_m * block_n
    return problem.M * problem.N / work * _TILE_RATE.get((block_m, block_n), 0.5)


def side_share(ranks: int, config: TileConfig | None, target: Target) -> float:
    """What x·a costs beside x·w in one loop, as a share of x·w: by matrix time, or by reading x from shared memory again."""
    block_n = config.block_n if config else 128
    if target.name in ("sm_90", "sm_100"):
        # A 64xNx16 wgmma takes N/2 clocks and reads its operands from shared memory in 16 + N/4.
        return max(ranks / 2, 16 + ranks / 4) / (block_n / 2)
    return 1.3 * ranks / block_n
