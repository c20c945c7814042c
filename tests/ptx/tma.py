"""Barriers in shared memory (mbarrier) and the tensor copies that complete on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from tests.ptx.access import address_of, explain, shared_access, shared_index
from tests.ptx.clocks import INIT, TENSOR_STORE
from tests.ptx.memory import Binding
from tests.ptx.parser import PARAM_WINDOW, SHARED_WINDOW, Imm, Instr, PtxError
from tests.ptx.strand import DTYPES, WAIT, Run, Strand, opcode
from tests.ptx.wgmma import swizzled

SWIZZLE_BYTES = {0: 0, 1: 32, 2: 64, 3: 128}


@dataclass
class Descriptor:
    """A tensor map: the tensor, its sizes and strides in elements, and the box one copy moves."""

    binding: Binding
    shape: list[int]
    strides: list[int]
    box: list[int]
    swizzle: int
    itemsize: int

    def place(self, coords: list[int], shared: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Global addresses, shared addresses and in-bounds flags of the box at `coords`."""
        index = np.indices(self.box).reshape(len(self.box), -1)
        inside, address = np.ones(index.shape[1], bool), np.full(index.shape[1], self.binding.start)
        for along, start, size, stride in zip(index, coords, self.shape, self.strides, strict=True):
            position = along + start
            inside &= (position >= 0) & (position < size)
            address = address + position * stride * self.itemsize
        offset = shared + np.arange(index.shape[1]) * self.itemsize
        return address, swizzled(offset, SWIZZLE_BYTES[self.swizzle]), inside


@dataclass
class Barrier:
    """An mbarrier: arrivals and bytes still missing in this phase, and the copies on their way.

    `clock` is what those that arrived and the copies that landed knew; who sees the phase complete knows `over`.
    """

    place: tuple[int, int]  # CTA and shared address
    count: int
    pending: int
    clock: np.ndarray
    over: np.ndarray
    missing: int = 0
    phase: int = 0
    transfers: list[tuple[Callable[[], int], np.ndarray]] = field(default_factory=list)

    def arrive(self, machine, clock: np.ndarray, count: int = 1, extra_bytes: int = 0) -> None:
        self.pending -= count
        self.missing += extra_bytes
        self.check(machine, clock)

    def land(self, machine) -> None:
        """Lets the oldest copy land."""
        transfer, clock = self.transfers.pop(0)
        self.missing -= transfer()
        self.check(machine, clock)

    def check(self, machine, clock: np.ndarray) -> None:
        np.maximum(self.clock, clock, out=self.clock)
        if self.pending == 0 and self.missing == 0:
            self.phase ^= 1
            self.pending = self.count
            machine.races.complete(self.place, self.clock)
            self.over = self.clock.copy()
            machine.events += 1


def barriers_of(strand: Strand, addresses: np.ndarray, where):
    """(lane, the CTA, the shared address of its barrier) of every active lane; the CTA may be another of the cluster."""
    for lane in strand.indices(where):
        rank, address = divmod(int(addresses[lane]), SHARED_WINDOW)
        yield int(lane), int(strand.cta[lane] - strand.rank[lane]) + rank, address


def members(strand: Strand, lane: int, mask: np.ndarray) -> list[int]:
    """The CTAs of this lane's cluster whose ranks are in its mask."""
    first, bits = int(strand.cta[lane] - strand.rank[lane]), int(mask[lane])
    return [first + rank for rank in range(strand.machine.cluster) if bits >> rank & 1]


def barrier_at(strand: Strand, instr: Instr, key: tuple[int, int]) -> Barrier:
    barrier = strand.machine.barriers.get(key)
    if not strand.machine.live[key[0]]:
        raise PtxError(f"line {instr.line}: {instr.text}: the mbarrier of a CTA that has ended")
    if barrier is None:
        raise PtxError(f"line {instr.line}: {instr.text}: no mbarrier at shared address {key[1]}")
    return barrier


def touch(strand: Strand, instr: Instr, addresses: np.ndarray, where, writes: bool) -> None:
    """An mbarrier's own eight bytes: making and ending it write, arriving and waiting read."""
    lanes = strand.indices(where)
    if not writes:
        shared_access(strand, instr, addresses[lanes], lanes, 8, False)
        return
    races, rows = strand.machine.races, strand.row[lanes]
    cells = races.shared(shared_index(strand, instr, addresses[lanes], lanes, 8), 8)
    races.engine(rows, instr, INIT, cells, True)
    races.finish(rows, INIT)


