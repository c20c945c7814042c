"""The memory suite: bytes that a layer saves for its backward, and the most that a step allocates at once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lora_kernels.bench import contenders, results
from lora_kernels.bench.clock import Call
from lora_kernels.bench.contenders import Built, Layer
from lora_kernels.bench.linear import Case, as_call
from lora_kernels.bench.results import Row

NAMES = ("frozen", "reference", "addmm", "peft", "dense", "two_kernel", "ours")


def measure(case: Case, names: tuple[str, ...], left_out: dict[str, str]) -> list[Row]:
    """Two rows for each contender: "saved" and "peak", in bytes, of one step.

    Saved counts what the step keeps beyond the layer's own parameters; x is counted, though a network holds it anyway.
    """
    layer, (x, dy) = contenders.make_layer(case.problem), contenders.make_input(case.problem)
    found: dict[str, results.Samples] = {"saved": {}, "peak": {}}
    for name in dict.fromkeys(("frozen", "reference", *names)):
        reason = contenders.left_out(name, case.problem)
        if reason is not None:
            left_out[f"memory: {name}"] = reason
            continue
        built = contenders.build(name, layer)
        found["saved"][name] = [saved_bytes(built, layer, x)]
        step = as_call(built, x, dy, "step")
        step()
        found["peak"][name] = [peak_bytes(step, case.problem.device)]
    return [
        results.row("memory", case.label, mode, name, taken, case.problem, unit="bytes")
        for mode, taken in found.items()
        for name in taken
    ]


def saved_bytes(built: Built, layer: Layer, x: torch.Tensor) -> int:
    """Bytes of distinct storages that autograd keeps for the backward, without the layer's own weight, bias, A and B."""
    packed = () if layer.packed is None else layer.packed.tensors
    own = {
        t.untyped_storage().data_ptr()
        for t in (layer.weight, layer.bias, *built.trained, layer.A, layer.B, *packed)
        if t is not None
    }
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = built.function(x)
    del y
    return sum(kept.values())


def peak_bytes(step: Call, device: str) -> int:
    """The most memory that tensors made during `step` take at once, by the allocator's own account."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with (
        _silent_stderr(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        step()
    events = profiler.profiler.kineto_results.events()  # type: ignore
    changes = sorted(
        (event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"
    )
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """The profiler's C++ side writes lines of its own to file descriptor 2."""
    kept, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(sink)
