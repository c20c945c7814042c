"""What an installation meets: another torch than the library's, another platform, a wheel, a source archive."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml

from lora_kernels.backends import cpu
from lora_kernels.cli import info
from tests.processes import python

pytestmark = pytest.mark.slow  # processes that import torch

ROOT = Path(__file__).parent.parent
RELEASE = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())

# What Windows has not: modules, and functions that only POSIX has.
_ELSEWHERE = """
import os, platform, signal, sys
import torch
platform.system, platform.machine = lambda: "{system}", lambda: "{machine}"
if "{system}" == "Windows":
    for name in ("fcntl", "resource", "pwd", "termios"):
        sys.modules[name] = None
    del os.getloadavg, os.killpg, signal.SIGKILL
from lora_kernels.__main__ import main
from tests.first_steps import train
train("eager")
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
    run = python("-c", code, cwd=ROOT)
    assert f"its extension is for Linux x86_64, and this is {system} {machine}" in run.stdout
    assert "cuda    not usable: " in run.stdout and "triton  not usable: " in run.stdout
    assert "takes eager for float32, bfloat16, float16" in run.stdout
    assert run.stderr == "", "nothing that the user of such a machine could change"


def test_a_strangers_first_steps_here():
    """The program that the release workflow runs where a package is installed."""
    expected = "eager" if cpu.BACKEND.unavailable() else "cpu"
    said = python("-m", "tests.first_steps", expected, cwd=ROOT).stdout
    assert said.rstrip().endswith(f": {expected}")


def test_first_steps_need_nothing_of_the_sources():
    imported = re.findall(
        r"^(?:import|from) (\w+)", (ROOT / "tests/first_steps.py").read_text(), re.M
    )
    assert set(imported) - {"__future__", "sys", "tempfile"} == {"torch", "lora_kernels"}


def test_a_release_is_installed_and_tested_before_it_is_published():
    jobs = RELEASE["jobs"]
    order = ["library", "packages", "install", "publish"]
    assert list(jobs) == order
    assert [jobs[name].get("needs") for name in order] == [None, *order[:-1]]
    assert RELEASE[True]["push"]["tags"] == ["v*"]  # YAML reads the key `on` as true
    assert "refs/tags/" in jobs["publish"]["if"]
    assert RELEASE["permissions"] == {"contents": "read"}
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    text = (ROOT / ".github/workflows/release.yml").read_text()
    assert not re.search(r"password|secrets\.", text.replace("there is no password", ""))


def test_a_release_has_a_library_for_each_torch_that_it_is_tested_with():
    """And is installed beside the oldest and the newest of them, and on each system."""
    minors = RELEASE["jobs"]["library"]["strategy"]["matrix"]["torch"]
    numbers = [tuple(map(int, minor.split("."))) for minor in minors]
    assert minors[0] == info.SUPPORTED["torch"][0]
    assert numbers == [(2, minor) for minor in range(numbers[0][1], numbers[-1][1] + 1)]
    tried = RELEASE["jobs"]["install"]["strategy"]["matrix"]["include"]
    linux = [each for each in tried if each["os"].startswith("ubuntu") and "from" not in each]
    assert {minors[0], minors[-1]} <= {each["torch"].rpartition(".")[0] for each in linux}
    assert all(each["expects"] == "cpu" for each in linux)
    others = [each for each in tried if each not in linux]
    assert {each["os"].partition("-")[0] for each in others} == {"ubuntu", "windows", "macos"}
    assert all(each["expects"] == "eager" for each in others)
