"""How matrix tiles lie in a warp's registers (mma.sync, wgmma) and rows of 8x8 tiles in memory."""

from __future__ import annotations

import re

import numpy as np

from tests.ptx.access import address_of, shared_access
from tests.ptx.parser import Instr, PtxError
from tests.ptx.strand import Run, Strand, bf16_to_f32, opcode

KIND_BYTES = {"bf16": 2, "f16": 2, "tf32": 4}


def decode(words: np.ndarray, kind: str) -> np.ndarray:
    """Elements of the kind, given as unsigned integers, in float32; tf32 ignores 13 bits."""
    if kind == "bf16":
        return bf16_to_f32(words)
    if kind == "f16":
        return words.view(np.float16).astype(np.float32)
    return (words & np.uint32(0xFFFFE000)).view(np.float32)


def elements(registers: np.ndarray, kind: str) -> np.ndarray:
    """[n, warps, 32] 32-bit registers -> [n, warps, 8, 4, elements per register]."""
    n, warps, _ = registers.shape
    words = np.ascontiguousarray(registers).view(f"u{KIND_BYTES[kind]}")
    return decode(words.reshape(n, warps, 8, 4, -1), kind)


def a_tile(registers: np.ndarray, kind: str) -> np.ndarray:
    """Registers of an A fragment -> [warps, 16, K]."""
    e = elements(registers, kind)
    e = e.reshape(-1, 2, *e.shape[1:]).transpose(2, 1, 3, 0, 4, 5)
    return e.reshape(e.shape[0], 16, -1)


def b_tile(registers: np.ndarray, kind: str) -> np.ndarray:
    """Registers of a B fragment -> [warps, K, 8]."""
    e = elements(registers, kind).transpose(1, 0, 3, 4, 2)
    return e.reshape(e.shape[0], -1, 8)


def c_tile(registers: np.ndarray) -> np.ndarray:
    """Registers of an accumulator -> [warps, 16, columns]; four registers for 8 columns."""
    n, warps, _ = registers.shape
    tile = registers.view(np.float32).reshape(n // 4, 2, 2, warps, 8, 4)
    return tile.transpose(3, 1, 4, 0, 5, 2).reshape(warps, 16, 2 * n)


def c_registers(tile: np.ndarray) -> np.ndarray:
    """[warps, 16, columns] -> accumulator registers [n, warps, 32]."""
    warps, _, columns = tile.shape
    parts = np.asarray(tile, np.float32).reshape(warps, 2, 8, columns // 8, 4, 2)
    parts = parts.transpose(3, 1, 5, 0, 2, 4)
    return np.ascontiguousarray(parts).reshape(columns // 2, warps, 32).view(np.uint32)


class RegisterBlock:
    """Several 32-bit registers of a strand, read and written warp by warp."""

    def __init__(self, strand: Strand, operands: list):
        self.file = strand.files[32].reshape(-1, strand.lanes // 32, 32)
        self.rows = strand.rows(operands)[:, None]

    def read(self, warps: np.ndarray) -> np.ndarray:
        return self.file[self.rows, warps]

    def write(self, warps: np.ndarray, values: np.ndarray) -> None:
        self.file[self.rows, warps] = values


def whole_warps(strand: Strand, instr: Instr, where) -> np.ndarray:
    """The active warps of a warp-wide instruction, none of them divergent."""
    warps = strand.active_warps(where)
    if where is not True and not where.reshape(-1, 32)[warps].all():
        raise PtxError(f"line {instr.line}: {instr.text}: executed by part of a warp")
    return warps


@opcode("mma.sync")
def bind_mma(instr: Instr, strand: Strand) -> Run:
    shape = next(re.fullmatch(r"m16n8k(\d+)", m) for m in instr.mods if m.startswith("m16n8k"))
    kind = instr.mods[-3]
    if kind not in KIND_BYTES or instr.mods[-1] != "f32" or instr.mods[-4] != "f32":
        raise PtxError(f"line {instr.line}: unknown opcode: {instr.text}")
    d, a, b, c = (RegisterBlock(strand, o) for o in instr.operands)
    flops = 2 * 16 * 8 * int(shape[1])

    def run(where):
        warps = whole_warps(strand, instr, where)
        product = a_tile(a.read(warps), kind) @ b_tile(b.read(warps), kind)
        d.write(warps, c_registers(c_tile(c.read(warps)) + product))
        strand.machine.counters.multiplied(kind, flops * len(warps))

    return run


def tile_rows(
    strand: Strand, instr: Instr, addresses, count: int, warps, stored=None
) -> np.ndarray:
    """[warps, count, 8, 8] indices of 16-bit elements: lane 8j + r gives row r of tile j."""
    lanes = (32 * warps[:, None] + np.arange(8 * count)).ravel()
    strand.machine.counters.shared(addresses[lanes], lanes >> 5, 16)
    writes = stored is not None
    start = shared_access(strand, instr, addresses[lanes], lanes, 16, writes, stored) // 2
    return start.reshape(len(warps), count, 8, 1) + np.arange(8)


@opcode("ldmatrix.sync.aligned.m8n8", "stmatrix.sync.aligned.m8n8")
def bind_matrix_move(instr: Instr, strand: Strand) -> Run:
    loads, transposed = instr.base == "ldmatrix", "trans" in instr.mods
    registers, mem = instr.operands if loads else instr.operands[::-1]
    block, count = RegisterBlock(strand, registers), len(registers)
    addresses_of, memory = address_of(strand, mem), strand.machine.shared.view(np.uint16)

    def load(where):
        warps = whole_warps(strand, instr, where)
        tiles = memory[tile_rows(strand, instr, addresses_of(), count, warps)]
        if transposed:
            tiles = tiles.swapaxes(-1, -2)
        words = np.ascontiguousarray(tiles).view(np.uint32).reshape(len(warps), count, 32)
        block.write(warps, words.swapaxes(0, 1))

    def store(where):
        warps = whole_warps(strand, instr, where)
        words = np.ascontiguousarray(block.read(warps).swapaxes(0, 1))
        tiles = words.view(np.uint16).reshape(len(warps), count, 8, 8)
        if transposed:
            tiles = tiles.swapaxes(-1, -2)
        stored = tiles.reshape(-1, 8)
        memory[tile_rows(strand, instr, addresses_of(), count, warps, stored)] = tiles

    return load if loads else store
