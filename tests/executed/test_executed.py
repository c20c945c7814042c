"""The code that really ships, compiled for each NVIDIA GPU, executed: every tile, every gradient, any order."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lora_kernels import lora_linear
from lora_kernels.backends.triton.configs import tiles_for, tiles_of
from lora_kernels.backends.triton.decode import decode
from lora_kernels.backends.triton.shrink import shrink
from lora_kernels.problem import Problem
from lora_kernels.tuning.config import LOWRANK_KERNELS
from lora_kernels.tuning.targets import TARGETS
from tests.compiled.jobs import COMPILED, FORMS
from tests.executed.layer import EXECUTED, emulated, train
from tests.executed.shipped import compare, execute, in_two, launch, shapes, small
from tests.oracle import Case, assert_budget, reference
from tests.ptx.launch import emulate

pytestmark = pytest.mark.slow
PARTS = 5  # of a target's tiles, for test processes beside each other; odd, so that each has both schedules


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("target", EXECUTED)
def test_every_shipped_tile(target, part):
    """What the compiled lane compiles: in lockstep for one half of it, in a seeded random order for the other."""
    every, wrong = [*FORMS[""](target), *FORMS["elements"](target)], []
    for number, job in list(enumerate(every))[part::PARTS]:
        schedule = None if number % 2 else number
        try:
            execute(target, job, schedule)
        except Exception as error:
            what = f"{job} on {target}, schedule {schedule}"
            wrong.append(f"{what}: {type(error).__name__}: {str(error)[:400]}")
    assert len(every) > 80 and not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "target, form", [(t, f) for t, f in COMPILED if t in EXECUTED and f in ("groups", "scaled")]
)
def test_no_other_form_has_a_race(target, form):
    """Over groups, and with DoRA's scale: the emulator raises for one. The values are those of other tests."""
    every, wrong = list(FORMS[form](target)), []
    for number, job in enumerate(every):
        zeros = shapes(job, small(job), scaled=form == "scaled", device="cpu")
        try:
            with emulate(target, None if number % 2 else number):
                zeros.launch(in_two(job), TARGETS[target])
        except Exception as error:
            wrong.append(f"{job}: {type(error).__name__}: {str(error)[:400]}")
    assert len(every) > 20 and not wrong, "\n".join(wrong)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("target", EXECUTED)
def test_parts_are_float32(target, value):
    """x·a for a float32 a: a's bits beside ones of x, and what is not finite in x or a where eager has it."""
    problem = Problem(256, 64, 64, 16, "bfloat16", "float32", device="cuda")
    (tile, *_) = tiles_of("shrink", problem, TARGETS[target])
    x, a = torch.eye(64).bfloat16(), torch.randn(64, 16)
    with emulate(target):
        assert torch.equal(shrink(x, a, 1.0, tile), a)
    x, a = torch.randn(64, 64).bfloat16(), torch.randn(64, 16).bfloat16().float()
    x[5, 3], a[7, 11] = value, value
    with emulate(target):
        s = shrink(x, a, 1.0, tile)
    eager = x.float() @ a
    assert torch.equal(s.isnan(), eager.isnan()) and torch.equal(s.isposinf(), eager.isposinf())
    assert torch.equal(s.isneginf(), eager.isneginf())


@pytest.mark.parametrize(
    "adapter_dtype", [torch.bfloat16, torch.float32], ids=["one type", "parts"]
)
@pytest.mark.parametrize("R", [16, 64])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_low_rank_kernels_over_many_steps(target, R, adapter_dtype):
    """Where matrix instructions run on while the next step's parts are stored: a race that takes more than two steps.

    And where each block of shared memory is written a second time: that takes more steps than there are stages.
    """
    adapter = str(adapter_dtype).removeprefix("torch.")
    problem = Problem(4096, 4096, 4096, R, "bfloat16", adapter, device="cuda")
    for kernel, forward in (*((kernel, True) for kernel in LOWRANK_KERNELS), ("wgrad", False)):
        config = replace(tiles_of(kernel, problem, TARGETS[target])[0], split=1)
        block = config.block_k if kernel == "shrink" else config.block_m
        steps = (config.num_stages + 2) * block
        sizes = (19, 16, steps) if kernel == "shrink" else (steps + 3, 48, 48)
        o = Case(*sizes, R, dtype=torch.bfloat16, adapter_dtype=adapter_dtype).operands()
        with emulate(target):
            actual = launch(TARGETS[target], (problem, config, forward, False), o)
        compare(actual, o, f"{config} on {target}")


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


@pytest.mark.parametrize(
    "dtype, adapter_dtype, schedule",
    [(torch.bfloat16, torch.bfloat16, None), (torch.float16, torch.float32, 7)],
    ids=["lockstep", "float32 adapters, random"],
)
@pytest.mark.parametrize("target", EXECUTED)
def test_a_masked_tail_before_the_librarys_product(target, dtype, adapter_dtype, schedule):
    """The launches read no weight: its products are the library's."""
    types = {"dtype": dtype, "adapter_dtype": adapter_dtype}
    steps = train(target, "tail_first", schedule, **types, dropout=0.25)
    assert steps.forward == ["shrink", "expand"]
    tails = [each for each in steps.executed if each.name == "expand"]
    assert len(tails) == 2  # y and dx
    for each in tails:
        traffic = each.counters.tensors
        assert traffic["w"].bytes_loaded == traffic["x"].bytes_loaded == 0
        assert (traffic["y_ptr"].stores == 1).all()


@pytest.mark.parametrize("target", EXECUTED)
def test_a_result_does_not_depend_on_the_order_of_warps_and_blocks(target):
    """Equal bits under three schedules: of the whole, and of the split sums that the last arriver adds."""
    torch.manual_seed(0)
    x, w = torch.randn(20, 264).bfloat16(), torch.randn(72, 264).bfloat16().t()
    a, b = torch.randn(264, 8).bfloat16(), torch.randn(8, 72).bfloat16()
    problem = Problem(20, 72, 264, 8, "bfloat16", "bfloat16", device="cuda")
    config = replace(tiles_for(problem, TARGETS[target]).config("decode"), split=4)
    results = []
    for schedule in (None, 1, 2):
        with emulate(target, schedule):
            results.append(decode(x, w, a, b, 0.5, None, config))
    assert all(torch.equal(y, results[0][0]) and torch.equal(s, results[0][1]) for y, s in results)


@pytest.mark.parametrize("target", EXECUTED)
def test_small_batches_take_one_launch(target):
    x, w = torch.randn(5, 72).bfloat16(), torch.randn(40, 72).bfloat16()
    a, b = torch.randn(72, 8).bfloat16(), torch.randn(8, 40).bfloat16()
    with emulated(target, "decode") as executed:
        y = lora_linear(x, w, a, b, 0.5)
    exact = reference(x.double(), w.double(), a.double(), b.double(), 0.5)
    assert_budget(y, reference(x, w, a, b, 0.5), exact)
    assert [each.name for each in executed] == ["decode"]
