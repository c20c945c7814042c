"""The CUDA backend end to end: its Python, its compiled host code, and its kernels' PTX in the emulator."""

from __future__ import annotations

import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from lora_kernels import Problem
from lora_kernels.backends import cuda
from lora_kernels.tuning.config import CUDA_DECODE_ROWS, cuda_decode_blocks
from lora_kernels.tuning.targets import TARGETS
from tests.executed.cuda_operators import EmulatedOperators
from tests.oracle import AWKWARD, Case, assert_budget, check_backend

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc"),
]
# Exact float32 products take a hundred times the instructions of a matrix unit's: of those cases the smaller ones.
SMALL = [
    case
    for case in AWKWARD
    if (CUDA_DECODE_ROWS if case.dtype != torch.float32 else 16) >= case.M and not case.dropout
]


@pytest.fixture
def backend(monkeypatch, library):
    """The backend on CPU tensors; `.operators` are those it calls."""
    made = cuda.CudaBackend()
    made.operators = EmulatedOperators(library)
    monkeypatch.setattr(torch.ops, "lora_kernels_cuda", made.operators, raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(cuda, "_multiprocessors", lambda device: 4)
    monkeypatch.setattr(cuda, "current_target", lambda: TARGETS["sm_80"])
    return made


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_every_product_of_small_problems(backend, case):
    check_backend(backend, case)


@pytest.mark.parametrize("M", [1, 8, 9, 16, 17, 32])
def test_rows_of_every_tile(backend, M):
    """Several column tiles and split sums; the tiles hold 8, 16 and 32 rows."""
    check_backend(backend, Case(M, 70, 328, 13, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype, K", [(torch.bfloat16, 40), (torch.float32, 20)], ids=str)
@pytest.mark.parametrize("M", range(1, CUDA_DECODE_ROWS + 1))
def test_any_number_of_rows(backend, M, dtype, K):
    """y and s of one product; two steps of K, the second ragged, so that every number can be executed."""
    o = Case(M, 21, K, 3, dtype=dtype).operands()
    y, s = backend.expand(o.x, o.w, o.a, o.b, o.case.alpha, o.bias)
    eager, exact = o.results(None), o.results(torch.float64)
    assert_budget(y, eager["y"], exact["y"], "y")
    assert_budget(s, eager["s"].float(), exact["s"], "s")


@pytest.mark.parametrize("layout", ["plain", "peft", "transposed", "sliced"])
@pytest.mark.parametrize(
    "dtype, adapter", [(torch.float16, None), (torch.bfloat16, torch.float32)], ids=str
)
def test_layouts_with_split_sums(backend, layout, dtype, adapter):
    check_backend(backend, Case(5, 67, 395, 20, dtype=dtype, adapter_dtype=adapter, layout=layout))


@pytest.mark.parametrize("R", [1, 16, 17, 32, 33, 100])
def test_ranks(backend, R):
    check_backend(backend, Case(4, 65, 256, R, dtype=torch.bfloat16))


@pytest.mark.parametrize("N", [130, 600])
def test_split_sums_of_the_fused_pass(backend, N):
    """x·A beside x·W, both split over K, in values; 600 columns are more tiles than blocks."""
    check_backend(backend, Case(6, N, 1030, 12, dtype=torch.bfloat16))


def test_more_tiles_than_blocks_without_a_split(backend):
    """A block keeps x·A of its first tile for the others."""
    check_backend(backend, Case(11, 333, 70, 5, dtype=torch.float16))


def test_counters_serve_the_next_launch(backend, monkeypatch):
    """Outside of a graph's capture the counters are made once, so every launch must leave them at zero."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(cuda, "_arrived", {})
    case = Case(6, 130, 1030, 12, dtype=torch.bfloat16)
    check_backend(backend, case)
    (counters,) = cuda._arrived.values()
    assert not counters.any()


def test_bits_do_not_depend_on_the_order_of_blocks_and_warps(backend):
    o = Case(6, 410, 1030, 12, dtype=torch.bfloat16).operands()
    results = []
    for schedule in (None, 1, 2, 3):
        backend.operators.schedule = schedule
        results.append(backend.expand(o.x, o.w, o.a, o.b, 0.5, o.bias))
    assert all(torch.equal(y, results[0][0]) and torch.equal(s, results[0][1]) for y, s in results)


@pytest.mark.parametrize("tiles", [4, 10])
@pytest.mark.parametrize("M, K, splits", [(8, 2048, 2), (32, 192, 1)])
def test_bytes(backend, tiles, M, K, splits):
    """W once, A at most once for each of 4 multiprocessors, x once a tile; y stored once and never read."""
    case = Case(M, 64 * tiles, K, 16, dtype=torch.bfloat16)
    o = replace(case, bias=False).operands()
    y, s = backend.expand(o.x, o.w, o.a, o.b, case.alpha)
    (counters,) = backend.operators.counters
    tensors, blocks = counters.tensors, cuda_decode_blocks(tiles, 4)
    assert tensors["w"].bytes_loaded == o.w.nbytes
    assert tensors["x"].bytes_loaded == tiles * o.x.nbytes
    assert 0 < tensors["a"].bytes_loaded <= blocks * o.a.nbytes <= 4 * o.a.nbytes
    assert tensors["y"].bytes_loaded == 0 and (tensors["y"].stores == 1).all()
    assert tensors["w"].load_sectors == tensors["w"].fewest_load_sectors
    assert (tensors["s"].stores == 1).all() and ("partials" in tensors) == (splits > 1)
    eager, exact = o.results(None), o.results(torch.float64)
    assert_budget(y, eager["y"], exact["y"], "y")
    assert_budget(s, eager["s"].float(), exact["s"], "s")


def test_what_it_declines(backend):
    problem = Problem(4, 8, 8, 2, "bfloat16", "bfloat16", device="cuda")
    assert backend.declines(problem) is None
    assert "at most 32 rows, got 33" in backend.declines(replace(problem, M=33))
    float64 = replace(problem, dtype="float64", adapter_dtype="float64")
    assert "float64" in backend.declines(float64)
    assert "dropout" in backend.declines(replace(problem, dropout=True))
    assert "float16 adapters" in backend.declines(replace(problem, adapter_dtype="float16"))
