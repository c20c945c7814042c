"""Memory for a dense weight while one product reads it: a buffer of the device that all layers share.

A kept buffer belongs to one stream, on which its users run one after the other. It is lent to one call at a time: a
second call, of another thread, gets memory of its own. So does a call on another stream, whose memory is kept then. A
CUDA graph owns the memory of its capture and uses it again in every replay: what is made while one captures, or in the
memory of a graph that is only warming up, is used for that call and never kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# By device the stream and its buffer, while nobody has it: one for each device, since kept memory is nobody else's.
_kept: dict[torch.device, tuple[int, Tensor]] = {}


@contextmanager
def lent(rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
    """An unwritten [rows, cols] that lies row after row, for kernels launched within the block on the current stream."""
    needed = rows * cols * dtype.itemsize
    if device.type == "cuda" and _capturing(device):
        yield torch.empty((rows, cols), dtype=dtype, device=device)
        return
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    buffer = _taken(device, stream, needed)
    may_be_kept = buffer is not None
    if buffer is None:
        buffer = torch.empty(needed, dtype=torch.uint8, device=device)
        may_be_kept = _is_ordinary(buffer)
    try:
        yield buffer[:needed].view(dtype).view(rows, cols)
    finally:
        if may_be_kept:
            _give_back(device, stream, buffer)


def _capturing(device: torch.device) -> bool:
    """Whether the stream that is current on `device`, which need not be the current device, is being captured."""
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _taken(device: torch.device, stream: int, needed: int) -> Tensor | None:
    """The kept buffer if it is the stream's and large enough, which nobody else gets meanwhile."""
    owner, buffer = _kept.pop(device, (stream, None))
    return buffer if buffer is not None and owner == stream and buffer.nbytes >= needed else None


def _give_back(device: torch.device, stream: int, buffer: Tensor) -> None:
    owner, other = _kept.get(device, (stream, None))
    if other is None or owner != stream or other.nbytes < buffer.nbytes:
        _kept[device] = stream, buffer


def _is_ordinary(buffer: Tensor) -> bool:
    """Whether new memory is the allocator's own, and not of a pool that a graph or the user has put in its place."""
    if buffer.device.type != "cuda":
        return True
    try:
        segments = torch.cuda.memory_snapshot()
    except RuntimeError:  # an allocator that keeps no such list
        return False
    address = buffer.data_ptr()
    return any(
        segment["segment_pool_id"] == (0, 0)
        for segment in segments
        if segment["device"] == buffer.device.index
        and segment["address"] <= address < segment["address"] + segment["total_size"]
    )
