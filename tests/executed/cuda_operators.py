"""The operators of `csrc/cuda` on CPU tensors: their compiled host code as it ships, their launches in the emulator."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from tests.artefacts import digest, kept
from tests.ptx.counters import Counters
from tests.ptx.launch import parsed, prepare

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
RUNTIME = Path(__file__).with_name("cuda_runtime.cpp")
NAMESPACE = "lora_kernels_emulated"  # beside a lora_kernels_cuda that the process may have loaded
OPTIONS = (
    f"-Dlora_kernels_cuda={NAMESPACE}",
    "-Xfatbin=-compress=false",  # so that the PTX can be read out of the library
    "-cudart=none",
    "-Xlinker=-Bsymbolic",
    "-Xlinker=--wrap=aoti_torch_get_device_type",
    "-Xlinker=--no-undefined",  # whatever the stand-in for the runtime lacks is an error
    str(RUNTIME),
)
UINT3 = ctypes.POINTER(ctypes.c_uint * 3)
ON_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, UINT3, UINT3, ctypes.c_size_t, ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_void_p),
)  # fmt: skip
LAUNCH_FAILURE = 719  # cudaErrorLaunchFailure


def build_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cuda_build", SOURCES / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def nvcc_version() -> bytes:
    return subprocess.run(["nvcc", "--version"], capture_output=True, check=True).stdout


def sources_digest(*more: str | Path) -> str:
    """Of what decides the compiled code: every source, how it is compiled (build.py and `more`), and by which nvcc."""
    return digest(nvcc_version(), *(p for p in sorted(SOURCES.iterdir()) if p.is_file()), *more)


def build_library() -> Path:
    """The library with every kernel as PTX alone; compiled again only when a source has changed."""

    def build(library: Path) -> None:
        build_module().build(library, archs=(), more=OPTIONS)

    name = sources_digest(RUNTIME, torch.__version__, *OPTIONS)
    return kept(f"cuda_emulated/{name}.so", build)


@functools.cache
def ptx_of(library: Path) -> str:
    texts = re.findall(rb"\.version \d[^\0]*", library.read_bytes())
    (kernels,) = (text for text in texts if b".entry" in text)
    return kernels.decode()


@dataclass(frozen=True)
class Launched:
    """One launch as the runtime was asked for it, and what it counted."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    stream: int | None
    device: int
    counters: Counters


class EmulatedOperators:
    """`decode` and `wgrad`, in the order of `schedule`; `launches` has every launch."""

    def __init__(self, library: Path, schedule: int | None = None) -> None:
        torch.ops.load_library(library)
        self.ptx, self.schedule = ptx_of(library), schedule
        self.runtime = ctypes.CDLL(str(library))
        self.on_launch = ON_LAUNCH(self._launch)
        self.launches: list[Launched] = []
        self.fails = 0  # the error that a launch gives instead of running
        self.last_block_alone = False  # of a grid, which may be too large to run

    @property
    def counters(self) -> list[Counters]:
        return [launched.counters for launched in self.launches]

    def variable(self, name: str, kind: type = ctypes.c_int32):
        """A variable of the stand-in for the runtime; `.value` is read and written."""
        return kind.in_dll(self.runtime, name)

    def decode(self, *args, **more) -> None:
        self._call("decode", args, more)

    def wgrad(self, *args, **more) -> None:
        self._call("wgrad", args, more)

    def _call(self, name: str, args: tuple, more: dict) -> None:
        operator = getattr(getattr(torch.ops, NAMESPACE), name).default
        names = [argument.name for argument in operator._schema.arguments]
        self.pointed = {  # all memory that a launch may touch
            name: value
            for name, value in (*zip(names, args, strict=False), *more.items())
            if isinstance(value, Tensor) and value.numel() and not value.is_meta
        }
        self.error: Exception | None = None
        self.variable("launch", ctypes.c_void_p).value = ctypes.cast(
            self.on_launch, ctypes.c_void_p
        ).value
        try:
            operator(*args, **more)
        except RuntimeError as error:
            if self.error is not None:
                raise self.error from error
            raise
        finally:
            self.variable("launch", ctypes.c_void_p).value = None
        assert self.error is None, "the host code dropped the error of a launch"

    def _launch(self, kernel, grid, block, shared, stream, arguments) -> int:
        """The runtime's answer to one launch. No exception crosses the C++ between here and `_call`: it waits there."""
        if self.fails:
            return self.fails
        try:
            entry = kernel.decode()
            (parameter,) = parsed(self.ptx, entry).params
            struct = ctypes.string_at(arguments[0], parameter.size)
            grid, block = tuple(grid.contents), tuple(block.contents)
            launch = prepare(
                self.ptx, grid, block, [("p", "struct", struct)], shared=shared, entry=entry, pointed=self.pointed
            )  # fmt: skip
            device = self.variable("current_device").value
            self.launches.append(Launched(entry, grid, block, stream, device, launch.counters))
            if self.last_block_alone:
                launch.ctas = lambda rng: [tuple(size - 1 for size in launch.grid)]
            launch.run(self.schedule)
        except Exception as error:
            self.error = error
            return LAUNCH_FAILURE
        return 0
