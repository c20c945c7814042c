"""`grouped_lora_linear` against a loop over the groups in float64: forward, every gradient, layouts, transforms, errors."""

from __future__ import annotations

import pytest
import torch

from lora_kernels import grouped_lora_linear
from tests.oracle import assert_budget

ROUTINGS = {
    "mixed": [0, 3, 3, 4, 11, 20],
    "first": [0, 9, 9, 9, 9, 9],
    "last": [0, 0, 0, 0, 0, 7],
    "ones": [0, 1, 2, 3, 4, 5],
    "no_rows": [0, 0, 0, 0, 0, 0],
}


def operands(offsets, dtype=torch.float32, *, K=13, N=9, R=5, shared=False, adapter_dtype=None):
    """(x, weight, A, B, bias), offsets and scale of as many groups as offsets say."""
    torch.manual_seed(0)
    G, T, own = len(offsets) - 1, offsets[-1], () if shared else (len(offsets) - 1,)
    shapes = ((T, K), (*own, N, K), (G, K, R), (G, R, N), (*own, N))
    dtypes = (dtype, dtype, adapter_dtype or dtype, adapter_dtype or dtype, dtype)
    tensors = tuple(
        torch.randn(shape).to(d).requires_grad_() for shape, d in zip(shapes, dtypes, strict=True)
    )
    return tensors, torch.tensor(offsets, dtype=torch.int32), torch.rand(G) + 0.5


def loop(tensors, offsets, scale, dtype=None):
    """The definition: one group after another, in the operands' dtypes or in `dtype`."""
    x, weight, A, B, bias = (t if t is None or dtype is None else t.to(dtype) for t in tensors)
    parts = []
    for g, (begin, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        rows, W = x[begin:end], weight[g] if weight.ndim == 3 else weight
        low = float(scale[g] if isinstance(scale, torch.Tensor) else scale) * (
            rows.to(A.dtype) @ A[g] @ B[g]
        )
        y = rows @ W.mT + low.to(x.dtype)
        parts.append(y if bias is None else y + (bias[g] if bias.ndim == 2 else bias))
    return torch.cat(parts)


@pytest.mark.parametrize("shared", [False, True], ids=["experts", "shared"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_forward_and_gradients_are_those_of_a_loop(routing, dtype, shared):
    tensors, offsets, scale = operands(ROUTINGS[routing], dtype, shared=shared)
    x, weight, A, B, bias = tensors
    y = grouped_lora_linear(x, weight, A, B, offsets, scale, bias)
    eager, exact = loop(tensors, offsets, scale), loop(tensors, offsets, scale, torch.float64)
    assert_budget(y, eager, exact, "y")
    dy = torch.randn_like(y)
    grads = (torch.autograd.grad(out, tensors, dy.to(out.dtype)) for out in (y, eager, exact))
    for name, ours, theirs, right in zip(("x", "W", "A", "B", "bias"), *grads, strict=True):
        assert_budget(ours, theirs, right.double(), f"d{name}")
