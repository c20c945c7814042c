"""The product that computes s in its own launch: its programs wait for each other, so their order is what is tried here."""

from __future__ import annotations

import functools
import re
from dataclasses import replace

import pytest
import torch

from lora_kernels.backends import triton as backend_module
from lora_kernels.backends.triton.configs import tiles_of
from lora_kernels.backends.triton.expand import Shrink, expand
from lora_kernels.backends.triton.launch import rank_operand
from lora_kernels.problem import Problem
from lora_kernels.tuning.targets import TARGETS
from tests.executed.layer import train
from tests.executed.shipped import compare
from tests.oracle import Case, Operands
from tests.ptx import launch
from tests.ptx.launch import emulate
from tests.ptx.parser import PtxError

pytestmark = pytest.mark.slow
EXECUTED = ("sm_80", "sm_90", "sm_100", "sm_120")
PROBLEM = Problem(8192, 4096, 4096, 16, "bfloat16", "bfloat16", device="cuda")
# Several blocks of rows and of columns, none full.
CASES = [
    (Case(200, 264, 72, 13, dtype=torch.bfloat16), None),
    (Case(133, 136, 264, 64, dtype=torch.bfloat16, layout="peft", bias=False), 1),
    (Case(70, 8, 200, 1, dtype=torch.bfloat16, layout="plain"), 2),
    (Case(333, 72, 40, 30, dtype=torch.bfloat16, layout="peft", dropout=0.25), 3),
]


def tile(target: str):
    """The smallest that ships: few rows make several blocks."""
    return tiles_of("one_launch", PROBLEM, TARGETS[target])[-1]


def product(o: Operands, target: str) -> dict[str, torch.Tensor]:
    M, R = o.case.M, o.case.R
    s = torch.full((M, R), torch.nan)
    tail = rank_operand(M, R, o.x.dtype, o.x.device).fill_(torch.nan)
    first = Shrink(o.a, o.case.alpha, s, o.dropout)
    return {"y": expand(o.x, o.w, tail, o.b, o.bias, tile(target), first=first), "s": s}


@pytest.mark.parametrize("case, schedule", CASES, ids=str)
@pytest.mark.parametrize("target", EXECUTED)
def test_any_size_layout_and_rank(target, case, schedule):
    o = case.operands()
    with emulate(target, schedule):
        found = product(o, target)
    compare(found, o, f"{target}, schedule {schedule}")


def one_at_a_time(target: str, schedule: int | None, change=None) -> dict[str, torch.Tensor]:
    """The first case on one multiprocessor that has place for one program; `change`: of the code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "RESIDENT_LANES", 32)
        if change is not None:
            changed = functools.partial(_changed, launch.prepare_triton, *change)
            patch.setattr(launch, "prepare_triton", changed)
        with emulate(target, schedule):
            return product(CASES[0][0].operands(), target)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_one_program_at_a_time_in_any_order(target):
    """What is waited for starts first: nobody needs a second multiprocessor, nor an order of dispatch.

    No bit depends on either.
    """
    o = CASES[0][0].operands()
    with emulate(target, 3):
        together = product(o, target)
    compare(together, o, target)
    for schedule in (None, 1):
        alone = one_at_a_time(target, schedule)
        assert all(torch.equal(alone[name], together[name]) for name in ("y", "s"))


# Each of them replaced in turn: what it orders is noticed to be missing.
TICKET = r"@%p\d+ atom\.global\.gpu\.relaxed\.add\.u32 (%r\d+), .*;", r"mov.u32 \1, %ctaid.x;"
# The compiler puts one of the two.
BARRIERS = r"bar\.sync \t0;([\s\S]{0,500}?)bar\.sync \t0;(?=[\s\S]{0,500}?release\.exch)"
WEAKER = {
    "the flag releases nothing": (
        r"gpu\.release\.exch",
        "gpu.relaxed.exch",
        r"unordered: read after write of byte \d+ of s_ptr",
    ),
    "the flag is not acquired": (
        r"ld\.global\.gpu\.acquire",
        "ld.relaxed.gpu.global",
        r"unordered: read after write of byte \d+ of s_ptr",
    ),
    "nothing stands between s and the flag": (
        BARRIERS,
        r"\1",
        r"unordered: read after write of byte \d+ of s_ptr",
    ),
    "no flag": (r"@%p\d+ atom\.global\.gpu\.release.*;", "", "nobody can go on"),
}


@pytest.mark.parametrize("change", WEAKER)
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_a_weaker_order_is_noticed(target, change, monkeypatch):
    *replaced, message = WEAKER[change]
    changed = functools.partial(_changed, launch.prepare_triton, *replaced)
    monkeypatch.setattr(launch, "prepare_triton", changed)
    o = CASES[0][0].operands()
    with pytest.raises(PtxError, match=message), emulate(target):
        product(o, target)


def test_without_tickets_one_multiprocessor_does_not_suffice():
    """The seed starts a tile's program before that of its rows."""
    with pytest.raises(PtxError, match="nobody can go on"):
        one_at_a_time("sm_80", 1, TICKET)


def _changed(prepare, pattern, new, compiled, grid, bound):
    ptx, count = re.subn(pattern, new, compiled.asm["ptx"])
    assert count == 1
    return prepare(compiled, grid, bound, ptx)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_a_layers_forward_and_every_gradient(target):
    """One launch forward; the backward is that of two_kernel."""
    steps = train(target, "one_launch", 5, rows=200)
    assert steps.forward == ["expand"] and not steps.executed[0].dependent
    assert "shrink" not in steps.kernels and "shrink_wgrad" in steps.kernels
    assert steps.executed[0].counters.tensors["x"].bytes_loaded > 0


def test_bytes():
    """x is read once more than by the tiles, for s; s is stored once in each type and read by each tile of its rows."""
    M, N, K, R = 256, 512, 128, 16
    o = Case(M, N, K, R, dtype=torch.bfloat16, layout="peft", bias=False).operands()
    with emulate("sm_80") as executed:
        product(o, "sm_80")
    tensors, config = executed[0].counters.tensors, tile("sm_80")
    columns, rows = N // config.block_n, M // config.block_m
    assert tensors["x"].bytes_loaded == (columns + 1) * M * K * 2
    assert tensors["a_ptr"].bytes_loaded == rows * K * R * 2
    assert tensors["s_ptr"].bytes_stored == M * R * 2
    assert tensors["s_ptr"].bytes_loaded == columns * M * R * 2
    assert tensors["whole_ptr"].bytes_stored == M * R * 4 and not tensors["whole_ptr"].bytes_loaded
    assert (tensors["y_ptr"].stores == 1).all()


def test_the_rules():
    """Types, ranks and targets: what breaks one is refused, and says why."""
    for change, target, reason in (
        ({"dtype": "float16", "adapter_dtype": "float16"}, "sm_80", "got float16 and float16"),
        ({"adapter_dtype": "float32"}, "sm_80", "got bfloat16 and float32"),
        ({"R": 65}, "sm_80", "a rank of at most 64, got 65"),
        ({"R": 33, "dropout": True}, "sm_80", "a rank of at most 32, got 33"),
        ({}, "gfx942", "is made for NVIDIA GPUs, not for gfx942"),
    ):
        problem = replace(PROBLEM, **change)
        found = {c.name: c for c in _candidates(problem, target)}["one_launch"]
        assert reason in (found.refusal or "")


def _candidates(problem: Problem, target: str):
    return backend_module.BACKEND.candidates(problem, TARGETS[target])