@opcode("mbarrier.init", "mbarrier.inval")
def bind_init(instr: Instr, strand: Strand) -> Run:
    addresses_of = address_of(strand, instr.operands[0])
    init = instr.mods[0] == "init"
    count = strand.by_lane(instr.operands[1], "u32") if init else None

    def run(where):
        touch(strand, instr, addresses_of(), where, True)
        for lane, *key in barriers_of(strand, addresses_of(), where):
            if init:
                n = int(count[lane])
                clock = np.zeros_like(strand.machine.races.known[:, 0])
                strand.machine.barriers[tuple(key)] = Barrier(tuple(key), n, n, clock, clock)
            else:
                barrier_at(strand, instr, tuple(key))
                del strand.machine.barriers[tuple(key)]

    return run


@opcode("mbarrier.arrive")
def bind_arrive(instr: Instr, strand: Strand) -> Run:
    operands = [o for o in instr.operands if not (isinstance(o, Imm) and o.text == "_")]
    addresses_of = address_of(strand, operands[0])
    value = strand.by_lane(operands[1] if len(operands) > 1 else Imm("1"), "u32")
    expects = "expect_tx" in instr.mods

    def run(where):
        touch(strand, instr, addresses_of(), where, False)
        for lane, *key in barriers_of(strand, addresses_of(), where):
            n = int(value[lane])
            barrier = barrier_at(strand, instr, tuple(key))
            clock = strand.machine.races.release(strand.row[[lane]])
            barrier.arrive(strand.machine, clock, 1 if expects else n, n if expects else 0)

    return run


@opcode("mbarrier.try_wait", "mbarrier.test_wait")
def bind_try_wait(instr: Instr, strand: Strand) -> Run:
    """Gives the lanes whose phase is complete; the scheduler parks the others.

    A copy lands no earlier than somebody waits for its barrier (or, in random order, any time).
    """
    if "parity" not in instr.mods:
        raise PtxError(f"line {instr.line}: unknown opcode: {instr.text}")
    machine = strand.machine
    addresses_of = address_of(strand, instr.operands[1])
    parity = strand.by_lane(instr.operands[2], "u32")
    done = strand.target(instr.operands[0], "pred")

    def run(where):
        lanes = strand.indices(where)
        touch(strand, instr, addresses_of(), where, False)
        addresses = addresses_of()[lanes]
        keys = np.stack([strand.cta[lanes], addresses % SHARED_WINDOW, parity[lanes] & 1], 1)
        ready = np.zeros(strand.lanes, bool)
        for cta, address, phase in np.unique(keys, axis=0):
            barrier = barrier_at(strand, instr, (int(cta), int(address)))
            while barrier.phase == phase and barrier.transfers:
                barrier.land(machine)
            machine.finish_tensor_work(barrier, int(phase))
            if barrier.phase != phase:
                passing = lanes[(keys == (cta, address, phase)).all(1)]
                ready[passing] = True
                machine.races.acquire(np.unique(strand.row[passing]), barrier.over)
        np.copyto(done, True, where=ready)
        return WAIT, ready

    return run


def coordinates(strand: Strand, mem, lane: int) -> list[int]:
    """Coordinates of a tensor copy, outermost first."""
    return [int(strand.by_lane(o, "s32")[lane]) for o in reversed(mem.coords)]


def descriptor_at(strand: Strand, instr: Instr, mem, lane: int) -> Descriptor:
    address = int(address_of(strand, mem)()[lane])
    descriptor = strand.machine.descriptors.get(address - PARAM_WINDOW)
    if descriptor is None:
        raise PtxError(f"line {instr.line}: {instr.text}: no tensor map at {address:#x}")
    return descriptor


@opcode("cp.async.bulk.tensor")
def bind_tensor_copy(instr: Instr, strand: Strand) -> Run:
    loads = next(m for m in instr.mods if m.startswith(("global", "shared"))) != "global"
    return bind_tensor_load(instr, strand) if loads else bind_tensor_store(instr, strand)


