"""What nothing orders is a race, in whatever order it ran: in small programs, and in compiled ones with a barrier less."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from lora_kernels.tuning.cycles import TRITON
from tests.ptx.kernels import Compiled, Product
from tests.ptx.launch import prepare
from tests.ptx.races import DataRace
from tests.ptx.test_emulator import noticed, run_text

SCHEDULES = (None, 1, 2, 3)
# Each of 64 threads has a word, %r3, and that of a thread of the other warp, %r4.
WORDS = "mov.u32 %r1, %tid.x; shl.b32 %r3, %r1, 2; sub.u32 %r4, 252, %r3;"
WARP = "shr.u32 %r5, %r1, 5; setp.eq.u32 %p1, %r5, 0; setp.eq.u32 %p2, %r1, 0;"
STORE_MINE, LOAD_OTHER = "st.shared.b32 [%r3], %r1;", "ld.shared.b32 %r2, [%r4];"


def run(body: str, schedule: int | None = None, threads: int = 64) -> None:
    run_text(WORDS + WARP + body, np.zeros(96, np.uint32), schedule, threads)


def races(body: str, threads: int = 64) -> str:
    """What is said of the race in lockstep; with any seed there is one, too."""
    for schedule in SCHEDULES[1:]:
        with pytest.raises(DataRace):
            run(body, schedule, threads)
    with pytest.raises(DataRace) as race:
        run(body, None, threads)
    return str(race.value)


def is_ordered(body: str, threads: int = 64) -> None:
    for schedule in SCHEDULES:
        run(body, schedule, threads)


@pytest.mark.parametrize(
    ("first", "second", "kind"),
    [
        (STORE_MINE, LOAD_OTHER, "read after write of shared address 252"),
        (LOAD_OTHER, STORE_MINE, "write after read of shared address 0"),
        (STORE_MINE, "st.shared.b32 [%r4], %r1;", "write after write of shared address 252"),
    ],
)
def test_two_warps_and_a_barrier_between_them(first, second, kind):
    said = races(first + second)
    assert said.startswith(f"unordered: {kind} in CTA (0, 0, 0)\n")
    (late, early) = re.findall(r"line \d+: (.*): warp (\d)", said)
    assert late[0] + early[0] == second[:-1] + first[:-1] and late[1] != early[1]
    is_ordered(f"{first} bar.sync 0; {second}")


def test_a_warps_own_threads_are_one():
    is_ordered(STORE_MINE + "xor.b32 %r4, %r3, 4;" + LOAD_OTHER)


def test_stores_beside_each_other_share_nothing():
    halves = (
        "and.b32 %r6, %r1, 31; shl.b32 %r6, %r6, 2; shl.b32 %r7, %r5, 1; add.u32 %r6, %r6, %r7;"
    )
    is_ordered(halves + ".reg .b16 %h<2>; cvt.u16.u32 %h1, %r1; st.shared.b16 [%r6], %h1;")


def test_warps_that_hold_one_element_may_store_it_each():
    """As a layout does that gives several warps the same part of a tile; a later store comes after all of them."""
    same = "and.b32 %r6, %r3, 127; and.b32 %r7, %r1, 31; st.shared.b32 [%r6], {};"
    is_ordered(same.format("%r7"))
    assert "write after write" in races(same.format("%r1"))
    later = same.format("%r7") + "@!%p1 st.shared.b32 [%r6], %r1;"
    assert "line" in races(later)


def test_a_barrier_of_some_warps_orders_these_alone():
    """Warps 0 and 1 meet; that their seeds let warp 2 come late does not order it."""
    meet = STORE_MINE + "@!%p3 bar.sync 1, 64;"
    warp_2 = "setp.eq.u32 %p3, %r5, 2;"
    is_ordered(warp_2 + meet + "@!%p3 " + LOAD_OTHER, 96)
    races(warp_2 + meet + "mov.u32 %r4, 0; @%p3 " + LOAD_OTHER, 96)


def test_to_arrive_is_not_to_wait():
    """Warp 0 arrives and goes on, warp 1 waits: what warp 0 did before is over for warp 1, and no more."""
    meet = "@%p1 bar.arrive 1, 64; @!%p1 bar.sync 1, 64;"
    is_ordered(f"@%p1 {STORE_MINE} {meet} @!%p1 {LOAD_OTHER}")
    races(f"@!%p1 {STORE_MINE} {meet} @%p1 {LOAD_OTHER}")
    races(f"{meet} @%p1 {STORE_MINE} @!%p1 {LOAD_OTHER}")


INIT = "@%p2 mbarrier.init.shared.b64 [area+1024], 32; bar.sync 0;"
ARRIVE = "@%p1 mbarrier.arrive.shared.b64 _, [area+1024];"
WAIT = "W{0}: @!%p1 mbarrier.try_wait.parity.shared.b64 %p4, [area+1024], {0}; @!%p1 bra V{0}; bra U{0};" \
       "V{0}: @!%p4 bra W{0}; U{0}:"  # fmt: skip


def test_who_sees_a_phase_complete_comes_after_those_that_arrived():
    store, load = "@%p1 " + STORE_MINE, "@!%p1 " + LOAD_OTHER
    is_ordered(INIT + store + ARRIVE + WAIT.format(0) + load)
    assert "read after write" in races(INIT + store + ARRIVE + load)
    races(INIT + ARRIVE + store + WAIT.format(0) + load)
    again = "@!%p1 " + STORE_MINE
    races(INIT + load + WAIT.format(0) + ARRIVE + "@%p1 st.shared.b32 [%r4], %r1;" + again)


GLOBAL = "cvt.u64.u32 %rd3, %r3; add.u64 %rd3, %rd3, %rd1; cvt.u64.u32 %rd4, %r4; add.u64 %rd4, %rd4, %rd1;"
STORE_GLOBAL, LOAD_GLOBAL = "st.global.b32 [%rd3], %r1;", "ld.global.b32 %r2, [%rd4];"


def test_what_was_stored_in_global_memory_is_over_before_it_is_loaded():
    is_ordered(GLOBAL + STORE_GLOBAL + "bar.sync 0;" + LOAD_GLOBAL)
    assert "read after write of byte 252 of out" in races(GLOBAL + STORE_GLOBAL + LOAD_GLOBAL)


@pytest.mark.parametrize("add", ["membar.gl; atom.global.add.u32 %r7, [%rd2], 1; membar.gl;",
                                 "atom.acq_rel.gpu.global.add.u32 %r7, [%rd2], 1;"])  # fmt: skip
def test_a_fenced_atomic_hands_on_what_is_over(add):
    """Warp 1 reads when it finds that warp 0's threads have added."""
    until = (
        "W: @!%p1 atom.acquire.global.add.u32 %r8, [%rd2], 0; setp.lt.u32 %p4, %r8, 32; @%p4 bra W;"
    )
    body = f"{GLOBAL} @%p1 {STORE_GLOBAL} mov.u32 %r8, 32; @!%p1 bra L; {{}} L: {until} @!%p1 {LOAD_GLOBAL}"
    is_ordered(body.format(add))
    load = "ld.acquire.gpu.global.u32 %r8, [%rd2];"
    loads = body.format(add).replace("atom.acquire.global.add.u32 %r8, [%rd2], 0;", load)
    is_ordered(loads)
    assert "read after write" in races(loads.replace("ld.acquire", "ld.relaxed"))
    relaxed = body.format(add).replace("atom.acquire", "atom")
    assert "read after write" in races(relaxed)
    for bare in (
        "atom.global.add.u32 %r7, [%rd2], 1;",
        "atom.acquire.global.add.u32 %r7, [%rd2], 1;",
    ):
        assert "read after write" in races(body.format(bare))


