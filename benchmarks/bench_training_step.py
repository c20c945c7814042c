"""Training steps of a block and of MiniLM, by every contender: `pytest benchmarks/bench_training_step.py`."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, EFFORT

from lora_kernels.bench import training

CONTENDERS = training.NAMES


@pytest.mark.parametrize("model", training.MODELS)
@pytest.mark.parametrize("name", training.NAMES)
def test_training_step(benchmark, model, name, report_row):
    """Its first losses are those of the reference, or it is not timed."""
    left_out = {}
    rows = training.measure(model, DEVICE, EFFORT, left_out, (name,))
    row = next((row for row in rows if row.contender == name), None)
    if row is None:
        pytest.skip(left_out.get(f"{model}: {name}", "the reference cannot run here"))
    report_row(row)
    step = training.STEPS[model](name, DEVICE, torch.float32)
    benchmark.pedantic(lambda: step().item(), rounds=5, warmup_rounds=2)
