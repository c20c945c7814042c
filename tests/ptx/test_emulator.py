"""The emulator computes what the compiled code says, and notices what is wrong with it.

Every fault below is put into PTX that Triton really emitted, one at a time. A fault counts as noticed when the run raises
or its result leaves the error budget.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from lora_kernels.backends.triton.lowrank_matmul import lowrank_matmul
from lora_kernels.backends.triton.shrink import shrink
from lora_kernels.tuning.config import TileConfig
from tests.compiled.recorder import GPU_TARGETS, Recorded, compile_call, recording
from tests.oracle import Case, assert_budget
from tests.ptx.launch import Launch, emulate, prepare, prepare_triton, run_dependent
from tests.ptx.memory import MemoryFault
from tests.ptx.parser import PtxError, parse

CASE = Case(72, 40, 80, 12, dtype=torch.bfloat16)
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120")


@dataclass
class Product:
    """The fused product compiled for a target with its operands, to be run again with other PTX."""

    recorded: Recorded
    y: torch.Tensor

    def launch(self, ptx: str | None = None) -> Launch:
        compiled: Any = self.recorded.compiled
        self.y.fill_(float("nan"))
        if ptx is None:
            return prepare_triton(compiled, self.recorded.grid, self.recorded.arguments)
        return prepare_triton(_Changed(compiled, ptx), self.recorded.grid, self.recorded.arguments)

    def noticed(self, ptx: str, schedules=(None, 1, 2, 3)) -> bool:
        """Whether some schedule raises or leaves the budget."""
        for schedule in schedules:
            try:
                self.launch(ptx).run(schedule)
                self.check()
            except (PtxError, AssertionError):
                return True
        return False

    def check(self) -> None:
        o = CASE.operands()
        assert_budget(self.y, o.results(None)["y"], o.results(torch.float64)["y"])

    @property
    def ptx(self) -> str:
        return self.recorded.compiled.asm["ptx"]


class _Changed:
    """A compiled kernel with other PTX."""

    def __init__(self, compiled, ptx):
        self.src, self.metadata, self.asm = compiled.src, compiled.metadata, {"ptx": ptx}


def product(target: str) -> Product:
    o = CASE.operands()
    s = o.results(None)["s"].float()
    tma = target in ("sm_90", "sm_100")
    config = TileConfig("lowrank_matmul", 64, 32, 32, 4, 3, tma=tma, rank_chunk=32)
    with recording(target) as launches:
        y = lowrank_matmul(o.x, o.w, s, o.b, o.bias, config)
    return Product(launches[0], y)


@pytest.fixture(scope="module")
def products():
    return {target: product(target) for target in TARGETS}


@pytest.mark.parametrize("schedule", [None, 1, 2])
@pytest.mark.parametrize("target", TARGETS)
def test_the_product_is_right(products, target, schedule):
    products[target].launch().run(schedule)
    products[target].check()


def without(ptx: str, pattern: str, number: int = 0) -> str:
    """`ptx` without the n-th instruction that matches."""
    found = list(re.finditer(rf"^[ \t]*(?:@\S+ )?{pattern}[^\n]*;", ptx, re.M))
    assert len(found) > number, f"no {pattern} to delete"
    match = found[number]
    return ptx[: match.start()] + ptx[match.end() :]


def test_deleted_barriers(products):
    """Most: what is left guards a reuse of shared memory that this small problem does not reach."""
    ptx = products["sm_80"].ptx
    count = len(re.findall(r"^\s*bar\.sync", ptx, re.M))
    noticed = sum(products["sm_80"].noticed(without(ptx, r"bar\.sync", n)) for n in range(count))
    assert count >= 4 and noticed >= count / 2


@pytest.mark.parametrize(
    "target, pattern",
    [
        ("sm_80", r"cp\.async\.wait_group"),
        ("sm_120", r"cp\.async\.wait_group"),
        ("sm_90", r"wgmma\.wait_group"),
        ("sm_90", r"mbarrier\.init"),
        ("sm_90", r"mbarrier\.arrive"),
        ("sm_100", r"tcgen05\.commit"),
        ("sm_100", r"mbarrier\.arrive"),
    ],
)
def test_deleted_waits_and_arrivals(products, target, pattern):
    ptx = products[target].ptx
    count = len(re.findall(rf"^\s*(?:@\S+ )?{pattern}", ptx, re.M))
    assert any(products[target].noticed(without(ptx, pattern, n)) for n in range(count))


def test_a_barrier_that_nobody_completes_is_a_deadlock(products):
    broken = without(products["sm_90"].ptx, r"mbarrier\.arrive", 0)
    with pytest.raises(
        PtxError, match=r"(?s)nobody can go on.*mbarrier\.try_wait.*CTA \(0, 0, 0\) warp"
    ):
        products["sm_90"].launch(broken).run(None)


def test_an_instruction_that_is_not_modelled_is_named(products):
    ptx = products["sm_80"].ptx.replace("mma.sync", "mma.sparse", 1)
    with pytest.raises(PtxError, match=r"line \d+: unknown opcode: mma\.sparse"):
        products["sm_80"].launch(ptx).run(None)


@triton.jit
def _copy_kernel(x_ptr, y_ptr, rows, cols, stride, MASKED: tl.constexpr):
    offs_m = tl.arange(0, 16)
    offs_n = tl.arange(0, 64)
    inside = (offs_m < rows)[:, None] & (offs_n < cols)[None, :]
    if MASKED:
        x = tl.load(x_ptr + offs_m[:, None] * stride + offs_n[None, :], mask=inside, other=0.0)
    else:
        x = tl.load(x_ptr + offs_m[:, None] * stride + offs_n[None, :])
    tl.store(y_ptr + offs_m[:, None] * cols + offs_n[None, :], x, mask=inside)


def copy(
    x: torch.Tensor, stride: int, masked: bool = True, rows: int | None = None
) -> torch.Tensor:
    y = torch.full(x.shape, float("nan"))
    with emulate("sm_80"):
        _copy_kernel[(1,)](
            x,
            y,
            x.shape[0] if rows is None else rows,
            x.shape[1],
            stride,
            MASKED=masked,
            num_warps=1,
        )
    return y


def test_a_copy_is_exact_and_bounds_are_those_of_the_view():
    x = torch.randn(13, 64)
    assert torch.equal(copy(x, 64), x)
    part = torch.randn(13, 96)[:, 32:]
    assert torch.equal(copy(part, 96), part)


def test_a_missing_mask_is_a_fault():
    with pytest.raises(MemoryFault, match=r"outside every tensor, at byte \d+ of x_ptr"):
        copy(torch.randn(13, 64), 64, masked=False)


def test_a_wrong_mask_is_a_fault():
    with pytest.raises(MemoryFault, match="outside every tensor"):
        copy(torch.randn(13, 64), 64, rows=14)


def test_a_stride_off_by_one_is_a_fault():
    with pytest.raises(MemoryFault, match="of x_ptr"):
        copy(torch.randn(13, 64), 65)


def test_reading_the_gap_between_the_rows_of_a_view_is_a_fault():
    with pytest.raises(MemoryFault, match="of x_ptr"):
        copy(torch.randn(13, 96)[:, :60], 95)


def test_a_false_promise_of_alignment_is_a_fault():
    """Compiled for a stride divisible by 16, given one that is not: the wide loads are misaligned."""
    x, y = torch.randn(13, 64), torch.empty(13, 64)
    args = (x, y, 13, 64, 64)
    compiled, bound = compile_call(
        _copy_kernel, GPU_TARGETS["sm_80"], args, {"MASKED": True, "num_warps": 1}
    )
    skewed = torch.randn(13, 67)[:, :64]
    with pytest.raises(MemoryFault, match="misaligned 16-byte access"):
        prepare_triton(compiled, (1,), {**bound, "x_ptr": skewed, "stride": 67}).run(None)


def test_a_dependent_launch_that_does_not_wait_reads_too_early():
    """In lockstep the dependent kernel goes as far as it can before the first one writes."""
    o = CASE.operands()
    results = []
    for waits in (True, False):
        with recording("sm_90") as launches:
            s = shrink(o.x, o.a, CASE.alpha, TileConfig("shrink", 64, 1, 32, 4, 2), release=True)
            config = TileConfig("lowrank_matmul", 64, 32, 32, 4, 3, tma=True, rank_chunk=32)
            y = lowrank_matmul(o.x, o.w, s, o.b, o.bias, config, late_wait=True)
        s.fill_(float("nan"))
        first, second = launches
        ptx = second.compiled.asm["ptx"]
        changed = ptx if waits else without(ptx, r"griddepcontrol\.wait")
        run_dependent(
            prepare_triton(first.compiled, first.grid, first.arguments),
            prepare_triton(_Changed(second.compiled, changed), second.grid, second.arguments),
            None,
        )
        results.append(y.clone())
    assert_budget(results[0], o.results(None)["y"], o.results(torch.float64)["y"])
    assert results[1].isnan().any()


HAND_WRITTEN = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry sums(.param .u64 out, .param .u32 count)
.maxntid 64
{
    .reg .pred %p<3>;
    .reg .b32 %r<12>;
    .reg .b64 %rd<6>;
    .shared .align 4 .b8 total[256];
    mov.u32 %r1, %tid.x;
    ld.param.u32 %r2, [count];
    mov.u32 %r3, 0;
    mov.u32 %r4, 0;
LOOP:
    setp.ge.u32 %p1, %r4, %r1;
    @%p1 bra DONE;
    mad.lo.s32 %r3, %r4, %r2, %r3;
    add.s32 %r4, %r4, 1;
    bra LOOP;
DONE:
    shl.b32 %r5, %r1, 2;
    mov.u32 %r6, total;
    add.s32 %r7, %r6, %r5;
    st.shared.u32 [%r7], %r3;
    bar.sync 0;
    xor.b32 %r8, %r5, 252;
    add.s32 %r9, %r6, %r8;
    ld.shared.u32 %r10, [%r9];
    ld.param.u64 %rd1, [out];
    cvta.to.global.u64 %rd2, %rd1;
    mul.wide.u32 %rd3, %r1, 4;
    add.s64 %rd4, %rd2, %rd3;
    st.global.u32 [%rd4], %r10;
    ret;
}
"""