def bind_tensor_load(instr: Instr, strand: Strand) -> Run:
    """Of a pair of CTAs (cta_group::2) either may have the barrier that the copy completes on; else it lies where that goes.

    With multicast, where it goes and its barrier are offsets in each CTA of the mask.
    """
    machine = strand.machine
    to, mem, bar = instr.operands[:3]
    shared_of, barrier_of = address_of(strand, to), address_of(strand, bar)
    pair, spread = "cta_group::2" in instr.mods, "multicast::cluster" in instr.mods
    if (pair and spread) or (spread and len(instr.operands) != 4):
        raise PtxError(f"line {instr.line}: unknown opcode: {instr.text}")
    mask = strand.by_lane(instr.operands[3], "u16") if spread else None

    def places(where):
        """(lane, CTA and shared address of the destination, of the barrier) of every copy."""
        starts, bars = (list(barriers_of(strand, of(), where)) for of in (shared_of, barrier_of))
        for (lane, *start), (_, *bar) in zip(starts, bars, strict=True):
            if spread:
                for cta in members(strand, lane, mask):
                    yield lane, (cta, start[1]), (cta, bar[1])
                continue
            if start[0] // 2 != bar[0] // 2 if pair else start[0] != bar[0]:
                raise PtxError(f"line {instr.line}: {instr.text}: the barrier of another CTA")
            yield lane, tuple(start), tuple(bar)

    def run(where):
        for lane, (cta, shared), key in places(where):
            descriptor = descriptor_at(strand, instr, mem, lane)
            source, target, inside = descriptor.place(coordinates(strand, mem, lane), shared)
            dtype = DTYPES[f"u{8 * descriptor.itemsize}"]
            words = np.zeros((len(source), 1), dtype)
            if inside.any():
                text = explain(strand, instr, np.full(len(source), lane))
                row, binding = int(strand.row[lane]), descriptor.binding
                machine.races.copied(row, instr, key, binding, source[inside])
                zeros = np.zeros(int(inside.sum()), np.int64)
                words[inside] = machine.memory.read(source[inside], zeros, dtype, 1, text)
            index = (target + cta * machine.shared_bytes) // descriptor.itemsize

            def land(index=index, words=words, dtype=dtype):
                machine.shared.view(dtype)[index] = words[:, 0]
                return words.nbytes

            machine.counters.unit_bytes += words.nbytes
            barrier = barrier_at(strand, instr, key)
            races, row = machine.races, int(strand.row[lane])
            own = races.shared(np.array([key[0] * machine.shared_bytes + key[1]]), 8)
            cells = races.shared(index * descriptor.itemsize, descriptor.itemsize).reshape(1, -1)
            races.copy(row, instr, key, own, False)
            races.copy(row, instr, key, cells, True)
            barrier.transfers.append((land, races.release(np.array([row]))))
            machine.events += 1  # who waits for it lets it land
            if machine.lands_early():
                barrier.land(machine)

    return run


def bind_tensor_store(instr: Instr, strand: Strand) -> Run:
    """Reads shared memory and writes the tensor when its bulk group is waited for."""
    mem, source = instr.operands[:2]
    shared_of = address_of(strand, source)

    def run(where):
        for lane in strand.indices(where):
            descriptor = descriptor_at(strand, instr, mem, lane)
            rank, shared = divmod(int(shared_of()[lane]), SHARED_WINDOW)
            if rank != strand.rank[lane]:
                raise PtxError(f"line {instr.line}: {instr.text}: from another CTA")
            place = descriptor.place(coordinates(strand, mem, lane), shared)
            group = int(strand.bulk_commits[lane])
            strand.machine.counters.unit_bytes += place[0].size * descriptor.itemsize
            store = BulkStore(strand, instr, int(lane), group, descriptor, place)
            strand.bulk_stores.append(store)
            races, size = strand.machine.races, descriptor.itemsize
            cells = races.shared(store.start[place[2]], size).reshape(1, -1)
            races.engine(
                strand.row[[lane]], instr, TENSOR_STORE, cells, False, np.array([group]), True
            )

    return run


@dataclass
class BulkStore:
    """One tensor store under way."""

    strand: Strand
    instr: Instr
    lane: int
    group: int
    descriptor: Descriptor
    place: tuple[np.ndarray, np.ndarray, np.ndarray]

    @property
    def start(self) -> np.ndarray:
        """Byte indices into the batch's shared memory."""
        return self.place[1] + int(self.strand.shared_base[self.lane])

    def land(self) -> None:
        machine, size = self.strand.machine, self.descriptor.itemsize
        address, _, inside = self.place
        dtype = DTYPES[f"u{8 * size}"]
        index = self.start // size
        words = machine.shared.view(dtype)[index[inside]][:, None]
        if len(words):
            text = explain(self.strand, self.instr, np.full(len(words), self.lane))
            machine.memory.write(address[inside], np.zeros(len(words), np.int64), words, text)


@opcode("cp.async.bulk.wait_group")
def bind_bulk_wait(instr: Instr, strand: Strand) -> Run:
    pending = int(instr.operands[0].text)

    def run(where):
        limit, waiting = strand.bulk_commits - pending, strand.indices(where)
        strand.machine.races.finish(strand.row[waiting], TENSOR_STORE, limit[waiting])
        finish_bulk_stores(strand, where, limit)

    return run


def finish_bulk_stores(strand: Strand, where, limit: np.ndarray) -> None:
    """Lands the stores of the given lanes whose group number is under the limit."""
    waiting = np.broadcast_to(where, strand.lanes)
    left = []
    for store in strand.bulk_stores:
        if waiting[store.lane] and store.group < limit[store.lane]:
            store.land()
        else:
            left.append(store)
    strand.bulk_stores = left
