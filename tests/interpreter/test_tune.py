"""`tune` up to the launch and through it: the candidates run in the interpreter, only their times are made up."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from lora_kernels import backends, plan
from lora_kernels.backends import cuda
from lora_kernels.backends import triton as backend_module
from lora_kernels.backends.triton import configs
from lora_kernels.backends.triton import expand as kernel
from lora_kernels.backends.triton import products as products_module
from lora_kernels.backends.triton import shrink as shrink_module
from lora_kernels.backends.triton import shrink_wgrad as shrink_wgrad_module
from lora_kernels.backends.triton import wgrad as wgrad_module
from lora_kernels.bench import tiles as tiles_module
from lora_kernels.bench.linear import Effort
from lora_kernels.bench.tiles import Product
from lora_kernels.cli import tune as command
from lora_kernels.operands import Adapter
from lora_kernels.problem import Problem
from lora_kernels.tuning import tables
from lora_kernels.tuning.config import LOWRANK_KERNELS, TileConfig
from lora_kernels.tuning.search import Choice
from lora_kernels.tuning.tables import Entry, lowrank
from lora_kernels.tuning.targets import TARGETS
from tests.interpreter.conftest import on_target
from tests.planned import Planned

# Of Triton's algorithms, what sm_80 has for float32: tensor copies fetch for persistent, one_launch hands on bfloat16.
ALGORITHMS = set(configs.ALGORITHMS) - {"persistent", "one_launch", "persistent_one_launch"}
ONE_READING_PAYS = products_module.one_reading_pays
PROBLEM = Problem(16, 40, 72, 5, "float32", "float32", "cuda")


class StoppedClock:
    """Every call takes a microsecond and is not run."""

    def time_us(self, call, inner):
        return 1.0


def tune(*problems: Problem, **own):
    """(entries, what was told, failures) of `tune` on sm_80."""
    return command.tune(problems, TARGETS["sm_80"], 0.01, device="cpu", clock=StoppedClock(), **own)


@pytest.fixture(autouse=True)
def _target(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path))
    on_target(monkeypatch, "sm_80")
    monkeypatch.setattr(tiles_module, "current_target", lambda: TARGETS["sm_80"])
    yield
    plan.forget()


def test_candidates_are_right_and_become_the_table():
    problems = [PROBLEM, Problem(16, 72, 40, 5, "float32", "float32", "cuda", w_k_major=False)]
    kept = []
    keep = lambda entries, told: kept.append((len(entries), len(told)))  # noqa: E731
    entries, told, failures = tune(*problems, keep=keep)
    assert [count for count, _ in kept] == [1, 2, 3, 4] and kept[-1][1] == len(told)
    assert failures == [] and {each["us"] for each in told} == {1.0}
    assert [entry.problem for entry in entries] == [*problems, *map(lowrank, problems)]
    assert {each["algorithm"] for each in told} == {*ALGORITHMS, *LOWRANK_KERNELS, "eager"}
    tables.save(entries, TARGETS["sm_80"])
    x, w, a, b = torch.randn(9, 72), torch.randn(40, 72).t(), torch.randn(72, 5), torch.randn(5, 40)
    products = Planned(backend_module.BACKEND, TARGETS["sm_80"])
    y, _ = products.shrink_expand(x, w, Adapter(a, b, 0.5))
    torch.testing.assert_close(y, x @ w + 0.5 * (x @ a @ b))
    for candidate in backend_module.BACKEND.candidates(PROBLEM, TARGETS["sm_80"]):
        assert candidate.measured_us == (1.0 if candidate.name in ALGORITHMS else None)


def test_a_wrong_candidate_does_not_count(monkeypatch):
    right = kernel.expand
    broken = configs.tiles_of("expand", PROBLEM, TARGETS["sm_80"])[0]

    def expand(x, w, s, b, bias, config, *rest, **more):
        y = right(x, w, s, b, bias, config, *rest, **more)
        return y + 0.01 if config == broken else y

    monkeypatch.setattr(kernel, "expand", expand)
    product = Product(PROBLEM, "cpu")
    assert product.wrong(Choice("eager")) is None
    shrink = configs.tiles_of("shrink", PROBLEM, TARGETS["sm_80"])[0]
    choices = [Choice.of("two_kernel", shrink, broken), Choice("eager")]
    found = product.measure(choices, Effort(0.01, (1, 1)), StoppedClock())
    assert found[0].startswith("the result is off by") and found[1] == 1.0


def test_the_backward_takes_the_lowrank_kernels_that_were_found(monkeypatch):
    """Its launchers get the table's tiles, and both products of dy come from one reading where that was faster."""
    problem = Problem(512, 64, 256, 5, "float32", "float32", "cuda")
    target = TARGETS["sm_80"]
    tiles = {k: configs.tiles_of(k, lowrank(problem), target)[0] for k in LOWRANK_KERNELS}
    wanted = {
        k: replace(tiles[k], split=s) for k, s in zip(LOWRANK_KERNELS, (4, 2, 8), strict=True)
    }
    assert not any(wanted[kernel] == tiles[kernel] for kernel in LOWRANK_KERNELS)
    seen = {}

    def watched(kernel, real):
        def launcher(*args, **more):
            (config,) = (each for each in args if isinstance(each, TileConfig))
            seen[kernel] = config
            return real(*args, **more)

        return launcher

    for module in (shrink_module, wgrad_module, shrink_wgrad_module):
        name = module.__name__.rpartition(".")[2]
        monkeypatch.setattr(module, name, watched(name, getattr(module, name)))
    monkeypatch.setattr(products_module, "one_reading_pays", ONE_READING_PAYS)
    x, dy = torch.randn(400, 256), torch.randn(400, 256)
    b, s = torch.randn(5, 256), torch.randn(400, 5)
    two = {"shrink": 2.0, "wgrad": 2.0}
    for times, kernels in (
        (two | {"shrink_wgrad": 1.0}, {"shrink_wgrad"}),
        (two | {"shrink_wgrad": 5.0}, {"shrink", "wgrad"}),
        (two, {"shrink", "wgrad"}),  # shrink_wgrad was wrong
        ({"shrink_wgrad": 5.0}, {"shrink_wgrad"}),
    ):
        tables.save([Entry(lowrank(problem), times, tuple(wanted.values()))], target)
        seen.clear()
        products = Planned(backend_module.BACKEND, target)
        q, dB = products.shrink_wgrad(dy, Adapter(b.t(), b, 0.5), s, torch.float32)
        assert seen == {kernel: wanted[kernel] for kernel in kernels}
        torch.testing.assert_close(q, 0.5 * dy @ b.t())
        torch.testing.assert_close(dB, s.t() @ dy, rtol=1e-5, atol=1e-4)
        dA = products.wgrad(x, q, torch.float32)
        assert seen["wgrad"] == wanted["wgrad"]
        torch.testing.assert_close(dA, x.t() @ q, rtol=1e-5, atol=1e-3)


