"""Pictures of a run: LoRA's price over the frozen layer, how cost grows with each size, and the roofline."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_kernels.bench import cost_model
from lora_kernels.bench.results import Results, Row

_COLOURS = {
    "reference": "#9aa0a6",
    "compiled": "#c58af9",
    "addmm": "#f2b134",
    "peft": "#e57373",
    "expand_first": "#8d6e63",
    "two_kernel": "#4db6ac",
    "ours[eager]": "#64b5f6",
    "ours[cpu]": "#1a73e8",
    "ours[triton]": "#1a73e8",
    "ours[cuda]": "#0b3d91",
    "frozen": "#202124",
}
_MOST_BARS = 12  # cases in one panel
_FEWEST_PLACES = 5  # a panel with fewer cases leaves room, or its bars are walls


def draw(results: Results, folder: Path, stem: str, suffix: str = "png") -> list[Path]:
    """Write the pictures that this run has rows for. ModuleNotFoundError names what is missing."""
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
    written = []
    for what, figure in pictures.items():
        if figure is not None:
            file = folder / f"{stem}-{what}.{suffix}"
            figure.savefig(file, dpi=120)
            pyplot.close(figure)
            written.append(file)
    return written


def price(results: Results, pyplot: Any) -> Any:
    """Bars: time over the frozen layer's by problem and contender, one panel for forward, one for steps."""
    rows = [r for r in results.of(suite="linear") if r.contender != "frozen" and r.caches == "warm"]
    panels = list(_panels(rows))
    if not panels:
        return None
    size = (12, 3.6 * len(panels))
    figure, all_axes = pyplot.subplots(
        len(panels), 1, figsize=size, layout="constrained", squeeze=False
    )
    shown: dict[str, Any] = {}
    for (title, some), axes in zip(panels, all_axes[:, 0], strict=True):
        shown |= _bars(some, axes)
        axes.set(ylabel="time / frozen layer", title=title)
    figure.suptitle(f"What LoRA costs over the frozen layer: {results.machine['name']}")
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=len(shown))
    return figure


def _panels(rows: list[Row]) -> Iterator[tuple[str, list[Row]]]:
    """(title, rows) of each panel: one dtype, one mode, a dozen cases."""
    for dtype in dict.fromkeys(_of(row, "dtype") for row in rows):
        for mode, title in (("forward", "forward"), ("step", "forward + backward")):
            some = [row for row in rows if row.mode == mode and _of(row, "dtype") == dtype]
            cases = list(dict.fromkeys((row.case, row.graph) for row in some))
            for first in range(0, len(cases), _MOST_BARS):
                here = cases[first : first + _MOST_BARS]
                yield f"{title}, {dtype}", [row for row in some if (row.case, row.graph) in here]


def _bars(rows: list[Row], axes: Any) -> dict[str, Any]:
    """Draws one panel; what a legend shows, by name."""
    cases = list(dict.fromkeys((row.case, row.graph) for row in rows))
    names = list(dict.fromkeys(row.contender for row in rows))
    width = 0.8 / len(names)
    shown: dict[str, Any] = {}
    for index, name in enumerate(names):
        found = {(r.case, r.graph): r for r in rows if r.contender == name}
        places = [i for i, case in enumerate(cases) if case in found]
        mine = [found[cases[i]] for i in places]
        offsets = [i + (index - len(names) / 2 + 0.5) * width for i in places]
        heights = [row.to_floor or 0.0 for row in mine]
        spread = [
            [max(0.0, h - (r.to_floor_low or h)) for h, r in zip(heights, mine, strict=True)],
            [max(0.0, (r.to_floor_high or h) - h) for h, r in zip(heights, mine, strict=True)],
        ]
        shown[name] = axes.bar(offsets, heights, width, color=_COLOURS.get(name))
        axes.errorbar(offsets, heights, spread, fmt="none", ecolor="#20212480", elinewidth=0.8)
    floor = axes.axhline(1.0, color=_COLOURS["frozen"], linewidth=1, linestyle="--")
    labels = [case + (" (graph)" if graph else "") for case, graph in cases]
    axes.set_xticks(range(len(cases)), labels, rotation=20, ha="right")
    highest = sorted(row.to_floor or 0.0 for row in rows)[int(0.95 * (len(rows) - 1))]
    axes.set_ylim(0, max(1.2, 1.15 * highest))
    axes.set_xlim(-0.6, max(len(cases), _FEWEST_PLACES) - 0.4)
    return {"frozen": floor, **shown}


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
                flops, moved = cost_model.work(problem, row.mode, lora=name != "frozen")
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
