"""Calls of kernels, made once by several threads before they count: the kernels are compiled beside each other."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import torch

THREADS = 8  # each compiles for most of a second, and takes some 100 MB


def compile_ahead(calls: Iterable[Callable[[], object]], device: torch.device) -> None:
    """Make every call once on a GPU, `device`; nothing on another device, where nothing is compiled.

    What a call returns or raises is dropped: it will be made again where that counts. Threads have streams, and gradients,
    of their own.
    """
    if device.type != "cuda":
        return
    index = torch.cuda.current_device() if device.index is None else device.index

    def make(call: Callable[[], object]) -> None:
        with suppress(Exception), torch.cuda.device(index):
            torch.cuda.synchronize()  # a new thread has no context, which cuBLAS warns of
            call()

    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        list(pool.map(make, calls))
