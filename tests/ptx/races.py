"""Data races in shared and tensor memory, by vector clocks: what orders two accesses decides, not when they ran.

An agent is a warp, an engine that a warp feeds, or the tensor copies that complete on one mbarrier. An access bears a
stamp, its agent's epoch in steps of `step` plus the number of the instruction, and each warp knows for every agent below
which stamp its accesses are over. An access races when the last write of a cell, or, if it writes, a read since, is not
known to be over by the warp that does or issues it. What is asynchronous accesses when it is issued and is over when
somebody has waited for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tests.ptx.parser import Instr, PtxError
from tests.ptx.strand import DTYPES, Strand

if TYPE_CHECKING:
    from tests.ptx.machine import Machine

WARP, CP_ASYNC, WGMMA, TENSOR_STORE, MMA, TENSOR_LD, TENSOR_ST, ALLOC = range(8)
ENGINES = ("", "cp.async of ", "wgmma of ", "tensor store of ", "tcgen05.mma of ", "tcgen05.ld of ",
           "tcgen05.st of ", "tcgen05.alloc of ")  # fmt: skip
THREADS_OWN = (WARP, CP_ASYNC)  # the others need a fence.proxy.async to see what these wrote
MBARRIERS = 64
LANES, COLUMNS = 128, 512  # of tensor memory
LANES_OF_CELL = 16
ROWS = LANES // LANES_OF_CELL
NEVER = -1


class DataRace(PtxError):
    """Two accesses of one place, one of them a write, that nothing orders."""


def cell_bytes(code: list[Instr]) -> int:
    """The smallest access to shared memory, at most a word: two warps' stores beside each other share no cell."""
    spaces = ("global", "local", "param", "const")
    sizes = [
        DTYPES[instr.mods[-1]].itemsize
        for instr in code
        if instr.base in ("ld", "st", "atom", "red")
        and not any(mod.partition("::")[0] in spaces for mod in instr.mods)
    ]
    return min([4, *sizes])


def _winners(cells: np.ndarray, words: np.ndarray) -> np.ndarray:
    """What each cell holds after all of `words` were stored, the last one where several go to one cell."""
    _, last, group = np.unique(cells.ravel()[::-1], return_index=True, return_inverse=True)
    return words.ravel()[::-1][last][group.ravel()][::-1].reshape(words.shape)


