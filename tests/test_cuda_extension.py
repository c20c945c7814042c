"""The CUDA extension: it compiles for every architecture without spills, and breaks nothing where there is no CUDA."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora_kernels import Problem, explain
from lora_kernels.backends import cuda
from lora_kernels.tuning.config import cuda_decode_blocks
from tests.artefacts import FOLDER, kept
from tests.executed.cuda_operators import SOURCES, build_module, sources_digest

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
ARCHITECTURES = build_module().ARCHITECTURES


def shipped_library() -> tuple[Path, str]:
    """The library as it ships, and what nvcc said; built again only when a source has changed."""
    name = f"cuda/{sources_digest(torch.__version__)}"

    def build(library: Path) -> None:
        said = build_module().build(library)
        (FOLDER / f"{name}.txt").write_text(said)

    return kept(f"{name}.so", build), (FOLDER / f"{name}.txt").read_text()


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_compile_without_spills(arch, record_property):
    _, said = shipped_library()
    _, *entries = said.split("Compiling entry function")
    output = "".join(entry for entry in entries if f"for 'sm_{arch}'" in entry)
    kernels = re.findall(r"'(\w+)' for 'sm_", output)
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", output)]
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", output)]
    line = f"sm_{arch}: {len(kernels)} kernels, {min(registers)} to {max(registers)} registers"
    print(line)
    record_property(f"sm_{arch}", line)
    assert len(kernels) == len(registers) > 40 and spills
    assert not any(spills), line


@needs_nvcc
@pytest.mark.slow
def test_the_library_refuses_cpu_tensors_and_harms_nothing():
    """In a process of its own, on whatever torch there is: it loads, registers, and says what it wants."""
    library, _ = shipped_library()
    assert library.stat().st_size > 100_000
    code = f"""
import torch
torch.ops.load_library({str(library)!r})
x, w = torch.randn(2, 8), torch.randn(8, 4)
y, s = torch.empty(2, 4), torch.empty(2, 3)
try:
    torch.ops.lora_kernels_cuda.decode(x, w, w, w, None, y, s, s, s, None, 1.0, 0, 1, 1, 16, False)
except RuntimeError as error:
    assert "x must be on a CUDA device" in str(error), error
else:
    raise AssertionError("CPU tensors were taken")
from lora_kernels import lora_linear
lora_linear(x, w.t(), torch.randn(8, 3), torch.randn(3, 4), 1.0)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=SOURCES.parents[1]
    )
    assert done.returncode == 0, done.stderr


def test_without_nvcc_the_build_says_so(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match="nvcc must be on the PATH"):
        build_module().build(Path("never.so"))


@needs_nvcc
def test_a_failing_build_shows_nvccs_words(tmp_path):
    with pytest.raises(RuntimeError, match="nvcc failed:"):
        build_module().build(tmp_path / "never.so", archs=["7"])
    assert not list(tmp_path.iterdir())


def test_explain_says_why_it_is_not_used():
    reason = cuda.BACKEND.unavailable()
    assert torch.version.cuda is not None or reason == "this PyTorch was built without CUDA"
    told = explain(Problem(1, 8, 8, 2, "float32", "float32"))
    assert "cuda tensors only" in told.rejected["cuda"]


@pytest.mark.parametrize("content", [b"", b"no library"])
def test_a_missing_or_damaged_library_is_a_reason(monkeypatch, tmp_path, content):
    library = tmp_path / "_cuda.so"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cuda, "LIBRARY", library)
    assert "is not built" in cuda.BACKEND.unavailable()
    library.write_bytes(content)
    cuda._load.cache_clear()
    assert "does not load" in cuda.BACKEND.unavailable()
    cuda._load.cache_clear()


@pytest.mark.parametrize("K", [0, 1, 31, 32, 4096, 14336])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_splits_cover_k_in_whole_steps(K, dtype):
    for blocks in (1, 64, 132, 2004):
        splits, chunk = cuda.split_of(blocks, K, dtype, 132)
        step = 16 if dtype == torch.float32 else 32
        assert splits >= 1 and chunk % step == 0
        assert splits * chunk >= K > (splits - 1) * chunk - (K == 0)


@pytest.mark.parametrize("tiles", [1, 131, 132, 133, 224, 264, 2004])
def test_blocks_that_read_a_are_at_most_one_a_multiprocessor(tiles):
    """And none has more tiles than another but by one."""
    blocks = cuda_decode_blocks(tiles, 132)
    assert 1 <= blocks <= min(tiles, 132)
    assert -(-tiles // blocks) == -(-tiles // 132)
