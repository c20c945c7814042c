"""The backend of plain ATen calls: they run on every device, in place where possible, without a full-width float32 copy.

y = s·b + bias is written first and the base product is accumulated onto it by one `addmm` with beta = 1, so that y is
written by a small product and read back inside the large one's epilogue. Where ATen cannot multiply a float32 by a half
operand, blocks of rows small enough for a cache are converted, one after another.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lora_kernels.backends.base import Backend, Candidate, Products, row_blocks
from lora_kernels.dropout import Dropout, scaled_mask
from lora_kernels.operands import Adapter, Weight, accumulated
from lora_kernels.problem import Problem
from lora_kernels.tuning.tables import times_of
from lora_kernels.tuning.targets import Target


class EagerProducts(Products):
    """Products by `torch.mm` and `addmm_`; float16 and bfloat16 accumulate in float32, as their operands allow."""

    def shrink(self, x: Tensor, adapter: Adapter) -> Tensor:
        a, scale, dropout = adapter.A, adapter.scale, adapter.dropout_in
        wide = accumulated(x.dtype)
        if x.is_cuda and dropout is None and x.dtype == a.dtype != wide:
            return torch.mm(x, a, out_dtype=wide).mul_(scale)
        s = x.new_empty((x.shape[0], a.shape[1]), dtype=wide)
        a = a.to(wide)
        for rows in _row_blocks(x, convert=dropout is not None or x.dtype != wide):
            torch.mm(_masked(x[rows].to(wide), dropout, rows), a, out=s[rows])
        return s.mul_(scale)

    def expand(
        self, x: Tensor, w: Weight, s: Tensor, adapter: Adapter, bias: Tensor | None = None
    ) -> Tensor:
        assert isinstance(w, Tensor)  # the plan gives these products dense weights
        b, dropout = adapter.B, adapter.dropout_out
        # On a GPU a half product of s and b is many times faster than a float32 one, at eager's own precision.
        tail_dtype = x.dtype if x.is_cuda and b.dtype == x.dtype else accumulated(x.dtype)
        y = x.new_empty((x.shape[0], w.shape[1]))
        b = b.to(tail_dtype)
        if dropout is None and x.dtype == tail_dtype:
            _product(s.to(tail_dtype), b, bias, out=y)
        else:
            for rows in _row_blocks(y, convert=True):
                tail = _masked(torch.mm(s[rows].to(tail_dtype), b), dropout, rows)
                y[rows] = tail if bias is None else tail.add_(bias)
        return y.addmm_(x, w)

    def wgrad(
        self, left: Tensor, right: Tensor, dtype: torch.dtype, dropout: Dropout | None = None
    ) -> Tensor:
        if left.is_cuda and dropout is None and dtype == min(left.dtype, right.dtype, key=_bits):
            return left.to(dtype).t() @ right.to(dtype)  # accumulates in float32
        wide = accumulated(left.dtype)
        total = left.new_zeros((left.shape[1], right.shape[1]), dtype=wide)
        convert = dropout is not None or left.dtype != wide or right.dtype != wide
        for rows in _row_blocks(left if left.shape[1] >= right.shape[1] else right, convert):
            total.addmm_(_masked(left[rows].to(wide), dropout, rows).t(), right[rows].to(wide))
        return total.to(dtype)


class EagerBackend(Backend):
    """Plain ATen on every device, for every problem."""

    name = "eager"

    def unavailable(self) -> str | None:
        return None

    def candidates(self, problem: Problem, target: Target | None) -> list[Candidate]:
        times = (None, None) if target is None else times_of("eager", problem, target)
        return [Candidate("eager", PRODUCTS, None, None, *times)]


def _product(s: Tensor, b: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = s·b + bias."""
    if bias is None:
        torch.mm(s, b, out=out)
    else:
        torch.addmm(bias, s, b, out=out)


def _bits(dtype: torch.dtype) -> int:
    return torch.finfo(dtype).bits


def _masked(block: Tensor, dropout: Dropout | None, rows: slice) -> Tensor:
    if dropout is None:
        return block
    height, width = block.shape
    return block * scaled_mask(dropout, height, width, block.dtype, row_start=rows.start)


def _row_blocks(t: Tensor, convert: bool) -> Iterable[slice]:
    """Slices of t's rows: all at once, or, when each block is converted, as many as a cache holds in float32."""
    if convert:
        return row_blocks(t)
    return (slice(0, len(t)),) if len(t) else ()


PRODUCTS = EagerProducts()
BACKEND = EagerBackend()
