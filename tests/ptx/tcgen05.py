"""Tensor memory and the tcgen05 instructions: loads, stores, and multiplies that run late."""

from __future__ import annotations

import re

import numpy as np

from tests.ptx.access import address_of, shared_index
from tests.ptx.clocks import ALLOC, MMA, TENSOR_LD, TENSOR_ST
from tests.ptx.fragments import KIND_BYTES, RegisterBlock, decode, whole_warps
from tests.ptx.parser import Instr, Mem, PtxError
from tests.ptx.races import COLUMNS, LANES
from tests.ptx.strand import Run, Strand, opcode
from tests.ptx.tma import barrier_at, barriers_of, members
from tests.ptx.wgmma import operand_addresses, operand_cells, read_operand


@opcode("tcgen05.alloc")
def bind_alloc(instr: Instr, strand: Strand) -> Run:
    machine = strand.machine
    addresses_of = address_of(strand, instr.operands[0])
    columns = int(instr.operands[1].text)

    def run(where):
        for warp in whole_warps(strand, instr, where):
            lane = 32 * int(warp)
            cta, lanes = int(strand.cta[lane]), np.array([lane])
            start = machine.tensor_columns.get(cta, 0)
            if start + columns > COLUMNS:
                raise PtxError(f"line {instr.line}: {start + columns} columns of tensor memory")
            machine.tensor_columns[cta] = start + columns
            index = shared_index(strand, instr, addresses_of()[lanes], lanes, 4)
            cells, rows = machine.races.shared(index, 4), strand.row[lanes]
            machine.races.engine(rows, instr, ALLOC, cells, True)
            machine.races.finish(rows, ALLOC)
            machine.shared.view(np.uint32)[index // 4] = start

    return run


@opcode("tcgen05.dealloc")
def bind_dealloc(instr: Instr, strand: Strand) -> Run:
    """Counts as a store to the columns: nobody may be at work in them."""
    races, start = strand.machine.races, strand.source(instr.operands[0], "u32")
    columns = np.arange(int(instr.operands[1].text))

    def run(where):
        for warp in whole_warps(strand, instr, where):
            lanes = np.array([32 * int(warp)])
            first = int(start[lanes[0]]) & 0xFFFF
            cells = races.tensor(
                int(strand.cta[lanes[0]]), np.arange(LANES)[:, None], first + columns
            )
            races.threads(strand, instr, lanes, cells, True)

    return run


@opcode("tcgen05.wait::st", "tcgen05.wait::ld")
def bind_wait(instr: Instr, strand: Strand) -> Run:
    engine = TENSOR_LD if instr.mods[0].endswith("ld") else TENSOR_ST
    return lambda where: strand.machine.races.finish(
        strand.row[32 * whole_warps(strand, instr, where)], engine
    )


@opcode("tcgen05.ld", "tcgen05.st")
def bind_tensor_access(instr: Instr, strand: Strand) -> Run:
    """Shapes 32x32b (a lane each) and 16x32bx2 (sixteen lanes, two column ranges)."""
    loads = instr.mods[0] == "ld"
    mem = next(o for o in instr.operands if not isinstance(o, list) and hasattr(o, "base"))
    registers = next(o for o in instr.operands if isinstance(o, list))
    second = [o for o in instr.operands if o is not mem and o is not registers]
    block, addresses_of = RegisterBlock(strand, registers), address_of(strand, mem)
    lane, columns = np.arange(32), np.arange(len(registers))[:, None]
    if "16x32bx2" in instr.mods:
        lane, columns = lane % 16, columns + np.where(lane < 16, 0, int(second[0].text))
    elif "32x32b" not in instr.mods:
        raise PtxError(f"line {instr.line}: unknown opcode: {instr.text}")

    def run(where):
        memory = strand.machine.tensor_memory
        addresses = addresses_of()
        for warp in whole_warps(strand, instr, where):
            first = int(addresses[32 * warp])
            cta, row = int(strand.cta[32 * warp]), first >> 16
            if row // 32 != int(strand.warp[32 * warp]) % 4:
                raise PtxError(f"line {instr.line}: {instr.text}: a warp reaches for lane {row}")
            place = cta, row + lane, (first & 0xFFFF) + columns
            races = strand.machine.races
            engine = TENSOR_LD if loads else TENSOR_ST
            races.engine(strand.row[[32 * warp]], instr, engine, races.tensor(*place), not loads)
            if loads:
                block.write(np.array([warp]), memory[place][:, None])
            else:
                memory[place] = block.read(np.array([warp]))[:, 0]

    return run


class Multiply:
    """D (+)= A B on tensor memory, as issued; `shape` is the 32-bit instruction descriptor.

    `a` is a shared-memory descriptor, or, where it is `in_memory`, a tensor-memory address: row i in lane i, 32 bits of its
    elements a column. A pair of CTAs has a half of the rows of A and D each, and a half of the columns of B.
    """

    def __init__(
        self,
        kind: str,
        target: int,
        a: int,
        b: int,
        shape: int,
        keep: bool,
        in_memory: bool,
        ctas: int,
    ):
        self.m, self.n = (shape >> 24 & 31) * 16, (shape >> 17 & 63) * 8
        self.ctas = ctas
        if kind == "f16":
            kind = "bf16" if shape >> 7 & 7 == 1 else "f16"
        self.kind, self.keep, self.in_memory = kind, keep, in_memory
        self.size = KIND_BYTES[kind]
        self.depth = 32 // self.size
        rows = np.arange(self.m // ctas)
        if ctas == 2 and len(rows) != LANES:
            raise PtxError(f"{self.m} rows by a pair of CTAs")
        lanes = (rows if len(rows) == LANES else rows // 16 * 32 + rows % 16)[:, None]
        self.target = (target >> 16) + lanes, (target & 0xFFFF) + np.arange(self.n)
        self.right = self._shared(b, self.n // ctas, shape >> 16)
        if in_memory:
            self.left = (a >> 16) + lanes, (a & 0xFFFF) + np.arange(8)
        else:
            self.left = self._shared(a, len(rows), shape >> 15)

    def _shared(self, descriptor: int, extent: int, flags: int) -> np.ndarray:
        """Shared addresses [extent, k]; bit 0 of `flags`: stored transposed."""
        layout = self.depth, self.size, bool(flags & 1)
        return operand_addresses("tcgen05", descriptor, 0, extent, *layout)

    def note(self, machine, row: int, instr: Instr) -> None:
        """Tells the detector of races what is read and written."""
        races = machine.races

        def access(cells: np.ndarray, writes: bool = False, fenced: bool = False) -> None:
            races.engine(np.array([row]), instr, MMA, cells, writes, fenced=fenced)

        for cta in self.members(row // machine.warps):
            for operand in [self.right] if self.in_memory else [self.left, self.right]:
                access(operand_cells(machine, cta, operand, self.size)[None, :], fenced=True)
            if self.in_memory:
                access(races.tensor(cta, *self.left))
            access(races.tensor(cta, *self.target), writes=True)

    def members(self, cta: int) -> range:
        """The CTA that issues it, or both of its pair."""
        first = cta // self.ctas * self.ctas
        return range(first, first + self.ctas)

    def run(self, machine, cta: int) -> None:
        members = self.members(cta)
        parts = [read_operand(machine, each, self.right, self.kind) for each in members]
        right = np.concatenate(parts)
        for each in members:
            if self.in_memory:
                words = np.ascontiguousarray(machine.tensor_memory[(each, *self.left)])
                left = decode(words.view(f"u{self.size}"), self.kind)
            else:
                left = read_operand(machine, each, self.left, self.kind)
            total = left @ right.T
            place = (each, *self.target)
            if self.keep:
                total = total + machine.tensor_memory[place].view(np.float32)
            machine.tensor_memory[place] = total.astype(np.float32).view(np.uint32)
        read = self.depth * self.size * (self.n + (0 if self.in_memory else self.m))
        machine.counters.multiplied(self.kind, 2 * self.m * self.n * self.depth, read)


@opcode("tcgen05.mma.cta_group::1.kind::f16", "tcgen05.mma.cta_group::1.kind::tf32",
        "tcgen05.mma.cta_group::2.kind::f16", "tcgen05.mma.cta_group::2.kind::tf32")  # fmt: skip
def bind_multiply(instr: Instr, strand: Strand) -> Run:
    """Queued per CTA: runs, in order, no earlier than a commit after it is waited for."""
    ctas = 2 if "cta_group::2" in instr.mods else 1
    machine, kind = strand.machine, instr.mods[-1].removeprefix("kind::")
    target, a, b, shape, keep = instr.operands
    in_memory = isinstance(a, Mem)
    if "ws" in instr.mods:
        raise PtxError(f"line {instr.line}: unknown opcode: {instr.text}")
    target_of = address_of(strand, target)
    descriptor = None if in_memory else strand.by_lane(a, "u64")
    a_of = address_of(strand, a) if in_memory else lambda: descriptor
    sources = [strand.by_lane(o, k) for o, k in ((b, "u64"), (shape, "u32"))]
    flag = strand.by_lane(keep, "pred")

    def run(where):
        for lane in strand.indices(where):
            cta = int(strand.cta[lane])
            values = [int(s[lane]) for s in (target_of(), a_of(), *sources)]
            work = Multiply(kind, *values, bool(flag[lane]), in_memory, ctas)
            work.note(machine, int(strand.row[lane]), instr)
            machine.tensor_work.setdefault(cta, []).append(
                ((), lambda cta=cta, work=work: work.run(machine, cta))
            )

    return run


@opcode("tcgen05.commit")
def bind_commit(instr: Instr, strand: Strand) -> Run:
    # Without a state space, as Triton 3.6 writes it, the address is generic: here shared memory has the lowest.
    if not re.search(r"arrive::one(\.shared::cluster)?(\.multicast::cluster)?\.b64$", instr.opcode):
        raise PtxError(f"line {instr.line}: unknown opcode: {instr.text}")
    addresses_of, machine = address_of(strand, instr.operands[0]), strand.machine
    mask = strand.by_lane(instr.operands[1], "u16") if len(instr.operands) > 1 else None

    def run(where):
        for lane, *key in barriers_of(strand, addresses_of(), where):
            keys = [tuple(key)]
            if mask is not None:
                keys = [(cta, key[1]) for cta in members(strand, lane, mask)]
            barriers, rows = [barrier_at(strand, instr, key) for key in keys], strand.row[[lane]]
            for cta, address in keys:
                own = machine.races.shared(np.array([cta * machine.shared_bytes + address]), 8)
                machine.races.engine(rows, instr, MMA, own, False)
            clock = machine.races.commit(int(rows[0]))

            def arrive(barriers=barriers, clock=clock):
                for barrier in barriers:
                    barrier.arrive(machine, clock)

            machine.tensor_work.setdefault(int(strand.cta[lane]), []).append((barriers, arrive))
        machine.events += 1  # who waits for it may go on

    return run
