"""Warpgroup matrix multiplies, and the shared-memory operand layouts they share with tcgen05."""

from __future__ import annotations

import functools
import re

import numpy as np

from tests.ptx.clocks import WGMMA
from tests.ptx.fragments import (
    KIND_BYTES,
    RegisterBlock,
    a_tile,
    c_registers,
    c_tile,
    decode,
    whole_warps,
)
from tests.ptx.parser import Instr, PtxError
from tests.ptx.strand import Pending, Run, Strand, opcode

# Where a descriptor says how its rows are swizzled, and the bytes of a row for what it says.
SWIZZLES = {
    "wgmma": (62, {0: 0, 1: 128, 2: 64, 3: 32}),
    "tcgen05": (61, {0: 0, 2: 128, 4: 64, 6: 32}),
}


def swizzled(address: np.ndarray, width: int) -> np.ndarray:
    """The shared address after the hardware's xor for rows of `width` bytes."""
    mask = {128: 7, 64: 3, 32: 1, 0: 0}[width]
    return address ^ (((address >> 7) & mask) << 4)


@functools.lru_cache(maxsize=1024)
def operand_addresses(
    unit: str, descriptor: int, first: int, count: int, depth: int, size: int, transposed: bool
) -> np.ndarray:
    """Shared addresses [count, depth] of rows of a matrix operand of `size`-byte elements."""
    shift, widths = SWIZZLES[unit]
    width = widths[descriptor >> shift]
    start, leading, stride = ((descriptor >> at & 0x3FFF) << 4 for at in (0, 16, 32))
    rows, k = np.arange(first, first + count)[:, None], np.arange(depth)
    if width == 0:
        if transposed:
            raise PtxError("an unswizzled transposed operand")
        address = rows // 8 * stride + rows % 8 * 16 + k * size // 16 * leading + k * size % 16
    elif transposed:
        run = width // size
        address = rows // run * leading + k // 8 * stride + k % 8 * width + rows % run * size
    else:
        address = rows // 8 * stride + rows % 8 * width + k * size
    return swizzled(start + address, width)


def read_operand(machine, cta: int, addresses: np.ndarray, kind: str) -> np.ndarray:
    """The operand's elements in float32, from one CTA's shared memory."""
    size = KIND_BYTES[kind]
    if addresses.max() + size > machine.shared_size:
        raise PtxError(f"a matrix operand reaches shared address {addresses.max()}"
                       f" of {machine.shared_size}")  # fmt: skip
    index = (addresses + cta * machine.shared_bytes) // size
    return decode(machine.shared.view(f"u{size}")[index], kind)


def operand_cells(machine, cta: int, addresses: np.ndarray, size: int) -> np.ndarray:
    """The cells of an operand, in the detector of races; its rows are whole cells."""
    cell = machine.races.cell
    starts = addresses.ravel() if size >= cell else addresses[addresses % cell == 0]
    return machine.races.shared(starts + cta * machine.shared_bytes, size).ravel()


@opcode("wgmma.mma_async")
def bind_wgmma(instr: Instr, strand: Strand) -> Run:
    """Runs late, when a wait covers its group: each warp computes its own 16 rows."""
    machine, kind = strand.machine, instr.mods[-1]
    n, depth = map(int, re.search(r"m64n(\d+)k(\d+)", instr.opcode).groups())
    if kind not in KIND_BYTES or instr.mods[-3] != "f32":
        raise PtxError(f"line {instr.line}: unknown opcode: {instr.text}")
    d, a, b, scale, *flags = instr.operands
    accumulator = RegisterBlock(strand, d)
    from_registers = RegisterBlock(strand, a) if isinstance(a, list) else None
    a_desc = None if from_registers else strand.source(a, "u64")
    b_desc, keep = strand.source(b, "u64"), strand.by_lane(scale, "pred")
    negations, transposes = flags[:2], [o.text != "0" for o in flags[2:]]
    if any(o.text != "1" for o in negations):
        raise PtxError(f"line {instr.line}: a negated operand: {instr.text}")
    a_trans = transposes[0] if len(transposes) == 2 else False
    b_trans = transposes[-1] if transposes else False
    size = KIND_BYTES[kind]

    def left_of(warp, descriptor):
        quarter = int(strand.warp[32 * warp]) % 4
        return operand_addresses("wgmma", int(descriptor), 16 * quarter, 16, depth, size, a_trans)

    def right_of(descriptor):
        return operand_addresses("wgmma", int(descriptor), 0, n, depth, size, b_trans)

    def multiply(warps, given):
        total = np.where(given["keep"][:, None, None], c_tile(accumulator.read(warps)), 0)
        right = {}
        for i, warp in enumerate(warps):
            cta = int(strand.cta[32 * warp])
            key = cta, int(given["b"][i])
            if key not in right:
                right[key] = read_operand(machine, cta, right_of(key[1]), kind).T
            left = given["a"][i]
            if from_registers is None:
                left = read_operand(machine, cta, left_of(warp, left), kind)
            total[i] += left @ right[key]
        accumulator.write(warps, c_registers(total))
        # The four warps of a group share one reading of the right operand.
        read = depth * size * (n // 4 + (16 if from_registers is None else 0))
        machine.counters.multiplied(kind, 2 * 16 * n * depth * len(warps), read * len(warps))

    def run(where):
        warps = whole_warps(strand, instr, where)
        first = 32 * warps
        left = a_tile(from_registers.read(warps), kind) if from_registers else a_desc[first]
        given = {"a": left, "b": b_desc[first], "keep": keep[first]}
        groups = strand.wgmma_commits[warps]
        read = [[right_of(descriptor) for descriptor in given["b"]]]
        if from_registers is None:
            read.append([left_of(*warp) for warp in zip(warps, given["a"], strict=True)])
        for addresses in read:
            ctas = strand.cta[first]
            cells = [
                operand_cells(machine, *one, size) for one in zip(ctas, addresses, strict=True)
            ]
            machine.races.engine(strand.row[first], instr, WGMMA, np.stack(cells), False, groups, True)  # fmt: skip
        strand.wgmmas.append(Pending(multiply, warps, groups, given))

    return run


@opcode("wgmma.commit_group")
def bind_commit(instr: Instr, strand: Strand) -> Run:
    def run(where):
        strand.wgmma_commits[whole_warps(strand, instr, where)] += 1

    return run


@opcode("wgmma.wait_group")
def bind_wait(instr: Instr, strand: Strand) -> Run:
    pending = int(instr.operands[0].text)

    def run(where):
        waiting = np.zeros(strand.lanes // 32, bool)
        waiting[whole_warps(strand, instr, where)] = True
        limit = strand.wgmma_commits - pending
        strand.machine.races.finish(strand.row[::32][waiting], WGMMA, limit[waiting])
        strand.wgmmas = [
            p for p in strand.wgmmas if p.run((p.group < limit[p.whose]) & waiting[p.whose])
        ]

    return run
