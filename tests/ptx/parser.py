"""Reads PTX text into a list of instructions with resolved registers, labels and symbols."""

from __future__ import annotations

import bisect
import functools
import re
from dataclasses import dataclass, field

# Every symbol is an address; the windows keep shared, param and local addresses apart.
PARAM_WINDOW = 0x7000_0000
LOCAL_WINDOW = 0x6000_0000
# The shared memory of a cluster: that of the CTA of rank r begins at r·SHARED_WINDOW.
SHARED_WINDOW = 0x0100_0000

STATEMENT_END = re.compile(r"[^;]*;")
SKIP = re.compile(r"(?:\s+|\.loc\b[^\n]*)+")
LABEL = re.compile(r"([A-Za-z_$%][\w$]*)\s*:(?!:)")
OPCODE = re.compile(r"(?:@(!?)([%\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.DOTALL)
ARRAY = re.compile(r"\.(shared|local|global|const)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)"
                   r"(?:\[(\d*)\])?(?:\s*=\s*\{([^}]*)\})?")  # fmt: skip
SHARED = re.compile(r"^\s*(\.shared[^;]*);", re.MULTILINE)
EXTERN_SHARED = re.compile(r"^\s*\.extern\s+(\.shared[^;]*);", re.MULTILINE)
PARAM = re.compile(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s+(?:\.\w+\s+)?"
                   r"\.align\s+\d+\s+)?([\w$]+)(?:\[(\d+)\])?")  # fmt: skip
ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*(?:\(([^)]*)\))?([^{]*)\{")


class PtxError(Exception):
    """The PTX text, or what it does, cannot be executed."""


@dataclass(frozen=True)
class Reg:
    """A register: its width in bits (1 for a predicate) and its row in that width's file."""

    width: int
    row: int


@dataclass(frozen=True)
class Imm:
    """A literal, kept as text until an instruction gives it a type."""

    text: str


@dataclass(frozen=True)
class Shared:
    """The address of a variable in shared memory, in a cluster of several CTAs: each has its own."""

    offset: int


@dataclass(frozen=True)
class Special:
    """A read-only special register such as %tid.x."""

    name: str


@dataclass(frozen=True)
class Mem:
    """[base + offset], or [base, {coordinates}] of a tensor copy."""

    base: object
    offset: int = 0
    coords: tuple = ()


@dataclass(frozen=True)
class Not:
    """!predicate."""

    reg: Reg


@dataclass
class Instr:
    """One instruction: its dotted opcode, operands, guard and where it stands in the text."""

    opcode: str
    operands: list
    guard: Reg | None
    negated: bool
    line: int
    text: str
    target: int = -1
    targets: list[int] = field(default_factory=list)  # of an indexed branch
    at: int = -1  # its number in the program
    base: str = field(init=False)
    mods: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.base, *self.mods = self.opcode.split(".")


@dataclass
class Param:
    """One kernel parameter: its byte offset in the parameter block and its size."""

    name: str
    offset: int
    size: int
    type: str


@dataclass
class Program:
    """One kernel: code, register counts, parameters and static memory."""

    name: str
    code: list[Instr] = field(default_factory=list)
    registers: dict[int, int] = field(default_factory=dict)
    params: list[Param] = field(default_factory=list)
    symbols: dict[str, int] = field(default_factory=dict)
    static_shared: int = 0
    local_bytes: int = 0
    cluster: int = 1  # CTAs


def type_bytes(type_name: str) -> int:
    return int(re.sub(r"\D", "", type_name)) // 8


def align(value: int, to: int) -> int:
    return -(-value // to) * to


def split_operands(text: str) -> list[str]:
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "{[(") - (c in "}])")
        if c == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    parts.append(text[start:].strip())
    return [p for p in parts if p]


@dataclass
class _Scope:
    """The names declared between one pair of braces."""

    widths: dict[str, int] = field(default_factory=dict)
    registers: dict[str, Reg] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)


class _Reader:
    """Walks a kernel body statement by statement, keeping the stack of `{ }` scopes."""

    def __init__(self, program: Program, text: str, start: int, line_of):
        self.program, self.text, self.line_of = program, text, line_of
        self.scopes = [_Scope()]
        self.jumps: list[tuple[Instr, str, list[_Scope]]] = []
        self.tables: dict[str, list[str]] = {}  # of indexed branches
        self.label = ""  # the last one
        self.read(start)

    def read(self, at: int) -> None:
        while True:
            skipped = SKIP.match(self.text, at)
            at = skipped.end() if skipped else at
            if self.text[at] == "{":
                self.scopes.append(_Scope())
                at += 1
            elif self.text[at] == "}":
                at += 1
                if len(self.scopes) == 1:
                    break
                self.scopes.pop()
            elif label := LABEL.match(self.text, at):
                self.label = label[1]
                self.scopes[-1].labels[self.label] = len(self.program.code)
                at = label.end()
            else:
                end = STATEMENT_END.match(self.text, at)
                if end is None:
                    raise PtxError(f"line {self.line_of(at)}: statement without an end")
                self.statement(end[0][:-1].strip(), self.line_of(at))
                at = end.end()
        for instr, label, scopes in self.jumps:
            if instr.base == "brx":
                names = self.tables.get(label, [])
                instr.targets = [self.place(instr, name, scopes) for name in names]
            else:
                instr.target = self.place(instr, label, scopes)

    def place(self, instr: Instr, label: str, scopes: list[_Scope]) -> int:
        found = [s.labels[label] for s in reversed(scopes) if label in s.labels]
        if not found:
            raise PtxError(f"line {instr.line}: unknown label {label}")
        return found[0]

    def statement(self, text: str, line: int) -> None:
        if registers := REGISTERS.match(text):
            width = 1 if registers[1] == "pred" else int(re.sub(r"\D", "", registers[1]))
            for name in registers[2].split(","):
                self.scopes[-1].widths[name.strip().partition("<")[0]] = width
        elif text.startswith(".local"):
            declare_array(self.program, text)
        elif text.startswith(".branchtargets"):
            self.tables[self.label] = split_operands(text.removeprefix(".branchtargets"))
        elif text and not text.startswith("."):
            self.instruction(text, line)

    def instruction(self, text: str, line: int) -> None:
        match = OPCODE.fullmatch(text)
        if match is None:
            raise PtxError(f"line {line}: cannot read {text!r}")
        negated, guard, opcode, operands = match.groups()
        instr = Instr(opcode, [], None, bool(negated), line, " ".join(text.split()))
        if guard:
            instr.guard = self.register(guard)
            if instr.guard is None:
                raise PtxError(f"line {line}: unknown guard {guard}")
        if instr.base == "bra":
            self.jumps.append((instr, operands.strip(), list(self.scopes)))
        elif instr.base == "brx":
            index, table = split_operands(operands)
            instr.operands = [self.operand(index, line)]
            self.jumps.append((instr, table, list(self.scopes)))
        else:
            instr.operands = [self.operand(o, line) for o in split_operands(operands)]
        instr.at = len(self.program.code)
        self.program.code.append(instr)

    def register(self, name: str) -> Reg | None:
        for scope in reversed(self.scopes):
            width = scope.widths.get(name, scope.widths.get(name.rstrip("0123456789")))
            if width is not None:
                if name not in scope.registers:
                    row = self.program.registers.get(width, 0)
                    self.program.registers[width] = row + 1
                    scope.registers[name] = Reg(width, row)
                return scope.registers[name]
        return None

    def operand(self, text: str, line: int):
        if text[0] == "{":
            return [self.operand(o, line) for o in split_operands(text[1:-1])]
        if text[0] == "[":
            parts = split_operands(text[1:-1])
            base, _, offset = re.sub(r"\s+", "", parts[0]).partition("+")
            coords = tuple(self.operand(parts[1], line)) if len(parts) > 1 else ()
            return Mem(self.operand(base, line), int(offset or "0", 0), coords)
        if text[0] == "!":
            return Not(self.operand(text[1:], line))
        if "|" in text:
            return [self.operand(o.strip(), line) for o in text.split("|")]
        if (reg := self.register(text)) is not None:
            return reg
        if text in self.program.symbols:
            place = self.program.symbols[text]
            if self.program.cluster > 1 and place < SHARED_WINDOW:
                return Shared(place)
            return Imm(str(place))
        if text[0] == "%":
            return Special(text[1:])
        if text == "_" or re.match(r"-?\d", text):
            return Imm(text)
        raise PtxError(f"line {line}: unknown name {text!r}")


def declare_array(program: Program, text: str) -> None:
    """Gives a .shared or .local array its place; an unsized array is the dynamic shared memory."""
    match = ARRAY.match(text)
    if match is None:
        raise PtxError(f"cannot read {text!r}")
    space, alignment, element, name, count = match.groups()[:5]
    size = type_bytes(element) * int(count or 1) if count != "" else 0
    if space == "shared":
        start = align(program.static_shared, int(alignment or 1))
        program.static_shared = start + size
        program.symbols[name] = start
    else:
        start = align(program.local_bytes, int(alignment or 1))
        program.local_bytes = start + size
        program.symbols[name] = LOCAL_WINDOW + start


def entry_names(text: str) -> list[str]:
    return [m[1] for m in ENTRY.finditer(text)]


@functools.lru_cache(maxsize=2)
def _module(text: str) -> tuple[str, list[int], list[re.Match[str]], list[str]]:
    """The text without comments, where its lines end, its kernels' heads, and the dynamic shared arrays."""
    text = re.sub(r"//[^\n]*", "", text)
    newlines = [m.start() for m in re.finditer("\n", text)]
    return text, newlines, list(ENTRY.finditer(text)), EXTERN_SHARED.findall(text)


def parse(text: str, entry: str | None = None) -> Program:
    """The kernel named `entry` (or the only one) of a PTX module."""
    text, newlines, heads, dynamic = _module(text)
    names = [m[1] for m in heads]
    if entry is None:
        if len(names) != 1:
            raise PtxError(f"name one of the kernels {names}")
        entry = names[0]
    if entry not in names:
        raise PtxError(f"no kernel {entry} among {names}")
    number = names.index(entry)
    match = heads[number]
    program = Program(entry)
    following = heads[number + 1].start() if number + 1 < len(heads) else None
    body = text[match.end() : following]
    static = SHARED.findall(text[: heads[0].start()]) + SHARED.findall(body)
    for declared in static + dynamic:  # the dynamic part comes last
        declare_array(program, declared)
    offset = 0
    for param in PARAM.finditer(match[2] or ""):
        size = type_bytes(param[2]) * int(param[4] or 1)
        offset = align(offset, int(param[1] or size))
        program.params.append(Param(param[3], offset, size, param[2]))
        program.symbols[param[3]] = PARAM_WINDOW + offset
        offset += size
    if cluster := re.search(r"\.reqnctapercluster\s+([\d,\s]+)", match[3]):
        program.cluster, *others = map(int, cluster[1].split(","))
        if any(extent != 1 for extent in others):
            raise PtxError(f"a cluster of more than one dimension: {cluster[0]}")
    _Reader(program, text, match.end(), lambda at: bisect.bisect_left(newlines, at) + 1)
    return program
