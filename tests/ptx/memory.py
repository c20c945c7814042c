"""Global memory as the kernel's tensor arguments: real addresses, every access checked."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np

from tests.ptx.counters import TensorTraffic
from tests.ptx.parser import PtxError

GRANULE = 16


class MemoryFault(PtxError):
    """An access outside every tensor, or not aligned to its own size."""


def geometry(array) -> tuple[int, tuple[int, ...]]:
    """(address, byte strides) of a numpy array or a CPU torch tensor."""
    if isinstance(array, np.ndarray):
        return array.ctypes.data, array.strides
    return array.data_ptr(), tuple(s * array.itemsize for s in array.stride())


class Binding:
    """One tensor argument: the bytes it owns and the traffic they saw."""

    def __init__(self, name: str, array):
        self.name, self.array = name, array
        self.itemsize, self.shape = array.itemsize, tuple(array.shape)
        self.start, self.strides = geometry(array)
        dims = [(t, s) for t, s in zip(self.strides, self.shape, strict=True) if s > 1 and t > 0]
        self.extent = sum(t * (s - 1) for t, s in dims) + self.itemsize
        if 0 in self.shape:
            self.extent = 0
        self.run, self.outer = self.itemsize, []
        for stride, size in sorted(dims):
            if stride == self.run and not self.outer:
                self.run *= size
            else:
                self.outer.insert(0, (stride, size))
        self.origin = self.start // GRANULE * GRANULE
        length = -(-(self.start + self.extent - self.origin) // GRANULE) * GRANULE
        window = (ctypes.c_uint8 * max(length, GRANULE)).from_address(self.origin)
        self.raw = np.frombuffer(window, np.uint8)
        self.traffic = TensorTraffic(stores=np.zeros(self.extent // self.itemsize, np.int32))

    def contains(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """Whether each access lies in elements of this view: not before, after, or in a gap."""
        offset = addresses - self.start
        inside = (offset >= 0) & (offset + size <= self.extent)
        for stride, count in self.outer:
            index = offset // stride
            inside &= index < count
            offset = offset - index * stride
        if self.outer:
            inside &= offset + size <= self.run
        return inside

    def elements(self, addresses: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """The accesses that lie in this tensor, and the numbers [accesses, k] of the elements that they touch."""
        offset = addresses - self.start
        chosen = np.flatnonzero((offset >= 0) & (offset + size <= self.extent))
        first = offset[chosen] // self.itemsize
        return chosen, first[:, None] + np.arange(-(-size // self.itemsize))

    def words(self, addresses: np.ndarray, dtype: np.dtype, count: int):
        """The typed view of the memory and the [lanes, count] indices of an access."""
        index = (addresses - self.origin) // dtype.itemsize
        return self.raw.view(dtype), index[:, None] + np.arange(count)

    def note_stores(self, addresses: np.ndarray, size: int) -> None:
        offset = addresses[:, None] + np.arange(0, size, self.itemsize) - self.start
        np.add.at(self.traffic.stores, offset // self.itemsize, 1)


class GlobalMemory:
    """All bindings of a launch."""

    def __init__(self, bindings: list[Binding]):
        self.bindings = bindings

    def find(self, addresses: np.ndarray, size: int, explain: Callable[[int], str]):
        """Pairs (binding, selection) that together hold every access."""
        if (addresses % size).any():
            lane = int(np.flatnonzero(addresses % size)[0])
            raise MemoryFault(f"{explain(lane)}: misaligned {size}-byte access"
                              f" at {self.place(int(addresses[lane]))}")  # fmt: skip
        found, missing = [], None
        for binding in self.bindings:
            inside = binding.contains(addresses, size)
            if missing is None and inside.all():
                return [(binding, slice(None))]
            inside = inside if missing is None else inside & missing
            if inside.any():
                found.append((binding, np.flatnonzero(inside)))
                missing = ~inside if missing is None else missing & ~inside
                if not missing.any():
                    return found
        lane = 0 if missing is None else int(np.flatnonzero(missing)[0])
        raise MemoryFault(f"{explain(lane)}: {size} bytes outside every tensor,"
                          f" at {self.place(int(addresses[lane]))}")  # fmt: skip

    def place(self, address: int) -> str:
        """The address relative to the nearest tensor."""
        if not self.bindings:
            return f"{address:#x}"
        distances = [max(b.start - address, address - b.start - b.extent) for b in self.bindings]
        near = self.bindings[int(np.argmin(distances))]
        layout = f"{near.shape}, byte strides {near.strides}"
        return f"byte {address - near.start} of {near.name} ({near.extent} bytes: {layout})"

    def read(self, addresses, warps, dtype: np.dtype, count: int, explain) -> np.ndarray:
        """[lanes, count] words."""
        size = dtype.itemsize * count
        out = np.empty((len(addresses), count), dtype)
        for binding, chosen in self.find(addresses, size, explain):
            view, index = binding.words(addresses[chosen], dtype, count)
            out[chosen] = view[index]
            binding.traffic.load(addresses[chosen], warps[chosen], size)
        return out

    def write(self, addresses, warps, words: np.ndarray, explain) -> None:
        size = words.dtype.itemsize * words.shape[1]
        for binding, chosen in self.find(addresses, size, explain):
            view, index = binding.words(addresses[chosen], words.dtype, words.shape[1])
            view[index] = words[chosen]
            binding.traffic.store(addresses[chosen], warps[chosen], size)
            binding.note_stores(addresses[chosen], size)

    def update(self, address: int, dtype: np.dtype, function, explain) -> np.ndarray:
        """One atomic read-modify-write of one word; gives the old value."""
        where = np.array([address])
        ((binding, _),) = self.find(where, dtype.itemsize, lambda _: explain)
        view, index = binding.words(where, dtype, 1)
        old = view[index[0, 0]].copy()
        view[index[0, 0]] = function(old)
        binding.traffic.atomics += 1
        return old
