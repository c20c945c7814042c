"""The persistent products of sm_90 and sm_100, compiled and executed: Gluon has no interpreter, this lane is their proof."""

from __future__ import annotations

import importlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from lora_kernels.backends.triton import parts as parts_module
from lora_kernels.backends.triton import products as products_module
from lora_kernels.backends.triton import wgrad as wgrad_module
from lora_kernels.backends.triton.configs import tiles_for, tiles_of, untried
from lora_kernels.backends.triton.launch import Mask, rank_operand
from lora_kernels.backends.triton.parts import parts
from lora_kernels.backends.triton.products import TritonProducts
from lora_kernels.backends.triton.shrink import shrink
from lora_kernels.bench import tiles as tiles_module
from lora_kernels.dropout import Dropout, keep_mask
from lora_kernels.problem import Problem
from lora_kernels.tuning.config import TileConfig, Tiles
from lora_kernels.tuning.search import Choice
from lora_kernels.tuning.targets import TARGETS
from tests.executed.layer import train
from tests.executed.shipped import compare, tile_after_tile
from tests.oracle import Case
from tests.ptx.launch import Executed, emulate
from tests.ptx.parser import PtxError

if (reason := untried()) is not None:
    pytest.skip(reason, allow_module_level=True)

from lora_kernels.backends.triton.persistent import applies, persistent

pytestmark = pytest.mark.slow
TARGETS_OF_IT = ("sm_90", "sm_100")
SM_90 = TARGETS["sm_90"]
PROBLEM = Problem(8192, 4096, 4096, 16, "bfloat16", "bfloat16", device="cuda")
# The largest tile by each number of CTAs.
KINDS = list(
    {
        (name, tile.ctas): (name, tile)
        for name in TARGETS_OF_IT
        for tile in reversed(tiles_of("persistent", PROBLEM, TARGETS[name]))
    }.values()
)
every_kind = pytest.mark.parametrize("target, tile", KINDS, ids=str)
FLOAT32_BESIDE = {"dtype": torch.float16, "adapter_dtype": torch.float32}
# Two tiles each way, none full; a program computes several of them. K: less than a step, two steps, five.
CASES = [
    (Case(133, 264, 264, 13, dtype=torch.bfloat16), True, None),
    (Case(133, 264, 264, 13, dtype=torch.bfloat16), False, 1),
    (Case(133, 520, 72, 64, dtype=torch.bfloat16, layout="peft"), True, 2),
    (Case(133, 8, 264, 33, dtype=torch.bfloat16, layout="peft", bias=False), False, 3),
    (Case(1, 264, 8, 1, dtype=torch.bfloat16), True, None),
    (Case(70, 264, 200, 130, dtype=torch.bfloat16, layout="peft", bias=False), True, 4),
    (Case(70, 264, 136, 72, dtype=torch.float16, layout="transposed"), False, 5),
    # s and b in parts: of a rank that three times is no multiple of 16, of two steps and a rest, beyond 128.
    (Case(133, 264, 264, 13, dtype=torch.bfloat16, adapter_dtype=torch.float32), True, None),
    (Case(133, 520, 72, 47, dtype=torch.float16, layout="peft"), True, 6),
    (Case(70, 264, 200, 130, **FLOAT32_BESIDE, layout="peft", bias=False), False, 7),
]
# Types of x and of the adapters whose tail is in parts.
IN_PARTS = [
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float16, torch.float16),
]
every_type_in_parts = pytest.mark.parametrize("dtype, adapter_dtype", IN_PARTS, ids=str)


@every_kind
@pytest.mark.parametrize("case, forward, schedule", CASES, ids=str)
def test_any_size_layout_and_rank(target, tile, case, forward, schedule):
    each = max(1, tile.ctas)
    o = replace(case, M=each * case.M).operands()
    if not applies(*((o.x, o.w) if forward else (o.dy, o.w.t()))):
        o = replace(o, x=o.x.contiguous(), dy=o.dy.contiguous())
    with emulate(target, schedule):
        found = tile_after_tile(tile, o, 2 * each, forward)
    compare(found, o, f"schedule {schedule}")


@every_kind
def test_neither_programs_nor_their_order_change_a_bit(target, tile):
    o = Case(133, 264, 136, 16, dtype=torch.bfloat16).operands()
    results = []
    for programs, schedule in ((1, None), (6, 1), (132, 2)):
        with emulate(target, schedule):
            results.append(tile_after_tile(tile, o, programs)["y"])
    assert all(torch.equal(y, results[0]) for y in results)


