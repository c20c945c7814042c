"""A backend as somebody outside of this package would add it: this file, and one line of `backends.BACKENDS`."""

from __future__ import annotations

import torch

from lora_kernels.backends.base import Backend, Candidate, Products
from lora_kernels.dropout import masked
from lora_kernels.operands import accumulated


class ToyProducts(Products):
    """The three products that every backend must have. `calls` has the name of each that ran, and the type of w."""

    def __init__(self):
        self.calls = []

    def shrink(self, x, adapter):
        self.calls.append("shrink")
        wide = accumulated(x.dtype)
        return (masked(x.to(wide), adapter.dropout_in) @ adapter.A.to(wide)).mul_(adapter.scale)

    def expand(self, x, w, s, adapter, bias=None):
        self.calls.append(f"expand {type(w).__name__}")
        w = w if isinstance(w, torch.Tensor) else w.dense()
        y = (x @ w).to(s.dtype) + masked(s @ adapter.B.to(s.dtype), adapter.dropout_out)
        return (y if bias is None else y + bias).to(x.dtype)

    def wgrad(self, left, right, dtype, dropout=None):
        self.calls.append("wgrad")
        wide = accumulated(left.dtype)
        return (masked(left.to(wide), dropout).t() @ right.to(wide)).to(dtype)


class ToyBackend(Backend):
    """Computes up to `most_rows` rows on every CPU."""

    name = "toy"
    devices = ("cpu",)
    most_rows = 64

    def __init__(self):
        self.products = ToyProducts()

    def unavailable(self):
        return None

    def candidates(self, problem, target):
        refusal = None
        if self.most_rows < problem.M:
            refusal = f"it takes at most {self.most_rows} rows, got {problem.M}"
        return [Candidate("toy_product", self.products, refusal, how="one row after another")]


BACKEND = ToyBackend()
