"""Tables made of results: Markdown for people, plain text for a terminal. Losses are listed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

from lora_kernels import backends
from lora_kernels.backends.base import fastest
from lora_kernels.bench.contenders import FLOORS, FORCED
from lora_kernels.bench.results import Results, Row
from lora_kernels.tuning import cost
from lora_kernels.tuning.targets import COPY_SHARE, Target, target_of

LOSS = 1.05  # slower than another by more than this is listed
_MODE = {"forward": "forward", "step": "forward + backward"}
_UNITS = ((1e6, "s"), (1e3, "ms"), (1.0, "µs"))
_LONG = 48  # rows of a table that is folded
_PREDICTED = ("frozen", "reference", "addmm", "ours[eager]", *FORCED, "ours[triton]")


def markdown(runs: dict[str, tuple[Results, Iterable[Path]]]) -> str:
    """The report of runs by name, each with its plots."""
    parts = [
        "# Benchmark results",
        "Written by `python -m lora_kernels report`. Times are medians of samples taken in turns; ratios are medians of "
        "ratios of neighbouring samples. `×` is the time divided by the frozen layer's, a plain `nn.Linear`. `*` marks "
        'the backend that "auto" takes.',
    ]
    for name, (results, plots) in runs.items():
        parts += _run(name, results, plots)
    return "\n\n".join(parts) + "\n"


def plain_table(results: Results) -> str:
    """Every row on a line."""
    lines = [
        f"{'case':<22}{'mode':<9}{'contender':<16}{'time':>12}{'x frozen':>10}{'x ref.':>8}{'ceiling':>9}"
    ]
    for row in results.rows:
        lines.append(
            f"{row.case:<22}{row.mode:<9}{row.contender + '*' * bool(row.auto):<16}{_value(row):>12}"
            f"{_ratio(row.to_floor):>10}{_ratio(row.to_reference):>8}{_share(row.ceiling_share):>9}"
        )
    lines += [f"left out: {name}: {why}" for name, why in results.left_out.items()]
    return "\n".join(lines)


def pairs(results: Results) -> list[tuple[Row, Row]]:
    """(our row that "auto" takes, another row) of every contender in linear and shared cases but what has no LoRA."""
    return [
        (ours, other)
        for suite in ("linear", "shared")
        for rows in groups(results.of(suite=suite))
        for ours in rows
        for other in rows
        if ours.auto and other is not ours and other.contender not in FLOORS
    ]


def losses(results: Results) -> list[tuple[Row, Row]]:
    """The pairs in which the other was faster by more than `LOSS`."""
    return [(ours, other) for ours, other in pairs(results) if ours.value > LOSS * other.value]


def groups(rows: list[Row]) -> list[list[Row]]:
    """Rows of one measurement together: the same case, mode, problem and conditions."""
    found: dict[Any, list[Row]] = {}
    for row in rows:
        found.setdefault(row.group, []).append(row)
    return list(found.values())


def predictions(results: Results) -> list[tuple[Row, float]]:
    """(row, predicted microseconds) of every linear and growth row on a GPU that the package's cost model covers."""
    target = target_of_run(results)
    return [
        (row, us)
        for row in results.rows
        if row.suite in ("linear", "growth") and row.caches == "warm"
        if (us := predicted_us(row, target)) is not None
    ]


def target_of_run(results: Results) -> Target | None:
    """The target of a run's GPU, with the bandwidth that was measured there; None for what the cost model does not cover."""
    machine = results.machine
    try:
        like = target_of(str(machine.get("architecture", "")))
    except ValueError:
        return None
    peak_gbs = results.ceilings.get("copy_gbs", 0.0) / COPY_SHARE
    nvidia = like.name.startswith("sm_")  # ROCm counts some chips' in pairs
    count = machine.get("multiprocessors") if nvidia else None
    count = count or like.multiprocessors
    return like.of_chip(str(machine.get("name")), count, peak_gbs)


