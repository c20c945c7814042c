"""Installing: which extensions LORA_KERNELS_BUILD builds, and what happens where there is no compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def build(tmp_path):
    """Run setup.py's build on a copy of the sources, as a wheel would, with a PATH that holds no compiler."""
    shutil.copy(ROOT / "setup.py", tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "lora_kernels").mkdir()

    def run(value: str, **variables: str) -> subprocess.CompletedProcess[str]:
        kept = {k: v for k, v in os.environ.items() if k not in ("CXX", "CC", "CUDA_HOME")}
        environment = kept | {"PATH": str(tmp_path), "LORA_KERNELS_BUILD": value} | variables
        return subprocess.run(
            [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )

    yield run
    assert not list((tmp_path / "lora_kernels").iterdir())  # none of these builds makes a library


def test_auto_without_compilers_succeeds_with_one_message(build):
    done = build("auto")
    assert done.returncode == 0, done.stderr
    (message,) = [line for line in done.stderr.splitlines() if "lora_kernels" in line]
    assert "cpu: there is no C++ compiler" in message and "cuda: there is no nvcc" in message


def test_none_builds_nothing_and_says_nothing(build):
    done = build("none")
    assert done.returncode == 0 and "without" not in done.stderr


@pytest.mark.parametrize(
    "value, lacks",
    [("cpu", "no C++ compiler"), ("cuda", "no nvcc"), ("cpu,cuda", "no C++ compiler")],
)
def test_an_extension_that_is_named_must_build(build, value, lacks):
    done = build(value)
    assert done.returncode != 0
    assert "LORA_KERNELS_BUILD" in done.stderr and lacks in done.stderr


def test_a_name_that_is_not_known_is_an_error(build):
    done = build("gpu")
    assert done.returncode != 0 and "got 'gpu'" in done.stderr


@pytest.mark.parametrize("value", ["auto", "cpu"])
def test_a_compiler_that_fails(build, value):
    done = build(value, CXX=shutil.which("false") or "/bin/false")
    if value == "auto":
        assert done.returncode == 0 and "cpu: its build failed" in done.stderr
    else:
        assert done.returncode != 0
