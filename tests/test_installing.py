"""What an installation meets: another torch than the library's, another platform, a wheel, a source archive."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora_kernels.backends import cpu

# What Windows has not: modules, and functions that only POSIX has.
_ELSEWHERE = """
import os, platform, signal, sys
import torch
platform.system, platform.machine = lambda: "{system}", lambda: "{machine}"
if "{system}" == "Windows":
    for name in ("fcntl", "resource", "pwd", "termios"):
        sys.modules[name] = None
    del os.getloadavg, os.killpg, signal.SIGKILL
from lora_kernels import freeze_base, load_adapter, lora_parameters, replace_linear_with_lora, save_adapter
from lora_kernels.__main__ import main
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
replace_linear_with_lora(model, rank=4, alpha=4)
freeze_base(model)
optimizer = torch.optim.Adam(lora_parameters(model), lr=0.05)
x = torch.randn(64, 8)
losses = []
for _ in range(30):
    optimizer.zero_grad()
    loss = (model(x) - x[:, :1]).square().mean()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < 0.5 * losses[0], losses
import tempfile
folder = tempfile.mkdtemp()
save_adapter(model, folder)
load_adapter(model, folder)
sys.exit(main(["info"]))
"""


@pytest.mark.parametrize(
    "built, chosen",
    [
        ({"_cpu.so": "2.11"}, None),
        ({"_cpu-torch2.11.so": "2.11", "_cpu-torch2.9.so": "2.9"}, None),
        ({"_cpu.so": "2.11", "_cpu-torch2.12.so": "2.12"}, "_cpu-torch2.12.so"),
        ({"_cpu.so": "2.12", "_cpu-torch2.12.so": "2.12"}, "_cpu.so"),
        ({"_cpu.so": None}, "_cpu.so"),
        ({}, None),
    ],
    ids=lambda value: str(value or "none"),
)
def test_a_library_of_another_torch_is_not_loaded(built, chosen, tmp_path, monkeypatch):
    """Its file says what it was built with: it is read before the library is loaded, and the reason names both."""
    for name, version in built.items():
        mark = b"" if version is None else f"lora_kernels built with torch {version};".encode()
        (tmp_path / name).write_bytes(b"\x7fELF" + mark + b"\0more")
    loaded = []

    def load(path):
        loaded.append(Path(path).name)
        raise OSError("a stand-in")

    monkeypatch.setattr(cpu, "LIBRARY", tmp_path / "_cpu.so")
    monkeypatch.setattr(torch, "__version__", "2.12.1+cpu")
    monkeypatch.setattr(torch.ops, "load_library", load)
    cpu._load.cache_clear()
    reason = cpu._load()
    assert loaded == ([chosen] if chosen else [])
    if built and not chosen:
        versions = ", ".join(sorted(built.values()))
        assert f"was built with torch {versions}, and this is torch 2.12" in reason
    else:
        assert "does not load" in reason if chosen else "not built" in reason
    cpu._load.cache_clear()


@pytest.mark.skipif(not cpu.LIBRARY.exists(), reason="the extension is not built")
def test_the_library_says_what_it_was_built_with():
    """Of the one that is loaded here; one from before there was this text names nothing."""
    version = ".".join(torch.__version__.split(".")[:2])
    assert cpu.built_with(cpu.LIBRARY) == version


@pytest.mark.parametrize(
    "system, machine", [("Windows", "AMD64"), ("Darwin", "arm64"), ("Linux", "aarch64")]
)
def test_elsewhere_than_on_linux_x86_64_eager_trains_and_says_why(system, machine):
    code = _ELSEWHERE.format(system=system, machine=machine)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert f"its extension is for Linux x86_64, and this is {system} {machine}" in run.stdout
    assert "cuda    not usable: " in run.stdout and "triton  not usable: " in run.stdout
    assert "takes eager for float32, bfloat16, float16" in run.stdout
    assert run.stderr == "", "nothing that the user of such a machine could change"
