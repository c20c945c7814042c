"""The choice of a backend: preference, force, strictness, environment, and a reason for each that is left out."""

from __future__ import annotations

import functools
import re
import threading
from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lora_kernels import (
    LinearWithLoRA,
    Problem,
    backends,
    explain,
    lora_linear,
    plan,
    selftest,
    use_backend,
)
from lora_kernels.backends.base import Candidate
from lora_kernels.backends.eager import EagerBackend, EagerProducts
from lora_kernels.backends.triton import configs
from lora_kernels.backends.triton.configs import tiles_of
from lora_kernels.dropout import Dropout, scaled_mask
from lora_kernels.tuning import tables
from lora_kernels.tuning.targets import TARGETS
from tests import toy_backend
from tests.oracle import assert_bits, check_function, reference, saved_inside, with_gradients
from tests.test_functional import operands
from tests.toy_format import Int8Rows

PROBLEM = Problem(9, 7, 6, 3, "float32", "float32")


class Counted(EagerProducts):
    """Eager's products, with a count of the large ones."""

    count = 0

    def expand(self, *args, **kwargs):
        self.count += 1
        return super().expand(*args, **kwargs)


class Fake(EagerBackend):
    """A backend that says what a test wants and counts its products."""

    def __init__(self, name, unavailable=None, refusal=None, slower=None):
        self.name, self.why_not = name, unavailable
        self.candidate = Candidate(name, Counted(), refusal, slower)

    @property
    def products(self):
        return self.candidate.products.count

    def unavailable(self):
        return self.why_not

    def candidates(self, problem, target):
        return [self.candidate]


@pytest.fixture(autouse=True)
def _no_choice_of_before(monkeypatch):
    """Neither the environment nor an earlier plan has a say."""
    monkeypatch.delenv("LORA_KERNELS_BACKEND", raising=False)
    plan.forget()
    yield
    plan.forget()


@pytest.fixture
def install(monkeypatch):
    """install(fake): `fake` is the backend of its name within the test."""
    real = backends.get
    fakes = {}
    monkeypatch.setattr(backends, "get", lambda name: fakes.get(name) or real(name))
    return lambda fake: fakes.setdefault(fake.name, fake)


def call(**options):
    x, weight, A, B, bias = operands()
    return lora_linear(x, weight, A, B, 1.0, bias, **options)


def test_the_first_that_can_computes_forward_and_backward(install):
    cpu = install(Fake("cpu"))
    call().sum().backward()
    assert cpu.products == 2
    assert explain(PROBLEM).backend == "cpu"
    assert explain(PROBLEM).rejected["eager"] == "cpu comes first"


@pytest.mark.parametrize("why", ["unavailable", "refusal", "slower"])
def test_auto_goes_on_and_says_why(install, why):
    cpu = install(Fake("cpu", **{why: "it rains"}))
    call()
    told = explain(PROBLEM)
    assert cpu.products == 0 and told.backend == "eager" and told.rejected["cpu"] == "it rains"
    assert "cpu: it rains" in str(told)


@pytest.mark.parametrize("why", ["unavailable", "refusal"])
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
    install(Fake("cpu", refusal="it rains"))
    with (
        use_backend("auto", strict=True),
        pytest.raises(RuntimeError, match=r"strict: cpu cannot .* it rains"),
    ):
        call()
    call()


def test_strict_lets_eager_compute_where_no_other_backend_runs_at_all():
    with use_backend("auto", strict=True):
        assert explain(replace(PROBLEM, device="meta")).backend == "eager"


def test_strict_lets_the_second_of_our_own_compute(install):
    install(Fake("cuda", refusal="too many rows"))
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


def test_blocks_of_threads_need_not_nest(install):
    install(Fake("cpu"))
    first, second = use_backend("eager"), use_backend("cpu")
    with ExitStack() as later:
        first.__enter__()
        later.enter_context(second)
        first.__exit__(None, None, None)
        assert explain(PROBLEM).backend == "cpu"
    with use_backend("eager"):
        assert explain(PROBLEM).backend == "eager"
    assert explain(PROBLEM).backend == "cpu"  # the fastest again


