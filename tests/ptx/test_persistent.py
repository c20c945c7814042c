"""The persistent product with a barrier, a fence, an arrival or a wait less: noticed, or named here as spare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
import triton

from lora_kernels.backends.triton.configs import untried
from lora_kernels.backends.triton.expand import Shrink
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

# It computes s too: four tiles by two programs, one of which computes s of both blocks of rows before.
ONE_LAUNCH = "sm_90, s in one launch"
MASKED = "sm_90, a mask of dx"
# Small tiles have the instructions of the shipped ones. Two tiles by one program, or three where two accumulators take
# turns: what one leaves, the next one finds.
SMALL = {
    "sm_90": TileConfig("persistent", 64, 32, 32, 4, 3, tma=True),
    MASKED: TileConfig("persistent", 64, 32, 32, 4, 3, tma=True),
    ONE_LAUNCH: TileConfig("persistent_one_launch", 64, 32, 32, 4, 3, tma=True),
    "sm_100": TileConfig("persistent", 128, 32, 32, 4, 2, tma=True, ctas=1),
    "sm_100, a pair": TileConfig("persistent", 256, 64, 32, 4, 2, tma=True, ctas=2),
}
# The compiler puts a barrier before each copy and after each wait. Every arrival, every wait for an mbarrier and for
# multiplies, every commit and fence and the barriers around them are needed.
# The wait for the last store: a program's shared memory must outlive the reading of it, which the emulator grants to every
# program. Of the waits for loads of tensor memory it needs the last one, before the next tile: loads fill registers at once.
LOADS = {"tcgen05 0", "tcgen05 1", "tcgen05 2"}
SPARE = {
    "sm_90": Spare(
        (
            bars(0, 1, 2, 3, 4, 5),  # between the mbarriers' making and the first wait for one
            bars(
                7, 8
            ),  # between a step's multiplies and the copies into what they read: of s and b,
            bars(11, 12),  # of the next tile's first step,
            bars(15, 16),  # of its second,
            bars(23, 24),  # and in the loop over K
        ),
        # After a wait that every warp has made itself, and before a second copy.
        bars(6, 9, 10, 13, 14, 17, 22, 25, 26) | {"cp.async.bulk 2"},
    ),
    MASKED: Spare(
        (
            bars(0, 1, 2, 3, 4, 5),  # as above
            bars(7, 8),
            bars(11, 12),
            bars(14, 15),  # before the mask
            bars(23, 24),
        ),
        bars(6, 9, 10, 13, 16, 17, 22, 25, 26) | {"cp.async.bulk 2"},
    ),
    ONE_LAUNCH: Spare(
        (
            bars(
                10, 11
            ),  # as above: between a step's multiplies and the copies into what they read, in x·a's loop,
            bars(23, 24),  # in the loop over K
            bars(28, 29),  # and behind it
            bars(32, 33),
            bars(36, 37),
            bars(
                13, 14
            ),  # between the stores of s and its release: ours, and the compiler's for any release
        ),
        # After a wait that every warp has made itself; before a second copy; and between the mbarriers' making and the
        # first wait for one, where each program has taken its ticket, and the program that computes s a block.
        bars(3, 4, 5, 6, 7, 8, 9, 12, 16, 17, 18, 19, 20, 21, 22, 25, 26, 30, 31, 34, 35, 38, 43)
        | {"cp.async.bulk 2"},
    ),
    # Before the warps part, which is a barrier too; between the last loads, behind which is a barrier already, and the
    # arrival; at the end, where nobody comes after; and for warps that are not there.
    "sm_100": Spare((), bars(1, 12, 15, 22, 23, 24) | {"cp.async.bulk 4"} | LOADS),
    "sm_100, a pair": Spare(
        (
            {"barrier.cluster 5", "barrier.cluster 9"},
        ),  # at the end: those that store wait, or the others
        bars(1, 15, 19, 28, 29) | {"cp.async.bulk 4"} | LOADS,
    ),
}
# The arrivals and waits of the pair's own barrier, by where they stand, and whether the pair can do without: at the
# beginning, where the emulator lets both CTAs begin at once; after the mbarriers' making; before the end.
MEETINGS = {(0, 1): True, (2, 3, 6, 7): False, (4, 5, 8, 9): False}


pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # damaged kernels multiply garbage
    pytest.mark.skipif(
        triton.__version__ != TRITON, reason=f"the code of Triton {TRITON} was read"
    ),
]


def small(kind: str) -> tuple[Compiled, Callable[[Compiled], bool]]:
    """The kernel of a small product, and whether one like it gives the product, in lockstep and with no fault."""
    tile = SMALL[kind]
    columns = (3 if tile.ctas else 2) * tile.block_n
    rows = (2 if kind == ONE_LAUNCH else 1) * tile.block_m
    case = Case(rows, columns, 136, 16, dtype=torch.bfloat16, layout="peft")
    if kind == MASKED:
        case = replace(case, N=136, K=columns, dropout=0.25)
    o = case.operands()
    direction = ("dx", "q") if kind == MASKED else ("y", "s")
    exact, _ = (o.results(torch.float64)[name] for name in direction)
    s = rank_operand(case.M, case.R, case.dtype, o.x.device).copy_(o.results(None)[direction[1]])
    operands = (o.x, o.w, s, fetchable(o.b), o.bias)
    own: dict[str, Any] = {}
    programs = 1
    if kind == MASKED:
        operands = (o.dy, o.w.t(), s, fetchable(o.a.t()), None)
        own = {"dropout": o.dropout}
    if kind == ONE_LAUNCH:
        own = {"first": Shrink(o.a, case.alpha, torch.empty(rows, 16), None), "shrinking": 1}
        programs = 2
    with recording(kind.partition(",")[0]) as launches:
        y = persistent(*operands, tile, programs, **own)
    (launch,) = launches
    state = launch.arguments.get("state_ptr")

    def is_right(kernel: Compiled) -> bool:
        y.fill_(torch.nan)
        if state is not None:
            s.fill_(torch.nan)
            state.zero_()
        try:
            kernel.run()
        except PtxError:
            return False
        return bool((y.double() - exact).abs().max() < 0.1)  # not for a NaN

    ptx = launch.compiled.asm["ptx"]
    return Compiled(launch.compiled, launch.grid, launch.arguments, ptx), is_right


@pytest.mark.parametrize("kind", SMALL)
def test_every_barrier_fence_arrival_and_wait(kind):
    """Each deleted in turn."""
    kernel, is_right = small(kind)
    ordering = ordering_of(kernel)

    def unnoticed(names: set[str]) -> bool:
        return is_right(kernel.without(*(ordering[name] for name in names)))

    assert_as_small_as_can_be(SPARE[kind], ordering, unnoticed)
    for numbers, spare in MEETINGS.items() if kind.endswith("pair") else ():
        assert unnoticed({f"barrier.cluster {n}" for n in numbers}) == spare


def test_s_is_released_and_acquired():
    """Each alone relaxed is noticed, where no value shows it; so is a fence of another memory."""
    kernel, is_right = small(ONE_LAUNCH)
    assert is_right(kernel)
    changes = (
        (".release.", ".relaxed."),
        (".acquire.", ".relaxed."),
        ("async.global", "async.shared::cta"),
    )
    for kept, other in changes:
        (number,) = kernel.instructions(kept)
        line = kernel.ptx.splitlines()[number].replace(kept, other)
        assert not is_right(kernel.edited(number, lambda _, line=line: line))


def test_what_a_pair_does_for_both():
    """The copies and stores of each CTA arrive at rank 0's barriers, each commit at those of both."""
    kernel, is_right = small("sm_100, a pair")
    assert is_right(kernel)
    changes = (("-16777224", "-16777224", ("-8",)), ("mov.b16 \t%rs", "3;", ("1;", "2;")))
    for needle, kept, others in changes:
        numbers = kernel.instructions(needle)
        assert len(numbers) >= 3
        for number, other in product(numbers, others):
            line = kernel.ptx.splitlines()[number].replace(kept, other)
            assert not is_right(kernel.edited(number, lambda _, line=line: line))
