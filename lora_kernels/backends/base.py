"""What a backend offers: candidates, each with the products of which a LoRA linear is made (see `formulas`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_kernels.dropout import Dropout
from lora_kernels.operands import Adapter, Groups, Scale, Weight
from lora_kernels.problem import DENSE, Problem
from lora_kernels.tuning.targets import Target


class Products(ABC):
    """Products on 2-D operands of any strides. Sizes may be zero. Results are new, contiguous tensors, fully written.

    x and w share one dtype; A and B share one dtype: x's, or float32 when x is bfloat16 or float16. Accumulation is at
    least float32; the skinny results s and q are float32 (float64 for float64 operands). Equal input gives equal bits.
    """

    reads_memory = False  # whether `formulas` must give it each operand `in_memory`
    # (x [..., K], weight [N, K], adapter, bias) -> y with derivatives, where the layer is one operator: for a frozen
    # weight and bias, A and B both trained or both not, a number as scale.
    layer: Callable[[Tensor, Tensor, Adapter, Tensor | None], Tensor] | None = None

    @abstractmethod
    def shrink(self, x: Tensor, adapter: Adapter) -> Tensor:
        """s = scale·(mask_in∘x)·A: x [M, K] -> s [M, R] float32."""

    @abstractmethod
    def expand(
        self, x: Tensor, w: Weight, s: Tensor, adapter: Adapter, bias: Tensor | None = None
    ) -> Tensor:
        """y = x·w + bias + mask_out∘(s·B): x [M, K], w [K, N], s [M, R] float32, bias [N] -> y [M, N] in x's dtype."""

    @abstractmethod
    def wgrad(
        self, left: Tensor, right: Tensor, dtype: torch.dtype, dropout: Dropout | None = None
    ) -> Tensor:
        """(mask∘left)ᵀ·right: left [M, C], right [M, D] -> [C, D] in `dtype`; one of C, D is a rank, of float32 operands.

        The other operand has the base's dtype. `dropout` masks left. Sums run in an order that sizes alone decide.
        """

    def shrink_expand(
        self, x: Tensor, w: Weight, adapter: Adapter, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(y, s) of `shrink` and `expand`, in one launch where the products have one."""
        s = self.shrink(x, adapter)
        return self.expand(x, w, s, adapter, bias), s

    def shrink_wgrad(
        self, dy: Tensor, adapter: Adapter, s: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """(q, dB) = (scale·dy·A, sᵀ·dy), from one reading of dy where the products have that.

        dy [M, N], s [M, R]; `adapter` is the transposed one, A [N, R] -> q [M, R] float32, dB [R, N] in `dtype`.
        """
        return self.shrink(dy, adapter), self.wgrad(s, dy, dtype)

    def scaled(self, s: Tensor, scale: Scale) -> Tensor:
        """scale·s: s [M, R]."""
        return scale * s

    def weight_grad(self, dy: Tensor, x: Tensor) -> Tensor:
        """dW = dyᵀ·x of a trained base: dy [M, N], x [M, K] -> [N, K]."""
        return dy.t() @ x

    def bias_grad(self, dy: Tensor) -> Tensor:
        """dbias, the sum of dy's rows: dy [M, N] -> [N]."""
        return dy.sum(0)

    def bound(self, groups: Groups | None) -> Products:
        """The products for a call's rows: `grouped`, or these where there are no groups."""
        return self if groups is None else self.grouped(groups)

    def grouped(self, groups: Groups) -> Products:
        """The same products, each group of rows by its own operands: see `Groups` for their shapes.

        w is [G, K, N], or [K, N] for all; bias [G, N] or [N]. Gradients are stacks over the groups, of zeros for one
        without rows: `wgrad` gives [G, C, D], `weight_grad` and `bias_grad` likewise unless the base is shared. A NaN or an
        infinity stays in its group. Offsets that break their rule raise ValueError or RuntimeError on a CPU; elsewhere
        results are unspecified, but nothing outside of the operands is read or written.
        """
        raise NotImplementedError(f"{type(self).__name__} has no products over groups")


@dataclass(frozen=True)
class Candidate:
    """One way to compute a problem, or the reason why it is not one.

    `name`: the algorithm. `refusal`: why it cannot compute the problem. `slower`: why another is expected to be faster,
    it counts only where no backend is named. `measured_us`, `predicted_us`: the time of the product, where it is known.
    `how`: in a few words for `explain`.
    """

    name: str
    products: Products | None = None
    refusal: str | None = None
    slower: str | None = None
    measured_us: float | None = None
    predicted_us: float | None = None
    how: str = ""


class Backend(ABC):
    """A family of kernels: where it runs, which weights it reads, and its candidates for a problem."""

    name: str
    devices: tuple[str, ...] = ()  # device types; empty for all
    formats: tuple[str, ...] = (DENSE,)  # of weights that its products read; see QuantizedWeight
    groups: bool = False  # whether its products have `grouped`
    needs_target: bool = (
        False  # whether its kernels are made for the GPU architectures of tuning/targets.py
    )

    @abstractmethod
    def unavailable(self) -> str | None:
        """Why this backend cannot run on this machine at all, or None."""

    @abstractmethod
    def candidates(self, problem: Problem, target: Target | None) -> list[Candidate]:
        """Every algorithm of this backend for `problem`, at least one; `target` is the GPU's, None on other devices."""


def fastest(candidates: Iterable[Candidate]) -> Candidate | None:
    """The one to take: the least measured time, else the least predicted one; None where all refuse.

    Where some times are measured, algorithms without a measured time do not count: `tune` leaves out what was wrong.
    A candidate that has no time at all goes before all others, unless it has a reason in `slower`.
    """
    able = [c for c in candidates if c.refusal is None]
    measured = any(c.measured_us is not None for c in able)

    def cost(candidate: Candidate) -> tuple[bool, float]:
        us = candidate.measured_us if measured else candidate.predicted_us
        unknown = candidate.measured_us is candidate.predicted_us is None
        return candidate.slower is not None, 0.0 if unknown else float("inf") if us is None else us

    return min(able, key=cost, default=None)


def left_is_wide(left: Tensor, right: Tensor, dropout: Dropout | None = None) -> bool:
    """Whether `wgrad`'s left has the base's width, else right has: left is masked, is no float32, or is the wider one."""
    return dropout is not None or (
        right.dtype == torch.float32
        and (left.dtype != torch.float32 or left.shape[1] >= right.shape[1])
    )
