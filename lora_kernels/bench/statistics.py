"""What is said of samples: medians, quartiles, and ratios of samples taken next to each other."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Summary:
    """Median and quartiles."""

    median: float
    low: float
    high: float


def summary(samples: list[float]) -> Summary:
    """Of at least one sample, interpolated between neighbours."""
    ordered = sorted(samples)
    return Summary(*(_quantile(ordered, q) for q in (0.5, 0.25, 0.75)))


def ratios(samples: list[float], base: list[float]) -> Summary:
    """Of samples[i] / base[i]: pairs taken next to each other share the machine's mood, and it cancels."""
    return summary([ours / theirs for ours, theirs in zip(samples, base, strict=True)])


def _quantile(ordered: list[float], q: float) -> float:
    place = q * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
