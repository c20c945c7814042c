"""Bytes saved for the backward, and the peak of a step: `pytest benchmarks/bench_memory.py`."""

from __future__ import annotations

import pytest

from lora_kernels.bench import memory

CONTENDERS = memory.NAMES


def test_memory(benchmark, case, contender, report_row):
    """The counts are exact and in `extra_info`; what is timed is the counting."""
    if case.mode != "step":
        pytest.skip("memory is that of a step")
    left_out = {}
    rows = benchmark.pedantic(memory.measure, (case, (contender,), left_out), rounds=1)
    own = {row.mode: row for row in rows if row.contender == contender}
    if not own:
        pytest.skip(left_out[f"memory: {contender}"])
    report_row(own["peak"])
    benchmark.extra_info["saved_bytes"] = own["saved"].value
