"""`python -m lora_kernels info`: versions, compilers, devices, which backend a call takes, and why each other one is not."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
from typing import Any

import torch

from lora_kernels import backends, env, plan
from lora_kernels.backends.device import current_target
from lora_kernels.bench import machine
from lora_kernels.problem import Problem

# A problem that every backend which works at all on a device can compute.
_SIZES = {"M": 256, "N": 256, "K": 256, "R": 8}
_DTYPES = ("float32", "bfloat16", "float16")
_VARIABLES = ("BACKEND", "CACHE", "LOG", "BUILD")
# What this release is tested with: the oldest version, and the first one that it is not.
SUPPORTED = {"torch": ("2.10", None), "triton": ("3.6", "3.10")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print as JSON")


def run(args: argparse.Namespace) -> int:
    """0; 1 where a call that names no backend raises, because of LORA_KERNELS_BACKEND."""
    found = collect()
    code = 1 if any(found["auto"].values()) else 0
    print(json.dumps(found, indent=1) if args.json else _text(found))
    return code


def collect() -> dict[str, Any]:
    """What `info` prints; the entry of a backend, or of "auto", is None where it is usable, else the reason why not."""
    versions = machine.versions()
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices += [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return {
        "versions": versions,
        "unsupported": unsupported(versions),
        "system": f"{platform.system()} {platform.machine()}",
        "compilers": {name: shutil.which(name) for name in (_cxx(), "nvcc", "ninja")},
        "devices": {device: _describe(device) for device in devices},
        "backends": {
            device: {name: refusal(name, device) for name in backends.BACKENDS}
            for device in devices
        },
        "auto": {device: refusal("auto", device) for device in devices},
        "choices": {device: choices(device) for device in devices},
        "variables": {
            f"LORA_KERNELS_{name}": os.environ.get(f"LORA_KERNELS_{name}", "")
            for name in _VARIABLES
        },
        "cache": str(env.cache_dir()),
    }


def unsupported(versions: dict[str, Any]) -> list[str]:
    """A sentence for each installed version that this release is not tested with."""
    found = []
    for name, (oldest, beyond) in SUPPORTED.items():
        version = versions.get(name)
        if version is None:
            continue
        old = _number(version) < _number(oldest)
        new = beyond is not None and _number(version) >= _number(beyond)
        if old or new:
            rule = f">= {oldest}" + (f", < {beyond}" if beyond else "")
            found.append(
                f"{name} {version} is outside of what this release is tested with ({rule})"
            )
    return found


def refusal(name: str, device: str) -> str | None:
    """Why a call on `device` with this backend raises, or None; on a GPU this runs a self-test that has not run yet."""
    problem = _problem("float32", device)
    try:
        with _on(device):
            plan.explain(problem, name)
    except (RuntimeError, ValueError) as error:
        return str(error).partition(f"{problem}: ")[2] or str(error)
    return None


def choices(device: str) -> dict[str, str]:
    """The backend that a call which names none takes, by dtype; a dtype for which it raises is left out."""
    found = {}
    for dtype in _DTYPES:
        with contextlib.suppress(RuntimeError, ValueError), _on(device):
            found[dtype] = plan.explain(_problem(dtype, device)).backend
    return found


def _problem(dtype: str, device: str) -> Problem:
    where = device.partition(":")[0]
    return Problem(**_SIZES, dtype=dtype, adapter_dtype=dtype, device=where)  # type: ignore[arg-type]


def _on(device: str) -> Any:
    """The block's current GPU is `device`."""
    return torch.cuda.device(device) if device != "cpu" else contextlib.nullcontext()


def _describe(device: str) -> dict[str, Any]:
    """Facts of a device; of a GPU also its shared memory, the target whose tiles it takes, and what those may use."""
    with _on(device):
        facts = machine.describe(device.partition(":")[0])
        if device != "cpu":
            properties = torch.cuda.get_device_properties(device)
            shared = getattr(properties, "shared_memory_per_block_optin", 0)
            facts |= {"device": device, "shared_kib": shared // 1024}
            with contextlib.suppress(ValueError):
                target = current_target()
                facts |= {"tiles_of": target.name, "tiles_kib": target.smem_bytes // 1024}
    return facts


def _text(found: dict[str, Any]) -> str:
    lines = [", ".join(f"{name} {version}" for name, version in found["versions"].items())]
    lines += [f"NOT TESTED: {sentence}" for sentence in found["unsupported"]]
    compilers = ", ".join(f"{name}: {path or 'none'}" for name, path in found["compilers"].items())
    lines.append(f"{found['system']}; compilers: {compilers}")
    for device, facts in found["devices"].items():
        shown = ("name", "device", device)  # on a CPU that is its name again
        rest = ", ".join(f"{k} {v}" for k, v in facts.items() if k not in shown and v)
        lines += ["", f"{device}: {facts['name']} ({rest})"]
        taken: dict[str, list[str]] = {}
        for dtype, backend in found["choices"][device].items():
            taken.setdefault(backend, []).append(dtype)
        said = "; ".join(f"{backend} for {', '.join(types)}" for backend, types in taken.items())
        lines += [f"  a call that names no backend takes {said}"] if said else []
        for name, why in found["backends"][device].items():
            lines.append(f"  {name:<8}{'usable' if why is None else 'not usable: ' + why}")
        if found["auto"][device] is not None:
            lines.append(f"  every call that names no backend raises: {found['auto'][device]}")
    lines += ["", "variables: " + ", ".join(f"{k}={v}" for k, v in found["variables"].items())]
    return "\n".join([*lines, f"cache: {found['cache']}"])


def _cxx() -> str:
    return (os.environ.get("CXX") or "c++").split()[0]


def _number(version: Any) -> tuple[int, int]:
    """Major and minor version."""
    major, minor = str(version).split(".")[:2]
    return int(major), int("".join(c for c in minor if c.isdigit()) or 0)
