"""The LoRA branch's dropout mask, computed from a seed and an element's position, and never stored.

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


class Dropout(NamedTuple):
    """Drop each element with probability `p` (0 < p < 1), by the mask that the 0-d int64 tensor `seed` defines.

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
    return t if dropout is None else t * scaled_mask(dropout, t.shape[0], t.shape[1], t.dtype)


def keep_mask(dropout: Dropout, rows: int, cols: int) -> Tensor:
    """The mask of an input with `cols` columns, from row `dropout.row` on: bool [rows, cols], true = kept."""
    seed, begin = dropout.seed, dropout.row
    groups = (cols + 3) // 4
    counter = torch.arange(begin * groups, (begin + rows) * groups, device=seed.device)
    words = _philox(seed, counter)
    return (words >= threshold(dropout.p)).view(rows, 4 * groups)[:, :cols]


def scaled_mask(dropout: Dropout, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """`keep_mask` as factors: 1/(1-p) where kept, 0 where dropped."""
    return keep_mask(dropout, rows, cols).to(dtype) / (1.0 - dropout.p)


def _philox(seed: Tensor, counter: Tensor) -> Tensor:
    """Philox-4x32-10 words of int64 counters [G] under a 64-bit key: int64 [G, 4], each in [0, 2³²)."""
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    c0, c1 = counter & _LOW, (counter >> 32) & _LOW
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    for _ in range(PHILOX_ROUNDS):
        hi0, lo0 = _multiply_32(PHILOX_M0, c0)
        hi1, lo1 = _multiply_32(PHILOX_M1, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + PHILOX_W0) & _LOW, (k1 + PHILOX_W1) & _LOW
    return torch.stack((c0, c1, c2, c3), dim=-1)


def _multiply_32(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of constant·word, both unsigned 32-bit: split so that no int64 product overflows."""
    low = constant * (word & 0xFFFF)  # < 2^48
    high = constant * (word >> 16)  # < 2^48
    middle = high + (low >> 16)  # < 2^49
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)
