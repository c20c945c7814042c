"""Tensor memory and the tcgen05 instructions: loads, stores, and multiplies that run late."""

from __future__ import annotations

import re

import numpy as np

from tests.ptx.access import address_of, shared_index
from tests.ptx.fragments import KIND_BYTES, RegisterBlock, decode, whole_warps
from tests.ptx.parser import Instr, Mem, PtxError
from tests.ptx.strand import Run, Strand, opcode
from tests.ptx.tma import barrier_at, barriers_of
from tests.ptx.wgmma import operand_addresses, read_operand

TCGEN05_SWIZZLE = (61, {0: 0, 2: 128, 4: 64, 6: 32})
COLUMNS = 512


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
            machine.shared.view(np.uint32)[index // 4] = start

    return run


@opcode("tcgen05.dealloc", "tcgen05.relinquish_alloc_permit", "tcgen05.wait::st",
        "tcgen05.wait::ld", "tcgen05.fence::before_thread_sync",
        "tcgen05.fence::after_thread_sync")  # fmt: skip
def bind_nothing(instr: Instr, strand: Strand) -> Run:
    return lambda where: None


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
            if loads:
                block.write(np.array([warp]), memory[place][:, None])
            else:
                memory[place] = block.read(np.array([warp]))[:, 0]

    return run


def multiply(
    machine,
    cta: int,
    kind: str,
    target: int,
    a: int,
    b: int,
    shape: int,
    keep: bool,
    in_memory: bool,
):
    """D (+)= A B on tensor memory; shape is the 32-bit instruction descriptor.

    `a` is a shared-memory descriptor, or, where it is `in_memory`, a tensor-memory address: row i in lane i, 32 bits of its
    elements a column.
    """
    m, n = (shape >> 24 & 31) * 16, (shape >> 17 & 63) * 8
    if kind == "f16":
        kind = "bf16" if shape >> 7 & 7 == 1 else "f16"
    size = KIND_BYTES[kind]
    ks = np.arange(32 // size)
    rows = np.arange(m)
    right = shared_operand(machine, cta, b, n, ks, size, shape >> 16, kind)
    row_lanes = rows if m == 128 else rows // 16 * 32 + rows % 16
    if in_memory:
        words = machine.tensor_memory[
            cta, (a >> 16) + row_lanes[:, None], (a & 0xFFFF) + np.arange(8)
        ]
        left = decode(np.ascontiguousarray(words).view(f"u{size}"), kind)
    else:
        left = shared_operand(machine, cta, a, m, ks, size, shape >> 15, kind)
    place = cta, (target >> 16) + row_lanes[:, None], (target & 0xFFFF) + np.arange(n)
    total = left @ right.T
    if keep:
        total = total + machine.tensor_memory[place].view(np.float32)
    machine.tensor_memory[place] = total.astype(np.float32).view(np.uint32)
    read = len(ks) * size * (n + (0 if in_memory else m))
    machine.counters.multiplied(kind, 2 * m * n * len(ks), read)


def shared_operand(
    machine, cta: int, descriptor: int, extent: int, ks, size: int, flags: int, kind: str
):
    """[extent, k] elements that a shared-memory descriptor describes; bit 0 of `flags`: stored transposed."""
    rows = np.arange(extent)
    where = operand_addresses(descriptor, rows, ks, size, bool(flags & 1), TCGEN05_SWIZZLE)
    return read_operand(machine, cta, where, kind)


@opcode("tcgen05.mma.cta_group::1.kind::f16", "tcgen05.mma.cta_group::1.kind::tf32")
def bind_multiply(instr: Instr, strand: Strand) -> Run:
    """Queued per CTA: runs, in order, no earlier than a commit after it is waited for."""
    machine, kind = strand.machine, instr.mods[-1].removeprefix("kind::")
    target, a, b, shape, keep = instr.operands
    in_memory = isinstance(a, Mem)
    if "ws" in instr.mods:
        raise PtxError(f"line {instr.line}: unknown opcode: {instr.text}")
    target_of = address_of(strand, target)
    a_of = address_of(strand, a) if in_memory else strand.reader(a, "u64")
    sources = [strand.source(o, k) for o, k in ((b, "u64"), (shape, "u32"))]
    flag = strand.source(keep, "pred")

    def run(where):
        for lane in strand.indices(where):
            cta = int(strand.cta[lane])
            values = [int(np.broadcast_to(s, strand.lanes)[lane]) for s in (a_of(), *sources)]
            kept = bool(np.broadcast_to(flag, strand.lanes)[lane])
            to = int(target_of()[lane])
            machine.tensor_work.setdefault(cta, []).append(
                lambda cta=cta, to=to, values=values, kept=kept: multiply(
                    machine, cta, kind, to, *values, kept, in_memory
                ))  # fmt: skip

    return run


@opcode("tcgen05.commit")
def bind_commit(instr: Instr, strand: Strand) -> Run:
    # Without a state space, as Triton 3.6 writes it, the address is generic: here shared memory has the lowest.
    if not re.search(r"arrive::one(\.shared::cluster)?\.b64$", instr.opcode):
        raise PtxError(f"line {instr.line}: unknown opcode: {instr.text}")
    addresses_of = address_of(strand, instr.operands[0])

    def run(where):
        for _, *key in barriers_of(strand, addresses_of(), where):
            barrier = barrier_at(strand, instr, tuple(key))
            strand.machine.tensor_work.setdefault(key[0], []).append(barrier)

    return run
