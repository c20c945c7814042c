"""Runs one shipped configuration on a small problem and compares with float64: in the emulator, or where it is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lora_kernels.backends.triton.configs import untried
from lora_kernels.backends.triton.expand import Shrink
from lora_kernels.backends.triton.launch import rank_operand
from lora_kernels.problem import DENSE
from lora_kernels.samples import sample
from lora_kernels.tuning.config import TileConfig
from lora_kernels.tuning.targets import TARGETS, Target
from tests.compiled.jobs import Job
from tests.compiled.shipped import Shapes, tail
from tests.oracle import Case, Operands, assert_budget
from tests.ptx.launch import emulate

if untried() is None:
    from lora_kernels.backends.triton.persistent import fetchable, persistent


def small(job: Job) -> Case:
    """More than one tile and, of each part of a sum, one step, in the job's own code: what divides its sizes divides these.

    That decides how memory is accessed and whether the last step has a mask; each edge of a tile has one here.
    """
    problem, config, forward, peft_b = job
    m, n, k = config.block_m, config.block_n, config.block_k
    # Of a row, where it is no whole pieces.
    n_rest, k_rest = problem.N % 16, problem.K % 16
    parts = min(config.split, 2)  # each of two steps: a race takes two
    packed = problem.weight_format != DENSE
    columns, steps, rows = n + (n_rest or 16), 2 * parts * k + k_rest, (2 * parts - 1) * m + 3
    M, N, K = {
        "shrink": (m + 3, 48, steps),
        "expand": (m - 5, columns, steps),
        "one_launch": (m + 11, columns, steps),
        "persistent": (m + 5, columns, k + steps),
        "persistent_one_launch": (m + 11, columns, k + steps),
        "one_pass": (m - 5, columns, steps),
        "decode": (m - 3, columns, max(192, steps) if packed else steps),
        "wgrad": (rows, columns, n + (k_rest or 16)),
        "shrink_wgrad": (rows, columns, 48),
        "dequantise": (m, n + 3, 2 * k + 1),
    }[config.kernel]
    dtype, adapter = getattr(torch, problem.dtype), getattr(torch, problem.adapter_dtype)
    types = {"dtype": dtype, "adapter_dtype": adapter}
    layout, dropout = "peft" if peft_b else "linear", 0.25 if problem.dropout else 0.0
    sizes = (M, N, K) if forward else (M, K, N)
    return Case(*sizes, problem.R, **types, layout=layout, dropout=dropout, bias=forward)


def launch(target: Target, job: Job, o: Operands) -> dict[str, Tensor]:
    """What the job's kernel computes of `o`, by name."""
    return shapes(job, o.case, values=o).launch(in_two(job), target)


def shapes(job: Job, case: Case, **more: Any) -> Shapes:
    """The job's kernel on the sizes of `case`, of whose gradient one that is not forward is."""
    problem, _, forward, peft_b = job
    N, K = (case.N, case.K) if forward else (case.K, case.N)
    return Shapes(replace(problem, M=case.M, N=N, K=K, R=case.R), forward, peft_b, **more)


def in_two(job: Job) -> TileConfig:
    """The job's tile with at most two parts of its sums."""
    return replace(job[1], split=min(job[1].split, 2))


def execute(target: str, job: Job, schedule: int | None) -> None:
    """Launch and compare within the error budget; what decodes a weight must give the bits of the weight's own copy."""
    problem, config, *_ = job
    case, what = small(job), f"{config} for {problem} on {target}, schedule {schedule}"
    o = case.operands()
    if problem.weight_format != DENSE:
        weight = sample(problem.weight_format, case.N, case.K, case.dtype)
        o = replace(o, w=weight.dense().t())
    with emulate(target, schedule):
        actual = launch(TARGETS[target], job, o)
    if config.kernel == "dequantise":
        assert torch.equal(actual["w"], o.w), what
    else:
        compare(actual, o, what)


def compare(actual: dict[str, Tensor], o: Operands, what: str) -> None:
    eager, exact = o.results(None), o.results(torch.float64)
    for name, value in actual.items():
        if name == "rounded":
            whole = actual["s"] if "s" in actual else actual["q"]
            assert torch.equal(value, whole.to(value.dtype)), what
            continue
        dtype = torch.float32 if name in ("s", "q") else eager[name].dtype
        if name == "q" and value.dtype == o.x.dtype == o.a.dtype:  # what a fused one may give
            dtype = value.dtype
        expected = eager[name].to(dtype)
        assert_budget(value, expected, exact[name], f"{name} by {what}")


def tile_after_tile(
    config: TileConfig, o: Operands, programs: int = 1, forward: bool = True
) -> dict[str, Tensor]:
    """y by the persistent product or, backward or with dropout, dx; by what eager has for s or q."""
    if forward and o.dropout is None:
        s, b = tail(o.results(None)["s"], o.b, o.x.dtype)
        return {"y": persistent(o.x, o.w, s, b, o.bias, config, programs)}
    q, a_t = tail(o.results(None)["q"], o.a.t(), o.dy.dtype)
    dx = persistent(o.dy, o.w.t(), q, a_t, None, config, programs, dropout=o.dropout)
    return {"dx": dx}


def one_launch(
    config: TileConfig, o: Operands, programs: int = 2, shrinking: int | None = None
) -> dict[str, Tensor]:
    """y and s by the persistent product that computes both; nothing that it reads is written before."""
    s = torch.full((o.case.M, o.case.R), torch.nan, device=o.x.device)
    rounded = rank_operand(o.case.M, o.case.R, o.x.dtype, o.x.device).fill_(torch.nan)
    first = Shrink(fetchable(o.a.t()).t(), o.case.alpha, s, None)
    operands = o.x, o.w, rounded, fetchable(o.b), o.bias
    y = persistent(*operands, config, programs, first=first, shrinking=shrinking)
    assert torch.equal(rounded, s.to(rounded.dtype))
    return {"y": y, "s": s}
