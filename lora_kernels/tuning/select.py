"""Which algorithm and tiles a problem gets on a GPU: the device's tuned table, else the cost model, else a safe default.

Nothing here looks at a device or measures: the same problem gets the same answer, within a CUDA graph too. M counts only by
its bucket, a power of two, so that a new sequence length compiles nothing new.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from lora_kernels.problem import Problem
from lora_kernels.tuning.config import (
    CUDA_DECODE_ROWS,
    DECODE_ROWS,
    FUSED_RANK,
    KERNELS,
    NARROW_KERNELS,
    TileConfig,
    fits,
    rank_block,
)
from lora_kernels.tuning.cost import predict_us
from lora_kernels.tuning.targets import TARGETS, Target

_HALF = ("float16", "bfloat16")
_KERNEL = {"two_kernel": "expand", "one_pass": "one_pass", "decode": "decode"}
TRITON = tuple(_KERNEL)  # the algorithms of the Triton backend
# Of M; larger problems are like the largest.
_BUCKETS = (16, 32, 64, 256, 512, 1024, 2048, 4096, 8192)
# N, K that get every kernel somewhere with and somewhere without a split
_SHIPPED_SHAPES = ((512, 4096), (4096, 4096), (4096, 512), (32768, 128))

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
_MATMUL_FLOAT32 = [(64, 64, 32, 4, 3)]
_ONE_PASS_HALF = {
    "sm_80": [(64, 128, 32, 4, 3)],
    "sm_90": [(128, 128, 64, 8, 3)],
    "sm_100": [(128, 128, 64, 8, 3)],
}
_ONE_PASS_OTHER = [(64, 64, 32, 4, 2)]
_ONE_PASS_FLOAT32 = [(32, 32, 32, 4, 2)]


@dataclass(frozen=True)
class Choice:
    """`algorithm` computes y; `source` says what decided; `configs` has a tile for every kernel the problem may need.

    `times`: microseconds of what was compared, measured if `measured` has them all, else predicted; `measured`: all that
    `tune` measured, of algorithms or of narrow kernels; `asked`: for what, in words.
    """

    algorithm: str
    source: str
    configs: tuple[TileConfig, ...]
    times: Mapping[str, float] = field(default_factory=dict, compare=False)
    measured: Mapping[str, float] = field(default_factory=dict, compare=False)
    asked: str = field(default="", compare=False)

    def has(self, kernel: str) -> bool:
        """Whether `kernel` can compute the problem at all."""
        return any(c.kernel == kernel for c in self.configs)

    def config(self, kernel: str) -> TileConfig:
        """The tile of `kernel`; ValueError where it cannot compute the problem."""
        for config in self.configs:
            if config.kernel == kernel:
                return config
        able = tuple(config.kernel for config in self.configs)
        raise ValueError(f"kernel must be one of {able} for {self.asked}, got {kernel!r}")

    def over(self, *others: str) -> str:
        """Why not the best of `others`, in words."""
        name = "ATen" if self.algorithm == "aten" else self.algorithm
        told = f"{name} is {self._how} faster: {self.times[self.algorithm]:.1f} us"
        rivals = [self.times[other] for other in others if other in self.times]
        if not rivals:
            return f"{told}; there is no {self._how} time of {', '.join(others)}"
        return f"{told}, not {min(rivals):.1f} us"

    def told(self) -> str:
        """What was compared, in words."""
        times = sorted(self.times.items(), key=lambda each: each[1])
        return f"{self._how}: " + ", ".join(f"{name} {us:.1f} us" for name, us in times)

    @property
    def _how(self) -> str:
        return "measured" if self.times.keys() <= self.measured.keys() else "predicted"


def bucket(M: int) -> int:
    """The smallest bucket that holds M, or the largest bucket."""
    return next((b for b in _BUCKETS if b >= M), _BUCKETS[-1])


def narrow(problem: Problem) -> Problem:
    """The problem of the kernels that read the problem's x and no weight, which `tune` times without dropout."""
    return replace(problem, N=0, bias=False, dropout=False, w_k_major=True, backward=False)


def select(
    problem: Problem,
    target: Target,
    algorithm: str | None = None,
    among: tuple[str, ...] = (*TRITON, "aten"),
) -> Choice:
    """The fastest for `problem` on `target` among the algorithms that the caller can run, "aten" one of them.

    Fastest as measured by `tune`, which leaves out what it found wrong, else as predicted. `algorithm` forces one of
    two_kernel, one_pass and decode; ValueError when that one cannot compute the problem.
    """
    return _select(replace(problem, M=bucket(problem.M), bias=False), target, algorithm, among)


