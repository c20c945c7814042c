"""Rows sorted by group, and their results brought back: what a product over groups needs before and after it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """Where the rows of a product over G groups come from: `slots` rows a token, sorted by group.

    Row s of the sorted ones is slot `order[s]` of the list that has each token's slots side by side, so token
    `order[s] // slots`. Rows of group g are offsets[g] up to offsets[g + 1].
    """

    order: Tensor  # [S] int64
    inverse: Tensor  # [S] int64: order[inverse[i]] == i
    offsets: Tensor  # [G+1] int32, on the device of the groups
    slots: int

    def spread(self, x: Tensor) -> Tensor:
        """Rows [S, K] in the sorted order, of the tokens x [T, K]."""
        return _moved(x, self.order, self.inverse, self.slots, False)

    def gather(self, rows: Tensor, weights: Tensor | None = None) -> Tensor:
        """y [T, N] of the sorted rows [S, N]: the sum over a token's slots, times weights [T, slots] where given."""
        if weights is None:
            return _moved(rows, self.order, self.inverse, self.slots, True)
        each = _moved(rows, self.order, self.inverse, 1, True)
        return (each.view(-1, self.slots, rows.shape[1]) * weights.unsqueeze(-1)).sum(1)


def _moved(rows: Tensor, *args: Any) -> Tensor:
    """`_Moved` of these arguments, by its plain operators where a Function is not seen through.

    Dynamo traces no Function with a jvp, and for a batch of gradients (is_grads_batched) a Function cuts the graph.
    """
    plain = torch.compiler.is_compiling() or torch._C._functorch.is_legacy_batchedtensor(rows)
    return (_Moved.forward if plain else _Moved.apply)(rows, *args)


class _Moved(torch.autograd.Function):
    """Tokens' rows in the sorted order, or `back`: the sum of each token's slots. Either is the other's derivative.

    Autograd's own derivative of an indexing adds into zeros: 0.5 ms more for 512 rows of 1024 (AMD Zen 3, two threads),
    and in no fixed order on a GPU.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor, order: Tensor, inverse: Tensor, slots: int, back: bool) -> Tensor:
        if not back:
            return rows.index_select(0, order if slots == 1 else order // slots)
        y = rows.index_select(0, inverse)
        return y if slots == 1 else y.view(-1, slots, rows.shape[1]).sum(1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, order, inverse, ctx.slots, ctx.back = inputs
        ctx.save_for_backward(order, inverse)
        ctx.save_for_forward(order, inverse)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        back = _moved(dy, *ctx.saved_tensors, ctx.slots, not ctx.back)
        return back, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return _moved(tangent, *ctx.saved_tensors, ctx.slots, ctx.back)


def sorted_by_group(groups: Tensor, G: int) -> Routing:
    """The routing of tokens to groups [T, slots] or [T], each in [0, G). The host reads nothing."""
    flat = groups.reshape(-1)
    ids, order = torch.sort(flat, stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0], device=order.device)
    bounds = torch.arange(G + 1, dtype=ids.dtype, device=ids.device)
    offsets = torch.searchsorted(ids, bounds, out_int32=True)
    return Routing(order, inverse, offsets, 1 if groups.ndim == 1 else groups.shape[1])