def test_a_wrong_lowrank_kernel_does_not_count(monkeypatch):
    real = shrink_wgrad_module.shrink_wgrad
    wrong = lambda *args: (lambda q, dB, *rest: (q, dB + 0.01, *rest))(*real(*args))  # noqa: E731
    monkeypatch.setattr(shrink_wgrad_module, "shrink_wgrad", wrong)
    entries, told, failures = tune(PROBLEM)
    assert {each["algorithm"] for each in told if each["failure"]} == {"shrink_wgrad"}
    assert failures and all("off by" in failure for failure in failures)
    assert entries[1].times.keys() == {"shrink", "wgrad"}


def test_the_cuda_kernel_is_timed_where_it_is_usable(monkeypatch):
    monkeypatch.setattr(cuda.CudaBackend, "unavailable", lambda self: None)
    eager = backends.get("eager").candidates(PROBLEM, None)[0].products
    monkeypatch.setattr(cuda, "PRODUCTS", eager)
    problems = [PROBLEM, replace(PROBLEM, M=64)]
    entries, _, failures = tune(*problems)
    assert not failures
    assert ["cuda_decode" in entry.times for entry in entries[:2]] == [True, False]
    wrong = SimpleNamespace(shrink_expand=lambda x, w, adapter: (x @ w + 0.01, None))
    monkeypatch.setattr(cuda, "PRODUCTS", wrong)
    entries, _, failures = tune(PROBLEM)
    assert "cuda_decode" not in entries[0].times and "cuda_decode: not counted" in failures[0]


def test_a_candidate_that_raises_does_not_count(monkeypatch):
    def expand(*args, **more):
        raise RuntimeError("out of resource: shared memory\nmore")

    monkeypatch.setattr(kernel, "expand", expand)
    entries, told, failures = tune(PROBLEM)
    assert {each["algorithm"] for each in told if each["failure"]} == {"two_kernel"}
    assert failures and all("RuntimeError: out of resource: shared memory" in f for f in failures)
    assert "expand" not in {config.kernel for config in entries[0].configs}


def test_a_format_is_timed_as_a_call_computes_it():
    """Triton's algorithms over the packed weight, eager over a dense copy that is made within the time."""
    problem = replace(PROBLEM, K=64, weight_format="nf4")
    entries, _, failures = tune(problem)
    assert not failures
    assert entries[0].times.keys() == {*ALGORITHMS, "eager"}
    assert "dequantise" in {config.kernel for config in entries[0].configs}
    tables.save(entries, TARGETS["sm_80"])
    assert tables.lookup(problem, TARGETS["sm_80"]).times == entries[0].times
    assert tables.lookup(replace(problem, weight_format="dense"), TARGETS["sm_80"]) is None
    made = []
    w = Product(problem, "cpu")
    w.w = SimpleNamespace(dense=lambda: made.append(1) or w.operands[1])
    w.call(Choice("eager"))()
    assert made == [1]