@pytest.mark.parametrize("split", [1, 2])
def test_s_leaves_shrink_in_a_half_type_beside(split):
    """Rounded once: to the bits of the float32 result's own rounding; what lies behind a row is not touched."""
    o = Case(70, 8, 136, 13, dtype=torch.bfloat16, dropout=0.25).operands()
    config = TileConfig("shrink", 64, 1, 64, 4, 3, split=split)
    whole = torch.full((70, 16), torch.nan, dtype=torch.bfloat16)
    with emulate("sm_90"):
        s = shrink(o.x, o.a, o.case.alpha, config, o.dropout, rounded=whole[:, :13])
    compare({"s": s}, o, "shrink")
    assert torch.equal(whole[:, :13], s.bfloat16()) and whole[:, 13:].isnan().all()


@pytest.mark.parametrize("split", [1, 2])
@every_type_in_parts
def test_s_leaves_shrink_in_parts_beside(dtype, adapter_dtype, split):
    """The bits that `parts` makes of the float32 result, of any sign and size; what lies behind a row is not touched."""
    o = Case(70, 8, 136, 13, dtype=dtype, adapter_dtype=adapter_dtype, dropout=0.25).operands()
    o.x[2, 3] = torch.inf
    config = TileConfig("shrink", 64, 1, 64, 4, 3, split=split)
    whole = torch.full((70, 48), torch.nan, dtype=torch.bfloat16)
    with emulate("sm_90"), np.errstate(invalid="ignore"):
        s = shrink(o.x, o.a, o.case.alpha, config, o.dropout, rounded=whole[:, :39])
        expected, _ = parts(s, o.b, config)
    compare({"s": s}, o, "shrink")
    assert torch.equal(whole[:, :39], expected) and whole[:, 39:].isnan().all()


@every_kind
@pytest.mark.parametrize("dtype, adapter_dtype", [(torch.bfloat16, torch.bfloat16), *IN_PARTS])
def test_an_infinity_stays_where_it_is(target, tile, dtype, adapter_dtype):
    """Padded columns of s and b, and of x and w behind K, are zeros in both; so is the low part of what is infinite."""
    o = Case(133, 264, 72, 5, dtype=dtype, adapter_dtype=adapter_dtype).operands()
    o.x[3, 7] = torch.inf
    if adapter_dtype == torch.float32:
        o.b[2, 5] = -torch.inf
    with emulate(target), np.errstate(invalid="ignore"):
        found = tile_after_tile(tile, o, 2)
    compare(found, o, "an infinite x")
    others = torch.ones_like(found["y"], dtype=torch.bool)
    others[3] = False
    others[:, 5] &= adapter_dtype != torch.float32
    assert found["y"][others].isfinite().all()


def test_what_it_does_not_take_is_refused():
    o = Case(16, 24, 20, 4, dtype=torch.bfloat16).operands()
    s = rank_operand(16, 4, torch.bfloat16, o.x.device).zero_()
    with pytest.raises(
        ValueError, match=r"^x and w must have 16-byte aligned rows.* got strides \(20, 1\)"
    ):
        persistent(o.x, o.w, s, o.b, None, KINDS[0][1], 1)


MASKED_CASES = [
    (Case(133, 264, 264, 13, dtype=torch.bfloat16, dropout=0.25), None),
    (Case(133, 264, 264, 64, dtype=torch.bfloat16, dropout=0.25, layout="peft"), 1),
    (Case(70, 136, 520, 16, **FLOAT32_BESIDE, dropout=0.5), 2),
    (Case(133, 8, 72, 21, dtype=torch.float16, dropout=0.75, layout="peft"), 3),
]


@pytest.mark.parametrize("case, schedule", MASKED_CASES, ids=str)
@pytest.mark.parametrize("tile", tiles_of("persistent", PROBLEM, SM_90), ids=str)
def test_a_mask_of_dx(tile, case, schedule):
    o = case.operands()
    with emulate("sm_90", schedule):
        found = tile_after_tile(tile, o, 2)
    compare(found, o, f"schedule {schedule}")


