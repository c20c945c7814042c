"""`python -m lora_kernels explain`: which backend and tile a problem takes, and its predicted time."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from lora_kernels import plan
from lora_kernels.backends.base import fastest
from lora_kernels.cli import check_sizes, device_of
from lora_kernels.problem import DENSE, ITEMSIZE, Problem
from lora_kernels.samples import SAMPLES
from lora_kernels.tuning import cost
from lora_kernels.tuning.targets import TARGETS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--shape", type=int, nargs=4, required=True, metavar=("M", "K", "N", "R"))
    add("--dtype", choices=[*ITEMSIZE], default="float32", help="of x, W and y (default: float32)")
    add("--adapter-dtype", choices=[*ITEMSIZE], help="of A and B (default: --dtype)")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    add("--backend", default="auto", help="ask for one by name (default: auto)")
    add("--dropout", action="store_true", help="with dropout before A")
    add("--weight", choices=(DENSE, *SAMPLES), default=DENSE, help="W's format (default: dense)")
    add("--target", choices=[*TARGETS], help="predict for a GPU architecture that need not be here")
    add("--json", action="store_true", help="print as JSON")


def run(args: argparse.Namespace) -> int:
    """0, or an error where the named backend cannot compute the problem."""
    check_sizes(args.shape, 0)
    if args.target and (args.device == "cpu" or args.backend != "auto"):
        raise ValueError("--target predicts a GPU's choice: it takes no --device cpu, no --backend")
    M, K, N, R = args.shape
    device = "cuda" if args.target else device_of(args.device)
    types = args.dtype, args.adapter_dtype or args.dtype, device
    problem = Problem(
        M, N, K, R, *types, bias=True, dropout=args.dropout, weight_format=args.weight
    )
    directions = {"forward": problem, "backward": problem.adjoint()}
    found = {
        name: _predicted(each, args.target) if args.target else _here(each, args.backend)
        for name, each in directions.items()
    }
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    print(problem)
    for name, each in found.items():
        print(f"\n{name}")
        print("\n".join(f"  {what}: {text}" for what, text in each.items() if what != "problem"))
    return 0


def _here(problem: Problem, backend: str) -> dict[str, Any]:
    """The backend that computes it on this machine, and the reason against each other one."""
    explanation = plan.explain(problem, backend)
    chosen = explanation.backend + (f", {explanation.plan}" if explanation.plan else "")
    return {"problem": asdict(problem), "chosen": chosen, **explanation.rejected}


def _predicted(problem: Problem, name: str) -> dict[str, Any]:
    """What the cost model chooses on a target, and every algorithm's predicted time against the frozen layer's."""
    if problem.empty or problem.dtype == "float64":
        return {
            "problem": asdict(problem),
            "chosen": "eager: empty and float64 problems are ATen's",
        }
    target = TARGETS[name]
    candidates = plan.predict(problem, target)
    chosen = fastest(candidates)
    assert chosen is not None
    source = "tuned" if chosen.measured_us is not None else "cost model"
    frozen, dense = cost.frozen_us(problem, target), problem.weight_format == DENSE
    found: dict[str, Any] = {
        "problem": asdict(problem),
        "chosen": ", ".join(filter(None, (f"{chosen.name} ({source})", chosen.how)))
        + f" on {target.chip}",
        "frozen layer": f"predicted {frozen:.1f} us" + (not dense) * ", with a dense weight",
    }
    times = {candidate.name: candidate.predicted_us for candidate in candidates}
    if dense:
        others = ("addmm", "reference")
        times |= {name: cost.predict_us(name, problem, target) for name in others}
    for name, us in times.items():
        assert us is not None
        found[name] = f"predicted {us:.1f} us, {us / frozen:.2f} of the frozen layer"
    return found
