"""`python -m lora_kernels report`: Markdown and plots out of benchmark results."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lora_kernels.bench import plots, report, results
from lora_kernels.cli import check_output, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("results", type=Path, nargs="+", help="result files, or folders of them")
    add("--output", type=Path, help="folder for report.md and plots (default: the first folder)")
    add("--format", choices=("png", "svg"), default="png", help="of the plots (default: png)")
    add("--no-plots", action="store_true", help="tables only: needs no matplotlib")
    add("--json", action="store_true", help="print the rows of all runs as JSON, and write nothing")


def run(args: argparse.Namespace) -> int:
    """0 when the report was written."""
    runs = {file: results.load(file) for file in results.find(args.results)}
    if args.json:
        print(json.dumps([row for each in runs.values() for row in each.flat()], indent=1))
        return 0
    first = args.results[0]
    output = args.output or (first if first.is_dir() else first.parent)
    check_output(output, is_file=False)
    check_output(output / "report.md", is_file=True)
    drawn: dict[Path, list[Path]] = {}
    if not args.no_plots:
        for file, each in runs.items():
            drawn[file] = plots.draw(each, output, file.stem, args.format)
            say(f"{len(drawn[file])} plots of {file.name}")
    text = report.markdown({file.stem: (each, drawn.get(file, [])) for file, each in runs.items()})
    (output / "report.md").write_text(text, encoding="utf-8")
    print(output / "report.md")
    return 0
