"""`python -m lora_kernels bench`: measure, print a table, write JSON, or compare with an earlier run."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_kernels.problem import ITEMSIZE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from lora_kernels.bench import contenders, linear, presets, run

    add = parser.add_argument
    add("--preset", choices=presets.PRESETS, help="a named set of problems")
    add("--shape", type=int, nargs=4, action="append", metavar=("M", "K", "N", "R"))
    add("--dtype", action="append", choices=[*ITEMSIZE], help="repeatable (default: the preset's)")
    add("--adapter-dtype", choices=[*ITEMSIZE], help="of A and B, with --shape")
    add("--mode", action="append", choices=linear.MODES, help="with --shape (default: both)")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    add("--contender", action="append", choices=(*contenders.NAMES, "ours"), help="repeatable")
    add("--suite", action="append", choices=run.SUITES, help="repeatable (default: by preset)")
    add("--seconds", type=float, default=1.0, help="of measuring each case (default: 1)")
    add("--rounds", type=int, default=7, help="of each case at least (default: 7)")
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
    from lora_kernels.bench import compare, report, results
    from lora_kernels.bench import run as runner

    if args.seconds <= 0 or args.rounds < 3:
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

    def keep(so_far: Any) -> None:
        if args.output is not None:
            results.save(so_far, _file(args, so_far))

    found = runner.run(order, _say, keep)
    keep(found)
    if args.output is not None:
        _say(f"written to {_file(args, found)}")
    for what, why in found.failed.items():
        _say(f"FAILED {what}: {why}")
    verdicts: list[Any] = []
    if baseline is not None:
        verdicts = compare.compare(baseline, found, args.fail_over, _again(order, found))
        if baseline.machine.get("name") != found.machine.get("name"):
            _say(f"the baseline is of another machine: {baseline.machine.get('name')}")
    if args.json:
        told = [{**asdict(v), "change": v.change} for v in verdicts]
        print(json.dumps({**asdict(found), "comparison": told}, indent=1))
    else:
        print("\n".join(map(str, verdicts)) if baseline is not None else report.plain_table(found))
    return 1 if found.failed or any(verdict.slower for verdict in verdicts) else 0


def device_of(asked: str | None) -> str:
    """ "cuda" where asked for or by default where there is a GPU. RuntimeError where it is asked for and there is none."""
    import torch

    if asked == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("--device cuda needs a GPU that PyTorch can use, and there is none")
    return asked or ("cuda" if torch.cuda.is_available() else "cpu")


def _order(args: argparse.Namespace, baseline: Any) -> Any:
    from dataclasses import replace

    from lora_kernels.bench import compare, linear, presets
    from lora_kernels.bench import run as runner

    dtypes = tuple(args.dtype or ())
    if baseline is not None:
        device = device_of(baseline.machine["device"])
        cases, names = compare.cases_of(baseline), compare.names_of(baseline)
    else:
        device, names = device_of(args.device), tuple(args.contender or presets.ALL)
        default = "gpu" if device == "cuda" else "laptop"
        preset = args.preset or (None if args.shape else default)
        if preset == "gpu" and device != "cuda":
            raise RuntimeError("--preset gpu needs a GPU that PyTorch can use")
        cases = [] if preset is None else presets.cases(preset, device, dtypes)
        shapes = [tuple(shape) for shape in args.shape or ()]
        for shape in shapes:
            if min(shape) < 1:
                raise ValueError(f"--shape must be four positive numbers, got {shape}")
        cases += presets.shape_cases(
            shapes, device, dtypes or ("float32",), tuple(args.mode or ()), args.adapter_dtype
        )
        if args.cold or args.graph:
            linear.clock_for(device, args.cold, args.graph)
            cases = [replace(case, cold=args.cold, graph=args.graph) for case in cases]
    everything = baseline is None and not args.shape and args.preset in (None, "laptop", "gpu")
    suites = runner.SUITES if everything else ("linear", "growth")
    return runner.Order(
        device=device,
        cases=cases,
        suites=tuple(args.suite or suites),
        names=names,
        effort=linear.Effort(args.seconds, (args.rounds, 200)),
        dtypes=dtypes or (("bfloat16",) if device == "cuda" else ("float32",)),
        command="python -m lora_kernels " + shlex.join(sys.argv[1:]),
    )


def _again(order: Any, found: Any) -> Any:
    """Measures a row of a baseline once more, three times as long."""
    from lora_kernels.bench import run as runner

    def again(row: Any) -> Any:
        case = next(
            case
            for case in order.cases
            if (case.label, case.mode, case.suite, case.problem, case.cold, case.graph)
            == (row.case, row.mode, row.suite, row.as_problem(), row.caches == "cold", row.graph)
        )
        _say(f"looking again: {case.label} {case.mode} {row.contender}")
        rows = runner.case_rows(case, (row.contender,), order.effort.times(3), found)
        return next((new for new in rows if new.key == row.key), None)

    return again


def _file(args: argparse.Namespace, found: Any) -> Path:
    if args.output.suffix == ".json":
        return args.output
    machine = re.sub(r"[^a-z0-9]+", "-", str(found.machine["name"]).lower()).strip("-")
    what = args.preset or ("shapes" if args.shape else "comparison" if args.compare else "default")
    return args.output / f"{machine}-{what}.json"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