def test_a_calls_own_word_goes_before_the_blocks_and_holds_for_its_backward(install):
    cpu = install(Fake("cpu"))
    with use_backend("eager"):
        y = call(backend="cpu")
    assert cpu.products == 1
    y.sum().backward()
    assert cpu.products == 2
    call(backend="eager").sum().backward()
    assert cpu.products == 2


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
    with use_backend("cpu"), use_backend("auto"):
        call()
    assert cpu.products == 0 and explain(PROBLEM).backend == "eager"
    monkeypatch.setenv("LORA_KERNELS_BACKEND", "fpga")
    with pytest.raises(ValueError, match=r"^LORA_KERNELS_BACKEND must be one of .* got 'fpga'"):
        call()


def test_explain_describes_the_call(install):
    """The sizes, the types, the layout of the weight and the dropout are those that the call hands to the choice."""
    seen = []
    cpu = install(Fake("cpu"))
    cpu.candidates = lambda problem, target: seen.append(problem) or [cpu.candidate]
    x, weight, A, B, bias = (t.detach() for t in operands(lead=(2, 5), dtype=torch.bfloat16))
    transposed = weight.t().contiguous().t()
    for operand, adapters, options in (
        (weight, torch.bfloat16, {}),
        (transposed, torch.float32, {"dropout_p": 0.5}),
        (weight, torch.float64, {"bias": bias}),
    ):
        args = (x, operand, A.to(adapters), B.to(adapters), 1.0)
        seen.clear()
        plan.forget()
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
        monkeypatch.setattr(selftest, "trusted", lambda backend, device: None)
        install(Fake("cuda", unavailable="the extension is not built"))
        return install(Fake("triton"))

    def test_a_backend_that_failed_its_self_test_is_not_used(self, gpu, monkeypatch):
        monkeypatch.setattr(selftest, "trusted", lambda backend, device: "dA is off by 3.0")
        plan.forget()
        told = explain(self.problem)
        assert told.backend == "eager" and told.rejected["triton"] == "dA is off by 3.0"
        with pytest.raises(RuntimeError, match="dA is off"):
            explain(self.problem, backend="triton")

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

        seen = []

        def watched(function):
            return lambda *args: seen.append(current[-1]) or function(*args)

        monkeypatch.setattr(torch.cuda, "device", Entered)
        for asked in ("unavailable", "candidates"):
            setattr(gpu, asked, watched(getattr(gpu, asked)))
        monkeypatch.setattr(plan, "current_target", watched(lambda: TARGETS["sm_90"]))
        monkeypatch.setattr(selftest, "trusted", watched(lambda backend, device: None))
        device = torch.device("cuda", 1)
        for name in ("auto", "triton"):
            assert plan.make_plan(self.problem, device, (name, False)).backend == "triton"
        assert seen == [1] * 8 and current == [0]

    def test_what_can_run_is_compared_and_nothing_else(self, gpu):
        told = explain(self.problem)
        assert told.backend == "triton" and told.rejected["cuda"] == "the extension is not built"
        assert "cpu tensors only" in told.rejected["cpu"]
        assert [candidate.name for candidate in told.compared] == ["triton", "eager"]
        gpu.candidate = replace(gpu.candidate, refusal="too old")
        told = explain(self.problem)
        assert told.backend == "eager" and told.rejected["triton"] == "too old"
        assert [candidate.name for candidate in told.compared] == ["eager"]

    def test_a_gpu_problem_without_a_gpu(self, monkeypatch):
        """`explain` answers on any machine."""
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        told = explain(self.problem)
        why = "PyTorch finds no GPU", "triton is not installed"
        assert told.backend == "eager" and told.rejected["triton"] in why


