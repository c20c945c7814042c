"""Branches, ends, barriers of a CTA or a warp, and the order of dependent launches."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from tests.ptx.parser import Instr, PtxError
from tests.ptx.strand import JUMP, PARK, STOP, SWITCH, WAIT, Run, Strand, opcode


@dataclass
class CtaBarrier:
    """Threads that have arrived at a barrier, and how many it takes (None: all that have not ended)."""

    expected: int | None
    clock: np.ndarray
    arrived: int = 0
    rows: list[np.ndarray] = field(default_factory=list)  # warps that come after all that arrived
    parked: list[tuple[Strand, np.ndarray]] = field(default_factory=list)

    def check(self, machine, key: tuple) -> bool:
        """Releases everybody once the last has arrived."""
        needed = int(machine.live[key[0]]) if self.expected is None else self.expected
        if not self.arrived or self.arrived < needed:
            return False
        del machine.cta_barriers[key]
        for rows in self.rows:
            machine.races.acquire(rows, self.clock)
        for strand, lanes in self.parked:
            strand.cursor.release(lanes)
        return True


@opcode("bra")
def bind_branch(instr: Instr, strand: Strand) -> Run:
    return lambda where: (JUMP, where)


@opcode("brx.idx")
def bind_indexed_branch(instr: Instr, strand: Strand) -> Run:
    index, targets = strand.by_lane(instr.operands[0], "u32"), np.array(instr.targets)

    def run(where):
        chosen = index[strand.indices(where)]
        if (chosen >= len(targets)).any():
            raise PtxError(f"line {instr.line}: {instr.text}: {chosen.max()} of {len(targets)}")
        places = np.zeros(strand.lanes, np.int64)
        places[strand.indices(where)] = targets[chosen]
        return SWITCH, (where, places)

    return run


@opcode("ret", "exit")
def bind_end(instr: Instr, strand: Strand) -> Run:
    return lambda where: (STOP, where)


@opcode("trap", "brkpt")
def bind_trap(instr: Instr, strand: Strand) -> Run:
    def run(where):
        if np.any(where):
            raise PtxError(f"line {instr.line}: {instr.text}: the kernel trapped")

    return run


def number(strand: Strand, operand, where) -> int:
    """The value of an operand that all active lanes agree on."""
    values = np.unique(strand.by_lane(operand, "u32")[strand.indices(where)])
    if len(values) != 1:
        raise PtxError(f"a barrier operand differs between threads: {values}")
    return int(values[0])


@opcode("bar.sync", "bar.arrive", "bar.cta.sync", "bar.cta.arrive", "barrier.sync", "barrier.arrive",
        "barrier.cta.sync", "barrier.cta.arrive")  # fmt: skip
def bind_cta_barrier(instr: Instr, strand: Strand) -> Run:
    machine, parks = strand.machine, "sync" in instr.mods
    counted = instr.operands[1] if len(instr.operands) > 1 else None

    def run(where):
        name = number(strand, instr.operands[0], where)
        expected = None if counted is None else number(strand, counted, where)
        lanes = strand.indices(where)
        held = np.zeros(strand.lanes, bool)
        for cta in np.unique(strand.cta[lanes]):
            mine = lanes[strand.cta[lanes] == cta]
            passed = arrive(machine, (int(cta), name), expected, strand, mine, parks)
            held[mine] = parks and not passed
        return PARK, held

    return run


@opcode("bar.warp.sync")
def bind_warp_barrier(instr: Instr, strand: Strand) -> Run:
    """Waits for the lanes of the mask; those that have ended are not waited for."""
    machine, masks = strand.machine, strand.by_lane(instr.operands[0], "u32")

    def run(where):
        lanes = strand.indices(where)
        held = np.zeros(strand.lanes, bool)
        for first in np.unique(lanes // 32) * 32:
            mine = lanes[lanes // 32 * 32 == first]
            wanted = (int(masks[mine[0]]) >> np.arange(32) & 1).astype(bool)
            expected = int((wanted & ~strand.cursor.ended[first : first + 32]).sum())
            key = (int(strand.cta[first]), "warp", int(strand.warp[first]))
            held[mine] = not arrive(machine, key, expected, strand, mine, True)
        return PARK, held

    return run


def arrive(machine, key: tuple, expected: int | None, strand: Strand, lanes, parks: bool) -> bool:
    """Counts `lanes` in; True when they were the last. The arriving lanes themselves are moved on by their own step."""
    rows = np.unique(strand.row[lanes])
    clock = machine.races.release(rows)
    barrier = machine.cta_barriers.setdefault(key, CtaBarrier(expected, clock))
    np.maximum(barrier.clock, clock, out=barrier.clock)
    barrier.arrived += len(lanes)
    if parks:
        barrier.rows.append(rows)
    if barrier.check(machine, key):
        return True
    if parks:
        barrier.parked.append((strand, lanes))
    return False


@opcode("griddepcontrol.launch_dependents")
def bind_launch_dependents(instr: Instr, strand: Strand) -> Run:
    machine = strand.machine

    def run(where):
        machine.launched[strand.cta[strand.indices(where)]] = machine.lets_begin = True

    return run


@opcode("griddepcontrol.wait")
def bind_wait_for_primary(instr: Instr, strand: Strand) -> Run:
    """Holds every lane until the launch before has ended and its stores are visible."""
    machine = strand.machine

    def run(where):
        free = machine.primary is None or machine.primary.done
        return WAIT, np.full(strand.lanes, free)

    return run
