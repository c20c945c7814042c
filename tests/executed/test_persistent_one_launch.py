"""The persistent product that computes s in its own launch, compiled for sm_90 and executed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from lora_kernels.backends.triton.configs import tiles_for, tiles_of, untried
from lora_kernels.backends.triton.products import TritonProducts
from lora_kernels.dropout import Dropout
from lora_kernels.problem import Problem
from lora_kernels.tuning.config import TileConfig, shrinking_programs
from lora_kernels.tuning.targets import TARGETS
from tests.executed.layer import train
from tests.executed.shipped import compare, one_launch
from tests.oracle import Case
from tests.ptx import launch
from tests.ptx.launch import emulate

if (reason := untried()) is not None:
    pytest.skip(reason, allow_module_level=True)

pytestmark = pytest.mark.slow
SM_90 = TARGETS["sm_90"]
PROBLEM = Problem(8192, 4096, 4096, 16, "bfloat16", "bfloat16", device="cuda")
LARGE, *_ = tiles_of("persistent_one_launch", PROBLEM, SM_90)
SMALL = TileConfig("persistent_one_launch", 64, 64, 32, 4, 3, tma=True)
# K: less than a step, less than the stages hold, several steps. Blocks of rows: one to five.
CASES = [
    (Case(133, 264, 264, 13, dtype=torch.bfloat16), SMALL, None),
    (Case(133, 520, 72, 64, dtype=torch.bfloat16, layout="peft"), SMALL, 1),
    (Case(261, 8, 264, 33, dtype=torch.bfloat16, layout="peft", bias=False), SMALL, 2),
    (Case(1, 264, 8, 1, dtype=torch.bfloat16), SMALL, 3),
    (Case(133, 264, 264, 40, dtype=torch.bfloat16), LARGE, None),
    (Case(300, 264, 136, 64, dtype=torch.bfloat16, layout="peft"), LARGE, 4),
]


@pytest.mark.parametrize("case, tile, schedule", CASES, ids=str)
def test_any_size_layout_and_rank(case, tile, schedule):
    o = case.operands()
    with emulate("sm_90", schedule) as executed:
        found = one_launch(tile, o, programs=3)
    compare(found, o, f"schedule {schedule}")
    assert len(executed) == 1


@pytest.mark.parametrize("case, tile, schedule", CASES[:3], ids=str)
def test_nothing_depends_on_programs_that_run_beside_each_other(case, tile, schedule, monkeypatch):
    """One block of threads runs at a time, from its start to its end, and in any order."""
    monkeypatch.setattr(launch, "RESIDENT_LANES", 1)
    o = case.operands()
    for shrinking in (1, 2, 9):
        with emulate("sm_90", schedule):
            found = one_launch(tile, o, 6, shrinking)
        compare(found, o, f"schedule {schedule}, {shrinking} shrinking")


def test_neither_programs_nor_their_order_change_a_bit():
    """More blocks of rows than programs that compute s of them, as many, and more programs than tiles."""
    o = Case(261, 136, 136, 16, dtype=torch.bfloat16).operands()
    results = []
    for programs, shrinking, schedule in ((1, 1, None), (6, 2, 1), (6, 6, 2), (132, None, 3)):
        with emulate("sm_90", schedule):
            results.append(one_launch(SMALL, o, programs, shrinking))
    assert all(torch.equal(each[name], results[0][name]) for each in results for name in ("y", "s"))


def test_an_infinity_stays_where_it_is():
    """Padded columns of a, s and b, and of x, a and w behind K, are zeros in both."""
    o = Case(133, 136, 72, 5, dtype=torch.bfloat16).operands()
    o.x[3, 7] = torch.inf
    with emulate("sm_90"), np.errstate(invalid="ignore"):
        found = one_launch(SMALL, o)
    compare(found, o, "an infinite x")
    for each in found.values():
        assert each[:3].isfinite().all() and each[4:].isfinite().all()


def test_alpha_in_memory_is_read_there():
    o = Case(70, 72, 72, 16, dtype=torch.bfloat16).operands()
    pointed = replace(o, case=replace(o.case, alpha=torch.tensor([o.case.alpha])))
    with emulate("sm_90"):
        first, second = (one_launch(SMALL, each) for each in (o, pointed))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("programs", [2, 132])
def test_bytes_and_flops(programs):
    """x once for each block of columns and once for s, a once for each block of rows; s and y stored once.

    No block is computed twice, and a program without a tile copies none.
    """
    M, N, K, R = 256, 512, 256, 16
    o = Case(M, N, K, R, dtype=torch.bfloat16, layout="peft").operands()
    with emulate("sm_90") as executed:
        one_launch(LARGE, o, programs)
    counters = executed[0].counters
    tensors = counters.tensors
    blocks_m, blocks_n = M // LARGE.block_m, N // LARGE.block_n
    assert tensors["x"].bytes_loaded == (blocks_n + 1) * M * K * 2
    assert tensors["w"].bytes_loaded == blocks_m * N * K * 2
    assert tensors["a"].bytes_loaded == blocks_m * K * R * 2
    assert tensors["whole_ptr"].bytes_stored == M * R * 4
    assert tensors["y"].bytes_stored == M * N * 2 and (tensors["y"].stores == 1).all()
    assert counters.flops == 2 * M * N * (K + R) + 2 * M * K * R


def test_a_layers_forward_and_every_gradient():
    """Forward by one launch where `tune` has timed it as the fastest; the backward is another algorithm's."""
    steps = train("sm_90", "persistent_one_launch", 7, rows=140)
    assert steps.forward == ["persistent"]


