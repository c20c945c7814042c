"""The LoRA branch's dropout mask, computed from a seed and an element's position, and stored by plain ATen alone.

Element (m, k) of an M×K input belongs to group g = m·ceil(K/4) + k//4; Philox-4x32-10 (Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", SC 2011) with key = seed and counter = (g mod 2³², g div 2³², 0, 0) gives four words, of
which word k mod 4 is the element's. The element is kept when its word is at least `threshold(p)`. Every backend computes
exactly these integers, so that a mask is the same on every device and for every tile size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

PHILOX_ROUNDS = 10
PHILOX_M0, PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
PHILOX_W0, PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF
_CACHED = 1 << 14  # groups whose words, in int64, fit a CPU's cache


class Dropout(NamedTuple):
    """Drop each element with probability `p` (0 < p < 1), by the mask that the 0-d int64 tensor `seed` defines.

    `seed` may be that mask itself, bool [rows, cols], for products that are made of ATen's operations: they read it faster
    than they compute it.
    `row`: the masked matrix has so many rows before the operand's first, as where the operand is a slice of it.
    """

    p: float
    seed: Tensor
    row: int = 0


def threshold(p: float) -> int:
    """The smallest 32-bit word that is kept: round(p·2³²), so that a uniform word is below it with probability p."""
    return min(round(p * 2**32), _LOW)


def masked(t: Tensor, dropout: Dropout | None) -> Tensor:
    """mask∘t: what is kept times 1/(1-p), else zero."""
    if dropout is None:
        return t
    return t * keep_mask(dropout, t.shape[0], t.shape[1]) * (1.0 / (1.0 - dropout.p))


def keep_mask(dropout: Dropout, rows: int, cols: int) -> Tensor:
    """The mask of an input with `cols` columns, from row `dropout.row` on: bool [rows, cols], true = kept."""
    if dropout.seed.ndim:
        return dropout.seed[dropout.row : dropout.row + rows]
    groups, begin = (cols + 3) // 4, dropout.row
    if dropout.seed.device.type != "cpu" or torch.compiler.is_compiling():
        kept = _kept(dropout, groups * begin, groups * rows)
    else:
        step = max(1, _CACHED // max(groups, 1))
        blocks = [(row, min(step, rows - row)) for row in range(0, max(rows, 1), step)]
        kept = torch.cat([_kept(dropout, groups * (begin + row), groups * n) for row, n in blocks])
    return kept.view(rows, 4 * groups)[:, :cols]


def _kept(dropout: Dropout, first: int, count: int) -> Tensor:
    """Whether the four elements of each group from `first` on are kept: bool [count, 4]."""
    counter = torch.arange(first, first + count, device=dropout.seed.device)
    return _philox(dropout.seed, counter) >= threshold(dropout.p)


def scaled_mask(dropout: Dropout, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """`keep_mask` as factors: 1/(1-p) where kept, 0 where dropped."""
    return keep_mask(dropout, rows, cols).to(dtype) / (1.0 - dropout.p)


def _philox(seed: Tensor, counter: Tensor) -> Tensor:
    """Philox-4x32-10 words of int64 counters [G] under a 64-bit key: int64 [G, 4], each in [0, 2³²).

    On the way a word is in the lower 32 bits, and the upper ones may be anything: a product of two words fills all 64, as an
    unsigned one does.
    """
    k0, k1 = seed, seed >> 32
    c0, c1, c2, c3 = counter, counter >> 32, torch.zeros_like(counter), torch.zeros_like(counter)
    for _ in range(PHILOX_ROUNDS):
        p0, p1 = (c0 & _LOW).mul_(PHILOX_M0), (c2 & _LOW).mul_(PHILOX_M1)
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1, (p0 >> 32) ^ c3 ^ k1, p0
        k0, k1 = k0 + PHILOX_W0, k1 + PHILOX_W1
    return torch.stack((c0, c1, c2, c3), dim=-1) & _LOW
