"""Counts the cycles of `lora_kernels.tuning.counted` again: one block of a tile, executed in the emulator at two depths."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from lora_kernels.backends.triton.lowrank_matmul import lowrank_matmul
from lora_kernels.backends.triton.one_pass import one_pass
from lora_kernels.problem import Problem
from lora_kernels.tuning.config import TileConfig
from lora_kernels.tuning.counted import (
    COUNTED,
    INSTRUCTIONS,
    L2_BYTES,
    RANKS,
    SHARED_BYTES,
    Row,
    Tile,
    flops_per_clock,
)
from lora_kernels.tuning.select import candidates
from lora_kernels.tuning.targets import TARGETS
from tests.ptx.counters import Counters
from tests.ptx.launch import emulate

TYPES = (("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "float32"))
DEPTHS = 4, 8  # steps of block_k


def counted_tiles() -> Iterator[tuple[Tile, TileConfig, Problem]]:
    """Every tile that ships for a target that can be executed, by descriptors and, where it would use them, by pointers."""
    for name in COUNTED:
        found = {}
        for dtype, adapter in TYPES:
            problem = Problem(4096, 4096, 4096, 16, dtype, adapter, device="cuda")
            for kernel in ("lowrank_matmul", "one_pass"):
                for config in candidates(kernel, problem, TARGETS[name]):
                    for way in (config, replace(config, tma=False)):
                        found.setdefault(Tile.of(way, problem, name), (way, problem))
        for tile, (config, problem) in found.items():
            yield tile, config, problem


def count(target: str, config: TileConfig, problem: Problem, steps: int, R: int) -> Counters:
    """What one block of the forward counts, K = steps·block_k."""
    M, N, K = config.block_m, config.block_n, steps * config.block_k
    base, adapter = getattr(torch, problem.dtype), getattr(torch, problem.adapter_dtype)
    x, w = torch.zeros(M, K, dtype=base), torch.zeros(N, K, dtype=base).t()
    b = torch.zeros(R, N, dtype=adapter)
    with emulate(target) as executed:
        if config.kernel == "lowrank_matmul":
            lowrank_matmul(x, w, torch.zeros(M, R), b, None, config)
        else:
            one_pass(x, w, torch.zeros(K, R, dtype=adapter), b, 0.5, None, config)
    return executed[0].counters


def pipe_cycles(target: str, counters: Counters) -> tuple[float, ...]:
    """`counters` in cycles, in the order of PIPES."""
    flops = dict(counters.matrix_flops)
    tf32 = flops.pop("tf32", 0)
    half = flops_per_clock(target, "bfloat16")
    matrix = (sum(flops.values()) + 2 * tf32) / half
    shared = counters.wavefronts + counters.unit_bytes / SHARED_BYTES
    issue = sum(counters.instructions.values()) / INSTRUCTIONS
    l2 = sum(t.bytes_loaded + t.bytes_stored for t in counters.tensors.values()) / L2_BYTES
    return matrix or counters.fma_flops / flops_per_clock(target, "float32"), shared, issue, l2


def recount(config: TileConfig, problem: Problem, target: str) -> Row:
    """A row of TABLE: at each of RANKS (step, rest)."""
    row = []
    for R in RANKS:
        short, long = (pipe_cycles(target, count(target, config, problem, n, R)) for n in DEPTHS)
        step = tuple((b - a) / (DEPTHS[1] - DEPTHS[0]) for a, b in zip(short, long, strict=True))
        row.append((step, tuple(a - DEPTHS[0] * s for a, s in zip(short, step, strict=True))))
    return tuple(row)
