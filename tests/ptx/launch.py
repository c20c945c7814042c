"""Launches: PTX with its arguments, one kernel or a chain of dependent ones, and Triton's own launches redirected here."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.runtime import jit
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.compiled.recorder import GPU_TARGETS, compile_call
from tests.ptx.counters import Counters
from tests.ptx.machine import Machine
from tests.ptx.memory import Binding, GlobalMemory
from tests.ptx.parser import Param, Program, PtxError, parse
from tests.ptx.tma import Descriptor

RESIDENT_LANES = 8192
SCALARS = {"i1": "i1", "i8": "i1", "i16": "i2", "i32": "i4", "i64": "i8", "u8": "u1", "u16": "u2", "u32": "u4",
           "u64": "u8", "fp32": "f4", "f32": "f4", "fp64": "f8", "f64": "f8"}  # fmt: skip


@dataclass
class Launch:
    """A kernel with its arguments in place: everything but the order in which it runs."""

    program: Program
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_size: int
    params: np.ndarray
    bindings: list[Binding]
    descriptors: dict[int, Descriptor]
    counters: Counters

    def machine(
        self, ctas: list, rng: np.random.Generator | None, primary: Machine | None = None
    ) -> Machine:
        memory = GlobalMemory(self.bindings)
        fixed = (self.program, ctas, self.grid, self.block, self.shared_size, self.params, memory)
        return Machine(*fixed, self.descriptors, self.counters, rng, primary)

    def ctas(self, rng: np.random.Generator | None) -> list[tuple[int, int, int]]:
        """All CTAs, x fastest, or their clusters in random order."""
        gx, gy, gz = self.grid
        size = self.program.cluster
        every = [(x, y, z) for z in range(gz) for y in range(gy) for x in range(gx)]
        clusters = [every[i : i + size] for i in range(0, len(every), size)]
        order = range(len(clusters)) if rng is None else rng.permutation(len(clusters))
        return [cta for i in order for cta in clusters[i]]

    def run(self, schedule: int | None) -> Counters:
        """Execute; `schedule` is None for lockstep or a seed. Gives what it counted."""
        rng = None if schedule is None else np.random.default_rng(schedule)
        ctas = self.ctas(rng)
        size = self.program.cluster
        resident = max(1, RESIDENT_LANES // int(np.prod(self.block)) // size) * size
        for start in range(0, len(ctas), resident):
            self.machine(ctas[start : start + resident], rng).run()
        return self.counters


def run_chain(launches: Sequence[Launch], schedule: int | None) -> str:
    """All at once: each may begin when every CTA of the one before has let it, and waits where its own code waits.

    Gives which ones the last one ended before, as what is launched after it would run too early; "" where it was the last.
    """
    rng = np.random.default_rng(schedule or 0)
    own = None if schedule is None else rng
    machines: list[Machine] = []
    for launch in launches:
        primary = machines[-1] if machines else None
        machines.append(launch.machine(launch.ctas(own), own, primary))
    # In lockstep the latest goes as far as it can first: what it reads too early, it reads wrong. In random order each
    # seed has its own odds, from nearly one after the other to nearly the reverse.
    odds = 0.0 if own is None else 10.0 ** own.uniform(-4, 0)
    running = [(machine, machine.steps()) for machine in machines]
    left: list[str] = []
    while running:
        begun = [each for each in running if each[0].primary is None or each[0].primary.released]
        able = [each for each in begun if any(cursor.ready() for cursor in each[0].cursors)]
        chosen = next((e for e in able[:0:-1] if rng.random() >= odds), (able or begun)[0])
        try:
            next(chosen[1])
        except StopIteration:
            running.remove(chosen)
            if chosen[0] is machines[-1]:
                left = [machine.program.name for machine, _ in running]
    return f"{machines[-1].program.name} ended before {', '.join(left)}" if left else ""


@functools.lru_cache(maxsize=512)
def parsed(ptx: str, entry: str | None = None) -> Program:
    return parse(ptx, entry)


def prepare(
    ptx: str,
    grid: Sequence[int],
    block: int | Sequence[int],
    args: Sequence[tuple[str, str, Any]],
    *,
    shared: int = 0,
    entry: str | None = None,
    descriptors: Sequence[dict[str, Any]] = (),
    pointed: Mapping[str, Any] | None = None,
) -> Launch:
    """A launch of PTX.

    Each of `args` is (name, type, value): "*" a tensor, a scalar type, "tensordesc", or "struct" with its bytes;
    `pointed` are the tensors that pointers inside a struct lead to. `shared` is the dynamic part of shared memory,
    where the PTX declares one; the static part is added.
    """
    program = parsed(ptx, entry)
    length = program.params[-1].offset + program.params[-1].size if program.params else 0
    params = np.zeros(length, np.uint8)
    bindings = {name: Binding(name, tensor) for name, tensor in (pointed or {}).items()}
    tensor_maps: dict[int, Descriptor] = {}
    slots, metas = iter(program.params), iter(descriptors)
    for name, kind, value in args:
        param = next(slots)
        if kind == "tensordesc":
            tensor_maps[param.offset] = describe(name, value, next(metas), bindings)
            for extent in (*value.shape, *value.strides):
                store(params, next(slots), extent, "i64")
        elif kind.startswith("*"):
            binding = bindings.setdefault(name, Binding(name, value))
            store(params, param, binding.start, "u64")
        elif kind == "struct":
            raw = np.frombuffer(bytes(value), np.uint8)
            params[param.offset : param.offset + len(raw)] = raw
        else:
            store(params, param, value, kind)
    counters = Counters(tensors={name: b.traffic for name, b in bindings.items()})
    blocks = (block, 1, 1) if isinstance(block, int) else (*block, 1, 1)[:3]
    size = program.static_shared + shared
    if grid[0] % program.cluster:
        raise PtxError(f"{grid[0]} CTAs are no whole clusters of {program.cluster}")
    return Launch(
        program,
        (*grid, 1, 1)[:3],
        blocks,
        size,
        params,
        list(bindings.values()),
        tensor_maps,
        counters,
    )


def store(params: np.ndarray, param: Param, value: Any, kind: str) -> None:
    """Writes one scalar parameter; an integer takes the width that the kernel declares."""
    if SCALARS.get(kind, "i4")[0] == "f":
        raw = np.array([value], SCALARS[kind])
    else:
        raw = np.array([int(value) % (1 << 8 * param.size)], f"u{param.size}")
    if raw.nbytes != param.size:
        raise PtxError(f"{param.name} has {param.size} bytes, its argument {raw.nbytes}")
    params[param.offset : param.offset + param.size] = raw.view(np.uint8)


def describe(
    name: str,
    value: TensorDescriptor | GluonDescriptor,
    meta: dict[str, Any],
    bindings: dict[str, Binding],
) -> Descriptor:
    binding = bindings.setdefault(name, Binding(name, value.base))
    return Descriptor(
        binding,
        list(value.shape),
        list(value.strides),
        list(meta["block_size"]),
        meta["swizzle"],
        value.base.itemsize,
    )


def prepare_triton(
    compiled: Any, grid: Sequence[int], bound: dict[str, Any], ptx: str | None = None
) -> Launch:
    """A launch of a kernel that Triton compiled, with the arguments its launcher bound; `ptx` replaces the text."""
    args = []
    for name, kind in compiled.src.signature.items():
        if kind == "constexpr":
            continue
        value = bound[name]
        if isinstance(value, (TensorDescriptor, GluonDescriptor)):
            args.append((name, "tensordesc", value))
        else:
            args.append((name, kind, value))
    metadata = compiled.metadata
    return prepare(
        ptx or compiled.asm["ptx"],
        (grid[0] * metadata.num_ctas, *grid[1:]),
        32 * metadata.num_warps,
        args,
        shared=metadata.shared,
        descriptors=getattr(metadata, "tensordesc_meta", None) or (),
    )


@dataclass
class Executed:
    """One launch that was executed: the kernel's name without "_kernel", what Triton compiled, and the counters."""

    name: str
    compiled: Any
    counters: Counters
    dependent: bool


