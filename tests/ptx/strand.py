"""Registers of a strand (the warps that step together), and the table of opcode binders.

An opcode binder takes an instruction and a strand and returns `run(where)`, which executes the
instruction on the lanes of `where` (True: all of them). Binding once makes a step one numpy call.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tests.ptx.parser import SHARED_WINDOW, Imm, Instr, PtxError, Reg, Shared, Special

if TYPE_CHECKING:
    from tests.ptx.machine import Machine

Run = Callable[[object], object]
# What `run` may answer beside lanes: where they go on, or what they wait for.
JUMP, SWITCH, STOP, PARK, WAIT = "jump", "switch", "stop", "park", "wait"
BINDERS: dict[str, Callable[[Instr, Strand], Run]] = {}

DTYPES = {
    kind + str(bits): np.dtype(f"{letter}{bits // 8}")
    for kind, letter in (("b", "u"), ("u", "u"), ("s", "i"))
    for bits in (8, 16, 32, 64)
}
DTYPES |= {"pred": np.dtype(bool), "f16": np.dtype("f2"), "f32": np.dtype("f4"),
           "f64": np.dtype("f8"), "tf32": np.dtype("f4"), "bf16": np.dtype("u2")}  # fmt: skip
PACKED = {"f16x2": "f16", "bf16x2": "bf16", "f32x2": "f32"}
FILES = {1: "pred", 8: "u8", 16: "u16", 32: "u32", 64: "u64"}


def opcode(*names: str):
    """Registers a binder under dotted opcode prefixes; the longest matching prefix wins."""

    def register(binder):
        for name in names:
            BINDERS[name] = binder
        return binder

    return register


@functools.cache
def find_binder(name: str) -> Callable[[Instr, Strand], Run] | None:
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        if binder := BINDERS.get(".".join(parts[:n])):
            return binder
    return None


@dataclass
class Pending:
    """Work of one instruction under way: of which lanes or warps, their commit groups, and its operands as issued."""

    work: Callable[[np.ndarray, dict], None]
    whose: np.ndarray
    group: np.ndarray
    operands: dict[str, np.ndarray]

    def run(self, chosen: np.ndarray) -> bool:
        """Does it for the chosen ones; True while others are still under way."""
        if chosen.any():
            self.work(self.whose[chosen], {k: v[chosen] for k, v in self.operands.items()})
            self.whose, self.group = self.whose[~chosen], self.group[~chosen]
            self.operands = {k: v[~chosen] for k, v in self.operands.items()}
        return len(self.whose) > 0


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def f32_to_bf16(value: np.ndarray) -> np.ndarray:
    """Rounds to nearest even; every NaN becomes 0x7fff."""
    bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(value), np.uint16(0x7FFF), rounded)


@functools.cache
def literal(text: str, kind: str) -> np.ndarray:
    """A one-element array of an immediate operand, which nobody writes to."""
    value = _literal(text, kind)
    value.flags.writeable = False
    return value


def _literal(text: str, kind: str) -> np.ndarray:
    dtype = DTYPES[kind]
    if match := re.fullmatch(r"0([fFdD])([0-9a-fA-F]+)", text):
        bits = np.array([int(match[2], 16)], np.uint32 if match[1] in "fF" else np.uint64)
        if dtype.kind != "f":
            return bits.astype(dtype)
        return bits.view(np.float32 if match[1] in "fF" else np.float64).astype(dtype)
    if kind == "pred":
        return np.array([int(text, 0) != 0])
    if dtype.kind == "f":
        if re.fullmatch(r"0[xX][0-9a-fA-F]+", text):
            return np.array([int(text, 16)], f"u{dtype.itemsize}").view(dtype)
        return np.array([float(text)], dtype)
    bits = 8 * dtype.itemsize
    value = np.array([int(text.rstrip("U"), 0) % (1 << bits)], f"u{dtype.itemsize}")
    return value.view(dtype)


def low_part(row: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The row seen as dtype; of a wider register, a live view of its low bits."""
    if dtype.itemsize > row.itemsize:
        raise PtxError(f"a {8 * row.itemsize}-bit register used as {dtype}")
    if dtype.itemsize == row.itemsize:
        return row.view(dtype)
    return row.view(dtype)[:: row.itemsize // dtype.itemsize]


class Strand:
    """`warps` of every CTA in `ctas` (numbers within the resident batch), cta-major."""

    def __init__(self, machine: Machine, ctas: list[int], warps: list[int]):
        self.machine = machine
        n_warps, n_ctas = len(warps), len(ctas)
        self.lanes = 32 * n_warps * n_ctas
        self.cta = np.repeat(np.array(ctas, np.int64), 32 * n_warps)
        self.warp = np.tile(np.repeat(np.array(warps, np.int64), 32), n_ctas)
        self.lane = np.tile(np.arange(32), n_warps * n_ctas)
        self.thread = 32 * self.warp + self.lane
        self.row = self.cta * machine.warps + self.warp  # the warp's number among those of all CTAs
        self.shared_base = self.cta * machine.shared_bytes
        self.rank = self.cta % machine.cluster  # within the cluster
        self.files = {
            width: np.full((rows, self.lanes), np.array(-1).astype(DTYPES[FILES[width]]))
            for width, rows in machine.program.registers.items()
        }
        self.local = np.full((self.lanes, machine.program.local_bytes), 0xFF, np.uint8)
        self.bound: list[Run | None] = [None] * len(machine.program.code)
        self.copies: list[Pending] = []
        self.commits = np.zeros(self.lanes, np.int64)
        self.wgmmas: list[Pending] = []
        self.wgmma_commits = np.zeros(self.lanes // 32, np.int64)
        self.bulk_stores: list = []
        self.bulk_commits = np.zeros(self.lanes, np.int64)
        self.cluster_phases = np.full(
            self.lanes, -1
        )  # of the barrier, where arrived and not waited
        self.every = np.arange(self.lanes)
        self.every.flags.writeable = False
        self.found: tuple[object, np.ndarray] = True, self.every  # the last `where` and its lanes

    def rows(self, operands: list[Reg]) -> np.ndarray:
        """Row numbers of several registers of one width, to index that width's file."""
        return np.array([o.row for o in operands])

    def source(self, operand, kind: str) -> np.ndarray:
        """A live array of the operand: [lanes], or [1] for a literal."""
        if isinstance(operand, Reg):
            return low_part(self.files[operand.width][operand.row], DTYPES[kind])
        if isinstance(operand, Imm):
            return literal(operand.text, kind)
        if isinstance(operand, Shared):
            return (self.rank * SHARED_WINDOW + operand.offset).astype(DTYPES[kind])
        if isinstance(operand, Special):
            return self.machine.special(self, operand.name).astype(DTYPES[kind])
        raise PtxError(f"cannot read operand {operand}")

    def by_lane(self, operand, kind: str) -> np.ndarray:
        """The same, [lanes] also for a literal."""
        return np.broadcast_to(self.source(operand, kind), self.lanes)

    def target(self, operand, kind: str) -> np.ndarray:
        """The live row that a result is written to; wider than the kind where it is extended."""
        if isinstance(operand, Imm):
            return np.empty(self.lanes, DTYPES[kind])
        row = self.files[operand.width][operand.row]
        dtype = DTYPES[kind]
        if dtype.itemsize == row.itemsize:
            return row.view(dtype)
        return row.view(f"{'i' if dtype.kind == 'i' else 'u'}{row.itemsize}")

    def reader(self, operand, kind: str) -> Callable[[], np.ndarray]:
        """A function that gives the operand's numeric value; packed kinds have shape [lanes, 2]."""
        if kind in PACKED:
            whole = self.source(operand, "b64" if kind == "f32x2" else "b32")
            part = whole.view(DTYPES[PACKED[kind]]).reshape(-1, 2)
        else:
            part = self.source(operand, kind)
        if kind in ("bf16", "bf16x2"):
            return lambda: bf16_to_f32(part)
        if kind in ("f16", "f16x2"):
            return lambda: part.astype(np.float32)
        return lambda: part

    def writer(self, operand, kind: str) -> Callable[[np.ndarray, object], None]:
        """A function that stores a numeric value, rounded to the kind, in the given lanes."""
        if kind in PACKED:
            whole = self.target(operand, "b64" if kind == "f32x2" else "b32")
            part = whole.view(DTYPES[PACKED[kind]]).reshape(-1, 2)
        else:
            part = self.target(operand, kind)
        convert = f32_to_bf16 if kind in ("bf16", "bf16x2") else np.asarray

        def write(value, where):
            if kind in PACKED and where is not True:
                where = where[:, None]
            np.copyto(part, convert(value), casting="unsafe", where=where)

        return write

    def indices(self, where) -> np.ndarray:
        known, lanes = self.found
        if where is True or where is known:
            return self.every if where is True else lanes
        lanes = np.flatnonzero(where)
        if not where.flags.writeable:  # a group's, which comes again with the next instruction
            lanes.flags.writeable = False
            self.found = where, lanes
        return lanes

    def active_warps(self, where) -> np.ndarray:
        """Numbers, within the strand, of the warps with an active lane."""
        if where is True:
            return np.arange(self.lanes // 32)
        return np.flatnonzero(where.reshape(-1, 32).any(1))

    def bind(self, at: int) -> Run:
        """Makes instruction number `at` executable on this strand."""
        instr = self.machine.program.code[at]
        binder = find_binder(instr.opcode)
        if binder is None:
            raise PtxError(f"line {instr.line}: unknown opcode: {instr.text}")
        run = binder(instr, self)
        if instr.guard is not None:
            run = self._guarded(run, instr)
        self.bound[at] = run
        return run

    def _guarded(self, run: Run, instr: Instr) -> Run:
        flag, negated = self.source(instr.guard, "pred"), instr.negated
        always = instr.base in ("bra", "ret", "exit", "trap")

        def guarded(where):
            wanted = (~flag if negated else flag) & where
            count = np.count_nonzero(wanted)
            if always or count:
                return run(True if count == wanted.size else wanted)
            return None

        return guarded
