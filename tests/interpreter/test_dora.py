"""DoRA over the Triton backend: its products, the scale and the norms around them."""

from __future__ import annotations

import pytest
import torch

from lora_kernels import explain, formulas, lora_linear
from lora_kernels.operands import Adapter
from tests.interpreter import strict
from tests.interpreter.conftest import VARIANTS
from tests.oracle import assert_budget
from tests.test_dora import NAMES, norms_of, operands, reference


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_every_gradient(variant, dtype, triton_products):
    triton_products(variant)
    tensors = operands(9, 38, 44, 6, dtype)
    dy = torch.randn(9, 38, generator=torch.Generator().manual_seed(7)).to(dtype)

    def ours(*t):
        return lora_linear(*t[:4], 0.7, t[4], magnitude=t[5], backend="triton")

    def run(function, dtype=None):
        leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
        y = function(*leaves)
        return [y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))]

    def plain(*t):
        return reference(*t[:4], 0.7, *t[4:])

    with strict.recording() as launches:
        actual = run(ours)
    assert launches
    for name, *triple in zip(
        ("y", *NAMES), actual, run(plain), run(plain, torch.float64), strict=True
    ):
        assert_budget(*triple, what=name)
    told = str(explain(*tensors[:4], 0.7, tensors[4], magnitude=tensors[5], backend="triton"))
    assert "DoRA's scale in the same product" in told


def test_norms(triton_products):
    products = triton_products(next(iter(VARIANTS)))
    _, weight, A, B, *_ = (t.detach() for t in operands(1, 50, 70, 5))
    norms = formulas.row_norms(products, weight, Adapter(A, B, 1.5))
    exact = norms_of(weight.double(), A.double(), B.double(), 1.5)
    torch.testing.assert_close(norms.double(), exact, rtol=1e-5, atol=0)
