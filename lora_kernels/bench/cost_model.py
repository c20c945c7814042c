"""A cost model of the CPU forms, calibrated at one size and checked at all others: predicted time of each contender.

With P the product rate, W the memory and w the cache bandwidth and o the cost of a call,

frozen            flops / P or bytes / W, the larger, + o
reference         frozen + skinny products + 6 passes over y
addmm             frozen + skinny products + 2 passes over y
ours[eager]       frozen + skinny products + 1 pass over y: y is written by the small product and read by the large one
ours[cpu]         flops / P' or bytes / W + skinny products, P' its own product rate

A skinny product costs one reading of its wide operand, or its arithmetic at P. A pass over y runs at w while y fits a
cache, at W otherwise. A step is a forward, and a backward that is a forward on exchanged sizes (dx; its skinny operand q is
dy·Bᵀ) and two more skinny products, dA and dB. Nothing is fitted to the rows it is compared with.
"""

from __future__ import annotations

from lora_kernels import plan
from lora_kernels.backends.base import fastest
from lora_kernels.problem import Problem
from lora_kernels.tuning import cost
from lora_kernels.tuning.targets import target_of

CACHE_BYTES = 1 << 21
PASSES = {"frozen": 0.0, "reference": 6.0, "addmm": 2.0, "ours[eager]": 1.0, "ours[cpu]": 0.0}
_ON_GPU = {
    "frozen": "frozen",
    "reference": "reference",
    "addmm": "addmm",
    "expand_first": "eager",
    "ours[eager]": "eager",
    "two_kernel": "two_kernel",
}


def work(problem: Problem, mode: str, lora: bool = True) -> tuple[float, float]:
    """(operations, bytes) that a LoRA linear, or without `lora` the frozen layer, cannot do without, in a forward or step.

    A step's backward reads dy, W and x and writes dx; its products are dx and, for the adapters, as many operations twice.
    """
    back = problem.adjoint()
    if not lora:
        times = 1 if mode == "forward" else 2
        moved = problem.frozen_bytes + (0 if mode == "forward" else back.frozen_bytes)
        return times * problem.flops, moved
    if mode == "forward":
        return problem.flops + problem.lowrank_flops, problem.frozen_bytes + problem.lowrank_bytes
    flops = 2 * problem.flops + 3 * problem.lowrank_flops
    inputs = problem.M * problem.K * problem.itemsize
    moved = problem.frozen_bytes + back.frozen_bytes + inputs + 3 * problem.lowrank_bytes
    return flops, moved


def predict_cpu_us(
    contender: str, problem: Problem, mode: str, ceilings: dict[str, float]
) -> float | None:
    """Predicted microseconds on the CPU whose rates are `ceilings`; None for what the model does not cover."""
    rate = ceilings.get(f"{problem.dtype}_aten_gflops")
    own = ceilings.get(f"{problem.dtype}_ours_gflops") if contender == "ours[cpu]" else rate
    if contender not in PASSES or rate is None or own is None:
        return None
    forward = _product_us(contender, problem, rate, own, ceilings)
    if mode == "forward":
        return forward
    backward = _product_us(contender, problem.adjoint(), rate, own, ceilings)
    if contender != "frozen":  # dA from x and q, dB from s and dy
        backward += _skinny_us(problem.M, problem.K, problem, rate, ceilings)
        backward += _skinny_us(problem.M, problem.N, problem, rate, ceilings)
    return forward + backward


def predict_gpu_us(contender: str, problem: Problem, mode: str, architecture: str) -> float | None:
    """Predicted microseconds of the package's GPU model, which is not calibrated; None for what it does not cover."""
    try:
        target = target_of(architecture)
    except ValueError:
        return None
    algorithm = _ON_GPU.get(contender)
    if contender == "ours[triton]":
        own = plan.get("triton").candidates(problem, target)
        best = fastest(own)
        algorithm = None if best is None else best.name
    if algorithm is None:
        return None
    forward = cost.predict_us(algorithm, problem, target)
    if mode == "forward":
        return forward
    back = problem.adjoint()
    if algorithm == "frozen":
        return forward + cost.frozen_us(back, target)
    return forward + cost.predict_us(algorithm, back, target)


def _product_us(
    contender: str, problem: Problem, rate: float, own: float, ceilings: dict[str, float]
) -> float:
    """x·w, and beside it x·a, s·b and the passes over y."""
    main = problem.flops / (1e3 * own)
    streamed = problem.frozen_bytes / (1e3 * ceilings["copy_gbs"])
    total = max(main, streamed) + ceilings.get("call_us", 0.0)
    if contender == "frozen":
        return total
    total += _skinny_us(problem.M, problem.K, problem, rate, ceilings)
    y_bytes = problem.M * problem.N * problem.itemsize
    total += PASSES[contender] * y_bytes / (1e3 * _bandwidth(y_bytes, ceilings))
    return total + 2 * problem.M * problem.R * problem.N / (1e3 * rate)


def _skinny_us(
    rows: int, cols: int, problem: Problem, rate: float, ceilings: dict[str, float]
) -> float:
    """A product of a [rows, cols] operand with one of R columns."""
    moved = rows * cols * problem.itemsize
    compute = 2 * rows * cols * problem.R / (1e3 * rate)
    return max(compute, moved / (1e3 * _bandwidth(moved, ceilings))) + ceilings.get("call_us", 0.0)


def _bandwidth(size: int, ceilings: dict[str, float]) -> float:
    return ceilings["cache_gbs" if size <= CACHE_BYTES else "copy_gbs"]