@pytest.mark.parametrize("tile", tiles_of("persistent", PROBLEM, SM_90), ids=str)
def test_the_mask_of_dx_bit_for_bit(tile):
    M, N, K = 133, 264, 16
    dropout = Dropout(0.25, torch.tensor(0x1234_5678_9ABC_DEF0))
    zeros = torch.zeros(M + N, K, dtype=torch.bfloat16)
    tail = torch.ones(M + N, 16, dtype=torch.bfloat16) / 4
    operands = zeros[:M], zeros[M:].t(), tail[:M], tail[M:].t()
    with emulate("sm_90"):
        dx = persistent(*operands, None, tile, 2, dropout=dropout)
    kept = keep_mask(dropout, M, N)
    assert torch.equal(dx != 0, kept) and (dx[kept] == torch.tensor(1 / 0.75).bfloat16()).all()


def test_a_mask_that_it_has_not_is_refused():
    o = Case(16, 24, 24, 65, dtype=torch.bfloat16, dropout=0.25).operands()
    (_, wide), (_, pair) = KINDS[0], KINDS[-1]
    with pytest.raises(ValueError, match=r"^the mask of dx is on one step .* 64 ranks, got 65$"):
        tile_after_tile(wide, o)
    with pytest.raises(ValueError, match=r"^tensor memory has no columns for the rank tail apart"):
        tile_after_tile(pair, o)
    with pytest.raises(ValueError, match=r"^dropout is that of dx, which has no bias"):
        s = rank_operand(16, 16, torch.bfloat16, o.x.device)
        persistent(o.x, o.w, s, o.b[:16], o.bias, wide, 1, dropout=o.dropout)
    products = TritonProducts("persistent", PROBLEM, SM_90, tiles_for(PROBLEM, SM_90))
    assert products._persistent_takes(o.dy, o.w.t(), o.adapter.t(), None)
    assert not products._persistent_takes(o.dy, o.w.t(), o.adapter.t(), o.bias)
    products.problem = replace(PROBLEM, R=65)
    assert not products._persistent_takes(o.dy, o.w.t(), o.adapter.t(), None)


@pytest.mark.parametrize("target", TARGETS_OF_IT)
@pytest.mark.parametrize("dropout, schedule", [(0.0, 7), (0.25, None)], ids=["random", "dropout"])
@pytest.mark.parametrize(
    "dtype, adapter_dtype", [(torch.bfloat16, torch.bfloat16), *IN_PARTS], ids=str
)
def test_a_layers_forward_and_every_gradient(target, dtype, adapter_dtype, dropout, schedule):
    types = {"dtype": dtype, "adapter_dtype": adapter_dtype}
    steps = train(target, "persistent", schedule, dropout=dropout, **types)
    kernels = [name for name in steps.kernels if name != "parts"]
    assert kernels[:2] == ["shrink", "persistent"] and "wgrad" in kernels
    apart = int(dropout > 0 and target == "sm_100")  # the rank tail of dx
    assert (kernels.count("persistent"), kernels.count("expand")) == (2 - apart, apart)
    # What is launched just before one that starts early: parts of q and of A are one launch, those of B were made before.
    before = [steps.kernels[i - 1] for i, each in enumerate(steps.executed) if each.dependent]
    in_parts = (dtype, adapter_dtype) in IN_PARTS
    assert before == ["shrink", *["parts"] * (in_parts and not apart)]
    assert steps.forward == [*["parts"] * in_parts, "shrink", "persistent"]


def fill_with_nan(patch: pytest.MonkeyPatch, module) -> None:
    """What a kernel is to write holds no results of an earlier call in the same memory."""
    unwritten = module.rank_operand
    patch.setattr(module, "rank_operand", lambda *a, **own: unwritten(*a, **own).fill_(torch.nan))


def gradients_on_sm_90(case: Case, schedule: int | None) -> dict[str, torch.Tensor]:
    """dx, dA and dB by four launches that run beside each other, of two programs' dx; compared with float64."""
    o, sm_90 = case.operands(), TARGETS["sm_90"]
    back = PROBLEM.adjoint()
    products = TritonProducts("persistent", back, sm_90, tiles_for(back, sm_90))
    with pytest.MonkeyPatch.context() as patch:
        module = importlib.import_module("lora_kernels.backends.triton.persistent")
        patch.setattr(module, "persistent", lambda *a, **own: persistent(*a[:6], 2, **own))
        fill_with_nan(patch, products_module)
        with emulate("sm_90", schedule) as executed:
            s = o.results(None)["s"].float()
            given = o.dy, o.w.t(), o.adapter.t(), o.x, s, o.a.dtype
            found = dict(zip(("dx", "dA", "dB"), products.gradients(*given), strict=True))
    assert names_of(executed) == ["shrink", "persistent", "wgrad", "wgrad"]
    compare(found, o, f"schedule {schedule}")
    return found


