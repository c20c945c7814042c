"""The overhead suite: host time of a call on a problem whose products take almost no time."""

from __future__ import annotations

import torch

from lora_kernels.bench import contenders, results
from lora_kernels.bench.clock import Call, HostClock, interleaved
from lora_kernels.bench.linear import MODES, Effort, as_call
from lora_kernels.bench.presets import DTYPES
from lora_kernels.bench.results import Row
from lora_kernels.functional import lora_linear
from lora_kernels.problem import Problem

NAMES = ("frozen", "reference", "compiled", "addmm", "peft", "ours", "ours, compiled")


def measure(device: str, effort: Effort, left_out: dict[str, str]) -> list[Row]:
    """A row for each contender and mode; `ours` is lora_linear as users call it, with backend "auto"."""
    (dtype,) = DTYPES[device]
    problem = Problem(2, 16, 16, 2, dtype, dtype, device, bias=True)
    layer, (x, dy) = contenders.make_layer(problem), contenders.make_input(problem)
    rows = []
    for mode in MODES:
        calls: dict[str, Call] = {}
        for name in NAMES:
            reason = None if name.startswith("ours") else contenders.left_out(name, problem)
            if reason is not None:
                left_out[f"overhead: {name}"] = reason
                continue
            calls[name] = as_call(build(name, layer), x, dy, mode)
        clock = HostClock(torch.cuda.synchronize if device == "cuda" else None)
        taken = interleaved(calls, clock, seconds=effort.seconds, rounds=effort.rounds)
        rows += [results.row("overhead", "2x16x16", mode, n, taken, problem) for n in taken]
    return rows


def build(name: str, layer: contenders.Layer) -> contenders.Built:
    """A contender by its name here: "ours" with backend "auto", alone and compiled."""
    if not name.startswith("ours"):
        return contenders.build(name, layer)

    def function(x: torch.Tensor) -> torch.Tensor:
        return lora_linear(x, layer.weight, layer.A, layer.B, layer.alpha, layer.bias)

    if name == "ours":
        return contenders.Built(function, (layer.A, layer.B))
    compiled = torch.compile(function, dynamic=False, fullgraph=True)
    return contenders.Built(compiled, (layer.A, layer.B))
