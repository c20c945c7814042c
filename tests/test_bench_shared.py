"""The shared suite of the benchmarks: what it measures, that it checks it first, and what it leaves out."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from lora_kernels.__main__ import main
from lora_kernels.bench import machine, shared
from lora_kernels.bench.linear import Effort

QUICK = Effort(0.01, (3, 5))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """The same layers in sizes that take no time."""
    sizes = {
        "PROJECTIONS": {"q, k": (24, (24, 8))},
        "ROWS": (5,),
        "EXPERTS": 4,
        "HIDDEN": 16,
        "INTERMEDIATE": 8,
        "SLOTS": 2,
        "TOKENS": (6,),
        "WIDTH": 24,
        "ADAPTERS": 3,
        "SAMPLES": 6,
        "LENGTHS": (2,),
        "DORA_ROWS": (5,),
        "DORA_WIDTH": 24,
    }
    for name, value in sizes.items():
        monkeypatch.setattr(shared, name, value)


def measured(preset, dtype, left_out):
    (make,) = shared.cases(preset).values()
    return shared.measure(make("cpu", dtype), QUICK, left_out)


def contenders(rows, mode):
    return {row.contender for row in rows if row.mode == mode}


@pytest.mark.parametrize("dtype", shared.DTYPES)
@pytest.mark.parametrize("preset", shared.PRESETS)
def test_every_contender_is_right_and_measured(preset, dtype):
    left_out = {}
    rows = measured(preset, dtype, left_out)
    assert not left_out
    expected = {
        "projections": {"frozen", "reference", "apart", "ours", "peft"},
        "experts": {"frozen", "peft", "peft, grouped_mm", "ours"},
        "adapters": {"frozen", "reference", "apart", "ours", "peft"},
        "dora": {"frozen", "lora", "ours", "peft", "peft, lora"},
    }[preset]
    assert contenders(rows, "forward") == expected
    # PEFT does not train several adapters in one batch.
    assert contenders(rows, "step") == expected - ({"peft"} if preset == "adapters" else set())
    assert all(row.suite == "shared" and row.value > 0 for row in rows)
    assert all(row.auto == (True if row.contender == "ours" else None) for row in rows)


def test_a_wrong_result_of_ours_is_an_error(monkeypatch):
    right = shared.mixed_lora_linear
    monkeypatch.setattr(shared, "mixed_lora_linear", lambda *a: right(*a) * 1.01)
    with pytest.raises(RuntimeError, match="ours: dx is off"):
        measured("adapters", "float32", {})


def test_a_wrong_result_of_a_rival_is_left_out(monkeypatch):
    right = shared._peft_adapters

    def wrong(*operands):
        built = right(*operands)
        return replace(built, function=lambda x: (1.01 * built.function(x)[0],))

    monkeypatch.setattr(shared, "_peft_adapters", wrong)
    left_out = {}
    rows = measured("adapters", "float32", left_out)
    assert "peft" not in contenders(rows, "forward") and "ours" in contenders(rows, "forward")
    ((what, reason),) = left_out.items()
    assert what.endswith(": peft") and "is off by" in reason


def test_the_command_writes_a_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(machine, "ceilings", lambda *a: {})
    arguments = ["bench", "--preset", "adapters", "--device", "cpu", "--dtype", "float32"]
    arguments += ["--seconds", "0.01", "--rounds", "3", "--output", str(tmp_path)]
    assert main(arguments) == 0
    assert "3 adapters, 6x2" in capsys.readouterr().out
    (file,) = tmp_path.glob("*.json")
    assert {row["suite"] for row in json.loads(file.read_text())["rows"]} == {"shared"}
