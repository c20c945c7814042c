"""What is over for whom: vector clocks of a launch's warps and of the engines that work for them.

An agent is a warp, an engine that a warp feeds, or the tensor copies that complete on one mbarrier. An access bears a
stamp, its agent's epoch in steps of `step` plus the number of the instruction, and each warp knows for every agent below
which stamp its accesses are over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tests.ptx.parser import PtxError

if TYPE_CHECKING:
    from tests.ptx.machine import Machine

WARP, CP_ASYNC, WGMMA, TENSOR_STORE, MMA, TENSOR_LD, TENSOR_ST, ALLOC, INIT = range(9)
ENGINES = ("", "cp.async of ", "wgmma of ", "tensor store of ", "tcgen05.mma of ", "tcgen05.ld of ",
           "tcgen05.st of ", "tcgen05.alloc of ", "mbarrier.init of ")  # fmt: skip
THREADS_OWN = (WARP, CP_ASYNC)  # the others need a fence.proxy.async to see what these wrote
MBARRIERS = 64
# The layers of a clock: the accesses that are over; those of them that asynchronous operations see; those that a memory
# fence has followed; those that atomics say to be over, which a memory fence makes so.
OVER, SEEN, FENCED, SAID = range(4)


class Clocks:
    """One for every warp of the resident CTAs, which are the `rows`; a cluster's agents have the same numbers in each.

    The last columns are the warps once more, by row: what of their accesses to global memory is over, also in other CTAs.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine, self.code = machine, machine.program.code
        self.warps, ctas = machine.cluster * machine.warps, len(machine.ctas)  # warps of a cluster
        self.step = 1 << len(self.code).bit_length()
        rows = np.arange(ctas * machine.warps)
        self.own = rows % self.warps
        self.world = len(ENGINES) * self.warps + MBARRIERS
        self.known = np.zeros(
            (4, len(rows), self.world + len(rows)), np.int64
        )  # [layer, row, agent]
        self._tick(rows)
        self.threads_own = np.isin(np.arange(self.world) // self.warps, THREADS_OWN)
        self.mbarriers: dict[tuple[int, int], int] = {}  # by rank and shared address
        self.epochs = np.zeros(
            (ctas, self.world), np.int64
        )  # of the copies on each CTA's mbarriers
        self.made = np.zeros(len(rows), np.int64)  # by each warp: the mbarriers that it has fenced
        self.atomics: dict[int, np.ndarray] = {}  # what those at an address have said

    def release(self, rows: np.ndarray) -> np.ndarray:
        """What these warps know, for whoever waits for them; what they do from here on is not in it."""
        clock = self.known[:, rows].max(1)
        self._tick(rows)
        return clock

    def _tick(self, rows: np.ndarray) -> None:
        self.known[OVER, rows, self.own[rows]] += self.step
        self.known[OVER, rows, self.world + rows] += self.step

    def acquire(self, rows: np.ndarray, clock: np.ndarray) -> None:
        """These warps have waited for what `clock` was released by."""
        self.known[:, rows] = np.maximum(self.known[:, rows], clock[:, None])

    def fence(self, rows: np.ndarray, space: str | None = None) -> None:
        """fence.proxy.async: what is over for these warps, asynchronous operations see; in `space`, or anywhere."""
        world = slice(self.world, None)
        own = slice(self.world) if space == "shared" else world if space else slice(None)
        self.known[SEEN, rows, own] = self.known[OVER, rows, own]
        self._tick(rows)

    def finish(self, rows: np.ndarray, engine: int, groups: np.ndarray | None = None) -> None:
        """These warps have waited for their engine: for the groups below `groups`, or for all."""
        agents = engine * self.warps + self.own[rows]
        if groups is None:
            over = self.known[OVER, rows, self.own[rows]]
            self._tick(rows)
        else:
            over = groups * self.step
        np.maximum.at(self.known[OVER], (rows, agents), over)

    def commit(self, row: int) -> np.ndarray:
        """What a tcgen05.commit of this warp says to be over: what the warp knows, and its multiplies so far."""
        clock = self.release(np.array([row]))
        clock[OVER, MMA * self.warps + self.own[row]] = clock[OVER, self.own[row]]
        return clock

    def mbarrier(self, place: tuple[int, int]) -> int:
        """The agent of the tensor copies that complete on the mbarrier at `place`, a CTA and a shared address."""
        key = place[0] % self.machine.cluster, place[1]
        agent = len(ENGINES) * self.warps + self.mbarriers.setdefault(key, len(self.mbarriers))
        if agent >= self.world:
            raise PtxError(f"more than {MBARRIERS} mbarriers")
        return agent

    def complete(self, place: tuple[int, int], clock: np.ndarray) -> None:
        """A phase of the mbarrier is over, and with it the copies issued in it."""
        agent = self.mbarrier(place)
        self.epochs[place[0], agent] += self.step
        clock[OVER, agent] = self.epochs[place[0], agent]

    def fence_init(self, rows: np.ndarray) -> None:
        """fence.mbarrier_init: the mbarriers that these warps have made are over for whom they tell, and nothing else."""
        self.made[rows] = self.known[OVER, rows, self.own[rows]]
        self._tick(rows)

    def relaxed(self, rows: np.ndarray) -> np.ndarray:
        """What these warps hand on by an arrival that releases nothing: what a fence.mbarrier_init stands behind."""
        clock = np.zeros_like(self.known[:, 0])
        np.maximum.at(clock[OVER], INIT * self.warps + self.own[rows], self.made[rows])
        return clock

    def memory_fence(self, rows: np.ndarray) -> None:
        """membar or fence: what atomics before it have said is over, and atomics from here on say what is over.

        So too where a CTA barrier stands between the fence and another warp's atomic, as of a fence.sc.
        """
        self._acquire_fence(rows)
        self._release_fence(rows)

    def _acquire_fence(self, rows: np.ndarray) -> None:
        self.known[OVER, rows] = self.known[[OVER, SAID]][:, rows].max(0)

    def _release_fence(self, rows: np.ndarray) -> None:
        self.known[FENCED, rows] = self.known[OVER, rows]
        self._tick(rows)

    def atomic(self, row: int, address: int, order: str) -> None:
        """Hands on what the atomics at `address` before it have said, and what this warp has fenced."""
        rows = np.array([row])
        if order in ("release", "acq_rel"):
            self._release_fence(rows)
        clock = self._hear(row, address)
        self.atomics[address] = np.maximum(self.known[FENCED, row, self.world :], clock)
        if order in ("acquire", "acq_rel"):
            self._acquire_fence(rows)

    def acquire_load(self, row: int, address: int) -> None:
        """ld.acquire: takes what the atomics at `address` have said."""
        self._hear(row, address)
        self._acquire_fence(np.array([row]))

    def _hear(self, row: int, address: int) -> np.ndarray:
        said = self.known[SAID, row, self.world :]
        clock = self.atomics.get(address, np.zeros_like(said))
        np.maximum(said, clock, out=said)
        return clock

    def _name(self, agent: int) -> str:
        engine, warp = divmod(agent, self.warps)
        if engine < len(ENGINES):
            rank, warp = divmod(warp, self.machine.warps)
            return f"{ENGINES[engine]}warp {warp}" + self._of_rank(rank)
        if agent >= self.world:
            cta, warp = divmod(agent - self.world, self.machine.warps)
            return f"warp {warp} of CTA {self.machine.ctas[cta]}"
        number = agent - len(ENGINES) * self.warps
        rank, address = next(a for a, n in self.mbarriers.items() if n == number)
        return f"copy to mbarrier {address}" + self._of_rank(rank)

    def _of_rank(self, rank: int) -> str:
        return f" of rank {rank}" if self.machine.cluster > 1 else ""