@pytest.mark.usefixtures("machine")
class TestTritonOrCUDA:
    """Both GPU backends can compute it: one table, one cost model, one decision."""

    problem = Problem(8, 4096, 4096, 16, "bfloat16", "bfloat16", device="cuda")

    def tuned(self, M=16, **times):
        problem = Problem(M, 4096, 4096, 16, "bfloat16", "bfloat16", device="cuda")
        tables.save([tables.Entry(problem, times, ())], TARGETS["sm_90"])

    def test_the_persistent_product_where_tune_has_timed_it(self, machine, monkeypatch):
        """By prediction it is never taken, and `explain` says why: with this Triton, on this GPU, for these sizes."""
        monkeypatch.setattr(configs, "untried", lambda *_: None)
        large = replace(self.problem, M=4096)
        never_timed = (
            "triton, persistent: it is taken where `tune` has timed it: Gluon is experimental"
        )
        told = explain(large)
        assert told.candidate.name == "two_kernel" and "persistent 1" in told.plan
        assert never_timed in str(told).splitlines()
        self.tuned(M=4096, two_kernel=20.0, persistent=19.0, eager=21.0)
        told = explain(large)
        assert told.candidate.name == "persistent" and "persistent" not in told.passed_over
        assert told.plan.startswith(
            "persistent, persistent 128x256x64 w8 s3 tma, measured: persistent"
        )
        self.tuned(M=4096, two_kernel=20.0, eager=21.0)  # it was wrong there
        assert explain(large).candidate.name == "two_kernel"
        masked = replace(large, dropout=True)
        assert explain(masked).passed_over["persistent"] == never_timed.partition("persistent: ")[2]
        self.tuned(M=4096, two_kernel=20.0, persistent=19.0, one_launch=18.0, eager=21.0)
        told = explain(masked)  # `tune` computes it with a mask, and times it without
        assert "persistent" not in told.passed_over and "measured" not in told.plan
        assert "its programs wait" in told.passed_over["one_launch"]
        for change, reason in (
            ({"N": 4100}, "persistent takes N and K that are multiples of 8, got 4100 and 4096"),
            (
                {"dtype": "float32", "adapter_dtype": "float32"},
                "persistent takes an x of bfloat16 or float16, got float32",
            ),
        ):
            told = plan.explain(replace(large, **change), "triton")
            assert reason in told.passed_over["persistent"]
            with pytest.raises(RuntimeError, match=re.escape(reason)):
                plan.explain(replace(large, **change), "triton", "persistent")
        for types in ("bfloat16", "float32"), ("float16", "float32"), ("float16", "float16"):
            able = dict(zip(("dtype", "adapter_dtype"), types, strict=True))
            told = explain(replace(large, **able))
            assert "persistent 1" in told.plan and never_timed in str(told).splitlines()
        back = replace(large, dropout=True, backward=True, w_k_major=False)
        assert explain(back).passed_over["persistent"] == never_timed.partition(": ")[2]
        several = "the mask of dx is on one step of s·b, of at most 64 ranks, got"
        for change, ranks in (({"R": 65}, 65), ({"adapter_dtype": "float32", "R": 22}, 66)):
            reason = f"{several} {ranks}"
            assert explain(replace(back, **change)).passed_over["persistent"] == reason
        for name, reason in (
            ("sm_100", "it is taken where `tune` has timed it: Gluon is experimental"),
            ("sm_120", "sm_120 has no tensor descriptors"),
        ):
            machine.target = name
            assert plan.explain(large, "triton").passed_over["persistent"] == reason
        machine.target = "sm_100"
        told = plan.explain(back, "triton")
        assert told.passed_over["persistent"].startswith("tensor memory has no columns")

    def test_one_launch_where_tune_has_timed_it(self):
        large = replace(self.problem, M=4096)
        never_timed = "it is taken where `tune` has timed it: its programs wait for each other"
        told = explain(large)
        assert told.passed_over["one_launch"] == never_timed
        assert re.search(r"predicted: .*one_launch \d+\.\d us \(\d+\.\d to \d+\.\d\)", told.plan)
        assert re.search(r"eager \d+\.\d us,", told.plan)  # it has no range
        self.tuned(M=4096, two_kernel=20.0, one_launch=19.0, eager=21.0)
        told = explain(large)
        assert told.candidate.name == "one_launch"
        assert told.plan.startswith("one_launch, one_launch 128x256x64 w8 s3 tma, measured: one_l")
        self.tuned(M=4096, two_kernel=20.0, eager=21.0)  # it was wrong there
        assert explain(large).candidate.name == "two_kernel"
        back = explain(large.adjoint())
        assert back.passed_over["one_launch"].startswith("in a backward q comes with dB")

    def test_the_persistent_product_that_computes_s_where_tune_has_timed_it(
        self, machine, monkeypatch
    ):
        monkeypatch.setattr(configs, "untried", lambda *_: None)
        name, large = "persistent_one_launch", replace(self.problem, M=4096)
        reason = "it is taken where `tune` has timed it: Gluon is experimental"
        assert explain(large).passed_over[name] == reason
        times = {"two_kernel": 20.0, "persistent": 19.0, name: 18.0}
        self.tuned(M=4096, **times)
        assert explain(large).plan.startswith(f"{name}, {name} 128x256x64 w8 s3 tma, measured: ")
        back = explain(replace(large, backward=True, w_k_major=False))
        assert back.passed_over[name] == "in a backward q comes with dB from one reading of dy"
        for change, reason in (
            ({"dropout": True}, "persistent_one_launch has no dropout"),
            ({"R": 65}, "takes a rank of at most 64, got 65"),
            ({"N": 4100}, "multiples of 8, got 4100 and 4096"),
            (
                {"adapter_dtype": "float32"},
                "the type that x and the adapters must have, got bfloat16 and float32",
            ),
        ):
            assert reason in explain(replace(large, **change)).passed_over[name]
        for target, reason in (
            ("sm_100", "persistent_one_launch is not made for the tensor memory of sm_100"),
            ("sm_120", "sm_120 has no tensor descriptors"),
        ):
            machine.target = target
            assert plan.explain(large, "triton").passed_over[name] == reason

    @pytest.mark.parametrize(
        "version, sm_90_too", [("3.6.0", False), ("3.8.0", True), ("3.10.0", True)]
    )
    def test_another_triton_keeps_the_other_products(self, version, sm_90_too, monkeypatch):
        """An older one has the names that sm_90's plain form needs, and no other."""
        monkeypatch.setattr(configs.importlib.metadata, "version", lambda name: version)
        configs.untried.cache_clear()
        large = replace(self.problem, M=4096)
        self.tuned(M=4096, two_kernel=20.0, persistent=19.0, eager=21.0)
        told = explain(large)
        assert told.candidate.name == ("two_kernel" if sm_90_too else "persistent")
        reason = f"it was tried with Triton 3.9.x only, got {version}"
        assert told.passed_over["persistent_one_launch"] == reason
        if not sm_90_too:  # whose mask spills with it
            back = explain(replace(large, dropout=True, backward=True, w_k_major=False))
            spills = "a mask of dx spills registers before Triton 3.9.x"
            assert back.passed_over["persistent"] == spills
        assert tiles_of("persistent_one_launch", large, TARGETS["sm_90"]) == []
        assert (tiles_of("persistent", large, TARGETS["sm_90"]) == []) == sm_90_too
        if sm_90_too:
            reason = f"it was tried with Triton 3.6.x, 3.7.x and 3.9.x only, got {version}"
            assert told.passed_over["persistent"] == reason
        assert tiles_of("persistent", large, TARGETS["sm_100"]) == []
        configs.untried.cache_clear()

    def test_by_prediction(self):
        told = explain(self.problem)
        assert told.backend == "triton" and "predicted: decode" in told.plan
        assert told.rejected["cuda"].startswith("it is taken where `tune` has timed it")
        assert told.rejected["eager"].startswith("decode is predicted faster: ")

    @pytest.mark.parametrize(
        "faster, backend", [("cuda_decode", "cuda"), ("decode", "triton"), ("eager", "eager")]
    )
    def test_by_measurement(self, faster, backend):
        times = {"decode": 12.0, "cuda_decode": 12.5, "two_kernel": 20.0, "eager": 18.0}
        self.tuned(**times | {faster: 11.0})
        told = explain(self.problem)
        assert told.backend == backend
        assert f"measured: {faster} 11.0 us" in told.plan
        others = {"cuda": "12.5", "triton": "12.0", "eager": "18.0"}
        for name, us in others.items():
            if name != backend:
                why = f"{faster} is measured faster: 11.0 us, not {us} us"
                assert told.rejected[name] == why

    def test_a_backward_has_q_already(self):
        """So what computes x·a beside the product goes after the others, however fast it is."""
        self.tuned(decode=1.0, one_pass=2.0, cuda_decode=12.5, two_kernel=12.0, eager=18.0)
        backward = Problem(8, 4096, 4096, 16, "bfloat16", "bfloat16", "cuda", backward=True)
        assert explain(replace(backward, backward=False)).candidate.name == "decode"
        assert explain(backward).candidate.name == "two_kernel"

    def test_without_triton_its_kernels_do_not_count(self, machine):
        self.tuned(decode=11.0, cuda_decode=12.0, eager=18.0)
        machine.missing.add("triton")
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


