"""`python -m lora_kernels selftest`: every usable backend against float64 on this machine, forward and all gradients."""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

from lora_kernels import backends, selftest
from lora_kernels.backends import BACKENDS
from lora_kernels.bench.contenders import backends_on
from lora_kernels.cli import device_of, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", action="append", choices=BACKENDS, help="repeatable (all)")
    parser.add_argument("--device", action="append", choices=("cpu", "cuda"), help="repeatable")
    parser.add_argument("--json", action="store_true", help="print as JSON")


def run(args: argparse.Namespace) -> int:
    """0 when every check of every usable backend passed; 1 when one did not, or a named backend is not usable."""
    devices = args.device or (["cpu"] + ["cuda"] * torch.cuda.is_available())
    found = [
        _one(name, device)
        for device in map(device_of, devices)
        for name in args.backend or backends_on(device)
    ]
    # With several devices a named backend that runs on one of them need not run on the other.
    ran = {each["backend"] for each in found if not each["skipped"]}
    failed = any(each["failed"] for each in found) or not ran.issuperset(args.backend or ())
    if args.json:
        print(json.dumps({"passed": not failed, "backends": found}, indent=1))
    else:
        print("\n".join(_text(each) for each in found))
    return 1 if failed else 0


def _one(name: str, device: str) -> dict[str, Any]:
    """The number of checks of a backend on a device, and those that failed, in words."""
    backend = backends.get(name)
    runs = name in backends_on(device)
    skipped = backend.unavailable() if runs else f"does not run on {device}"
    each: dict[str, Any] = {"backend": name, "device": device, "skipped": skipped}
    each |= {"checks": 0, "failed": [], "closest": None}
    if skipped is not None:
        return each
    say(f"{name} on {device} ...")
    try:
        results = selftest.run(backend, device)
    except Exception as error:  # a kernel on an unknown device may fail in any way
        return {**each, "failed": [f"raised {type(error).__name__}: {error}"]}
    if device == "cuda" and name != "eager":
        selftest.keep(backend, torch.cuda.current_device(), selftest.failure_of(results))
    each["checks"] = len(results)
    each["failed"] = [str(result) for result in results if not result.passed]
    if not results:
        each["failed"] = ["it refuses every problem of the self-test"]
    else:
        each["closest"] = max(result.error / result.allowed for result in results)
    return each


def _text(each: dict[str, Any]) -> str:
    head = f"{each['backend']:<8}{each['device']:<6}"
    if each["skipped"]:
        return f"{head}not usable: {each['skipped']}"
    if each["failed"]:
        return "\n  ".join(
            [f"{head}FAILED {len(each['failed'])} of {each['checks']}", *each["failed"]]
        )
    return f"{head}{each['checks']} checks passed; the largest error is {each['closest']:.2f} of what is allowed"
