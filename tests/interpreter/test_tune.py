"""`tune` up to the launch and through it: the candidates run in the interpreter, only their times are made up."""

from __future__ import annotations

import pytest
import torch

from lora_kernels.backends import triton as backend_module
from lora_kernels.backends.triton import lowrank_matmul as kernel
from lora_kernels.bench.tiles import Product
from lora_kernels.cli import tune as command
from lora_kernels.problem import Problem
from lora_kernels.tuning import select as selection
from lora_kernels.tuning import tables
from lora_kernels.tuning.select import Choice
from lora_kernels.tuning.targets import TARGETS
from tests.interpreter.conftest import on_target

PROBLEM = Problem(16, 40, 72, 5, "float32", "float32", "cuda")


class StoppedClock:
    """Every call takes a microsecond and is not run."""

    def time_us(self, call, inner):
        return 1.0


@pytest.fixture(autouse=True)
def _target(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path))
    on_target(monkeypatch, "sm_80")
    selection._select.cache_clear()
    yield
    selection._select.cache_clear()


def test_candidates_are_right_and_become_the_table():
    problems = [PROBLEM, Problem(16, 72, 40, 5, "float32", "float32", "cuda", w_k_major=False)]
    entries, told, failures = command.tune(
        problems, TARGETS["sm_80"], 0.01, device="cpu", clock=StoppedClock()
    )
    assert failures == [] and {each["us"] for each in told} == {1.0}
    assert [entry.problem for entry in entries] == problems
    assert {each["algorithm"] for each in told} == {"two_kernel", "one_pass", "decode", "aten"}
    tables.save(entries, TARGETS["sm_80"])
    x, w, a, b = torch.randn(9, 72), torch.randn(40, 72).t(), torch.randn(72, 5), torch.randn(5, 40)
    y, _ = backend_module.BACKEND.lowrank_matmul(x, w, a, b, 0.5)
    torch.testing.assert_close(y, x @ w + 0.5 * (x @ a @ b))
    assert selection.select(PROBLEM, TARGETS["sm_80"]).source == "tuned"


def test_a_wrong_candidate_does_not_count(monkeypatch):
    right = kernel.lowrank_matmul
    broken = selection.candidates("lowrank_matmul", PROBLEM, TARGETS["sm_80"])[0]

    def lowrank_matmul(x, w, s, b, bias, config, *rest, **more):
        y = right(x, w, s, b, bias, config, *rest, **more)
        return y + 0.01 if config == broken else y

    monkeypatch.setattr(kernel, "lowrank_matmul", lowrank_matmul)
    product = Product(PROBLEM, "cpu")
    shrink = selection.candidates("shrink", PROBLEM, TARGETS["sm_80"])[0]
    found = product.measure(
        [Choice("two_kernel", "search", (shrink, broken)), Choice("aten", "search", ())],
        _effort(),
        StoppedClock(),
    )
    assert found[0].startswith("off by") and found[1] == 1.0


def test_a_candidate_that_raises_does_not_count(monkeypatch):
    def lowrank_matmul(*args, **more):
        raise RuntimeError("out of resource: shared memory\nmore")

    monkeypatch.setattr(kernel, "lowrank_matmul", lowrank_matmul)
    entries, told, failures = command.tune(
        [PROBLEM], TARGETS["sm_80"], 0.01, device="cpu", clock=StoppedClock()
    )
    assert {each["algorithm"] for each in told if each["failure"]} == {"two_kernel"}
    assert failures and all("RuntimeError: out of resource: shared memory" in f for f in failures)
    assert "lowrank_matmul" not in {config.kernel for config in entries[0].configs}


def _effort():
    from lora_kernels.bench.linear import Effort

    return Effort(0.01, (1, 1))
