"""The choice of a backend: preference, force, strictness, environment, and a reason for each that is left out."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch

from lora_kernels import Problem, dispatch, explain, lora_linear, use_backend
from lora_kernels.backends.eager import EagerBackend
from tests.test_functional import operands

PROBLEM = Problem(9, 7, 6, 3, "float32", "float32")


class Fake(EagerBackend):
    """A backend that says what a test wants and counts its products."""

    def __init__(self, name, unavailable=None, declines=None, slower=None):
        self.name, self._says = name, (unavailable, declines, slower)
        self.products = 0

    def unavailable(self):
        return self._says[0]

    def declines(self, problem):
        return self._says[1]

    def slower(self, problem, usable=()):
        self.usable = usable
        return self._says[2]

    def expand(self, *args, **kwargs):
        self.products += 1
        return super().expand(*args, **kwargs)


@pytest.fixture
def install(monkeypatch):
    """install(fake): `fake` is the backend of its name within the test."""
    real = dispatch.get
    fakes = {}
    monkeypatch.setattr(dispatch, "get", lambda name: fakes.get(name) or real(name))
    monkeypatch.delenv("LORA_KERNELS_BACKEND", raising=False)
    dispatch._backend.cache_clear()
    yield lambda fake: fakes.setdefault(fake.name, fake)
    dispatch._backend.cache_clear()


def call(**options):
    x, weight, A, B, bias = operands()
    return lora_linear(x, weight, A, B, 1.0, bias, **options)


def test_the_first_that_can_computes_forward_and_backward(install):
    cpu = install(Fake("cpu"))
    call().sum().backward()
    assert cpu.products == 2
    assert explain(PROBLEM).backend == "cpu"
    assert explain(PROBLEM).rejected["eager"] == "cpu comes first"


@pytest.mark.parametrize("why", ["unavailable", "declines", "slower"])
def test_auto_goes_on_and_says_why(install, why):
    cpu = install(Fake("cpu", **{why: "it rains"}))
    call()
    told = explain(PROBLEM)
    assert cpu.products == 0 and told.backend == "eager" and told.rejected["cpu"] == "it rains"
    assert "cpu: it rains" in str(told)


@pytest.mark.parametrize("why", ["unavailable", "declines"])
def test_an_explicit_choice_never_falls_back(install, why):
    install(Fake("cpu", **{why: "it rains"}))
    for attempt in (lambda: call(backend="cpu"), lambda: explain(PROBLEM, backend="cpu")):
        with pytest.raises(
            RuntimeError, match=r"'cpu' was asked for and cannot compute .*: it rains"
        ):
            attempt()
    with use_backend("cpu"), pytest.raises(RuntimeError, match="it rains"):
        call()


def test_an_explicit_choice_may_be_slower(install):
    cpu = install(Fake("cpu", slower="ATen is faster"))
    call(backend="cpu")
    assert cpu.products == 1


def test_a_backend_of_another_device_is_refused():
    with pytest.raises(RuntimeError, match="runs on cuda tensors only, not on cpu"):
        call(backend="triton")


def test_strict_refuses_what_auto_would_let_pass(install):
    install(Fake("cpu", declines="it rains"))
    with (
        use_backend("auto", strict=True),
        pytest.raises(RuntimeError, match=r"strict: cpu cannot .* it rains"),
    ):
        call()
    call()


def test_strict_lets_the_second_of_our_own_compute(install, monkeypatch):
    monkeypatch.setattr(dispatch, "_PREFERENCE", {"cpu": ("cuda", "cpu", "eager")})
    install(Fake("cuda", declines="too many rows"))
    cpu = install(Fake("cpu"))
    with use_backend("auto", strict=True):
        call()
    assert cpu.products == 1


def test_the_innermost_block_counts_and_ends_after_an_error(install):
    cpu = install(Fake("cpu"))
    with use_backend("cpu"):
        with use_backend("eager"):
            call()
        assert cpu.products == 0
        call()
    assert cpu.products == 1
    with pytest.raises(ZeroDivisionError), use_backend("eager"):
        raise ZeroDivisionError
    assert explain(PROBLEM).backend == "cpu"


def test_a_calls_own_word_goes_before_the_blocks(install):
    cpu = install(Fake("cpu"))
    with use_backend("eager"):
        call(backend="cpu")
    assert cpu.products == 1


def test_backward_takes_the_forwards_word(install):
    cpu = install(Fake("cpu"))
    y = call(backend="eager")
    y.sum().backward()
    assert cpu.products == 0


def test_a_block_holds_for_autograds_and_other_threads(install):
    cpu = install(Fake("cpu"))
    with use_backend("eager"):
        thread = threading.Thread(target=lambda: call().sum().backward())
        thread.start()
        thread.join()
    assert cpu.products == 0


def test_the_environment_names_what_auto_means(install, monkeypatch):
    cpu = install(Fake("cpu"))
    monkeypatch.setenv("LORA_KERNELS_BACKEND", "eager")
    call()
    assert cpu.products == 0 and explain(PROBLEM).backend == "eager"
    monkeypatch.setenv("LORA_KERNELS_BACKEND", "fpga")
    with pytest.raises(ValueError, match=r"^LORA_KERNELS_BACKEND must be one of .* got 'fpga'"):
        call()


def test_a_block_of_auto_leaves_the_environments_word(install, monkeypatch):
    cpu = install(Fake("cpu"))
    monkeypatch.setenv("LORA_KERNELS_BACKEND", "eager")
    with use_backend("cpu"), use_backend("auto"):
        call()
    assert cpu.products == 0


def test_explain_describes_the_call(install):
    """The sizes, the types, the layout of the weight and the dropout are those that the call hands to the choice."""
    seen = []
    cpu = install(Fake("cpu"))
    cpu.declines = lambda problem: seen.append(problem)
    x, weight, A, B, bias = (t.detach() for t in operands(lead=(2, 5), dtype=torch.bfloat16))
    transposed = weight.t().contiguous().t()
    for operand, adapters, options in (
        (weight, torch.bfloat16, {}),
        (transposed, torch.float32, {"dropout_p": 0.5}),
        (weight, torch.float64, {"bias": bias}),
    ):
        args = (x, operand, A.to(adapters), B.to(adapters), 1.0)
        seen.clear()
        dispatch._backend.cache_clear()
        lora_linear(*args, **options)
        (called,) = seen
        assert explain(*args, **options).problem == called
        assert (called.M, called.N, called.K, called.R) == (10, 7, 6, 3)
        assert called.w_k_major == (operand is weight)
        assert called.dropout == ("dropout_p" in options) and called.bias == ("bias" in options)
        assert called.adapter_dtype == ("float32" if adapters == torch.float32 else "bfloat16")


def test_a_compiled_backward_takes_the_forwards_word(install):
    cpu = install(Fake("cpu"))
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *t: lora_linear(*t[:4], 1.0, backend="eager"), backend="aot_eager"
    )
    compiled(*operands()).sum().backward()
    assert cpu.products == 0


def test_unknown_names_are_refused_before_anything_runs():
    with pytest.raises(ValueError, match="got 'gpu'"), use_backend("gpu"):
        raise AssertionError("the block must not run")
    with pytest.raises(ValueError, match="got 'gpu'"):
        explain(PROBLEM, backend="gpu")


class TestGPU:
    """Device choices, made with numbers alone."""

    problem = Problem(64, 64, 64, 8, "bfloat16", "bfloat16", device="cuda")

    @pytest.fixture
    def gpu(self, install, monkeypatch):
        from lora_kernels import selftest

        monkeypatch.setattr(selftest, "trusted", lambda backend, device: None)
        install(Fake("cuda", unavailable="the extension is not built"))
        return install(Fake("triton"))

    def test_triton_when_there_is_no_extension(self, gpu):
        told = explain(self.problem)
        assert told.backend == "triton" and told.rejected["cuda"] == "the extension is not built"
        assert "cpu tensors only" in told.rejected["cpu"]

    def test_a_backend_that_failed_its_self_test_is_not_used(self, gpu, monkeypatch):
        from lora_kernels import selftest

        monkeypatch.setattr(selftest, "trusted", lambda backend, device: "dA is off by 3.0")
        dispatch._backend.cache_clear()
        told = explain(self.problem)
        assert told.backend == "eager" and told.rejected["triton"] == "dA is off by 3.0"
        with pytest.raises(RuntimeError, match="dA is off"):
            explain(self.problem, backend="triton")

    def test_a_choice_made_while_a_graph_is_captured_is_not_remembered(self, gpu, monkeypatch):
        """A backend that could not be tested then is tested and taken later."""
        from lora_kernels import selftest

        facts = ("auto", False, torch.device("cuda"), 1, 8, 8, 8, 2, torch.float32, torch.float32)
        facts += (False, False, True, False)
        monkeypatch.setattr(selftest, "trusted", lambda backend, device: selftest.NOT_NOW)
        assert dispatch._remembered(*facts).name == "eager"
        monkeypatch.setattr(selftest, "trusted", lambda backend, device: None)
        assert dispatch._remembered(*facts) is gpu

    def test_the_choice_is_made_on_the_tensors_device(self, gpu, monkeypatch):
        """A backend asks the current device what it is: while it is asked, that is the operands' one."""
        current = [0]

        class Entered:
            def __init__(self, device):
                self.index = torch.device(device).index

            def __enter__(self):
                current.append(self.index)

            def __exit__(self, *error):
                current.pop()

        monkeypatch.setattr(torch.cuda, "device", Entered)
        seen = []
        gpu.declines = lambda problem: seen.append(current[-1])
        gpu.slower = lambda problem, usable: seen.append(current[-1])
        gpu.plan = lambda problem: seen.append(current[-1]) or ""
        device = torch.device("cuda", 1)
        assert dispatch._choose("auto", False, self.problem, device).backend == "triton"
        assert dispatch._choose("triton", False, self.problem, device).backend == "triton"
        assert set(seen) == {1} and len(seen) == 5 and current == [0]

    def test_who_is_asked_whether_it_is_slower_knows_who_else_is_usable(self, gpu):
        gpu._says = (None, "too old", None)
        told = explain(self.problem)
        assert told.backend == "eager" and told.rejected["triton"] == "too old"
        dispatch._backend.cache_clear()
        gpu._says = (None, None, None)
        explain(self.problem)
        assert gpu.usable == ("triton", "eager")

    def test_a_gpu_problem_without_a_gpu(self, monkeypatch):
        """`explain` answers on any machine."""
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        dispatch._backend.cache_clear()
        told = explain(self.problem)
        assert told.backend == "eager" and told.rejected["triton"] in (
            "PyTorch finds no GPU",
            "triton is not installed",
        )
        dispatch._backend.cache_clear()


