"""The linear suite: one LoRA linear, forward and with its backward, by every contender, against the frozen layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lora_kernels import plan
from lora_kernels.bench import contenders, results
from lora_kernels.bench.check import Oracle
from lora_kernels.bench.clock import Call, clock_for, interleaved
from lora_kernels.bench.contenders import Built
from lora_kernels.bench.results import Row
from lora_kernels.bench.roofline import least_us
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


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    text = str(error).strip()
    return text.splitlines()[0] if text else repr(error)


def measure(
    case: Case,
    names: tuple[str, ...],
    effort: Effort,
    ceilings: dict[str, float],
    left_out: dict[str, str],
    failed: dict[str, str] | None = None,
    oracles: dict[Problem, Oracle] | None = None,
) -> list[Row]:
    """One row for each contender that can be built here, all checked against float64 first; the others go to `left_out`.

    A contender of ours that is wrong, or raises, goes to `failed`, or is raised where that is None. `oracles` keeps the
    oracle of one problem for the next call.
    """
    problem, kept = case.problem, {} if oracles is None else oracles
    if problem not in kept:
        kept.clear()
        kept[problem] = Oracle(problem)
    oracle = kept[problem]
    clock = clock_for(problem.device, case.cold, case.graph)
    calls: dict[str, Call] = {}
    errors: dict[str, float | None] = {}
    for name in dict.fromkeys((*_PAIR, *names)):
        reason = contenders.left_out(name, problem)
        if name == "loop" and case.mode == "step":
            reason = reason or "measured forward only"
        if reason is None:
            try:
                built = contenders.build(name, oracle.layer)
                errors[name] = None if name in contenders.FLOORS else oracle.check(name, built)
                call = as_call(built, oracle.x, oracle.dy, case.mode)
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
            left_out[name] = reason
    taken = interleaved(calls, clock, seconds=effort.seconds, rounds=effort.rounds)
    best = least_us(problem, case.mode, ceilings)
    chosen = f"ours[{plan.explain(problem).backend}]"
    return [
        results.row(
            *(case.suite, case.label, case.mode, name, taken, problem),
            error=errors[name],
            auto=name == chosen if name in contenders.OURS else None,
            ceiling_share=None if best is None else best / results.summary(taken[name]).median,
            caches="cold" if case.cold else "warm",
            graph=case.graph,
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
