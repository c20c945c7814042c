"""`python -m lora_kernels bench`: measure, print a table, write JSON, or compare with an earlier run."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from lora_kernels.bench import compare, contenders, linear, presets, report, results, shared
from lora_kernels.bench import run as runner
from lora_kernels.bench.clock import clock_for
from lora_kernels.bench.compare import Verdict
from lora_kernels.bench.results import Results, Row
from lora_kernels.bench.run import Order
from lora_kernels.cli import check_output, check_sizes, device_of, say
from lora_kernels.problem import ITEMSIZE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--preset", choices=(*presets.PRESETS, *shared.PRESETS), help="a named set of problems")
    add("--shape", type=int, nargs=4, action="append", metavar=("M", "K", "N", "R"))
    add("--dtype", action="append", choices=[*ITEMSIZE], help="repeatable (default: the preset's)")
    add("--adapter-dtype", choices=[*ITEMSIZE], help="of A and B, with --shape")
    add("--mode", action="append", choices=linear.MODES, help="with --shape (default: both)")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    add("--contender", action="append", choices=(*contenders.NAMES, "ours"), help="repeatable")
    add("--suite", action="append", choices=runner.SUITES, help="repeatable (default: by preset)")
    add("--seconds", type=float, default=1.0, help="of measuring each case (default: 1)")
    add(
        "--rounds",
        type=int,
        default=7,
        help="of each case at least (default: 7; 3 of one that takes more than 20 seconds)",
    )
    add("--cold", action="store_true", help="GPU: overwrite L2 before every call")
    add("--graph", action="store_true", help="GPU: replay a captured graph")
    add("--output", type=Path, help="a folder, or a file named .json, for the results")
    add("--json", action="store_true", help="print the results as JSON")
    add("--compare", type=Path, metavar="BASELINE", help="measure an earlier run's problems again")
    add(
        "--fail-over", type=float, default=1.10, help="factor that counts as slower (default: 1.10)"
    )


def run(args: argparse.Namespace) -> int:
    """0; 1 where one of our backends failed or was wrong, or --compare found something slower or missing."""
    if not args.seconds > 0 or args.rounds < 3:
        raise ValueError(
            f"--seconds must be positive and --rounds at least 3, got {args.seconds} and {args.rounds}"
        )
    baseline = None
    if args.compare is not None:
        if args.preset or args.shape or args.suite:
            raise ValueError(
                "--compare measures the baseline's own problems: no preset, shape, suite"
            )
        if not args.fail_over > 1.0:
            raise ValueError(f"--fail-over must be more than 1, got {args.fail_over}")
        baseline = results.load(results.find([args.compare])[0])
    order = _order(args, baseline)
    is_file = args.output is not None and args.output.suffix == ".json"
    check_output(args.output, is_file)

    def file(found: Results) -> Path:
        if is_file:
            return args.output
        machine = re.sub(r"[^a-z0-9]+", "-", str(found.machine["name"]).lower()).strip("-")
        what = "shapes" if args.shape else "comparison" if args.compare else "default"
        return args.output / f"{machine}-{args.preset or what}.json"

    kept: list[Results] = []

    def keep(so_far: Results) -> None:
        kept[:] = [so_far]
        if args.output is not None:
            results.save(so_far, file(so_far))

    try:
        keep(runner.run(order, say, keep))
    except KeyboardInterrupt:
        if not kept:
            raise
        return _stopped(kept[0], args, file(kept[0]) if args.output is not None else None)
    (found,) = kept
    if args.output is not None:
        say(f"written to {file(found)}")
    for what, why in found.failed.items():
        say(f"FAILED {what}: {why}")
    verdicts: list[Verdict] = []
    if baseline is not None:
        verdicts = compare.compare(baseline, found, args.fail_over, _again(order, found))
        for fact in ("name", "capability", "threads"):  # two processors may have one name
            then, now = baseline.machine.get(fact), found.machine.get(fact)
            if then != now:
                say(f"the baseline is of another machine: its {fact} is {then}, here it is {now}")
    if args.json:
        comparison = [{**asdict(v), "change": v.change} for v in verdicts]
        print(json.dumps({**asdict(found), "comparison": comparison}, indent=1))
    else:
        print("\n".join(map(str, verdicts)) if baseline is not None else report.plain_table(found))
    return 1 if found.failed or any(verdict.slower for verdict in verdicts) else 0


def _stopped(found: Results, args: argparse.Namespace, file: Path | None) -> int:
    """130, after what was measured was printed; a comparison of a part of it would call the rest missing."""
    say(f"stopped: {len(found.rows)} rows were measured" + (f", in {file}" if file else ""))
    print(json.dumps(asdict(found), indent=1) if args.json else report.plain_table(found))
    return 130


def _order(args: argparse.Namespace, baseline: Results | None) -> Order:
    dtypes = tuple(args.dtype or ())
    preset = None
    if baseline is not None:
        device = device_of(baseline.machine["device"])
        cases, names = compare.cases_of(baseline), compare.names_of(baseline)
    else:
        device = device_of(args.device)
        default = "gpu" if device == "cuda" else "laptop"
        preset = args.preset or (None if args.shape else default)
        if preset == "gpu" and device != "cuda":
            raise RuntimeError("--preset gpu needs a GPU that PyTorch can use")
        names = tuple(args.contender or presets.names(preset))
        cases = presets.cases(preset, device, dtypes) if preset in presets.PRESETS else []
        shapes = [tuple(shape) for shape in args.shape or ()]
        for shape in shapes:
            check_sizes(shape, 1)
        cases += presets.shape_cases(
            shapes, device, dtypes or ("float32",), tuple(args.mode or ()), args.adapter_dtype
        )
        if args.cold or args.graph:
            clock_for(device, args.cold, args.graph)
            cases = [replace(case, cold=args.cold, graph=args.graph) for case in cases]
    everything = preset in ("laptop", "gpu") and not args.shape
    suites = runner.SUITES if everything else ("linear", "growth")
    return Order(
        device=device,
        cases=cases,
        suites=tuple(args.suite or suites),
        names=names,
        effort=linear.Effort(args.seconds, (args.rounds, 200)),
        dtypes=dtypes or (shared.DTYPES if preset in shared.PRESETS else presets.DTYPES[device]),
        shared=(preset,) if preset in shared.PRESETS else (),
        command="python -m lora_kernels " + shlex.join(sys.argv[1:]),
    )


def _again(order: Order, found: Results) -> Callable[[Row], Row | None]:
    """Measures a row of a baseline once more, three times as long."""

    def again(row: Row) -> Row | None:
        case = next(case for case in order.cases if case == compare.case_of(row))
        say(f"measuring again: {case.label} {case.mode} {row.contender}")
        rows = runner.case_rows(case, (row.contender,), order.effort.times(3), found)
        return next((new for new in rows if new.key == row.key), None)

    return again