# Block 0 stores a row of x and says so; block 1 waits for that, copies the row and reads what arrives.
COPIES = """
.visible .entry copies(.param .align 64 .b8 map[128], .param .u64 h, .param .u64 w, .param .u64 sh, .param .u64 sw,
                       .param .u64 x, .param .u64 flag, .param .u64 out) .reqntid 32 {{
    .reg .pred %p<9>; .reg .b32 %r<9>; .reg .b64 %rd<9>;
    .shared .align 128 .b8 area[128];
    .shared .align 8 .b8 bar[8];
    ld.param.u64 %rd1, [x]; ld.param.u64 %rd2, [flag]; ld.param.u64 %rd3, [out];
    mov.b32 %r1, map; cvt.u64.u32 %rd4, %r1; cvta.param.u64 %rd4, %rd4;
    mov.u32 %r1, %tid.x; setp.eq.u32 %p1, %r1, 0; mov.u32 %r2, %ctaid.x; setp.eq.u32 %p2, %r2, 0;
    shl.b32 %r3, %r1, 2; cvt.u64.u32 %rd5, %r3; add.u64 %rd1, %rd1, %rd5; add.u64 %rd3, %rd3, %rd5;
    mov.b32 %r4, area; add.u32 %r4, %r4, %r3;
    @%p1 mbarrier.init.shared::cta.b64 [bar], 1;
    @!%p2 bra READS;
    st.global.b32 [%rd1], %r1;
    {says}
    @%p1 atom.global.gpu.release.exch.b32 %r5, [%rd2], 1;
    ret;
READS:
    ld.global.gpu.{order}.b32 %r5, [%rd2]; setp.eq.u32 %p3, %r5, 0; @%p3 bra READS;
    {fence}
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], 128;
    @%p1 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [area], [%rd4, {{0, 0}}], [bar];
W:  mbarrier.try_wait.parity.shared::cta.b64 %p4, [bar], 0; @!%p4 bra W;
    ld.shared.b32 %r6, [%r4];
    st.global.b32 [%rd3], %r6;
    ret;
}}
"""