@pytest.mark.parametrize(
    "changed",
    [
        *({"M": 10}, {"N": 8}, {"K": 8}, {"R": 4}, {"bias": True}, {"dropout": True}),
        *({"dtype": torch.bfloat16}, {"adapter_dtype": torch.bfloat16}, {"transposed": True}),
        *({"device": "cuda:1"}, {"backend": "eager"}),
    ],
    ids=str,
)
def test_a_remembered_plan_is_another_calls_where_any_fact_differs(changed, monkeypatch):
    made = []
    monkeypatch.setattr(plan, "make_plan", lambda *facts: made.append(facts) or facts)

    def planned(M=9, N=7, K=6, R=3, dtype=torch.float32, adapter_dtype=torch.float32, **others):
        x = torch.empty(M, K, dtype=dtype)
        weight = torch.empty(K, N).t() if "transposed" in others else torch.empty(N, K)
        if "device" in others:
            device = torch.device(others["device"])
            x = SimpleNamespace(shape=x.shape, dtype=dtype, device=device, numel=x.numel)
        bias = torch.empty(N) if "bias" in others else None
        A = torch.empty(K, R, dtype=adapter_dtype)
        name = others.get("backend", "auto")
        return plan.plan_call(name, x, weight, A, bias, "dropout" in others)

    first = planned()
    other = planned(**changed)
    if "device" in changed:
        assert planned(device="cuda:0") != other
    assert first != other and planned() is first and planned(**changed) is other
    assert len(made) == len(set(made)) == 2 + ("device" in changed)


