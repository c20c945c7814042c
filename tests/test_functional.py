"""`lora_linear`: values and gradients for any shape, layout and dtype, and what it says about bad operands."""

from __future__ import annotations

import itertools
import re
from contextlib import nullcontext
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from lora_kernels import LinearWithLoRA, Problem, explain, lora_linear, use_backend
from tests.oracle import assert_bits, check_function, reference, with_gradients

NAMES = ("x", "weight", "A", "B", "bias")


def operands(M=9, N=7, K=6, R=3, dtype=torch.float32, adapter_dtype=None, bias=True, lead=None):
    """Leaves x, weight, A, B, bias that require grad."""
    adapter_dtype = adapter_dtype or dtype
    shapes = [((*(lead if lead is not None else (M,)), K), dtype), ((N, K), dtype)]
    shapes += [((K, R), adapter_dtype), ((R, N), adapter_dtype), ((N,), dtype)]
    made = [torch.randn(s, dtype=torch.float64).mul(0.5).to(d).requires_grad_() for s, d in shapes]
    return made if bias else [*made[:4], None]


def compare(tensors, alpha=0.75, dy=None):
    """Our result and gradients against eager's, both measured from float64's."""
    ours, plain = (
        lambda x, weight, A, B, bias, f=f: f(x, weight, A, B, alpha, bias)
        for f in (lora_linear, reference)
    )
    leaves = [t if t is None else t.detach().requires_grad_() for t in tensors]
    check_function(ours, plain, leaves, dy)


@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3), (2, 1, 3, 2), (0,), (2, 0)], ids=str)
def test_any_leading_shape(backend, lead):
    tensors = operands(lead=lead)
    with use_backend(backend):
        compare(tensors)
        assert lora_linear(*tensors[:4], 1.0).shape == (*lead, 7)


