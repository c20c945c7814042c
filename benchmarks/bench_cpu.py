"""What a LoRA layer costs on the CPU: ours, the reference, ATen's addmm and others against the frozen linear alone.

    python benchmarks/bench_cpu.py                     the problems that are quoted, two minutes
    python benchmarks/bench_cpu.py --grid              every shape, M and rank of the grid
    python benchmarks/bench_cpu.py --contenders compiled,peft --threads 1,2 --dtypes float32,bfloat16,float16
    pytest benchmarks/bench_cpu.py                     the quoted problems under pytest-benchmark

Results are checked against float64 before anything is timed. The contenders of a problem take turns, run after run, so
that a change of the machine's speed meets all of them; a time is the median of its runs. On a busy machine --threads 1
with --clock cpu takes the processor time of the one thread, in which waiting for others does not count. --output writes
JSON with the machine, the versions and the commit, --docs the tables of docs/performance/cpu.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import median

import pytest
import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lora_kernels import plan  # noqa: E402  (runs from a checkout as well)
from lora_kernels.functional import lora_linear  # noqa: E402

ALPHA = 2.0
MARKER = "<!-- tables by benchmarks/bench_cpu.py -->"
CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}
DEFAULT = ("frozen", "reference", "addmm", "ours")
QUOTED = [  # (M, K, N, R)
    (1024, 2048, 2048, 16),
    (512, 768, 3072, 16),
    (512, 3072, 768, 16),
    (128, 4096, 4096, 16),
    (2048, 1024, 1024, 16),
    (512, 384, 384, 8),
    (512, 384, 1536, 8),
    (16, 4096, 4096, 16),
    (1, 4096, 4096, 16),
]
SHAPES = {  # (K, N)
    "MiniLM": [(384, 384), (384, 1536), (1536, 384)],
    "GPT-2": [(768, 768), (768, 3072), (3072, 768)],
    "1B": [(2048, 2048)],
    "7B": [(4096, 4096)],
}
GRID = [
    (M, K, N, R)
    for shapes in SHAPES.values()
    for K, N in shapes
    for M in (1, 16, 128, 512, 2048)
    for R in (8, 16, 64)
]


@dataclass(frozen=True)
class Cell:
    """One problem, and the milliseconds that each contender takes."""

    M: int
    K: int
    N: int
    R: int
    dtype: str
    threads: int
    direction: str  # "forward" or "forward+backward"
    milliseconds: dict[str, float]

    def ratio(self, slower: str, faster: str) -> float:
        return self.milliseconds[slower] / self.milliseconds[faster]


class Operands:
    """x, W, bias, A, B and dy of a problem; x, A and B want gradients, as in fine-tuning."""

    def __init__(self, M: int, K: int, N: int, R: int, dtype: torch.dtype):
        generator = torch.Generator().manual_seed(M + K + N + R)

        def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(*shape, generator=generator) * scale).to(dtype)

        self.x = normal(M, K).requires_grad_()
        self.weight, self.bias = normal(N, K, scale=K**-0.5), normal(N)
        self.A = normal(K, R, scale=K**-0.5).requires_grad_()
        self.B = normal(R, N, scale=R**-0.5).requires_grad_()
        self.dy = normal(M, N)

    def gradients(self) -> tuple[torch.Tensor, ...]:
        return tuple(t.grad for t in (self.x, self.A, self.B))

    def forget(self) -> None:
        self.x.grad = self.A.grad = self.B.grad = None


def contender(name: str, o: Operands) -> Callable[[], torch.Tensor]:
    """The forward of contender `name` on the operands."""
    if name == "frozen":
        return lambda: F.linear(o.x, o.weight, o.bias)
    if name == "reference":
        return lambda: reference(o)
    if name == "addmm":
        return lambda: lora_linear(o.x, o.weight, o.A, o.B, ALPHA, o.bias, backend="eager")
    if name == "ours":
        return lambda: lora_linear(o.x, o.weight, o.A, o.B, ALPHA, o.bias)
    if name == "compiled":
        compiled = torch.compile(reference, dynamic=False)
        return lambda: compiled(o)
    if name == "peft":
        return peft_layer(o)
    raise ValueError(f"contender must be one of {(*DEFAULT, 'compiled', 'peft')}, got {name!r}")


def reference(o: Operands) -> torch.Tensor:
    """The layer as it is written everywhere."""
    return F.linear(o.x, o.weight, o.bias) + ALPHA * (o.x @ o.A @ o.B)


def peft_layer(o: Operands) -> Callable[[], torch.Tensor]:
    """PEFT's layer over the same base; its A and B get the same values in its own layout."""
    from peft import LoraConfig, inject_adapter_in_model

    linear = nn.Linear(o.weight.shape[1], o.weight.shape[0]).to(o.x.dtype)
    with torch.no_grad():
        linear.weight.copy_(o.weight)
        linear.bias.copy_(o.bias)
    rank = o.A.shape[1]
    config = LoraConfig(r=rank, lora_alpha=ALPHA * rank, target_modules=["0"])
    layer = inject_adapter_in_model(config, nn.Sequential(linear))[0]
    for side, ours in (("lora_A", o.A), ("lora_B", o.B)):
        inner = getattr(layer, side)["default"]
        inner.weight = nn.Parameter(ours.detach().t().contiguous())
    return lambda: layer(o.x)


