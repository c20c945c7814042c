"""The tiles of every Triton kernel for a problem: of the device's tuned table, else by the cost model.

Nothing here reads a device or measures: the same problem gets the same answer, within a CUDA graph too. M counts only by
its bucket, a power of two, so that a new sequence length compiles nothing new.
"""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from lora_kernels.problem import DENSE, PACKED_BYTES, Problem
from lora_kernels.tuning import cost, lowrank, tables
from lora_kernels.tuning.config import (
    DECODE_ROWS,
    FUSED_RANK,
    KERNELS,
    LOWRANK_KERNELS,
    PERSISTENT,
    TileConfig,
    Tiles,
    fits,
    masks_no_tail,
    rank_block,
    tail_ranks,
    whole_rows,
)
from lora_kernels.tuning.cost import predict_us
from lora_kernels.tuning.lowrank import all_half, power_of_two, rows_block
from lora_kernels.tuning.targets import Target

# The kernel with the main loop of each algorithm.
MAIN_KERNEL = {
    "two_kernel": "expand",
    "one_launch": "one_launch",
    "one_pass": "one_pass",
    "decode": "decode",
    "tail_first": "expand",
    "persistent": "persistent",
    "persistent_one_launch": "persistent_one_launch",
}
ALGORITHMS = tuple(name for name in cost.ALGORITHMS if name in MAIN_KERNEL)
# The versions of Triton with which products in Gluon, which Triton calls experimental, were compiled and executed. Others
# have other names in it; 3.8 has no view of a block as a smaller one.
_NEWEST = ("3.9.",)
_GLUON_VERSIONS = {("persistent", "sm_90"): ("3.6.", "3.7.", "3.9.")}
_READS_PACKED = ("decode", "dequantise")  # the kernels that read a quantised weight
# N, K that get every kernel somewhere with and somewhere without a split, and rows that are no whole pieces
_SHIPPED_SHAPES = (
    (129, 32769),
    (32769, 129),
    (4105, 4105),
    (512, 4096),
    (4096, 4096),
    (4096, 512),
    (32768, 128),
)
_SHIPPED_RANKS = (8, 16, 24, 32, 40, 64, 128)

# (block_m, block_n, block_k, num_warps, num_stages) of the tiled product, large tiles first.
_MATMUL_HALF = {
    "sm_80": [(128, 128, 32, 4, 4), (64, 128, 64, 4, 3)],
    "sm_86": [(128, 128, 32, 4, 3), (64, 64, 64, 4, 3)],
    "sm_89": [(128, 128, 32, 4, 3), (64, 64, 64, 4, 3)],
    "sm_90": [(128, 256, 64, 8, 3), (128, 128, 64, 8, 3), (64, 128, 64, 4, 3)],
    "sm_100": [(128, 256, 64, 8, 3), (128, 128, 64, 4, 3)],
    "sm_120": [(128, 128, 32, 4, 3), (64, 64, 64, 4, 3)],
    "gfx942": [(128, 128, 32, 8, 2), (64, 64, 32, 4, 2)],
    "gfx1100": [(64, 64, 32, 4, 2)],
}
# The same and, where tensor memory holds the result, ctas: its warps are those that store, beside two others.
_PERSISTENT = {
    "sm_90": [((128, 256, 64, 8, 3), 0), ((128, 128, 64, 8, 4), 0)],
    "sm_100": [((256, 256, 64, 4, 5), 2), ((128, 256, 64, 4, 4), 1), ((128, 128, 64, 4, 6), 1)],
}
_MATMUL_FLOAT32 = [(64, 64, 32, 4, 3)]
# Over groups, which may have few rows each. Eight warps: at 128x128 four have no registers left for a group's addresses.
_GROUPED_HALF = {
    "sm": [(128, 128, 64, 8, 3), (64, 128, 64, 4, 3), (32, 128, 64, 4, 3), (16, 128, 64, 4, 3)],
    # What is missing here spills some bytes beside a mask.
    "sm_100": [(128, 128, 64, 8, 3), (32, 128, 64, 4, 3), (16, 128, 64, 4, 3)],
    "sm_120": [(128, 128, 64, 8, 2), (64, 64, 64, 4, 3), (16, 128, 64, 4, 3)],
    "gfx942": [(64, 64, 32, 4, 2), (16, 128, 64, 4, 2)],
    "gfx1100": [(64, 64, 32, 4, 2), (16, 64, 32, 4, 2)],
}
_GROUPED_FLOAT32 = [(64, 64, 32, 4, 3), (16, 64, 32, 4, 3)]
_ONE_PASS_HALF = {
    "sm_80": [(64, 128, 32, 4, 3)],
    "sm_90": [(128, 128, 64, 8, 3)],
    "sm_100": [(128, 128, 64, 8, 3)],
}
_ONE_PASS_OTHER = [(64, 64, 32, 4, 2)]
_ONE_PASS_FLOAT32 = [(32, 32, 32, 4, 2)]
# Of s·b + bias alone: it has no loop over K, and registers for a mask.
_TAIL = TileConfig("expand", 64, 64, 32, 4, 2, rank_chunk=16)
# Where rows are no whole pieces, see `whole_rows`: more warps hold more addresses.
_MATMUL_IN_ELEMENTS = {
    "sm": [(128, 128, 32, 8, 2), (64, 64, 32, 8, 2)],
    "gfx": [(64, 64, 32, 4, 2)],
}
_ONE_PASS_IN_ELEMENTS = [(64, 64, 32, 8, 2)]
_ONE_PASS_FLOAT32_IN_ELEMENTS = [(16, 32, 32, 4, 2)]


