"""Finds what became slower: by ratios to the frozen layer, not by times, and only if three measurements agree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lora_kernels.bench.contenders import FORCED, OURS
from lora_kernels.bench.linear import Case
from lora_kernels.bench.results import Results, Row

CHECKED = (*OURS, *FORCED)
TRIES = 3


@dataclass(frozen=True)
class Verdict:
    """A row of the baseline, the row of now (None where it could not be measured), and whether it is slower."""

    before: Row
    after: Row | None
    tries: int
    slower: bool

    @property
    def change(self) -> float | None:
        """Ratio of the ratios to the frozen layer: 1.1 is a tenth slower."""
        if self.after is None or not self.before.to_floor or self.after.to_floor is None:
            return None
        return self.after.to_floor / self.before.to_floor

    def __str__(self) -> str:
        row = self.before
        what = f"{row.case} {row.mode} {row.contender} {(row.problem or {}).get('dtype', '')}"
        if self.after is None:
            return f"MISSING  {what}: measured in the baseline, not possible now"
        mark = "SLOWER " if self.slower else "ok     "
        text = (
            f"{mark}  {what}: {row.to_floor:.2f} -> {self.after.to_floor:.2f} of the frozen layer"
        )
        return text + (f" ({self.tries} measurements)" if self.tries > 1 else "")


def cases_of(baseline: Results) -> list[Case]:
    """The cases whose rows of ours are compared. ValueError where there is none."""
    found = dict.fromkeys(case_of(row) for row in _checked(baseline))
    if not found:
        raise ValueError("the baseline must hold rows of this package's backends, and holds none")
    return list(found)


def case_of(row: Row) -> Case:
    """The case that a linear or growth row is of."""
    problem = row.as_problem()
    if problem is None:
        raise ValueError(f"a {row.suite} row of a baseline must have a problem: {row}")
    cold = row.caches == "cold"
    return Case(row.case, problem, row.mode, row.suite, cold=cold, graph=row.graph)


def names_of(baseline: Results) -> tuple[str, ...]:
    """The contenders that are measured again."""
    return tuple(dict.fromkeys(row.contender for row in _checked(baseline)))


def compare(
    baseline: Results, now: Results, fail_over: float, again: Callable[[Row], Row | None]
) -> list[Verdict]:
    """A verdict for each row of ours in the baseline.

    A row is slower when its ratio grew by more than the factor `fail_over` and the quartiles of then and now do not
    overlap, in each of three measurements; `again` measures a row once more, longer.
    """
    current = {row.key: row for row in now.rows}
    return [_judge(row, current.get(row.key), fail_over, again) for row in _checked(baseline)]


def _judge(
    before: Row, after: Row | None, fail_over: float, again: Callable[[Row], Row | None]
) -> Verdict:
    tries = 1
    while after is not None and _suspicious(before, after, fail_over):
        if tries == TRIES:
            return Verdict(before, after, tries, slower=True)
        tries += 1
        after = again(before)
    return Verdict(before, after, tries, slower=after is None)


def _suspicious(before: Row, after: Row, fail_over: float) -> bool:
    assert before.to_floor is not None and before.to_floor_high is not None
    assert after.to_floor is not None and after.to_floor_low is not None
    grew = after.to_floor > before.to_floor * fail_over
    return grew and after.to_floor_low > before.to_floor_high


def _checked(results: Results) -> list[Row]:
    return [
        row
        for row in results.rows
        if row.suite in ("linear", "growth") and row.contender in CHECKED and row.to_floor
    ]