def predicted_us(row: Row, target: Target | None) -> float | None:
    """Microseconds that the GPU cost model predicts for a row; None for what it does not cover, such as a CPU."""
    problem, name = row.as_problem(), row.contender
    if problem is None or problem.device != "cuda" or name not in _PREDICTED or target is None:
        return None
    directions = [problem, problem.adjoint()] if row.mode == "step" else [problem]
    if name == "ours[triton]":
        best = (fastest(backends.get("triton").candidates(each, target)) for each in directions)
        times = [None if candidate is None else candidate.predicted_us for candidate in best]
        return None if None in times else sum(us for us in times if us is not None)
    algorithm = "eager" if name == "ours[eager]" else name
    return sum(cost.predict_us(algorithm, each, target) for each in directions)


def _run(name: str, results: Results, plots: Iterable[Path]) -> Iterable[str]:
    yield f"## {results.machine.get('name')} ({name})"
    yield _facts(results)
    yield from (f"![{plot.stem.replace('-', ' ')}]({plot.name})" for plot in plots)
    compared = pairs(results)
    if compared:
        yield "### Ours against the others"
        yield _summary_table(compared)
        yield "### Losses"
        yield _losses_table(losses(results))
    rows = results.of(suite="linear")
    for dtype in dict.fromkeys(row.problem["dtype"] for row in rows if row.problem):
        for mode in _MODE:
            some = [r for r in rows if r.mode == mode and r.problem and r.problem["dtype"] == dtype]
            if some:
                yield f"### One layer, {_MODE[mode]}, {dtype}"
                yield _price_table(some)
    titles = {
        "shared": "Layers that share an operand",
        "growth": "As one size grows (forward + backward)",
        "training": "Training steps",
        "overhead": "Host time of a call",
    }
    for suite, title in titles.items():
        if results.of(suite=suite):
            yield f"### {title}"
            yield _price_table(results.of(suite=suite))
    if results.of(suite="memory"):
        yield "### Memory of a step: bytes saved for the backward, and the peak of what it allocates"
        yield _memory_table(results.of(suite="memory"))
    predicted = predictions(results)
    if predicted:
        yield "### Predicted against measured"
        yield "The model is the one that chooses kernels: numbers of the architecture, with this device's bandwidth."
        yield from _predicted_tables(predicted)
    for title, reasons in (("Failed", results.failed), ("Not measured", results.left_out)):
        if reasons:
            yield f"### {title}"
            yield "\n".join(f"* {what}: {why}" for what, why in reasons.items())


def _facts(results: Results) -> str:
    machine = ", ".join(f"{k} {v}" for k, v in results.machine.items() if k != "name" and v != "")
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    rates = ", ".join(f"{name} {value:.4g}" for name, value in results.ceilings.items())
    return "\n".join(
        [
            f"* {machine}",
            f"* {versions}; commit {results.sha or 'unknown'}; {results.date}",
            *([f"* measured ceilings: {rates}"] if rates else []),
            *([f"* `{results.command}`"] if results.command else []),
        ]
    )


def _summary_table(compared: list[tuple[Row, Row]]) -> str:
    """Speed of what "auto" takes relative to each other contender, by dtype."""
    speeds: dict[tuple[str, str], list[float]] = {}
    for ours, other in compared:
        dtype = (ours.problem or {})["dtype"]
        speeds.setdefault((other.contender, dtype), []).append(other.value / ours.value)
    head = [
        "other",
        "dtype",
        "cases",
        "median speed",
        "least",
        "most",
        f"over {LOSS - 1:.0%} slower",
    ]
    lines = [
        [*who, str(len(found)), *_extremes(found), str(sum(LOSS * s < 1 for s in found))]
        for who, found in speeds.items()
    ]
    note = "The other's time divided by ours, where ours is the backend that `auto` takes."
    return f"{note}\n\n{_table(head, lines)}"