@pytest.mark.parametrize("schedule", [None, 5])
def test_threads_that_diverge_meet_again(schedule):
    """Thread t sums t·(t-1)/2·count in a loop of t steps, and reads another thread's sum behind a barrier."""
    out = np.zeros(64, np.int32)
    launch = prepare(HAND_WRITTEN, (1,), 64, [("out", "*u32", out), ("count", "u32", 3)])
    launch.run(schedule)
    t = np.arange(64)[::-1]
    assert (out == 3 * t * (t - 1) // 2).all()
    assert launch.counters.tensors["out"].bytes_stored == 256
    assert launch.counters.instructions["barrier"] == 2


def test_without_its_barrier_the_same_code_is_wrong_in_some_order():
    broken = without(HAND_WRITTEN, r"bar\.sync")
    results = []
    for schedule in range(1, 9):
        out = np.zeros(64, np.int32)
        prepare(broken, (1,), 64, [("out", "*u32", out), ("count", "u32", 3)]).run(schedule)
        results.append(out.tolist())
    assert any(result != results[0] for result in results) or -1 in results[0]


def test_text_that_is_no_ptx_is_refused():
    with pytest.raises(PtxError, match="no kernel other among"):
        parse(HAND_WRITTEN, "other")
    with pytest.raises(PtxError, match="unknown name"):
        parse(HAND_WRITTEN.replace("[out]", "[nowhere]"))
    with pytest.raises(PtxError, match="unknown label"):
        parse(HAND_WRITTEN.replace("bra LOOP", "bra NOWHERE"))
