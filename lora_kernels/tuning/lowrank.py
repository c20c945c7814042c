"""The tiles of the kernels that read x (or dy) and no weight, and how long each waits for what it reads.

By Little's law the bandwidth is what is on its way over the latency. A program has num_stages - 1 blocks of x on their way:
4.3 TB/s (H200, measured) need 33 KB a multiprocessor, 7 TB/s (sm_100) 47 KB, 1.55 TB/s (sm_80) 14 KB. With 16 KB `shrink`
took 97 us for an x of 235 MB on an H200, and with 20 KB `wgrad` 83 us, where a copy's rate is 55 us.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from lora_kernels.problem import ITEMSIZE, Problem
from lora_kernels.tuning.config import (
    FUSED_RANK,
    WGRAD_BESIDE,
    TileConfig,
    fits,
    lowrank_in_parts,
    one_reading_columns,
    one_reading_moves_less,
    rank_block,
    row_blocks,
    shrink_beside,
    smem_bytes,
    waits_us,
)
from lora_kernels.tuning.targets import KIB, Target

# Bytes of a half x that a multiprocessor is to have on their way, if one program runs there.
_ON_THEIR_WAY = {"sm_80": 28 * KIB, "sm_90": 40 * KIB, "sm_100": 48 * KIB}
_MOST_STAGES = 7  # with eight a kernel in parts spills on sm_100
# Ranks beyond `FUSED_RANK`, by blocks of so many: x is read, and masked, once for each. A block of 128 rows reads as many
# bytes of a as of x, for twice the products of 64 ranks and 64 rows.
_MANY_RANKS = 128
# Where 64 rows are multiplied as parts on sm_100: two warps take mma.sync. By four, which take tcgen05, Triton 3.9 stores a
# step's parts over those that the step before still multiplies: the emulator finds the race.
_SYNCHRONOUS_WARPS = 2


def shipped(kernel: str, problem: Problem, target: Target) -> list[TileConfig]:
    """The tiles of `kernel` that this package ships for `target`, the best by the law first; some may not fit."""
    return _MADE[kernel](problem, target)


def lowrank_us(kernel: str, problem: Problem, target: Target) -> float:
    """The least time in which the programs of `kernel`, by its first tile, get all of the problem's x.

    bytes · latency / bytes on their way: as many programs run at a time as shared memory has room for. Each block of ranks
    has programs of its own.
    """
    made = shipped(kernel, problem, target)
    tile = next((c for c in made if fits(c, problem, target) is None), made[0])
    ranks = _rank_blocks(problem, tile.rank_chunk)
    if kernel == "shrink":
        programs, terms, step = row_blocks(problem, tile.block_m), problem.K, tile.block_k
    else:
        sums = max(1, problem.with_rows) if problem.groups else 1
        programs = sums * math.ceil(problem.K / tile.block_n)
        terms, step = math.ceil(problem.M / sums), tile.block_m
    places = target.multiprocessors * max(1, target.smem_bytes // smem_bytes(tile, problem, target))
    turns = max(1.0, ranks * programs * tile.split / places)
    return turns * waits_us(tile, math.ceil(terms / step / tile.split))


def _shrink(problem: Problem, target: Target) -> list[TileConfig]:
    block_m, block_k, warps, stages = (64, 64, 4, 3) if all_half(problem) else (32, 32, 4, 3)
    plain = all_half(problem) and not (problem.dropout or problem.groups)
    if plain and target.name == "sm_90":
        block_k = 128  # half as many steps: each has its barriers, and 8 KB take 0.25 us
    elif target.name == "sm_90" and problem.dtype == "float16" and problem.R <= 16:
        block_k = 64  # at a higher rank 8 bytes spill
    elif plain and target.tmem_columns:
        # Four warps would take tensor memory, of which a persistent product beside leaves none. Blocks of 64x64
        # spill 8 bytes at rank 16 where K is split, and at rank 64.
        block_m, block_k = (64, 128 if problem.R <= 16 else 64) if problem.R <= 32 else (32, 128)
        warps = _SYNCHRONOUS_WARPS
        if problem.R < 16:
            block_m, block_k = 32, 64  # for other rows of a, 72 bytes spill
    if target.name == "sm_120" and (problem.R > 16 or not all_half(problem)):
        block_m //= 2  # its compiler keeps to 96 registers
        block_m //= 2 if all_half(problem) and problem.R > 32 else 1
        stages = 2 if all_half(problem) and problem.R <= 32 else stages  # a third spills 8 bytes
    if problem.dropout and problem.R > 32:  # the mask takes registers of its own
        block_m //= 1 if all_half(problem) else 2
        block_k //= 2 if all_half(problem) and target.name in ("sm_100", "gfx1100") else 1
    if lowrank_in_parts(problem) and target.name != "gfx1100":
        block_m, warps = _parts_rows(problem, target)
        if (target.name, block_m) in (("sm_90", 64), ("sm_100", 32)):
            block_k = 64
    elif target.name == "gfx1100" and problem.R > 32 and not all_half(problem):
        block_m = 16
    if problem.groups:
        if problem.dtype == "float32" and problem.R > 32:  # a group's addresses take registers
            block_m = 16
        elif target.name == "sm_100" and problem.R > 32:
            block_m = 32
        block_m = min(block_m, rows_block(problem))
    warps = min(warps, 8 if block_m > 64 else 4)
    stages = stages_of(problem, target, block_m * block_k, stages)
    if target.name == "sm_100" and block_m == 32 and not problem.groups:
        stages = min(stages, 5 if plain else 6)  # two blocks fit on a multiprocessor
    tiles = [(block_m, block_k, warps, stages)]
    if problem.K % 16:  # see `whole_rows`
        rows = min(block_m, 32 if all_half(problem) else 16)
        plain, tiles = False, [(rows, 32, 4 if all_half(problem) else 8, 2)]
    if plain and target.name == "sm_90" and problem.R > 32:
        tiles.append((128, 64, 4, stages))  # 64 rows read as many bytes of a, from L2, as of x
    if plain and (own := shrink_beside(problem.R, target)) is not None:
        tiles.append((own.block_m, own.block_k, own.num_warps, own.num_stages))
    chunk, blocks = FUSED_RANK, problem.M * problem.R / (128 * _MANY_RANKS)
    # Of fewer blocks K would be summed in more parts, which are more bytes than x.
    if _many_ranks(problem, target) and 8 * blocks >= target.multiprocessors:
        # Twice as much on its way: at rank 256 each block of rows is read twice.
        stages = stages_of(problem, target, 128 * 64 // 2, 3)
        chunk, tiles = _MANY_RANKS, [(128, 64, 8, stages)]
    made = []
    for block_m, block_k, warps, stages in tiles:
        programs = max(1, problem.M // block_m)
        if problem.groups:
            programs = max(1, row_blocks(problem, block_m))
        programs *= _rank_blocks(problem, chunk)
        split = power_of_two(target.multiprocessors // programs, problem.K // (4 * block_k))
        made.append(
            TileConfig("shrink", block_m, 1, block_k, warps, stages, split=split, rank_chunk=chunk)
        )
    return made


def _many_ranks(problem: Problem, target: Target) -> bool:
    """Whether a block of `_MANY_RANKS` has registers: in half types, by eight warps, also beside a mask."""
    plain = all_half(problem) and problem.K % 16 == problem.R % 16 == 0 and not problem.groups
    return plain and problem.R > FUSED_RANK and target.name.startswith("sm")


def _rank_blocks(problem: Problem, chunk: int) -> int:
    """How many blocks of at most `chunk` ranks there are, each of which reads x; one where there is no rank."""
    return max(1, math.ceil(problem.R / rank_block(problem.R, chunk)))


def stages_of(problem: Problem, target: Target, elements: int, otherwise: int) -> int:
    """The fewest that have `_ON_THEIR_WAY` bytes by blocks of so many elements; of other targets `otherwise`.

    At least three: with two a block is fetched only after the last one was multiplied.
    """
    wanted = _ON_THEIR_WAY.get(target.name)
    if wanted is None or problem.itemsize != 2:
        return otherwise
    stages = 1 + math.ceil(wanted / (elements * problem.itemsize))
    return max(3, min(stages, _MOST_STAGES))


def _parts_rows(problem: Problem, target: Target) -> tuple[int, int]:
    """(block_m, num_warps) where each block reads a and takes it apart: the more rows, the fewer times.

    The most cycles of issue or shared memory for 2048 elements of x at rank 64, which memory takes 283 (sm_90) and 315
    (sm_80) for: by 32 rows 544 and 544, with four times as much of a from L2, by 128 rows and eight warps 336 and 635. On
    sm_80 each warp takes all of a apart: four count 384, but have no registers left for a mask, a group or an edge of K.
    """
    if target.name == "sm_120":
        return (32 if problem.dropout and problem.R > 32 else 64), 4
    if target.name == "sm_100":
        return (64, _SYNCHRONOUS_WARPS) if problem.R <= 32 else (16 if problem.dropout else 32, 4)
    if problem.R <= 16:
        return 64, 4
    plain = not (problem.dropout or problem.groups or problem.K % 32)
    return 128, 4 if target.name == "sm_80" and plain else 8


def _wgrad(problem: Problem, target: Target) -> list[TileConfig]:
    low = problem.groups and problem.dtype == "float32" and problem.R > 32  # as in _shrink
    if target.name == "sm_100" and (problem.dtype, problem.adapter_dtype) == ("float16", "float32"):
        low = problem.R > 16  # 24 bytes spill otherwise
    tiles = [(16 if low else 32, 64, 4, 2)]
    if (target.tma and all_half(problem)) or (target.name == "sm_90" and lowrank_in_parts(problem)):
        tiles = [(64, 64, 4, 2)]
    if problem.dtype == "bfloat16" and problem.R > 32:
        # For 2048 elements of x shared memory takes 176 cycles in place of 384 on sm_90, and 256 of 480 on sm_80, beside
        # a float32 result 336 of 576 and 352 of 704, where three parts of more than 16 rows spill.
        tiles = [(32 if all_half(problem) else 16, 128, 4, 2)]
    in_parts = lowrank_in_parts(problem) and target.name == "sm_100"
    if in_parts:
        tiles = [(32 if problem.R <= 32 else 16, 64, _SYNCHRONOUS_WARPS, 2)]
    tiles = [(m, n, warps, stages_of(problem, target, m * n, s)) for m, n, warps, s in tiles]
    whole = problem.K % 16 == 0  # see `whole_rows`
    if not whole:
        tiles = [(16, 32, 4, 2) if problem.dtype == "float32" else (32, 64, 8, 2)]
        tiles = [(16, 32, _SYNCHRONOUS_WARPS, 2)] if in_parts else tiles
    # The larger one has no registers for a float32 result, on sm_120 and gfx942 for more than 32 ranks, on gfx1100 for none.
    wide = problem.R > 32 and target.name in ("sm_120", "gfx942")
    if all_half(problem) and whole and not wide and target.name != "gfx1100":
        tiles.append((64, 128, 8, 3))
    if all_half(problem) and whole and target.name in WGRAD_BESIDE:
        own = WGRAD_BESIDE[target.name]
        tiles.append((own.block_m, own.block_n, own.num_warps, own.num_stages))
    chunk = FUSED_RANK
    if _many_ranks(problem, target):
        rows = 64 if target.name in _ON_THEIR_WAY else 32  # a float16 mask takes 128 KB with 64
        stages = stages_of(problem, target, rows * 128, 3)
        chunk, tiles = _MANY_RANKS, [(rows, 128, 8, stages)]
    made = []
    for block_m, block_n, warps, stages in tiles:
        split = _row_split(problem, target, block_n, _rank_blocks(problem, chunk))
        made.append(
            TileConfig("wgrad", block_m, block_n, 16, warps, stages, split=split, rank_chunk=chunk)
        )
    return made


def _shrink_wgrad(problem: Problem, target: Target) -> list[TileConfig]:
    # Both accumulators stay in registers; the wider the block, the fewer partial results of q.
    halves, columns = all_half(problem), one_reading_columns(problem)
    rows, warps = (32, 8 if halves else 4) if problem.R <= 32 else (32 if halves else 16, 4)
    rows = 16 if problem.R > 32 and target.name == "gfx942" else rows  # 32 spill 16 bytes
    tiles = [(rows, warps)]
    # As many rows as there are warps for in q, which repeat each other's work otherwise.
    most = 16 if target.name == "sm_120" else 32  # ranks, beyond which it has no registers
    if halves and problem.dtype == "bfloat16" and most >= problem.R:
        tiles.insert(0, (64, 8))
    elif halves and problem.R <= 16 and target.name != "sm_100":  # 8 bytes spill there
        tiles.append((64, 8))
    elif lowrank_in_parts(problem) and problem.R <= 16:
        tiles = [(64, 4)]
    if lowrank_in_parts(problem) and target.name == "sm_100" and problem.R <= 32:
        tiles = [(32, _SYNCHRONOUS_WARPS)]
    elif problem.K % 16:  # see `whole_rows`
        tiles = [(16, 8)]
    split, stages = _row_split(problem, target, columns), [2] * len(tiles)
    if one_reading_moves_less(problem.itemsize, rank_block(problem.R, FUSED_RANK), columns):
        stages = [stages_of(problem, target, rows * columns, 2) for rows, _ in tiles]
    if columns == 256 and stages[0] > 2:
        # One block on a multiprocessor: shared memory has no room for two, which it has to wait for.
        split = max(
            1, min(target.multiprocessors // max(1, problem.K // columns), problem.M // 128, 16)
        )
    return [
        TileConfig("shrink_wgrad", rows, columns, 16, warps, s, split=split, rank_chunk=FUSED_RANK)
        for (rows, warps), s in zip(tiles, stages, strict=True)
    ]


def _row_split(problem: Problem, target: Target, block_n: int, ranks: int = 1) -> int:
    """Parts of M, or of each group's rows, for about two blocks of x's columns and rows on each multiprocessor."""
    sums = max(1, problem.groups)
    blocks = sums * max(1, problem.K // block_n) * ranks
    return power_of_two(2 * target.multiprocessors // blocks, problem.M // sums // 128)


def all_half(problem: Problem) -> bool:
    """Whether x and the adapter both have a half type."""
    return problem.itemsize == ITEMSIZE[problem.adapter_dtype] == 2


def power_of_two(wanted: int, most: int) -> int:
    """The largest power of two that is at most `wanted`, `most` and 16; at least 1: on one chip sizes alone decide it."""
    limit = max(1, min(wanted, most, 16))
    return 1 << (limit.bit_length() - 1)


def rows_block(problem: Problem) -> int:
    """The lowest block, of at least 16 rows, that holds a group's rows where these are spread evenly."""
    rows = math.ceil(problem.M / max(1, problem.with_rows))
    return max(16, 1 << (rows - 1).bit_length())


_MADE: dict[str, Callable[[Problem, Target], list[TileConfig]]] = {
    "shrink": _shrink,
    "wgrad": _wgrad,
    "shrink_wgrad": _shrink_wgrad,
}
