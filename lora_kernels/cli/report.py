"""`python -m lora_kernels report`: Markdown, plots, and a page with both, out of benchmark results."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lora_kernels.bench import page, plots, report, results
from lora_kernels.bench.progress import counted
from lora_kernels.bench.results import Results
from lora_kernels.cli import check_output, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("results", type=Path, nargs="+", help="result files, or folders of them")
    add(
        "--output",
        type=Path,
        help="folder for report.md, report.html and plots (default: the first folder)",
    )
    add("--format", choices=("png", "svg"), default="png", help="of the plots (default: png)")
    add("--no-plots", action="store_true", help="tables only: needs no matplotlib")
    add("--json", action="store_true", help="print the rows of all runs as JSON, and write nothing")


def run(args: argparse.Namespace) -> int:
    """0 when the report was written; 1 where a run has no plots because drawing them failed, 130 where it was stopped."""
    runs = {file: results.load(file) for file in results.find(args.results)}
    if args.json:
        print(json.dumps([row for each in runs.values() for row in each.flat()], indent=1))
        return 0
    first = args.results[0]
    output = args.output or (first if first.is_dir() else first.parent)
    check_output(output, is_file=False)
    files = output / "report.md", output / "report.html"
    for file in files:
        check_output(file, is_file=True)
    drawn: dict[Path, dict[Path, str]] = {}  # the SVG of each picture of a run
    code = 0
    try:
        if not args.no_plots:
            code = _draw(runs, output, args.format, drawn)
    except KeyboardInterrupt:
        say(f"stopped: the report has the plots of {len(drawn)} of {len(runs)} runs")
        code = 130
    text = report.markdown({file.stem: (each, drawn.get(file, {})) for file, each in runs.items()})
    drawings = {file.name: svg for each in drawn.values() for file, svg in each.items()}
    for file, content in zip(files, (text, page.html(text, drawings)), strict=True):
        file.write_text(content, encoding="utf-8")
        print(file)
    return code


def _draw(
    runs: dict[Path, Results], output: Path, suffix: str, drawn: dict[Path, dict[Path, str]]
) -> int:
    """1 where the plots of a run could not be drawn, which is said, and the others are; else 0."""
    code = 0
    for place, (file, each) in counted(runs.items()):
        try:
            drawn[file] = plots.draw(each, output, file.stem, suffix)
        except ModuleNotFoundError:
            raise
        except Exception as error:  # of one run's rows
            say(f"{place} FAILED the plots of {file.name}: {type(error).__name__}: {error}")
            code = 1
        else:
            say(f"{place} {len(drawn[file])} plots of {file.name}")
    return code
