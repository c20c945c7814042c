"""A cluster of two CTAs: addresses, its barrier, each other's shared memory and mbarriers, and copies to both."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from tests.ptx.launch import prepare
from tests.ptx.memory import MemoryFault
from tests.ptx.parser import SHARED_WINDOW, PtxError
from tests.ptx.races import DataRace

SCHEDULES = (None, 1, 2, 3)
# %r1: the thread, %r2: the rank, %r3: the thread's own word of `area`, %r4: the same word of the other CTA.
TEXT = """
.visible .entry pair(.param .u64 out, .param .align 64 .b8 x[128], .param .u64 h, .param .u64 w, .param .u64 sh,
                     .param .u64 sw) .reqntid 32 .explicitcluster .reqnctapercluster 2 {{
    .reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<20>; .reg .b64 %rd<9>;
    .shared .align 128 .b8 area[512];
    .shared .align 8 .b8 bar[16];
    ld.param.u64 %rd1, [out];
    mov.b32 %r9, x; cvt.u64.u32 %rd3, %r9; cvta.param.u64 %rd2, %rd3;
    mov.u32 %r1, %tid.x; mov.u32 %r2, %cluster_ctarank; mov.u32 %r10, %ctaid.x;
    setp.eq.u32 %p1, %r1, 0; setp.eq.u32 %p2, %r2, 0; and.pred %p3, %p1, %p2; not.pred %p4, %p2;
    mov.b32 %r3, area; shl.b32 %r5, %r1, 2; add.u32 %r3, %r3, %r5;
    xor.b32 %r6, %r2, 1; mapa.shared::cluster.u32 %r4, %r3, %r6;
    mad.lo.u32 %r7, %r10, 128, %r5; cvt.u64.u32 %rd4, %r7; add.u64 %rd4, %rd4, %rd1;
    {body}
    st.global.b32 [%rd4], %r8;
    ret;
}}
"""
MEET = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"
INIT = "@%p1 mbarrier.init.shared::cta.b64 [bar], {}; @%p1 fence.mbarrier_init.release.cluster;"
MEET_RELAXED = "barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.aligned;"
WAIT = "W: mbarrier.try_wait.parity.shared::cta.b64 %p5, [bar], 0; @!%p5 bra W;"
STORE_THERE, LOAD_MINE = "st.shared::cluster.b32 [%r4], %r10;", "ld.shared.b32 %r8, [%r3];"


@dataclass
class Described:
    """What a tensor descriptor says of its tensor."""

    base: object
    shape: tuple[int, ...]
    strides: tuple[int, ...]


SOURCE = np.arange(64, dtype=np.uint32).reshape(2, 32)


def run(body: str, schedule: int | None = None, clusters: int = 2) -> np.ndarray:
    """What each thread of each CTA has in %r8 at the end."""
    out = np.zeros((2 * clusters, 32), np.uint32)
    described = Described(SOURCE, (2, 32), (32, 1))
    args = [("out", "*", out), ("x", "tensordesc", described)]
    metas = [{"block_size": [1, 32], "swizzle": 0}]
    text = TEXT.format(body=body)
    prepare(text, (2 * clusters,), 32, args, descriptors=metas).run(schedule)
    return out


def always(body: str) -> np.ndarray:
    """The same under every schedule."""
    results = [run(body, schedule) for schedule in SCHEDULES]
    assert all((each == results[0]).all() for each in results)
    return results[0]


def never(body: str, fault: type[PtxError] = DataRace) -> str:
    """What is said in lockstep of a fault that every schedule has."""
    for schedule in SCHEDULES[1:]:
        with pytest.raises(fault):
            run(body, schedule)
    with pytest.raises(fault) as said:
        run(body)
    return str(said.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mov.u32 %r8, %cluster_ctarank;", [0, 1, 0, 1]),
        ("mov.u32 %r8, %cluster_nctarank;", [2] * 4),
        ("mov.u32 %r8, %cluster_ctaid.x;", [0, 1, 0, 1]),
        ("mov.u32 %r8, %clusterid.x;", [0, 0, 1, 1]),
        ("mov.u32 %r8, %nclusterid.x;", [2] * 4),
        ("mov.u32 %r8, %ctaid.x;", [0, 1, 2, 3]),
        ("mov.b32 %r8, area; shr.u32 %r8, %r8, 24;", [0, 1, 0, 1]),
        ("getctarank.shared::cluster.u32 %r8, %r4;", [1, 0, 1, 0]),
        ("sub.u32 %r8, %r4, %r3; abs.s32 %r8, %r8;", [SHARED_WINDOW] * 4),
        ("and.b32 %r9, %r3, -16777217; mapa.u32 %r9, %r9, %r2; sub.u32 %r8, %r9, %r3;", [0] * 4),
    ],
)
def test_ranks_and_addresses(text, expected):
    assert (always(text) == np.array(expected)[:, None]).all()


def test_a_store_into_the_other_ctas_shared_memory():
    found = always(STORE_THERE + MEET + LOAD_MINE + MEET)
    assert (found == np.array([1, 0, 3, 2])[:, None]).all()
    said = never(STORE_THERE + LOAD_MINE + MEET)
    assert "read after write of shared address 0 in CTA (0, 0, 0)" in said
    assert "ld.shared.b32 %r8, [%r3]: warp 0 of rank 0" in said
    assert "st.shared::cluster.b32 [%r4], %r10: warp 0 of rank 1" in said


def test_an_arrival_that_releases_nothing_orders_nothing():
    """But for mbarriers that a fence stands behind."""
    never(STORE_THERE + MEET_RELAXED + LOAD_MINE + MEET)
    arrive = "@%p1 mbarrier.arrive.shared::cluster.b64 _, [%r11];"
    there = "mov.b32 %r9, bar; mapa.shared::cluster.u32 %r11, %r9, %r6;"
    always(INIT.format(1) + there + MEET_RELAXED + arrive + WAIT + MEET)
    bare = INIT.format(1).split("; ")[0] + ";"
    never(bare + there + MEET_RELAXED + arrive + WAIT + MEET)
    always(bare + there + MEET + arrive + WAIT + MEET)


def test_shared_cta_is_a_threads_own():
    for text in ("ld.shared.b32 %r8, [%r4];", "ld.shared::cta.b32 %r8, [%r4];"):
        assert "shared address" in never(text, MemoryFault)
    far = f"add.u32 %r4, %r3, {2 * SHARED_WINDOW};"
    assert "shared address" in never(far + STORE_THERE, MemoryFault)


def test_an_mbarrier_of_the_other_cta_hands_on_what_was_stored_there():
    there = "mov.b32 %r9, bar; mapa.shared::cluster.u32 %r11, %r9, %r6;"
    begin = INIT.format(32) + there + MEET
    arrive = "mbarrier.arrive.shared::cluster.b64 _, [%r11];"
    found = always(begin + STORE_THERE + arrive + WAIT + LOAD_MINE + MEET)
    assert (found == np.array([1, 0, 3, 2])[:, None]).all()
    never(begin + arrive + STORE_THERE + WAIT + LOAD_MINE + MEET)
    own = arrive.replace("%r11", "%r9")
    never(begin + STORE_THERE + own + WAIT + LOAD_MINE + MEET)


def test_a_cta_ends_no_earlier_than_the_other_is_done_with_its_shared_memory():
    said = never("@%p2 st.shared::cluster.b32 [%r4], %r10; mov.u32 %r8, 0;", PtxError)
    assert "CTA (1, 0, 0) ends after write of shared address" in said
    always("@%p2 st.shared::cluster.b32 [%r4], %r10; mov.u32 %r8, 0;" + MEET)
    # Rank 1 is over when rank 0 begins to store.
    late = "@%p4 bra END; nanosleep.u32 100; " + STORE_THERE + " END: mov.u32 %r8, 0;"
    never(late, PtxError)


def test_who_waits_has_arrived_and_arrives_once():
    assert "without having arrived" in never("barrier.cluster.wait.aligned;", PtxError)
    assert "arrives twice" in never("barrier.cluster.arrive.aligned;" * 2, PtxError)
    alone = "@%p4 bra END; barrier.cluster.arrive; barrier.cluster.wait; END: mov.u32 %r8, %r2;"
    assert (always(alone) == np.array([0, 1, 0, 1])[:, None]).all()  # rank 1 has ended


EXPECT = "@%p1 mbarrier.arrive.expect_tx.shared::cluster.b64 _, [{}], {};"
COPY = "cp.async.bulk.tensor.2d{}.shared::cluster.global.mbarrier::complete_tx::bytes{} [area], [%rd2, {{0, {}}}], [{}]{};"


def test_a_copy_to_both_ctas():
    """Rank 0 copies a row of x to the same place in both, where each CTA's own barrier has it."""
    copy = "mov.u16 %h1, 3; @%p3 " + COPY.format("", ".multicast::cluster", 1, "bar", ", %h1")
    begin = INIT.format(1) + MEET_RELAXED + EXPECT.format("bar", 128)
    found = always(begin + copy + WAIT + LOAD_MINE + MEET)
    assert (found == SOURCE[1]).all()
    never(begin + copy + LOAD_MINE + WAIT + MEET)
    alone = copy.replace("%h1, 3", "%h1, 1")
    assert "nobody can go on" in never(begin + alone + WAIT + LOAD_MINE + MEET, PtxError)


def test_copies_of_a_pair_may_complete_on_one_barrier():
    """Each CTA copies its own row; rank 0's barrier has both. Without cta_group::2 that is no instruction."""
    first = "mov.b32 %r9, bar; and.b32 %r11, %r9, -16777217;"
    begin = INIT.format(2) + MEET_RELAXED + first + EXPECT.format("%r11", 128)
    copy = "@%p1 " + COPY.format(".cta_group::2", "", "%r2", "%r11", "")
    wait = "@!%p2 bra THERE;" + WAIT + "THERE:" + MEET
    found = always(begin + copy + wait + LOAD_MINE)
    assert (found == SOURCE[[0, 1, 0, 1]]).all()
    never(begin + copy + LOAD_MINE + wait)
    other = "barrier of another CTA"
    assert other in never(begin + copy.replace(".cta_group::2", "") + wait + LOAD_MINE, PtxError)
