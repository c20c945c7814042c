"""Compiled Triton kernels run right in the emulator, and wrong ones are found out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.ptx import machine
from tests.ptx.counters import Counters
from tests.ptx.kernels import Compiled, Product, compiled, double_kernel
from tests.ptx.launch import prepare, run_chain
from tests.ptx.memory import MemoryFault
from tests.ptx.parser import PtxError

# Damaged kernels multiply garbage.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

TARGETS = [("sm_80", False), ("sm_90", False), ("sm_90", True), ("sm_100", True), ("sm_120", False)]
SCHEDULES = (1, 2, 3, 4, 5)
RIGHT = 1e-4  # float32 sums of 125 products of normal numbers


def noticed(kernel: Compiled, product: Product, schedules) -> str | None:
    """How the first schedule that finds something wrong does: the fault, or "wrong"."""
    for schedule in schedules:
        product.y.fill_(torch.nan)
        try:
            kernel.run(schedule)
        except PtxError as fault:
            return str(fault)
        if product.error > RIGHT:
            return "wrong"
    return None


@pytest.mark.parametrize("schedule", [None, 1, 2])
@pytest.mark.parametrize(("target", "tma"), TARGETS)
def test_product_with_a_rank_tail(target, tma, schedule):
    product = Product.of()
    launch = product.compile(target, tma=tma).run(schedule)
    assert product.error < RIGHT
    assert (launch.counters.tensors["y"].stores == 1).all()


@pytest.mark.parametrize(
    ("target", "tma", "instruction"),
    [
        ("sm_80", False, "ldmatrix"),
        ("sm_90", True, "wgmma.wait_group"),
        ("sm_90", True, "mbarrier.try_wait"),
        ("sm_90", True, "cp.async.bulk.tensor"),
        ("sm_90", True, "mbarrier.init"),
        ("sm_100", True, "mbarrier.try_wait"),
        ("sm_100", True, "tcgen05.commit"),
    ],
)
def test_a_missing_wait_or_copy_is_noticed(target, tma, instruction):
    """Each in turn, without luck: what nobody waits for has not arrived."""
    product = Product.of(64, 32, 112)
    kernel = product.compile(target, tma=tma)
    numbers = kernel.instructions(instruction)
    assert numbers
    missed = [n for n in numbers if noticed(kernel.without(n), product, [None]) is None]
    assert not missed


@pytest.mark.parametrize(("target", "tma"), [("sm_90", False), ("sm_90", True), ("sm_100", True)])
def test_a_missing_fence_before_the_tensor_core_reads_is_noticed(target, tma):
    """The tail's operands are stored by threads and read by the tensor core: its fence is the last."""
    product = Product.of(64, 32, 112)
    kernel = product.compile(target, tma=tma)
    last = kernel.instructions("fence.proxy.async")[-1]
    assert "without a fence.proxy.async" in noticed(kernel.without(last), product, [None])
    store = kernel.instructions("st.shared.b16")[0]
    early = kernel.without(last).edited(store, lambda line: kernel.ptx.splitlines()[last] + line)
    assert "without a fence.proxy.async" in noticed(early, product, [None])


def test_a_group_that_is_waited_for_too_early_is_noticed():
    """A wait that leaves one more copy under way."""
    product = Product.of(64, 32, 112)
    kernel = product.compile("sm_80")
    (first, *_) = kernel.instructions("cp.async.wait_group")
    assert noticed(kernel.edited(first, lambda line: line.replace("2;", "3;")), product, [None])


def test_a_branch_for_some_threads_only():
    """Threads that take a branch and threads that do not both arrive, in their own registers."""
    out = np.zeros(64, np.uint32)
    body = (
        "mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 10; mov.u32 %r2, 7; @%p1 bra SOME;"
        "add.u32 %r2, %r2, %r1; bra DONE; SOME: mul.lo.u32 %r2, %r1, 3; DONE:" + STORE
    )
    for schedule in (None, 1):
        run_text(body, out, schedule, 64)
        thread = np.arange(64)
        assert (out == np.where(thread < 10, 3 * thread, thread + 7)).all()


