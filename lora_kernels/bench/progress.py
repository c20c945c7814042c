"""How far a run of many steps is, and how long the rest will take at the pace so far."""

from __future__ import annotations

import time
from collections.abc import Callable


class Progress:
    """Counts `total` steps."""

    def __init__(self, total: int, now: Callable[[], float] = time.perf_counter) -> None:
        self.total, self.now = total, now
        self.begin, self.step = now(), 0

    def next(self) -> str:
        """Go on to the next step; returns it in words: "[3/10, about 2 min left]", the first without an estimate."""
        done, self.step = self.step, self.step + 1
        place = f"{self.step}/{self.total}"
        if done < 1:
            return f"[{place}]"
        left = (self.now() - self.begin) / done * (self.total - done)
        return f"[{place}, about {_words(left)} left]"


def _words(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes / 60:.1f} h"
