"""What the compiler made of a kernel: registers, spills, shared memory, and the instructions of its main loop."""

from __future__ import annotations

import json
import math
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

from tests.artefacts import digest, kept

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INSTRUCTION = re.compile(
    r"^\s*/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(?P<text>[A-Z][A-Z0-9_.]*[^;]*);", re.M
)
# PTX instructions of the matrix units, and what they are called in the machine's code.
_MATRIX_OF_PTX = {"mma.sync": "HMMA", "wgmma.mma_async": "HGMMA", "tcgen05.mma": "UTCHMMA"}
_PTX_MATRIX = re.compile(rf"\b({'|'.join(map(re.escape, _MATRIX_OF_PTX))})\.")
MATRIX = ("HMMA", "HGMMA", "UTCHMMA", "UTCMMA", "UTCQMMA", "IMMA", "DMMA")


@dataclass(frozen=True)
class Code:
    """Counts from one compiled kernel."""

    registers: int
    local_bytes: int  # of one thread's memory, for registers that were spilled
    loop_spills: float  # the largest share of its loads and stores in a loop's instructions
    smem_bytes: int
    tmem_columns: int
    matrix: Counter[str]  # matrix instructions of the whole kernel, by opcode without its sizes
    loop: Counter[
        str
    ]  # instructions of the innermost loop that holds matrix instructions, by opcode
    loop_matrix: list[str]  # its matrix instructions with their sizes, sorted


def inspect(compiled: Any, loops: bool = True) -> Code:
    """Counts of a kernel that Triton compiled for an NVIDIA or AMD target; of known code as they were counted before.

    Without `loops` the machine's code is read only where something spills, which saves half of the time: matrix
    instructions are counted in the PTX.
    """
    smem = compiled.metadata.shared
    tmem = getattr(compiled.metadata, "tmem_size", None) or 0
    if "cubin" not in compiled.asm:
        return _inspect_amd(compiled.asm["amdgcn"], smem)
    cubin = compiled.asm["cubin"]

    def count(file: Path) -> None:
        file.write_text(
            json.dumps(vars(_inspect_nvidia(cubin, compiled.asm["ptx"], smem, tmem, loops)))
        )

    known = digest(cubin, f"{smem} {tmem} {loops} {triton.__version__}", Path(__file__))
    counted = json.loads(kept(f"sass/{known}.json", count).read_text())
    return Code(**counted | {name: Counter(counted[name]) for name in ("matrix", "loop")})


def _inspect_nvidia(cubin: bytes, ptx: str, smem: int, tmem: int, every_loop: bool) -> Code:
    usage = _run("cuobjdump", cubin, "--dump-resource-usage")
    local_bytes = _number(usage, "STACK") + _number(usage, "LOCAL")
    instructions = _disassemble(cubin) if every_loop or local_bytes else []
    opcodes = [text.split()[0] for _, text in instructions]
    if not instructions:
        opcodes = [_MATRIX_OF_PTX[op] for op in _PTX_MATRIX.findall(ptx)]
    loops = _loops(instructions)
    loop = _main_loop(loops)
    return Code(
        registers=_number(usage, "REG"),
        local_bytes=local_bytes,
        loop_spills=max((_spilled(body) for _, _, body in loops), default=0.0),
        smem_bytes=smem,
        tmem_columns=tmem,
        matrix=Counter(op.split(".")[0] for op in opcodes if op.startswith(MATRIX)),
        loop=Counter(op.split(".")[0] for op in loop),
        loop_matrix=sorted(op for op in loop if op.startswith(MATRIX)),
    )


def _disassemble(cubin: bytes) -> list[tuple[int, str]]:
    """(address, text) of each instruction, without predicates."""
    text = _run("nvdisasm", cubin, "-c")
    return [(int(m["address"], 16), m["text"]) for m in _INSTRUCTION.finditer(_resolve(text))]


def _resolve(text: str) -> str:
    """Labels replaced by the address of the instruction that follows them."""
    addresses: dict[str, str] = {}
    waiting: list[str] = []
    for line in text.splitlines():
        if label := re.match(r"^(\.L_\w+|\.L\w*):", line.strip()):
            waiting.append(label[1])
        elif address := re.match(r"^\s*/\*([0-9a-f]{4,})\*/", line):
            addresses.update(dict.fromkeys(waiting, address[1]))
            waiting.clear()
    return re.sub(r"`\((\.L\w*)\)", lambda m: "0x" + addresses.get(m[1], "0"), text)


def _loops(instructions: list[tuple[int, str]]) -> list[tuple[int, int, list[str]]]:
    """(first address, last address, opcodes) of each backward jump's body."""
    loops = []
    for address, text in instructions:
        target = re.search(r"\bBRA\S*.*?0x([0-9a-f]+)", text)
        if target is not None and int(target[1], 16) < address:
            start = int(target[1], 16)
            body = [t.split()[0] for a, t in instructions if start <= a <= address]
            loops.append((start, address, body))
    return loops


def _main_loop(loops: list[tuple[int, int, list[str]]]) -> list[str]:
    """Opcodes of the innermost loop with the most matrix work: of a body without another such in it."""
    multiply = [each for each in loops if any(op.startswith(MATRIX) for op in each[2])]
    others = [(start, end) for start, end, _ in multiply]
    # A jump back from behind the loop's end, into the loop, waits for a barrier again.
    innermost = [
        body
        for start, end, body in multiply
        if not any(
            (start <= s and e <= end and (s, e) != (start, end)) or s < start <= e < end
            for s, e in others
        )
    ]
    return max(innermost, key=lambda body: sum(map(_work, body)), default=[])


def _work(op: str) -> int:
    """Terms of an instruction's sums where its name has them, as HGMMA.64x256x16 does; 1 of another matrix instruction."""
    size = re.search(r"\.(\d+)x(\d+)x(\d+)\b", op)
    return math.prod(map(int, size.groups())) if size else int(op.startswith(MATRIX))


def _spilled(body: list[str]) -> float:
    return sum(op.split(".")[0] in ("LDL", "STL") for op in body) / len(body)


def _number(usage: str, name: str) -> int:
    found = re.search(rf"\b{name}:(\d+)", usage)
    assert found is not None
    return int(found[1])


def _run(tool: str, cubin: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_TOOLS / tool, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _inspect_amd(assembly: str, smem: int) -> Code:
    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", assembly)
        return int(found[1]) if found else 0

    matrix = Counter(re.findall(r"^\s+v_(mfma|wmma)\w*", assembly, re.M))
    return Code(
        registers=number("vgpr_count"),
        local_bytes=4 * (number("vgpr_spill_count") + number("sgpr_spill_count")),
        loop_spills=0.0,
        smem_bytes=smem,
        tmem_columns=0,
        matrix=matrix,
        loop=Counter(),
        loop_matrix=[],
    )