class Races:
    """The last accesses of every cell of the resident CTAs, and what each warp knows to be over."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.code = machine, machine.program.code
        self.warps, ctas = machine.warps, len(machine.ctas)
        self.step = 1 << len(self.code).bit_length()
        self.cell = cell_bytes(self.code)
        self.shared_cells = ctas * machine.shared_bytes // self.cell
        cells = self.shared_cells
        if any(instr.base == "tcgen05" for instr in self.code):
            cells += ctas * ROWS * COLUMNS
        agents = len(ENGINES) * self.warps + MBARRIERS
        # [what is over, what of it async operations see] [warp] [agent]: stamps below this
        self.known = np.zeros((2, ctas * self.warps, agents), np.int64)
        self.own = np.arange(ctas * self.warps) % self.warps
        self.known[0, np.arange(ctas * self.warps), self.own] = self.step
        self.threads_own = np.isin(np.arange(agents) // self.warps, THREADS_OWN)
        self.writer = np.zeros(cells, np.int16)
        self.written = np.full(cells, NEVER, np.int64)
        self.readers = np.arange(self.warps)  # agents, a column of reads each
        self.reads = np.full((cells, self.warps), NEVER, np.int64)
        self.mbarriers: dict[int, int] = {}
        self.epochs = np.zeros((ctas, agents), np.int64)  # of the copies on each mbarrier

    # What orders

    def release(self, rows: np.ndarray) -> np.ndarray:
        """What these warps know, for whoever waits for them; what they do from here on is not in it."""
        clock = self.known[:, rows].max(1)
        self.known[0, rows, self.own[rows]] += self.step
        return clock

    def acquire(self, rows: np.ndarray, clock: np.ndarray) -> None:
        """These warps have waited for what `clock` was released by."""
        self.known[:, rows] = np.maximum(self.known[:, rows], clock[:, None])

    def fence(self, rows: np.ndarray) -> None:
        """fence.proxy.async: what is over for these warps, asynchronous operations that they order see."""
        self.known[1, rows] = self.known[0, rows]
        self.known[0, rows, self.own[rows]] += self.step

    def finish(self, rows: np.ndarray, engine: int, groups: np.ndarray | None = None) -> None:
        """These warps have waited for their engine: for the groups below `groups`, or for all."""
        agents = engine * self.warps + self.own[rows]
        if groups is None:
            over = self.known[0, rows, self.own[rows]]
            self.known[0, rows, self.own[rows]] += self.step
        else:
            over = groups * self.step
        np.maximum.at(self.known[0], (rows, agents), over)

    def commit(self, row: int) -> np.ndarray:
        """What a tcgen05.commit of this warp says to be over: what the warp knows, and its multiplies so far."""
        clock = self.release(np.array([row]))
        clock[0, MMA * self.warps + self.own[row]] = clock[0, self.own[row]]
        return clock

    def mbarrier(self, address: int) -> int:
        """The agent of the tensor copies that complete on the mbarrier at `address`."""
        agent = len(ENGINES) * self.warps + self.mbarriers.setdefault(address, len(self.mbarriers))
        if agent >= self.known.shape[2]:
            raise PtxError(f"more than {MBARRIERS} mbarriers")
        return agent

    def complete(self, cta: int, address: int, clock: np.ndarray) -> None:
        """A phase of the mbarrier is over, and with it the copies issued in it."""
        agent = self.mbarrier(address)
        self.epochs[cta, agent] += self.step
        clock[0, agent] = self.epochs[cta, agent]

    # What is to be ordered

    def shared(self, start: np.ndarray, size: int) -> np.ndarray:
        """Cells [n, k] of n accesses of `size` bytes at byte indices into the batch's shared memory."""
        return start[:, None] // self.cell + np.arange(-(-size // self.cell))

    def tensor(self, cta: int, lanes: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Cells [1, k] of tensor memory; lanes and columns are broadcast against each other."""
        row = cta * ROWS + np.asarray(lanes) // LANES_OF_CELL
        return self.shared_cells + np.unique(row * COLUMNS + columns)[None, :]

    def threads(
        self, strand: Strand, instr: Instr, lanes, cells: np.ndarray, writes: bool,
        words: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        """The threads `lanes` access `cells` [lanes, k]; `words` are what they store there."""
        rows = strand.row[lanes]
        self._access(instr, cells, rows, self.own[rows], self._now(rows), writes, words=words)

    def engine(
        self, rows: np.ndarray, instr: Instr, engine: int, cells: np.ndarray, writes: bool,
        groups: np.ndarray | None = None, fenced: bool = False,
    ) -> None:  # fmt: skip
        """An engine that the warps `rows` feed accesses `cells` [rows, k]; without groups it is waited for as a whole."""
        stamps = self._now(rows) if groups is None else groups * self.step
        self._access(
            instr, cells, rows, engine * self.warps + self.own[rows], stamps, writes, fenced
        )

    def copy(self, row: int, instr: Instr, address: int, cells: np.ndarray, writes: bool) -> None:
        """A tensor copy that the warp `row` issues, to complete on the mbarrier at `address`, accesses `cells` [1, k]."""
        agent, rows = np.array([self.mbarrier(address)]), np.array([row])
        self._access(
            instr, cells, rows, agent, self.epochs[row // self.warps, agent], writes, writes
        )

    def _now(self, rows: np.ndarray) -> np.ndarray:
        return self.known[0, rows, self.own[rows]] - self.step

    def _access(
        self, instr, cells, rows, agents, epochs, writes: bool, fenced: bool = False, words=None
    ) -> None:
        """Checks accesses of `cells` [n, k], done or issued by the warps `rows`, against those before, and notes them."""

        def race(n: int, k: int, before: str, other: int, stamp: int) -> DataRace:
            access = instr, int(cells[n, k]), int(rows[n]), int(agents[n]), writes
            return self._race(*access, before, int(other), int(stamp))

        row, agent, stamps = rows[:, None], agents[:, None], epochs[:, None] + instr.at
        in_order = agent // self.warps == MMA  # one after the other
        writer, written = self.writer[cells], self.written[cells]
        over = self.known[0][row, writer]
        if fenced:
            over = np.where(self.threads_own[writer], self.known[1][row, writer], over)
        late = (written >= over) & ~(in_order & (writer == agent))
        if late.any():
            again = self._again(instr, cells, words, late)
            for n, k in np.argwhere(late & ~again)[:1]:
                raise race(n, k, "write", writer[n, k], written[n, k])
            self.reads[cells[again], writer[again]] = written[again]
        if not writes:
            columns = self._columns(agents)[:, None]
            self.reads[cells, columns] = stamps
            return
        reads, over = self.reads[cells], self.known[0][row, self.readers]
        late = (reads >= over[:, None]) & ~(in_order & (self.readers == agent))[:, None]
        if late.any():
            again = self._again(instr, cells, words, late.any(2))
            for n, k, m in np.argwhere(late & ~again[:, :, None])[:1]:
                raise race(n, k, "read", self.readers[m], reads[n, k, m])
        self.writer[cells], self.written[cells] = agent, stamps
        lost = self.writer[cells] != agent
        if lost.any():
            equal = words is not None and words == _winners(cells, words)
            for n, k in np.argwhere(lost & ~equal)[:1]:
                last = cells[n, k]
                raise race(n, k, "write", self.writer[last], self.written[last])
            agent, stamps = (np.broadcast_to(each, cells.shape)[lost] for each in (agent, stamps))
            self.reads[cells[lost], agent] = stamps

    def _again(self, instr: Instr, cells: np.ndarray, words, late: np.ndarray) -> np.ndarray:
        """Where a warp only stores again what another has stored by this instruction: both hold the same element.

        A reader may find either; a later write must come after both, so the store that is not noted counts as a read.
        """
        again = np.zeros_like(late)
        if words is not None:
            some, memory = cells[late], self.machine.shared.view(words.dtype)
            same_store = self.written[some] % self.step == instr.at
            again[late] = same_store & (memory[some] == words[late])
        return again

    def _columns(self, agents: np.ndarray) -> np.ndarray:
        if agents.max() < self.warps:
            return agents
        for agent in np.setdiff1d(agents, self.readers):
            self.readers = np.append(self.readers, agent)
            self.reads = np.pad(self.reads, ((0, 0), (0, 1)), constant_values=NEVER)
        order = np.argsort(self.readers)
        return order[np.searchsorted(self.readers, agents, sorter=order)]

    # What is said

    def _race(
        self, instr: Instr, cell: int, row: int, agent: int, writes: bool, before: str, other: int, stamp: int
    ) -> DataRace:  # fmt: skip
        """What is said of an access and the one with `stamp` by the agent `other` that it should come after."""
        first, cta = self.code[stamp % self.step], self.machine.ctas[row // self.warps]
        how = "without a fence.proxy.async" if stamp < self.known[0, row, other] else "unordered"
        return DataRace(
            f"{how}: {'write' if writes else 'read'} after {before} of {self._place(cell)} of CTA {cta}"
            f"\nline {instr.line}: {instr.text}: {self._name(agent)}"
            f"\nline {first.line}: {first.text}: {self._name(other)}"
        )

    def _name(self, agent: int) -> str:
        engine, warp = divmod(agent, self.warps)
        if engine < len(ENGINES):
            return f"{ENGINES[engine]}warp {warp}"
        number = agent - len(ENGINES) * self.warps
        address = next(a for a, n in self.mbarriers.items() if n == number)
        return f"copy to mbarrier {address}"

    def _place(self, cell: int) -> str:
        if cell < self.shared_cells:
            return f"shared address {cell * self.cell % self.machine.shared_bytes}"
        row, column = divmod(cell - self.shared_cells, COLUMNS)
        return f"tensor memory lane {row % ROWS * LANES_OF_CELL} column {column}"
