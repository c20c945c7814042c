"""`python -m lora_kernels tune`: time the candidate tiles of a GPU, and write its table into the user's cache."""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from lora_kernels import backends
from lora_kernels.backends.triton.configs import tiles_of
from lora_kernels.bench.linear import Effort, first_line
from lora_kernels.bench.presets import MODELS
from lora_kernels.bench.progress import counted
from lora_kernels.bench.tiles import LowRank, Measured, Product
from lora_kernels.cli import check_output, check_sizes, say
from lora_kernels.problem import DENSE, ITEMSIZE, Problem
from lora_kernels.samples import SAMPLES
from lora_kernels.tuning import tables
from lora_kernels.tuning.search import search, search_lowrank
from lora_kernels.tuning.tables import Entry, bucket, lowrank

ROWS = (16, 32, 64, 512, 2048, 8192)
DTYPES = [name for name in ITEMSIZE if name != "float64"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--preset", choices=[*MODELS], action="append", help="a model's projections; repeatable")
    add("--shape", type=int, nargs=4, action="append", metavar=("M", "K", "N", "R"))
    add("--rows", type=int, action="append", help=f"of x, with --preset; repeatable ({ROWS})")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of x, W and y (default: bfloat16)")
    add("--adapter-dtype", choices=DTYPES, help="of A and B (default: --dtype)")
    add("--weight", choices=(DENSE, *SAMPLES), default=DENSE, help="W's format (default: dense)")
    add("--seconds", type=float, default=0.3, help="for each set of candidates (default: 0.3)")
    add("--dry-run", action="store_true", help="measure, but write no table")
    add("--output", type=Path, help="write everything that was measured to this JSON file as well")
    add("--json", action="store_true", help="print everything that was measured as JSON")


def run(args: argparse.Namespace) -> int:
    """0; 1 where a candidate gave a wrong result or failed: it is left out of the table and listed."""
    problems = _problems(args)
    if not args.seconds > 0:
        raise ValueError(f"--seconds must be positive, got {args.seconds}")
    if not torch.cuda.is_available():
        raise RuntimeError("tune needs a GPU that PyTorch can use, and there is none")
    from lora_kernels.backends.device import current_target

    reason = backends.get("triton").unavailable()
    if reason is not None:
        raise RuntimeError(f"tune times Triton kernels: {reason}")
    target = current_target()
    check_output(args.output, is_file=True)
    if not args.dry_run:
        check_output(tables.path(target), is_file=True, option="LORA_KERNELS_CACHE")

    def as_text(measured: list[dict[str, Any]]) -> str:
        return json.dumps({"target": asdict(target), "measured": measured}, indent=1)

    def keep(entries: list[Entry], measured: list[dict[str, Any]]) -> None:
        if entries and not args.dry_run:
            tables.save(entries, target)
        if args.output is not None:
            args.output.write_text(as_text(measured) + "\n", encoding="utf-8")

    stopped = False
    kept: Kept = ([], [], [])
    entries, measured, failures = kept
    try:
        tune(problems, target, args.seconds, keep=keep, into=kept)
    except KeyboardInterrupt:
        stopped = True
        say(f"stopped: {len(measured)} measurements were made")
    if entries and not args.dry_run:
        say(f"{len(entries)} entries written to {tables.path(target)}")
    if args.json:
        print(as_text(measured))
    for failure in failures:
        say(f"NOT COUNTED {failure}")
    return 130 if stopped else 1 if failures else 0


Kept = tuple[list[Entry], list[dict[str, Any]], list[str]]


def tune(
    problems: list[Problem],
    target: Any,
    seconds: float,
    device: str = "cuda",
    clock: Any = None,
    keep: Callable[[list[Entry], list[dict[str, Any]]], object] = lambda entries, measured: None,
    into: Kept | None = None,
) -> Kept:
    """(table entries, all that was measured, failures in words): each product, and the low-rank kernels of each x or dy.

    `keep` gets the first two after each problem, in case it is the last; the lists are those of `into`, which an interrupt
    leaves with what was complete. A problem that cannot be measured at all is a failure, and the others go on.
    """
    effort = Effort(seconds)
    entries, measured, failures = into or ([], [], [])
    problems = [*problems, *dict.fromkeys(map(lowrank, problems))]
    for place, problem in counted(problems):
        alone = problem == lowrank(problem)
        try:
            subject: Measured = LowRank(problem, device) if alone else Product(problem, device)
            measure = functools.partial(subject.measure, effort=effort, clock=clock)
            if alone:
                entry, done = search_lowrank(problem, target, measure, tiles_of)
            else:
                entry, done = search(problem, target, measure, tiles_of, _untiled(problem, target))
        except Exception as error:  # such as too little memory for this one
            failures.append(f"{problem}: {type(error).__name__}: {first_line(error)}")
            say(f"{place} {failures[-1]}")
            continue
        if entry is not None:
            entries.append(entry)
        layout = "x·A, xᵀ·q" if alone else "x·W" if problem.w_k_major else "dy·Wᵀ"
        found = min(entry.times, key=entry.times.__getitem__) if entry else "nothing works"
        chosen = "each alone" if entry and alone else found
        say(f"{place} {layout} {problem}: {chosen}")
        for timed in sorted(done, key=lambda timed: timed.us or float("inf")):
            say(f"    {timed}")
            failures += [f"{problem}: {timed}"] if timed.us is None else []
            measured.append(
                {
                    "problem": asdict(problem),
                    "algorithm": timed.choice.algorithm,
                    "configs": [asdict(config) for config in timed.choice.tiles.configs],
                    "us": timed.us,
                    "failure": timed.failure,
                }
            )
        keep(entries, measured)
    return entries, measured, failures


def _untiled(problem: Problem, target: Any) -> tuple[str, ...]:
    """The algorithms without tiles that can compute `problem` here."""
    both = (backends.get(name) for name in ("cuda", "eager"))
    usable = (b.candidates(problem, target) for b in both if b.unavailable() is None)
    return tuple(c.name for candidates in usable for c in candidates if c.refusal is None)


def _problems(args: argparse.Namespace) -> list[Problem]:
    """Each layer's forward product and that of its backward, whose W lies the other way; M taken to its bucket."""
    presets = args.preset or ([] if args.shape else ["llama-3-8b"])
    shapes = [tuple(shape) for shape in args.shape or ()]
    for name in presets:
        model = MODELS[name]
        shapes += [
            (M, K, N, model.rank) for M in args.rows or ROWS for _, K, N in model.projections
        ]
    found: dict[Problem, None] = {}
    for shape in shapes:
        check_sizes(shape, 1)
        M, K, N, R = shape
        types = args.dtype, args.adapter_dtype or args.dtype, "cuda"
        forward = Problem(bucket(M), N, K, R, *types, weight_format=args.weight)
        found[forward] = None
        found[replace(forward.adjoint(), backward=False)] = None
    return list(found)
