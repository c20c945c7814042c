"""Quantised weights in the C++ kernels: the dense kernel's bits for many rows, the format's formula for few of them."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from lora_kernels.backends.cpu import BACKEND, PRODUCTS
from lora_kernels.functional import explain, lora_linear
from lora_kernels.operands import Adapter
from lora_kernels.quantized import FP8Weight, Int8Weight, NF4Weight
from tests import test_cpu_backend
from tests.oracle import assert_budget, made_inside
from tests.test_cpu_backend import same_on_any_threads

if (_why_not := BACKEND.unavailable()) is not None:
    pytest.skip(f"cpu backend: {_why_not}", allow_module_level=True)

OPS = torch.ops.lora_kernels_cpu
f32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [f32, bf16, fp16]
isa = test_cpu_backend.isa  # a fixture


def _nf4(N, K, dtype, doubly):
    """Every code and byte occurs; the values of the codes are not bitsandbytes' own, the kernels must read them."""
    generator = torch.Generator().manual_seed(N * K)
    blocks, size = -(-N * K // 64), max(K, 1) ** -0.5

    def codes(count):
        return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)

    packed = codes((N * K + 1) // 2)
    code = torch.randn(16, generator=generator).sort().values
    if not doubly:
        scales = torch.rand(blocks, generator=generator) * size
        return NF4Weight(packed, scales, code, N=N, K=K, dtype=dtype)
    code2 = torch.randn(256, generator=generator) * size
    absmax2 = torch.rand(-(-blocks // 256), generator=generator) + 0.5
    scales = codes(blocks), code, code2, absmax2, torch.tensor(0.02)
    return NF4Weight(packed, *scales, N=N, K=K, dtype=dtype)


def _int8(N, K, dtype):
    generator = torch.Generator().manual_seed(N * K)
    codes = torch.randint(-128, 128, (N, K), dtype=torch.int8, generator=generator)
    return Int8Weight(codes, torch.rand(N, generator=generator) / max(K, 1) ** 0.5, dtype)


def _fp8(block, codes=None):
    """`block` None: one scale for all of W. The codes are random ones of all but NaN, or those given."""

    def weight(N, K, dtype):
        generator = torch.Generator().manual_seed(N * K)
        bits = torch.randint(0, 127, (N, K), generator=generator)
        bits += 128 * torch.randint(0, 2, (N, K), generator=generator)
        rows, cols = block or (N, K)
        blocks = -(-N // rows), -(-K // cols)
        scales = (torch.rand(blocks, generator=generator) + 0.5) / (200 * max(K, 1) ** 0.5)
        own = bits.to(torch.uint8) if codes is None else codes
        return FP8Weight(own.view(torch.float8_e4m3fn).view(N, K), scales, (rows, cols), dtype)

    return weight


WEIGHTS = {
    "int8": _int8,
    "fp8": _fp8((128, 128)),
    "fp8-odd": _fp8((5, 7)),
    "fp8-one": _fp8(None),
    "nf4": lambda N, K, dtype: _nf4(N, K, dtype, False),
    "nf4-doubly": lambda N, K, dtype: _nf4(N, K, dtype, True),
}


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("flushed", [False, True])
def test_every_code_of_fp8_by_every_instruction_set(dtype, flushed, isa):
    """NaN and subnormal codes too, also where the processor takes subnormal floats for zero."""
    codes = torch.arange(256).to(torch.uint8).repeat(3)
    weight = _fp8((1, 128), codes)(3, 256, dtype)
    one = torch.zeros(20, 3, dtype=dtype)
    one[:3] = torch.eye(3)
    dense, adapter = weight.dense(), Adapter(torch.zeros(3, 1), torch.zeros(1, 256), 0.5)
    try:
        torch.set_flush_denormal(flushed)
        y = PRODUCTS.shrink_expand(
            one.to(dtype), weight, Adapter(*(t.to(dtype) for t in adapter[:2]), 0.5)
        )[0]
    finally:
        torch.set_flush_denormal(False)
    # A row of y has NaN where any row of W has it.
    assert torch.equal(y[:3].isnan(), dense.isnan()) and dense.isnan().any()
    assert torch.equal(y[:3].nan_to_num(), dense.nan_to_num())


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("M", [1, 4, 9, 16, 70])
def test_any_number_of_threads_gives_the_same_bits(kind, M):
    both = list(both_ways(WEIGHTS[kind](600, 1100, bf16), M, 9, bf16))
    same_on_any_threads(lambda: [PRODUCTS.shrink_expand(*operands)[0] for operands in both])


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("dtype, adapter_dtype", [(f32, f32), (bf16, f32), (fp16, fp16)], ids=str)
@pytest.mark.parametrize("M, N, K", [(40, 70, 131), (3, 70, 131), (3, 128, 192), (16, 128, 192)])
def test_the_layer_and_its_gradients(kind, dtype, adapter_dtype, M, N, K):
    """Those of the dense weight: the same bits for many rows, within the budget for few."""
    weight = WEIGHTS[kind](N, K, dtype)
    bias = rows(1, N, dtype, 5)[0]

    def results(w, backend, to=None, **more):
        x, A, B = (
            t.to(to or t.dtype).requires_grad_()
            for t in (
                rows(M, K, dtype, 3),
                rows(K, 4, adapter_dtype, 1) * 0.1,
                rows(4, N, adapter_dtype, 2) * 0.1,
            )
        )
        end = bias.to(to or dtype)
        y = lora_linear(x, w, A, B, 0.5, end, dropout_p=0.25, seed=7, backend=backend)
        y.backward(rows(M, N, dtype, 4).to(y.dtype))
        return y.detach(), x.grad, A.grad, B.grad

    ours = results(weight, "cpu")
    dense = results(weight.dense(), "cpu")
    if M > 16:
        assert all(map(torch.equal, ours, dense))
    exact = results(weight.to(torch.float64).dense(), "eager", torch.float64)
    eager = results(weight.dense(), "eager")
    for name, *each in zip(("y", "dx", "dA", "dB"), ours, eager, exact, strict=True):
        assert_budget(*each, name)


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("M", [2, 20])
def test_nan_and_infinity_stand_where_the_dense_weight_has_them(kind, M):
    weight = WEIGHTS[kind](128, 192, bf16)
    for x, w, adapter in both_ways(weight, M, 4, bf16):
        x[0, 3], x[1, 100] = float("nan"), float("inf")
        y = PRODUCTS.shrink_expand(x, w, adapter)[0]
        eager = x @ w.dense() + (0.5 * (x @ adapter.A @ adapter.B)).to(bf16)
        for test in (torch.isnan, torch.isinf):
            assert torch.equal(test(y), test(eager))


@pytest.mark.parametrize("M", [1, 5, 20])
def test_scales_that_are_no_numbers(M):
    weight = _nf4(128, 192, f32, False)
    absmax = weight.absmax.clone()
    absmax[5], absmax[77] = float("inf"), float("nan")
    weight = replace(weight, absmax=absmax)
    for x, w, adapter in both_ways(weight, M, 4, f32):
        y, eager = PRODUCTS.shrink_expand(x, w, adapter)[0], x @ w.dense()
        assert torch.equal(y.isnan(), eager.isnan()) and y.isnan().any() and not y.isnan().all()


@pytest.mark.parametrize("M", [1, 5, 20])
def test_an_infinite_scale_of_elements_of_both_signs(M):
    """Their sum is NaN, also where the sum of their codes is positive in every lane of a vector."""
    weight = _nf4(64, 128, f32, False)
    weight.packed[:32] = 0xFF
    weight.packed[7] = 0x0F
    weight.absmax[0] = float("inf")
    assert weight.code[0] < 0 and 7 * weight.code[15] + weight.code[0] > 0
    y, _ = PRODUCTS.shrink_expand(
        torch.ones(M, 128), weight.t(), Adapter(torch.zeros(128, 1), torch.zeros(1, 64), 0.5)
    )
    assert y[:, 0].isnan().all() and y[:, 1:].isfinite().all()


@pytest.mark.parametrize("M", [2, 5, 20])
def test_a_code_of_fp8_that_is_no_number(M):
    weight = _fp8((128, 128))(64, 128, bf16)
    codes = weight.codes.view(torch.uint8).clone()
    codes[5, 70], codes[9, 3] = 0x7F, 0xFF
    weight = replace(weight, codes=codes.view(torch.float8_e4m3fn))
    for (x, w, adapter), nan in zip(both_ways(weight, M, 4, bf16), ([5, 9], [3, 70]), strict=True):
        y, _ = PRODUCTS.shrink_expand(x, w, adapter)
        assert y.isnan().any(0).nonzero().flatten().tolist() == nan
        assert y[:, nan].isnan().all()


@pytest.mark.parametrize("M", [1, 70])
def test_no_weight_is_made(M):
    weight = _nf4(192, 256, bf16, True)
    A, B = rows(256, 4, bf16, 1).requires_grad_(), rows(4, 192, bf16, 2).requires_grad_()
    with made_inside() as held:
        x = rows(M, 256, bf16).requires_grad_()
        y = lora_linear(x, weight, A, B, 0.5, backend="cpu")
        y.sum().backward()
        assert not any(len(shape) == 2 and shape[0] * shape[1] >= 192 * 256 for shape in held())
    assert "dense copy" not in str(explain(x, weight, A, B, 0.5, backend="cpu"))


@pytest.mark.parametrize("N, K", [(128, 192), (77, 131)])
@pytest.mark.parametrize("M", [3, 20])
def test_packed_tensors_may_be_views(N, K, M):
    """Of larger memory, strided or negated: they are written out."""
    weight = _nf4(N, K, f32, True)
    packed, absmax, code, code2, absmax2, offset = weight.tensors
    strided = torch.stack((packed, packed + 1), 1)[:, 0]
    longer = torch.cat((absmax[:3], absmax))[3:]
    negated = torch.view_as_complex(torch.stack((code, -code), 1)).conj().imag
    assert negated.is_neg() and not strided.is_contiguous()
    others = strided, longer, negated, code2, absmax2, offset
    x, w, adapter = next(both_ways(weight, M, 4, f32))
    expected = PRODUCTS.shrink_expand(x, w, adapter)[0]
    assert torch.equal(PRODUCTS.shrink_expand(x, w.with_tensors(others), adapter)[0], expected)


@pytest.mark.parametrize(
    "place, other, message",
    [
        (0, torch.zeros(99, dtype=torch.uint8), "packed must have 200 bytes.* got 99"),
        (0, torch.zeros(200, dtype=torch.uint8, device="meta"), "meta|Meta"),
        (1, torch.zeros(6, dtype=torch.uint8), "absmax must have 7 elements, got 6"),
        (1, torch.zeros(7), "absmax must be Byte, got Float"),
        (2, torch.zeros(15), "code must have 16 elements, got 15"),
        (2, torch.zeros(16).double(), "code must be Float, got Double"),
        (3, torch.zeros(255), "code2 must have 256 elements, got 255"),
        (4, torch.zeros(0), "absmax2 must have 1 elements, got 0"),
        (5, torch.zeros(2), "offset must have 1 elements, got 2"),
        (5, None, "packed must be 3 or 6 tensors of nf4, got 5"),
    ],
    ids=str,
)
def test_the_operator_reads_no_packed_tensor_that_does_not_fit(place, other, message):
    packed = list(_nf4(5, 80, f32, True).tensors)
    packed[place : place + 1] = [] if other is None else [other]
    rest = rows(2, 3, f32), rows(3, 5, f32), None, 0, 0, 1.0
    with pytest.raises((RuntimeError, NotImplementedError), match=message):
        OPS.expand_quantized(rows(2, 80, f32), packed, "nf4", [5, 80, 1], *rest)


def test_memory_that_was_freed_is_not_read():
    weight = _nf4(5, 80, f32, False)
    x, w, adapter = next(both_ways(weight, 2, 3, f32))
    weight.packed.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="packed must have memory for 200 bytes"):
        PRODUCTS.shrink_expand(x, w, adapter)


@pytest.mark.parametrize(
    "format, sizes, message",
    [
        ("nf5", [5, 80, 1], "format must be nf4, int8 or fp8, got nf5"),
        ("nf4", [5, 80], "sizes of nf4 must be N, K and transposed"),
        ("nf4", [-5, 80, 1], "sizes of nf4"),
        ("nf4", [2**40, 2**40, 1], "sizes of nf4"),
        ("nf4", [80, 5, 1], "x must be a|must be"),
        ("int8", [1], "packed must be codes"),
        ("int8", [1, 1, 1], "sizes must be transposed alone"),
        ("fp8", [1], "sizes must be two of a block and transposed"),
        ("fp8", [0, 64, 1], "sizes must be two of a block"),
        ("fp8", [4, 64, 1], "packed must be codes"),
    ],
)
def test_the_operator_refuses_what_is_no_weight(format, sizes, message):
    rest = rows(2, 3, f32), rows(3, 5, f32), None, 0, 0, 1.0
    packed = _nf4(5, 80, f32, True).tensors
    with pytest.raises(RuntimeError, match=message):
        OPS.expand_quantized(rows(2, 80, f32), packed, format, sizes, *rest)


@pytest.mark.parametrize("rows", [1, 16, 17])
@pytest.mark.parametrize("kind", [kind for kind in WEIGHTS if kind != "fp8-one"])
def test_a_weight_without_columns(kind, rows):
    """W [N, 0], and its transpose: x·W is zero, and so is dx of no outputs."""
    weight = WEIGHTS[kind](8, 0, torch.float32)
    x, A = torch.randn(rows, 0, requires_grad=True), torch.randn(0, 2, requires_grad=True)
    B = torch.randn(2, 8, requires_grad=True)
    y = lora_linear(x, weight, A, B, 1.0)
    y.sum().backward()
    assert y.shape == (rows, 8) and not y.any() and not B.grad.any()


def test_blocks_larger_than_any_number_are_the_whole_weight():
    codes = torch.zeros(4, 64).to(torch.float8_e4m3fn)
    x, A, B = torch.randn(3, 64), torch.randn(64, 1), torch.randn(1, 4)
    ops = torch.ops.lora_kernels_cpu
    for sizes in ([1, 2**63 - 1, 0], [2**63 - 1, 64, 0]):
        with pytest.raises(RuntimeError, match="scales must have"):
            packed = [codes, torch.empty(0)]
            ops.lora_linear_quantized(x, packed, "fp8", sizes, A, B, None, 1.0, 0.0, 0, 0, None)
