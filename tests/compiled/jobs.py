"""Which code is compiled and executed: a problem, a tile and stride forms for each tile that can be chosen."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from lora_kernels.backends.triton.configs import shipped, tiles_of, unmasked
from lora_kernels.problem import DENSE, PACKED_BYTES, Problem
from lora_kernels.tuning.config import (
    FUSED_RANK,
    KERNELS,
    LOWRANK_KERNELS,
    PERSISTENT,
    TileConfig,
    whole_rows,
)
from lora_kernels.tuning.targets import TARGETS

# A problem, a tile, and of `Shapes`: forward, peft_b.
Job = tuple[Problem, TileConfig, bool, bool]
# The same tiles, smaller than sm_80's, and but for the assembler the same code: each job is compiled for one of the two.
TWINS = ("sm_86", "sm_89")
# Of these one stride form is compiled, and masks of bfloat16: the instructions are sm_80's, or AMD's. The layers' tests
# execute the others on sm_120.
ONE_FORM = (*TWINS, "sm_120", "gfx942", "gfx1100")
TYPES = (("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "float32"))
USUAL = ("bfloat16", "bfloat16", DENSE)
MIXED = ("bfloat16", "float32", DENSE)
FLOAT32 = ("float32", "float32", DENSE)


@functools.cache
def by_tile(target: str, groups: int = 0) -> list[list[tuple[Problem, TileConfig]]]:
    """What each tile ships for, of each types: from the narrowest rank without a split to the widest with one."""
    tiles: dict[tuple, list[tuple[Problem, TileConfig]]] = {}
    for problem, config in shipped(TARGETS[target], groups):
        if not whole_rows(problem):  # see in_elements
            continue
        tiles.setdefault((replace(config, split=1), *_types(problem)), []).append((problem, config))
    return [sorted(pairs, key=lambda pair: (pair[0].R, pair[1].split)) for pairs in tiles.values()]


def jobs(target: str) -> Iterator[Job]:
    """Every tile at its widest rank, which takes the most registers, and with split sums; all stride forms, and dropout.

    Of a bfloat16 layer with a dense weight also at the narrowest rank and, where it has one, without a split, and at rank 8.
    Sums differ in how they end, so that one rank and one stride form show that.
    """
    once = target in ONE_FORM
    for pairs in by_tile(target):
        (least, narrow), (problem, config) = pairs[0], pairs[-1]
        types = _types(problem)
        usual, kernel = types == USUAL, config.kernel
        parts = types == MIXED and kernel in LOWRANK_KERNELS  # in tiles of their own
        if target in TWINS and (problem.R < FUSED_RANK or not (usual or parts)):
            continue
        yield problem, config, True, False
        if kernel != "shrink_wgrad" and problem.weight_format == DENSE and not once:
            yield problem, config, False, False
        if kernel in ("expand", "one_launch", *PERSISTENT) and config.tma:
            yield problem, config, True, True
        if usual and target not in TWINS and pairs[0] != pairs[-1]:
            yield least, narrow, True, False
    for types, kernels in ((USUAL, KERNELS), (MIXED, ("expand",))):
        eight = Problem(4096, 4096, 4096, 8, *types[:2], device="cuda")
        for M, kernel in product((16, 64, 4096), () if target in TWINS else kernels):
            if (kernel == "decode") == (M <= 64):
                for config in tiles_of(kernel, replace(eight, M=M), TARGETS[target]):
                    yield replace(eight, M=M), config, True, False
    for dtype, adapter_dtype in TYPES[: 1 if once else None]:
        masked = Problem(4096, 4096, 4096, 64, dtype, adapter_dtype, device="cuda", dropout=True)
        for kernel in ("shrink", "expand", "one_launch", "one_pass", "wgrad"):
            # The largest rank that it takes beside a mask.
            sizes = (replace(masked, R=R) for R in (64, 32, 16))
            own = next((p for p in sizes if tiles_of(kernel, p, TARGETS[target])), masked)
            for config in tiles_of(kernel, own, TARGETS[target]):
                yield own, config, kernel != "expand", False
        persistent = tiles_of("persistent", masked, TARGETS[target])
        for config, R, peft_b in product(persistent, (16, 64), (False, True)):
            own = replace(masked, R=R)
            if unmasked(config, own) is None:
                yield own, config, False, peft_b
    # Where a mask decides the tile: beside more ranks in a block, of either half type, and beside few in float16.
    for dtype, kernel, R in (
        *product(("bfloat16", "float16"), ("shrink", "wgrad"), (128,)),
        *((("float16", "expand", 8),) if not TARGETS[target].tma else ()),
    ):
        own = Problem(4096, 4096, 4096, R, dtype, dtype, device="cuda", dropout=True)
        for config in tiles_of(kernel, own, TARGETS[target]):
            if kernel == "expand" or config.rank_chunk > FUSED_RANK:
                yield own, config, kernel != "expand", False


def in_elements(target: str) -> Iterator[Job]:
    """Rows that are no whole pieces of 16 elements: loaded one by one or, where they have 16 bytes, by descriptors."""
    once = target in ONE_FORM
    for dtype, adapter_dtype in TYPES[: 1 if once else None]:
        odd = Problem(4096, 4105, 4105, 61, dtype, adapter_dtype, device="cuda")
        eighths = replace(odd, N=4104, K=4104)
        problems = [odd, replace(odd, K=4096), replace(odd, M=64), replace(odd, M=16), eighths]
        problems += [replace(p, dropout=True) for p in (odd, eighths)]
        problems += [replace(odd, R=13), replace(odd, R=13, M=64), replace(odd, K=4096, R=13, M=16)]
        if adapter_dtype == "bfloat16":
            problems += [replace(odd, K=4096, M=64, weight_format=name) for name in PACKED_BYTES]
        for problem, kernel, forward in product(problems, KERNELS, (True, False)):
            own = replace(problem, w_k_major=forward)
            dx = kernel in ("expand", "persistent")
            if (kernel == "decode") != (own.M <= 64) or (own.dropout and dx == forward):
                continue
            if kernel == "shrink_wgrad" and (own.dropout or not forward):
                continue
            if not forward and once and not own.dropout:
                continue
            if own.K % 16 == 0 and (kernel in (*LOWRANK_KERNELS, "dequantise") or not forward):
                continue
            for config in tiles_of(kernel, own, TARGETS[target]):
                if own.dropout and kernel == "persistent" and unmasked(config, own) is not None:
                    continue
                if config.tma or own.K != eighths.K:
                    yield own, config, forward, False


def _types(problem: Problem) -> tuple[str, str, str]:
    return problem.dtype, problem.adapter_dtype, problem.weight_format


def grouped_jobs(target: str) -> Iterator[Job]:
    """Over groups, at the widest rank: each tile, and the product of dx, with a mask."""
    for *_, (problem, config) in by_tile(target, groups=8):
        types = _types(problem)
        if types == MIXED and config.kernel not in LOWRANK_KERNELS:
            continue
        if problem.R != 64 or (target in TWINS and types != USUAL):
            continue
        yield problem, config, True, False
        if config.kernel == "expand":
            yield replace(problem, dropout=True), config, False, False


def scaled_jobs(target: str) -> Iterator[Job]:
    """With DoRA's column scale and z, at the widest rank of each tile, as a forward stores its operands.

    The store is that of every weight format and of every type of adapter.
    """
    for *_, (problem, config) in by_tile(target):
        types = _types(problem)
        own = types == MIXED and config.kernel in LOWRANK_KERNELS
        if config.kernel not in PERSISTENT and (types in (USUAL, FLOAT32) or own):
            yield problem, config, True, False


FORMS = {"": jobs, "elements": in_elements, "groups": grouped_jobs, "scaled": scaled_jobs}
COMPILED = [(t, f) for t in TARGETS for f in FORMS if f != "scaled" or t not in (*TWINS, "sm_120")]