class TestABackendFromOutside:
    """tests/toy_backend.py and one line of the registry."""

    @pytest.fixture
    def toy(self, monkeypatch):
        # In front: where no times are known the first that can compute a problem is taken.
        monkeypatch.setattr(backends, "BACKENDS", {"toy": "tests.toy_backend", **backends.BACKENDS})
        toy_backend.BACKEND.products.calls.clear()
        return toy_backend.BACKEND.products

    def test_it_is_chosen_and_explained(self, toy):
        told = explain(PROBLEM)
        assert (told.backend, told.plan) == ("toy", "toy_product, one row after another")
        assert "toy: chosen, toy_product, one row after another" in str(told)
        assert told.rejected["eager"] == "toy comes first"

    @pytest.mark.parametrize("dropout_p", [0.0, 0.3])
    def test_it_computes_a_call_and_its_backward(self, toy, dropout_p):
        mask = scaled_mask(Dropout(dropout_p, torch.tensor(5)), 9, 6, torch.float32)
        options = {"dropout_p": dropout_p, "seed": 5}
        check_function(
            lambda x, weight, A, B, bias: lora_linear(x, weight, A, B, 0.75, bias, **options),
            lambda x, weight, A, B, bias: reference(x, weight, A, B, 0.75, bias, mask),
            operands(),
            torch.randn(9, 7),
        )
        assert toy.calls.count("expand Tensor") == 2 and "wgrad" in toy.calls

    @pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
    def test_it_trains_a_layer(self, toy, compiled):
        layer = LinearWithLoRA(torch.nn.Linear(6, 7), 3, 1.0)
        x = torch.randn(9, 6, requires_grad=True)
        with use_backend("eager"):
            expected = with_gradients(layer, [x])
        assert not toy.calls
        call = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
        torch.testing.assert_close(with_gradients(call, [x]), expected)
        assert sum("expand" in each for each in toy.calls) == 2

    def test_it_refuses_what_it_cannot_compute(self, toy):
        large = replace(PROBLEM, M=65)
        told = explain(large)
        assert told.backend != "toy" and told.rejected["toy"] == "it takes at most 64 rows, got 65"
        x, weight, A, B, bias = operands(M=65)
        lora_linear(x, weight, A, B, 1.0, bias).sum().backward()
        assert not toy.calls
        with use_backend("toy"):
            lora_linear(x[:64], weight, A, B, 1.0, bias)
            with pytest.raises(RuntimeError, match=r"'toy' was asked for and .* got 65"):
                lora_linear(x, weight, A, B, 1.0, bias)
        on_gpu = explain(replace(PROBLEM, device="cuda"))
        assert on_gpu.rejected["toy"] == "runs on cpu tensors only, not on cuda"

    def test_one_after_the_others_serves_who_asks_for_it(self, toy, monkeypatch):
        names = {**backends.BACKENDS}
        monkeypatch.setattr(backends, "BACKENDS", names | {"toy": names.pop("toy")})
        told = explain(PROBLEM)
        assert told.rejected["toy"] == f"{told.backend} comes first"
        assert explain(PROBLEM, backend="toy").backend == "toy"
        call(backend="toy").sum().backward()
        assert toy.calls.count("expand Tensor") == 2


