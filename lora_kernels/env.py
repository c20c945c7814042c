"""The environment variables of this package, each read when it is used.

LORA_KERNELS_BACKEND  a backend's name, used where a call says "auto"
LORA_KERNELS_CACHE    the folder for tuned tables and self-test verdicts (default: lora_kernels in
                      XDG_CACHE_HOME or ~/.cache)
LORA_KERNELS_LOG      a logging level name for the "lora_kernels" logger, such as INFO
LORA_KERNELS_BUILD    read by setup.py: which extensions to build ("auto", "none", "cpu", "cuda", "cpu,cuda")
"""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path

from lora_kernels.once import once


def backend() -> str:
    """The backend that "auto" means: "auto" unless the environment names one."""
    return os.environ.get("LORA_KERNELS_BACKEND", "auto") or "auto"


def cache_dir() -> Path:
    """Where tuned tables and self-test verdicts are kept; it may not exist yet."""
    named = os.environ.get("LORA_KERNELS_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lora_kernels"


def log_level() -> int | None:
    """The level that LORA_KERNELS_LOG names, or None where it is not set; ValueError where it names none."""
    name = os.environ.get("LORA_KERNELS_LOG")
    if not name:
        return None
    level = logging.getLevelName(name.upper())
    if not isinstance(level, int):
        raise ValueError(f"LORA_KERNELS_LOG must be a logging level such as INFO, got {name!r}")
    return level


def logger() -> logging.Logger:
    """The package's logger, at the level of LORA_KERNELS_LOG; one that names no level is a warning, once, and left out."""
    log = logging.getLogger("lora_kernels")
    try:
        level = log_level()
    except ValueError as error:
        _warn_once(str(error))
    else:
        if level is not None:
            log.setLevel(level)
    return log


@once
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)
