"""Products that autograd, vmap and forward-mode AD can differentiate: plain ATen, nothing in place.

They serve derivatives of derivatives and function transforms, which need differentiable operators and not speed. No
backend offers them: `formulas` over them are the definition of what the backends compute.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels.backends.base import Products
from lora_kernels.dropout import Dropout, scaled_mask
from lora_kernels.operands import Adapter, Weight, accumulated


class CompositeProducts(Products):
    """The products in plain PyTorch, in float32 for half operands."""

    def shrink(self, x: Tensor, adapter: Adapter) -> Tensor:
        return adapter.scale * (_masked(_widened(x), adapter.dropout_in) @ _widened(adapter.A))

    def expand(
        self, x: Tensor, w: Weight, s: Tensor, adapter: Adapter, bias: Tensor | None = None
    ) -> Tensor:
        tail = _masked(s @ _widened(adapter.B), adapter.dropout_out)
        y = x @ (w if isinstance(w, Tensor) else w.dense()) + tail.to(x.dtype)
        return y if bias is None else y + bias

    def wgrad(
        self, left: Tensor, right: Tensor, dtype: torch.dtype, dropout: Dropout | None = None
    ) -> Tensor:
        return (_masked(_widened(left), dropout).t() @ _widened(right)).to(dtype)

    def scaled(
        self,
        x: Tensor,
        w: Weight,
        adapter: Adapter,
        bias: Tensor | None = None,
        *,
        keeps_z: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        z, s = self.shrink_expand(x, w, adapter, None)
        return with_column_scale(z, adapter.column_scale, bias), s, z  # type: ignore[arg-type]

    def scaled_gradient(
        self, dy: Tensor, c: Tensor, z: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        dc = None if z is None else (_widened(dy) * z).sum(0)
        return (dy * c).to(dy.dtype), dc

    def shrink_squares(self, w: Tensor, adapter: Adapter) -> tuple[Tensor, Tensor]:
        return self.shrink(w, adapter), _widened(w).square().sum(1)


def with_column_scale(z: Tensor, c: Tensor, bias: Tensor | None) -> Tensor:
    """c∘z + bias in z's dtype: computed in c's and rounded once."""
    y = z * c
    return (y if bias is None else y + bias).to(z.dtype)


def _widened(t: Tensor) -> Tensor:
    return t.to(accumulated(t.dtype))


def _masked(t: Tensor, dropout: Dropout | None) -> Tensor:
    return t if dropout is None else t * scaled_mask(dropout, t.shape[0], t.shape[1], t.dtype)


PRODUCTS = CompositeProducts()
