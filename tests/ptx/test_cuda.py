"""CUDA C++ as nvcc compiles it: the shipped kernels and one that uses what they do not."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tests.oracle import assert_budget, reference
from tests.ptx.launch import prepare
from tests.ptx.parser import PtxError, entry_names

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "csrc" / "cuda"
SHIPPED = """
#include "decode_kernel.cuh"
#include "reduce_outer_kernel.cuh"
using namespace lora_kernels;
using Mma = MmaTile<__nv_bfloat16, 1, 1, true>;
using Fma = FmaTile<float, 1, true>;
template __global__ void lora_kernels::decode_kernel<Mma, true>(const __grid_constant__ Decode);
template __global__ void lora_kernels::decode_kernel<Fma, true>(const __grid_constant__ Decode);
template __global__ void lora_kernels::reduce_outer_kernel<__nv_bfloat16, float>(const __grid_constant__ ReduceOuter);
"""


def compiled(source: Path, target: str) -> str:
    out = source.with_suffix(f".{target}.ptx")
    command = [
        "nvcc",
        "-ptx",
        "-std=c++17",
        f"-arch={target}",
        f"-I{SOURCES}",
        str(source),
        "-o",
        str(out),
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return out.read_text()


@pytest.fixture(scope="module", params=["sm_80", "sm_90"])
def shipped(request, tmp_path_factory) -> str:
    source = tmp_path_factory.mktemp("shipped") / "kernels.cu"
    source.write_text(SHIPPED)
    return compiled(source, request.param)


@pytest.fixture(scope="module")
def sums(tmp_path_factory) -> str:
    source = tmp_path_factory.mktemp("sums") / "sums.cu"
    shutil.copy(HERE / "sums.cu", source)
    return compiled(source, "sm_80")


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


def test_missing_barriers_are_noticed(sums):
    x = torch.randn(5, 300)
    exact = torch.cat([x.double().sum(1), x.double().sum()[None]])
    pieces = re.split(r"(bar\.sync\s+0;)", sums)
    assert len(pieces) == 7
    for skipped in (1, 3, 5):
        damaged = "".join(p for i, p in enumerate(pieces) if i != skipped)
        off = [
            (run_sums(damaged, x, seed)[0].double() - exact).abs().nan_to_num(1.0).max()
            for seed in range(8)
        ]
        assert max(off) > 1e-3, skipped


class Rows(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_int64), ("count", ctypes.c_int),
                ("align", ctypes.c_int), ("k_major", ctypes.c_bool)]  # fmt: skip

    @classmethod
    def of(cls, t: torch.Tensor) -> Rows:
        return cls(t.data_ptr(), t.stride(0), len(t), t.element_size(), True)


class Decode(ctypes.Structure):
    _fields_ = [
        *((name, Rows) for name in "xwa"), ("b", ctypes.c_void_p), ("b_row", ctypes.c_int64), ("b_col", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("bias", "s_given", "alpha_at", "y", "s", "partials", "arrived")),
        ("alpha", ctypes.c_float), *((name, ctypes.c_int) for name in ("k", "rank", "chunk")),
        *((name, ctypes.c_bool) for name in ("b_float", "y_float", "scale_y")),
    ]  # fmt: skip


class ReduceOuter(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("wide", "skinny", "out")),
        *((name, ctypes.c_int64) for name in ("wide_row", "wide_column", "out_column", "out_rank")),
        *((name, ctypes.c_int) for name in ("tokens", "columns", "rank")),
    ]  # fmt: skip


def entry(ptx: str, *needles: str) -> str:
    (name,) = (n for n in entry_names(ptx) if all(needle in n for needle in needles))
    return name


@pytest.mark.parametrize("schedule", [None, 3])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(
    ("dtype", "tile", "rows"), [(torch.bfloat16, "MmaTile", 64), (torch.float32, "FmaTile", 32)]
)
def test_decode(shipped, dtype, tile, rows, splits, schedule):
    M, N, K, R = 5, 75, 3 * 128 + 21, 12
    x, w, a = (torch.randn(n, K).to(dtype) / K**0.5 for n in (M, N, R))
    b, bias, y = (
        torch.randn(R, N).to(dtype),
        torch.randn(N).to(dtype),
        torch.full((M, N), torch.nan).to(dtype),
    )
    s, alpha = torch.full((M, R), torch.nan), 0.75
    fused = tile == "MmaTile"
    if not fused:
        s = alpha * (x @ a.t())
    tiles = -(-N // rows)
    partials = torch.full((tiles, splits, M, rows + 16 * fused), torch.nan)
    arrived = torch.zeros(tiles, dtype=torch.int32)
    chunk = -(-K // splits // 128) * 128
    params = Decode(
        Rows.of(x), Rows.of(w), Rows.of(a), b.data_ptr(), *b.stride(), bias.data_ptr(), None if fused else s.data_ptr(),
        None, y.data_ptr(), s.data_ptr(), partials.data_ptr(), arrived.data_ptr(), alpha, K, R, chunk,
        dtype == torch.float32, dtype == torch.float32, False,
    )  # fmt: skip
    tensors = {
        "x": x,
        "w": w,
        "a": a,
        "b": b,
        "bias": bias,
        "s": s,
        "y": y,
        "partials": partials,
        "arrived": arrived,
    }
    launch = prepare(
        shipped,
        (tiles, splits),
        128,
        [("p", "struct", params)],
        entry=entry(shipped, "decode", tile),
        pointed=tensors,
    )
    counters = launch.run(schedule)
    exact = reference(x.double(), w.double(), a.t().double(), b.double(), alpha, bias.double())
    assert_budget(y, reference(x, w, a.t(), b, alpha, bias), exact, "y")
    assert_budget(s, (alpha * (x @ a.t())).float(), alpha * (x.double() @ a.t().double()), "s")
    assert not arrived.any()
    assert counters.tensors["w"].bytes_loaded == w.nbytes
    assert (counters.tensors["y"].stores == 1).all()


def test_reduce_outer(shipped):
    wide, skinny, out = (
        torch.randn(9, 150).bfloat16(),
        torch.randn(9, 11),
        torch.full((150, 11), torch.nan),
    )
    params = ReduceOuter(
        wide.data_ptr(),
        skinny.data_ptr(),
        out.data_ptr(),
        *wide.stride(),
        *out.stride(),
        9,
        150,
        11,
    )
    launch = prepare(
        shipped, (2, 2), 128, [("p", "struct", params)], entry=entry(shipped, "reduce_outer"),
        pointed={"wide": wide, "skinny": skinny, "out": out},
    )  # fmt: skip
    launch.run(None)
    assert_budget(out, wide.float().t() @ skinny, wide.double().t() @ skinny.double())
