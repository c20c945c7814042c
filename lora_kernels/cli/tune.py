"""`python -m lora_kernels tune`: time the candidate tiles of a GPU, and write its table into the user's cache."""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_kernels.problem import ITEMSIZE, Problem

ROWS = (16, 32, 64, 512, 2048, 8192)
DTYPES = [name for name in ITEMSIZE if name != "float64"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from lora_kernels.bench.presets import MODELS

    add = parser.add_argument
    add("--preset", choices=[*MODELS], action="append", help="a model's projections; repeatable")
    add("--shape", type=int, nargs=4, action="append", metavar=("M", "K", "N", "R"))
    add("--rows", type=int, action="append", help=f"of x, with --preset; repeatable ({ROWS})")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of x, W and y (default: bfloat16)")
    add("--adapter-dtype", choices=DTYPES, help="of A and B (default: --dtype)")
    add("--seconds", type=float, default=0.3, help="for each set of candidates (default: 0.3)")
    add("--dry-run", action="store_true", help="measure, but write no table")
    add("--output", type=Path, help="write everything that was measured to this JSON file as well")
    add("--json", action="store_true", help="print everything that was measured as JSON")


def run(args: argparse.Namespace) -> int:
    """0; 1 where a candidate gave a wrong result or failed: it is left out of the table and listed."""
    import torch

    from lora_kernels.tuning import tables

    problems = _problems(args)
    if args.seconds <= 0:
        raise ValueError(f"--seconds must be positive, got {args.seconds}")
    if not torch.cuda.is_available():
        raise RuntimeError("tune needs a GPU that PyTorch can use, and there is none")
    from lora_kernels import plan
    from lora_kernels.backends.device import current_target

    reason = plan.get("triton").unavailable()
    if reason is not None:
        raise RuntimeError(f"tune times Triton kernels: {reason}")
    target = current_target()

    def as_text(told: list[dict[str, Any]]) -> str:
        return json.dumps({"target": asdict(target), "measured": told}, indent=1)

    def keep(entries: list[Any], told: list[dict[str, Any]]) -> None:
        if entries and not args.dry_run:
            tables.save(entries, target)
        if args.output is not None:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(as_text(told) + "\n", encoding="utf-8")

    entries, told, failures = tune(problems, target, args.seconds, keep=keep)
    if entries and not args.dry_run:
        _say(f"{len(entries)} entries written to {tables.path(target)}")
    if args.json:
        print(as_text(told))
    for failure in failures:
        _say(f"NOT COUNTED {failure}")
    return 1 if failures else 0


def tune(
    problems: list[Problem],
    target: Any,
    seconds: float,
    device: str = "cuda",
    clock: Any = None,
    keep: Callable[[list[Any], list[dict[str, Any]]], object] = lambda entries, told: None,
) -> tuple[list[Any], list[dict[str, Any]], list[str]]:
    """(table entries, all that was measured, failures in words): each product, and the narrow kernels of each x or dy.

    `keep` gets the first two after each problem, in case it is the last.
    """
    from lora_kernels.backends.triton.configs import tiles_of
    from lora_kernels.bench.linear import Effort
    from lora_kernels.bench.tiles import Measured, Narrow, Product
    from lora_kernels.tuning.search import search, search_narrow
    from lora_kernels.tuning.tables import narrow

    effort = Effort(seconds)
    entries, told, failures = [], [], []
    problems = [*problems, *dict.fromkeys(map(narrow, problems))]
    for index, problem in enumerate(problems, 1):
        alone = problem == narrow(problem)
        measured: Measured = Narrow(problem, device) if alone else Product(problem, device)
        measure = functools.partial(measured.measure, effort=effort, clock=clock)
        if alone:
            entry, done = search_narrow(problem, target, measure, tiles_of)
        else:
            entry, done = search(problem, target, measure, tiles_of, _untiled(problem, target))
        if entry is not None:
            entries.append(entry)
        layout = "x·A, xᵀ·q" if alone else "x·W" if problem.w_k_major else "dy·Wᵀ"
        found = min(entry.times, key=entry.times.__getitem__) if entry else "nothing works"
        chosen = "each alone" if entry and alone else found
        _say(f"[{index}/{len(problems)}] {layout} {problem}: {chosen}")
        for timed in sorted(done, key=lambda timed: timed.us or float("inf")):
            _say(f"    {timed}")
            failures += [f"{problem}: {timed}"] if timed.us is None else []
            told.append(
                {
                    "problem": asdict(problem),
                    "algorithm": timed.choice.algorithm,
                    "configs": [config.to_json() for config in timed.choice.tiles.configs],
                    "us": timed.us,
                    "failure": timed.failure,
                }
            )
        keep(entries, told)
    return entries, told, failures


def _untiled(problem: Problem, target: Any) -> tuple[str, ...]:
    """The algorithms without tiles that can compute `problem` here."""
    from lora_kernels import plan

    backends = [plan.get(name) for name in ("cuda", "eager")]
    usable = (b.candidates(problem, target) for b in backends if b.unavailable() is None)
    return tuple(c.name for candidates in usable for c in candidates if c.refusal is None)


def _problems(args: argparse.Namespace) -> list[Problem]:
    """Each layer's forward product and that of its backward, whose W lies the other way; M taken to its bucket."""
    from lora_kernels.bench.presets import MODELS
    from lora_kernels.tuning.tables import bucket

    presets = args.preset or ([] if args.shape else ["llama-3-8b"])
    shapes = [tuple(shape) for shape in args.shape or ()]
    for name in presets:
        model = MODELS[name]
        shapes += [
            (M, K, N, model.rank) for M in args.rows or ROWS for _, K, N in model.projections
        ]
    found: dict[Problem, None] = {}
    for shape in shapes:
        if min(shape) < 1:
            raise ValueError(f"sizes must be positive, got {shape}")
        M, K, N, R = shape
        types = args.dtype, args.adapter_dtype or args.dtype
        found[Problem(bucket(M), N, K, R, *types, device="cuda")] = None
        found[Problem(bucket(M), K, N, R, *types, device="cuda", w_k_major=False)] = None
    return list(found)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
