"""One LoRA linear, forward and step, by every contender: `pytest benchmarks/bench_lora_linear.py`."""

from __future__ import annotations

import pytest
import torch
from conftest import EFFORT

from lora_kernels.bench import contenders, linear


def test_linear(benchmark, case, contender, ceilings, report_row):
    """Checked against float64, timed in turns with frozen and reference for the ratios, then by pytest-benchmark."""
    left_out = {}
    rows = linear.measure(case, (contender,), EFFORT, ceilings, left_out)
    row = next((row for row in rows if row.contender == contender), None)
    if row is None:
        pytest.skip(left_out[contender])
    report_row(row)
    built = contenders.build(contender, contenders.make_layer(case.problem))
    call = linear.as_call(built, *contenders.make_input(case.problem), case.mode)
    wait = torch.cuda.synchronize if case.problem.device == "cuda" else (lambda: None)

    def timed():
        call()
        wait()

    benchmark.pedantic(timed, rounds=10, warmup_rounds=2)
