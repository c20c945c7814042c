"""`python -m lora_kernels info`: devices, versions and backends, and why each backend is or is not usable."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

import torch

from lora_kernels import backends, env, plan
from lora_kernels.bench import machine
from lora_kernels.problem import Problem

# A problem that every backend which works at all on a device can compute.
_SIZES = {"M": 256, "N": 256, "K": 256, "R": 8}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print as JSON")


def run(args: argparse.Namespace) -> int:
    """0; 1 where a call that names no backend raises, because of LORA_KERNELS_BACKEND."""
    found = collect()
    code = 1 if any(found["auto"].values()) else 0
    if args.json:
        print(json.dumps(found, indent=1))
        return code
    print(", ".join(f"{name} {version}" for name, version in found["versions"].items()))
    for device, facts in found["devices"].items():
        rest = ", ".join(f"{k} {v}" for k, v in facts.items() if k not in ("name", "device") and v)
        print(f"\n{device}: {facts['name']} ({rest})")
        for name, why in found["backends"][device].items():
            print(f"  {name:<8}{'usable' if why is None else 'not usable: ' + why}")
        if found["auto"][device] is not None:
            print(f"  every call that names no backend raises: {found['auto'][device]}")
    print("\nvariables: " + ", ".join(f"{k}={v}" for k, v in found["variables"].items()))
    print(f"cache: {found['cache']}")
    return code


def collect() -> dict[str, Any]:
    """What `info` prints; the entry of a backend, or of "auto", is None where it is usable, else the reason why not."""
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    variables = ("BACKEND", "CACHE", "LOG", "BUILD")
    return {
        "versions": machine.versions(),
        "devices": {device: machine.describe(device) for device in devices},
        "backends": {device: why_not(device) for device in devices},
        "auto": {device: refusal("auto", device) for device in devices},
        "variables": {
            f"LORA_KERNELS_{name}": os.environ.get(f"LORA_KERNELS_{name}", "") for name in variables
        },
        "cache": str(env.cache_dir()),
    }


def why_not(device: str) -> dict[str, str | None]:
    """Every backend's reason against itself on `device`, or None; on a GPU this runs a self-test that has not run yet."""
    return {name: refusal(name, device) for name in backends.BACKENDS}


def refusal(name: str, device: str) -> str | None:
    """Why a call on `device` with this `backend` raises, or None."""
    problem = Problem(**_SIZES, dtype="float32", adapter_dtype="float32", device=device)  # type: ignore
    try:
        plan.explain(problem, name)
    except (RuntimeError, ValueError) as error:
        return str(error).partition(f"{problem}: ")[2] or str(error)
    return None
