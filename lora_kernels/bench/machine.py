"""Facts of the machine that a result file keeps, and the best rates that this machine reaches."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import lora_kernels
from lora_kernels import backends, plan
from lora_kernels.backends.device import architecture
from lora_kernels.bench.clock import clock_for
from lora_kernels.operands import Adapter
from lora_kernels.problem import Problem

_PACKAGES = ("triton", "peft", "transformers")


def describe(device: str) -> dict[str, Any]:
    """Name, cores or multiprocessors, clocks and the load before the run, as far as they can be found out."""
    facts: dict[str, Any] = {
        "device": device,
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "capability": torch.backends.cpu.get_cpu_capability(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else "",
    }
    if device == "cuda":
        index = torch.cuda.current_device()
        properties = torch.cuda.get_device_properties(index)
        facts |= {
            "name": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "architecture": architecture(index),
            "clocks": _gpu_clocks(),
        }
    else:
        facts["name"] = facts["cpu"]
    return facts


def versions() -> dict[str, Any]:
    """Versions of Python, this package, and those that compute or are compared."""
    found = {
        "python": platform.python_version(),
        "lora_kernels": lora_kernels.__version__,
        "torch": str(torch.__version__),
    }
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def sha() -> str:
    """The commit of the sources, with "+" where tracked files were changed since; "" outside of a checkout."""
    describe = ["describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+"]
    return _output(["git", "-C", str(Path(__file__).parent), *describe])


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def ceilings(device: str, dtypes: list[str], seconds: float = 0.3) -> dict[str, float]:
    """Best measured rates, in 1e9 a second, and the cost of a call.

    `DTYPE_aten_gflops` and `DTYPE_ours_gflops` are those of a large product by the vendor's library and by our own fastest
    kernel, `DTYPE_gflops` the larger of the two; `copy_gbs` and `cache_gbs` count bytes read and written by a copy that does
    not and that does fit a cache; `call_us` is a small product's time.
    """
    large = (1 << 30) if device == "cuda" else (1 << 27)
    found = {
        "copy_gbs": _copy_gbs(device, large, seconds),
        "cache_gbs": _copy_gbs(device, 1 << 19, seconds / 2),
    }
    one = torch.randn(8, 8, device=device)
    found["call_us"] = _best_us(lambda: torch.mm(one, one), device, seconds / 4, inner=100)
    for dtype in dtypes:
        rates = _product_gflops(device, dtype, seconds)
        found |= {f"{dtype}_{who}_gflops": rate for who, rate in rates.items()}
        found[f"{dtype}_gflops"] = max(rates.values())
    return found


def _product_gflops(device: str, dtype: str, seconds: float) -> dict[str, float]:
    size = 8192 if device == "cuda" else 2048 if dtype == "float32" else 1024
    place: Any = {"device": device, "dtype": getattr(torch, dtype)}
    x, w = torch.randn(size, size, **place), torch.randn(size, size, **place)
    a, b = torch.randn(size, 1, **place), torch.randn(1, size, **place)
    problem = Problem(size, size, size, 1, dtype, dtype, device)

    def rate(call: Callable[[], object]) -> float:
        return problem.flops / (1e3 * _best_us(call, device, seconds))

    rates = {"aten": rate(lambda: torch.mm(x, w.t()))}
    for name in backends.BACKENDS:
        try:
            product = plan.explain(problem, name).products.shrink_expand
        except RuntimeError:
            continue
        if name != "eager":
            own = rate(lambda product=product: product(x, w.t(), Adapter(a, b, 1.0)))  # type: ignore
            rates["ours"] = max(rates.get("ours", 0.0), own)
    return rates


def _copy_gbs(device: str, size: int, seconds: float) -> float:
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    inner = 1 if size > 1 << 24 else 20
    us = _best_us(lambda: target.copy_(source), device, seconds, inner)
    return 2 * size / (1e3 * us)


def _best_us(call: Callable[[], object], device: str, seconds: float, inner: int = 1) -> float:
    clock = clock_for(device)
    call()
    best, begin = float("inf"), time.perf_counter()
    for count in range(50):
        if count >= 3 and time.perf_counter() - begin > seconds:
            break
        best = min(best, clock.time_us(call, inner))
    return best


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpu_clocks() -> str:
    fields = "clocks.sm,clocks.max.sm,clocks.mem,power.limit,driver_version"
    return _output(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"])


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout else ""
