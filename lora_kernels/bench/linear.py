"""The linear suite: one LoRA linear, forward and with its backward, by every contender, against the frozen layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from lora_kernels import plan
from lora_kernels.bench import contenders, cost_model
from lora_kernels.bench.check import Oracle, Wrong
from lora_kernels.bench.clock import Call, clock_for, interleaved
from lora_kernels.bench.contenders import Built
from lora_kernels.bench.results import Row
from lora_kernels.bench.statistics import Summary, ratios, summary
from lora_kernels.problem import Problem

MODES = ("forward", "step")
_PAIR = ("frozen", "reference")  # what every ratio needs


@dataclass(frozen=True)
class Effort:
    """How long each case is measured."""

    seconds: float = 1.0
    rounds: tuple[int, int] = (7, 200)

    def times(self, factor: int) -> Effort:
        return Effort(self.seconds * factor, (self.rounds[0] * factor, self.rounds[1] * factor))


@dataclass(frozen=True)
class Case:
    """A problem with the name that tables give it."""

    label: str
    problem: Problem
    mode: str = "step"
    suite: str = "linear"
    cold: bool = False
    graph: bool = False


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    text = str(error).strip()
    return text.splitlines()[0] if text else repr(error)


def measure(
    case: Case,
    names: tuple[str, ...],
    effort: Effort,
    ceilings: dict[str, float],
    left_out: dict[str, str] | None = None,
    failed: dict[str, str] | None = None,
) -> list[Row]:
    """One row for each contender that can be built here, all checked against float64 first; the others go to `left_out`.

    A contender of ours that is wrong, or raises, goes to `failed`, or is raised where that is None.
    """
    notes = {} if left_out is None else left_out
    problem = case.problem
    layer, (x, dy) = contenders.make_layer(problem), contenders.make_input(problem)
    oracle = Oracle(layer, x, dy)
    clock = clock_for(problem.device, case.cold, case.graph)
    calls: dict[str, Call] = {}
    errors: dict[str, float | None] = {}
    for name in dict.fromkeys((*_PAIR, *names)):
        reason = contenders.left_out(name, problem)
        if reason is None:
            try:
                built = contenders.build(name, layer)
                errors[name] = None if name == "frozen" else oracle.check(name, built)
                call = as_call(built, x, dy, case.mode)
                clock.time_us(call, 1)  # not everything can be captured in a graph
            except Exception as error:
                reason = first_line(error)
                if name in contenders.OURS:
                    if failed is None:
                        raise
                    failed[f"{name}, {case.mode} of {problem}"] = reason
                    continue
        if reason is None:
            calls[name] = call
        else:
            notes[name] = reason
    taken = interleaved(calls, clock, seconds=effort.seconds, rounds=effort.rounds)
    best = roofline_us(problem, case.mode, ceilings)
    chosen = f"ours[{plan.explain(problem).backend}]"
    return [
        row(
            case,
            name,
            taken,
            error=errors[name],
            auto=name == chosen if name in contenders.OURS else None,
            ceiling_share=None if best is None else best / summary(taken[name]).median,
        )
        for name in taken
    ]


def as_call(built: Built, x: torch.Tensor, dy: torch.Tensor, mode: str) -> Call:
    """What is timed: the product without autograd, or the product and the gradients of x and the adapters."""
    if mode == "forward":
        still = x.detach()

        def forward() -> object:
            with torch.no_grad():
                return built.function(still)

        return forward

    def step() -> object:
        return torch.autograd.grad(built.function(x), (x, *built.trained), dy)

    return step


def row(case: Case, name: str, taken: dict[str, list[float]], **more: Any) -> Row:
    """A row out of samples that were taken next to those of frozen and reference."""
    own = summary(taken[name])
    floor: Summary | None = ratios(taken[name], taken["frozen"]) if "frozen" in taken else None
    return Row(
        case.suite,
        case.label,
        case.mode,
        name,
        "us",
        own.median,
        own.low,
        own.high,
        len(taken[name]),
        problem=asdict(case.problem),
        to_floor=None if floor is None else floor.median,
        to_floor_low=None if floor is None else floor.low,
        to_floor_high=None if floor is None else floor.high,
        to_reference=ratios(taken[name], taken["reference"]).median,
        caches="cold" if case.cold else "warm",
        graph=case.graph,
        **more,
    )


def roofline_us(problem: Problem, mode: str, ceilings: dict[str, float]) -> float | None:
    """The least time that the measured rates allow for a LoRA linear; None where its dtype's rate was not measured."""
    gflops = ceilings.get(f"{problem.dtype}_gflops")
    if gflops is None:
        return None
    flops, moved = cost_model.work(problem, mode)
    return max(flops / (1e3 * gflops), moved / (1e3 * ceilings["copy_gbs"]))


def with_backends(names: tuple[str, ...], problem: Problem) -> tuple[str, ...]:
    """`names`, where "ours" stands for each of our backends that the problem's device has."""
    on = {
        "cpu": ["ours[eager]", "ours[cpu]"],
        "cuda": ["ours[eager]", "ours[triton]", "ours[cuda]"],
    }
    expanded: list[str] = []
    for name in names:
        expanded += on[problem.device] if name == "ours" else [name]
    return tuple(dict.fromkeys(expanded))


def on_device(case: Case, device: str) -> Case:
    return replace(case, problem=replace(case.problem, device=device))


__all__ = ["Case", "Effort", "Wrong", "measure", "on_device", "with_backends"]
