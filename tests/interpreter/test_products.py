"""Every product of the Triton backend on every awkward problem, in each algorithm, against the oracle."""

from __future__ import annotations

import pytest
import torch

from tests.oracle import AWKWARD, Case, assert_budget, check_products


@pytest.mark.parametrize("case", AWKWARD, ids=str)
def test_all_products(case, triton_products):
    check_products(triton_products("two_kernel"), case)


@pytest.mark.parametrize("variant", ["tma", "one_launch", "one_pass", "decode"])
@pytest.mark.parametrize("case", AWKWARD, ids=str)
def test_both_directions(case, variant, triton_products):
    """The products in which the algorithms differ: y with s, and dx with q."""
    check_directions(triton_products(variant), case)


def check_directions(products, case: Case) -> None:
    o = case.operands()
    eager, exact = o.results(None), o.results(torch.float64)
    y, s = products.shrink_expand(o.x, o.w, o.adapter, o.bias)
    dx, q = products.shrink_expand(o.dy, o.w.t(), o.adapter.t())
    for name, actual in (("y", y), ("s", s), ("dx", dx), ("q", q)):
        dtype = torch.float32 if name in ("s", "q") else case.dtype
        assert_budget(actual, eager[name].to(dtype), exact[name], f"{name} of {case}")