def copied(fence: str, schedule: int | None, order: str = "acquire", says: str = "") -> np.ndarray:
    x, out = torch.zeros((1, 32), dtype=torch.int32), np.zeros(32, np.uint32)
    args: list[tuple] = [("map", "tensordesc", TensorDescriptor.from_tensor(x, [1, 32]))]
    args += [("x", "*", x), ("flag", "*", np.zeros(1, np.uint32)), ("out", "*", out)]
    box = {"block_size": [1, 32], "swizzle": 0}
    text = COPIES.format(fence=fence, order=order, says=says)
    prepare(text, (2,), 32, args, descriptors=[box]).run(schedule)
    return out


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_tensor_copy_of_what_threads_have_stored_comes_after_a_fence(schedule):
    """The fence is the reader's, between acquire and copy, and of global memory."""
    for fence in ("fence.proxy.async.global;", "fence.proxy.async;"):
        assert (copied(fence, schedule) == np.arange(32)).all()
    for fence in ("", "fence.proxy.async.shared::cta;"):
        said = r"^without a fence\.proxy\.async: read after write of byte 0 of map in CTA"
        with pytest.raises(DataRace, match=said):
            copied(fence, schedule)
    with pytest.raises(DataRace, match="without a fence"):
        copied("", schedule, says="fence.proxy.async.global;")
    with pytest.raises(DataRace, match="unordered"):
        copied("fence.proxy.async.global;", schedule, order="relaxed")


def test_an_mbarrier_is_made_before_and_ended_after_its_use():
    use = ARRIVE + WAIT.format(0)
    end = "@%p2 mbarrier.inval.shared.b64 [area+1024];"
    is_ordered(INIT + use + "bar.sync 0;" + end)
    assert "write after read" in races(INIT + use + end)


def test_a_copy_is_over_for_the_threads_that_waited_for_it():
    copy = "cvt.u64.u32 %rd3, %r3; add.u64 %rd3, %rd3, %rd2; cp.async.ca.shared.global [%r3], [%rd3], 4;"
    commit, wait, own = (
        "cp.async.commit_group;",
        "cp.async.wait_group 0;",
        "ld.shared.b32 %r2, [%r3];",
    )
    is_ordered(copy + commit + wait + own)
    is_ordered(copy + commit + wait + "bar.sync 0;" + LOAD_OTHER)
    assert "cp.async of warp" in races(copy + commit + own)
    races(copy + commit + wait + LOAD_OTHER)
    races(copy + commit + "bar.sync 0;" + wait + LOAD_OTHER)


ORDERING = re.compile(r"(?<!\.)\b(bar|barrier|barrier\.cluster|mbarrier|cp\.async|cp\.async\.bulk|wgmma|tcgen05|fence)"
                      r"\.(sync|init|mbarrier_init|arrive|try_wait|wait_group|wait|commit|proxy\.async)\b")  # fmt: skip


