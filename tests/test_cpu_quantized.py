"""Quantised weights in the C++ kernels: the dense kernel's bits for many rows, the format's formula for few of them."""

from __future__ import annotations

import itertools

import pytest
import torch

from lora_kernels.backends.cpu import BACKEND, PRODUCTS
from lora_kernels.operands import Adapter
from lora_kernels.quantized import NF4Weight
from tests.oracle import assert_budget

if (_why_not := BACKEND.unavailable()) is not None:
    pytest.skip(f"cpu backend: {_why_not}", allow_module_level=True)

OPS = torch.ops.lora_kernels_cpu
f32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [f32, bf16, fp16]


def _nf4(N, K, dtype, doubly):
    """Every code and byte occurs; the values of the codes are not bitsandbytes' own, the kernels must read them."""
    generator = torch.Generator().manual_seed(N * K)
    elements = N * K
    blocks = -(-elements // 64)

    def codes(count):
        return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)

    packed = codes((elements + 1) // 2)
    code = torch.randn(16, generator=generator).sort().values
    if not doubly:
        scales = torch.rand(blocks, generator=generator) / max(K, 1) ** 0.5
        return NF4Weight(packed, scales, code, N=N, K=K, dtype=dtype)
    return NF4Weight(
        packed,
        codes(blocks),
        code,
        torch.randn(256, generator=generator) / max(K, 1) ** 0.5,
        torch.rand(-(-blocks // 256), generator=generator) + 0.5,
        torch.tensor(0.02),
        N=N,
        K=K,
        dtype=dtype,
    )


WEIGHTS = {
    "nf4": lambda N, K, dtype: _nf4(N, K, dtype, False),
    "nf4-doubly": lambda N, K, dtype: _nf4(N, K, dtype, True),
}


@pytest.fixture(params=["avx512_bf16", "avx512", "avx2"])
def isa(request):
    """Each instruction set that this processor runs, used by the kernels within the test."""
    if not OPS.use_isa(request.param):
        pytest.skip(f"this processor does not run the {request.param} kernels")
    yield request.param
    OPS.use_isa("")


def rows(M, width, dtype, seed=0):
    return torch.randn(M, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def both_ways(weight, M, R, dtype, adapter_dtype=None, dropout=None):
    """(x, w, adapter) of the forward and of dx, for a stored weight [N, K]."""
    N, K = weight.shape
    A = rows(K, R, adapter_dtype or dtype, 1) * 0.1
    adapter = Adapter(A, rows(R, N, adapter_dtype or dtype, 2) * 0.1, 0.5, dropout)
    yield rows(M, K, dtype, 3), weight.t(), adapter
    yield rows(M, N, dtype, 4), weight, adapter.t()


# (M, N, K, R): blocks that straddle rows, a partial last one, odd rows, one element, several groups of panels and
# chunks of k.
MANY = [
    (17, 32, 64, 4),
    (17, 33, 65, 4),
    (33, 77, 131, 3),
    (18, 1, 1, 1),
    (18, 7, 1, 2),
    (19, 1, 3, 2),
    (40, 600, 1100, 9),
    (550, 70, 130, 8),
    (20, 31, 4097, 4),
    (64, 9, 5000, 4),
]
FEW = [(M, N, K, R) for (_, N, K, R), M in zip(MANY, itertools.cycle((1, 2, 3, 4, 5, 8, 16)))]
FEW += [(1, 300, 128, 4), (4, 128, 256, 4), (16, 130, 320, 8), (1, 64, 9000, 4), (3, 9000, 64, 4)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", WEIGHTS)
class TestTheProduct:
    @pytest.mark.parametrize("M, N, K, R", MANY)
    def test_many_rows_have_the_dense_kernels_bits(self, kind, dtype, M, N, K, R, isa):
        weight = WEIGHTS[kind](N, K, dtype)
        for x, w, adapter in both_ways(weight, M, R, dtype):
            y, _ = PRODUCTS.shrink_expand(x, w, adapter)
            assert torch.equal(y, PRODUCTS.shrink_expand(x, w.dense(), adapter)[0])

    @pytest.mark.parametrize("M, N, K, R", FEW)
    def test_few_rows_follow_the_formats_formula(self, kind, dtype, M, N, K, R, isa):
        weight = WEIGHTS[kind](N, K, dtype)
        bias = rows(1, N, dtype, 5)[0]
        for x, w, adapter in both_ways(weight, M, R, dtype):
            end = bias if w.shape[1] == N else None
            y, _ = PRODUCTS.shrink_expand(x, w, adapter, end)
            exact, eager = (
                x.to(t) @ w.to(t).dense()
                + 0.5 * (x.to(t) @ adapter.A.to(t) @ adapter.B.to(t)).to(t)
                + (0 if end is None else end.to(t))
                for t in (torch.float64, dtype)
            )
            assert_budget(y, eager, exact, f"y of {kind}, {M} rows, {tuple(w.shape)}")


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("M", [1, 4, 9, 16, 70])
def test_any_number_of_threads_gives_the_same_bits(kind, M):
    weight = WEIGHTS[kind](600, 1100, bf16)
    before = torch.get_num_threads()
    for x, w, adapter in both_ways(weight, M, 9, bf16):
        try:
            torch.set_num_threads(1)
            first = PRODUCTS.shrink_expand(x, w, adapter)[0]
            for threads in (2, 3, 7):
                torch.set_num_threads(threads)
                assert torch.equal(first, PRODUCTS.shrink_expand(x, w, adapter)[0])
        finally:
            torch.set_num_threads(before)