def check(o: Operands, name: str) -> None:
    """Raise AssertionError unless a contender's result and gradients are those of the formula, in float64."""
    dtype, slack = o.x.dtype, 2.0 * torch.finfo(o.x.dtype).eps
    exact = Operands.__new__(Operands)
    for field, value in vars(o).items():
        setattr(exact, field, value.detach().double().requires_grad_(value.requires_grad))
    y = reference(exact)
    y.backward(exact.dy)
    o.forget()
    ours = contender(name, o)()
    ours.backward(o.dy)
    pairs = [(ours, y), (o.x.grad, exact.x.grad)]
    if name != "peft":  # its A and B are its own
        pairs += [(o.A.grad, exact.A.grad), (o.B.grad, exact.B.grad)]
    for actual, expected in pairs:
        error = (actual.double() - expected).abs().max()
        allowed = (slack if dtype != torch.float32 else 64 * slack) * expected.abs().max()
        assert error <= allowed, f"{name} is off by {error:.2e}, allowed {allowed:.2e}"
    o.forget()


def measure(
    o: Operands, names: Iterable[str], backward: bool, seconds: float, clock: str = "wall"
) -> dict[str, float]:
    """Median milliseconds of each contender; they take turns for about `seconds` each, 5 to 200 times."""

    def step(forward: Callable[[], torch.Tensor]) -> None:
        if backward:
            forward().backward(o.dy)
            o.forget()
        else:
            with torch.no_grad():
                forward()

    def frozen_step() -> None:  # its gradient is that of x alone
        F.linear(o.x, o.weight, o.bias).backward(o.dy)
        o.forget()

    steps: dict[str, Callable[[], None]] = {}
    for name in names:
        forward = contender(name, o)
        steps[name] = (
            (lambda f=forward: step(f)) if name != "frozen" or not backward else frozen_step
        )
    now = CLOCKS[clock]
    times: dict[str, list[float]] = {name: [] for name in steps}
    runs, done = 5, -1  # the first run warms up
    while done < runs:
        for name, run in steps.items():
            begin = now()
            run()
            if done >= 0:
                times[name].append(now() - begin)
        done += 1
        if done == 2:
            slowest = max(median(t) for t in times.values())
            runs = int(min(200, max(5, seconds / slowest)))
    return {name: round(1e3 * median(t), 4) for name, t in times.items()}


