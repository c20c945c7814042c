"""Compiles what the launchers launch: the specialisation Triton itself would choose, for a GPU that is not there.

Within `recording(target)` a kernel's launch compiles it for `target` and keeps the result; nothing runs. Operands may be
meta tensors, whose address 0 is as aligned as an allocation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction
from triton.runtime import jit

GPU_TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_103": GPUTarget(
        "cuda", 103, 32
    ),  # not in TARGETS: these take the tiles of the nearest older one
    "sm_110": GPUTarget("cuda", 110, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "sm_121": GPUTarget("cuda", 121, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
}


@dataclass(frozen=True)
class Recorded:
    """One launch: the kernel's name, what it compiled to, its grid and its arguments by name."""

    name: str
    compiled: Any  # triton.compiler.CompiledKernel
    grid: tuple[int, ...]
    arguments: dict[str, Any]


def compile_call(
    kernel: jit.JITFunction, target: GPUTarget, args: tuple, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """(compiled kernel, arguments by name) of `kernel[grid](*args, **kwargs)` on `target`."""
    backend = make_backend(target)
    binder = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
    kwargs = {**kwargs, "debug": False}
    bound, specialization, options = binder(*args, **kwargs)
    options, signature, constants, attrs = kernel._pack_args(
        backend, kwargs, bound, specialization, options
    )
    form = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
    source = form(kernel, signature, constants, attrs)
    return triton.compile(source, target=target, options=options.__dict__), bound


@contextmanager
def recording(target: str) -> Iterator[list[Recorded]]:
    """The launches inside, compiled for `target` in the order they were made."""
    launches: list[Recorded] = []

    def run(kernel: jit.JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled, bound = compile_call(kernel, GPU_TARGETS[target], args, kwargs)
        launches.append(Recorded(kernel.fn.__name__, compiled, tuple(grid), bound))
        return compiled

    with pytest.MonkeyPatch.context() as patch:
        if target.startswith("gfx"):  # launchers ask which vendor's PyTorch this is
            patch.setattr(torch.version, "hip", "7.0")
        patch.setattr(jit.JITFunction, "run", run)
        yield launches
