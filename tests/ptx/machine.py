"""The processor: threads with program counters of their own, stepped together where they stand at the same instruction.

Lockstep: all warps of all resident CTAs are one strand, and the threads at the lowest instruction go first. With a seed
every warp is a strand of its own and a random one runs for a random number of steps, so that what no barrier orders
happens in many orders.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

import tests.ptx.access
import tests.ptx.arithmetic
import tests.ptx.cluster
import tests.ptx.control
import tests.ptx.fragments
import tests.ptx.tcgen05
import tests.ptx.tma
import tests.ptx.wgmma  # noqa: F401, importing these registers their opcodes
from tests.ptx.cluster import ClusterBarrier
from tests.ptx.control import CtaBarrier
from tests.ptx.counters import Counters
from tests.ptx.memory import GlobalMemory
from tests.ptx.parser import Program, PtxError
from tests.ptx.races import COLUMNS, LANES, Races
from tests.ptx.strand import JUMP, PARK, STOP, SWITCH, WAIT, Strand
from tests.ptx.tma import Barrier, Descriptor, finish_bulk_stores

MAX_STEPS = 20_000_000
LONGEST_BURST = 60
# What a thread may have to wait at.
MAY_HOLD = ("mbarrier", "griddepcontrol", "bar", "barrier", "ld")
MOST_POLLS = 1000  # in vain


@dataclass
class Machine:
    """Resident CTAs of one launch: their shared and tensor memory, barriers, and work under way."""

    program: Program
    ctas: list[tuple[int, int, int]]
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_size: int
    params: np.ndarray
    memory: GlobalMemory
    descriptors: dict[int, Descriptor]
    counters: Counters
    rng: np.random.Generator | None = None
    primary: Machine | None = None  # the launch that griddepcontrol.wait waits for
    barriers: dict[tuple[int, int], Barrier] = field(default_factory=dict)
    cluster_barriers: dict[int, ClusterBarrier] = field(default_factory=dict)
    cta_barriers: dict[tuple, CtaBarrier] = field(default_factory=dict)
    tensor_columns: dict[int, int] = field(default_factory=dict)
    tensor_work: dict[int, list] = field(default_factory=dict)
    events: int = 0
    polls: dict[tuple, np.ndarray] = field(
        default_factory=dict
    )  # events at each lane's ld that polls
    polled_again: int = 0
    lets_begin: bool = False  # a CTA just let a dependent launch begin

    def __post_init__(self) -> None:
        threads = int(np.prod(self.block))
        if threads % 32:
            raise PtxError(f"a block must be whole warps, got {threads} threads")
        self.warps = threads // 32
        self.cluster = (
            self.program.cluster
        )  # the CTAs of one stand beside each other, in the order of their ranks
        n_ctas, warps = len(self.ctas), list(range(self.warps))
        self.shared_bytes = -(-max(self.shared_size, 16) // 1024) * 1024
        self.shared = np.full(n_ctas * self.shared_bytes, 0xFF, np.uint8)
        self.races = Races(self)
        if any("tcgen05" in instr.opcode for instr in self.program.code):
            self.tensor_memory = np.full((n_ctas, LANES, COLUMNS), 0xFFFFFFFF, np.uint32)
        self.live = np.full(n_ctas, threads)  # by CTA, and of all
        self.alive = threads * n_ctas
        self.issued = [0] * len(self.program.code)  # by instruction: the warps that executed it
        self.launched = np.zeros(n_ctas, bool)
        groups = [warps] if self.rng is None else [[warp] for warp in warps]
        self.strands = [Strand(self, list(range(n_ctas)), group) for group in groups]
        self.cursors = [Cursor(self, strand) for strand in self.strands]

    @property
    def done(self) -> bool:
        return not self.alive

    @property
    def released(self) -> bool:
        """Whether a dependent launch may begin: every CTA has let it, or has ended."""
        return bool((self.launched | (self.live == 0)).all())

    @property
    def happened(self) -> int:
        """What changes when those that wait at a try_wait may go on: the primary's end is one event."""
        return self.events + (self.primary is not None and self.primary.done)

    def lands_early(self) -> bool:
        """Whether an asynchronous copy arrives at once: never in lockstep, half the time at random."""
        return self.rng is not None and bool(self.rng.random() < 0.5)

    def special(self, strand: Strand, name: str) -> np.ndarray:
        """The value of a special register, by lane or for all."""
        base, _, axis = name.partition(".")
        at = {"x": 0, "y": 1, "z": 2}.get(axis, 0)
        if base == "tid":
            x, y, _ = self.block
            return [strand.thread % x, strand.thread // x % y, strand.thread // (x * y)][at]
        along = self.cluster if at == 0 and "cluster" in base else 1
        if base in ("ctaid", "clusterid"):
            return np.array([cta[at] // along for cta in self.ctas])[strand.cta]
        if base in ("nctaid", "nclusterid"):
            return np.array([self.grid[at] // along])
        if base == "ntid":
            return np.array([self.block[at]])
        if name in ("cluster_ctarank", "cluster_ctaid.x"):
            return strand.rank
        if base == "cluster_nctarank":
            return np.array([self.cluster])
        raise PtxError(f"unknown special register %{name}")

    def finish_tensor_work(self, barrier: Barrier, phase: int) -> None:
        """Runs queued tensor-core work of the barrier's cluster, each CTA's in order, until its phase is complete."""
        first = barrier.place[0] // self.cluster * self.cluster
        for cta in range(first, first + self.cluster):
            queue = self.tensor_work.get(cta, [])
            while barrier.phase == phase and any(
                any(each is barrier for each in arrives) for arrives, _ in queue
            ):
                queue.pop(0)[1]()

    def run(self) -> None:
        """Until every thread has ended."""
        for _ in self.steps():
            pass

    def steps(self) -> Iterator[None]:
        """One burst at a time; PtxError when threads are left and none can go on."""
        for count in range(MAX_STEPS):
            if self.done:
                break
            ready = [cursor for cursor in self.cursors if cursor.ready()]
            if not ready:
                if self.primary is not None and not self.primary.done:
                    yield
                    continue
                if self._poll_again():
                    continue
                raise PtxError(self.deadlock())
            if self.rng is None:
                ready[0].step()
            else:
                cursor = ready[int(self.rng.integers(len(ready)))]
                for _ in range(int(self.rng.integers(1, LONGEST_BURST))):
                    if not cursor.ready():
                        break
                    cursor.step()
            if self.rng is not None or count % 64 == 0 or self.lets_begin:
                self.lets_begin = False
                yield
        else:
            raise PtxError(f"{self.program.name} did not end in {MAX_STEPS} steps")
        for strand in self.strands:
            finish_bulk_stores(strand, True, strand.bulk_commits + 1)
        for instr, warps in zip(self.program.code, self.issued, strict=True):
            if warps:
                self.counters.executed(instr.opcode, warps)

    def _poll_again(self) -> bool:
        """Lets those that wait at an ld that polls load once more: another word there is news to them without an event."""
        if not self.polls or self.polled_again > MOST_POLLS:
            return False
        self.polled_again += 1
        self.polls.clear()
        for cursor in self.cursors:
            cursor.go_on()
        return True

    def deadlock(self) -> str:
        stuck = {}
        for cursor in self.cursors:
            cursor.disband()
            for lane in np.flatnonzero(~cursor.ended):
                instr = self.program.code[int(cursor.pcs[lane])]
                where = f"CTA {self.ctas[int(cursor.strand.cta[lane])]} warp {int(cursor.strand.warp[lane])}"
                stuck.setdefault(f"line {instr.line}: {instr.text}", set()).add(where)
        lines = [f"{text}: {', '.join(sorted(where)[:6])}" for text, where in stuck.items()]
        return f"{self.program.name}: nobody can go on\n" + "\n".join(lines)


class Cursor:
    """The program counters of a strand's lanes, and which of them are parked or have ended.

    The lanes at the lowest counter are a group, which goes on as one until it jumps, waits or comes to where others stand.
    """

    def __init__(self, machine: Machine, strand: Strand) -> None:
        self.machine, self.strand = machine, strand
        self.pcs = np.zeros(strand.lanes, np.int64)  # but for the group, which is at `at`
        self.parked = np.zeros(strand.lanes, bool)  # at a CTA barrier, until it releases them
        self.waiting = np.zeros(strand.lanes, bool)  # at a try_wait, until something happens
        self.ended = np.zeros(strand.lanes, bool)
        self.any_waiting = False
        self.seen_events = -1
        self.group: object = None  # True: every lane; None: to be found
        self.at = self.next = self.warps = 0  # `next`: the lowest counter of the others
        strand.cursor = self

    def ready(self) -> bool:
        if self.any_waiting and self.seen_events != self.machine.happened:
            self.go_on()
        return self.group is not None or self._gather()

    def go_on(self) -> None:
        """Nobody waits any more."""
        self.disband()
        self.waiting[:] = self.any_waiting = False

    def disband(self) -> None:
        if self.group is not None:
            self._set(self.group, self.at)
            self.group = None

    def _gather(self) -> bool:
        """Makes those that can run and stand at the lowest counter the group; False where none can."""
        able = ~(self.parked | self.waiting | self.ended)
        counters = self.pcs if able.all() else self.pcs[able]
        if not len(counters):
            return False
        self.at = int(counters.min())
        where = able & (self.pcs == self.at)
        count = np.count_nonzero(where)
        others = counters[counters != self.at] if count < len(counters) else ()
        self.next = int(others.min()) if len(others) else len(self.machine.program.code) + 1
        self.warps = len(self.strand.active_warps(where))
        where.flags.writeable = False
        self.group = True if count == self.strand.lanes else where
        return True

    def step(self) -> None:
        """One instruction of the group, which `ready` has found."""
        at, where, strand = self.at, self.group, self.strand
        instr = self.machine.program.code[at]
        run = strand.bound[at] or strand.bind(at)
        guard = None
        if instr.guard is not None and instr.base in MAY_HOLD:
            flag = strand.source(instr.guard, "pred")
            guard = ~flag if instr.negated else flag.copy()
        try:
            answer = run(where)
        except PtxError:
            raise
        except (IndexError, ValueError, TypeError) as error:
            raise PtxError(
                f"line {instr.line}: {instr.text}: {type(error).__name__}: {error}"
            ) from error
        self.machine.issued[at] += self.warps
        if isinstance(answer, tuple):
            self._advance(at, where, answer, instr.target, guard)
        elif self.group is None:  # what it did has moved others
            self._set(where, at + 1)
        else:
            self.at = at + 1
            if self.at == self.next:
                self.disband()

    def _advance(self, at: int, where, answer: tuple, target: int, guard) -> None:
        """Move the lanes of `where` on, by what the instruction answered."""
        kind, lanes = answer
        if kind == JUMP and where is True and (lanes is True or not lanes.any()):
            self.at = target if lanes is True else at + 1
            return
        self.group = None
        self._set(where, at + 1)
        if kind == JUMP:
            self._set(lanes, target)
        elif kind == SWITCH:
            jumping, places = lanes
            self.pcs[jumping] = places[jumping]
        elif kind == STOP:
            self._end(lanes)
        elif kind == PARK:
            held = np.broadcast_to(lanes, self.strand.lanes)
            if held.any():
                self.pcs[held] = at
                self.parked |= held
        elif kind == WAIT:
            held = np.broadcast_to(where, self.strand.lanes) & ~lanes
            if guard is not None:
                held = held & guard
            if held.any():
                self.pcs[held] = at
                self.waiting |= held
                self.any_waiting = True
                self.seen_events = self.machine.happened

    def _set(self, lanes, at: int) -> None:
        if lanes is True:
            self.pcs[:] = at
        else:
            self.pcs[lanes] = at

    def _end(self, lanes) -> None:
        ending = np.broadcast_to(lanes, self.strand.lanes) & ~self.ended
        self.ended |= ending
        np.subtract.at(self.machine.live, self.strand.cta[ending], 1)
        self.machine.alive = int(self.machine.live.sum())
        for cta in np.unique(self.strand.cta[ending]) if self.machine.cluster > 1 else ():
            if not self.machine.live[cta]:
                self.machine.races.ended(int(cta))
        for key, barrier in list(self.machine.cta_barriers.items()):
            barrier.check(self.machine, key)
        for cluster_barrier in self.machine.cluster_barriers.values():
            cluster_barrier.check(self.machine)

    def release(self, lanes: np.ndarray) -> None:
        """Lets parked lanes pass the barrier they stand at."""
        self.disband()
        self.parked[lanes] = False
        self.pcs[lanes] += 1
