"""Results that a process computes once, in whichever of its threads needs them first."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any


def once(function: Callable[..., Any]) -> Any:
    """`functools.cache` of `function`, which one thread runs while the others wait: alone, a cache lets all of them run it.

    The result has a `cache_clear`.
    """
    cached, lock = functools.cache(function), threading.RLock()

    @functools.wraps(cached)
    def locked(*args: Any) -> Any:
        with lock:
            return cached(*args)

    locked.cache_clear = cached.cache_clear  # type: ignore[attr-defined]
    return locked
