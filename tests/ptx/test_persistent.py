"""The persistent product with a barrier, a fence, an arrival or a wait less: noticed, or named here as spare."""

from __future__ import annotations

import pytest
import torch
import triton

from lora_kernels.backends.triton.configs import untried
from lora_kernels.backends.triton.launch import rank_operand
from lora_kernels.tuning.config import TileConfig
from lora_kernels.tuning.cycles import TRITON
from tests.compiled.recorder import recording
from tests.oracle import Case
from tests.ptx.kernels import Compiled
from tests.ptx.parser import PtxError
from tests.ptx.test_races import Spare, assert_as_small_as_can_be, bars, ordering_of

if (reason := untried()) is not None:
    pytest.skip(reason, allow_module_level=True)

from lora_kernels.backends.triton.persistent import fetchable, persistent

# A small tile has the instructions of the shipped one. Two tiles by one program: what one leaves, the next one finds.
SMALL = TileConfig("persistent", 64, 32, 32, 4, 3, tma=True)
CASE = Case(64, 64, 136, 16, dtype=torch.bfloat16, layout="peft")
# The compiler puts a barrier before each copy and after each wait. Every arrival, every wait for an mbarrier and for
# multiplies, both fences and the barriers around them are needed.
SPARE = Spare(
    (
        bars(0, 1, 2, 3, 4, 5),  # between the mbarriers' making and the first wait for one
        bars(7, 8),  # between a step's multiplies and the copies into what they read: of s and b,
        bars(11, 12),  # of the next tile's first step,
        bars(15, 16),  # of its second,
        bars(23, 24),  # and in the loop over K
    ),
    # After a wait that every warp has made itself, and before a second copy. The wait for the last store: a program's
    # shared memory must outlive the reading of it, which the emulator grants to every program.
    bars(6, 9, 10, 13, 14, 17, 22, 25, 26) | {"cp.async.bulk 2"},
)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # damaged kernels multiply garbage
@pytest.mark.skipif(triton.__version__ != TRITON, reason=f"the code of Triton {TRITON} was read")
def test_every_barrier_fence_arrival_and_wait():
    """Each deleted in turn, in lockstep."""
    o = CASE.operands()
    s = rank_operand(CASE.M, CASE.R, CASE.dtype, o.x.device).copy_(o.results(None)["s"])
    exact = o.results(torch.float64)["y"]
    with recording("sm_90") as launches:
        y = persistent(o.x, o.w, s, fetchable(o.b), o.bias, SMALL, 1)
    (launch,) = launches
    ptx = launch.compiled.asm["ptx"]
    kernel = Compiled(launch.compiled, launch.grid, launch.arguments, ptx)
    ordering = ordering_of(kernel)

    def unnoticed(names: set[str]) -> bool:
        y.fill_(torch.nan)
        try:
            kernel.without(*(ordering[name] for name in names)).run()
        except PtxError:
            return False
        return bool((y.double() - exact).abs().max() < 0.1)  # not for a NaN

    assert_as_small_as_can_be(SPARE, ordering, unnoticed)
