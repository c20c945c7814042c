"""The Triton kernels over groups of rows, through `grouped_lora_linear`: every gradient, any routing, any offsets."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lora_kernels import grouped_lora_linear
from lora_kernels.backends.triton import BACKEND
from lora_kernels.backends.triton.expand import expand
from lora_kernels.backends.triton.shrink import shrink
from lora_kernels.backends.triton.wgrad import wgrad
from lora_kernels.dropout import Dropout, keep_mask, scaled_mask
from lora_kernels.operands import Adapter, Groups
from lora_kernels.problem import Problem
from lora_kernels.tuning.config import TileConfig
from lora_kernels.tuning.targets import TARGETS
from tests.grouped import NAMES, Grouped
from tests.interpreter import strict
from tests.interpreter.conftest import on_target
from tests.interpreter.test_layer import specialisation

ROUTINGS = {  # offsets
    "ragged": [0, 3, 3, 4, 39, 41],
    "first": [0, 37, 37, 37],
    "last": [0, 0, 0, 33],
    "single rows": [0, 1, 2, 3, 4, 5],
    "one group": [0, 40],
    "no rows": [0, 0, 0],
}
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
CASES = [
    *(Grouped(offsets, 45, 37, 5) for offsets in ROUTINGS.values()),
    *(Grouped(ROUTINGS["ragged"], 45, 37, 5, shared=True, own_bias=own) for own in (True, False)),
    *(Grouped(ROUTINGS["ragged"], 33, 70, R, BF16) for R in (1, 16, 64)),
    Grouped(ROUTINGS["ragged"], 64, 64, 16, F16, F32),
    Grouped(ROUTINGS["ragged"], 48, 40, 5, BF16, F32, dropout=0.3),
    Grouped(ROUTINGS["ragged"], 41, 37, 5, dropout=0.4, shared=True),
    Grouped(ROUTINGS["first"], 40, 33, 20, BF16, bias=False, layout="transposed"),
    Grouped(ROUTINGS["last"], 40, 33, 20, F16, layout="sliced", shared=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_every_gradient(case, triton_products):
    triton_products("two_kernel")
    with strict.recording() as launches:
        case.check("triton")
    if case.T:
        names = {launch.kernel for launch in launches}
        assert names >= {"_shrink_kernel", "_expand_kernel", "_wgrad_kernel"}
        assert all(each.arguments.get("offsets_ptr", 0) is not None for each in launches)


SHARED = Grouped(ROUTINGS["ragged"], 48, 40, 12, BF16, shared=True, dropout=0.3)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_tensor_descriptors_of_one_weight(dtype, triton_products):
    """A box of x's rows has some of other groups; the product waits for its dependent launch."""
    triton_products("tma")
    with strict.recording() as launches:
        replace(SHARED, dtype=dtype).check("triton")
    assert any(
        each.arguments.get("TMA") and each.arguments["offsets_ptr"] is not None for each in launches
    )


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_the_tail_of_each_group_before_one_product_of_all_rows(dtype, monkeypatch):
    on_target(monkeypatch, "sm_80", "tail_first")
    with strict.recording() as launches:
        replace(SHARED, dtype=dtype).check("triton")
    assert {each.arguments["K"] for each in launches if each.kernel == "_expand_kernel"} == {0}


@pytest.mark.parametrize("needed", [*NAMES, "x+A", "x+B", "A+B"])
def test_only_the_needed_gradients(needed, triton_products):
    triton_products("two_kernel")
    Grouped([0, 2, 2, 9], 21, 18, 3).check("triton", [name in needed.split("+") for name in NAMES])


def test_any_order_of_programs_gives_equal_bits(triton_products):
    triton_products("two_kernel")
    case = Grouped(ROUTINGS["ragged"], 45, 37, 5, BF16)
    results = []
    for order in ("ascending", "descending", "shuffled"):
        with strict.program_order(order):
            results.append(case.results("triton"))
    for other in results[1:]:
        assert all(map(torch.equal, results[0].values(), other.values()))


def test_more_groups_than_are_looked_at_together():
    """1100 of them, of which 1024 make a block; four have rows."""
    offsets = torch.zeros(1101, dtype=torch.int32)
    for group, rows in ((3, 2), (1000, 1), (1024, 3), (1099, 2)):
        offsets[group + 1 :] += rows
    x, a = torch.randn(8, 16), torch.randn(1100, 16, 3)
    s = shrink(x, a, 0.5, TileConfig("shrink", 16, 1, 16, 4, 2), offsets=offsets)
    own = a[torch.tensor([3, 3, 1000, 1024, 1024, 1024, 1099, 1099])]
    torch.testing.assert_close(s, 0.5 * (x[:, None] @ own)[:, 0])


