"""The backend of plain ATen calls: they run on every device, in place where possible, without a full-width float32 copy.

y = s·b + bias is written first and the base product is accumulated onto it by one `addmm` with beta = 1, so that y is
written by a small product and read back inside the large one's epilogue. Where ATen cannot multiply a float32 by a half
operand, blocks of rows small enough for a cache are converted, one after another.

Over groups of rows these are the products of each group, on a CPU, where the host may read the offsets. Elsewhere they are
the composite's batched ones.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from lora_kernels.backends.base import Backend, Candidate, Products, row_blocks
from lora_kernels.backends.composite import GroupedCompositeProducts
from lora_kernels.dropout import Dropout, masked
from lora_kernels.operands import Adapter, Groups, Weight, accumulated, bounds_of
from lora_kernels.problem import Problem
from lora_kernels.tuning.tables import times_of
from lora_kernels.tuning.targets import Target


class EagerProducts(Products):
    """Products by `torch.mm` and `addmm_`; float16 and bfloat16 accumulate in float32, as their operands allow."""

    def shrink(self, x: Tensor, adapter: Adapter) -> Tensor:
        a, scale, dropout = adapter.A, adapter.scale, adapter.dropout_in
        sums = accumulated(x.dtype)
        if dropout is None and x.dtype == a.dtype != sums and _sums_in_float32(x):
            return torch.mm(x, a, out_dtype=sums).mul_(scale)
        a = a.to(sums)
        if dropout is None and x.dtype == sums:
            return torch.mm(x, a).mul_(scale)
        s = x.new_empty((x.shape[0], a.shape[1]), dtype=sums)
        for rows in row_blocks(x):
            torch.mm(masked(x[rows].to(sums), _from_row(dropout, rows)), a, out=s[rows])
        return s.mul_(scale)

    def expand(
        self, x: Tensor, w: Weight, s: Tensor, adapter: Adapter, bias: Tensor | None = None
    ) -> Tensor:
        assert isinstance(w, Tensor)  # the plan gives these products dense weights
        y = x.new_empty((x.shape[0], w.shape[1]))
        self._tail(s, adapter, bias, y)
        return y.addmm_(x, w)

    def _tail(self, s: Tensor, adapter: Adapter, bias: Tensor | None, y: Tensor) -> None:
        """y = mask_out∘(s·B) + bias."""
        b, dropout = adapter.B, adapter.dropout_out
        # On a GPU a half product of s and b is many times faster than a float32 one, at eager's own precision.
        tail_dtype = y.dtype if y.is_cuda and b.dtype == y.dtype else accumulated(y.dtype)
        b = b.to(tail_dtype)
        if dropout is None and y.dtype == tail_dtype:
            s = s.to(tail_dtype)
            if bias is None:
                torch.mm(s, b, out=y)
            else:
                torch.addmm(bias, s, b, out=y)
        else:
            for rows in row_blocks(y):
                tail = masked(torch.mm(s[rows].to(tail_dtype), b), _from_row(dropout, rows))
                y[rows] = tail if bias is None else tail.add_(bias)

    def wgrad(
        self, left: Tensor, right: Tensor, dtype: torch.dtype, dropout: Dropout | None = None
    ) -> Tensor:
        narrow = min(left.dtype, right.dtype, key=lambda each: each.itemsize)
        if left.is_cuda and dropout is None and dtype == narrow:
            return left.to(dtype).t() @ right.to(dtype)  # accumulates in float32
        sums = accumulated(left.dtype)
        total = left.new_zeros((left.shape[1], right.shape[1]), dtype=sums)
        if dropout is None and left.dtype == right.dtype == sums:
            return total.addmm_(left.t(), right).to(dtype)
        for rows in row_blocks(left if left.shape[1] >= right.shape[1] else right):
            block = masked(left[rows].to(sums), _from_row(dropout, rows))
            total.addmm_(block.t(), right[rows].to(sums))
        return total.to(dtype)

    def grouped(self, groups: Groups) -> Products:
        if groups.offsets.device.type != "cpu":
            return GroupedCompositeProducts(groups)
        return GroupedEagerProducts(groups)


class GroupedEagerProducts(Products):
    """`EagerProducts` of one group after another."""

    def __init__(self, groups: Groups) -> None:
        self.groups = groups
        self._slices: list[tuple[int, slice]] | None = None

    def slices(self, t: Tensor) -> list[tuple[int, slice]]:
        """(g, its rows) of every group that has rows of t [T, ...]."""
        if self._slices is None:
            pairs = enumerate(pairwise(bounds_of(self.groups.offsets, t.shape[0])))
            self._slices = [(g, slice(a, b)) for g, (a, b) in pairs if a < b]
        return self._slices

    def shrink(self, x: Tensor, adapter: Adapter) -> Tensor:
        s = x.new_empty((x.shape[0], adapter.A.shape[2]), dtype=accumulated(x.dtype))
        for g, rows in self.slices(x):
            s[rows] = PRODUCTS.shrink(x[rows], _of_group(adapter, g, rows))
        return s

    def expand(
        self, x: Tensor, w: Weight, s: Tensor, adapter: Adapter, bias: Tensor | None = None
    ) -> Tensor:
        assert isinstance(w, Tensor)
        y = x.new_empty((x.shape[0], w.shape[-1]))
        for g, rows in self.slices(x):
            bias_g = bias[g] if bias is not None and self.groups.own_bias else bias
            PRODUCTS._tail(s[rows], _of_group(adapter, g, rows), bias_g, y[rows])
            if self.groups.own_weight:
                y[rows].addmm_(x[rows], w[g])
        return y if self.groups.own_weight else y.addmm_(x, w)

    def wgrad(
        self, left: Tensor, right: Tensor, dtype: torch.dtype, dropout: Dropout | None = None
    ) -> Tensor:
        total = left.new_zeros((self.groups.count, left.shape[1], right.shape[1]), dtype=dtype)
        for g, rows in self.slices(left):
            total[g] = PRODUCTS.wgrad(left[rows], right[rows], dtype, _from_row(dropout, rows))
        return total

    def weight_grad(self, dy: Tensor, x: Tensor) -> Tensor:
        if not self.groups.own_weight:
            return super().weight_grad(dy, x)
        total = x.new_zeros((self.groups.count, dy.shape[1], x.shape[1]))
        for g, rows in self.slices(x):
            torch.mm(dy[rows].t(), x[rows], out=total[g])
        return total

    def bias_grad(self, dy: Tensor) -> Tensor:
        if not self.groups.own_bias:
            return super().bias_grad(dy)
        total = dy.new_zeros((self.groups.count, dy.shape[1]))
        for g, rows in self.slices(dy):
            torch.sum(dy[rows], 0, out=total[g])
        return total


def _of_group(adapter: Adapter, g: int, rows: slice) -> Adapter:
    """The adapter of group g, whose rows these are; an A or B that was not saved stays None."""
    A, B = (t if t is None else t[g] for t in (adapter.A, adapter.B))
    scale = adapter.scale
    scale = scale[g] if isinstance(scale, Tensor) and scale.ndim else scale
    masks = (_from_row(mask, rows) for mask in (adapter.dropout_in, adapter.dropout_out))
    return Adapter(A, B, scale, *masks)  # type: ignore[arg-type]


def _from_row(dropout: Dropout | None, rows: slice) -> Dropout | None:
    """The mask of these rows."""
    return None if dropout is None else dropout._replace(row=dropout.row + rows.start)


class EagerBackend(Backend):
    """Plain ATen on every device, for every problem."""

    name = "eager"
    groups = True

    def unavailable(self) -> str | None:
        return None

    def candidates(self, problem: Problem, target: Target | None) -> list[Candidate]:
        times = (None, None) if target is None else times_of("eager", problem, target)
        return [Candidate("eager", PRODUCTS, None, None, *times)]


def _sums_in_float32(x: Tensor) -> bool:
    """Whether ATen multiplies half matrices like x into a float32 one: on NVIDIA GPUs, unless float16 sums are allowed."""
    if not x.is_cuda or torch.version.hip is not None:
        return False
    return x.dtype != torch.float16 or not torch.backends.cuda.matmul.allow_fp16_accumulation


PRODUCTS = EagerProducts()
BACKEND = EagerBackend()
