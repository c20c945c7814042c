"""Which target a GPU is."""

from __future__ import annotations

import functools

import torch

from lora_kernels.tuning.targets import Target, target_of


def current_target(device: torch.device | None = None) -> Target:
    """The target of `device`, or of the current one where it has no index.

    ValueError where there is no GPU, and for one that the kernels of this package do not support.
    """
    index = None if device is None else device.index
    if index is None:
        if not torch.cuda.is_available():
            raise ValueError("PyTorch finds no GPU")
        index = torch.cuda.current_device()
    return target_of(architecture(index))


@functools.lru_cache(maxsize=64)
def architecture(device: int) -> str:
    """The name of a GPU's architecture, as "sm_90" or "gfx942"."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"