def tiles_for(problem: Problem, target: Target) -> Tiles:
    """A tile for each kernel that can compute `problem`: of the device's tuned table, else by the cost model."""
    return _tiles(tables.bucketed(problem), target, tables.lookup(problem, target))


def algorithms(problem: Problem) -> tuple[str, ...]:
    """The algorithms that there are for `problem`: one more with dropout, and over groups that share the weight."""
    if not problem.groups:
        return (*ALGORITHMS, cost.TAIL_FIRST) if problem.dropout else ALGORITHMS
    return ("two_kernel", cost.TAIL_FIRST) if problem.weights == 1 else ("two_kernel",)


def main_tile(algorithm: str, problem: Problem, tiles: Tiles) -> TileConfig:
    """The tile of an algorithm's main kernel."""
    if algorithm == cost.TAIL_FIRST and not problem.groups:
        return _TAIL
    return tiles.config(MAIN_KERNEL[algorithm])


def refusal(algorithm: str, problem: Problem, target: Target) -> str | None:
    """The rule that no tile of an algorithm's main kernel keeps for `problem`, or None where one keeps them all."""
    return fits(_best(MAIN_KERNEL[algorithm], problem, target), problem, target)


@functools.cache
def untried(kernel: str = "", target: str = "") -> str | None:
    """Why a kernel in Gluon is not imported here: None with a Triton that it was tried with, or with none at all.

    Without a name: whether any of them is not.
    """
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None
    versions = _GLUON_VERSIONS.get((kernel, target), _NEWEST)
    if version.startswith(versions):
        return None
    *others, last = (f"{each}x" for each in versions)
    tried = f"{', '.join(others)} and {last}" if others else last
    return f"it was tried with Triton {tried} only, got {version}"


def unmasked(config: TileConfig, problem: Problem) -> str | None:
    """Why the persistent product is not taken for a dx with a mask: its rule, or a Triton that spills 80 bytes there."""
    reason = masks_no_tail(config, tail_ranks(problem))
    if reason is None and untried() is not None:
        return f"a mask of dx spills registers before Triton {_NEWEST[0]}x"
    return reason


def lowrank_tiles(problem: Problem, target: Target) -> Tiles:
    """The tiles of the kernels that read the problem's x and no weight."""
    return tiles_for(tables.without_weight(problem), target)


@functools.lru_cache(maxsize=4096)
def _tiles(problem: Problem, target: Target, tuned: tables.Entry | None) -> Tiles:
    configs = (_best(kernel, problem, target) for kernel in KERNELS)
    possible = {c.kernel: c for c in configs if fits(c, problem, target) is None}
    if tuned is not None:
        possible |= {config.kernel: config for config in tuned.configs}
    return Tiles(tuple(possible.values()), {} if tuned is None else tuned.times)