class TestTritonOrCUDA:
    """Both GPU backends can compute it: one table, one cost model, one decision."""

    problem = Problem(8, 4096, 4096, 16, "bfloat16", "bfloat16", device="cuda")

    @pytest.fixture(autouse=True)
    def gpu(self, monkeypatch, tmp_path):
        from lora_kernels import selftest
        from lora_kernels.backends import cuda, triton
        from lora_kernels.tuning.select import _select
        from lora_kernels.tuning.targets import TARGETS

        monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path))
        monkeypatch.delenv("LORA_KERNELS_BACKEND", raising=False)
        monkeypatch.setattr(selftest, "trusted", lambda backend, device: None)
        for module in (cuda, triton):
            monkeypatch.setattr(module, "current_target", lambda *device: TARGETS["sm_90"])
        monkeypatch.setattr(cuda.CudaBackend, "unavailable", lambda self: None)
        monkeypatch.setattr(triton.TritonBackend, "unavailable", lambda self: None)
        for cache in (dispatch._backend, _select):
            cache.cache_clear()
        yield
        for cache in (dispatch._backend, _select):
            cache.cache_clear()

    def tuned(self, **times):
        from lora_kernels.tuning import tables
        from lora_kernels.tuning.targets import TARGETS

        problem = Problem(16, 4096, 4096, 16, "bfloat16", "bfloat16", device="cuda")
        tables.save([tables.Entry(problem, times, ())], TARGETS["sm_90"])

    def test_by_prediction(self):
        told = explain(self.problem)
        assert told.backend == "triton" and "predicted: decode" in told.plan
        assert told.rejected["cuda"].startswith("decode is predicted faster: ")

    @pytest.mark.parametrize(
        "faster, backend", [("cuda_decode", "cuda"), ("decode", "triton"), ("aten", "eager")]
    )
    def test_by_measurement(self, faster, backend):
        times = {"decode": 12.0, "cuda_decode": 12.5, "two_kernel": 20.0, "aten": 18.0}
        self.tuned(**times | {faster: 11.0})
        told = explain(self.problem)
        assert told.backend == backend
        assert backend == "eager" or f"measured: {faster} 11.0 us" in told.plan
        name = "ATen" if faster == "aten" else faster
        if backend != "cuda":
            assert told.rejected["cuda"] == f"{name} is measured faster: 11.0 us, not 12.5 us"
        if backend == "eager":
            assert told.rejected["triton"] == "ATen is measured faster: 11.0 us, not 12.0 us"

    def test_without_triton_its_kernels_do_not_count(self, monkeypatch):
        from lora_kernels.backends import triton

        self.tuned(decode=11.0, cuda_decode=12.0, aten=18.0)
        monkeypatch.setattr(triton.TritonBackend, "unavailable", lambda self: "it rains")
        told = explain(self.problem)
        assert told.backend == "cuda" and told.rejected["triton"] == "it rains"