def everyone(problem: Problem, target: Target) -> tuple[str, ...]:
    """The algorithms for `problem` of a machine where every GPU backend is usable."""
    few = problem.M <= CUDA_DECODE_ROWS and not problem.dropout
    cuda = few and target.name.startswith("sm_")
    return (*TRITON, "cuda_decode", "aten") if cuda else (*TRITON, "aten")


@functools.lru_cache(maxsize=4096)
def _select(
    problem: Problem, target: Target, algorithm: str | None, among: tuple[str, ...]
) -> Choice:
    from lora_kernels.tuning import tables

    configs = _configs(problem, target)
    possible = {
        name: config for name, config in configs.items() if fits(config, problem, target) is None
    }
    tuned = tables.lookup(problem, target)
    measured: Mapping[str, float] = {}
    if tuned is not None:
        possible |= {config.kernel: config for config in tuned.configs}
        measured = tuned.times
    if algorithm is not None:
        if algorithm not in TRITON:
            raise ValueError(f"algorithm must be one of {TRITON}, got {algorithm!r}")
        kernel = _KERNEL[algorithm]
        if kernel not in possible:
            raise ValueError(
                f"{algorithm} cannot compute {problem}: {fits(configs[kernel], problem, target)}"
            )
        among = (algorithm,)
    elif problem.backward:
        # q comes with dB from one reading of dy, so nothing computes it beside the product.
        among = tuple(name for name in among if name not in ("one_pass", "decode"))
    able = [name for name in among if name not in _KERNEL or _KERNEL[name] in possible]
    compared = {name: measured[name] for name in able if name in measured}
    source = "forced" if algorithm else "tuned" if compared else "cost model"
    times = compared or {
        name: predict_us(name, problem, target, possible.get(_KERNEL.get(name, "")))
        for name in able
    }
    return Choice(
        min(times, key=times.__getitem__),
        source,
        tuple(possible.values()),
        times,
        measured,
        asked=f"{problem} on {target.name}",
    )


def candidates(kernel: str, problem: Problem, target: Target) -> list[TileConfig]:
    """The tiles of `kernel` that this package ships for `target` and that fit `problem`: what `tune` times."""
    made = _candidates(kernel, problem, target)
    return [config for config in made if fits(config, problem, target) is None]


def shipped(target: Target) -> list[tuple[Problem, TileConfig]]:
    """Every configuration that `select` and `tune`'s tiles can return for `target`, with a problem that may get it.

    Configurations that compile to the same code count once: the split is a run-time number but for being 1, and float16
    takes bfloat16's code with another instruction. Ranks take the code of their block, of which each configuration has its
    narrowest and its widest here.
    """
    found: dict[tuple[TileConfig, str, str], dict[int, tuple[Problem, TileConfig]]] = {}
    for dtype, adapter_dtype in (
        ("bfloat16", "bfloat16"),
        ("bfloat16", "float32"),
        ("float32", "float32"),
    ):
        sizes = itertools.product((16, 32, 64), _BUCKETS, _SHIPPED_SHAPES)
        for dropout, (R, M, (N, K)) in itertools.product((False, True), sizes):
            problem = Problem(M, N, K, R, dtype, adapter_dtype, device="cuda", dropout=dropout)
            tiles = (candidates(kernel, problem, target) for kernel in KERNELS)
            for config in itertools.chain(*tiles):
                code = replace(config, split=min(config.split, 2)), dtype, adapter_dtype
                ranks = rank_block(R, config.rank_chunk)
                if not dropout or ranks not in found.get(code, {}):
                    found.setdefault(code, {})[ranks] = (problem, config)
    ends = ({min(ranks), max(ranks)} for ranks in found.values())
    return [
        ranks[end] for ranks, both in zip(found.values(), ends, strict=True) for end in sorted(both)
    ]


def _configs(problem: Problem, target: Target) -> dict[str, TileConfig]:
    """The best shipped tile of each kernel by the cost model, whether or not it fits."""

    algorithms = {kernel: algorithm for algorithm, kernel in _KERNEL.items()}

    def best(kernel: str) -> TileConfig:
        made = _candidates(kernel, problem, target)
        fitting = [c for c in made if fits(c, problem, target) is None] or made
        if kernel in NARROW_KERNELS:
            return fitting[0]
        return min(
            fitting, key=lambda config: predict_us(algorithms[kernel], problem, target, config)
        )

    return {kernel: best(kernel) for kernel in KERNELS}


