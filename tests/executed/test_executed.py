"""The code that really ships, compiled for each NVIDIA GPU, executed: every configuration, every gradient, any order."""

from __future__ import annotations

import pytest
import torch

from lora_kernels import lora_linear, plan, use_backend
from lora_kernels.backends import triton as backend_module
from lora_kernels.backends.triton.configs import shipped, tiles_for
from lora_kernels.problem import Problem
from lora_kernels.tuning.targets import TARGETS
from tests.executed.layer import train
from tests.executed.shipped import execute
from tests.oracle import assert_budget, reference
from tests.ptx.launch import emulate

pytestmark = pytest.mark.slow
EXECUTED = ("sm_80", "sm_90", "sm_100", "sm_120")
PARTS = 7  # of a target's configurations, for test processes beside each other; odd, so that each has both schedules


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("target", EXECUTED)
def test_every_shipped_configuration(target, part):
    """Lockstep for one half of the configurations, a seeded random schedule for the other."""
    pairs = reversed(shipped(TARGETS[target]))
    once = {(config, problem.weight_format): problem for problem, config in pairs}
    wrong = []
    for number, ((config, _), problem) in list(enumerate(once.items()))[part::PARTS]:
        try:
            execute(target, problem, config, None if number % 2 else number)
        except Exception as error:
            wrong.append(f"{config} for {problem}: {type(error).__name__}: {str(error)[:400]}")
    assert len(once) > 15 and not wrong, "\n".join(wrong)


@pytest.fixture
def on(monkeypatch):
    """on(target): CPU tensors may ask for the Triton backend, which takes `algorithm` as if they were on that GPU."""

    def use(target: str, algorithm: str = "two_kernel") -> None:
        monkeypatch.setattr(plan, "_target", lambda device: TARGETS[target])
        monkeypatch.setattr(backend_module.TritonBackend, "devices", ("cpu",))
        monkeypatch.setattr(backend_module, "predict_us", lambda name, *_: name != algorithm)
        plan.forget()

    yield use
    plan.forget()


@pytest.mark.parametrize(
    "dtype, adapter_dtype, dropout, schedule",
    [
        (torch.bfloat16, torch.bfloat16, 0.0, None),
        (torch.bfloat16, torch.float32, 0.25, 7),
        (torch.float16, torch.float16, 0.25, None),
    ],
    ids=["lockstep", "float32 adapters, dropout, random", "float16, dropout"],
)
@pytest.mark.parametrize("target", EXECUTED)
def test_a_layers_forward_and_every_gradient(target, dtype, adapter_dtype, dropout, schedule):
    """Through `lora_linear`: the launches, their order and the dependent one are those of a training step."""
    types = {"dtype": dtype, "adapter_dtype": adapter_dtype}
    steps = train(target, "two_kernel", schedule, **types, dropout=dropout)
    assert steps.kernels[:2] == ["shrink", "expand"] and "wgrad" in steps.kernels
    assert steps.executed[1].dependent == TARGETS[target].tma


@pytest.mark.parametrize("target", EXECUTED)
def test_a_result_does_not_depend_on_the_order_of_warps_and_blocks(target):
    """Equal bits under four schedules: of the whole, and of the split sums that the last arriver adds."""
    torch.manual_seed(0)
    x, w = torch.randn(20, 264).bfloat16(), torch.randn(72, 264).bfloat16().t()
    a, b = torch.randn(264, 8).bfloat16(), torch.randn(8, 72).bfloat16()
    problem = Problem(20, 72, 264, 8, "bfloat16", "bfloat16", device="cuda")
    from dataclasses import replace

    from lora_kernels.backends.triton.decode import decode

    config = replace(tiles_for(problem, TARGETS[target]).config("decode"), split=4)
    results = []
    for schedule in (None, 1, 2, 3):
        with emulate(target, schedule):
            results.append(decode(x, w, a, b, 0.5, None, config))
    assert all(torch.equal(y, results[0][0]) and torch.equal(s, results[0][1]) for y, s in results)


@pytest.mark.parametrize("target", EXECUTED)
def test_small_batches_take_one_launch(on, target, monkeypatch):
    on(target, "decode")
    x, w = torch.randn(5, 72).bfloat16(), torch.randn(40, 72).bfloat16()
    a, b = torch.randn(72, 8).bfloat16(), torch.randn(8, 40).bfloat16()
    with emulate(target) as executed, use_backend("triton"):
        y = lora_linear(x, w, a, b, 0.5)
    exact = reference(x.double(), w.double(), a.double(), b.double(), 0.5)
    assert_budget(y, reference(x, w, a, b, 0.5), exact)
    assert [launch.name for launch in executed] == ["_decode_kernel"]
