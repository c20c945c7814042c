"""The backend that autograd, vmap and forward-mode AD see through: plain differentiable ATen, nothing in place.

It serves derivatives of derivatives and function transforms, where being transparent matters and speed does not. It is
not for users to choose: `formulas` over it are the definition of what the other backends compute.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels.backends.base import Backend, Scale
from lora_kernels.dropout import Dropout, scaled_mask
from lora_kernels.problem import Problem


class CompositeBackend(Backend):
    """The products as one would write them, in float32 for half operands."""

    name = "composite"

    def unavailable(self) -> str | None:
        return None

    def declines(self, problem: Problem) -> str | None:
        return None

    def shrink(self, x: Tensor, a: Tensor, alpha: Scale, dropout: Dropout | None = None) -> Tensor:
        return alpha * (_masked(_widened(x), dropout) @ _widened(a))

    def expand(
        self,
        x: Tensor,
        w: Tensor,
        a: Tensor,
        b: Tensor,
        alpha: Scale,
        bias: Tensor | None = None,
        *,
        s: Tensor | None = None,
        dropout_in: Dropout | None = None,
        dropout_out: Dropout | None = None,
    ) -> tuple[Tensor, Tensor]:
        if s is None:
            s = self.shrink(x, a, alpha, dropout_in)
        tail = _masked(s @ _widened(b), dropout_out)
        y = x @ w + tail.to(x.dtype)
        return (y if bias is None else y + bias), s

    def wgrad(
        self, left: Tensor, right: Tensor, dtype: torch.dtype, dropout: Dropout | None = None
    ) -> Tensor:
        return (_masked(_widened(left), dropout).t() @ _widened(right)).to(dtype)


def _widened(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def _masked(t: Tensor, dropout: Dropout | None) -> Tensor:
    return t if dropout is None else t * scaled_mask(dropout, t.shape[0], t.shape[1], t.dtype)


BACKEND = CompositeBackend()
