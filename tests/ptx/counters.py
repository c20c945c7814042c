"""What a launch did: traffic per tensor, shared memory's, instructions by opcode, FLOPs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

SECTOR = 32
BANKS = 32


class PatternCache(dict):
    """Remembers a cost by the pattern of addresses relative to an aligned start."""

    def cost(self, function, unit: int, addresses: np.ndarray, warps: np.ndarray, size: int):
        relative = addresses - (int(addresses[0]) // unit) * unit
        key = (relative.tobytes(), warps.tobytes(), size)
        if key not in self:
            self[key] = function(relative, warps, size)
        return self[key]


def count_sectors(addresses: np.ndarray, warps: np.ndarray, size: int) -> tuple[int, int]:
    """32-byte sectors that these warp accesses touch, and the fewest for as many bytes."""
    base = addresses.min() // SECTOR * SECTOR
    pairs = (warps << 44) + (addresses - base)
    distinct = np.unique(pairs)
    sectors = distinct // SECTOR
    if size > SECTOR:
        raise ValueError(f"one access of {size} bytes")
    touched = len(np.unique(np.concatenate([sectors, (distinct + size - 1) // SECTOR])))
    per_warp = np.unique(distinct >> 44, return_counts=True)[1]
    return touched, int((-(-per_warp * size // SECTOR)).sum())


def count_wavefronts(addresses: np.ndarray, warps: np.ndarray, size: int) -> tuple[int, int]:
    """Shared-memory wavefronts of these warp accesses, and the conflict-free number.

    A warp's request of 8 (16) bytes a lane is served by halves (quarters); within a part every
    bank gives one 4-byte word a wavefront, and equal words are broadcast.
    """
    parts = max(size // 4, 1)
    order = np.arange(len(addresses)) - np.searchsorted(warps, warps)
    group = warps * parts + order * parts // BANKS
    word = (addresses[:, None] + 4 * np.arange(parts)) // 4
    word -= word.min() // BANKS * BANKS
    distinct = np.unique((group[:, None] << 40) + word)
    groups, index = np.unique(distinct >> 40, return_inverse=True)
    bank = distinct % BANKS
    per_bank = np.bincount(index * BANKS + bank, minlength=len(groups) * BANKS)
    fewest = -(-np.bincount(index) // BANKS)
    return int(per_bank.reshape(-1, BANKS).max(1).sum()), int(fewest.sum())


_SECTORS = PatternCache()
_WAVEFRONTS = PatternCache()


@dataclass
class TensorTraffic:
    """Global-memory traffic of one kernel argument; `stores` counts by element."""

    bytes_loaded: int = 0
    bytes_stored: int = 0
    load_sectors: int = 0
    fewest_load_sectors: int = 0
    store_sectors: int = 0
    fewest_store_sectors: int = 0
    atomics: int = 0
    stores: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))

    def load(self, addresses: np.ndarray, warps: np.ndarray, size: int) -> None:
        touched, fewest = _SECTORS.cost(count_sectors, SECTOR, addresses, warps, size)
        self.bytes_loaded += size * len(addresses)
        self.load_sectors += touched
        self.fewest_load_sectors += fewest

    def store(self, addresses: np.ndarray, warps: np.ndarray, size: int) -> None:
        touched, fewest = _SECTORS.cost(count_sectors, SECTOR, addresses, warps, size)
        self.bytes_stored += size * len(addresses)
        self.store_sectors += touched
        self.fewest_store_sectors += fewest


@dataclass
class Counters:
    """Everything counted in one launch.

    `wavefronts` are those of threads' accesses; `unit_bytes` is what matrix instructions read and tensor copies move in
    shared memory without a thread. `matrix_flops` by the operands' kind; `fma_flops` of float32 outside the matrix unit.
    """

    tensors: dict[str, TensorTraffic] = field(default_factory=dict)
    instructions: Counter[str] = field(default_factory=Counter)
    wavefronts: int = 0
    fewest_wavefronts: int = 0
    unit_bytes: int = 0
    matrix_flops: Counter[str] = field(default_factory=Counter)
    fma_flops: int = 0

    @property
    def flops(self) -> int:
        """Of the matrix instructions."""
        return self.matrix_flops.total()

    def multiplied(self, kind: str, flops: int, operand_bytes: int = 0) -> None:
        self.matrix_flops[kind] += flops
        self.unit_bytes += operand_bytes

    def shared(self, addresses: np.ndarray, warps: np.ndarray, size: int) -> None:
        total, fewest = _WAVEFRONTS.cost(count_wavefronts, 4 * BANKS, addresses, warps, size)
        self.wavefronts += total
        self.fewest_wavefronts += fewest

    def executed(self, opcode: str, warps: int) -> None:
        self.instructions[opcode] += warps
        if opcode.startswith("fma.") and ".f32" in opcode:
            self.fma_flops += (128 if opcode.endswith("x2") else 64) * warps
