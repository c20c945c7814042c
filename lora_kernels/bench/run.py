"""One run of benchmarks: machine, ceilings, then suite after suite, into `Results`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from lora_kernels.bench import contenders, linear, machine, memory, overhead, shared, training
from lora_kernels.bench.check import Oracle
from lora_kernels.bench.linear import Case, Effort
from lora_kernels.bench.presets import ALL
from lora_kernels.bench.progress import counted
from lora_kernels.bench.results import Results, Row
from lora_kernels.problem import Problem

# Of everything; "shared" has presets of its own.
SUITES = ("linear", "growth", "training", "overhead", "memory")
GROWTH_NAMES = ("frozen", "reference", "ours")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Order:
    """What is to be measured. `names` are contenders of the linear suites, "ours" for all of our backends.

    `shared` are presets of the shared suite, which has contenders of its own.
    """

    device: str
    cases: list[Case]
    suites: tuple[str, ...] = ("linear", "growth")
    names: tuple[str, ...] = ALL
    effort: Effort = field(default_factory=Effort)
    dtypes: tuple[str, ...] = ("float32",)
    command: str = ""
    shared: tuple[str, ...] = ()


def run(
    order: Order,
    say: Say = lambda text: None,
    keep: Callable[[Results], object] = lambda results: None,
) -> Results:
    """Measure an order. `say` gets a line before each step, `keep` all rows after each step, in case it is the last.

    A backend of ours that fails on a problem, or a suite that cannot be measured, is in `failed`, and the run goes on.
    """
    say(f"measuring the ceilings of this machine ({order.device})")
    dtypes = sorted({case.problem.dtype for case in order.cases} | set(order.dtypes))
    rates = [d for d in dtypes if d != "float64"]
    results = Results(
        machine.describe(order.device),
        machine.versions(),
        machine.sha(),
        machine.now(),
        order.command,
        machine.ceilings(order.device, rates),
    )
    if isinstance(results.machine["load"], float) and results.machine["load"] > 0.5:
        say(f"the machine is busy (load {results.machine['load']}): times will be noisy")

    begin = time.perf_counter()
    for place, (title, what, measure) in counted(_steps(order, results, say)):
        say(f"{place} {title}")
        try:
            results.rows += measure()
        except Exception as error:  # a device fails in any way; the other measurements count
            results.failed[what] = linear.first_line(error)
        keep(results)
    say(f"done in {time.perf_counter() - begin:.0f} s")
    return results


def _steps(
    order: Order, results: Results, say: Say
) -> list[tuple[str, str, Callable[[], list[Row]]]]:
    """(what is said before it, its name where it fails, what measures it) of each step."""
    steps: list[tuple[str, str, Callable[[], list[Row]]]] = []
    oracles: dict[Problem, Oracle] = {}
    for case in (case for case in order.cases if case.suite in order.suites):
        title = f"{case.suite} {case.label}: {case.mode}, {case.problem}"
        what = f"{case.suite} {case.label}, {case.mode} of {case.problem}"
        measure = partial(case_rows, case, order.names, order.effort, results, oracles)
        steps.append((title, what, measure))
    if "training" in order.suites:
        for which in training.MODELS:
            for dtype in order.dtypes if which == "block" else ("float32",):
                what = f"training: {which}, {dtype}"
                effort = order.effort.times(2)
                train = partial(training.measure, which, order.device, effort, results.left_out)
                steps.append((what, what, partial(train, dtype=dtype)))
    for preset in order.shared:
        results.left_out.update(shared.left_out(preset))
        for dtype in order.dtypes:
            for label, make in shared.cases(preset).items():
                what = f"{label}, {dtype}"
                steps.append((what, what, partial(_shared_rows, make, dtype, order, results)))
    if "overhead" in order.suites:
        calls = partial(overhead.measure, order.device, order.effort, results.left_out)
        steps.append(("overhead of a call", "overhead of a call", calls))
    if "memory" in order.suites:
        steps.append(("memory", "memory", partial(_memory_rows, order, results, say)))
    return steps


def _shared_rows(
    make: Callable[[str, str], shared.Case], dtype: str, order: Order, results: Results
) -> list[Row]:
    return shared.measure(make(order.device, dtype), order.effort, results.left_out)


def case_rows(
    case: Case,
    names: tuple[str, ...],
    effort: Effort,
    results: Results,
    oracles: dict[Problem, Oracle] | None = None,
) -> list[Row]:
    """The rows of one case; growth curves take fewer contenders."""
    if case.suite == "growth":
        names = tuple(name for name in names if name in GROWTH_NAMES or name.startswith("ours"))
    names = contenders.with_backends(names, case.problem.device)
    rates, notes, failed = results.ceilings, results.left_out, results.failed
    return linear.measure(case, names, effort, rates, notes, failed, oracles)


def _memory_rows(order: Order, results: Results, say: Say) -> list[Row]:
    """Memory rows of the distinct problems of the linear cases, each once."""
    rows: list[Row] = []
    seen = set()
    for case in order.cases:
        if case.suite != "linear" or case.mode != "step" or case.problem in seen:
            continue
        seen.add(case.problem)
        say(f"memory: {case.label}")
        names = tuple(name for name in order.names if name in memory.NAMES or name[:4] == "ours")
        names = contenders.with_backends(names, case.problem.device)
        rows += memory.measure(case, names, results.left_out)
    return rows
