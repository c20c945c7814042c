"""Runs one shipped configuration on a small ragged problem and compares with float64: in the emulator, or where it is."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lora_kernels.backends.triton.configs import untried
from lora_kernels.backends.triton.decode import decode
from lora_kernels.backends.triton.dequantise import dequantise
from lora_kernels.backends.triton.expand import Shrink, expand
from lora_kernels.backends.triton.launch import rank_operand, rank_tail
from lora_kernels.backends.triton.one_pass import one_pass
from lora_kernels.backends.triton.parts import parts
from lora_kernels.backends.triton.shrink import shrink
from lora_kernels.backends.triton.shrink_wgrad import shrink_wgrad
from lora_kernels.backends.triton.wgrad import wgrad
from lora_kernels.operands import QuantizedWeight
from lora_kernels.problem import DENSE, Problem
from lora_kernels.samples import sample
from lora_kernels.tuning.config import TileConfig
from tests.oracle import Case, Operands, assert_budget
from tests.ptx.launch import emulate

if untried() is None:
    from lora_kernels.backends.triton.persistent import fetchable, persistent


def small(problem: Problem, config: TileConfig) -> Case:
    """More than one tile and one step, ragged in every size; rows stay 16-byte aligned for tensor descriptors."""
    m, n, k = config.block_m, config.block_n, config.block_k
    dense = problem.weight_format == DENSE
    sizes = {
        "shrink": (m + 3, 40, k + 8),
        "expand": (m - 5, n + 8, k + 8),
        "one_launch": (m + 11, n + 8, k + 8),
        "persistent": (m - 5, n + 8, 3 * k + 8),
        "persistent_one_launch": (m + 11, n + 8, 3 * k + 8),
        "one_pass": (m - 5, n + 8, k + 8),
        "decode": (m - 3, n + 8, 2 * k + 8 if dense else 2 * k // 64 * 64 + 64),
        "wgrad": (m + 3, 40, n + 8),
        "shrink_wgrad": (m + 3, n + 8, 40),
        "dequantise": (m, n + 3, 2 * k + 1),
    }[config.kernel]
    dtype, adapter = getattr(torch, problem.dtype), getattr(torch, problem.adapter_dtype)
    return Case(*sizes, problem.R - 3, dtype=dtype, adapter_dtype=adapter)


def execute(target: str, problem: Problem, config: TileConfig, schedule: int | None) -> None:
    """Launch and compare within the error budget; what decodes a weight must give the bits of the weight's own copy."""
    case, what = small(problem, config), f"{config} on {target}, schedule {schedule}"
    weight = None
    if problem.weight_format != DENSE:
        weight = sample(problem.weight_format, case.N, case.K, case.dtype)
    if config.kernel == "dequantise":
        out = torch.full((case.N, case.K), torch.nan, dtype=case.dtype)
        with emulate(target, schedule):
            dequantise(weight, out, config)
        assert torch.equal(out, weight.dense()), what
        return
    o = case.operands()
    if weight is not None:
        o = replace(o, w=weight.dense().t())
    with emulate(target, schedule):
        actual = launch(replace(config, split=min(config.split, 2)), o, weight)
    compare(actual, o, what)


def compare(actual: dict[str, Tensor], o: Operands, what: str) -> None:
    eager, exact = o.results(None), o.results(torch.float64)
    for name, value in actual.items():
        dtype = torch.float32 if name in ("s", "q") else eager[name].dtype
        if name == "q" and value.dtype == o.x.dtype == o.a.dtype:  # what a fused one may give
            dtype = value.dtype
        expected = eager[name].to(dtype)
        assert_budget(value, expected, exact[name], f"{name} by {what}")


def tail(s: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """s and b as a persistent product of an x of `dtype` copies them."""
    if rank_tail(dtype, b.dtype, tma=True) == "split":
        return parts(s.float(), b, TileConfig("shrink", 64, 1, 64, 4, 3))
    return rank_operand(*s.shape, dtype, s.device).copy_(s), fetchable(b)


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
    tail = rank_operand(o.case.M, o.case.R, o.x.dtype, o.x.device).fill_(torch.nan)
    first = Shrink(fetchable(o.a.t()).t(), o.case.alpha, s, None)
    operands = o.x, o.w, tail, fetchable(o.b), o.bias
    y = persistent(*operands, config, programs, first=first, shrinking=shrinking)
    assert torch.equal(tail, s.to(tail.dtype))
    return {"y": y, "s": s}


def launch(
    config: TileConfig, o: Operands, weight: QuantizedWeight | None = None
) -> dict[str, Tensor]:
    """What the kernel of `config` computes of `o`, by name; a product with dropout is that of dx.

    Where `weight` is given, `decode` reads it in place of w.
    """
    alpha = o.case.alpha
    if config.kernel == "shrink":
        return {"s": shrink(o.x, o.a, alpha, config, o.dropout)}
    if config.kernel == "expand" and o.dropout is None:
        s = o.results(None)["s"]
        s = s if o.x.dtype == o.a.dtype == torch.bfloat16 else s.float()
        return {"y": expand(o.x, o.w, s, o.b, o.bias, config)}
    if config.kernel == "expand":
        q = o.results(None)["q"].float()
        return {"dx": expand(o.dy, o.w.t(), q, o.a.t(), None, config, o.dropout)}
    if config.kernel == "one_launch":
        s = torch.full((o.case.M, o.case.R), torch.nan, device=o.x.device)
        rounded = rank_operand(o.case.M, o.case.R, o.x.dtype, o.x.device).fill_(torch.nan)
        first = Shrink(o.a, alpha, s, o.dropout)
        return {"y": expand(o.x, o.w, rounded, o.b, o.bias, config, first=first), "s": s}
    if config.kernel == "persistent":
        return tile_after_tile(config, o)
    if config.kernel == "persistent_one_launch":
        return one_launch(config, o)
    if config.kernel == "one_pass":
        found = one_pass(o.x, o.w, o.a, o.b, alpha, o.bias, config, o.dropout)
        return dict(zip(("y", "s"), found, strict=True))
    if config.kernel == "decode":
        w = o.w if weight is None else weight.t()
        return dict(zip(("y", "s"), decode(o.x, w, o.a, o.b, alpha, o.bias, config), strict=True))
    reference = o.results(None)
    s, q = reference["s"].float(), reference["q"].float()
    if config.kernel == "wgrad":
        return {
            "dA": wgrad(o.x, q, o.a.dtype, config, o.dropout),
            "dB": wgrad(s, o.dy, o.b.dtype, config),
        }
    return dict(
        zip(("q", "dB"), shrink_wgrad(o.dy, o.b.t(), alpha, s, o.b.dtype, config), strict=True)
    )