LAYOUTS = {
    "transposed": lambda t: t.t().contiguous().t() if t.ndim == 2 else t,
    "every second": lambda t: torch.stack((t, torch.full_like(t, float("nan"))), -1)[..., 0],
    "narrowed": lambda t: F.pad(t, (1, 2), value=float("nan"))[..., 1 : 1 + t.shape[-1]],
    "offset": lambda t: torch.cat((t.new_full((1,), float("nan")), t.flatten()))[1:].view(t.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", NAMES)
def test_any_layout_of_each_operand(backend, which, layout):
    """A strided operand gives what its contiguous copy gives, to eager's accuracy, and is left as it is."""
    tensors = [t.detach() for t in operands(M=33, N=20, K=40, R=5)]
    index = NAMES.index(which)
    tensors[index] = LAYOUTS[layout](tensors[index])
    before = tensors[index].clone()
    with use_backend(backend):
        compare(tensors)
    assert torch.equal(tensors[index], before)


@pytest.mark.parametrize(
    "kind", ["transposed", "expanded from one number", "sliced", "expanded rows"]
)
def test_any_layout_of_the_incoming_gradient(backend, kind):
    tensors = operands(M=12, N=10, K=8)
    dy = {
        "transposed": torch.randn(10, 12).t(),
        "expanded from one number": torch.tensor(1.5).expand(12, 10),
        "sliced": torch.randn(12, 25)[:, 3:13],
        "expanded rows": torch.randn(10).expand(12, 10),
    }[kind]
    with use_backend(backend):
        compare(tensors, dy=dy)


def test_gradient_reaches_a_three_dimensional_strided_x(backend):
    """Flattening must not cut x off its gradient."""
    base = torch.randn(3, 6, 4, requires_grad=True)
    x = base.transpose(1, 2)  # [3, 4, 6], not contiguous
    _, weight, A, B, bias = operands()
    with use_backend(backend):
        lora_linear(x, weight, A, B, 1.0, bias).sum().backward()
    reference_grad = torch.autograd.grad(reference(x, weight, A, B, 1.0, bias).sum(), base)[0]
    torch.testing.assert_close(base.grad, reference_grad)


@pytest.mark.parametrize("rank", [1, 2, 3, 5, 8, 12, 16, 17, 24, 33, 64, 65, 100, 256, 512])
def test_any_rank(backend, rank):
    with use_backend(backend):
        compare(operands(M=19, N=37, K=29, R=rank))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_any_mix_of_dtypes(dtype, adapter):
    """y and dx have x's dtype, every gradient its parameter's, and errors stay within eager's budget."""
    tensors = operands(M=17, N=20, K=24, R=4, dtype=dtype, adapter_dtype=adapter)
    y = lora_linear(*tensors[:4], 0.5, tensors[4])
    assert y.dtype == F.linear(tensors[0], tensors[1]).dtype
    y.float().square().sum().backward()
    assert [t.grad.dtype for t in tensors] == [dtype, dtype, adapter, adapter, dtype]
    if adapter == dtype or adapter == torch.float32:
        compare(tensors)


def test_float32_adapters_are_used_as_they_are(backend):
    """On a bfloat16 base neither A nor B is rounded to bfloat16 first: the branch cancels all that would be left."""
    x = torch.ones(4, 6, dtype=torch.bfloat16)
    weight = torch.zeros(5, 6, dtype=torch.bfloat16)
    small = 2.0**-12  # 1 + small is 1 in bfloat16
    signs = torch.tensor([1.0, -1.0]).repeat(3)
    A = (signs * (1 + small * (signs > 0)))[:, None]  # each row of x·A sums to 3·small
    B = torch.ones(1, 5)
    with use_backend(backend):
        y = lora_linear(x, weight, A, B, 1.0)
        in_b = lora_linear(
            x, weight, signs.repeat(2, 1).t(), torch.stack((B[0] + small, -B[0])), 1.0
        )
        A, B = A.requires_grad_(), B.requires_grad_()
        lora_linear(x, weight, A, B, 1.0).sum().backward()
    assert torch.equal(y, torch.full_like(y, 3 * small))
    assert not in_b.any()  # x·A is zero there, so B cannot matter
    assert A.grad.dtype == B.grad.dtype == torch.float32
    assert torch.equal(B.grad, torch.full((1, 5), 12 * small))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_autocast_gives_the_dtype_of_linear(half, dtype):
    tensors = operands(
        dtype=dtype, adapter_dtype=torch.float32 if dtype != torch.float64 else dtype
    )
    with torch.autocast("cpu", dtype=half):
        y = lora_linear(*tensors[:4], 0.5, tensors[4])
        assert y.dtype == F.linear(tensors[0], tensors[1]).dtype
    y.float().sum().backward()
    assert all(t.grad.dtype == t.dtype for t in tensors)
    exact = reference(*(t.double() for t in tensors[:4]), 0.5, tensors[4].double())
    tolerance = 1e-9 if dtype == torch.float64 else 0.05
    torch.testing.assert_close(y.double(), exact, atol=tolerance, rtol=tolerance)


@settings(max_examples=60, deadline=None)
@given(
    M=st.integers(0, 40),
    N=st.integers(0, 40),
    K=st.integers(0, 70),
    R=st.integers(0, 20),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    alpha=st.sampled_from([1.0, -0.5, 0.0, 8.0]),
    bias=st.booleans(),
)
def test_random_problems(M, N, K, R, dtype, alpha, bias):
    torch.manual_seed(M * 7919 + N * 101 + K * 11 + R)
    compare(operands(M, N, K, R, dtype=dtype, bias=bias), alpha=alpha)


class TestEmpty:
    @pytest.mark.parametrize("size", ["M", "N", "K", "R"])
    def test_gradients_of_an_empty_extent_are_zeros(self, backend, size):
        tensors = operands(**{size: 0})
        with use_backend(backend):
            y = lora_linear(*tensors[:4], 2.0, tensors[4])
            y.sum().backward()
        assert all(t.grad is not None and t.grad.shape == t.shape for t in tensors)
        for t, unaffected in zip(tensors, ("R", "R", "", "", "KR"), strict=True):
            if size not in unaffected:
                assert not t.grad.any()

    def test_without_k_the_result_is_the_bias(self, backend):
        tensors = operands(K=0)
        with use_backend(backend):
            y = lora_linear(*tensors[:4], 2.0, tensors[4])
        assert torch.equal(y, tensors[4].expand(9, 7))


class TestNumerics:
    def test_float16_may_overflow_in_eager_but_not_here(self, backend):
        """s = 131072 is no float16; y = 0.0524 is, and so are the gradients."""
        x = torch.full((1, 512), 16.0, dtype=torch.float16, requires_grad=True)
        A = torch.full((512, 1), 16.0, dtype=torch.float16, requires_grad=True)
        B = torch.full((1, 4), 4e-7, dtype=torch.float16, requires_grad=True)
        weight = torch.zeros(4, 512, dtype=torch.float16)
        assert torch.isinf(x @ A).all()
        with use_backend(backend):
            y = lora_linear(x, weight, A, B, 1.0)
            y.sum().backward()
        exact = (x.double() @ A.double() @ B.double()).float()
        torch.testing.assert_close(y.float(), exact, rtol=2e-3, atol=0)
        assert torch.isfinite(x.grad).all() and torch.isfinite(A.grad).all()
        assert torch.isinf(B.grad).all()  # its own true value, 131072, is beyond float16

    @pytest.mark.parametrize("where", range(5), ids=NAMES)
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
    def test_nan_and_infinity_stand_where_eager_has_them(self, backend, where, value):
        tensors = [t.detach().abs() + 0.1 for t in operands(M=8, N=20, K=12, R=5)]
        tensors[where].view(-1)[3] = value
        with use_backend(backend):
            ours = lora_linear(*tensors[:4], 0.5, tensors[4])
        eager = reference(*tensors[:4], 0.5, tensors[4])
        assert torch.equal(ours.isnan(), eager.isnan())
        assert torch.equal(ours.isinf(), eager.isinf())
        torch.testing.assert_close(ours, eager, equal_nan=True)

    @pytest.mark.parametrize("alpha", [0.0, -0.0, float("nan")])
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_zero_scale_does_not_hide_a_broken_adapter(self, backend, alpha, value):
        x, weight, A, B, bias = (t.detach() for t in operands())
        A[2, 1] = value
        with use_backend(backend):
            ours = lora_linear(x, weight, A, B, alpha, bias)
        assert torch.equal(ours.isnan(), reference(x, weight, A, B, alpha, bias).isnan())
        assert ours.isnan().all()

    def test_every_output_element_is_written(self, backend):
        """With deterministic fill, memory that nobody wrote would be NaN."""
        torch.use_deterministic_algorithms(True)
        try:
            for M, N, K, R in itertools.product((1, 17, 33), (1, 31, 65), (5, 64), (1, 12)):
                tensors = operands(M, N, K, R)
                with use_backend(backend):
                    y = lora_linear(*tensors[:4], 1.0, tensors[4])
                    y.sum().backward()
                assert all(torch.isfinite(t).all() for t in (y, *(t.grad for t in tensors)))
        finally:
            torch.use_deterministic_algorithms(False)

    def test_equal_calls_give_equal_bits(self, backend):
        tensors = operands(65, 100, 130, 12)
        with use_backend(backend):
            assert_bits(
                *(with_gradients(lambda *t: lora_linear(*t[:4], 0.5, t[4]), tensors) for _ in "ab")
            )

    def test_offsets_pass_two_to_the_31(self, backend):
        """Rows 2³⁰ elements apart in a buffer that is mostly never touched."""
        stride = 2**30
        storage = torch.empty(2 * stride + 8, dtype=torch.float16)
        x = storage.as_strided((3, 8), (stride, 1))
        x.copy_(torch.randn(3, 8))
        weight, A, B = torch.randn(5, 8).half(), torch.randn(8, 2).half(), torch.randn(2, 5).half()
        with use_backend(backend):
            far = lora_linear(x, weight, A, B, 1.0)
            near = lora_linear(x.contiguous(), weight, A, B, 1.0)
        torch.testing.assert_close(far, near)


class TestAlpha:
    def test_a_tensor_is_read_when_the_product_is_computed(self):
        x, weight, A, B, _ = (t.detach() for t in operands())
        alpha = torch.tensor(0.5)
        first = lora_linear(x, weight, A, B, alpha)
        alpha.fill_(2.0)
        second = lora_linear(x, weight, A, B, alpha)
        torch.testing.assert_close(first, reference(x, weight, A, B, 0.5))
        torch.testing.assert_close(second, reference(x, weight, A, B, 2.0))

    @pytest.mark.parametrize(
        "alpha",
        [
            3,
            0.25,
            torch.tensor(0.25),
            torch.tensor(0.25).double(),
            torch.tensor(3),
            np.float32(0.25),
            np.int64(3),
        ],
        ids=repr,
    )
    def test_numbers_and_tensors(self, alpha):
        compare(operands(), alpha=alpha)

    @pytest.mark.parametrize("traced", [False, True])
    @pytest.mark.parametrize(
        "alpha",
        [10**30, -(10**300), Fraction(10**300, 7), np.float64(1e300), np.longdouble(1e39)],
        ids=["int", "negative", "fraction", "numpy", "long double"],
    )
    def test_numbers_past_float32(self, alpha, traced):
        """Right in float64, no finite result in float32; traced code does the same."""
        tensors = [t.detach() for t in operands(dtype=torch.float64)]
        tensors[1].zero_()
        mode = FlopCounterMode(display=False) if traced else nullcontext()
        with mode:
            y = lora_linear(*tensors[:4], alpha)
            narrow = lora_linear(*(t.float() for t in tensors[:4]), alpha)
        torch.testing.assert_close(y, reference(*tensors[:4], float(alpha)))
        assert narrow.isfinite().all() == (abs(alpha) < 1e38)

    @pytest.mark.parametrize(
        "alpha, text",
        [(10**400, "2^1328"), (-(10**5000), "-2^16609"), (Fraction(10**400), "2^1328")],
        ids=["int", "negative", "fraction"],
    )
    def test_numbers_past_float64_are_refused(self, alpha, text):
        for call in (lora_linear, explain):
            with pytest.raises(ValueError, match=r"alpha must be within float64's range") as caught:
                call(*operands()[:4], alpha)
            assert str(caught.value).endswith(f"got about {text}")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_a_layer_of_a_large_whole_alpha(self, dtype):
        layer = LinearWithLoRA(torch.nn.Linear(6, 5), 2, 10**30).to(dtype)
        torch.nn.init.ones_(layer.lora.B)
        x = torch.randn(3, 6, dtype=dtype)
        torch.testing.assert_close(layer(x), layer.linear(x) + layer.lora(x))
        layer.lora.alpha = 10**31
        assert layer.lora.scale_tensor == torch.tensor(1e31, dtype=dtype)
        with pytest.raises(ValueError, match=r"finite in float32, got about 2\^16609"):
            layer.lora.alpha = 10**5000


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": [[1.0]]}, TypeError, "x must be a Tensor"),
        ({"x": torch.randn(2, 5)}, ValueError, "x must be [..., K] with K = 6"),
        ({"x": torch.tensor(1.0)}, ValueError, "x must be [..., K] with K = 6 as in weight, got []"),
        ({"x": torch.ones(2, 6).long()}, TypeError, "x must be float32, bfloat16, float16 or float64, got torch.int64"),
        ({"weight": torch.randn(6)}, ValueError, "weight must be [N, K], 2-D, got [6]"),
        ({"weight": torch.randn(7, 6).bfloat16()}, TypeError,
         "weight must have x's dtype, torch.float32, got torch.bfloat16"),
        ({"weight": torch.randn(7, 6, device="meta")}, ValueError, "weight must be on x's device, cpu, got meta"),
        ({"alpha": torch.tensor(0.5, device="meta")}, ValueError, "alpha must be on x's device, cpu, got meta"),
        ({"A": torch.randn(3, 6)}, ValueError, "A must be [K, R] with K = 6"),
        ({"B": torch.randn(7, 3)}, ValueError, "B must be [R, N] = [3, 7], got [7, 3]"),
        ({"B": torch.randn(3, 7).half()}, TypeError, "B must have A's dtype, torch.float32, got torch.float16"),
        ({"bias": torch.randn(1, 7)}, ValueError, "bias must be [N] = [7], got [1, 7]"),
        ({"alpha": torch.ones(1)}, ValueError, "alpha must be a number or a 0-d tensor, got [1]"),
        ({"alpha": "16"}, TypeError, "alpha must be a number or a 0-d tensor, got str"),
        ({"alpha": torch.tensor(1.0, requires_grad=True)}, ValueError, "alpha must not require grad"),
        ({"alpha": torch.tensor(True)}, TypeError, "alpha must be real, got a tensor of torch.bool"),
        ({"alpha": torch.tensor(1j)}, TypeError, "alpha must be real, got a tensor of torch.complex64"),
        ({"alpha": True}, TypeError, "alpha must be a number or a 0-d tensor, got bool"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p must be in [0, 1), got 1.0"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p must be in [0, 1), got -0.1"),
        ({"dropout_p": "0.1"}, TypeError, "dropout_p must be a number in [0, 1), got str"),
        ({"dropout_p": torch.ones(2)}, TypeError, "dropout_p must be a number in [0, 1), got Tensor"),
        ({"dropout_p": 0.5, "seed": 1.0}, TypeError, "seed must be an integer or a 0-d int64 tensor, got float"),
        ({"seed": "1"}, TypeError, "seed must be an integer or a 0-d int64 tensor, got str"),
        ({"dropout_p": 0.5, "seed": 2**63}, ValueError, "seed must be in [-2^63, 2^63), got 9223372036854775808"),
        ({"dropout_p": 0.5, "seed": -(2**63) - 1}, ValueError, "seed must be in [-2^63, 2^63), got -9223372036854775809"),
        ({"dropout_p": 0.5, "seed": torch.tensor([1])}, ValueError, "seed must be 0-d int64"),
        ({"backend": "cublas"}, ValueError,
         "backend must be one of ('auto', 'cuda', 'triton', 'cpu', 'eager'), got 'cublas'"),
    ],
)  # fmt: skip
def test_bad_operands_are_named(change, error, message):
    x, weight, A, B, bias = operands()
    good = {"x": x, "weight": weight, "A": A, "B": B, "alpha": 1.0, "bias": bias}
    calls = [lora_linear] if "seed" in change else [lora_linear, explain]
    for call in calls:
        with pytest.raises(error, match=re.escape(message)):
            call(**{**good, **change})


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", ["strided", "jagged", "uninitialized"])
@pytest.mark.parametrize("name", [*NAMES, "magnitude", "alpha", "seed"])
def test_a_tensor_without_a_shape_is_named(name, kind):
    x, weight, A, B, bias = operands()
    good = {"x": x, "weight": weight, "A": A, "B": B, "alpha": 1.0, "bias": bias, "dropout_p": 0.5}
    rule = {"alpha": "a number or a 0-d tensor", "seed": "an integer or a 0-d int64 tensor"}
    if kind == "uninitialized":
        shapeless, got = nn.parameter.UninitializedParameter(), "an UninitializedParameter"
    else:
        layout = getattr(torch, kind)
        shapeless, got = torch.nested.nested_tensor([torch.ones(2, 5)], layout=layout), "a nested"
    with pytest.raises(
        TypeError, match=f"^{name} must be {rule.get(name, 'a dense tensor')}, got {got}"
    ):
        lora_linear(**{**good, name: shapeless})


