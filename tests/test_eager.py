"""The two backends of plain PyTorch: every product on every awkward problem, and no full-width copies."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lora_kernels.backends import base
from lora_kernels.backends.base import left_is_wide
from lora_kernels.backends.composite import PRODUCTS as COMPOSITE
from lora_kernels.backends.eager import PRODUCTS as EAGER
from lora_kernels.dropout import Dropout
from tests.oracle import AWKWARD, FLOAT64, Case, check_products


@pytest.mark.parametrize("products", [EAGER, COMPOSITE], ids=["eager", "composite"])
@pytest.mark.parametrize("case", AWKWARD + FLOAT64, ids=str)
def test_products(case, products):
    check_products(products, case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_blocks_after_the_first(dtype, monkeypatch):
    """Each block of rows takes its own rows of the mask."""
    monkeypatch.setitem(base._BLOCK_BYTES, "cpu", 4 * 42 * 16)  # 16 rows of K = 42
    check_products(
        EAGER, Case(70, 37, 42, 5, dtype=dtype, adapter_dtype=torch.float32, dropout=0.3)
    )


@pytest.mark.parametrize(
    "left, right, masked, wide",
    [
        ((4, torch.float32), (8, torch.float32), True, True),  # a masked left, though narrower
        ((4, torch.float32), (8, torch.float32), False, False),
        ((8, torch.float32), (4, torch.float32), False, True),
        ((4, torch.float32), (4, torch.float32), False, True),
        ((4, torch.bfloat16), (8, torch.float32), False, True),  # the rank is the wider one
        ((8, torch.float32), (4, torch.bfloat16), False, False),
    ],
)
def test_which_operand_of_an_outer_product_has_the_bases_width(left, right, masked, wide):
    operands = [torch.empty(9, cols, dtype=dtype) for cols, dtype in (left, right)]
    dropout = Dropout(0.5, torch.tensor(1)) if masked else None
    assert left_is_wide(*operands, dropout) == wide


class _Largest(TorchDispatchMode):
    """The bytes of each new tensor that the operators inside return."""

    def __init__(self):
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = (*args, *(kwargs or {}).values())
        known = {t.untyped_storage().data_ptr() for t in given if isinstance(t, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in known:
            self.sizes.append(out.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_full_width_float32_copy(dtype, dropout):
    """Of x's or y's size there is y alone, once; converted or masked blocks and their masks stay below three mebibytes."""
    options = {"dtype": dtype, "adapter_dtype": torch.float32, "dropout": dropout}
    case = Case(2048, 1024, 1024, 8, bias=False, **options)
    o = case.operands()
    with _Largest() as made:
        _, s = EAGER.shrink_expand(o.x, o.w, o.adapter)
    y_bytes = case.M * case.N * dtype.itemsize
    wide = [size for size in made.sizes if size > 3 << 20]
    assert wide == [y_bytes], wide
    with _Largest() as made:
        EAGER.wgrad(o.x, s, torch.float32, o.adapter.dropout_in)
        EAGER.wgrad(s, o.dy, torch.float32)
    assert max(made.sizes) < 3 << 20
