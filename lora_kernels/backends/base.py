"""What a backend must compute: three products, out of which forward and backward are made (see `formulas`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from lora_kernels.dropout import Dropout
from lora_kernels.problem import Problem

Scale = (
    float | Tensor
)  # a number, or a 0-d tensor on the operands' device or the CPU, read when the product is computed


def accumulated(dtype: torch.dtype) -> torch.dtype:
    """The type that sums of `dtype` run in, and that skinny results and alpha have: float32, or float64 for itself."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def left_is_wide(left: Tensor, right: Tensor, dropout: Dropout | None = None) -> bool:
    """Which operand of `wgrad` has the base's width: a masked left, the one that is no float32, or the wider."""
    return dropout is not None or (
        right.dtype == torch.float32
        and (left.dtype != torch.float32 or left.shape[1] >= right.shape[1])
    )


class Backend(ABC):
    """Products on 2-D operands of any strides. Sizes may be zero. Results are new, contiguous tensors, fully written.

    x and w share one dtype; a and b share one dtype: x's, or float32 when x is bfloat16 or float16. Accumulation is at
    least float32; the skinny results s and q are float32 (float64 for float64 operands). Equal input gives equal bits.
    """

    name: str
    # (x, weight, A, B, bias, alpha, dropout) -> y with derivatives, where the backend has the layer as one operator: for
    # a frozen weight and bias, A and B both trained or both not, alpha a number.
    whole_layer: Callable[..., Tensor] | None = None

    @abstractmethod
    def unavailable(self) -> str | None:
        """Why this backend cannot run on this machine at all, or None."""

    @abstractmethod
    def declines(self, problem: Problem) -> str | None:
        """Why it cannot compute `problem`, or None."""

    def slower(self, problem: Problem, usable: tuple[str, ...] = ()) -> str | None:
        """Why another is expected to be faster for `problem`: plain ATen, or one of the `usable` backends. None if none is.

        Heeded only when the backend is not forced.
        """
        return None

    def plan(self, problem: Problem) -> str:
        """How it would compute `problem`, in a few words for `explain`; "" where there is one way only."""
        return ""

    @abstractmethod
    def shrink(self, x: Tensor, a: Tensor, alpha: Scale, dropout: Dropout | None = None) -> Tensor:
        """s = alpha·(mask∘x)·a: x [M, K], a [K, R] -> s [M, R] float32; `dropout` masks and rescales x [M, K]."""

    @abstractmethod
    def expand(
        self,
        x: Tensor,  # [M, K]
        w: Tensor,  # [K, N]
        a: Tensor,  # [K, R]
        b: Tensor,  # [R, N]
        alpha: Scale,
        bias: Tensor | None = None,  # [N]
        *,
        s: Tensor
        | None = None,  # [M, R] float32: given, it is used instead of being computed from x and a
        dropout_in: Dropout | None = None,  # masks x in s
        dropout_out: Dropout | None = None,  # masks s·b, an [M, N] product
    ) -> tuple[Tensor, Tensor]:
        """y = x·w + bias + mask_out∘(s·b), s = alpha·(mask_in∘x)·a -> (y [M, N] in x's dtype, s [M, R] float32)."""

    @abstractmethod
    def wgrad(
        self, left: Tensor, right: Tensor, dtype: torch.dtype, dropout: Dropout | None = None
    ) -> Tensor:
        """(mask∘left)ᵀ·right: left [M, C], right [M, D] -> [C, D] in `dtype`; one of C, D is a rank, of float32 operands.

        The other operand has the base's dtype. `dropout` masks left. Sums run in an order that sizes alone decide.
        """

    def shrink_wgrad(
        self, dy: Tensor, b_t: Tensor, alpha: Scale, s: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """q = alpha·dy·b_t and dB = sᵀ·dy: dy [M, N], b_t [N, R], s [M, R] -> (q [M, R] float32, dB [R, N] in `dtype`).

        A backend that can computes both from one reading of dy.
        """
        return self.shrink(dy, b_t, alpha), self.wgrad(s, dy, dtype)