@pytest.mark.parametrize("call", [lora_linear, explain])
def test_autocast_does_not_cast_float64(call):
    x, weight, A, B, _ = operands()
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(TypeError, match=r"weight must have x's dtype, torch\.float64"),
    ):
        call(x.double(), weight, A, B, 1.0)


def test_explain_says_who_computes_and_why_not_the_others():
    tensors = operands()
    text = str(explain(*tensors[:4], 1.0, tensors[4], backend="eager"))
    assert "M=9 N=7 K=6 R=3 float32 on cpu" in text and "eager: chosen" in text
    told = explain(Problem(9, 7, 6, 3, "float32", "float32"))
    assert {told.backend, *told.rejected} == {"eager", "cpu", "cuda", "triton"}
    assert all(told.rejected.values())
    with pytest.raises(ValueError, match="B must be"):
        explain(*tensors[:3], tensors[3].t(), 1.0)


def test_operands_that_nobody_trains_make_no_graph():
    x, weight, A, B, bias = (t.detach() for t in operands())
    assert not lora_linear(x, weight, A, B, 1.0, bias).requires_grad
    with torch.no_grad():
        assert not lora_linear(*operands()[:4], 1.0).requires_grad
    with torch.inference_mode():
        assert lora_linear(*operands()[:4], 1.0).is_inference()


