"""Counts the cycles of `lora_kernels.tuning.cycles` again: one block of a tile, executed in the emulator at two depths."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from torch import Tensor

from lora_kernels.backends.triton.configs import tiles_of
from lora_kernels.backends.triton.expand import expand
from lora_kernels.backends.triton.launch import rank_operand
from lora_kernels.backends.triton.one_pass import one_pass
from lora_kernels.backends.triton.parts import parts
from lora_kernels.backends.triton.shrink import shrink
from lora_kernels.backends.triton.wgrad import wgrad
from lora_kernels.problem import Problem
from lora_kernels.tuning.config import WGRAD_BESIDE, TileConfig, shrink_beside, tail_in_parts
from lora_kernels.tuning.cycles import (
    COUNTED,
    INSTRUCTIONS,
    L2_BYTES,
    SHARED_BYTES,
    Tile,
    flops_per_clock,
)
from lora_kernels.tuning.targets import TARGETS
from tests.ptx.counters import Counters
from tests.ptx.launch import emulate

TYPES = (("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "float32"))
PRODUCTS = ("expand", "persistent", "one_pass")
DEPTHS = 4, 8  # steps of block_k


def counted_tiles() -> dict[Tile, tuple[TileConfig, Problem]]:
    """Every tile that ships for a target that can be executed, the usual ones also without tensor descriptors."""
    found: dict[Tile, tuple[TileConfig, Problem]] = {}
    for name, types, kernel in itertools.product(COUNTED, TYPES, PRODUCTS):
        forward = Problem(4096, 4096, 4096, 16, *types, device="cuda")
        for problem in (forward, forward.adjoint()):
            for config in tiles_of(kernel, problem, TARGETS[name]):
                usual = kernel != "persistent" and types != ("bfloat16", "float32")
                pointers = (replace(config, tma=False),) if usual else ()
                for way in (config, *pointers):
                    found.setdefault(Tile.of(way, problem, name), (way, problem))
    for name in COUNTED:  # what runs beside persistent
        forward = Problem(8192, 4096, 4096, 16, *TYPES[0], device="cuda")
        for problem in (
            (forward, forward.adjoint()) if tiles_of("persistent", forward, TARGETS[name]) else ()
        ):
            for config in (
                shrink_beside(problem.R, TARGETS[name]),
                *([WGRAD_BESIDE[name]] if name in WGRAD_BESIDE and problem.backward else []),
            ):
                found.setdefault(Tile.of(config, problem, name), (config, problem))
    return found


def count(target: str, config: TileConfig, problem: Problem, steps: int, R: int) -> Counters:
    """What one block counts, K = steps·block_k, with the operands stored as the forward or dx finds them."""
    M, N, K = config.block_m, config.block_n, steps * config.block_k

    def stored(rows: int, columns: int, dtype: str, transposed: bool) -> Tensor:
        shape = (columns, rows) if transposed else (rows, columns)
        made = torch.zeros(shape, dtype=getattr(torch, dtype))
        return made.t() if transposed else made

    forward = problem.w_k_major
    x, w = stored(M, K, problem.dtype, False), stored(K, N, problem.dtype, forward)
    a = stored(K, R, problem.adapter_dtype, not forward)
    b = stored(R, N, problem.adapter_dtype, not forward)
    if config.kernel == "wgrad":
        s, dy = (
            rank_operand(steps * M, R, x.dtype, x.device),
            stored(steps * M, N, problem.dtype, False),
        )
        s.zero_()
        with emulate(target) as executed:
            wgrad(s, dy, dy.dtype, config, beside=True)
        return executed[0].counters
    with emulate(target) as executed:
        if config.kernel == "shrink":
            shrink(x, a, 0.5, config)
            return executed[0].counters
        if config.kernel == "one_pass":
            one_pass(x, w, a, b, 0.5, None, config)
            return executed[0].counters
        s = torch.zeros(M, R)
        if not tail_in_parts(problem) and problem.dtype == "bfloat16":
            s = rank_operand(M, R, x.dtype, x.device).zero_()
        if config.kernel == "expand":
            expand(x, w, s, b, None, config)
        else:
            from lora_kernels.backends.triton.persistent import persistent

            if tail_in_parts(problem):
                s, b = parts(s, b, config)
            persistent(x, w, s, b, None, config, 1)
    return executed[-1].counters


def pipe_cycles(target: str, counters: Counters, ctas: int) -> tuple[float, ...]:
    """`counters` of a block of so many CTAs in cycles of each one's multiprocessor, in the order of PIPES."""
    flops = counters.matrix_flops.copy()
    tf32 = flops.pop("tf32", 0)
    half = flops_per_clock(target, "bfloat16")
    matrix = (flops.total() + 2 * tf32) / half
    shared = counters.wavefronts + counters.unit_bytes / SHARED_BYTES
    issue = counters.instructions.total() / INSTRUCTIONS
    l2 = sum(t.bytes_loaded + t.bytes_stored for t in counters.tensors.values()) / L2_BYTES
    fma = counters.fma_flops / flops_per_clock(target, "float32")
    return tuple(pipe / ctas for pipe in (matrix or fma, shared, issue, l2))


def recount(config: TileConfig, problem: Problem, target: str, R: int) -> tuple:
    """What a row of TABLE has at one of RANKS: the cycles of a step, and of the rest."""
    counts = (count(target, config, problem, steps, R) for steps in DEPTHS)
    short, long = (pipe_cycles(target, each, max(1, config.ctas)) for each in counts)
    step = tuple((b - a) / (DEPTHS[1] - DEPTHS[0]) for a, b in zip(short, long, strict=True))
    return step, tuple(a - DEPTHS[0] * s for a, s in zip(short, step, strict=True))
