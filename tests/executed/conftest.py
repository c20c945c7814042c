"""What the executed lane's tests share: the CUDA extension's library for CPU tensors, and compiled code that is changed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.executed.cuda_operators import build_library
from tests.ptx import launch


@pytest.fixture(scope="session")
def library() -> Path:
    return build_library()


@pytest.fixture
def damage(monkeypatch):
    """damage(pattern, new, kernel): from here on the PTX of that kernel, or of all, is executed with a replacement."""
    prepare = launch.prepare_triton

    def use(pattern: str, new: str, kernel: str = "") -> None:
        def changed(compiled, grid, bound):
            ptx = compiled.asm["ptx"]
            if f".entry {kernel}" in ptx:
                ptx, count = re.subn(pattern, new, ptx)
                assert count
            return prepare(compiled, grid, bound, ptx)

        monkeypatch.setattr(launch, "prepare_triton", changed)

    return use
