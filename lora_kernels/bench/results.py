"""The results of a run of benchmarks: rows, and the machine, versions and commit that they belong to, as JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from lora_kernels.problem import Problem

SCHEMA = 1
Samples = dict[str, list[float]]


class Summary(NamedTuple):
    """Quartiles."""

    low: float
    median: float
    high: float


@dataclass(frozen=True)
class Row:
    """One contender on one problem.

    `suite` is linear, growth, shared, training, overhead or memory; `case` names what was computed ("minilm up"), `mode`
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
        """The fields that two runs' rows of the same measurement share."""
        return *self.group, self.contender

    @property
    def group(self) -> tuple[Any, ...]:
        """The fields that all contenders of the same measurement share."""
        sizes = tuple(sorted(self.problem.items())) if self.problem else ()
        return self.suite, self.case, self.mode, sizes, self.caches, self.graph

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
        """Each row with every field of its run, for tables of other tools."""
        shared = {"sha": self.sha, "date": self.date, **self.machine, **self.versions}
        return ({**shared, **asdict(row)} for row in self.rows)


def row(
    suite: str,
    case: str,
    mode: str,
    name: str,
    taken: Samples,
    problem: Problem | None = None,
    unit: str = "us",
    **more: Any,
) -> Row:
    """The row of the contender `name`, out of samples that were taken in turns."""
    own, floor = summary(taken[name]), _ratios(taken, name, "frozen")
    reference = _ratios(taken, name, "reference")
    return Row(
        *(suite, case, mode, name, unit, own.median, own.low, own.high, len(taken[name])),
        problem=None if problem is None else asdict(problem),
        to_floor=floor and floor.median,
        to_floor_low=floor and floor.low,
        to_floor_high=floor and floor.high,
        to_reference=reference and reference.median,
        **more,
    )


def summary(samples: list[float]) -> Summary:
    """The quartiles of at least one sample, interpolated between neighbours."""
    least_two = samples if len(samples) > 1 else samples * 2
    return Summary(*statistics.quantiles(least_two, n=4, method="inclusive"))


def _ratios(taken: Samples, name: str, base: str) -> Summary | None:
    """Ratios of neighbouring samples: what changes the machine's speed for both cancels. None where there is no base."""
    if not all(taken.get(base, [0.0])):
        return None
    return summary([ours / theirs for ours, theirs in zip(taken[name], taken[base], strict=True)])


def save(results: Results, file: Path) -> Path:
    """Write results; the folder is made. Returns the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    raw = {"schema": SCHEMA, **asdict(results)}
    rows = ",\n".join("  " + json.dumps(_without_defaults(row)) for row in raw.pop("rows"))
    head = json.dumps(raw, indent=1)[:-2]
    file.write_text(f'{head},\n "rows": [\n{rows}\n ]\n}}\n', encoding="utf-8")
    return file


def load(file: Path) -> Results:
    """Read results. ValueError names the file, the rule that it breaks, and what it has instead."""
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} must be JSON: {error}") from error
    if not isinstance(raw, dict) or "schema" not in raw:
        has = sorted(raw) if isinstance(raw, dict) else type(raw).__name__
        raise ValueError(
            f'{file} must be written by `bench`, with the key "schema": {SCHEMA}; it has {has}'
        )
    version = raw.pop("schema")
    if version != SCHEMA:
        raise ValueError(f"{file} must have schema {SCHEMA}, and has {version!r}: measure again")
    _check_names(file, "results", raw, Results)
    if not isinstance(raw["rows"], list):
        raise ValueError(f"{file}: rows must be a list, and is {type(raw['rows']).__name__}")
    for index, each in enumerate(raw["rows"]):
        _check_names(file, f"rows[{index}]", each, Row)
    return Results(**{**raw, "rows": [Row(**each) for each in raw["rows"]]})


def _check_names(file: Path, what: str, raw: Any, kind: Any) -> None:
    """ValueError unless `raw` is an object with the fields of a dataclass."""
    if not isinstance(raw, dict):
        raise ValueError(f"{file}: {what} must be an object, and is {type(raw).__name__}")
    needed = {f.name for f in fields(kind) if f.default is MISSING} - {"left_out", "failed"}
    missing, unknown = needed - raw.keys(), raw.keys() - {f.name for f in fields(kind)}
    if missing or unknown:
        raise ValueError(
            f"{file}: {what} must have the fields of {kind.__name__}: "
            f"missing {sorted(missing)}, unknown {sorted(unknown)}"
        )


def find(paths: list[Path]) -> list[Path]:
    """These files, and the result files of these folders, of any version. FileNotFoundError where there is none."""
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
    return isinstance(raw, dict) and {"schema", "rows"} <= raw.keys()


def _without_defaults(row: dict[str, Any]) -> dict[str, Any]:
    defaults = {f.name: f.default for f in fields(Row)}
    return {
        name: float(f"{value:.6g}") if isinstance(value, float) else value
        for name, value in row.items()
        if value != defaults[name]
    }
