"""Data races in shared, tensor and global memory: what orders two accesses decides, not when they ran.

An access races when the last write of a cell, or, if it writes, a read since, is not known to be over by the warp that
does or issues it. What is asynchronous accesses when it is issued and is over when somebody has waited for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tests.ptx.clocks import ENGINES, MMA, OVER, SEEN, Clocks
from tests.ptx.parser import Instr, PtxError
from tests.ptx.strand import DTYPES, Strand

if TYPE_CHECKING:
    from tests.ptx.machine import Machine
    from tests.ptx.memory import Binding

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


class Races(Clocks):
    """The last accesses of every cell of the resident CTAs, and what each warp knows to be over."""

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        ctas = len(machine.ctas)
        self.cell = cell_bytes(self.code)
        self.shared_cells = ctas * machine.shared_bytes // self.cell
        cells = self.shared_cells
        if any(instr.base == "tcgen05" for instr in self.code):
            cells += ctas * ROWS * COLUMNS
        self.writer = np.zeros(cells, np.int16)
        self.written = np.full(cells, NEVER, np.int64)
        self.readers = np.arange(self.warps)  # agents, a column of reads each
        self.column = np.full(self.world, NEVER)
        self.column[self.readers] = self.readers
        self.reads = np.full((cells, self.warps), NEVER, np.int64)
        self.stores: dict[
            str, tuple[np.ndarray, np.ndarray]
        ] = {}  # of each stored tensor by element: row, stamp - NEVER

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

    def copy(
        self, row: int, instr: Instr, place: tuple[int, int], cells: np.ndarray, writes: bool
    ) -> None:
        """A tensor copy that the warp `row` issues, to complete on the mbarrier at `place`, accesses `cells` [1, k]."""
        agent, rows = np.array([self.mbarrier(place)]), np.array([row])
        self._access(instr, cells, rows, agent, self.epochs[place[0], agent], writes, writes)

    def stored(self, strand: Strand, instr: Instr, lanes, addresses: np.ndarray, size: int) -> None:
        """The threads `lanes` store to global memory."""
        rows = strand.row[lanes]
        stamps = self._now(rows) + instr.at
        for binding in self.machine.memory.bindings:
            chosen, elements = binding.elements(addresses, size)
            if len(chosen):
                n = binding.extent // binding.itemsize
                # Zeros, which take no memory until they are touched: a tensor may have 2³¹ elements.
                empty = np.zeros(n, np.int16), np.zeros(n, np.int64)
                writer, written = self.stores.setdefault(binding.name, empty)
                writer[elements] = rows[chosen, None]
                written[elements] = stamps[chosen, None] - NEVER

    def loaded(self, strand: Strand, instr: Instr, lanes, addresses: np.ndarray, size: int) -> None:
        """The threads `lanes` load from global memory: what this launch has stored there must be over."""
        for binding in self.machine.memory.bindings if self.stores else ():
            rows = strand.row[lanes]
            self._loaded(instr, binding, rows, self.world + rows, OVER, addresses, size)

    def copied(
        self,
        row: int,
        instr: Instr,
        place: tuple[int, int],
        binding: Binding,
        addresses: np.ndarray,
    ) -> None:
        """A tensor copy that the warp `row` issues reads elements of a tensor: what threads stored there it must see."""
        rows, agents = np.full((2, len(addresses)), [[row], [self.mbarrier(place)]])
        self._loaded(instr, binding, rows, agents, SEEN, addresses, binding.itemsize)

    def _loaded(
        self, instr: Instr, binding: Binding, rows: np.ndarray, agents: np.ndarray, layer: int,
        addresses: np.ndarray, size: int,
    ) -> None:  # fmt: skip
        if binding.name not in self.stores:
            return
        chosen, elements = binding.elements(addresses, size)
        writer, written = (each[elements] for each in self.stores[binding.name])
        written = written + NEVER
        late = written >= self.known[layer][rows[chosen, None], self.world + writer]
        for n, k in np.argwhere(late)[:1]:
            place = f"byte {elements[n, k] * binding.itemsize} of {binding.name}"
            raise self._race(
                instr, place, int(rows[chosen[n]]), int(agents[chosen[n]]), False,
                "write", self.world + int(writer[n, k]), int(written[n, k]),
            )  # fmt: skip

    def ended(self, cta: int) -> None:
        """A CTA of a cluster ends, and its shared memory: what the others do there must be over for its warps."""
        warps, size = self.machine.warps, self.machine.shared_bytes // self.cell
        over = self.known[OVER, cta * warps : (cta + 1) * warps].max(0)
        first, rank = cta * size, cta % self.machine.cluster

        def late(agents: np.ndarray, stamps: np.ndarray) -> np.ndarray:
            own = agents % self.warps // warps == rank
            own &= agents < len(ENGINES) * self.warps  # a copy is anybody's
            return (stamps >= over[agents]) & ~own

        cells = np.arange(first, first + size)
        for cell in cells[late(self.writer[cells], self.written[cells])][:1]:
            raise self._unfinished(cta, "write", cell, self.writer[cell], self.written[cell])
        reads = self.reads[first : first + size]
        for n, k in np.argwhere(late(self.readers, reads))[:1]:
            raise self._unfinished(cta, "read", cells[n], self.readers[k], reads[n, k])

    def _unfinished(self, cta: int, kind: str, cell: int, agent: int, stamp: int) -> DataRace:
        instr = self.code[int(stamp) % self.step]
        return DataRace(
            f"unordered: CTA {self.machine.ctas[cta]} ends after {kind} of {self._place(int(cell))}"
            f"\nline {instr.line}: {instr.text}: {self._name(int(agent))}"
        )

    def _now(self, rows: np.ndarray) -> np.ndarray:
        return self.known[OVER, rows, self.own[rows]] - self.step

    def _access(
        self, instr, cells, rows, agents, epochs, writes: bool, fenced: bool = False, words=None
    ) -> None:
        """Checks accesses of `cells` [n, k], done or issued by the warps `rows`, against those before, and notes them."""

        def race(n: int, k: int, before: str, other: int, stamp: int) -> DataRace:
            access = instr, self._place(int(cells[n, k])), int(rows[n]), int(agents[n]), writes
            return self._race(*access, before, int(other), int(stamp))

        row, agent, stamps = rows[:, None], agents[:, None], epochs[:, None] + instr.at
        in_order = agent // self.warps == MMA  # one after the other
        writer, written = self.writer[cells], self.written[cells]
        over = self.known[OVER][row, writer]
        if fenced:
            over = np.where(self.threads_own[writer], self.known[SEEN][row, writer], over)
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
        reads, over = self.reads[cells], self.known[OVER][row, self.readers]
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
        """The columns of these agents' reads, which an agent gets with its first one."""
        new = np.unique(agents[self.column[agents] == NEVER])
        if len(new):
            self.column[new] = len(self.readers) + np.arange(len(new))
            self.readers = np.append(self.readers, new)
            self.reads = np.pad(self.reads, ((0, 0), (0, len(new))), constant_values=NEVER)
        return self.column[agents]

    def _race(
        self, instr: Instr, place: str, row: int, agent: int, writes: bool, before: str, other: int, stamp: int
    ) -> DataRace:  # fmt: skip
        """What is said of an access and the one with `stamp` by the agent `other` that it should come after."""
        first, cta = self.code[stamp % self.step], self.machine.ctas[row // self.machine.warps]
        how = "without a fence.proxy.async" if stamp < self.known[OVER, row, other] else "unordered"
        return DataRace(
            f"{how}: {'write' if writes else 'read'} after {before} of {place} in CTA {cta}"
            f"\nline {instr.line}: {instr.text}: {self._name(agent)}"
            f"\nline {first.line}: {first.text}: {self._name(other)}"
        )

    def _place(self, cell: int) -> str:
        if cell < self.shared_cells:
            return f"shared address {cell * self.cell % self.machine.shared_bytes}"
        row, column = divmod(cell - self.shared_cells, COLUMNS)
        return f"tensor memory lane {row % ROWS * LANES_OF_CELL} column {column}"
