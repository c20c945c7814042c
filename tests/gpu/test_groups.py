"""Groups of rows on the device: every gradient, any offsets without a look at them, CUDA graphs, equal bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lora_kernels import grouped_lora_linear
from lora_kernels.backends.device import current_target
from lora_kernels.backends.triton.configs import shipped
from lora_kernels.backends.triton.expand import expand
from tests.executed.test_groups import assert_product
from tests.gpu.conftest import DEVICE, captured
from tests.grouped import Grouped

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
RAGGED = [0, 3, 3, 4, 139, 141, 300]
CASES = [
    Grouped(RAGGED, 136, 264, 16, BF16),
    Grouped(RAGGED, 45, 37, 5, BF16, F32),
    Grouped(RAGGED, 136, 264, 64, F16, dropout=0.3),
    Grouped(RAGGED, 136, 264, 16, BF16, shared=True, dropout=0.3),
    Grouped(RAGGED, 136, 264, 16, BF16, shared=True, own_bias=True),
    Grouped([0, 0, 0, 500], 64, 48, 1, BF16, layout="sliced"),
    Grouped([0, 0, 0], 64, 48, 8, BF16),
    Grouped(list(range(65)), 64, 48, 8, BF16),
]


@pytest.mark.parametrize("name", ["auto", "eager", "triton"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_gradient(case, name, usable):
    if name == "triton":
        usable(name)
    replace(case, device=DEVICE).check(name)


def test_float32(triton_backend):
    if current_target().name == "gfx1100":
        pytest.skip("float32 is refused there")
    Grouped(RAGGED, 45, 37, 5, device=DEVICE).check("triton")


def test_every_shipped_product(triton_backend):
    target, checked = current_target(), 0
    for problem, config in shipped(target, groups=4):
        if config.kernel != "expand" or problem.dtype != "bfloat16":
            continue
        case = Grouped(
            [0, 0, 1, 301, 400], 136, 264, problem.R, BF16, shared=config.tma, device=DEVICE
        )
        x, weight, _, B, bias, _, _ = case.operands()
        s = torch.randn(case.T, case.R, device=DEVICE)
        offsets = torch.tensor(case.offsets, dtype=torch.int32, device=DEVICE)
        y = expand(x, weight.mT, s, B, bias, config, offsets=offsets)
        assert_product(y, case, x, weight.mT, s, B, bias, str(config))
        checked += 1
    assert checked


def step(operands, offsets):
    x, weight, A, B, bias, scale, dy = operands
    y = grouped_lora_linear(x, weight, A, B, offsets, scale, bias, backend="triton")
    return [y, *torch.autograd.grad(y, (x, A, B), dy)]


def trained(case):
    """Its operands with x, A and B requiring gradients."""
    return [
        None if t is None else t.requires_grad_(i in (0, 2, 3))
        for i, t in enumerate(case.operands())
    ]


def test_nothing_waits_for_the_device(triton_backend):
    case = Grouped(RAGGED, 136, 264, 16, BF16, device=DEVICE)
    operands = trained(case)
    offsets = torch.tensor(RAGGED, dtype=torch.int32, device=DEVICE)
    step(operands, offsets)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(operands, offsets)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_graphs_replay_sees_another_routing(triton_backend):
    case = Grouped(RAGGED, 136, 264, 16, BF16, device=DEVICE)
    operands = trained(case)
    offsets = torch.tensor(RAGGED, dtype=torch.int32, device=DEVICE)
    graph, results = captured(lambda: step(operands, offsets))
    offsets.copy_(torch.tensor([0, 100, 100, 200, 200, 250, 300], dtype=torch.int32))
    graph.replay()
    torch.cuda.synchronize()
    for replayed, direct in zip(results, step(operands, offsets), strict=True):
        assert torch.equal(replayed, direct)


def test_many_equal_calls_give_equal_bits(triton_backend):
    case = Grouped(RAGGED, 136, 264, 16, BF16, device=DEVICE)
    operands = trained(case)
    offsets = torch.tensor(RAGGED, dtype=torch.int32, device=DEVICE)
    first = step(operands, offsets)
    for _ in range(50):
        assert all(map(torch.equal, first, step(operands, offsets)))


@pytest.mark.parametrize(
    "bad",
    [[0, 30, 4, 20, 300, 9, 300], [5, 8, 9, 90, 90, 90, 10000], [-(2**31), 2**31 - 1] * 3 + [0]],
)
def test_offsets_that_break_their_rule_break_nothing_else(bad, triton_backend):
    """Results are unspecified; the process goes on, and the next call is right."""
    case = Grouped(RAGGED, 136, 264, 16, BF16, device=DEVICE)
    step(trained(case), torch.tensor(bad, dtype=torch.int32, device=DEVICE))
    torch.cuda.synchronize()
    case.check("triton")