def test_meta_tensors_have_shapes_and_no_values():
    tensors = [t.to("meta") for t in operands(lead=(2, 3))]
    y = lora_linear(*tensors[:4], 1.0, tensors[4])
    assert y.shape == (2, 3, 7) and y.is_meta


def test_fake_tensors_have_shapes_strides_and_a_backward(backend):
    with FakeTensorMode(), use_backend(backend):
        tensors = operands(lead=(2, 3), dtype=torch.bfloat16, adapter_dtype=torch.float32)
        y = lora_linear(*tensors[:4], 1.0, tensors[4], dropout_p=0.1)
        y.sum().backward()
    assert y.shape == (2, 3, 7) and y.dtype == torch.bfloat16 and y.is_contiguous()
    assert [(t.grad.shape, t.grad.dtype) for t in tensors] == [(t.shape, t.dtype) for t in tensors]


def test_autocast_is_off_within_a_call():
    """The half operands are rounded once: float32 adapters and sums stay as they are."""
    x, weight, A, B, bias = (t.detach() for t in operands(M=17, N=20, K=48, R=4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = lora_linear(x, weight, A, B, 0.5, bias, backend="eager")
    x, weight, bias = (t.bfloat16() for t in (x, weight, bias))
    assert torch.equal(y, lora_linear(x, weight, A, B, 0.5, bias, backend="eager"))