def ordering_of(kernel: Compiled) -> dict[str, int]:
    """The lines of what orders accesses, by name: "bar 0", "bar 1", ..., "fence 0", ...

    Without what ends an mbarrier, begins a group of copies or orders registers.
    """
    found: dict[str, int] = {}
    counts: Counter[str] = Counter()
    for number, line in enumerate(kernel.ptx.splitlines()):
        match = ORDERING.search(line.partition("//")[0])
        if match and match[0] not in ("wgmma.commit", "cp.async.commit"):
            kind = match[1].replace("barrier", "bar") if match[2] == "sync" else match[1]
            found[f"{kind} {counts[kind]}"] = number
            counts[kind] += 1
    return found


@dataclass(frozen=True)
class Spare:
    """What a program can do without: `idle` all at once, and of each set of `together` all but any one."""

    together: tuple[set[str], ...] = ()
    idle: set[str] = field(default_factory=set)


def bars(*numbers: int) -> set[str]:
    return {f"bar {n}" for n in numbers}


# The compiler puts a barrier before each copy, before each multiply and after each wait. Idle are those beside a wait in
# which every warp waits for the same mbarrier itself, and those between two accesses that may be in any order.
SPARE = {
    ("sm_80", False): Spare(  # two equal waits; the loop's first wait repeats that before the loop or of the last step
        ({"cp.async 2", "cp.async 3"},), {"cp.async 1", "bar 1"},
    ),
    ("sm_90", False): Spare(),
    ("sm_90", True): Spare(
        (
            bars(0, 1, 2, 3, 4, 5),  # between the mbarriers' making and the first wait for one
            bars(7, 8),  # between a step's multiplies and the copy into what they read
            bars(10, 11),  # between the last multiplies and the stores over what they read
        ),
        bars(6, 9),
    ),
    ("sm_100", False): Spare(
        # A step's copies, a barrier, each warp's fence, a barrier, the multiply: fence and barrier in either order.
        (bars(2, 3), bars(5, 6)),
        bars(4, 7, 10, 19) | {"cp.async 2"},  # nobody touches again what the last, empty copies fill
    ),
    ("sm_100", True): Spare(
        (
            bars(1, 2, 3),  # between the reading of tensor memory's address and a copy over it
            bars(2, 3, 4, 5, 6, 7),  # between the mbarriers' making and the first wait for one
            bars(17, 18),  # between the last wait for an mbarrier and its end
        ),
        bars(8, 9, 10, 11, 12, 13, 14, 15, 16, 20, 29),
    ),
    ("sm_120", False): Spare(),
    ("sm_120", True): Spare(
        (
            bars(0, 1, 2, 3, 4, 5),  # between the mbarriers' making and the first wait for one
            bars(6, 7, 8),  # between the reading of x and the copy over it
            bars(7, 8, 9),  # between the reading of w and the copy over it
        ),
        bars(10, 11) | {"fence 0"},  # between threads' reads and a copy over what they read: no fence is asked for
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # damaged kernels multiply garbage
@pytest.mark.skipif(triton.__version__ != TRITON, reason=f"the code of Triton {TRITON} was read")
@pytest.mark.parametrize(("target", "tma"), SPARE)
def test_every_barrier_fence_and_wait_of_the_product(target, tma):
    """Each deleted in turn is noticed, in lockstep, but for those that are spare; the sets are as small as can be."""
    product = Product.of(64, 32, 112)
    kernel, spare = product.compile(target, tma=tma), SPARE[target, tma]
    ordering = ordering_of(kernel)

    def unnoticed(names: set[str]) -> bool:
        numbers = [ordering[name] for name in names]
        return noticed(kernel.without(*numbers), product, [None]) is None

    assert_as_small_as_can_be(spare, ordering, unnoticed)


def assert_as_small_as_can_be(
    spare: Spare, ordering: dict[str, int], unnoticed: Callable[[set[str]], bool]
) -> None:
    """`unnoticed` is whether the kernel without these is right, and nothing races."""
    assert unnoticed(set())
    assert {name for name in ordering if unnoticed({name})} == spare.idle.union(*spare.together)
    assert unnoticed(spare.idle)
    for group in spare.together:
        assert not unnoticed(group)
        assert all(unnoticed(group - {name}) for name in group)


@pytest.mark.parametrize(("target", "tma"), SPARE)
def test_without_any_barrier_every_product_races(target, tma):
    product = Product.of(64, 32, 112)
    kernel = product.compile(target, tma=tma)
    numbers = [n for name, n in ordering_of(kernel).items() if name.startswith("bar")]
    assert noticed(kernel.without(*numbers), product, [None]).startswith("unordered")
