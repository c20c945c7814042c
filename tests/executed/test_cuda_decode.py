"""The CUDA backend end to end: its Python, its compiled host code, and its kernels' PTX in the emulator."""

from __future__ import annotations

import gc
import shutil
from dataclasses import replace

import pytest
import torch

from lora_kernels import Problem
from lora_kernels.backends import cuda
from lora_kernels.operands import Adapter
from lora_kernels.tuning.config import CUDA_DECODE_ROWS, cuda_decode_blocks
from lora_kernels.tuning.targets import TARGETS
from tests.executed.cuda_operators import EmulatedOperators
from tests.oracle import AWKWARD, Case, assert_budget, check_products, made_inside

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
def products(monkeypatch, library):
    """The backend's products on CPU tensors; `.operators` are those they call."""
    made = cuda.CudaProducts()
    made.operators = EmulatedOperators(library)
    monkeypatch.setattr(torch.ops, "lora_kernels_cuda", made.operators, raising=False)
    monkeypatch.setattr(cuda, "_multiprocessors", lambda device: 4)
    return made


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_every_product_of_small_problems(products, case):
    check_products(products, case)


@pytest.mark.parametrize("M", [1, 8, 9, 16, 17, 32])
def test_rows_of_every_tile(products, M):
    """Several column tiles and split sums; the tiles hold 8, 16 and 32 rows."""
    check_products(products, Case(M, 70, 328, 13, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype, K", [(torch.bfloat16, 40), (torch.float32, 20)], ids=str)
@pytest.mark.parametrize("M", range(1, CUDA_DECODE_ROWS + 1))
def test_any_number_of_rows(products, M, dtype, K):
    """y and s of one product; two steps of K, the second ragged, so that every number can be executed."""
    o = Case(M, 21, K, 3, dtype=dtype).operands()
    y, s = products.shrink_expand(o.x, o.w, o.adapter, o.bias)
    eager, exact = o.results(None), o.results(torch.float64)
    assert_budget(y, eager["y"], exact["y"], "y")
    assert_budget(s, eager["s"].float(), exact["s"], "s")


@pytest.mark.parametrize("layout", ["plain", "peft", "transposed", "sliced"])
@pytest.mark.parametrize(
    "dtype, adapter", [(torch.float16, None), (torch.bfloat16, torch.float32)], ids=str
)
def test_layouts_with_split_sums(products, layout, dtype, adapter):
    check_products(
        products, Case(5, 67, 395, 20, dtype=dtype, adapter_dtype=adapter, layout=layout)
    )


@pytest.mark.parametrize("R", [1, 16, 17, 32, 33, 100])
def test_ranks(products, R):
    check_products(products, Case(4, 65, 256, R, dtype=torch.bfloat16))


@pytest.mark.parametrize("N", [130, 600])
def test_split_sums_of_the_fused_pass(products, N):
    """x·A beside x·W, both split over K, in values; 600 columns are more tiles than blocks."""
    check_products(products, Case(6, N, 1030, 12, dtype=torch.bfloat16))


def test_more_tiles_than_blocks_without_a_split(products):
    """A block keeps x·A of its first tile for the others."""
    check_products(products, Case(11, 333, 70, 5, dtype=torch.float16))


def test_no_memory_outlives_a_call(products):
    """Kept memory may be a CUDA graph's, which others use again; here K is split, and blocks are counted."""
    o = Case(6, 130, 1030, 12, dtype=torch.bfloat16).operands()
    with made_inside() as alive:
        results = products.shrink_expand(o.x, o.w, o.adapter, o.bias)
        assert "partials" in products.operators.counters[0].tensors and alive()
        del results
    products.operators.pointed = {}  # the arguments of the last launch
    gc.collect()
    assert alive() == []


def test_a_result_past_32_bits(products):
    """y has more than 2³¹ elements, its operands have few: their columns are one column again and again."""
    N, products.operators.last_block_alone = 2**26 + 64, True
    x, w, b = torch.randn(32, 32).half(), torch.randn(32, 1).half(), torch.randn(3, 1).half()
    s = torch.randn(32, 3)

    def call(N):
        adapter = Adapter(x[:, :3], b.expand(3, N), 0.5)
        return products.expand(x, w.expand(32, N), s, adapter)

    assert torch.equal(call(N)[:, -64:], call(64))


@pytest.mark.parametrize("operand", ["x", "w", "a", "b"])
def test_an_operand_past_32_bits(products, operand):
    """Its rows, or of w and a its columns, lie 2³⁰ elements apart, the fourth past 2³¹."""
    near = dict(zip("xwab", (torch.randn(4, 4).half() for _ in range(4)), strict=True))
    near["w"], near["a"] = near["w"].t(), near["a"].t()
    far = torch.empty(3 * 2**30 + 4, dtype=torch.float16).as_strided((4, 4), (2**30, 1))
    far = (far.t() if operand in "wa" else far).copy_(near[operand])
    results = []
    for x, w, a, b in (near.values(), {**near, operand: far}.values()):
        results.append(products.shrink_expand(x, w, Adapter(a, b, 0.5)))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("wide_first", [True, False])
def test_wgrad_past_32_bits(products, wide_first):
    C, products.operators.last_block_alone = 2**27 + 128, True
    wide, lowrank = torch.randn(4, 1).half(), torch.randn(4, 16)

    def call(C):
        pair = (wide.expand(4, C), lowrank) if wide_first else (lowrank, wide.expand(4, C))
        out = products.wgrad(*pair, torch.float16)
        return out[-128:, 8:] if wide_first else out[8:, -128:]

    # The zeros that wgrad starts from would touch all of it.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "new_zeros", torch.Tensor.new_empty)
        far = call(C)
    assert torch.equal(far, call(128))


def test_bits_do_not_depend_on_the_order_of_blocks_and_warps(products):
    o = Case(6, 410, 1030, 12, dtype=torch.bfloat16).operands()
    results = []
    for schedule in (None, 1, 2, 3):
        products.operators.schedule = schedule
        results.append(products.shrink_expand(o.x, o.w, o.adapter, o.bias))
    assert all(torch.equal(y, results[0][0]) and torch.equal(s, results[0][1]) for y, s in results)


@pytest.mark.parametrize("tiles", [4, 10])
@pytest.mark.parametrize("M, K, splits", [(8, 2048, 2), (32, 192, 1)])
def test_bytes(products, tiles, M, K, splits):
    """W once, A at most once for each of 4 multiprocessors, x once a tile; y stored once and never read."""
    case = Case(M, 64 * tiles, K, 16, dtype=torch.bfloat16)
    o = replace(case, bias=False).operands()
    y, s = products.shrink_expand(o.x, o.w, o.adapter)
    (counters,) = products.operators.counters
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


def test_what_it_refuses():
    problem = Problem(4, 8, 8, 2, "bfloat16", "bfloat16", device="cuda")

    def refusal(problem, target="sm_80"):
        (only,) = cuda.BACKEND.candidates(problem, TARGETS[target])
        return only.refusal

    assert refusal(problem) is None
    assert "at most 32 rows, got 33" in refusal(replace(problem, M=33))
    assert "float64" in refusal(replace(problem, dtype="float64", adapter_dtype="float64"))
    assert "dropout" in refusal(replace(problem, dropout=True))
    assert "float16 adapters" in refusal(replace(problem, adapter_dtype="float16"))
    assert "NVIDIA" in refusal(problem, "gfx942")
