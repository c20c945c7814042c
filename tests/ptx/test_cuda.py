"""CUDA C++ as nvcc compiles it: the shipped kernels and one that uses what they do not."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tests.artefacts import kept
from tests.executed.cuda_operators import SOURCES, sources_digest
from tests.oracle import assert_budget, reference
from tests.ptx.counters import Counters
from tests.ptx.launch import prepare
from tests.ptx.parser import PtxError, entry_names
from tests.ptx.races import DataRace

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc"),
]

HERE = Path(__file__).parent
SHIPPED = """
#include "decode_kernel.cuh"
#include "wgrad_kernel.cuh"
using namespace lora_kernels;
using Mma = MmaTile<__nv_bfloat16, 1, 1, true>;
using Fma = FmaTile<float, 1, true>;
template __global__ void lora_kernels::decode_kernel<Mma, true>(const __grid_constant__ Decode);
template __global__ void lora_kernels::decode_kernel<Fma, true>(const __grid_constant__ Decode);
template __global__ void lora_kernels::wgrad_kernel<__nv_bfloat16, float>(const __grid_constant__ Wgrad);
"""


def compiled(source: str, target: str) -> str:
    """The PTX of a CUDA program."""
    command = ["nvcc", "-ptx", "-std=c++17", f"-arch={target}", f"-I{SOURCES}"]

    def compile_it(ptx: Path) -> None:
        file = ptx.with_suffix(".cu")
        file.write_text(source)
        try:
            subprocess.run([*command, str(file), "-o", str(ptx)], check=True, capture_output=True)
        finally:
            file.unlink()

    return kept(f"cuda_ptx/{sources_digest(source, *command)}.ptx", compile_it).read_text()


@pytest.fixture(scope="module", params=["sm_80", "sm_90"])
def shipped(request) -> str:
    return compiled(SHIPPED, request.param)


@pytest.fixture(scope="module")
def sums() -> str:
    return compiled((HERE / "sums.cu").read_text(), "sm_80")


def run_sums(ptx: str, x: torch.Tensor, schedule: int | None, shared: int | None = None):
    rows, columns = x.shape
    out, arrived = torch.full((rows + 1,), torch.nan), torch.zeros(1, dtype=torch.int32)
    args = [("x", "*", x), ("arrived", "*", arrived), ("out", "*", out), ("rows", "i32", rows)]
    launch = prepare(
        ptx, (rows,), 128, [*args, ("columns", "i32", columns)],
        shared=4 * columns if shared is None else shared,
    )  # fmt: skip
    return out, launch.run(schedule)


@pytest.mark.parametrize("schedule", [None, 1, 2, 3])
def test_sums(sums, schedule):
    x = torch.randn(5, 300)
    out, counters = run_sums(sums, x, schedule)
    assert (out[:5].double() - x.double().sum(1)).abs().max() < 1e-4
    assert (out[5].double() - x.double().sum()).abs() < 1e-4
    assert counters.tensors["arrived"].atomics == 5
    assert counters.tensors["x"].bytes_loaded == x.nbytes


def test_too_little_shared_memory_is_noticed(sums):
    with pytest.raises(PtxError, match="shared address"):
        run_sums(sums, torch.randn(5, 300), None, shared=400)


def without(ptx: str, *lines: int) -> str:
    return "\n".join("" if n in lines else line for n, line in enumerate(ptx.splitlines()))


def test_missing_barriers_and_fences_are_noticed(sums):
    numbers = [
        n for n, line in enumerate(sums.splitlines()) if re.search(r"bar\.sync|membar", line)
    ]
    assert len(numbers) == 5
    for number in numbers:
        with pytest.raises(DataRace):
            run_sums(without(sums, number), torch.randn(5, 300), None)


class Rows(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_int64), ("count", ctypes.c_int),
                ("align", ctypes.c_int), ("k_major", ctypes.c_bool)]  # fmt: skip

    @classmethod
    def of(cls, t: torch.Tensor, aligned: bool) -> Rows:
        align = 16 if aligned else t.element_size()
        return cls(t.data_ptr(), t.stride(0), len(t), align, True)


class Decode(ctypes.Structure):
    _fields_ = [
        *((name, Rows) for name in "xwa"), ("b", ctypes.c_void_p), ("b_row", ctypes.c_int64), ("b_col", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("bias", "s_given", "alpha_at", "y", "s", "partials", "arrived")),
        ("alpha", ctypes.c_float), *((name, ctypes.c_int) for name in ("k", "rank", "chunk")),
        *((name, ctypes.c_bool) for name in ("b_float", "y_float", "scale_y")),
    ]  # fmt: skip


class Wgrad(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("wide", "lowrank", "out")),
        *((name, ctypes.c_int64) for name in ("wide_row", "wide_column", "out_column", "out_rank")),
        *((name, ctypes.c_int) for name in ("tokens", "columns", "rank")),
    ]  # fmt: skip


def entry(ptx: str, *needles: str) -> str:
    (name,) = (n for n in entry_names(ptx) if all(needle in n for needle in needles))
    return name


class Product:
    """y and s of one ragged product by the decode kernel; what the emulator is given to compute them."""

    def __init__(
        self,
        dtype: torch.dtype,
        splits: int,
        R: int = 12,
        blocks: int = 2,
        aligned: bool = False,
    ) -> None:
        M, N, K = 5, 75, 3 * 128 + (24 if aligned else 21)
        self.tile, rows = ("MmaTile", 64) if dtype == torch.bfloat16 else ("FmaTile", 32)
        fused = self.tile == "MmaTile"
        x, w, a = (torch.randn(n, K).to(dtype) / K**0.5 for n in (M, N, R))
        b, bias = torch.randn(R, N).to(dtype), torch.randn(N).to(dtype)
        y, s = torch.full((M, N), torch.nan).to(dtype), torch.full((M, R), torch.nan)
        self.alpha = 0.75
        if not fused:
            s = self.alpha * (x @ a.t())
        tiles = -(-N // rows)
        self.grid = blocks, splits
        partials = torch.full((tiles, splits, M, rows + 16 * fused), torch.nan)
        arrived = torch.zeros(tiles, dtype=torch.int32)
        chunk = -(-K // splits // 128) * 128
        self.params = Decode(
            *(Rows.of(t, aligned) for t in (x, w, a)), b.data_ptr(), *b.stride(), bias.data_ptr(),
            None if fused else s.data_ptr(), None, y.data_ptr(), s.data_ptr(), partials.data_ptr(), arrived.data_ptr(),
            self.alpha, K, R, chunk, dtype == torch.float32, dtype == torch.float32, False,
        )  # fmt: skip
        self.tensors = {"x": x, "w": w, "a": a, "b": b, "bias": bias, "s": s, "y": y}
        self.tensors |= {"partials": partials, "arrived": arrived}
        self.tensors = {name: t for name, t in self.tensors.items() if t.numel()}

    def run(self, ptx: str, schedule: int | None) -> Counters:
        launch = prepare(
            ptx, self.grid, 128, [("p", "struct", self.params)], entry=entry(ptx, "decode", self.tile),
            pointed=self.tensors,
        )  # fmt: skip
        return launch.run(schedule)

    def check(self) -> None:
        x, w, a, b, bias = (self.tensors[name] for name in ("x", "w", "a", "b", "bias"))
        y, s, alpha = self.tensors["y"], self.tensors["s"], self.alpha
        exact = reference(x.double(), w.double(), a.t().double(), b.double(), alpha, bias.double())
        assert_budget(y, reference(x, w, a.t(), b, alpha, bias), exact, "y")
        assert_budget(s, (alpha * (x @ a.t())).float(), alpha * (x.double() @ a.t().double()), "s")
        splits = self.grid[1]
        assert self.tensors["arrived"].eq(splits if splits > 1 else 0).all()


@pytest.mark.parametrize("schedule", [None, 3])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize(
    "dtype, aligned", [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, False)]
)
def test_decode(shipped, dtype, aligned, blocks, splits, schedule):
    """75 columns are two tiles, or three of 32, which the blocks share."""
    product = Product(dtype, splits, blocks=blocks, aligned=aligned)
    counters = product.run(shipped, schedule)
    product.check()
    assert counters.tensors["w"].bytes_loaded == product.tensors["w"].nbytes
    assert (counters.tensors["y"].stores == 1).all()


def test_barriers_and_memory_accesses_are_the_same_for_sm_90():
    """So what one's barriers order, the other's do; sm_90 only converts bfloat16 with an instruction of its own."""
    codes = [compiled(SHIPPED, target).splitlines() for target in ("sm_80", "sm_90")]
    differing = [pair for pair in zip(*codes, strict=True) if pair[0] != pair[1]]
    assert differing.pop(0) == (".target sm_80", ".target sm_90") and differing
    assert all(
        re.sub(r"mov.b32 (%f\d+), {0,(%rs\d+)}", r"cvt.f32.bf16 \1, \2", old) == new
        for old, new in differing
    )


@pytest.mark.parametrize("shipped", ["sm_80"], indirect=True)
@pytest.mark.parametrize(
    ("dtype", "rank", "aligned", "spare"),
    [
        (torch.bfloat16, 12, False, {0, 1, 2, 3, 12, 13}),
        (torch.bfloat16, 12, True, {4, 5, 6, 7, 12, 13}),
        (torch.float32, 40, False, {6}),
        (torch.float32, 0, False, {7, 8}),
    ],
    ids=["fused", "fused and aligned", "two chunks of the rank", "no rank"],
)
def test_every_barrier_and_fence_of_decode(shipped, dtype, rank, aligned, spare):
    """Each deleted in turn is noticed, at one rank or another.

    Between the split sums and their use stand a barrier after them, 6, and, for each chunk of the rank, one that keeps the
    chunk before whole, 7, and one in it, 8. A fused one has code of its own for a block's first tile and the others, each
    for aligned operands, 0 to 3, and for others, 4 to 7; the rest is six later there.
    """
    product = Product(dtype, 3, rank, 1, aligned)
    lines = shipped.splitlines()
    entries = [n for n, line in enumerate(lines) if ".entry" in line] + [len(lines)]
    (at,) = (
        i for i, n in enumerate(entries[:-1]) if entry(shipped, "decode", product.tile) in lines[n]
    )
    body = range(entries[at], entries[at + 1])
    ordering = [n for n in body if re.search(r"bar\.sync|membar", lines[n])]

    def races(*lines: int) -> bool:
        product.tensors["arrived"].zero_()
        try:
            product.run(without(shipped, *lines), None)
        except DataRace:
            return True
        return False

    assert not races()
    assert {i for i, line in enumerate(ordering) if not races(line)} == spare


def test_wgrad(shipped):
    wide, lowrank, out = (
        torch.randn(9, 150).bfloat16(),
        torch.randn(9, 11),
        torch.full((150, 11), torch.nan),
    )
    params = Wgrad(
        wide.data_ptr(),
        lowrank.data_ptr(),
        out.data_ptr(),
        *wide.stride(),
        *out.stride(),
        9,
        150,
        11,
    )
    launch = prepare(
        shipped, (2, 2), 128, [("p", "struct", params)], entry=entry(shipped, "wgrad"),
        pointed={"wide": wide, "lowrank": lowrank, "out": out},
    )  # fmt: skip
    launch.run(None)
    assert_budget(out, wide.float().t() @ lowrank, wide.double().t() @ lowrank.double())
