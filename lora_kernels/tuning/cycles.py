"""Cycles for which one block of each shipped tile occupies the pipes of a multiprocessor, counted from its compiled code.

A block of two CTAs occupies two multiprocessors, each for half of what is counted.

The emulator of tests/ptx executes a block at two depths. Their difference is what a step of block_k terms takes; what is
left is taken once: the start, the rank tail, the stores. Counts become cycles by the rates of one multiprocessor and clock:

matrix   FLOPs by the data sheets, accumulated in float32; tf32 at half the rate. float32 is counted as it is without
         leave to round to tf32: exact, in the fma pipe
shared   128 bytes: wavefronts of threads' accesses, and what copies write and matrix instructions read by themselves
issue    4 instructions of a warp, as PTX has them
l2       64 bytes, the port of a multiprocessor. The slices together deliver less (5.5 TB/s on an H100: 24 bytes), but the
         blocks that run at one time ask for the same tiles, whose requests are merged on the way: at 24 bytes no product
         with tiles of 128x256 could pass half of the peak, and published ones reach nine tenths

`python benchmarks/predicted.py --count` writes cycles.json anew; tests/executed/test_cycles.py compares it with the code.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lora_kernels.problem import Problem
from lora_kernels.tuning.config import TileConfig, tail_in_parts

PIPES = ("matrix", "shared", "issue", "l2")
COUNTED = ("sm_80", "sm_90", "sm_100", "sm_120")
SHARED_BYTES, INSTRUCTIONS, L2_BYTES = 128, 4, 64
# bfloat16 and float16 FLOPs of the matrix unit, and float32 FLOPs of the fma pipe, per multiprocessor and clock.
_MATRIX_FLOPS = {"sm_80": 2048, "sm_90": 4096, "sm_100": 8192, "sm_120": 512}
_FMA_FLOPS = {"sm_80": 128, "sm_90": 256, "sm_100": 256, "sm_120": 256}
# Targets whose code is not executed take the counts of one that has the same rates per multiprocessor and clock.
_LIKE = {"sm_86": "sm_120", "sm_89": "sm_120", "gfx942": "sm_80", "gfx1100": "sm_120"}
RANKS = (16, 64)  # at which TABLE was counted; between and beyond, a line through both


FILE = Path(__file__).with_suffix(".json")


class Tile(NamedTuple):
    """Names a row of TABLE; `types` is x's dtype, and the adapter's where the kernel computes otherwise with a wider one.

    `forward`: w is stored [N, K], a [K, R] and b [R, N]; all the other way round for dx. `config` has no split, and groups
    and rank chunks by default.
    """

    target: str
    types: str
    forward: bool
    config: TileConfig

    @classmethod
    def of(cls, config: TileConfig, problem: Problem, target: str) -> Tile:
        sizes = config.block_m, config.block_n, config.block_k
        launch = config.num_warps, config.num_stages
        # The same products.
        same = {"one_launch": "expand", "persistent_one_launch": "persistent"}
        kernel = same.get(config.kernel, config.kernel)
        plain = TileConfig(kernel, *sizes, *launch, tma=config.tma, ctas=config.ctas)
        return cls(*_kind(kernel, problem, target), plain)


@dataclass(frozen=True)
class Cycles:
    """Cycles of one block, for each of PIPES: `step` for every block_k terms of the sum, `rest` once."""

    step: tuple[float, ...]
    rest: tuple[float, ...]

    def block(self, steps: int, overlapped: bool) -> float:
        """The busiest pipe's cycles; `overlapped`: another block's loop runs beside what this one does once."""
        if overlapped:
            return max(s * steps + r for s, r in zip(self.step, self.rest, strict=True))
        return max(self.step) * steps + max(self.rest)


def flops_per_clock(target: str, dtype: str) -> int:
    """FLOPs of one multiprocessor in a clock, for a product in `dtype`."""
    rates = _FMA_FLOPS if dtype in ("float32", "float64") else _MATRIX_FLOPS
    return rates[_LIKE.get(target, target)]


def tiles(kernel: str, problem: Problem, target: str) -> list[Tile]:
    """The counted tiles of `kernel` for `problem`'s types and layout."""
    kind = _kind(kernel, problem, target)
    return [tile for tile in TABLE if tile[:3] == kind and tile.config.kernel == kernel]


