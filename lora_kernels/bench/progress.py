"""How far a run of many steps is, and how long the rest will take at the pace so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from typing import TypeVar

Step = TypeVar("Step")


def counted(
    steps: Collection[Step], now: Callable[[], float] = time.perf_counter
) -> Iterator[tuple[str, Step]]:
    """Each step after its place in words: "[3/10, about 2 min left]", the first without an estimate."""
    begin = now()
    for done, step in enumerate(steps):
        place = f"{done + 1}/{len(steps)}"
        if done:
            left = (now() - begin) / done * (len(steps) - done)
            place += f", about {_words(left)} left"
        yield f"[{place}]", step


def _words(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes / 60:.1f} h"
