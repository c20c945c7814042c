"""Loads, stores, atomics and per-thread asynchronous copies."""

from __future__ import annotations

import functools

import numpy as np

from tests.ptx.clocks import CP_ASYNC
from tests.ptx.memory import MemoryFault
from tests.ptx.parser import (
    LOCAL_WINDOW,
    PARAM_WINDOW,
    SHARED_WINDOW,
    Imm,
    Instr,
    Mem,
    PtxError,
    Reg,
)
from tests.ptx.strand import (
    DTYPES,
    WAIT,
    Pending,
    Run,
    Strand,
    opcode,
)


def address_of(strand: Strand, mem: Mem):
    """A function that gives the [lanes] byte addresses of a memory operand."""
    kind = f"u{mem.base.width}" if isinstance(mem.base, Reg) else "s64"
    base, offset = strand.source(mem.base, kind), mem.offset
    return lambda: np.broadcast_to(base.astype(np.int64) + offset, strand.lanes)


def explain(strand: Strand, instr: Instr, lanes: np.ndarray):
    """Names the instruction and the thread behind the n-th active lane."""

    def text(n: int) -> str:
        lane = int(lanes[n])
        cta = strand.machine.ctas[int(strand.cta[lane])]
        return f"line {instr.line}: {instr.text}: thread {strand.thread[lane]} of CTA {cta}"

    return text


def shared_index(
    strand: Strand, instr: Instr, addresses, lanes, size: int, anywhere: bool = False
) -> np.ndarray:
    """Byte indices into the batch's shared memory, checked against one CTA's part.

    It is the thread's own CTA, or any of its cluster for an instruction that says shared::cluster, or no space at all, and
    where `anywhere`.
    """
    machine, offset = strand.machine, addresses % SHARED_WINDOW
    bad = (offset % size != 0) | (offset + size > machine.shared_size)
    rank = addresses // SHARED_WINDOW
    if anywhere or "shared::cluster" in instr.mods or space_of(instr) is None:
        bad |= (rank < 0) | (rank >= machine.cluster)
    else:
        bad |= rank != strand.rank[lanes]
    if bad.any():
        n = int(np.flatnonzero(bad)[0])
        raise MemoryFault(f"{explain(strand, instr, lanes)(n)}: shared address {addresses[n]},"
                          f" {size} bytes, of {machine.shared_size}")  # fmt: skip
    ctas = strand.cta[lanes] - strand.rank[lanes] + rank
    if machine.cluster > 1 and not machine.live[ctas].all():
        raise MemoryFault(
            f"{explain(strand, instr, lanes)(0)}: shared memory of a CTA that has ended"
        )
    return offset + ctas * machine.shared_bytes


def shared_access(
    strand: Strand, instr: Instr, addresses, lanes, size: int, writes: bool, words=None
) -> np.ndarray:
    """`shared_index` of what these threads access themselves, checked for races; `words` [lanes, ...] are stored there."""
    index = shared_index(strand, instr, addresses, lanes, size)
    races = strand.machine.races
    if words is not None:
        words = np.ascontiguousarray(words).reshape(len(lanes), -1).view(f"u{races.cell}")
    races.threads(strand, instr, lanes, races.shared(index, size), writes, words)
    return index


def space_of(instr: Instr) -> str | None:
    """The state space an access names; None for a generic address."""
    return _space_of(instr.opcode)


@functools.cache
def _space_of(opcode: str) -> str | None:
    spaces = ("global", "shared", "local", "param", "const")
    named = (m.partition("::")[0] for m in opcode.split("."))
    return next((m for m in named if m in spaces), None)


def named_space(instr: Instr) -> str:
    """The state space of a load or a store: none of ours is by a generic address."""
    space = space_of(instr)
    if space is None:
        raise PtxError(f"line {instr.line}: unknown opcode: {instr.text}")
    return space


def vector_of(instr: Instr) -> int:
    return next((int(m[1:]) for m in instr.mods if m in ("v2", "v4", "v8")), 1)