def _losses_table(lost: list[tuple[Row, Row]]) -> str:
    if not lost:
        return f"None: no other implementation was faster than ours by more than {LOSS - 1:.0%}."
    head = ["case", "M, K, N, R", "dtype", "mode", "ours", "other", "ours / other"]
    return _table(
        head,
        [
            [
                *(_label(ours), _sizes(ours), (ours.problem or {})["dtype"], ours.mode),
                f"{ours.contender} {_value(ours)}",
                f"{other.contender} {_value(other)}",
                f"{ours.value / other.value:.2f}",
            ]
            for ours, other in lost
        ],
    )


def _price_table(rows: list[Row]) -> str:
    names = list(dict.fromkeys(row.contender for row in rows if row.contender != "frozen"))
    with_share = any(row.ceiling_share for row in rows)
    head = ["case", "M, K, N, R", "frozen", *names] + ["ceiling"] * with_share
    lines = []
    for group in groups(rows):
        by_name = {row.contender: row for row in group}
        cells = [_label(group[0]), _sizes(group[0])]
        cells.append(_value(by_name["frozen"]) if "frozen" in by_name else "")
        for row in map(by_name.get, names):
            cells.append("" if row is None else f"{_ratio(row.to_floor)}×" + "*" * bool(row.auto))
        if with_share:
            cells.append("".join(_share(row.ceiling_share) for row in group if row.auto))
        lines.append(cells)
    return _table(head, lines)


def _memory_table(rows: list[Row]) -> str:
    names = list(dict.fromkeys(row.contender for row in rows))
    lines = []
    for group in groups(rows):
        by_name = {row.contender: row for row in group}
        cells = [_label(group[0]), _sizes(group[0]), group[0].mode]
        lines.append([*cells, *(_value(by_name[n]) if n in by_name else "" for n in names)])
    return _table(["case", "M, K, N, R", "", *names], lines)


def _predicted_tables(predicted: list[tuple[Row, float]]) -> Iterable[str]:
    by_contender: dict[tuple[str, str], list[float]] = {}
    for row, us in predicted:
        by_contender.setdefault((row.contender, row.mode), []).append(us / row.value)
    yield "Predicted time divided by measured time:"
    yield _table(
        ["contender", "mode", "rows", "median", "least", "most"],
        [[*who, str(len(found)), *_extremes(found)] for who, found in by_contender.items()],
    )
    yield _table(
        ["case", "M, K, N, R", "mode", "contender", "measured", "predicted", "ratio"],
        [
            [
                *(_label(row), _sizes(row), row.mode, row.contender, _value(row), _time(us)),
                f"{us / row.value:.2f}",
            ]
            for row, us in predicted
        ],
    )


def _label(row: Row) -> str:
    grown = f"{row.case} = {(row.problem or {})[row.case]}" if row.case in "MKNR" else row.case
    conditions = ", cold L2" * (row.caches == "cold") + ", graph" * row.graph
    mode = f", {row.mode}" if row.suite in ("overhead", "shared") else ""
    return grown + conditions + mode


def _sizes(row: Row) -> str:
    return ", ".join(str(row.problem[n]) for n in "MKNR") if row.problem else ""


def _table(head: list[str], lines: list[list[str]]) -> str:
    marks = ["---" if index < 2 else "---:" for index in range(len(head))]
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in [head, marks, *lines])
    if len(lines) <= _LONG:
        return text
    return f"<details><summary>{len(lines)} rows</summary>\n\n{text}\n\n</details>"


def _extremes(found: list[float]) -> list[str]:
    return [f"{value:.2f}" for value in (median(found), min(found), max(found))]


def _value(row: Row) -> str:
    return f"{row.value / 2**20:.2f} MiB" if row.unit == "bytes" else _time(row.value)


def _time(us: float) -> str:
    scale, unit = next(((s, u) for s, u in _UNITS if us >= s), (1.0, "µs"))
    return f"{us / scale:.3g} {unit}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"
