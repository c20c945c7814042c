"""Products that autograd, vmap and forward-mode AD can differentiate: plain ATen, nothing in place.

They serve derivatives of derivatives and function transforms, which need differentiable operators and not speed.
`formulas` over them are the definition of what the backends compute.

Over groups each group's rows are padded to blocks of equal height, so that a stack of blocks is one batched product, of
sizes that do not depend on where the groups begin: the host does not read the offsets.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels.backends.base import Products
from lora_kernels.dropout import Dropout, masked
from lora_kernels.operands import Adapter, Groups, Scale, Weight, accumulated


class CompositeProducts(Products):
    """The products in plain PyTorch, in float32 for half operands."""

    def shrink(self, x: Tensor, adapter: Adapter) -> Tensor:
        return adapter.scale * (
            masked(_accumulated(x), adapter.dropout_in) @ _accumulated(adapter.A)
        )

    def expand(
        self, x: Tensor, w: Weight, s: Tensor, adapter: Adapter, bias: Tensor | None = None
    ) -> Tensor:
        tail = masked(s @ _accumulated(adapter.B), adapter.dropout_out)
        y = x @ (w if isinstance(w, Tensor) else w.dense()) + tail.to(x.dtype)
        return y if bias is None else y + bias

    def wgrad(
        self, left: Tensor, right: Tensor, dtype: torch.dtype, dropout: Dropout | None = None
    ) -> Tensor:
        return (masked(_accumulated(left), dropout).t() @ _accumulated(right)).to(dtype)

    def scaled_gradient(
        self, dy: Tensor, c: Tensor, z: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        dc = None if z is None else (_accumulated(dy) * z).sum(0)
        return (dy * c).to(dy.dtype), dc

    def shrink_squares(self, w: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        return _accumulated(w) @ _accumulated(A), _accumulated(w).square().sum(1)

    def grouped(self, groups: Groups) -> Products:
        return GroupedCompositeProducts(groups)


class GroupedCompositeProducts(Products):
    """`CompositeProducts` over groups of rows."""

    def __init__(self, groups: Groups) -> None:
        self.groups = groups
        self._blocks: _Blocks | None = None

    def shrink(self, x: Tensor, adapter: Adapter) -> Tensor:
        s = self._product(masked(_accumulated(x), adapter.dropout_in), _accumulated(adapter.A))
        return self.scaled(s, adapter.scale)

    def expand(
        self, x: Tensor, w: Weight, s: Tensor, adapter: Adapter, bias: Tensor | None = None
    ) -> Tensor:
        tail = masked(self._product(s, _accumulated(adapter.B)), adapter.dropout_out)
        w = w if isinstance(w, Tensor) else w.dense()
        y = (self._product(x, w) if self.groups.own_weight else x @ w) + tail.to(x.dtype)
        if bias is None:
            return y
        return y + (self._blocks_of(x.shape[0]).of_rows(bias) if self.groups.own_bias else bias)

    def wgrad(
        self, left: Tensor, right: Tensor, dtype: torch.dtype, dropout: Dropout | None = None
    ) -> Tensor:
        blocks = self._blocks_of(left.shape[0])
        wide = blocks.padded(masked(_accumulated(left), dropout))
        return blocks.sums(wide.mT @ blocks.padded(_accumulated(right))).to(dtype)

    def scaled(self, s: Tensor, scale: Scale) -> Tensor:
        if isinstance(scale, Tensor) and scale.ndim:
            scale = self._blocks_of(s.shape[0]).of_rows(scale.to(s.dtype))[:, None]
        return super().scaled(s, scale)

    def weight_grad(self, dy: Tensor, x: Tensor) -> Tensor:
        if not self.groups.own_weight:
            return super().weight_grad(dy, x)
        return self.wgrad(dy, x, x.dtype)

    def bias_grad(self, dy: Tensor) -> Tensor:
        if not self.groups.own_bias:
            return super().bias_grad(dy)
        blocks = self._blocks_of(dy.shape[0])
        return blocks.sums(blocks.padded(_accumulated(dy)).sum(1)).to(dy.dtype)

    def _product(self, x: Tensor, w: Tensor) -> Tensor:
        """x[g]·w[g] of every group: x [T, K], w [G, K, N] -> [T, N]."""
        blocks = self._blocks_of(x.shape[0])
        return blocks.rows(blocks.padded(x) @ blocks.of_blocks(w))

    def _blocks_of(self, rows: int) -> _Blocks:
        if self._blocks is None:  # every operand has these rows
            self._blocks = _Blocks.of(self.groups, rows)
        return self._blocks


class _Blocks(NamedTuple):
    """Where rows lie among blocks of `height` rows, each of one group: blocks are filled up with zeros.

    Every index is within its range for any offsets.
    """

    groups: int
    height: int
    slot_of_row: Tensor  # [T], unique for offsets that keep their rule
    group_of_row: Tensor  # [T]
    group_of_block: Tensor  # [count], groups for a block without rows

    @classmethod
    def of(cls, groups: Groups, rows: int) -> _Blocks:
        G, offsets = groups.count, groups.offsets.long()
        height = max(-(-rows // G), 1)
        count = (rows + G * (height - 1)) // height  # the most that groups of these rows can take
        ends = ((offsets.diff() + height - 1) // height).cumsum(0)  # of each group, in blocks
        row = torch.arange(rows, device=offsets.device)
        group = torch.searchsorted(offsets[1:].contiguous(), row, right=True).clamp(max=G - 1)
        first = torch.cat((ends.new_zeros(1), ends[:-1])) * height - offsets[:-1]
        slot = (row + first[group]).clamp(0, max(count * height - 1, 0))
        block = torch.arange(count, device=offsets.device)
        return cls(G, height, slot, group, torch.searchsorted(ends, block, right=True).clamp(max=G))

    def padded(self, t: Tensor) -> Tensor:
        """Rows [T, C] as blocks [count, height, C]."""
        count = self.group_of_block.shape[0]
        zeros = t.new_zeros(count * self.height, t.shape[1])
        return zeros.index_copy(0, self.slot_of_row, t).view(count, self.height, t.shape[1])

    def rows(self, blocks: Tensor) -> Tensor:
        """Blocks [count, height, C] as rows [T, C]."""
        count, height, columns = blocks.shape
        return _taken(blocks.reshape(count * height, columns), self.slot_of_row)

    def of_rows(self, t: Tensor) -> Tensor:
        """The element of t [G, ...] that is each row's."""
        return _taken(t, self.group_of_row)

    def of_blocks(self, t: Tensor) -> Tensor:
        """The element of t [G, ...] that is each block's; any for one without rows."""
        return _taken(t, self.group_of_block.clamp(max=self.groups - 1))

    def sums(self, t: Tensor) -> Tensor:
        """Over each group's blocks: [count, ...] -> [G, ...], in their order."""
        total = t.new_zeros(self.groups + 1, *t.shape[1:])
        if t.is_cuda:  # index_add has atomics there, this one sorts
            return total.index_put((self.group_of_block,), t, accumulate=True)[: self.groups]
        return total.index_add(0, self.group_of_block, t)[: self.groups]


def _taken(t: Tensor, index: Tensor) -> Tensor:
    """t[index], by an operator that has a tangent under torch.autograd.functional's vmap, but on a GPU atomics."""
    return t[index] if t.is_cuda else t.index_select(0, index)


def with_column_scale(z: Tensor, c: Tensor, bias: Tensor | None) -> Tensor:
    """c∘z + bias in z's dtype: computed in c's and rounded once."""
    y = z * c
    return (y if bias is None else y + bias).to(z.dtype)


def _accumulated(t: Tensor) -> Tensor:
    return t.to(accumulated(t.dtype))


PRODUCTS = CompositeProducts()
