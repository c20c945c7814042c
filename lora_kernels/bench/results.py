"""What a run of benchmarks leaves behind: rows, and the machine, versions and commit that they belong to, as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from lora_kernels.problem import Problem

SCHEMA = 1


@dataclass(frozen=True)
class Row:
    """One contender on one problem.

    `suite` is linear, growth, training, overhead or memory; `case` names what was computed within it ("minilm up"), `mode`
    how much of it: forward, step (forward and backward) or saved/peak (bytes). `value` is a median in `unit`, low and high
    are quartiles. Ratios are medians of ratios of neighbouring samples, to the frozen layer and to the reference.
    `ceiling_share` is the time that the measured product and copy rates allow, divided by the time it took.
    """

    suite: str
    case: str
    mode: str
    contender: str
    unit: str
    value: float
    low: float
    high: float
    rounds: int
    problem: dict[str, Any] | None = None
    to_floor: float | None = None
    to_floor_low: float | None = None
    to_floor_high: float | None = None
    to_reference: float | None = None
    ceiling_share: float | None = None
    auto: bool | None = None  # whether "auto" takes this backend for this problem
    error: float | None = None  # largest error against float64, relative to the largest value
    caches: str = "warm"
    graph: bool = False

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes it the same measurement in another run."""
        sizes = tuple(sorted(self.problem.items())) if self.problem else ()
        return self.suite, self.case, self.mode, self.contender, sizes, self.caches, self.graph

    def as_problem(self) -> Problem | None:
        return None if self.problem is None else Problem(**self.problem)


@dataclass
class Results:
    """The rows of one run on one machine, its ceilings, and what was not measured or failed, with the reason."""

    machine: dict[str, Any]
    versions: dict[str, Any]
    sha: str
    date: str
    command: str
    ceilings: dict[str, float]
    rows: list[Row] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def of(self, **wanted: Any) -> list[Row]:
        """The rows whose fields have these values."""
        return [r for r in self.rows if all(getattr(r, k) == v for k, v in wanted.items())]

    def flat(self) -> Iterator[dict[str, Any]]:
        """Each row with everything that the run says of it, for tables of other tools."""
        shared = {"sha": self.sha, "date": self.date, **self.machine, **self.versions}
        return ({**shared, **asdict(row)} for row in self.rows)


def save(results: Results, file: Path) -> Path:
    """Write results; the folder is made. Returns the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    raw = {"schema": SCHEMA, **asdict(results)}
    rows = ",\n".join("  " + json.dumps(_without_defaults(row)) for row in raw.pop("rows"))
    head = json.dumps(raw, indent=1)[:-2]
    file.write_text(f'{head},\n "rows": [\n{rows}\n ]\n}}\n', encoding="utf-8")
    return file


def load(file: Path) -> Results:
    """Read results. ValueError where the file is none of this schema."""
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        if raw.pop("schema") != SCHEMA:
            raise ValueError("another schema")
        rows = [Row(**row) for row in raw.pop("rows")]
        return Results(**raw, rows=rows)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} must hold benchmark results of schema {SCHEMA}: {error}"
        ) from error


def find(paths: list[Path]) -> list[Path]:
    """The result files among and in these files and folders. FileNotFoundError where there is none."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += [file for file in sorted(path.glob("*.json")) if _is_results(file)]
        elif path.exists():
            files.append(path)
        else:
            raise FileNotFoundError(f"{path} does not exist")
    if not files:
        raise FileNotFoundError(f"no benchmark results in {', '.join(map(str, paths))}")
    return files


def _is_results(file: Path) -> bool:
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(raw, dict) and raw.get("schema") == SCHEMA and "rows" in raw


def _without_defaults(row: dict[str, Any]) -> dict[str, Any]:
    defaults = {f.name: f.default for f in fields(Row)}
    return {
        name: float(f"{value:.6g}") if isinstance(value, float) else value
        for name, value in row.items()
        if value != defaults[name]
    }
