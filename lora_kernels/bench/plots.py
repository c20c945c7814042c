"""Pictures of a run: LoRA's price over the frozen layer, how cost grows with each size, and the roofline."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_kernels.bench.report import groups
from lora_kernels.bench.results import Results, Row
from lora_kernels.bench.roofline import work

_COLOURS = {
    "reference": "#9aa0a6",
    "compiled": "#c58af9",
    "addmm": "#f2b134",
    "peft": "#e57373",
    "two_kernel": "#4db6ac",
    "one_launch": "#26a69a",
    "persistent": "#00796b",
    "persistent_one_launch": "#004d40",
    "loop": "#d0d4d9",
    "ours[eager]": "#64b5f6",
    "ours[cpu]": "#1a73e8",
    "ours[triton]": "#1a73e8",
    "ours[cuda]": "#0b3d91",
    "frozen": "#202124",
}
_MOST_BARS = 12  # cases in one line of panels
_MANY = 48  # cases of a dtype and mode that boxes stand for
_HIGHEST = 4.0  # a higher bar ends here and has its value written above it


def draw(results: Results, folder: Path, stem: str, suffix: str) -> dict[Path, str]:
    """Write the pictures that this run has rows for; returns their files, and each as SVG as well.

    ModuleNotFoundError names what is missing.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plots need matplotlib; or pass --no-plots") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    pictures = {
        "price": price(results, pyplot),
        "growth": growth(results, pyplot),
        "roofline": roofline(results, pyplot),
    }
    written = {}
    for what, figure in pictures.items():
        if figure is not None:
            file = folder / f"{stem}-{what}.{suffix}"
            figure.savefig(file, dpi=120)
            written[file] = _svg(figure, matplotlib)
            pyplot.close(figure)
    return written


def _svg(figure: Any, matplotlib: Any) -> str:
    """The figure as SVG with text as text, without a background, the same for the same rows."""
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lora_kernels"}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return text.getvalue()


def price(results: Results, pyplot: Any) -> Any:
    """Time over the frozen layer's by contender: bars for each problem, or boxes over many; a panel for a dtype and mode."""
    rows = [r for r in results.of(suite="linear") if r.contender != "frozen" and r.caches == "warm"]
    lines = list(_lines(list(_panels(rows))))
    if not lines:
        return None
    highest = min(_HIGHEST, max(row.to_floor_high or row.to_floor or 0.0 for row in rows))
    figure = pyplot.figure(figsize=(12, 3.8 * len(lines)), layout="constrained")
    shown: dict[str, Any] = {}
    for line, part in zip(
        lines, figure.subfigures(len(lines), 1, squeeze=False)[:, 0], strict=True
    ):
        widths = [_size(cases) for _, cases in line]
        axes = part.subplots(1, len(line), width_ratios=widths, squeeze=False)[0]
        for (title, cases), panel in zip(line, axes, strict=True):
            shown |= _boxes(cases, panel) if len(cases) > _MOST_BARS else _bars(cases, panel)
            panel.axhline(1.0, color=_COLOURS["frozen"], linewidth=1, linestyle="--")
            panel.set(title=title, ylim=(0, 1.08 * highest))
        axes[0].set_ylabel("time / frozen layer")
    figure.suptitle(f"What LoRA costs over the frozen layer (1.0): {results.machine['name']}")
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=len(shown))
    return figure


Cases = list[list[Row]]  # the rows of each problem


def _panels(rows: list[Row]) -> Iterator[tuple[str, Cases]]:
    """(title, cases) of each panel: a dtype and a mode, in pieces of a dozen where bars are drawn."""
    for dtype in dict.fromkeys(_of(row, "dtype") for row in rows):
        for mode, title in (("forward", "forward"), ("step", "forward + backward")):
            some = [row for row in rows if (row.mode, _of(row, "dtype")) == (mode, dtype)]
            cases = groups(some)
            piece = len(cases) if len(cases) > _MANY else _MOST_BARS
            for first in range(0, len(cases), piece):
                yield f"{title}, {dtype}", cases[first : first + piece]


def _lines(panels: list[tuple[str, Cases]]) -> Iterator[list[tuple[str, Cases]]]:
    """The panels line by line: side by side where they are of one dtype and fit beside each other."""
    line: list[tuple[str, Cases]] = []
    for title, cases in panels:
        full = sum(_size(some) for _, some in line) + _size(cases) > _MOST_BARS
        if line and (full or line[0][0].split(", ")[1] != title.split(", ")[1]):
            yield line
            line = []
        line.append((title, cases))
    if line:
        yield line


def _size(cases: Cases) -> int:
    return len(cases) if len(cases) <= _MOST_BARS else _MOST_BARS // 2


def _bars(cases: Cases, axes: Any) -> dict[str, Any]:
    """Draws a bar for each contender and case; what a legend shows, by name."""
    names = list(dict.fromkeys(row.contender for rows in cases for row in rows))
    width = 0.8 / len(names)
    shown: dict[str, Any] = {}
    for place, rows in enumerate(cases):
        for row in rows:
            at = place + (names.index(row.contender) - len(names) / 2 + 0.5) * width
            price = row.to_floor or 0.0
            low, high = row.to_floor_low or price, row.to_floor_high or price
            shown[row.contender] = axes.bar(
                at, min(price, _HIGHEST), width, color=_COLOURS.get(row.contender)
            )
            if price > _HIGHEST:
                axes.text(at, _HIGHEST, f"{price:.1f}", ha="center", va="bottom", fontsize=8)
            else:
                spread = [[max(0.0, price - low)], [max(0.0, high - price)]]
                axes.errorbar(at, price, spread, fmt="none", ecolor="#20212480", elinewidth=0.8)
    labels = [rows[0].case + " (graph)" * rows[0].graph for rows in cases]
    axes.set_xticks(range(len(cases)), labels, rotation=20, ha="right")
    return {name: shown[name] for name in names}