def tiles_of(kernel: str, problem: Problem, target: Target) -> list[TileConfig]:
    """The tiles of `kernel` that this package ships for `target` and that fit `problem`: what `tune` times."""
    if kernel in PERSISTENT and untried(kernel, target.name) is not None:
        return []
    made = _shipped_tiles(kernel, problem, target)
    return [config for config in made if fits(config, problem, target) is None]


def shipped(target: Target, groups: int = 0) -> list[tuple[Problem, TileConfig]]:
    """Every tile that a plan and `tune` can take on `target`, with a problem of so many groups that may get it.

    But for `_TAIL`, which has no product; its code has tests of its own.

    Configurations that compile to the same code count once: the split is a run-time number but for being 1, and float16
    takes bfloat16's code with another instruction, but in kernels that multiply s or q, or float32 adapters, which they do
    in another form. Ranks take the code of their block, of which each configuration has its narrowest and its widest here,
    where it can a multiple of 16 and without dropout.
    """
    found: dict[tuple[TileConfig, str, str, str], dict[int, tuple[Problem, TileConfig]]] = {}
    for dtype, adapter_dtype in (
        ("bfloat16", "bfloat16"),
        ("bfloat16", "float32"),
        ("float32", "float32"),
        ("float16", "float16"),
        ("float16", "float32"),
    ):
        formats = (DENSE,) if groups or dtype == "float16" else (DENSE, *PACKED_BYTES)
        stacks = sorted({groups or 1, 1}, reverse=True)
        for dropout, weight_format, weights, R, M, (N, K) in itertools.product(
            (False, True), formats, stacks, _SHIPPED_RANKS, tables.BUCKETS, _SHIPPED_SHAPES
        ):
            own: dict[str, Any] = {"dropout": dropout, "weight_format": weight_format}
            own |= {"groups": groups, "weights": weights}
            problem = Problem(M, N, K, R, dtype, adapter_dtype, "cuda", **own)
            kernels: Iterable[str] = KERNELS if weight_format == DENSE else _READS_PACKED
            if dtype == "float16":  # whose shrink by an adapter of its type is bfloat16's
                kernels = [k for k in LOWRANK_KERNELS if (k, adapter_dtype) != ("shrink", dtype)]
            tiles = (tiles_of(kernel, problem, target) for kernel in kernels)
            for config in itertools.chain(*tiles):
                if R > FUSED_RANK >= config.rank_chunk:  # its code is that of rank 64
                    continue
                same = replace(config, split=min(config.split, 2))
                code = same, dtype, adapter_dtype, weight_format
                ranks = rank_block(R, config.rank_chunk)
                if config.kernel == "dequantise":  # it reads no adapter
                    code, ranks = (config, dtype, dtype, weight_format), 16
                known = found.setdefault(code, {}).get(ranks)
                if known is None or (dropout, -R) <= (known[0].dropout, -known[0].R):
                    found[code][ranks] = (problem, config)
    return [ranks[end] for ranks in found.values() for end in sorted({min(ranks), max(ranks)})]


def _best(kernel: str, problem: Problem, target: Target) -> TileConfig:
    """The best shipped tile of `kernel` by the cost model; where none fits, the first."""
    made = _shipped_tiles(kernel, problem, target)
    fitting = [c for c in made if fits(c, problem, target) is None] or made[:1]
    algorithm = next((name for name, main in MAIN_KERNEL.items() if main == kernel), None)
    if algorithm is None or len(fitting) == 1:
        return fitting[0]
    return min(fitting, key=lambda config: predict_us(algorithm, problem, target, config))