# More tiles than programs, more programs of the sums than of dx, every size ragged; K and N of the forward.
BESIDE_CASE = Case(133, 264, 520, 13, dtype=torch.bfloat16, layout="peft", bias=False)


@pytest.mark.parametrize("R, schedules", [(13, (None, 1, 2)), (64, (3,))], ids=["13", "64"])
def test_dA_and_dB_run_beside_dx(R, schedules):
    results = [gradients_on_sm_90(replace(BESIDE_CASE, R=R), each) for each in schedules]
    assert all(torch.equal(each[name], results[0][name]) for each in results for name in each)


@pytest.mark.parametrize(
    "kernel, instead, what",
    [
        # One program that waits makes a sum end behind dx.
        ("_wgrad_kernel", "", r"ended before _persistent_kernel"),
        # dx lets the sums begin when q is there, not before its own wait for it.
        ("_persistent_kernel", r"griddepcontrol.launch_dependents; \g<0>", r"^dA .*NaN"),
    ],
    ids=["at its end", "at the beginning"],
)
def test_what_is_beside_waits_where_it_must(kernel, instead, what, damage):
    damage(r"griddepcontrol\.wait *;", instead, kernel)
    with pytest.raises((AssertionError, PtxError), match=what):
        gradients_on_sm_90(BESIDE_CASE, None)


def test_what_runs_beside_another_is_held_until_the_last_launch(monkeypatch):
    """Memory that is free goes to the next tensor at once: a launch that still runs must not use it."""
    used: list[StorageWeakRef] = []

    def record(kernel, programs, config, device, *args, **constants):
        assert not any(each.expired() for each in used)
        given = (getattr(each, "base", each) for each in (*args, *constants.values()))
        tensors = [each for each in given if isinstance(each, torch.Tensor)]
        used.extend(StorageWeakRef(each.untyped_storage()) for each in tensors)

    for name in ("shrink", "persistent", "wgrad"):
        module = importlib.import_module(f"lora_kernels.backends.triton.{name}")
        monkeypatch.setattr(module, "launch", record)
    sm_90, o = TARGETS["sm_90"], BESIDE_CASE.operands()
    back = PROBLEM.adjoint()
    products = TritonProducts("persistent", back, sm_90, tiles_for(back, sm_90))
    s, unaligned = o.results(None)["s"].float(), torch.empty(o.a.shape).bfloat16()
    for a in (o.a, unaligned):  # tensor copies fetch a copy of the second
        adapter = o.adapter._replace(A=a).t()
        products.gradients(o.dy, o.w.t(), adapter, o.x, s, o.a.dtype)
        assert len(used) > 12
        used.clear()


def test_tune_takes_no_product_whose_gradients_are_wrong(monkeypatch):
    """What runs beside it is computed and compared too, before it is timed."""
    problem = Problem(70, 264, 136, 13, "bfloat16", "bfloat16", device="cpu")
    for module in (products_module, tiles_module):
        monkeypatch.setattr(module, "runs_beside", lambda *_: True)
    monkeypatch.setattr(tiles_module, "current_target", lambda: TARGETS["sm_90"])
    (tile, *_), (shrink, *_) = (
        tiles_of(kernel, PROBLEM, TARGETS["sm_90"]) for kernel in ("persistent", "shrink")
    )
    choice, launched = Choice.of("persistent", shrink, tile), []
    compared = tiles_module.Measured._compared

    def emulated(self, call, expected):
        with emulate("sm_90") as executed:  # results are there when it ends
            found = call()
        launched.append(names_of(executed))
        return compared(self, lambda: found, expected)

    monkeypatch.setattr(tiles_module.Measured, "_compared", emulated)
    assert tiles_module.Product(problem, "cpu").wrong(choice) is None
    beside = ["shrink", "persistent", "wgrad", "wgrad"]
    assert launched == [["shrink", "persistent"], beside, ["persistent"]]  # the last with a mask
    wgrad = wgrad_module.wgrad
    monkeypatch.setattr(wgrad_module, "wgrad", lambda left, *a, **own: wgrad(-left, *a, **own))
    assert "the result" in tiles_module.Product(problem, "cpu").wrong(choice)
    monkeypatch.setattr(wgrad_module, "wgrad", wgrad)
    of = Mask.of  # another mask than the seed's
    monkeypatch.setattr(Mask, "of", lambda d: of(d and Dropout(d.p, d.seed + 1)))
    assert "the result" in tiles_module.Product(problem, "cpu").wrong(choice)