def test_what_it_does_not_take_is_computed_by_two_kernels():
    """A mask, a column scale, other types and strides are no fault of the plan, which sees less."""
    products = TritonProducts("persistent_one_launch", PROBLEM, SM_90, tiles_for(PROBLEM, SM_90))
    o = Case(70, 264, 72, 16, dtype=torch.bfloat16).operands()

    def takes(x=o.x, w=o.w, **change):
        return products._one_launch_takes(x, w, o.adapter._replace(**change))

    assert takes()
    assert not takes(dropout_in=Dropout(0.5, torch.tensor(1)))
    assert not takes(dropout_out=Dropout(0.5, torch.tensor(1)))
    assert not takes(column_scale=torch.ones(264))
    assert not takes(A=o.a.float()) and not takes(B=o.b.half()) and not takes(o.x.half())
    assert not takes(A=torch.ones(72, 65, dtype=torch.bfloat16)) and not takes(o.x[:, ::2])
    masked = replace(o.case, dropout=0.5).operands()
    adapter = masked.adapter._replace(dropout_in=masked.dropout)
    with emulate("sm_90") as executed:
        y, s = products.shrink_expand(masked.x, masked.w, adapter, masked.bias)
    compare({"y": y, "s": s}, masked, "two kernels")
    assert [each.name for each in executed] == ["shrink", "expand"]


def test_what_the_kernel_does_not_compute_is_refused():
    for rank, tile in ((65, SMALL), (16, replace(SMALL, ctas=1))):
        o = Case(70, 72, 72, rank, dtype=torch.bfloat16).operands()
        with pytest.raises(ValueError, match=rf"^s is computed without a mask.* rank {rank} and"):
            one_launch(tile, o)


def test_who_computes_s():
    """At 128x256 a program that has a tile less does two blocks beside the others' first tile."""
    assert shrinking_programs(64, 1024, 132, 256) == 32  # 7.76 waves leave 32 free
    assert shrinking_programs(65, 1024, 132, 256) == 132
    assert shrinking_programs(64, 1024, 132, 128) == 132
    assert shrinking_programs(8, 1024, 128, 256) == 128  # they come out even
    assert shrinking_programs(1, 1, 132, 256) == 131