@opcode("ld")
def bind_load(instr: Instr, strand: Strand) -> Run:
    machine, kind, count = strand.machine, instr.mods[-1], vector_of(instr)
    dtype, space = DTYPES[kind], named_space(instr)
    size = dtype.itemsize * count
    first = instr.operands[0]
    targets = [strand.target(o, kind) for o in (first if isinstance(first, list) else [first])]
    addresses_of = address_of(strand, instr.operands[1])
    if space == "param":
        return load_param(strand, dtype, targets, instr.operands[1])
    if "acquire" in instr.mods or "relaxed" in instr.mods:
        return load_polled(instr, strand, dtype, targets[0], addresses_of)

    def run(where):
        lanes = strand.indices(where)
        addresses, warps = addresses_of()[lanes], lanes >> 5
        if space == "global":
            machine.races.loaded(strand, instr, lanes, addresses, size)
            words = machine.memory.read(
                addresses, warps, dtype, count, explain(strand, instr, lanes)
            )
        elif space == "shared":
            index = shared_access(strand, instr, addresses, lanes, size, False) // dtype.itemsize
            words = machine.shared.view(dtype)[index[:, None] + np.arange(count)]
            machine.counters.shared(addresses, warps, size)
        else:
            bytes_ = (addresses - LOCAL_WINDOW)[:, None] + np.arange(size)
            words = strand.local[lanes[:, None], bytes_].view(dtype)
        for j, target in enumerate(targets):
            target[lanes] = words[:, j]

    return run


def load_polled(
    instr: Instr, strand: Strand, dtype: np.dtype, target: np.ndarray, addresses_of
) -> Run:
    """ld.relaxed of a global word, or ld.acquire, which takes what the atomics at its address have said.

    A thread that has loaded here since the last event would find the same, and waits for an event.
    """
    machine, name, acquires = strand.machine, (id(strand), instr.line), "acquire" in instr.mods

    def run(where):
        lanes = strand.indices(where)
        polled = machine.polls.setdefault(name, np.full(strand.lanes, -1))
        free = np.ones(strand.lanes, bool)
        free[lanes] = polled[lanes] != machine.events
        lanes = lanes[free[lanes]]
        if not len(lanes):
            return WAIT, free
        polled[lanes] = machine.events
        addresses = addresses_of()[lanes]
        for row, address in zip(strand.row[lanes], addresses, strict=True) if acquires else ():
            machine.races.acquire_load(int(row), int(address))
        words = machine.memory.read(addresses, lanes >> 5, dtype, 1, explain(strand, instr, lanes))
        target[lanes] = words[:, 0]
        return WAIT, free

    return run


def load_param(strand: Strand, dtype: np.dtype, targets: list, mem: Mem) -> Run:
    addresses_of = address_of(strand, mem)
    stretch = np.arange(dtype.itemsize * len(targets))
    if isinstance(mem.base, Imm):  # the same for all, and known now
        start = int(addresses_of()[0]) - PARAM_WINDOW
        values = strand.machine.params[start + stretch].view(dtype)

        def run(where):
            for target, value in zip(targets, values, strict=True):
                np.copyto(target, value, where=where)

        return run

    def gather(where):
        lanes = strand.indices(where)
        start = addresses_of()[lanes] - PARAM_WINDOW
        words = strand.machine.params[start[:, None] + stretch].view(dtype)
        for target, word in zip(targets, words.T, strict=True):
            target[lanes] = word

    return gather


