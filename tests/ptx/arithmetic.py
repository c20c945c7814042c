"""Arithmetic, logic, comparison, conversion and moves: the opcodes that touch only registers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tests.ptx.parser import Imm, Instr, Not, PtxError, Reg
from tests.ptx.strand import DTYPES, Run, Strand, opcode


def compute(instr: Instr, strand: Strand, function, kinds: list[str]) -> Run:
    """Binds d = function(sources...) with kinds = [kind of d, kinds of the sources]."""
    write = strand.writer(instr.operands[0], kinds[0])
    reads = [strand.reader(o, k) for o, k in zip(instr.operands[1:], kinds[1:], strict=True)]
    if len(reads) == 1:
        (first,) = reads
        return lambda where: write(function(first()), where)
    if len(reads) == 2:
        first, second = reads
        return lambda where: write(function(first(), second()), where)
    return lambda where: write(function(*(read() for read in reads)), where)


def direct(instr: Instr, strand: Strand, ufunc: np.ufunc, kinds: list[str]) -> Run:
    """The same for a ufunc on kinds that numpy knows: one call, written in place."""
    out = strand.target(instr.operands[0], kinds[0])
    a, b = (strand.source(o, k) for o, k in zip(instr.operands[1:], kinds[1:], strict=True))
    return lambda where: ufunc(a, b, out=out, where=where, casting="unsafe")


def is_native(kind: str) -> bool:
    return kind in DTYPES and kind not in ("bf16", "f16")


def truncated_divide(a, b):
    unsigned = np.dtype(f"u{a.itemsize}")  # holds the magnitude of the least integer too
    quotient = np.abs(a).view(unsigned) // np.maximum(np.abs(b).view(unsigned), 1)
    return np.where((a < 0) != (b < 0), -quotient.view(a.dtype), quotient.view(a.dtype))


def divide(a, b):
    if a.dtype.kind == "f":
        return a / b
    return a // np.maximum(b, 1) if a.dtype.kind == "u" else truncated_divide(a, b)


def high_half(a, b):
    if a.itemsize == 8:
        wide = a.astype(object) * b.astype(object)
        return np.array([int(v) >> 64 for v in wide], dtype=object).astype(a.dtype)
    double = np.dtype(f"{a.dtype.kind}8")
    return (a.astype(double) * b.astype(double)) >> (8 * a.itemsize)


BINARY = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": divide,
    "min": np.fmin, "max": np.fmax, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor, "rem": lambda a, b: a - divide(a, b) * b,
}  # fmt: skip


@opcode(*BINARY)
def bind_binary(instr: Instr, strand: Strand) -> Run:
    function, mods = BINARY[instr.base], instr.mods
    kind = mods[-1]
    if "wide" in mods:
        return compute_wide(instr, strand, np.multiply)
    if "hi" in mods:
        return compute(instr, strand, high_half, [kind] * 3)
    if len(mods) > 1 and mods[-2] == "f32" and kind in ("f16", "bf16"):
        return compute(instr, strand, function, ["f32", kind, "f32"])
    form = direct if isinstance(function, np.ufunc) and is_native(kind) else compute
    return form(instr, strand, function, [kind] * 3)


def compute_wide(instr: Instr, strand: Strand, function) -> Run:
    """mul.wide and mad.wide: the product of two narrow numbers at twice their width."""
    kind = instr.mods[-1]
    wide = kind[0] + str(2 * int(kind[1:]))
    dtype = DTYPES[wide]

    def widened(a, b, *c):
        return function(a.astype(dtype), b.astype(dtype), *c)

    return compute(instr, strand, widened, [wide, kind, kind] + [wide] * (len(instr.operands) - 3))


@opcode("mad", "fma")
def bind_mad(instr: Instr, strand: Strand) -> Run:
    kind = instr.mods[-1]
    if "wide" in instr.mods:
        return compute_wide(instr, strand, lambda a, b, c: a * b + c)
    if "hi" in instr.mods:
        return compute(instr, strand, lambda a, b, c: high_half(a, b) + c, [kind] * 4)
    if kind[0] in "us":
        return compute(instr, strand, lambda a, b, c: a * b + c, [kind] * 4)

    def fused(a, b, c):
        return (a.astype(np.float64) * b + c).astype(a.dtype)

    if instr.mods[-2] == "f32" and kind in ("f16", "bf16"):
        return compute(instr, strand, fused, ["f32", kind, kind, "f32"])
    return compute(instr, strand, fused, [kind] * 4)


def count_leading_zeros(a):
    return 8 * a.itemsize - np.ceil(np.log2(a.astype(np.longdouble) + 1)).astype(np.int64)


UNARY = {
    "neg": np.negative, "abs": np.abs, "not": np.invert, "sqrt": np.sqrt,
}  # fmt: skip
COUNTS = {"popc": np.bitwise_count, "clz": count_leading_zeros}


@opcode(*UNARY)
def bind_unary(instr: Instr, strand: Strand) -> Run:
    return compute(instr, strand, UNARY[instr.base], [instr.mods[-1]] * 2)


@opcode(*COUNTS)
def bind_count(instr: Instr, strand: Strand) -> Run:
    kind = "u" + instr.mods[-1][1:]
    return compute(instr, strand, COUNTS[instr.base], ["u32", kind])


@opcode("shl", "shr")
def bind_shift(instr: Instr, strand: Strand) -> Run:
    kind = instr.mods[-1]
    amount = "s32" if kind[0] == "s" else "u32"
    ufunc = np.left_shift if instr.base == "shl" else np.right_shift
    return direct(instr, strand, ufunc, [kind, kind, amount])


@opcode("shf")
def bind_funnel_shift(instr: Instr, strand: Strand) -> Run:
    left, wrap = "l" in instr.mods, "wrap" in instr.mods

    def shift(low, high, amount):
        amount = (amount & 31) if wrap else np.minimum(amount, 32)
        both = (high.astype(np.uint64) << 32) | low
        return (both << amount.astype(np.uint64)) >> 32 if left else both >> amount

    return compute(instr, strand, shift, ["u32"] * 4)


@opcode("bfe")
def bind_extract(instr: Instr, strand: Strand) -> Run:
    kind = instr.mods[-1]
    bits = int(kind[1:])

    def extract(a, start, length):
        start, length = (start & 255).astype(np.int64), (length & 255).astype(np.int64)
        length = np.clip(length, 0, np.maximum(bits - start, 0))
        left = (bits - start - length).astype(a.dtype)
        return np.where(length > 0, (a << left) >> (bits - length).astype(a.dtype), 0)

    return compute(instr, strand, extract, [kind, kind, "u32", "u32"])


@opcode("bfi")
def bind_insert(instr: Instr, strand: Strand) -> Run:
    kind = instr.mods[-1]

    def insert(a, b, start, length):
        start, length = (start & 255).astype(a.dtype), (length & 255).astype(a.dtype)
        mask = ((np.ones_like(a) << length) - 1) << start
        return (b & ~mask) | ((a << start) & mask)

    return compute(instr, strand, insert, [kind, kind, kind, "u32", "u32"])


@opcode("prmt")
def bind_permute(instr: Instr, strand: Strand) -> Run:
    if instr.mods != ["b32"]:
        raise PtxError(f"line {instr.line}: unknown opcode: {instr.text}")

    def permute(a, b, selector):
        both = (b.astype(np.uint64) << 32) | a
        result = np.zeros_like(both)
        for i in range(4):
            nibble = (selector >> np.uint32(4 * i)) & 15
            byte = (both >> (8 * (nibble & 7)).astype(np.uint64)) & 255
            sign = np.where(byte & 128, np.uint64(255), np.uint64(0))
            result |= np.where(nibble & 8, sign, byte) << np.uint64(8 * i)
        return result

    return compute(instr, strand, permute, ["u32"] * 4)


@opcode("lop3")
def bind_lop3(instr: Instr, strand: Strand) -> Run:
    table = int(instr.operands[4].text, 0)
    instr = replace(instr, operands=instr.operands[:4])

    def lookup(a, b, c):
        result = np.zeros_like(a | b | c)
        for i in range(8):
            if table >> i & 1:
                result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        return result

    return compute(instr, strand, lookup, ["u32"] * 4)


@opcode("selp")
def bind_select(instr: Instr, strand: Strand) -> Run:
    kind = "b" + instr.mods[-1].strip("busf")
    out = strand.target(instr.operands[0], kind)
    a, b = (strand.source(o, kind) for o in instr.operands[1:3])
    flag = strand.source(instr.operands[3], "pred")
    return lambda where: np.copyto(out, np.where(flag, a, b), where=where)


COMPARE = {
    "eq": np.equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
    "neu": np.not_equal, "nan": lambda a, b: np.isnan(a) | np.isnan(b),
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)), "equ": lambda a, b: ~((a < b) | (a > b)),
    "ltu": lambda a, b: ~(a >= b), "leu": lambda a, b: ~(a > b), "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
}  # fmt: skip


@opcode("setp")
def bind_compare(instr: Instr, strand: Strand) -> Run:
    mods, kind = instr.mods, instr.mods[-1]
    if mods[0] == "ne":
        function = np.not_equal if kind[0] in "bus" else lambda a, b: (a < b) | (a > b)
    else:
        function = COMPARE[mods[0]]
    if len(instr.operands) != 3 or not isinstance(instr.operands[0], Reg):
        raise PtxError(f"line {instr.line}: unknown opcode: {instr.text}")
    form = direct if isinstance(function, np.ufunc) and is_native(kind) else compute
    return form(instr, strand, function, ["pred", kind, kind])


@opcode("mov")
def bind_move(instr: Instr, strand: Strand) -> Run:
    out, value = instr.operands
    kind = "pred" if instr.mods[-1] == "pred" else "b" + instr.mods[-1].strip("busf")
    if isinstance(out, list) or isinstance(value, list):
        return move_vector(strand, kind, out, value)
    to, source = strand.target(out, kind), strand.source(value, kind)
    return lambda where: np.copyto(to, source, where=where)


def move_vector(strand: Strand, kind: str, out, value) -> Run:
    """mov between one wide register and the registers that hold its parts."""
    parts = out if isinstance(out, list) else value
    part = f"b{int(kind[1:]) // len(parts)}"
    if isinstance(out, list):
        pieces = strand.source(value, kind).view(DTYPES[part]).reshape(-1, len(parts)).T
        targets = [strand.target(o, part) for o in out]

        def split(where):
            for to, piece in zip(targets, pieces, strict=True):
                np.copyto(to, piece, where=where)

        return split
    pieces = strand.target(out, kind).view(DTYPES[part]).reshape(-1, len(parts)).T
    sources = [strand.source(o, part) for o in value]

    def join(where):
        for piece, source in zip(pieces, [s.copy() for s in sources], strict=True):
            np.copyto(piece, source, where=where)

    return join


@opcode("cvta")
def bind_address(instr: Instr, strand: Strand) -> Run:
    to, source = (strand.target(instr.operands[0], "u64"), strand.source(instr.operands[1], "u64"))
    return lambda where: np.copyto(to, source, where=where)


def round_to_tf32(a):
    bits = np.ascontiguousarray(a, np.float32).view(np.uint32)
    return ((bits + 0x1000) & 0xFFFFE000).view(np.float32)


ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@opcode("cvt")
def bind_convert(instr: Instr, strand: Strand) -> Run:
    mods = instr.mods
    to, source = mods[-2:]
    if to in ("f16x2", "bf16x2"):
        return compute(
            instr, strand, lambda high, low: np.stack([low, high], -1), [to, source, source]
        )
    if to == "tf32":
        return compute(instr, strand, round_to_tf32, ["f32", "f32"])
    rounding = next((ROUND[m] for m in mods if m in ROUND), None)
    limits = np.iinfo(DTYPES[to]) if to[0] in "us" else None

    def convert(a):
        if rounding is not None:
            a = rounding(a)
        if a.dtype.kind == "f" and limits is not None:
            a = np.clip(np.nan_to_num(a.astype(np.float64)), limits.min, limits.max)
            return a.astype(DTYPES[to])
        if "sat" in mods:
            a = np.clip(a, 0, 1) if limits is None else np.clip(a, limits.min, limits.max)
        if a.dtype.kind in "iu" and limits is not None:
            return a.astype(DTYPES[to])
        return a

    return compute(instr, strand, convert, [to, source])


def shuffle_source(mode: str, lane, b, clamp):
    """The source lane of a shfl within its segment, and whether it is inside."""
    segment, limit = (clamp >> 8) & 31, clamp & 31
    low, high = lane & segment, (lane & segment) | (limit & ~segment)
    if mode == "up":
        return (source := lane - b), source >= high
    if mode == "down":
        return (source := lane + b), source <= high
    source = lane ^ b if mode == "bfly" else low | (b & ~segment)
    return source, source <= high


@opcode("shfl")
def bind_shuffle(instr: Instr, strand: Strand) -> Run:
    mode = next(m for m in instr.mods if m in ("up", "down", "bfly", "idx"))
    first = instr.operands[0]
    out, valid = first if isinstance(first, list) else (first, None)
    to, value = strand.target(out, "b32"), strand.source(instr.operands[1], "b32")
    b, clamp = (strand.source(o, "s32") for o in instr.operands[2:4])
    flag = strand.target(valid, "pred") if valid is not None else None
    start = np.arange(strand.lanes) - strand.lane

    def run(where):
        source, inside = shuffle_source(
            mode, strand.lane, b.astype(np.int64), clamp.astype(np.int64)
        )
        picked = np.where(inside, source & 31, strand.lane)
        np.copyto(to, value[start + picked], where=where)
        if flag is not None:
            np.copyto(flag, inside, where=where)

    return run


@opcode("vote.sync.ballot")
def bind_ballot(instr: Instr, strand: Strand) -> Run:
    operand = instr.operands[1]
    negated = isinstance(operand, Not)
    flag = strand.by_lane(operand.reg if negated else operand, "pred")
    to = strand.target(instr.operands[0], "b32")

    def run(where):
        votes = ((~flag if negated else flag) & where).reshape(-1, 32)
        result = np.where(votes, np.uint32(1) << np.arange(32, dtype=np.uint32), 0).sum(1)
        np.copyto(to, np.repeat(result, 32), where=where, casting="unsafe")

    return run


@opcode("redux.sync.add")
def bind_redux(instr: Instr, strand: Strand) -> Run:
    to, value = strand.target(instr.operands[0], "u32"), strand.source(instr.operands[1], "u32")

    def run(where):
        asked = np.where(where, value, np.uint32(0)).reshape(-1, 32)
        np.copyto(to, np.repeat(asked.sum(1, dtype=np.uint32), 32), where=where)

    return run


@opcode("elect")
def bind_elect(instr: Instr, strand: Strand) -> Run:
    leader, flag = instr.operands[0]
    to = None if isinstance(leader, Imm) else strand.target(leader, "u32")
    chosen = strand.target(flag, "pred")

    def run(where):
        first = np.broadcast_to(where, strand.lanes).reshape(-1, 32).argmax(1)
        first = np.repeat(first, 32)
        np.copyto(chosen, strand.lane == first, where=where)
        if to is not None:
            np.copyto(to, first, where=where, casting="unsafe")

    return run


@opcode("nanosleep", "setmaxnreg", "wgmma.fence", "tcgen05.relinquish_alloc_permit",
        "tcgen05.fence::before_thread_sync", "tcgen05.fence::after_thread_sync")  # fmt: skip
def bind_nothing(instr: Instr, strand: Strand) -> Run:
    return lambda where: None
