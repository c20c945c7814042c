"""The CUDA extension's library for CPU tensors."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.executed.cuda_operators import build_library


@pytest.fixture(scope="session")
def library() -> Path:
    return build_library()
