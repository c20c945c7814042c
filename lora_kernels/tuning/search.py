"""The search behind `tune`: which algorithm, tile and split are fastest for a problem, by a function that measures.

No call runs it. The search goes one coordinate at a time: the product's tile, then the split of the
low-rank kernel before it; beside them the one-launch kernels, and those without a tile. The low-rank kernels of the backward
are timed alone: the tile, then its split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import cast

from lora_kernels.problem import Problem
from lora_kernels.tuning.config import KERNELS, LOWRANK_KERNELS, TileConfig, Tiles, fits
from lora_kernels.tuning.tables import Entry, bucketed, lowrank
from lora_kernels.tuning.targets import Target

SPLITS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Choice:
    """An algorithm, or a low-rank kernel, with its tiles."""

    algorithm: str
    tiles: Tiles = field(default_factory=lambda: Tiles(()))

    @classmethod
    def of(cls, algorithm: str, *configs: TileConfig) -> Choice:
        return cls(algorithm, Tiles(configs))


@dataclass(frozen=True)
class Timed:
    """The result of a choice: microseconds, or why it does not count (it failed, or its result was wrong)."""

    choice: Choice
    us: float | None
    failure: str = ""

    def __str__(self) -> str:
        tiles = ", ".join(map(str, self.choice.tiles.configs)) or "no tile"
        found = f"{self.us:.1f} us" if self.us is not None else f"not counted: {self.failure}"
        return f"{self.choice.algorithm}: {found} ({tiles})"


# Measures choices in turns; for each the microseconds, or the reason why it does not count.
Measure = Callable[[list[Choice]], list["float | str"]]
# The tiles of a kernel that are worth timing for a problem on a target.
TilesOf = Callable[[str, Problem, Target], list[TileConfig]]


def search(
    problem: Problem,
    target: Target,
    measure: Measure,
    tiles_of: TilesOf,
    untiled: tuple[str, ...] = ("cuda_decode", "eager"),
) -> tuple[Entry | None, list[Timed]]:
    """The table's entry for `problem`, and everything that was measured; None where nothing worked.

    `untiled`: the algorithms beside Triton's that can compute it. M is taken to its bucket.
    """
    problem = bucketed(problem)
    kept = {kernel: tiles_of(kernel, problem, target) for kernel in KERNELS}
    before = kept["dequantise"]  # none for a dense weight, else the only one
    done: list[Timed] = []
    if kept["expand"] and kept["shrink"]:
        shrink = kept["shrink"][0]
        pairs = [Choice.of("two_kernel", *before, shrink, c) for c in kept["expand"]]
        best = _fastest(_timed(pairs, measure, done))
        if best is not None:
            matmul = best.choice.tiles.config("expand")
            others = [c for c in _splits([shrink], problem, target) if c != shrink]
            _timed([Choice.of("two_kernel", *before, c, matmul) for c in others], measure, done)
            shrink = cast(Timed, _fastest(done)).choice.tiles.config("shrink")
        tiles = kept["persistent"]
        _timed([Choice.of("persistent", *before, shrink, c) for c in tiles], measure, done)
    single = [
        Choice.of(kernel, *before, c)
        for kernel in ("one_launch", "persistent_one_launch", "one_pass")
        for c in kept[kernel]
    ]
    single += [Choice.of("decode", c) for c in _splits(kept["decode"], problem, target)]
    _timed([*single, *(Choice(name) for name in untiled)], measure, done)
    return _entry(problem, done), done


def search_lowrank(
    problem: Problem, target: Target, measure: Measure, tiles_of: TilesOf
) -> tuple[Entry | None, list[Timed]]:
    """As `search`, for each kernel that reads x and no weight; `algorithm` of its choices is the kernel's name."""
    problem = lowrank(bucketed(problem))
    done: list[Timed] = []
    for kernel in LOWRANK_KERNELS:
        tiles = tiles_of(kernel, problem, target)
        best = _fastest(_timed([Choice.of(kernel, c) for c in tiles], measure, done))
        if best is not None:
            others = [
                c for c in _splits(best.choice.tiles.configs, problem, target) if c not in tiles
            ]
            _timed([Choice.of(kernel, c) for c in others], measure, done)
    return _entry(problem, done), done


def _entry(problem: Problem, done: list[Timed]) -> Entry | None:
    """The least time and the tiles of every algorithm that works: a caller may be unable to run the fastest."""
    times: dict[str, float] = {}
    configs: dict[str, TileConfig] = {}
    for timed in sorted(done, key=lambda timed: timed.us or 0.0):
        if timed.us is not None:
            times.setdefault(timed.choice.algorithm, timed.us)
            for config in timed.choice.tiles.configs:
                configs.setdefault(config.kernel, config)
    return Entry(problem, times, tuple(configs.values())) if times else None


def _timed(choices: list[Choice], measure: Measure, done: list[Timed]) -> list[Timed]:
    if not choices:
        return []
    found = [
        Timed(choice, None, result) if isinstance(result, str) else Timed(choice, result)
        for choice, result in zip(choices, measure(choices), strict=True)
    ]
    done += found
    return found


def _fastest(found: list[Timed]) -> Timed | None:
    right = [timed for timed in found if timed.us is not None]
    return min(right, key=lambda timed: timed.us or 0.0, default=None)


def _splits(
    configs: Iterable[TileConfig], problem: Problem, target: Target
) -> Iterator[TileConfig]:
    """Every split of the kernel's sum, over K or over M. It is a run-time number: other splits are the same code."""
    for config in configs:
        over_rows = config.kernel in ("wgrad", "shrink_wgrad")
        step, size = (config.block_m, problem.M) if over_rows else (config.block_k, problem.K)
        for split in SPLITS:
            other = replace(config, split=split)
            if split * step <= size and fits(other, problem, target) is None:
                yield other