def test_the_mask_is_that_of_all_rows(triton_products):
    """Ones and unit matrices make each masked product its mask."""
    triton_products("two_kernel")
    offsets = torch.tensor([0, 5, 5, 30, 37], dtype=torch.int32)
    rows, cols, G = 37, 21, 4
    problem = Problem(rows, cols, cols, cols, "float32", "float32", dropout=True, groups=G)
    (chosen, *_) = BACKEND.candidates(problem, TARGETS["sm_80"])
    dropout = Dropout(0.3, torch.tensor(-1))
    ones, unit = torch.ones(rows, cols), torch.eye(cols).expand(G, cols, cols)
    bound = chosen.products.grouped(Groups(offsets, False, False))
    s = bound.shrink(ones, Adapter(unit, unit, 1.0, dropout))
    none = torch.zeros(rows, 1), torch.zeros(1, cols), torch.ones(rows, 1)
    output = Adapter(torch.zeros(G, 1, 1), torch.ones(G, 1, cols), 1.0, dropout_out=dropout)
    tail = bound.expand(*none, output)
    reduced = bound.wgrad(ones, torch.eye(rows), torch.float32, dropout).sum(0).t()
    for result in (s, tail, reduced):
        assert torch.equal(result != 0, keep_mask(dropout, rows, cols))
        torch.testing.assert_close(result, scaled_mask(dropout, rows, cols, torch.float32))


def test_infinities_and_nans_stay_in_their_group(triton_products):
    triton_products("two_kernel")
    x, weight = torch.rand(20, 24) + 0.5, torch.rand(3, 18, 24)
    A, B = torch.rand(3, 24, 5), torch.rand(3, 5, 18)
    offsets = torch.tensor([0, 7, 9, 20], dtype=torch.int32)
    x[8, 3], weight[2, 4, 5], A[0, 1, 1] = torch.inf, torch.nan, torch.inf
    x.requires_grad_()
    A.requires_grad_()
    y = grouped_lora_linear(x, weight, A, B, offsets, 0.5, backend="triton")
    assert y[:7].isinf().all() and y[7].isfinite().all() and y[8].isinf().all()
    assert y[9:, 4].isnan().all() and y[9:, :4].isfinite().all()
    dx, dA = torch.autograd.grad(y, (x, A), torch.ones_like(y))
    assert dx[7:9].isfinite().all() and dx[9:, 5].isnan().all()
    assert dA[1].isinf().any() and dA[0].isfinite().all() and dA[2].isfinite().all()


BAD = {
    "fall": [0, 30, 4, 20],
    "end late": [0, 3, 10, 90],
    "end early": [0, 3, 10, 12],
    "begin late": [5, 8, 9, 20],
    "extremes": [-(2**31), 2**31 - 1, -(2**31), 2**31 - 1],
    "negative": [-7, -3, -9, -1],
}


@pytest.mark.parametrize("bad", BAD)
def test_offsets_that_break_their_rule_stay_within_the_operands(bad):
    """The interpreter raises at an address that is no element of its tensor."""
    offsets = torch.tensor(BAD[bad], dtype=torch.int32)
    x, w, s = torch.randn(20, 33), torch.randn(3, 33, 37), torch.randn(20, 5)
    a, b, bias = torch.randn(3, 33, 5), torch.randn(3, 5, 37), torch.randn(3, 37)
    for split in (1, 2):
        tile = {"split": split, "rank_chunk": 16}
        shrink(x, a, 0.5, TileConfig("shrink", 16, 1, 16, 4, 2, **tile), offsets=offsets)
        wgrad(x, s, F32, TileConfig("wgrad", 16, 32, 16, 4, 2, **tile), offsets=offsets)
    config = TileConfig("expand", 16, 32, 16, 4, 2, rank_chunk=16)
    y = expand(x, w, s, b, bias, config, offsets=offsets)
    assert y.shape == (20, 37)


def test_a_group_without_rows_reads_nothing(triton_products):
    """One group of two has rows: of a stack twice as large the same is read, and no block of rows computes nothing."""
    x, s = torch.randn(32, 32), torch.randn(32, 16)
    w, b = torch.randn(2, 32, 32), torch.randn(2, 16, 32)
    config = TileConfig("expand", 16, 32, 32, 4, 2, rank_chunk=16)
    with strict.recording() as launches:
        expand(x, w, s, b, None, config, offsets=torch.tensor([0, 0, 32], dtype=torch.int32))
    (launch,) = launches
    assert launch.loads["w"] == 2 * 32 * 32 and launch.loads["b_ptr"] == 2 * 16 * 32
    assert launch.loads["x"] == 32 * 32 and launch.stores["y_ptr"] == 32 * 32


def test_another_routing_compiles_nothing_new(triton_products):
    triton_products("two_kernel")
    seen = set()
    for offsets in ([0, 3, 3, 40], [0, 48, 48, 48], [0, 0, 1, 17]):
        with strict.recording() as launches:
            Grouped(offsets, 48, 32, 16).results("triton")
        seen.add(tuple(map(specialisation, launches)))
    assert len(seen) == 1
