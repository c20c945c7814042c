"""The product that computes s in its own launch: its programs wait for each other, so their order is what is tried here."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lora_kernels.backends import triton as backend_module
from lora_kernels.backends.triton.configs import tiles_of
from lora_kernels.problem import Problem
from lora_kernels.tuning.targets import TARGETS
from tests.executed import shipped
from tests.executed.layer import EXECUTED, train
from tests.executed.shipped import compare
from tests.oracle import Case, Operands
from tests.ptx import launch
from tests.ptx.launch import emulate
from tests.ptx.parser import PtxError

pytestmark = pytest.mark.slow
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
    return shipped.launch(TARGETS[target], (PROBLEM, tile(target), True, False), o)


@pytest.mark.parametrize("case, schedule", CASES, ids=str)
@pytest.mark.parametrize("target", EXECUTED)
def test_any_size_layout_and_rank(target, case, schedule):
    o = case.operands()
    with emulate(target, schedule):
        found = product(o, target)
    compare(found, o, f"{target}, schedule {schedule}")


@pytest.fixture
def one_at_a_time(monkeypatch):
    """From here on there is one multiprocessor, which has place for one program."""
    return lambda: monkeypatch.setattr(launch, "RESIDENT_LANES", 32)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_one_program_at_a_time_in_any_order(target, one_at_a_time):
    """What is waited for starts first: nobody needs a second multiprocessor, nor an order of dispatch.

    No bit depends on either.
    """
    o = CASES[0][0].operands()
    with emulate(target, 3):
        together = product(o, target)
    compare(together, o, target)
    one_at_a_time()
    for schedule in (None, 1):
        with emulate(target, schedule):
            alone = product(o, target)
        assert all(torch.equal(alone[name], together[name]) for name in ("y", "s"))


# Each of them replaced in turn: what it orders is noticed to be missing.
TICKET = r"@%p\d+ atom\.global\.gpu\.relaxed\.add\.u32 (%r\d+), .*;", r"mov.u32 \1, %ctaid.x;"
# The compiler puts one of the two.
BARRIERS = r"bar\.sync \t0;([\s\S]{0,500}?)bar\.sync \t0;(?=[\s\S]{0,500}?release\.exch)"
RACE = r"unordered: read after write of byte \d+ of s_ptr"
WEAKER = {
    "the flag releases nothing": (r"gpu\.release\.exch", "gpu.relaxed.exch", RACE),
    "the flag is not acquired": (r"ld\.global\.gpu\.acquire", "ld.relaxed.gpu.global", RACE),
    "nothing stands between s and the flag": (BARRIERS, r"\1", RACE),
    "no flag": (r"@%p\d+ atom\.global\.gpu\.release.*;", "", "nobody can go on"),
}


@pytest.mark.parametrize("change", WEAKER)
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_a_weaker_order_is_noticed(target, change, damage):
    pattern, new, message = WEAKER[change]
    damage(pattern, new)
    o = CASES[0][0].operands()
    with pytest.raises(PtxError, match=message), emulate(target):
        product(o, target)


def test_without_tickets_one_multiprocessor_does_not_suffice(damage, one_at_a_time):
    """The seed starts a tile's program before that of its rows."""
    damage(*TICKET)
    one_at_a_time()
    with pytest.raises(PtxError, match="nobody can go on"), emulate("sm_80", 1):
        product(CASES[0][0].operands(), "sm_80")


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
        candidates = backend_module.BACKEND.candidates(problem, TARGETS[target])
        (found,) = (c for c in candidates if c.name == "one_launch")
        assert reason in (found.refusal or "")
