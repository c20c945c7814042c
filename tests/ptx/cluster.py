"""Clusters of CTAs: their barrier, and addresses of another CTA's shared memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests.ptx.parser import SHARED_WINDOW, Instr, PtxError
from tests.ptx.strand import WAIT, Run, Strand, opcode


@dataclass
class ClusterBarrier:
    """Threads of a cluster that have arrived in this phase, what they hand on, and what those of the last phase did."""

    cluster: int
    clock: np.ndarray
    over: np.ndarray
    arrived: int = 0
    phase: int = 0

    def check(self, machine) -> None:
        first = self.cluster * machine.cluster
        if self.arrived and self.arrived >= machine.live[first : first + machine.cluster].sum():
            self.arrived, self.phase = 0, self.phase + 1
            self.over, self.clock = self.clock, np.zeros_like(self.clock)
            machine.events += 1


def cluster_barrier(machine, cluster: int) -> ClusterBarrier:
    empty = np.zeros_like(machine.races.known[:, 0])
    return machine.cluster_barriers.setdefault(cluster, ClusterBarrier(cluster, empty, empty))


@opcode("barrier.cluster.arrive")
def bind_arrive(instr: Instr, strand: Strand) -> Run:
    """A relaxed arrival hands on nothing but what a fence.mbarrier_init stands behind."""
    machine = strand.machine
    release = machine.races.relaxed if "relaxed" in instr.mods else machine.races.release

    def run(where):
        lanes = strand.indices(where)
        if (strand.cluster_phases[lanes] >= 0).any():
            raise PtxError(f"line {instr.line}: {instr.text}: arrives twice")
        clusters = strand.cta[lanes] // machine.cluster
        for cluster in map(int, np.unique(clusters)):
            mine = lanes[clusters == cluster]
            barrier = cluster_barrier(machine, cluster)
            strand.cluster_phases[mine] = barrier.phase
            barrier.clock = np.maximum(barrier.clock, release(np.unique(strand.row[mine])))
            barrier.arrived += len(mine)
            barrier.check(machine)

    return run


@opcode("barrier.cluster.wait")
def bind_wait(instr: Instr, strand: Strand) -> Run:
    machine = strand.machine

    def run(where):
        lanes = strand.indices(where)
        if (strand.cluster_phases[lanes] < 0).any():
            raise PtxError(f"line {instr.line}: {instr.text}: waits without having arrived")
        ready = np.zeros(strand.lanes, bool)
        clusters = strand.cta[lanes] // machine.cluster
        for cluster in map(int, np.unique(clusters)):
            mine = lanes[clusters == cluster]
            barrier = cluster_barrier(machine, cluster)
            passing = mine[strand.cluster_phases[mine] < barrier.phase]
            ready[passing] = True
            strand.cluster_phases[passing] = -1
            machine.races.acquire(np.unique(strand.row[passing]), barrier.over)
        return WAIT, ready

    return run


@opcode("fence.mbarrier_init")
def bind_init_fence(instr: Instr, strand: Strand) -> Run:
    races = strand.machine.races
    return lambda where: races.fence_init(np.unique(strand.row[strand.indices(where)]))


@opcode("mapa")
def bind_map(instr: Instr, strand: Strand) -> Run:
    """The address of the same variable in the CTA of another rank."""
    kind = instr.mods[-1]
    target = strand.target(instr.operands[0], kind)
    address, rank = strand.source(instr.operands[1], kind), strand.source(instr.operands[2], "u32")

    def run(where):
        mapped = address % SHARED_WINDOW + rank.astype(target.dtype) * SHARED_WINDOW
        np.copyto(target, mapped, casting="unsafe", where=where)

    return run


@opcode("getctarank")
def bind_rank(instr: Instr, strand: Strand) -> Run:
    target = strand.target(instr.operands[0], "u32")
    address = strand.source(instr.operands[1], instr.mods[-1])

    def run(where):
        np.copyto(target, address // SHARED_WINDOW, casting="unsafe", where=where)

    return run
