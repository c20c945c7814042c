"""LoRA on a quantised base: the NF4 format against bitsandbytes' own and against its formula, and everything over it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lora_kernels import explain, lora_linear, ops
from lora_kernels.quantized import NF4Weight, from_bitsandbytes
from tests.oracle import (
    check_function,
    reference,
    saved_inside,
    second_derivatives,
    with_gradients,
)

bnb = pytest.importorskip("bitsandbytes")

STORED = [torch.float32, torch.bfloat16, torch.float16]


def params(N, K, dtype=torch.float32, doubly=True, storage=torch.uint8, kind="nf4", **more):
    """A quantised Params4bit over normal values."""
    values = torch.randn(N, K, generator=torch.Generator().manual_seed(N * K)).to(dtype)
    return bnb.nn.Params4bit(
        values, quant_type=kind, compress_statistics=doubly, quant_storage=storage, **more
    ).to("cpu")


def by_formula(weight):
    """The elements one by one, as the format defines them, before they are rounded to its dtype."""
    state = weight.quant_state
    nibbles = [
        n for b in weight.data.view(torch.uint8).flatten().tolist() for n in (b >> 4, b & 15)
    ]
    values = []
    for e in range(state.shape.numel()):
        scale = state.absmax[e // 64]
        if state.state2 is not None:
            scale = state.state2.code[scale.int()] * state.state2.absmax[e // 64 // 256]
            scale = scale + state.offset
        values.append(state.code[nibbles[e]] * scale)
    return torch.stack(values).view(state.shape)


class TestTheFormat:
    @pytest.mark.parametrize("doubly", [False, True])
    @pytest.mark.parametrize("dtype", STORED, ids=str)
    @pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
    def test_it_is_bitsandbytes_own(self, dtype, storage, doubly):
        for N, K in ((3, 64), (40, 192), (300, 128)):
            packed = params(N, K, dtype, doubly, storage)
            weight = from_bitsandbytes(packed)
            assert weight.dtype == dtype and weight.shape == (N, K)
            true = bnb.functional.dequantize_4bit(packed.data, packed.quant_state)
            assert torch.equal(weight.dense(), true)
            assert torch.equal(weight.t().dense(), true.t()) and weight.t().shape == (K, N)

    @pytest.mark.parametrize("doubly", [False, True])
    @pytest.mark.parametrize("N, K", [(1, 1), (5, 13), (7, 96), (3, 65), (16, 80), (257, 65)])
    def test_any_sizes(self, N, K, doubly):
        packed = params(N, K, doubly=doubly)
        exact = by_formula(packed)
        for dtype in (*STORED, torch.float64):
            assert torch.equal(from_bitsandbytes(packed, dtype).dense(), exact.to(dtype))
            assert torch.equal(from_bitsandbytes(packed).to(dtype).dense(), exact.to(dtype))

    def test_nothing_to_decode(self):
        empty = NF4Weight(torch.empty(0, 1, dtype=torch.uint8), torch.empty(0), torch.zeros(16))
        assert dataclasses.replace(empty, K=4).dense().shape == (0, 4)

    def test_product_and_sum_round_one_after_the_other(self):
        """One step would give another last bit for some of these scales."""
        generator = torch.Generator().manual_seed(0)
        codes = torch.arange(256, dtype=torch.uint8).repeat(16)
        code2, absmax2 = torch.randn(256, generator=generator), torch.rand(16, generator=generator)
        weight = NF4Weight(
            torch.zeros(4096 * 32, dtype=torch.uint8),
            codes,
            torch.ones(16),
            code2,
            absmax2,
            torch.tensor(0.1),
            N=4096,
            K=64,
        )
        product = code2[codes.int()] * absmax2.repeat_interleave(256)
        assert torch.equal(weight.dense()[:, 0], product + 0.1)
        fused = code2[codes.int()].double() * absmax2.repeat_interleave(256).double()
        assert not torch.equal(weight.dense()[:, 0], (fused + torch.tensor(0.1).double()).float())

    def test_nothing_is_copied_and_its_parts_make_it_again(self):
        packed = params(7, 96)
        weight = from_bitsandbytes(packed)
        assert type(weight.packed) is torch.Tensor
        assert weight.packed.data_ptr() == packed.data_ptr()
        assert weight.nbytes < 7 * 96 * 2 + 4 * (16 + 256 + 2 + 1)
        again = NF4Weight.restored(weight.t().tensors, weight.t().sizes, weight.dtype)
        assert torch.equal(again.dense(), weight.dense().t())


class TestBadInput:
    @pytest.mark.parametrize(
        "change, error, message",
        [
            ({"block": 128}, ValueError, "block must be 64, got 128"),
            ({"K": 97}, ValueError, r"packed must have 340 elements for a weight \[7, 97\], got 336"),
            ({"packed": None}, ValueError, r"packed must be a tensor for a weight \[7, 96\], got None"),
            ({"absmax": None}, ValueError, r"absmax must be a tensor for a weight \[7, 96\], got None"),
            ({"absmax": 1.0}, TypeError, "absmax must be a Tensor, got float"),
            ({"absmax": torch.ones(11)}, TypeError, "absmax must be torch.uint8 .* got torch.float"),
            ({"code": torch.ones(15)}, ValueError, "code must have 16 elements .* got 15"),
            ({"code2": None}, ValueError, "code2, absmax2 and offset must be given together"),
            ({"offset": None}, ValueError, "code2, absmax2 and offset must be given together"),
            ({"absmax2": torch.ones(2)}, ValueError, "absmax2 must have 1 elements .* got 2"),
            ({"dtype": torch.int8}, TypeError, "dtype must be float32, .* got torch.int8"),
        ],
        ids=str,
    )  # fmt: skip
    def test_parts(self, change, error, message):
        weight = from_bitsandbytes(params(7, 96))
        A, B = torch.randn(96, 2), torch.randn(2, 7)
        with pytest.raises(error, match=message):
            lora_linear(torch.randn(3, 96), dataclasses.replace(weight, **change), A, B, 1.0)

    def test_a_packed_tensor_that_was_cast(self):
        packed = params(7, 96, storage=torch.float32)
        state = packed.quant_state
        cast = bnb.nn.Params4bit(packed.data.bfloat16(), quant_state=state, bnb_quantized=True)
        with pytest.raises(ValueError, match=r"packed must have 336 elements .* got 168"):
            from_bitsandbytes(cast)

    def test_what_is_declined(self):
        repacked = params(4, 64)
        repacked.quant_state.packing_format_for_cpu = True
        new = bnb.nn.Params4bit(torch.randn(4, 64), quant_type="nf4")
        unknown = bnb.nn.Int8Params(torch.randn(4, 64))
        parameter = "weight must be a parameter .* got a"
        for weight, error, message in (
            (params(4, 64, kind="fp4"), ValueError, "weight must have quant_type 'nf4', got 'fp4'"),
            (params(4, 64, blocksize=128), ValueError, "weight must have blocksize 64, got 128"),
            (repacked, ValueError, "packed row after row, got packing_format_for_cpu"),
            (new, TypeError, f"{parameter} Params4bit without quant_state"),
            (params(64, 1).quant_state, TypeError, f"{parameter} QuantState"),
            (torch.randn(4, 64), TypeError, f"{parameter} Tensor"),
            (unknown, TypeError, "quantised, int8 with a tensor SCB .* got torch.float32"),
        ):
            with pytest.raises(error, match=message):
                from_bitsandbytes(weight)

    def test_the_operators_refuse_what_they_cannot_restore(self):
        weight = from_bitsandbytes(params(7, 96))
        rest = torch.randn(96, 2), torch.randn(2, 7), None, torch.tensor(1.0), 0.0, None, "auto"
        x, sizes = torch.randn(3, 96), list(weight.sizes)
        with pytest.raises(ValueError, match=r"format must be one of .*'nf4'.*, got 'nf5'"):
            ops.lora_linear_quantized(x, list(weight.tensors), "nf5", sizes, *rest)
        packed = [weight.packed, weight.absmax, weight.code.clone().requires_grad_()]
        with pytest.raises(ValueError, match="packed must not require grad: a weight of nf4"):
            ops.lora_linear_quantized(x, packed + list(weight.tensors[3:]), "nf4", sizes, *rest)


class TestTheProduct:
    @pytest.fixture
    def given(self):
        """x, weight, A, B, bias; x, A and B require grad."""
        torch.manual_seed(3)
        x, A = (torch.randn(*size, requires_grad=True) for size in ((9, 96), (96, 4)))
        B = torch.randn(4, 40, requires_grad=True)
        return x, from_bitsandbytes(params(40, 96)), A, B, torch.randn(40)

    def test_values_and_gradients(self, given, backend):
        x, weight, A, B, bias = given

        def ours(x, A, B):
            return lora_linear(x, weight, A, B, 0.75, bias, backend=backend)

        def plain(x, A, B):
            return reference(x, weight.dense().to(x.dtype), A, B, 0.75, bias.to(x.dtype))

        check_function(ours, plain, (x, A, B))
        told = explain(x, weight, A, B, 0.75, bias, backend=backend)
        assert "nf4 weight on cpu" in str(told)

    @pytest.mark.parametrize(
        "compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
    )
    def test_compiled_from_the_parameter(self, given, compiler):
        x, _, A, B, bias = given
        packed = params(40, 96)

        def step(x, A, B):
            return lora_linear(x, from_bitsandbytes(packed), A, B, 0.75, bias)

        compiled = torch.compile(step, backend=compiler, fullgraph=True)
        with saved_inside() as kept:
            found = with_gradients(compiled, (x, A, B))
        # W, in any dtype, as a matrix or its transpose, is not among what the backward keeps.
        assert kept and not any(t.numel() == 40 * 96 for t in kept)
        assert any(t.dtype == torch.uint8 and t.numel() == 40 * 48 for t in kept)
        torch.testing.assert_close(found, with_gradients(step, (x, A, B)))

    def test_every_derivative_of_the_operator(self, given):
        _, weight, A, B, _ = given
        wide = weight.to(torch.float64)
        small = torch.randn(2, 96, dtype=torch.float64, requires_grad=True)
        A, B = A.detach().double().requires_grad_(), B.detach().double().requires_grad_()
        alpha = torch.tensor(0.75, dtype=torch.float64)
        packed = list(wide.tensors), "nf4", list(wide.sizes)

        def ours(x, A, B):
            y, _ = ops.lora_linear_quantized(x, *packed, A, B, None, alpha, 0.0, None, "auto")
            return y

        def plain(x, A, B):
            return reference(x, wide.dense(), A, B, 0.75)

        def gradient(f):
            return torch.func.grad(lambda *t: f(*t).square().sum())

        args = small, A, B
        batch = tuple(torch.stack([t.detach(), 2 * t.detach()]) for t in args)
        for derivative in (
            lambda f: with_gradients(f, args),
            lambda f: second_derivatives(f, args),
            lambda f: gradient(f)(*args),
            lambda f: torch.func.vmap(gradient(f))(*batch),
        ):
            torch.testing.assert_close(derivative(ours), derivative(plain))

    @pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 1)], ids=str)
    def test_the_operators_are_registered_as_they_behave(self, given, needs):
        x, weight, A, B, bias = (t if isinstance(t, NF4Weight) else t.detach() for t in given)
        for t, need in zip((x, A, B), needs, strict=True):
            t.requires_grad_(bool(need))
        packed = list(weight.tensors), "nf4", list(weight.sizes)
        tail = torch.tensor(0.5), 0.0, None, "eager"
        torch.library.opcheck(
            torch.ops.lora_kernels.lora_linear_quantized, (x, *packed, A, B, bias, *tail)
        )
        dy, s = torch.randn(9, 40), torch.randn(9, 4)
        needed = [bool(needs[0]), False, bool(needs[1]), bool(needs[2]), False]
        first = dy, torch.float32, needed, 96, 4
        operands = x.detach(), *packed, A.detach(), B.detach(), s
        torch.library.opcheck(
            torch.ops.lora_kernels.lora_linear_quantized_backward, (*first, *operands, *tail)
        )
