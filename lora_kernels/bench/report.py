"""Tables out of results: Markdown for people, plain text for a terminal. What is lost is listed like what is won."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from lora_kernels.bench import contenders, cost_model
from lora_kernels.bench.results import Results, Row

_LOSS = 1.02  # slower than the fastest other by more than this is listed
_MODE = {"forward": "forward", "step": "forward + backward"}
_UNITS = ((1e6, "s"), (1e3, "ms"), (1.0, "µs"))


def markdown(runs: dict[str, tuple[Results, Sequence[Path]]]) -> str:
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
        star = "*" if row.auto else ""
        shown = _bytes(row.value) if row.unit == "bytes" else _time(row.value)
        lines.append(
            f"{row.case:<22}{row.mode:<9}{row.contender + star:<16}{shown:>12}{_plain(row.to_floor):>10}"
            f"{_plain(row.to_reference):>8}{_share(row.ceiling_share):>9}"
        )
    lines += [f"left out: {name}: {why}" for name, why in results.left_out.items()]
    return "\n".join(lines)


def losses(results: Results) -> list[tuple[Row, Row]]:
    """(our row that "auto" takes, the fastest other row) wherever another implementation was faster."""
    found = []
    for rows in _groups(results.of(suite="linear")).values():
        ours = [row for row in rows if row.auto]
        others = [row for row in rows if row.contender not in ("frozen", *contenders.OURS)]
        if ours and others:
            best = min(others, key=lambda row: row.value)
            if ours[0].value > _LOSS * best.value:
                found.append((ours[0], best))
    return found


def predictions(results: Results) -> list[tuple[Row, float]]:
    """(row, predicted microseconds) of every linear and growth row that a cost model covers."""
    found = []
    for row in results.rows:
        problem = row.as_problem()
        if problem is None or row.suite not in ("linear", "growth") or row.caches == "cold":
            continue
        if problem.device == "cuda":
            architecture = str(results.machine.get("architecture", ""))
            us = cost_model.predict_gpu_us(row.contender, problem, row.mode, architecture)
        else:
            us = cost_model.predict_cpu_us(row.contender, problem, row.mode, results.ceilings)
        if us is not None:
            found.append((row, us))
    return found


def _run(name: str, results: Results, plots: Sequence[Path]) -> Iterable[str]:
    machine = results.machine
    yield f"## {machine.get('name')} ({name})"
    yield _facts(results)
    yield from (f"![{_alt(plot)}]({plot.name})" for plot in plots)
    rows = results.of(suite="linear")
    for dtype in dict.fromkeys(row.problem["dtype"] for row in rows if row.problem):
        for mode in _MODE:
            some = [r for r in rows if r.mode == mode and r.problem and r.problem["dtype"] == dtype]
            if some:
                yield f"### One layer, {_MODE[mode]}, {dtype}"
                yield _price_table(some)
    if rows:
        yield "### Losses"
        yield _losses_table(losses(results))
    if results.of(suite="growth"):
        yield "### As one size grows (forward + backward)"
        yield _price_table(results.of(suite="growth"))
    for suite, title in (("training", "Training steps"), ("overhead", "Host time of a call")):
        if results.of(suite=suite):
            yield f"### {title}"
            yield _price_table(results.of(suite=suite))
    if results.of(suite="memory"):
        yield "### Memory of a step: bytes saved for the backward, and the peak of what it allocates"
        yield _memory_table(results.of(suite="memory"))
    predicted = predictions(results)
    if predicted:
        yield "### Predicted against measured"
        yield _predicted_tables(predicted, str(machine["device"]))
    if results.failed:
        yield "### Failed"
        yield "\n".join(f"* {name}: {why}" for name, why in results.failed.items())
    if results.left_out:
        yield "### Not measured"
        yield "\n".join(f"* {name}: {why}" for name, why in results.left_out.items())


def _facts(results: Results) -> str:
    machine = ", ".join(f"{k} {v}" for k, v in results.machine.items() if k != "name" and v != "")
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    rates = ", ".join(f"{name} {value:.4g}" for name, value in results.ceilings.items())
    return "\n".join(
        [
            f"* {machine}",
            f"* {versions}; commit {results.sha or 'unknown'}; {results.date}",
            f"* measured ceilings: {rates}",
            f"* `{results.command}`" if results.command else "",
        ]
    ).rstrip()


def _price_table(rows: list[Row]) -> str:
    names = list(dict.fromkeys(row.contender for row in rows if row.contender != "frozen"))
    with_share = any(row.ceiling_share for row in rows)
    head = ["case", "M, K, N, R", "frozen", *names] + ["ceiling"] * with_share
    lines = []
    for group in _groups(rows).values():
        by_name = {row.contender: row for row in group}
        first = group[0]
        frozen = by_name.get("frozen")
        cells = [_label(first), _sizes(first), _time(frozen.value) if frozen else ""]
        for name in names:
            row = by_name.get(name)
            star = "*" if row and row.auto else ""
            cells.append("" if row is None else f"{row.to_floor:.2f}×{star}")
        if with_share:
            ours = [row for row in group if row.auto]
            cells.append(_share(ours[0].ceiling_share) if ours else "")
        lines.append(cells)
    return _table(head, lines)


def _losses_table(lost: list[tuple[Row, Row]]) -> str:
    if not lost:
        return f"None: no other implementation was faster than ours by more than {_LOSS - 1:.0%}."
    head = ["case", "M, K, N, R", "mode", "ours", "fastest other", "ours / other"]
    return _table(
        head,
        [
            [
                _label(ours),
                _sizes(ours),
                ours.mode,
                f"{ours.contender} {_time(ours.value)}",
                f"{best.contender} {_time(best.value)}",
                f"{ours.value / best.value:.2f}",
            ]
            for ours, best in lost
        ],
    )


def _memory_table(rows: list[Row]) -> str:
    names = list(dict.fromkeys(row.contender for row in rows))
    lines = []
    for group in _groups(rows).values():
        by_name = {row.contender: row for row in group}
        cells = [_label(group[0]), _sizes(group[0]), group[0].mode]
        lines.append([*cells, *(_bytes(by_name[n].value) if n in by_name else "" for n in names)])
    return _table(["case", "M, K, N, R", "", *names], lines)


def _predicted_tables(predicted: list[tuple[Row, float]], device: str) -> str:
    how = (
        "The model knows this machine only by the ceilings above, and was fitted to none of these rows."
        if device == "cpu"
        else "The model is the one that chooses kernels; it knows the architecture, not this device."
    )
    by_contender: dict[tuple[str, str], list[float]] = {}
    for row, us in predicted:
        by_contender.setdefault((row.contender, row.mode), []).append(us / row.value)
    summary = [
        [
            name,
            mode,
            str(len(found)),
            f"{median(found):.2f}",
            f"{min(found):.2f}",
            f"{max(found):.2f}",
        ]
        for (name, mode), found in by_contender.items()
    ]
    lines = [
        [
            _label(row),
            _sizes(row),
            row.mode,
            row.contender,
            _time(row.value),
            _time(us),
            f"{us / row.value:.2f}",
        ]
        for row, us in predicted
    ]
    return "\n\n".join(
        [
            how + " Predicted time divided by measured time:",
            _table(["contender", "mode", "rows", "median", "least", "most"], summary),
            "<details><summary>Every row</summary>",
            _table(
                ["case", "M, K, N, R", "mode", "contender", "measured", "predicted", "ratio"], lines
            ),
            "</details>",
        ]
    )


def _groups(rows: list[Row]) -> dict[Any, list[Row]]:
    """Rows of one measurement together: the same case, mode, problem and conditions."""
    found: dict[Any, list[Row]] = {}
    for row in rows:
        key = tuple(part for index, part in enumerate(row.key) if index != 3)
        found.setdefault(key, []).append(row)
    return found


def _label(row: Row) -> str:
    grown = f"{row.case} = {(row.problem or {})[row.case]}" if row.case in "MKNR" else row.case
    conditions = ", cold L2" * (row.caches == "cold") + ", graph" * row.graph
    mode = f", {row.mode}" if row.suite == "overhead" else ""
    return grown + conditions + mode


def _sizes(row: Row) -> str:
    return ", ".join(str(row.problem[n]) for n in "MKNR") if row.problem else ""


def _table(head: list[str], lines: list[list[str]]) -> str:
    marks = ["---" if index < 2 else "---:" for index in range(len(head))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, marks, *lines])


def _time(us: float) -> str:
    scale, unit = next(((s, u) for s, u in _UNITS if us >= s), (1.0, "µs"))
    return f"{us / scale:.3g} {unit}"


def _bytes(value: float) -> str:
    return f"{value / 2**20:.2f} MiB"


def _plain(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def _alt(plot: Path) -> str:
    return plot.stem.replace("-", " ")
