"""Clocks, and samples of calls that take turns, so that a change of the machine's speed affects all of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

Call = Callable[[], object]
PATIENCE_S = 20.0  # after which fewer rounds than asked for are enough
SAMPLE_US = 1000.0  # a shorter sample would count the clock
# Several times the L2 of any GPU that is known.
FLUSH_BYTES = 1 << 30
# How long the GPU waits for the host at first and at most, in microseconds, and clock cycles of one at 2 GHz.
HOLD_US, MOST_HOLD_US, CYCLES = 200.0, 20_000.0, 2000


class Clock(Protocol):
    """Measures one sample of a call: the microseconds of one of its `inner` repetitions."""

    def time_us(self, call: Call, inner: int) -> float: ...


class HostClock:
    """Wall time on the host: of CPU work, or, with `wait` given, of enqueuing GPU work that is waited for afterwards."""

    def __init__(self, wait: Call | None = None) -> None:
        self.wait = wait

    def time_us(self, call: Call, inner: int) -> float:
        begin = time.perf_counter()
        for _ in range(inner):
            call()
        elapsed = time.perf_counter() - begin
        if self.wait is not None:
            self.wait()
        return 1e6 * elapsed / inner


class CudaClock:
    """Time between two events on the GPU, without that of the host, which `HostClock` measures.

    Before the first event the GPU is kept busy until everything is enqueued: a training step enqueues a layer while the GPU
    computes those before it. A call that waits for the GPU itself is timed with its waiting.
    `cold`: L2 is overwritten before every repetition, each timed alone. `graph`: the call is captured once and replayed,
    which leaves the host out. `cuda` is torch.cuda, or a stand-in of it.
    """

    def __init__(self, cold: bool = False, graph: bool = False, cuda: Any = None) -> None:
        self.cuda = torch.cuda if cuda is None else cuda
        self.cold, self.graph = cold, graph
        self._graphs: dict[Call, tuple[Any, Any]] = {}
        self._flush: Any = None
        self._held: dict[Call, float] = {}

    def time_us(self, call: Call, inner: int) -> float:
        run = self._replay(call) if self.graph else call
        if not self.cold:
            return self._between_events(run, inner)
        total = 0.0
        for _ in range(inner):
            self._overwrite_l2()
            total += self._between_events(run, 1)
        return total / inner

    def _between_events(self, run: Call, inner: int) -> float:
        hold_us = self._held.get(run, HOLD_US)
        while True:
            begin, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
            if hold_us:
                self.cuda._sleep(int(hold_us * CYCLES))
            begin.record()
            for _ in range(inner):
                run()
            late = (
                hold_us > 0 and begin.query()
            )  # the GPU was there before the host had enqueued all
            end.record()
            end.synchronize()
            if not late:
                break
            # One that is late however long the GPU waits, as it waits for the GPU itself, is not held.
            hold_us = min(4 * hold_us, MOST_HOLD_US) if hold_us < MOST_HOLD_US else 0.0
        self._held[run] = hold_us
        return 1e3 * begin.elapsed_time(end) / inner

    def _overwrite_l2(self) -> None:
        if self._flush is None:
            self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
        self._flush.zero_()

    def _replay(self, call: Call) -> Call:
        if call not in self._graphs:
            stream = self.cuda.Stream()
            stream.wait_stream(self.cuda.current_stream())
            with self.cuda.stream(stream):  # capture needs everything lazy to have happened before
                for _ in range(3):
                    call()
            self.cuda.current_stream().wait_stream(stream)
            graph = self.cuda.CUDAGraph()
            with self.cuda.graph(graph):
                kept = call()  # its memory belongs to the graph
            self._graphs[call] = graph, kept
        return self._graphs[call][0].replay


def clock_for(device: str, cold: bool = False, graph: bool = False) -> Clock:
    """The clock of a device type. ValueError for cold caches or graphs on a CPU."""
    if device == "cuda":
        return CudaClock(cold, graph)
    if cold or graph:
        raise ValueError(f"cold caches and graph replay are measured on cuda only, not on {device}")
    return HostClock()


def interleaved(
    calls: dict[str, Call],
    clock: Clock,
    *,
    seconds: float = 1.0,
    rounds: tuple[int, int] = (7, 200),
) -> dict[str, list[float]]:
    """Samples in microseconds of each call, one a round, in an order that changes every round.

    Stops after `seconds`, but not before the first and at the latest after the second number of `rounds`; where rounds take
    very long, 3 are enough. Each call runs before it counts, a short one twice. Sample i of one call was taken next to
    sample i of every other.
    """
    inner = {}
    for name, call in calls.items():
        us = clock.time_us(call, 1)
        if us < SAMPLE_US:
            us = clock.time_us(call, 1)
        inner[name] = max(1, math.ceil(SAMPLE_US / max(us, 1.0)))
    names = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in names}
    begin = time.perf_counter()
    for index in range(rounds[1]):
        taken = time.perf_counter() - begin
        if taken > seconds and index >= (3 if taken > PATIENCE_S else rounds[0]):
            break
        turn = index // 2 % len(names)
        order = names[turn:] + names[:turn]
        for name in order if index % 2 == 0 else reversed(order):
            samples[name].append(clock.time_us(calls[name], inner[name]))
    return samples
