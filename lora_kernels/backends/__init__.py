"""The registry of backends: a backend is one file or folder here and one line of BACKENDS."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_kernels.backends.base import Backend

# A name and its module, which has the backend as BACKEND and is imported at its first use. Where candidates have no
# times, the first backend that can compute the problem is taken.
BACKENDS = {
    "cuda": "lora_kernels.backends.cuda",
    "triton": "lora_kernels.backends.triton",
    "cpu": "lora_kernels.backends.cpu",
    "eager": "lora_kernels.backends.eager",
}


def get(name: str) -> Backend:
    """The backend called `name`."""
    return importlib.import_module(BACKENDS[name]).BACKEND
