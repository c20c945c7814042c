"""The suites of `python -m lora_kernels bench` under pytest-benchmark.

    pytest benchmarks/bench_pytest.py -k linear --benchmark-json=FILE
    BENCH_PRESET=gpt2 pytest benchmarks/bench_pytest.py -k "linear or memory"

pytest-benchmark times one test after the other. The ratios in `extra_info` come from samples taken in turns with the frozen
layer and the reference, right before it.
"""

from __future__ import annotations

import os
from dataclasses import asdict

import pytest
import torch

from lora_kernels.bench import contenders, linear, machine, memory, overhead, presets, training

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EFFORT = linear.Effort(float(os.environ.get("BENCH_SECONDS", "0.5")))
CASES = presets.cases(os.environ.get("BENCH_PRESET", "minilm"), DEVICE)


@pytest.fixture(scope="session")
def ceilings():
    """The rates that this machine reaches at best."""
    return machine.ceilings(DEVICE, sorted({case.problem.dtype for case in CASES}))


@pytest.fixture
def report(benchmark):
    """Puts the contender's row and the run's facts beside pytest-benchmark's numbers; its group is its case."""

    def report(rows, contender, left_out, **more):
        row = next((row for row in rows if row.contender == contender), None)
        if row is None:
            pytest.skip("; ".join(left_out.values()) or "cannot be measured here")
        benchmark.group = f"{row.suite} {row.case} {row.mode}"
        facts = {**machine.describe(DEVICE), **machine.versions(), "sha": machine.sha()}
        benchmark.extra_info.update({**facts, **asdict(row), **more})
        return row

    return report


def call_of(built, problem, mode):
    call = linear.as_call(built, *contenders.make_input(problem), mode)
    return lambda: (call(), torch.cuda.synchronize() if DEVICE == "cuda" else None)


@pytest.mark.parametrize("contender", contenders.with_backends(presets.ALL, DEVICE))
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.label}-{case.mode}")
def test_linear(benchmark, case, contender, ceilings, report):
    left_out = {}
    report(linear.measure(case, (contender,), EFFORT, ceilings, left_out), contender, left_out)
    built = contenders.build(contender, contenders.make_layer(case.problem))
    benchmark.pedantic(call_of(built, case.problem, case.mode), rounds=10, warmup_rounds=2)


@pytest.mark.parametrize("contender", contenders.with_backends(memory.NAMES, DEVICE))
@pytest.mark.parametrize(
    "case", [c for c in CASES if c.mode == "step"], ids=lambda case: case.label
)
def test_memory(benchmark, case, contender, report):
    """The counts are exact and in `extra_info`; what is timed is the counting."""
    left_out = {}
    rows = benchmark.pedantic(memory.measure, (case, (contender,), left_out), rounds=1)
    saved = [r.value for r in rows if (r.mode, r.contender) == ("saved", contender)]
    report([row for row in rows if row.mode == "peak"], contender, left_out, saved_bytes=saved)


@pytest.fixture(scope="module")
def overheads():
    left_out = {}
    return overhead.measure(DEVICE, EFFORT, left_out), left_out


@pytest.mark.parametrize("mode", linear.MODES)
@pytest.mark.parametrize("name", overhead.NAMES)
def test_overhead(benchmark, mode, name, overheads, report):
    """Enqueuing alone on a GPU; the whole call on a CPU."""
    rows, left_out = overheads
    problem = report([row for row in rows if row.mode == mode], name, left_out).as_problem()
    built = overhead.build(name, contenders.make_layer(problem))
    call = linear.as_call(built, *contenders.make_input(problem), mode)
    benchmark.pedantic(call, rounds=50, iterations=20, warmup_rounds=2)


@pytest.mark.parametrize("model", training.MODELS)
@pytest.mark.parametrize("name", training.NAMES)
def test_training_step(benchmark, model, name, report):
    """Its first losses are those of the reference, or it is not timed."""
    left_out = {}
    report(training.measure(model, DEVICE, EFFORT, left_out, (name,)), name, left_out)
    step = training.MODELS[model](name, DEVICE, torch.float32)
    benchmark.pedantic(lambda: step().item(), rounds=5, warmup_rounds=2)