class TestDependentLaunch:
    @staticmethod
    def run(wait: bool, schedule: int | None, remove: bool = False) -> float:
        product = Product.of()
        half = product.s / 2
        product.s.fill_(torch.nan)
        n, block = half.numel(), 256
        primary = compiled(
            double_kernel, "sm_90", (-(-n // block),), half, product.s, n,
            BLOCK=block, MASKED=True, RELEASE=True,
        )  # fmt: skip
        kernel = product.compile("sm_90", wait=wait)
        (waiting,) = kernel.instructions("griddepcontrol.wait") or (None,)
        if remove:
            kernel = kernel.without(waiting)
        early = run_chain([primary.prepare(), kernel.prepare()], schedule)
        assert not early or remove or not wait
        return product.error

    @pytest.mark.parametrize("schedule", [None, 1, 2, 3])
    def test_it_waits_where_its_code_waits(self, schedule):
        assert self.run(True, schedule) < RIGHT

    def test_who_waits_keeps_nobody_from_going_on(self, monkeypatch):
        """Warp 0 waits at the lower counter for what warp 1 does when the primary has ended."""
        monkeypatch.setattr(machine, "MAX_STEPS", 1000)
        args = [("out", "*", np.zeros(4, np.uint32)), ("source", "*", np.zeros(4, np.uint32))]
        body = (
            "mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 32; setp.eq.u32 %p2, %r1, 0;"
            "@%p2 mbarrier.init.shared.b64 [area], 32; bar.sync 0; @!%p1 bra THERE;"
            "W: mbarrier.try_wait.parity.shared.b64 %p3, [area], 0; @!%p3 bra W; bra END;"
            "THERE: griddepcontrol.wait;"
            "mbarrier.arrive.shared.b64 _, [area]; END: mov.u32 %r2, %r1;"
        )
        primary = prepare(kernel_text(""), (1,), 32, args)
        run_chain([primary, prepare(kernel_text(body), (1,), 64, args)], None)

    @pytest.mark.parametrize("remove", [False, True])
    def test_a_missing_wait_reads_what_is_not_there_yet(self, remove):
        assert self.run(remove, None, remove) > RIGHT
        errors = [self.run(remove, schedule, remove) for schedule in SCHEDULES]
        assert max(errors) > RIGHT


class TestFaults:
    def doubled(self, n: int, masked: bool, block: int = 128) -> Compiled:
        source, out = torch.randn(n), torch.zeros(n)
        return compiled(
            double_kernel, "sm_80", (2,), source, out, n, BLOCK=block, MASKED=masked, RELEASE=False
        )

    def test_a_missing_mask(self):
        self.doubled(200, True).run()
        self.doubled(256, False).run()
        with pytest.raises(
            MemoryFault, match=r"line \d+: .*ld\.global.*of CTA \(1, 0, 0\): \d+ bytes outside"
        ):
            self.doubled(200, False).run()

    def test_the_fault_names_the_tensor(self):
        with pytest.raises(MemoryFault, match=r"of source \(800 bytes"):
            self.doubled(200, False).run()

    def test_an_element_between_the_rows_of_a_view_is_outside(self):
        """Memory that belongs to the tensor's storage and not to the tensor."""
        storage = torch.randn(4, 64)
        view = storage[:, :32]
        kernel = compiled(
            double_kernel, "sm_80", (1,), view, torch.zeros(128), 128, BLOCK=128, MASKED=False, RELEASE=False
        )  # fmt: skip
        with pytest.raises(MemoryFault, match="source"):
            kernel.run()

    def test_a_false_promise_of_alignment(self):
        kernel = self.doubled(1024, False, block=512)
        kernel.run()
        shifted = torch.randn(1025)[1:]
        with pytest.raises(MemoryFault, match="misaligned"):
            replace(kernel, bound={**kernel.bound, "source": shifted}).run()

    def test_a_false_promise_of_a_stride(self):
        """Compiled for a stride that 16 divides, called with another: the code rounds nothing, the addresses do not fit."""
        product = Product.of()
        kernel = product.compile("sm_80")
        other = Product.of(K=113)
        bound = {**kernel.bound, "x": other.x, "w": other.w, "K": 113, "stride_x": 113}
        with pytest.raises(MemoryFault, match="misaligned"):
            replace(kernel, bound=bound).run()

    @pytest.mark.parametrize("target", ["sm_80", "sm_90"])
    def test_a_stride_that_is_one_off(self, target):
        product = Product.of(N=47)  # no vector loads of w: every wrong address is aligned
        kernel = product.compile(target)
        with pytest.raises(MemoryFault, match="outside every tensor"):
            replace(kernel, bound={**kernel.bound, "stride_w": 48}).run()

    def test_a_deadlock_names_warp_and_instruction(self):
        body = "mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 32; @%p1 bra DONE; bar.sync 0, 64; DONE: ret;"
        said = r"nobody can go on\nline \d+: bar.sync 0, 64: CTA \(0, 0, 0\) warp 1"
        for schedule in (None, 1):
            with pytest.raises(PtxError, match=said):
                run_text(body, np.zeros(1, np.uint32), schedule, 64)

    def test_a_copy_that_nobody_issued_is_waited_for_in_vain(self):
        product = Product.of(64, 32, 64)
        kernel = product.compile("sm_90", tma=True)
        (first, *_) = kernel.instructions("cp.async.bulk.tensor")
        with pytest.raises(
            PtxError, match=r"nobody can go on\nline \d+: mbarrier.try_wait.*warp 0"
        ):
            kernel.without(first).run()

    def test_shared_memory_starts_as_garbage_and_ends(self):
        text = "ld.shared.u32 %r2, [area+{}];" + STORE
        out = np.zeros(32, np.uint32)
        run_text(text.format(0), out)
        assert (out == 0xFFFFFFFF).all()
        with pytest.raises(MemoryFault, match="shared address 4096"):
            run_text(text.format(4096), out)

    @pytest.mark.parametrize("text", ["frobnicate.u32 %r2, %r1;", "prmt.b32.f4e %r2, %r1, %r1, 0;"])
    def test_an_unknown_instruction(self, text):
        with pytest.raises(PtxError, match=r"line \d+: unknown opcode: \w+"):
            run_text(text, np.zeros(32, np.uint32))

    def test_part_of_a_warp_must_not_multiply(self):
        kernel = Product.of(64, 32, 64).compile("sm_80")
        (first, *_) = kernel.instructions("mma.sync")
        kernel = kernel.edited(first, lambda line: f"{{ .reg .b32 %me; .reg .pred %few; mov.u32 %me, %tid.x;"
                               f" setp.lt.u32 %few, %me, 7; @%few {line} }}")  # fmt: skip
        with pytest.raises(PtxError, match="executed by part of a warp"):
            kernel.run()


class TestCounters:
    def test_traffic_of_a_copy(self):
        source, out = torch.randn(256), torch.zeros(256)
        kernel = compiled(
            double_kernel, "sm_80", (2,), source, out, 256, BLOCK=128, MASKED=False, RELEASE=False
        )
        loaded, stored = (kernel.run().counters.tensors[name] for name in ("source", "out"))
        assert (loaded.bytes_loaded, loaded.load_sectors, loaded.fewest_load_sectors) == (
            1024,
            32,
            32,
        )
        assert (stored.bytes_stored, stored.store_sectors, stored.bytes_loaded) == (1024, 32, 0)

    def test_scattered_loads_touch_more_sectors(self):
        out = np.zeros(32, np.uint32)
        load = "mov.u32 %r1, %tid.x; mad.wide.u32 %rd3, %r1, 32, %rd2; ld.global.u32 %r2, [%rd3];"
        traffic = run_text(load + STORE, out).tensors["source"]
        assert (out == 8 * np.arange(32)).all()
        assert (traffic.bytes_loaded, traffic.load_sectors, traffic.fewest_load_sectors) == (
            128,
            32,
            4,
        )

    @pytest.mark.parametrize(("stride", "wavefronts"), [(1, 1), (2, 2), (8, 8), (32, 32), (33, 1)])
    def test_bank_conflicts(self, stride, wavefronts):
        body = f"mov.u32 %r1, %tid.x; mul.lo.u32 %r3, %r1, {4 * stride}; st.shared.u32 [%r3], %r1;"
        counters = run_text(body, np.zeros(1, np.uint32), shared=8192)
        assert (counters.wavefronts, counters.fewest_wavefronts) == (wavefronts, 1)

    @pytest.mark.parametrize(("target", "tma"), TARGETS)
    def test_flops_are_those_of_the_tiles(self, target, tma):
        product = Product.of(64, 32, 128, 16)
        assert product.compile(target, tma=tma).run().counters.flops == 2 * 64 * 32 * (128 + 16)

    def test_any_schedule_executes_the_same_instructions(self):
        product = Product.of()
        kernel = product.compile("sm_80")
        counted = [kernel.run(schedule).counters.instructions for schedule in (None, 1)]
        assert counted[0] == counted[1] and any(name.startswith("mma.") for name in counted[0])


def run_text(
    body: str, out: np.ndarray, schedule: int | None = None, threads: int = 32, shared: int = 4096
) -> Counters:
    """Executes the body of a kernel by one block; `out` is at %rd1, as many numbers 0, 1, ... at %rd2."""
    source = np.arange(256, dtype=np.uint32)
    args = [("out", "*", out), ("source", "*", source)]
    return prepare(kernel_text(body, shared), (1,), threads, args).run(schedule)


STORE = "mov.u32 %r9, %tid.x; mad.wide.u32 %rd9, %r9, 4, %rd1; st.global.u32 [%rd9], %r2;"


def kernel_text(body: str, shared: int = 4096) -> str:
    """A kernel of two pointers, in %rd1 and %rd2."""
    return f"""
    .visible .entry small(.param .u64 out, .param .u64 source) {{
        .reg .pred %p<9>; .reg .b32 %r<19>; .reg .b64 %rd<19>;
        .shared .align 16 .b8 area[{shared}];
        ld.param.u64 %rd1, [out]; ld.param.u64 %rd2, [source];
        {body}
        ret;
    }}"""


@pytest.mark.parametrize("schedule", [None, 1])
def test_lanes_that_part_meet_again(schedule):
    """A third jump over what a third do twice; who is ahead waits where the others come to, and all of them vote."""
    body = (
        "mov.u32 %r1, %tid.x; rem.u32 %r3, %r1, 3; mov.u32 %r4, 0; setp.eq.u32 %p1, %r3, 0; @%p1 bra THERE;"
        "AGAIN: add.u32 %r4, %r4, 1; setp.lt.u32 %p2, %r4, %r3; @%p2 bra AGAIN; add.u32 %r4, %r4, 1;"
        f"THERE: setp.gt.u32 %p3, %r4, 0; vote.sync.ballot.b32 %r2, %p3, -1; {STORE}"
    )
    out = np.zeros(64, np.uint32)
    run_text(body, out, schedule, 64)
    wanted = np.arange(64).reshape(2, 32) % 3 > 0
    assert (out.reshape(2, 32) == (wanted << np.arange(32)).sum(1)[:, None]).all()