def _shipped_tiles(kernel: str, problem: Problem, target: Target) -> list[TileConfig]:
    half = problem.itemsize == 2
    # A rank tail of more columns, in float32, has no registers; in two parts, of more than 16, where it passes through them.
    split = half and problem.adapter_dtype == "float32" and (not target.tma or problem.groups > 0)
    whole = whole_rows(problem) and problem.N % 16 == 0
    chunk = 16 if target.name == "gfx1100" or split or not (half or whole_rows(problem)) else 32
    if kernel in ("expand", "one_launch"):
        tiles = _MATMUL_HALF[target.name] if half else _MATMUL_FLOAT32
        if problem.groups:
            tiles = _grouped_tiles(problem, target)
        elif half and not whole and (kernel == "one_launch" or not _stores_elements(problem)):
            tiles = _MATMUL_IN_ELEMENTS[target.name.rstrip("_0123456789")]
        elif half and _odd_ranks_spill(problem, target):
            tiles = [(m, n, k, 8 if n == m == 128 else warps, s) for m, n, k, warps, s in tiles]
        tma = target.tma and half and problem.weights == 1
        return [TileConfig(kernel, *tile, tma=tma, rank_chunk=chunk) for tile in tiles]
    if kernel in PERSISTENT:
        own_tiles = _PERSISTENT.get(target.name, _PERSISTENT["sm_90"])
        return [TileConfig(kernel, *tile, tma=True, ctas=ctas) for tile, ctas in own_tiles]
    if kernel == "one_pass":
        tiles = _ONE_PASS_HALF.get(target.name, _ONE_PASS_OTHER) if half else _ONE_PASS_FLOAT32
        if not whole:
            tiles = _ONE_PASS_IN_ELEMENTS if half else _ONE_PASS_FLOAT32_IN_ELEMENTS
        chunk = 32 if target.tma and (half or whole) else 16
        return [TileConfig(kernel, *tile, rank_chunk=chunk) for tile in tiles]
    if kernel == "dequantise":
        return [TileConfig(kernel, 1, 64, 64, 4, 1)]
    if kernel == "decode":
        return _decode(problem, target)
    return lowrank.shipped(kernel, problem, target)


def _odd_ranks_spill(problem: Problem, target: Target) -> bool:
    """Whether four warps have no registers for 128x128 where rows of s or b are no whole pieces: up to 320 bytes spill."""
    odd = problem.R % 16 > 0 and target.name.startswith("sm") and not target.tma
    masked = problem.dtype == "float16" and problem.dropout
    return odd and (problem.R > 16 or masked or not all_half(problem))


def _stores_elements(problem: Problem) -> bool:
    """Whether only y has rows that are no whole pieces, for which the usual tiles of `expand` have registers.

    Not beside a mask, nor where b is float32.
    """
    return whole_rows(problem) and all_half(problem) and not problem.dropout


def _grouped_tiles(problem: Problem, target: Target) -> list[tuple[int, int, int, int, int]]:
    """Those that are no lower than a group's rows: each block of rows reads the group's weight once."""
    own = _GROUPED_HALF.get(target.name, _GROUPED_HALF["sm"])
    tiles = own if problem.itemsize == 2 else _GROUPED_FLOAT32
    lowest = min(rows_block(problem), tiles[1][0])
    return [tile for tile in tiles if tile[0] >= lowest]


def _decode(problem: Problem, target: Target) -> list[TileConfig]:
    block_n, block_k = (64, 64) if all_half(problem) else (32, 32)
    block_m = 16 if problem.M <= 16 else DECODE_ROWS
    warps, stages = 4, 3
    if not whole_rows(problem) or (problem.N % 16 and block_m > 16):
        block_n, block_k, warps, stages = 32, 32, 4 if block_m == 16 else 8, 2
    elif problem.weight_format == DENSE:
        stages = lowrank.stages_of(problem, target, block_n * block_k, stages)
        stages = min(stages, 4 if block_m > 16 else 6)  # two blocks fit on a multiprocessor
        if target.name == "sm_90" and all_half(problem) and problem.R <= 32:
            # mma.sync in place of a warp group's instructions, which race; for 64 rows two warps have no registers.
            block_n, warps = (64, 2) if block_m == 16 else (32, 4)
        elif target.name == "sm_120" and block_m > 16 and problem.R % 16:
            warps = 8  # four spill 16 bytes
    elif target.name in ("sm_90", "sm_100") and all_half(problem):
        # The same. On sm_100 the loop of a tile of 64 columns has 903 instructions.
        block_n, warps = 32, 2
        # Both spill 8 to 16 bytes otherwise.
        if problem.weight_format == "int8" and target.name == "sm_100":
            warps = 4
        elif block_m == 16 and problem.R > 32:
            stages = 2
    programs = max(1, problem.N // block_n)
    split = power_of_two(2 * target.multiprocessors // programs, problem.K // (4 * block_k))
    return [TileConfig("decode", block_m, block_n, block_k, warps, stages, split=split)]
