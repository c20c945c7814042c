"""The oracle itself: it accepts eager's own rounding and notices every way a kernel is usually wrong."""

from __future__ import annotations

import pytest
import torch

from lora_kernels.backends.eager import EagerProducts
from tests.oracle import Case, assert_budget, check_function, check_products, reference

CASE = Case(33, 65, 47, 12, dtype=torch.bfloat16, layout="linear")
DROPOUT = Case(31, 37, 42, 5, dropout=0.3)


class _Wrong(EagerProducts):
    """The eager products with one of them changed."""

    def __init__(self, product, change):
        self._product, self._change = product, change

    def __getattribute__(self, name):
        value = super().__getattribute__(name)
        if name.startswith("_") or name != self._product:
            return value
        return lambda *args, **kwargs: self._change(value, *args, **kwargs)


def _no_scale(shrink, x, adapter):
    return shrink(x, adapter._replace(scale=1.0))


def _no_mask(shrink, x, adapter):
    return shrink(x, adapter._replace(dropout_in=None))


def _unmasked_tail(expand, x, w, s, adapter, bias=None):
    return expand(x, w, s, adapter._replace(dropout_out=None), bias)


def _last_column_lost(expand, *args):
    y = expand(*args)
    y[:, -1] = float("nan")
    return y


def _one_row_off(expand, *args):
    return expand(*args).roll(1, 0)


def _rounded_s(shrink, *args):
    return shrink(*args).to(torch.bfloat16).float()


def _swapped(outer, left, right, dtype, dropout=None):
    return outer(left, right.flip(0), dtype, dropout)


@pytest.mark.parametrize(
    "product, change, case",
    [
        ("shrink", _no_scale, CASE),
        ("shrink", _no_mask, DROPOUT),
        ("expand", _unmasked_tail, DROPOUT),
        ("expand", _last_column_lost, CASE),
        ("expand", _one_row_off, CASE),
        ("shrink", _rounded_s, Case(33, 65, 47, 12)),
        ("wgrad", _swapped, CASE),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_wrong_product_is_noticed(product, change, case):
    with pytest.raises(AssertionError):
        check_products(_Wrong(product, change), case)


def test_results_that_change_from_call_to_call_are_noticed():
    calls = []

    def unsteady(product, *args):
        calls.append(1)
        return product(*args) * (1 + 2**-24 * len(calls))

    with pytest.raises(AssertionError):
        check_products(_Wrong("expand", unsteady), Case(16, 64, 32, 16))


def test_budget_accepts_eager_and_refuses_three_times_its_error():
    o = CASE.operands()
    args = (o.x, o.w.t(), o.a, o.b, CASE.alpha, o.bias)
    eager = reference(*args)
    exact = reference(*(a.double() if isinstance(a, torch.Tensor) else a for a in args))
    assert_budget(eager, eager, exact)
    worse = exact + 3 * (eager.double() - exact) + 0.05 * exact.sign()
    with pytest.raises(AssertionError, match="off by"):
        assert_budget(worse.to(eager.dtype), eager, exact)


@pytest.mark.parametrize("wrong", range(3), ids=["y", "gradient of x", "gradient of A"])
def test_a_wrong_result_or_gradient_of_a_function_is_noticed(wrong):
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, A):
            ctx.save_for_backward(x, A)
            return x @ A * (1.01 if wrong == 0 else 1.0)

        @staticmethod
        def backward(ctx, dy):
            x, A = ctx.saved_tensors
            factors = (1.01 if wrong == place else 1.0 for place in (1, 2))
            return dy @ A.t() * next(factors), x.t() @ dy * next(factors)

    x, A = torch.randn(4, 3, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    check_function(torch.matmul, torch.matmul, (x, A))
    with pytest.raises(AssertionError, match=("y", "operand 0", "operand 1")[wrong]):
        check_function(Scaled.apply, torch.matmul, (x, A))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_budget_compares_nan_and_infinity_by_position(value):
    exact = torch.ones(4, 4, dtype=torch.float64)
    wrong = torch.ones(4, 4)
    wrong[2, 3] = value
    with pytest.raises(AssertionError, match=r"\[2, 3\]"):
        assert_budget(wrong, torch.ones(4, 4), exact)
    with pytest.raises(AssertionError, match=r"\[2, 3\]"):
        assert_budget(torch.ones(4, 4), wrong, wrong.double())