class TestAFormatFromOutside:
    """tests/toy_format.py: no backend of the package reads it, so that the plan gives each a dense copy."""

    @pytest.fixture
    def given(self):
        """x, weight, A, B, bias of which x, A and B require grad."""
        x, weight, A, B, bias = operands()
        return x, Int8Rows.quantize(weight.detach()), A, B, bias.detach()

    def check(self, given, **options):
        """y, dx, dA and dB against float64's."""
        x, weight, A, B, bias = given

        def ours(x, A, B):
            return lora_linear(x, weight, A, B, 0.75, bias, **options)

        def plain(x, A, B):
            return reference(x, weight.dense().to(x.dtype), A, B, 0.75, bias.to(x.dtype))

        check_function(ours, plain, [x, A, B], torch.randn(9, 7))

    def test_who_does_not_read_it_gets_a_dense_copy(self, given, backend):
        told = explain(*given[:4], 0.75, given[4], backend=backend)
        assert told.dequantises and told.adjoint.dequantises
        assert "int8_rows weight on cpu" in str(told)
        assert f"{backend}: chosen, a dense copy of the int8_rows weight" in str(told)
        self.check(given, backend=backend)
        weight = given[1].dense()
        assert not explain(given[0], weight, *given[2:4], 0.75, backend=backend).dequantises

    def test_auto_takes_what_it_takes_for_a_dense_weight(self, given):
        dense = given[0], given[1].dense(), *given[2:4]
        assert explain(*given[:4]).backend == explain(*dense).backend
        self.check(given)

    @pytest.mark.usefixtures("machine")
    def test_a_copy_has_its_price_where_times_are_known(self):
        problem = Problem(64, 4096, 4096, 16, "bfloat16", "bfloat16", device="cuda")
        packed = explain(replace(problem, weight_format="int8_rows"))
        dense = explain(problem)
        assert packed.dequantises and packed.candidate.name == dense.candidate.name
        copied_us = 20 * 4096 * 4096 / (TARGETS["sm_90"].bandwidth_gbs * 1e3)
        spent = packed.candidate.predicted_us - dense.candidate.predicted_us
        assert spent == pytest.approx(copied_us)
        timed = Candidate("one", measured_us=3.0, predicted_us=1.0)
        after = plan._after_dequantising(timed, problem, TARGETS["sm_90"])
        assert after.predicted_us == pytest.approx(1.0 + copied_us)
        assert after.measured_us == 3.0  # `tune` measures a format's calls with their copy

    def test_packed_tensors_are_kept_for_the_backward(self, given, backend):
        x, weight, A, B, bias = given
        with saved_inside() as kept:
            y = lora_linear(x, weight, A, B, 0.75, bias, backend=backend)
        assert any(t is weight.codes for t in kept) and any(t is weight.scales for t in kept)
        assert not any(t.is_floating_point() and t.shape in ((7, 6), (6, 7)) for t in kept)
        y.sum().backward()
        for t in (x, A):
            t.requires_grad_(False)
        with saved_inside() as kept:
            lora_linear(x, weight, A, B, 0.75, bias, backend=backend)
        assert not any(t is weight.codes for t in kept)  # dB reads no weight

    def test_inside_a_checkpoint(self, given, backend):
        """A checkpoint's saved tensors can be read only once."""
        x, weight, A, B, bias = given

        def step(x):
            return lora_linear(x, weight, A, B, 0.75, bias, backend=backend)

        again = functools.partial(checkpoint, step, use_reentrant=False)
        assert_bits(with_gradients(again, [x]), with_gradients(step, [x]))

    def test_without_gradients(self, given, backend):
        x, weight, A, B, bias = given
        true = reference(x, weight.dense(), A, B, 0.75, bias)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                y = lora_linear(x, weight, A, B, 0.75, bias, backend=backend)
            torch.testing.assert_close(y, true, rtol=1e-5, atol=1e-5)

    def test_autocast_decodes_to_its_type(self, given):
        x, weight, A, B, bias = given
        expected = lora_linear(x, weight.to(torch.float32).dense(), A, B, 0.75, bias)
        with torch.autocast("cpu", torch.bfloat16):
            told = explain(x, weight, A, B, 0.75, bias)
            y = lora_linear(x, weight, A, B, 0.75, bias)
        assert told.problem.dtype == "bfloat16" and y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), expected, rtol=2e-2, atol=2e-2)
        y.float().sum().backward()
        assert x.grad.dtype == torch.float32 and A.grad is not None

    def test_function_transforms(self, given):
        weight, A, B, bias = (t if isinstance(t, Int8Rows) else t.detach() for t in given[1:])
        xs = torch.randn(4, 9, 6)

        def ours(x):
            return lora_linear(x, weight, A, B, 0.75, bias)

        def plain(x):
            return x @ weight.dense().t() + bias + 0.75 * (x @ A @ B)

        torch.testing.assert_close(torch.vmap(ours)(xs), torch.vmap(plain)(xs))
        for transform in (
            lambda f: torch.func.grad(lambda x: f(x).pow(2).sum()),
            lambda f: torch.vmap(torch.func.grad(lambda x: f(x).pow(2).sum())),
            lambda f: torch.func.grad(lambda xs: torch.vmap(f)(xs).pow(2).sum()),
        ):
            torch.testing.assert_close(transform(ours)(xs), transform(plain)(xs))
        pair = (torch.func.jvp(f, (xs[0],), (xs[1],)) for f in (ours, plain))
        torch.testing.assert_close(*pair)

    def test_second_and_forward_derivatives(self, given):
        x, weight, A, B, bias = given
        wide = [t.detach().double().requires_grad_() for t in (x, A, B)]
        weight, bias = weight.to(torch.float64), bias.double()

        def ours(x, A, B):
            return lora_linear(x, weight, A, B, 0.75, bias)

        assert torch.autograd.gradcheck(ours, wide, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(ours, wide)

    @pytest.mark.parametrize(
        "compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
    )
    def test_compiled(self, given, compiler):
        x, weight, A, B, bias = given

        def step(x, A, B):
            return lora_linear(x, weight, A, B, 0.75, bias)

        compiled = torch.compile(step, backend=compiler, fullgraph=True)
        torch.testing.assert_close(*(with_gradients(f, [x, A, B]) for f in (compiled, step)))

    def test_who_reads_it_gets_the_packed_weight(self, given, monkeypatch):
        monkeypatch.setattr(backends, "BACKENDS", {"toy": "tests.toy_backend", **backends.BACKENDS})
        monkeypatch.setattr(toy_backend.ToyBackend, "formats", ("dense", Int8Rows.format))
        calls = toy_backend.BACKEND.products.calls
        calls.clear()
        told = explain(*given[:4], 0.75, given[4])
        assert told.backend == "toy" and not told.dequantises and not told.adjoint.dequantises
        assert "dense copy" not in str(told)
        self.check(given)
        assert [each for each in calls if "expand" in each] == ["expand Int8Rows"] * 2

    def test_bad_ones_are_refused_in_words(self, given):
        x, weight, A, B, bias = given
        on_meta = weight.with_tensors([t.to("meta") for t in weight.tensors])
        partly = weight.with_tensors([weight.codes, on_meta.scales])
        trained = weight.with_tensors([weight.codes, weight.scales.clone().requires_grad_()])
        for bad, error, message in (
            (on_meta, ValueError, "weight must be on x's device, cpu, got meta"),
            (partly, ValueError, "weight must be on x's device, cpu, got meta"),
            (weight.to(torch.float16), TypeError, "weight must have x's dtype, torch.float32, got"),
            (weight.to(torch.int32), TypeError, "weight must be float32, .* got torch.int32"),
            (weight.t(), ValueError, r"x must be \[..., K\] with K = 7 as in weight, got \[9, 6\]"),
            (trained, ValueError, "weight must not require grad: .* int8_rows"),
        ):
            for call in (lora_linear, explain):
                with pytest.raises(error, match=message):
                    call(x, bad, A, B, 0.75, bias)

    def test_no_derivative_of_it_is_silently_zero(self, given):
        x, weight, A, B, bias = (t if isinstance(t, Int8Rows) else t.detach() for t in given)

        def loss(scales):
            packed = weight.with_tensors([weight.codes, scales])
            return lora_linear(x, packed, A, B, 0.75, bias).sum()

        for ask in (
            lambda: torch.func.grad(loss)(weight.scales),
            lambda: torch.func.jvp(loss, (weight.scales,), (weight.scales,)),
        ):
            with pytest.raises(ValueError, match="weight must not require grad"):
                ask()