def test_problem_counts():
    problem = Problem(128, 512, 256, 8, "bfloat16", "float32", bias=True)
    assert problem.flops == 2 * 128 * 512 * 256
    assert problem.lowrank_flops == 2 * 128 * 8 * (256 + 512)
    assert problem.frozen_bytes == 2 * (128 * 256 + 256 * 512 + 128 * 512 + 512)
    assert problem.lowrank_bytes == 4 * 8 * (256 + 512) + 2 * 4 * 128 * 8
    back = problem.adjoint()
    assert (back.N, back.K, back.bias, back.w_k_major) == (256, 512, False, False)
    assert back.adjoint().flops == problem.flops and not problem.empty
    assert Problem(0, 1, 1, 1, "float32", "float32").empty


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"M": 10**23}, ValueError, r"M must be in \[0, 2\^63\), got 100000000000000000000000$"),
        ({"N": 2**63}, ValueError, "N must be in"),
        ({"K": -1}, ValueError, r"K must be in .*, got -1"),
        ({"R": 8.0}, TypeError, "R must be an integer, got float"),
        ({"R": True}, TypeError, "R must be an integer, got bool"),
        ({"dtype": "int8"}, ValueError, "^dtype must be one of .*, got 'int8'"),
        ({"adapter_dtype": "int8"}, ValueError, "adapter_dtype must be one of .*, got 'int8'"),
        ({"device": "cuda:0"}, ValueError, "device must be a torch device type .*, got 'cuda:0'"),
        ({"device": "toaster"}, ValueError, "device must be a torch device type, got 'toaster'"),
    ],
    ids=str,
)
def test_a_problem_that_cannot_be_is_refused(change, error, message):
    with pytest.raises(error, match=message):
        explain(replace(PROBLEM, **change))


def test_the_largest_problem_is_one():
    assert explain(replace(PROBLEM, M=2**63 - 1)).backend


def test_choices_do_not_depend_on_values_or_layout_of_x():
    """A choice is made from a problem, which holds sizes and types alone."""
    x, weight, A, B, _ = (t.detach() for t in operands())
    first = explain(x, weight, A, B, 1.0)
    second = explain(torch.full_like(x, float("nan")).t().contiguous().t(), weight, A, B, 1.0)
    assert first == second