@contextmanager
def emulate(target: str, schedule: int | None = None) -> Iterator[list[Executed]]:
    """Within the block Triton kernels launched on CPU tensors run here, as compiled for `target`.

    The kernel is specialised as Triton specialises it. A launch that lets dependents start is held back until the next one,
    and runs together with it if that one is dependent, as this one does with the next; results are complete when the block
    ends, with a PtxError where the last of such launches ended before another.
    """
    executed: list[Executed] = []
    held: list[Launch] = []
    early: list[str] = []

    def flush() -> None:
        if len(held) > 1:
            early.append(run_chain(held, schedule))
        elif held:
            held[0].run(schedule)
        held.clear()

    def run(kernel: jit.JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        dependent = bool(kwargs.get("launch_pdl", False))
        if not dependent:
            kwargs.pop("launch_pdl", None)
        compiled, bound = compile_call(kernel, GPU_TARGETS[target], args, kwargs)
        launch = prepare_triton(compiled, grid, bound)
        name = kernel.fn.__name__.strip("_").removesuffix("_kernel")
        executed.append(Executed(name, compiled, launch.counters, dependent))
        if not dependent:
            flush()
        held.append(launch)
        if "griddepcontrol.launch_dependents" not in compiled.asm["ptx"]:
            flush()
        return compiled

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jit.JITFunction, "run", run)
        yield executed
        flush()
    if any(early):
        raise PtxError("; ".join(filter(None, early)))
