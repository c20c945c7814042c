"""The layer that everybody writes, unfused: what ours is compared with in the demo, the benchmarks and the tests.

Same names, state-dict keys, initial values and order of random draws as `modules`; the forward is the formula, one
PyTorch operation after the other.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class LoRALayer(nn.Module):
    """alpha · (x·A·B) with A [in_dim, rank], B [rank, out_dim]."""

    def __init__(self, in_dim: int, out_dim: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(in_dim, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.B = nn.Parameter(torch.zeros(rank, out_dim))
        self.rank, self.alpha = rank, alpha

    def forward(self, x: Tensor) -> Tensor:
        return self.alpha * (x @ self.A @ self.B)


class LinearWithLoRA(nn.Module):
    """linear(x) + lora(x)."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.linear = linear
        self.lora = LoRALayer(linear.in_features, linear.out_features, rank, alpha)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.lora(x)


def replace_linear_with_lora(model: nn.Module, rank: int, alpha: float) -> None:
    """Wrap every Linear below `model`, in place."""
    for name, child in model.named_children():
        if isinstance(child, nn.Linear):
            setattr(model, name, LinearWithLoRA(child, rank, alpha))
        else:
            replace_linear_with_lora(child, rank, alpha)
