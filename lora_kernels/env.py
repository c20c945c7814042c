"""The environment variables this package reads, all of them, each when it is asked for.

LORA_KERNELS_BACKEND  a backend's name, used where a call says "auto"
LORA_KERNELS_CACHE    the folder for tuned tables and self-test verdicts (default: ~/.cache/lora_kernels)
LORA_KERNELS_LOG      a logging level name for the "lora_kernels" logger, such as INFO
LORA_KERNELS_BUILD    read by setup.py: which extensions to build ("auto", "none", "cpu", "cuda", "cpu,cuda")
"""

from __future__ import annotations

import logging
import os
from pathlib import Path


def backend() -> str:
    """The backend that "auto" means: "auto" unless the environment names one."""
    return os.environ.get("LORA_KERNELS_BACKEND", "auto") or "auto"


def cache_dir() -> Path:
    """Where tuned tables and self-test verdicts are kept; it may not exist yet."""
    named = os.environ.get("LORA_KERNELS_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lora_kernels"


def logger() -> logging.Logger:
    """The package's logger, at the level that LORA_KERNELS_LOG names."""
    log = logging.getLogger("lora_kernels")
    level = os.environ.get("LORA_KERNELS_LOG")
    if level:
        log.setLevel(level.upper())
    return log
