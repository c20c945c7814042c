"""The compiled kernels over groups of rows, executed: values in any order, what they move, offsets that break their rule."""

from __future__ import annotations

import pytest
import torch

from lora_kernels.backends.triton.configs import shipped
from lora_kernels.backends.triton.expand import expand
from lora_kernels.backends.triton.shrink import shrink
from lora_kernels.backends.triton.wgrad import wgrad
from lora_kernels.tuning.config import TileConfig
from lora_kernels.tuning.targets import TARGETS
from tests.executed.layer import EXECUTED, emulated
from tests.grouped import Grouped
from tests.oracle import assert_budget
from tests.ptx.launch import emulate

pytestmark = pytest.mark.slow
EXPAND = TileConfig("expand", 16, 64, 32, 4, 2, group_m=2, rank_chunk=32)
SHRINK = TileConfig("shrink", 16, 1, 32, 4, 2, split=2)
WGRAD = TileConfig("wgrad", 16, 32, 16, 4, 2)


@pytest.mark.parametrize("target", EXECUTED)
def test_every_gradient_through_the_layer(target):
    """Launches in random order, on one target with tensor descriptors and a dependent launch."""
    case = Grouped([0, 2, 2, 3, 21], 40, 24, 6, torch.bfloat16, shared=target == "sm_100")
    with emulated(target, "two_kernel", 11) as executed:
        actual = case.results("triton")
    case.compare(actual)
    kernels = [launch.name for launch in executed]
    assert kernels[:2] == ["shrink", "expand"] and "wgrad" in kernels


@pytest.mark.parametrize("target", EXECUTED)
def test_every_shipped_product(target):
    """In bfloat16, on rows of more than one block where blocks are low; a seeded schedule for every second one."""
    tiles = {c: p for p, c in shipped(TARGETS[target], groups=3) if c.kernel == "expand"}
    half = [config for config, problem in tiles.items() if problem.dtype == "bfloat16"]
    for number, config in enumerate(half):
        case = Grouped([0, 0, 1, 36], 72, 40, 12, torch.bfloat16, shared=config.tma)
        x, weight, _, B, bias, _, _ = case.operands()
        s = torch.randn(case.T, case.R)
        offsets = torch.tensor(case.offsets, dtype=torch.int32)
        with emulate(target, number if number % 2 else None):
            y = expand(x, weight.mT, s, B, bias, config, offsets=offsets)
        assert_product(y, case, x, weight.mT, s, B, bias, f"{config} on {target}")
    assert len(half) >= 3


def assert_product(y, case, x, w, s, b, bias, what):
    def plain(dtype):
        parts = []
        for g, (begin, end) in enumerate(zip(case.offsets, case.offsets[1:], strict=False)):
            w_g, bias_g = (w, bias) if case.shared else (w[g], bias[g])
            tail = s[begin:end].to(dtype) @ b[g].to(dtype)
            parts.append(x[begin:end].to(dtype) @ w_g.to(dtype) + tail + bias_g.to(dtype))
        return torch.cat(parts)

    assert_budget(y, plain(y.dtype), plain(torch.float64), what)


def operands(T: int, G: int, K: int = 64, N: int = 64, R: int = 16):
    torch.manual_seed(0)
    shapes = (T, K), (G, K, N), (G, K, R), (G, R, N)
    return [torch.randn(shape).bfloat16() for shape in shapes], torch.randn(T, R)


def everything(x, w, a, b, s, offsets):
    return [
        shrink(x, a, torch.ones(len(w)), SHRINK, offsets=offsets),
        expand(x, w, s, b, None, EXPAND, offsets=offsets),
        wgrad(x, s, torch.bfloat16, WGRAD, offsets=offsets),
    ]


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_the_order_of_warps_and_blocks_changes_no_bit(target):
    (x, w, a, b), s = operands(20, 3)
    offsets = torch.tensor([0, 17, 17, 20], dtype=torch.int32)
    results = []
    for schedule in (None, 1, 2):
        with emulate(target, schedule):
            results.append(everything(x, w, a, b, s, offsets))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_bytes_over_groups(target):
    """x once for each block of columns; each group's w, a and b once for each of its blocks of rows, others not at all."""
    T, G, K, N, R = 37, 4, 64, 128, 16
    (x, w, a, b), s = operands(T, G, K, N, R)
    offsets = torch.tensor([0, 0, 3, 37, 37], dtype=torch.int32)  # no, 3, 34 and no rows
    blocks, columns = 1 + 3, 2
    with emulate(target) as executed:
        everything(x, w, a, b, s, offsets)
    shrunk, _, product, summed = (launch.counters.tensors for launch in executed)
    assert product["x"].bytes_loaded == columns * x.nbytes
    assert product["w"].bytes_loaded == blocks * K * N * 2
    assert product["b_ptr"].bytes_loaded >= blocks * R * N * 2
    assert product["y_ptr"].bytes_stored == T * N * 2 and (product["y_ptr"].stores == 1).all()
    assert shrunk["x_ptr"].bytes_loaded == x.nbytes
    assert shrunk["a_ptr"].bytes_loaded == blocks * K * R * 2
    assert summed["wide_ptr"].bytes_loaded == x.nbytes
    assert (summed["out_ptr"].stores == 1).all()  # zeros of the groups without rows, too
    assert not any(t.atomics for tensors in (shrunk, product, summed) for t in tensors.values())


BAD = ([0, 30, 4, 20], [5, 8, 9, 90], [-(2**31), 2**31 - 1, -(2**31), 2**31 - 1])


@pytest.mark.parametrize("offsets", BAD, ids=str)
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_no_offsets_reach_beyond_the_operands(target, offsets):
    """An address outside of a tensor is a fault of the emulator; its results are unspecified."""
    (x, w, a, b), s = operands(20, 3)
    with emulate(target) as executed:
        everything(x, w, a, b, s, torch.tensor(offsets, dtype=torch.int32))
    assert len(executed) == 4
