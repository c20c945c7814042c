"""What the suites for pytest-benchmark share: the machine's ceilings, and rows beside pytest-benchmark's own numbers.

    pytest benchmarks/bench_lora_linear.py --benchmark-json=FILE
    BENCH_PRESET=gpt2 pytest benchmarks/bench_lora_linear.py

pytest-benchmark times one test after the other. The ratios in `extra_info` come from samples taken in turns with the frozen
layer and the reference, right before it.
"""

from __future__ import annotations

import os
from dataclasses import asdict

import pytest
import torch

from lora_kernels.bench import linear, machine, presets

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PRESET = os.environ.get("BENCH_PRESET", "minilm")
EFFORT = linear.Effort(float(os.environ.get("BENCH_SECONDS", "0.5")))


def pytest_generate_tests(metafunc):
    """`case` runs over the preset's cases, `contender` over all that the device may have."""
    if "case" in metafunc.fixturenames:
        found = presets.cases(PRESET, DEVICE)
        metafunc.parametrize("case", found, ids=[f"{c.label}-{c.mode}" for c in found])
    if "contender" in metafunc.fixturenames:
        names = getattr(metafunc.module, "CONTENDERS", presets.ALL)
        some = presets.cases(PRESET, DEVICE)[0].problem
        metafunc.parametrize("contender", linear.with_backends(names, some))


@pytest.fixture(scope="session")
def run_facts():
    """Machine, versions and commit, for every row."""
    return {**machine.describe(DEVICE), **machine.versions(), "sha": machine.sha()}


@pytest.fixture(scope="session")
def ceilings():
    """The rates that this machine reaches at best."""
    return machine.ceilings(
        DEVICE, sorted({c.problem.dtype for c in presets.cases(PRESET, DEVICE)})
    )


@pytest.fixture
def report_row(benchmark, run_facts):
    """Puts a row and the run's facts beside pytest-benchmark's numbers; the contender's group is its case."""

    def report(row):
        benchmark.group = f"{row.suite} {row.case} {row.mode}"
        benchmark.extra_info.update({**run_facts, **asdict(row)})

    return report