def _boxes(cases: Cases, axes: Any) -> dict[str, Any]:
    """Draws a box from quartile to quartile for each contender, with whiskers to its least and its most."""
    prices: dict[str, list[float]] = {}
    for row in (row for rows in cases for row in rows):
        prices.setdefault(row.contender, []).append(row.to_floor or 0.0)
    for place, found in enumerate(prices.values(), 1):
        if max(found) > _HIGHEST:
            axes.text(place, _HIGHEST, f"to {max(found):.1f}", ha="center", va="bottom", fontsize=8)
    boxes = axes.boxplot(prices.values(), whis=(0, 100), widths=0.6, patch_artist=True)["boxes"]
    axes.set_xticks(range(1, 1 + len(prices)), prices)
    for name, box in zip(prices, boxes, strict=True):
        box.set_facecolor(_COLOURS.get(name))
    axes.set_xlabel(f"{len(cases)} cases")
    return dict(zip(prices, boxes, strict=True))


def growth(results: Results, pyplot: Any) -> Any:
    """Lines: time of a step as one of M, K, N and R grows and the others stay."""
    from matplotlib import ticker

    rows = results.of(suite="growth")
    if not rows:
        return None
    figure, axes = pyplot.subplots(1, 4, figsize=(15, 4), layout="constrained")
    centre = [row for row in rows if row.case == "centre"]
    for letter, panel in zip("MKNR", axes, strict=True):
        sweep = centre + [row for row in rows if row.case == letter]
        for name in dict.fromkeys(row.contender for row in sweep):
            points = sorted((_of(r, letter), r.value / 1e3) for r in sweep if r.contender == name)
            panel.plot(
                *zip(*points, strict=True),
                marker="o",
                markersize=3,
                label=name,
                color=_COLOURS.get(name),
                linestyle="--" if name == "frozen" else "-",
            )
        fixed = ", ".join(f"{n}={_of(centre[0], n)}" for n in "MKNR" if n != letter)
        panel.set(xscale="log", yscale="log", xlabel=letter, title=f"{letter} grows ({fixed})")
        panel.title.set_fontsize(9)
        sizes = sorted({_of(row, letter) for row in sweep})
        panel.set_xticks(sizes, [str(size) for size in sizes], rotation=45, fontsize=8)
        panel.xaxis.set_minor_locator(ticker.NullLocator())
        for formatted in (panel.yaxis.set_major_formatter, panel.yaxis.set_minor_formatter):
            formatted(ticker.FuncFormatter(lambda ms, _: f"{ms:g}"))
        panel.yaxis.set_minor_locator(ticker.LogLocator(subs=(2.0, 5.0)))
        panel.grid(alpha=0.3)
    axes[0].set_ylabel("forward + backward, ms")
    axes[0].legend(fontsize=8)
    figure.suptitle(f"{results.machine['name']}, {_of(rows[0], 'dtype')}")
    return figure


def roofline(results: Results, pyplot: Any) -> Any:
    """Points: the rate each contender reaches over the arithmetic intensity of its problem, under the measured roof."""
    rows = [r for r in results.rows if r.suite in ("linear", "growth") and r.problem is not None]
    dtypes = [
        d for d in dict.fromkeys(_of(r, "dtype") for r in rows) if f"{d}_gflops" in results.ceilings
    ]
    if not dtypes:
        return None
    size = (6.5 * len(dtypes), 5)
    figure, all_axes = pyplot.subplots(
        1, len(dtypes), figsize=size, layout="constrained", squeeze=False
    )
    for dtype, axes in zip(dtypes, all_axes[0], strict=True):
        _roof([r for r in rows if _of(r, "dtype") == dtype], dtype, results.ceilings, axes)
    figure.suptitle(f"Roofline: {results.machine['name']}, measured ceilings")
    return figure


def _roof(rows: list[Row], dtype: str, ceilings: dict[str, float], axes: Any) -> None:
    peak, bandwidth = ceilings[f"{dtype}_gflops"], ceilings["copy_gbs"]
    shown = {"frozen": "x", "reference": "s"}
    shown |= {row.contender: "o" for row in rows if row.contender.startswith("ours")}
    lowest, highest = 1e9, 1.0
    for name, marker in shown.items():
        points = []
        for row in rows:
            problem = row.as_problem()
            if row.contender == name and problem is not None:
                flops, moved = work(problem, row.mode, lora=name != "frozen")
                points.append((flops / moved, flops / (1e3 * row.value)))
        if points:
            lowest = min(lowest, *(p[0] for p in points))
            highest = max(highest, *(p[0] for p in points))
            axes.scatter(
                *zip(*points, strict=True),
                s=16,
                marker=marker,
                label=name,
                color=_COLOURS.get(name),
            )
    ridge = peak / bandwidth
    left, right = min(lowest, ridge) / 2, max(highest, ridge) * 2
    roof = [left * bandwidth, peak, peak]
    axes.plot([left, ridge, right], roof, color=_COLOURS["frozen"], linewidth=1)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="operations a byte that must move",
        ylabel="1e9 operations a second",
        title=f"{dtype}: {peak:.0f} GFLOP/s, {bandwidth:.0f} GB/s",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _of(row: Row, name: str) -> Any:
    assert row.problem is not None
    return row.problem[name]