def names_of(executed: list[Executed]) -> list[str]:
    return [launch.name for launch in executed]


@pytest.mark.parametrize("in_parts", [False, True], ids=["s", "parts of q"])
@every_kind
def test_what_starts_early_waits(target, tile, in_parts, monkeypatch, damage):
    """In lockstep the dependent launch goes as far as it can before s, or q, is stored: too far without a wait.

    Parts of q and of A are made by one launch, beside which the product's loop runs.
    """
    case = Case(133, 264, 136, 16, dtype=torch.bfloat16, layout="peft")
    if in_parts:
        case = Case(133, 136, 264, 13, dtype=torch.bfloat16, adapter_dtype=torch.float32)
    fill_with_nan(monkeypatch, parts_module if in_parts else products_module)
    others = [c for c in tiles_for(PROBLEM, TARGETS[target]).configs if c.kernel != "persistent"]
    products = TritonProducts("persistent", PROBLEM, TARGETS[target], Tiles((*others, tile)))
    o = case.operands()
    q = o.results(None)["q"]

    def computed() -> dict[str, torch.Tensor]:
        if in_parts:
            return {"dx": products.expand(o.dy, o.w.t(), q, o.adapter.t())}
        return dict(
            zip(("y", "s"), products.shrink_expand(o.x, o.w, o.adapter, o.bias), strict=True)
        )

    for schedule in (None, 1):
        with emulate(target, schedule) as executed:
            found = computed()
        compare(found, o, f"schedule {schedule}")
        before = "parts" if in_parts else "shrink"
        assert names_of(executed) == [before, "persistent"] and executed[1].dependent

    damage(r"griddepcontrol\.wait ;", "", "_persistent_kernel")
    with pytest.raises(PtxError, match="ended before"), emulate(target):
        found = computed()
    found.pop("s", None)
    with pytest.raises(AssertionError):
        compare(found, o, "without a wait")


def test_operands_that_copies_cannot_fetch_take_the_other_product():
    """An odd stride of x or w is no fault of the plan, which sees sizes only."""
    o = Case(70, 264, 72, 16, dtype=torch.bfloat16).operands()
    products = TritonProducts("persistent", PROBLEM, SM_90, tiles_for(PROBLEM, SM_90))
    assert products._persistent_takes(o.x, o.w, o.adapter, None)
    for layout in ("sliced", "broadcast"):
        other = replace(o.case, layout=layout).operands()
        assert not products._persistent_takes(other.x, other.w, o.adapter, None)
    odd = Case(70, 261, 72, 16, dtype=torch.bfloat16).operands()  # rows of y
    assert not products._persistent_takes(odd.x, odd.w, odd.adapter, None)


@every_kind
def test_bytes_and_flops(target, tile):
    """x once for each block of columns, w once for each block of rows, s and b likewise; y stored once, never read."""
    M, N, K, R = 256, 512, 256, 16
    o = Case(M, N, K, R, dtype=torch.bfloat16, layout="peft").operands()
    with emulate(target) as executed:
        tile_after_tile(tile, o, 2)
    counters = executed[0].counters
    tensors = counters.tensors
    assert tensors["x"].bytes_loaded == N // tile.block_n * M * K * 2
    assert tensors["w"].bytes_loaded == M // tile.block_m * N * K * 2
    assert tensors["s"].bytes_loaded == N // tile.block_n * M * R * 2
    assert tensors["b"].bytes_loaded == M // tile.block_m * N * R * 2
    assert tensors["y"].bytes_stored == M * N * 2 and tensors["y"].bytes_loaded == 0
    assert (tensors["y"].stores == 1).all()
    assert counters.flops == 2 * M * N * (K + R)
    assert counters.wavefronts == counters.fewest_wavefronts
