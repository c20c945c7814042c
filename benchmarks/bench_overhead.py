"""Host microseconds of a call, eager and compiled: `pytest benchmarks/bench_overhead.py`."""

from __future__ import annotations

import pytest
from conftest import DEVICE, EFFORT

from lora_kernels.bench import contenders, linear, overhead


@pytest.fixture(scope="module")
def rows():
    left_out = {}
    return {(row.mode, row.contender): row for row in overhead.measure(DEVICE, EFFORT, left_out)}


@pytest.mark.parametrize("mode", linear.MODES)
@pytest.mark.parametrize("name", overhead.NAMES)
def test_overhead(benchmark, mode, name, rows, report_row):
    """Enqueuing alone on a GPU; the whole call on a CPU."""
    if (mode, name) not in rows:
        pytest.skip("cannot be measured here")
    row = rows[mode, name]
    report_row(row)
    problem = row.as_problem()
    layer, (x, dy) = contenders.make_layer(problem), contenders.make_input(problem)
    call = linear.as_call(overhead.build(name, layer), x, dy, mode)
    benchmark.pedantic(call, rounds=50, iterations=20, warmup_rounds=2)