def cycles(tile: Tile, R: int) -> Cycles:
    """The cycles of `tile` at rank R. A tile that is not in TABLE takes the counts of the one nearest in area:

    shared memory and L2 scaled by block_m + block_n, the rest by block_m·block_n, a step also by block_k.
    """
    known = TABLE.get(tile)
    if known is None:
        return _scaled(tile, R)
    share = (max(R, RANKS[0]) - RANKS[0]) / (RANKS[1] - RANKS[0])
    (step, rest), (step_wide, rest_wide) = known
    return Cycles(_between(step, step_wide, share), _between(rest, rest_wide, share))


def _between(at: tuple[float, ...], beyond: tuple[float, ...], share: float) -> tuple[float, ...]:
    return tuple(a + share * (b - a) for a, b in zip(at, beyond, strict=True))


def _scaled(tile: Tile, R: int) -> Cycles:
    own = tile.config
    size = own.block_m * own.block_n
    same = [t for t in TABLE if t[:3] == tile[:3] and t.config.kernel == own.kernel]

    def distance(other: Tile) -> tuple[bool, float, bool]:
        ratio = other.config.block_m * other.config.block_n / size
        return other.config.ctas != own.ctas, abs(math.log(ratio)), other.config.tma != own.tma

    near = min(same, key=distance)
    known, counted = cycles(near, R), near.config
    depth = own.block_k / counted.block_k
    area = size / (counted.block_m * counted.block_n)
    edge = (own.block_m + own.block_n) / (counted.block_m + counted.block_n)
    step = zip(known.step, (area, edge, area, edge), strict=True)
    return Cycles(tuple(s * depth * by for s, by in step), tuple(r * area for r in known.rest))


def _kind(kernel: str, problem: Problem, target: str) -> tuple[str, str, bool]:
    """(target, types, forward): the first fields of a Tile."""
    half = problem.itemsize == 2  # both such types have the same counts
    wide_adapters = half and kernel == "one_pass" and problem.adapter_dtype == "float32"
    if kernel in ("expand", "persistent"):
        wide_adapters = tail_in_parts(problem)
    types = "bfloat16, float32" if wide_adapters else "bfloat16" if half else "float32"
    return _LIKE.get(target, target), types, problem.w_k_major


# At each of RANKS: cycles of PIPES for a step, and once.
Row = tuple[tuple[tuple[float, ...], tuple[float, ...]], ...]


def _read(file: Path) -> tuple[str, dict[Tile, Row]]:
    """(the Triton whose code was counted, its rows)."""
    found = json.loads(file.read_text(encoding="utf-8"))
    rows = {
        Tile(row["target"], row["types"], row["forward"], TileConfig(**row["tile"])): tuple(
            (tuple(step), tuple(rest)) for step, rest in row["cycles"]
        )
        for row in found["rows"]
    }
    return found["triton"], rows


def write(file: Path, triton: str, rows: dict[Tile, Row]) -> None:
    """Write rows as `TABLE` is read, one a line."""

    def number(value: float) -> float:
        return int(value) if value == int(value) else value

    def entry(tile: Tile, row: Row) -> dict[str, Any]:
        own = asdict(tile.config)
        fields = ("kernel", "block_m", "block_n", "block_k", "num_warps", "num_stages", "tma")
        cycles = [[list(map(number, each)) for each in pair] for pair in row]
        kept = {name: own[name] for name in fields}
        kept |= {"ctas": own["ctas"]} if own["ctas"] else {}
        kind = {"target": tile.target, "types": tile.types, "forward": tile.forward}
        return {**kind, "tile": kept, "cycles": cycles}

    text = ",\n".join(json.dumps(entry(*each)) for each in rows.items())
    file.write_text(f'{{\n"triton": "{triton}",\n"rows": [\n{text}\n]\n}}\n', encoding="utf-8")


# In half types Triton 3.6's code has a few other instructions, in pipes that do not decide a step's time.
TRITON, TABLE = _read(FILE)