def _candidates(kernel: str, problem: Problem, target: Target) -> list[TileConfig]:
    half = problem.dtype in _HALF
    # The tail's operands are float32: where they pass through registers, 64 columns of them do not fit.
    chunk = 64 if half and target.tma else 16 if target.name == "gfx1100" else 32
    if kernel == "expand":
        tiles = _MATMUL_HALF[target.name] if half else _MATMUL_FLOAT32
        return [
            TileConfig(kernel, *tile, tma=target.tma and half, rank_chunk=chunk) for tile in tiles
        ]
    if kernel == "one_pass":
        tiles = _ONE_PASS_HALF.get(target.name, _ONE_PASS_OTHER) if half else _ONE_PASS_FLOAT32
        return [TileConfig(kernel, *tile, rank_chunk=32 if target.tma else 16) for tile in tiles]
    return {
        "decode": _decode,
        "shrink": _shrink,
        "wgrad": _wgrad,
        "shrink_wgrad": _shrink_wgrad,
    }[kernel](problem, target)


def _shrink(problem: Problem, target: Target) -> list[TileConfig]:
    block_m, block_k = (64, 64) if _all_half(problem) else (32, 32)
    if target.name == "sm_120" and (problem.R > 16 or not _all_half(problem)):
        block_m //= 2  # its compiler keeps to 96 registers
    if problem.dropout and problem.R > 32:  # the mask takes registers of its own
        block_m //= 1 if _all_half(problem) else 2
        block_k //= 2 if _all_half(problem) and target.name in ("sm_100", "gfx1100") else 1
    programs = max(1, problem.M // block_m)
    split = _split(target.multiprocessors // programs, problem.K // (4 * block_k))
    return [TileConfig("shrink", block_m, 1, block_k, 4, 3, split=split)]


def _decode(problem: Problem, target: Target) -> list[TileConfig]:
    block_n, block_k = (64, 64) if _all_half(problem) else (32, 32)
    programs = max(1, problem.N // block_n)
    split = _split(2 * target.multiprocessors // programs, problem.K // (4 * block_k))
    block_m = 16 if problem.M <= 16 else DECODE_ROWS
    return [TileConfig("decode", block_m, block_n, block_k, 4, 3, split=split)]


def _wgrad(problem: Problem, target: Target) -> list[TileConfig]:
    tiles = [(32, 64, 4, 2)]
    # The larger one has no registers for a float32 result, and on gfx1100 for none.
    if _all_half(problem) and target.name != "gfx1100":
        tiles.append((64, 128, 8, 3))
    return [
        TileConfig(
            "wgrad",
            block_m,
            block_n,
            16,
            warps,
            stages,
            split=_row_split(problem, target, block_n),
        )
        for block_m, block_n, warps, stages in tiles
    ]


def _shrink_wgrad(problem: Problem, target: Target) -> list[TileConfig]:
    # Both accumulators stay in registers; the wider the block, the fewer partial results of q.
    if problem.R <= 32:
        tiles = [(32, 256, 8)] if _all_half(problem) else [(32, 64, 4)]
    else:
        tiles = [(32, 32, 4)] if _all_half(problem) else [(16, 32, 4)]
    if problem.R <= 16 and _all_half(problem):
        tiles.append((64, 256, 8))
    return [
        TileConfig(
            "shrink_wgrad",
            block_m,
            block_n,
            16,
            warps,
            2,
            split=_row_split(problem, target, block_n),
            rank_chunk=FUSED_RANK,
        )
        for block_m, block_n, warps in tiles
    ]


def _row_split(problem: Problem, target: Target, block_n: int) -> int:
    """Parts of M, for about two blocks of x's columns and rows on each multiprocessor."""
    return _split(2 * target.multiprocessors // max(1, problem.K // block_n), problem.M // 128)


def _all_half(problem: Problem) -> bool:
    return problem.dtype in _HALF and problem.adapter_dtype in _HALF


def _split(wanted: int, most: int) -> int:
    """The largest power of two that is at most `wanted`, `most` and 16; at least 1. Sizes alone decide it."""
    limit = max(1, min(wanted, most, 16))
    return 1 << (limit.bit_length() - 1)


__all__ = ["TARGETS", "Choice", "bucket", "candidates", "everyone", "narrow", "select", "shipped"]
