"""The least that a LoRA linear costs: its operations and bytes, and the time that measured rates allow for them."""

from __future__ import annotations

from lora_kernels.problem import Problem


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


def least_us(problem: Problem, mode: str, ceilings: dict[str, float]) -> float | None:
    """The least time that the measured rates allow for a LoRA linear; None where its dtype's rate was not measured."""
    gflops = ceilings.get(f"{problem.dtype}_gflops")
    if gflops is None:
        return None
    flops, moved = work(problem, mode)
    return max(flops / (1e3 * gflops), moved / (1e3 * ceilings["copy_gbs"]))
