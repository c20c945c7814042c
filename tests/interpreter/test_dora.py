"""DoRA over the Triton backend: its products, the scale and the norms around them."""

from __future__ import annotations

import functools

import pytest
import torch

from lora_kernels import explain, formulas, lora_linear
from lora_kernels.operands import Adapter
from tests.interpreter import strict
from tests.interpreter.conftest import VARIANTS
from tests.oracle import assert_gradients, gradients
from tests.test_dora import NAMES, norms_of, operands, reference


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_every_gradient(variant, dtype, triton_products):
    triton_products(variant)
    given = dict(zip(NAMES, operands(9, 38, 44, 6, dtype), strict=True))
    dy = torch.randn(9, 38, generator=torch.Generator().manual_seed(7)).to(dtype)
    with strict.recording() as launches:
        actual = gradients(functools.partial(lora_linear, alpha=0.7, backend="triton"), given, dy)
    assert launches
    assert_gradients(actual, functools.partial(reference, alpha=0.7), given, dy)
    told = str(explain(**given, alpha=0.7, backend="triton"))
    assert "DoRA's scale in the same product" in told


def test_norms(triton_products):
    products = triton_products(next(iter(VARIANTS)))
    _, weight, A, B, *_ = (t.detach() for t in operands(1, 50, 70, 5))
    norms = formulas.row_norms(products, weight, Adapter(A, B, 1.5))
    exact = norms_of(weight.double(), A.double(), B.double(), 1.5)
    torch.testing.assert_close(norms.double(), exact, rtol=1e-5, atol=0)