def peak_bytes(o: Operands, name: str) -> int:
    """The most memory that tensors of one training step hold at once, above what was there before it."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    forward = contender(name, o)
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        y = forward()
        y.backward(o.dy)
    o.forget()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def run(
    problems: Iterable[tuple[int, int, int, int]],
    dtypes: Iterable[str],
    threads: Iterable[int],
    names: tuple[str, ...],
    seconds: float,
    clock: str,
) -> list[Cell]:
    """Measure every problem in every type on every number of threads, forward alone and with backward."""
    cells = []
    before = torch.get_num_threads()
    for count in threads:
        torch.set_num_threads(count)
        for dtype in dtypes:
            for problem in problems:
                operands = Operands(*problem, getattr(torch, dtype))
                for name in names:
                    if name not in ("frozen", "compiled"):
                        check(operands, name)
                for direction in ("forward", "forward+backward"):
                    taken = measure(operands, names, direction != "forward", seconds, clock)
                    cells.append(Cell(*problem, dtype, count, direction, taken))
                    print(row(cells[-1], names), flush=True)
    torch.set_num_threads(before)
    return cells


def row(cell: Cell, names: tuple[str, ...]) -> str:
    """A line of a Markdown table."""
    problem = f"{cell.M}, {cell.K}, {cell.N}, {cell.R}"
    times = [f"{cell.milliseconds[name]:.3g}" for name in names]
    over_frozen = [f"{cell.ratio(name, 'frozen'):.2f}" for name in ("reference", "ours")]
    wins = [f"{cell.ratio(name, 'ours'):.2f}" for name in ("reference", "addmm")]
    where = [problem, cell.dtype, str(cell.threads), cell.direction]
    return "| " + " | ".join(where + times + over_frozen + wins) + " |"


def header(names: tuple[str, ...]) -> str:
    titles = ["M, K, N, R", "type", "threads", "direction", *(f"{name}, ms" for name in names)]
    titles += ["reference / frozen", "ours / frozen", "reference / ours", "addmm / ours"]
    return "| " + " | ".join(titles) + " |\n|" + "---|" * len(titles)


def machine() -> dict[str, str]:
    """What the numbers depend on."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        processor = lines[0].split(":", 1)[1].strip() if lines else processor
    git = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    kernels = "none"
    if plan.get("cpu").unavailable() is None:
        kernels = torch.ops.lora_kernels_cpu.isa()
    return {
        "processor": processor,
        "cores": str(torch.get_num_threads()),
        "aten": torch.backends.cpu.get_cpu_capability(),
        "kernels": kernels,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": git.stdout.strip() or "unknown",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def document(
    about: dict[str, str],
    cells: list[Cell],
    memory: dict[str, dict[str, int]],
    names: tuple[str, ...],
) -> str:
    """The tables as Markdown, the losses on top."""
    lines = [
        f"Measured on {about['processor']} ({about['cores']} cores; the kernels use {about['kernels']}, ATen "
        f"{about['aten']}), torch {about['torch']}, commit {about['commit']}, {about['date']}; medians of interleaved "
        f"runs, {about['clock']} clock. `frozen` is the linear layer without LoRA, `reference` the layer as it is "
        "usually written, `addmm` the eager backend.",
        "",
    ]
    losses = [
        c for c in cells if c.ratio("ours", "addmm") > 1.05 or c.ratio("ours", "reference") > 1.05
    ]
    lines += [
        f"Slower than the reference or the eager backend by more than 5 %: {len(losses)} of {len(cells)}.",
        "",
    ]
    if losses:
        lines += [header(names), *(row(c, names) for c in losses), ""]
    lines += [header(names), *(row(c, names) for c in cells), ""]
    if memory:
        lines += ["Most memory that the tensors of one training step hold at once, MiB:", ""]
        lines += [
            "| M, K, N, R, type | " + " | ".join(names) + " |",
            "|" + "---|" * (len(names) + 1),
        ]
        for problem, peaks in memory.items():
            sizes = " | ".join(f"{peaks[name] / 2**20:.2f}" for name in names)
            lines.append(f"| {problem} | {sizes} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--grid", action="store_true", help="every shape, M and rank")
    parser.add_argument("--problem", action="append", help="M,K,N,R instead of the quoted ones")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--threads", default=str(torch.get_num_threads()))
    parser.add_argument("--contenders", default="", help="in addition: compiled, peft")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each contender and problem")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--output", type=Path, help="a JSON file")
    parser.add_argument("--docs", type=Path, help="a Markdown file")
    given = parser.parse_args()
    if given.clock == "cpu" and given.threads != "1":
        parser.error("--clock cpu measures one thread: it needs --threads 1")
    names = DEFAULT + tuple(filter(None, given.contenders.split(",")))
    dtypes, threads = given.dtypes.split(","), [int(t) for t in given.threads.split(",")]
    print(header(names))
    problems = GRID if given.grid else QUOTED
    if given.problem:
        problems = [tuple(map(int, problem.split(","))) for problem in given.problem]
    cells = run(problems, dtypes, threads, names, given.seconds, given.clock)
    about = machine() | {"clock": given.clock}
    memory = {}
    for problem in problems[:2]:
        for dtype in dtypes:
            operands = Operands(*problem, getattr(torch, dtype))
            label = ", ".join(map(str, (*problem, dtype)))
            memory[label] = {name: peak_bytes(operands, name) for name in names}
    if given.output:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        report = {"machine": about, "cells": [asdict(c) for c in cells], "peak_bytes": memory}
        given.output.write_text(json.dumps(report, indent=1) + "\n")
    if given.docs:  # the text above the marker is written by hand
        text = given.docs.read_text() if given.docs.exists() else ""
        tables = document(about, cells, memory, names)
        given.docs.parent.mkdir(parents=True, exist_ok=True)
        given.docs.write_text(text.split(MARKER)[0] + MARKER + "\n\n" + tables)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("problem", QUOTED, ids=str)
def test_training_step(benchmark, problem, dtype):
    """Ours under pytest-benchmark, after a check of its results; the others' medians stand beside it."""
    operands = Operands(*problem, getattr(torch, dtype))
    check(operands, "ours")
    benchmark.extra_info["milliseconds"] = measure(operands, DEFAULT, True, 0.2)
    forward = contender("ours", operands)
    benchmark.pedantic(lambda: forward().backward(operands.dy), rounds=7, warmup_rounds=1)


if __name__ == "__main__":
    main()
