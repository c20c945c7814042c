"""Which target a GPU is."""

from __future__ import annotations

import functools

import torch

from lora_kernels.tuning.targets import Target, target_of


def current_target(device: torch.device | None = None) -> Target:
    """The target of `device`, or of the current one where it has no index, with its own multiprocessors and bandwidth.

    ValueError where there is no GPU, and for one that the kernels of this package do not support.
    """
    index = None if device is None else device.index
    if index is None:
        if not torch.cuda.is_available():
            raise ValueError("PyTorch finds no GPU")
        index = torch.cuda.current_device()
    return _target(index)


@functools.lru_cache(maxsize=64)
def _target(device: int) -> Target:
    target = target_of(architecture(device))
    if torch.version.hip:  # it counts multiprocessors in pairs on some chips
        return target
    properties = torch.cuda.get_device_properties(device)
    # Twice a clock, over a bus of so many bits; torch before 2.11 does not tell either.
    clock_khz = getattr(properties, "memory_clock_rate", 0)
    peak_gbs = 2 * clock_khz * getattr(properties, "memory_bus_width", 0) / 8e6
    return target.of_chip(properties.name, properties.multi_processor_count, peak_gbs)


def architecture(device: int) -> str:
    """The name of a GPU's architecture, as "sm_90" or "gfx942"."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"
