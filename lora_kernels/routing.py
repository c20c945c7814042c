"""Rows sorted by group, and their results brought back: what a product over groups needs before and after it."""

from __future__ import annotations

from typing import NamedTuple

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
        token = self.order // self.slots
        # index_select is the faster one (0.6 against 1.9 ms forward and backward for 1024 rows of 512; AMD Zen 3), but
        # its backward adds in no fixed order on a GPU, where that of indexing sorts first.
        return x.index_select(0, token) if x.is_cpu else x[token]

    def gather(self, rows: Tensor, weights: Tensor | None = None) -> Tensor:
        """y [T, N] of the sorted rows [S, N]: the sum over a token's slots, times weights [T, slots] where given."""
        y = rows.index_select(0, self.inverse)
        if self.slots > 1 or weights is not None:
            y = y.view(-1, self.slots, rows.shape[1])
            y = (y if weights is None else y * weights.unsqueeze(-1)).sum(1)
        return y


def sorted_by_group(groups: Tensor, G: int) -> Routing:
    """The routing of tokens to groups [T, slots] or [T], each in [0, G). The host reads nothing."""
    flat = groups.reshape(-1)
    ids, order = torch.sort(flat, stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0], device=order.device)
    bounds = torch.arange(G + 1, dtype=ids.dtype, device=ids.device)
    offsets = torch.searchsorted(ids, bounds, out_int32=True)
    return Routing(order, inverse, offsets, 1 if groups.ndim == 1 else groups.shape[1])