@opcode("st")
def bind_store(instr: Instr, strand: Strand) -> Run:
    machine, kind, count = strand.machine, instr.mods[-1], vector_of(instr)
    dtype, space = DTYPES[kind], named_space(instr)
    size, value = dtype.itemsize * count, instr.operands[1]
    values = [strand.by_lane(o, kind) for o in (value if isinstance(value, list) else [value])]
    addresses_of = address_of(strand, instr.operands[0])

    def run(where):
        lanes = strand.indices(where)
        addresses, warps = addresses_of()[lanes], lanes >> 5
        words = np.stack([v[lanes] for v in values], 1)
        if space == "global":
            machine.memory.write(addresses, warps, words, explain(strand, instr, lanes))
            machine.races.stored(strand, instr, lanes, addresses, size)
        elif space == "shared":
            start = shared_access(strand, instr, addresses, lanes, size, True, words)
            machine.shared.view(dtype)[start[:, None] // dtype.itemsize + np.arange(count)] = words
            machine.counters.shared(addresses, warps, size)
        else:
            bytes_ = (addresses - LOCAL_WINDOW)[:, None] + np.arange(size)
            strand.local[lanes[:, None], bytes_] = words.view(np.uint8).reshape(len(lanes), size)

    return run


@opcode("membar", "fence.acq_rel", "fence.sc")
def bind_fence(instr: Instr, strand: Strand) -> Run:
    """Orders what stands before and after it around this warp's atomics."""
    races = strand.machine.races
    return lambda where: races.memory_fence(np.unique(strand.row[strand.indices(where)]))


@opcode("fence.proxy.async")
def bind_proxy_fence(instr: Instr, strand: Strand) -> Run:
    """What threads stored may be read by tensor cores and tensor copies that come after this; in one space, or in both."""
    races, space = strand.machine.races, space_of(instr)
    return lambda where: races.fence(np.unique(strand.row[strand.indices(where)]), space)


ATOMICS = {
    "add": lambda old, a: old + a,
    "max": max,
    "exch": lambda old, a: a,
    "or": lambda old, a: old | a,
    "inc": lambda old, a: 0 if old >= a else old + 1,
}


@opcode("atom")
def bind_atomic(instr: Instr, strand: Strand) -> Run:
    """Of a 32-bit word in global memory; lane after lane, in lane order."""
    machine, kind = strand.machine, instr.mods[-1]
    function = next((ATOMICS[m] for m in instr.mods if m in ATOMICS), None)
    if function is None or space_of(instr) != "global" or kind not in ("b32", "u32", "s32"):
        raise PtxError(f"line {instr.line}: unknown opcode: {instr.text}")
    dtype, target = DTYPES[kind], strand.target(instr.operands[0], kind)
    addresses_of = address_of(strand, instr.operands[1])
    value = strand.by_lane(instr.operands[2], kind)
    order = next((m for m in instr.mods if m in ("acquire", "release", "acq_rel")), "relaxed")

    def run(where):
        lanes = strand.indices(where)
        told = explain(strand, instr, lanes)
        for n, (lane, address) in enumerate(zip(lanes, addresses_of()[lanes], strict=True)):

            def change(old, operand=value[lane]):
                return dtype.type(function(old, operand))

            machine.races.atomic(int(strand.row[lane]), int(address), order)
            target[lane] = machine.memory.update(int(address), dtype, change, told(n))
        machine.events += 1

    return run


@opcode("cp.async.ca", "cp.async.cg")
def bind_copy(instr: Instr, strand: Strand) -> Run:
    machine, operands = strand.machine, instr.operands
    size = int(operands[2].text, 0)
    to, source = address_of(strand, operands[0]), address_of(strand, operands[1])
    useful = strand.by_lane(operands[3] if len(operands) > 3 else operands[2], "u32")
    word = DTYPES[f"u{8 * min(size, 8)}"]

    def land(lanes, given):
        machine.shared[given["index"]] = given["data"]

    def run(where):
        lanes = strand.indices(where)
        start = shared_index(strand, instr, to()[lanes], lanes, size)
        data = np.zeros((len(lanes), size), np.uint8)
        given = useful[lanes]
        if ((given != 0) & (given != size)).any():
            raise PtxError(f"line {instr.line}: {instr.text}: a partial source size")
        full = given == size
        if full.any():
            some = lanes[full]
            words = machine.memory.read(source()[some], some >> 5, word, size // word.itemsize,
                                        explain(strand, instr, some))  # fmt: skip
            data[full] = words.view(np.uint8).reshape(len(some), size)
        machine.counters.shared(to()[lanes], lanes >> 5, size)
        groups, cells = strand.commits[lanes], machine.races.shared(start, size)
        machine.races.engine(strand.row[lanes], instr, CP_ASYNC, cells, True, groups)
        index = start[:, None] + np.arange(size)
        copy = Pending(land, lanes, groups, {"index": index, "data": data})
        if not machine.lands_early() or copy.run(np.ones(len(lanes), bool)):
            strand.copies.append(copy)

    return run


@opcode("cp.async.commit_group", "cp.async.bulk.commit_group")
def bind_commit(instr: Instr, strand: Strand) -> Run:
    commits = strand.bulk_commits if "bulk" in instr.mods else strand.commits
    return lambda where: np.add(commits, 1, out=commits, where=where)


@opcode("cp.async.wait_group")
def bind_wait(instr: Instr, strand: Strand) -> Run:
    """Lands every copy of the waiting lanes that is older than the groups still allowed."""
    pending = int(instr.operands[0].text, 0)

    def run(where):
        limit = strand.commits - pending
        waiting = np.broadcast_to(where, strand.lanes)
        strand.machine.races.finish(strand.row[waiting], CP_ASYNC, limit[waiting])
        strand.copies = [
            c for c in strand.copies
            if c.run((c.group < limit[c.whose]) & waiting[c.whose])
        ]  # fmt: skip

    return run
