"""Installing: what LORA_KERNELS_BUILD builds, what packages hold, and what happens where there is no compiler."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # processes that import torch

ROOT = Path(__file__).resolve().parent.parent


def run_alone(folder: Path, tools: Path, value: str, *command: str, **variables: str):
    """What `python command` does in `folder`, with a PATH that holds `tools` and a LORA_KERNELS_BUILD."""
    kept = {k: v for k, v in os.environ.items() if k not in ("CXX", "CC", "CUDA_HOME")}
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=kept | {"PATH": str(tools), "LORA_KERNELS_BUILD": value} | variables,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def build(tmp_path):
    """Run setup.py's build on a copy of the sources, as a wheel would, with a PATH that holds no compiler."""
    shutil.copy(ROOT / "setup.py", tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "lora_kernels").mkdir()

    def run(value: str, **variables: str) -> subprocess.CompletedProcess[str]:
        command = "setup.py", "-q", "build_ext", "--inplace"
        return run_alone(tmp_path, tmp_path, value, *command, **variables)

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
    "value, says",
    [
        ("cpu", "no C++ compiler"),
        ("cuda", "no nvcc"),
        ("cpu,cuda", "no C++ compiler"),
        ("gpu", "got 'gpu'"),
    ],
)
def test_an_extension_that_is_named_must_build(build, value, says):
    done = build(value)
    assert done.returncode != 0
    assert "LORA_KERNELS_BUILD" in done.stderr and says in done.stderr


@pytest.mark.parametrize("value", ["auto", "cpu"])
def test_a_compiler_that_fails(build, value):
    done = build(value, CXX=shutil.which("false") or "/bin/false")
    if value == "auto":
        assert done.returncode == 0 and "cpu: its build failed" in done.stderr
    else:
        assert done.returncode != 0


OLD, NEW = "an earlier library", "a new library"
COMPILER = f"""#!/bin/sh
while [ $# -gt 1 ]; do
    if [ "$1" = -o ]; then echo "{NEW}" > "$2"; fi
    shift
done
"""


@pytest.fixture
def packages(tmp_path):
    """Build packages of a copy of the sources in which libraries of earlier builds lie wherever they may."""
    root, tools = tmp_path / "root", tmp_path / "tools"
    for folder in ("csrc", "lora_kernels"):
        left_out = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / folder, root / folder, ignore=left_out)
    for file in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, root)
    tools.mkdir()
    build_lib = root / "older" / "lib"
    for folder in (root, build_lib):
        (folder / "lora_kernels").mkdir(parents=True, exist_ok=True)
        for name in ("_cpu.so", "_cuda.so"):
            (folder / "lora_kernels" / name).write_text(OLD)
    (root / "lora_kernels.egg-info").mkdir()
    listed = "setup.py\nlora_kernels/_cpu.so\nlora_kernels/_cuda.so\n"
    (root / "lora_kernels.egg-info" / "SOURCES.txt").write_text(listed)

    def run(value: str, *command: str) -> Path:
        if value == "cpu":  # a compiler that is quick
            for name in ("c++", "cc", "gcc", "g++"):
                (tools / name).write_text(COMPILER)
                (tools / name).chmod(0o755)
        done = run_alone(root, tools, value, *command)
        assert done.returncode == 0, done.stderr
        return root

    return run


def wheel_of(root: Path) -> tuple[set[str], dict[str, str]]:
    """The wheel's files of the package, and the text of its libraries; it is for every Python, and for what it holds."""
    (wheel,) = (root / "dist").glob("*.whl")
    platform_tag = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if name.startswith("lora_kernels/")}
        libraries = {n: file.read(n).decode().strip() for n in names if n.endswith(".so")}
        tag = platform_tag if libraries else "any"
        assert wheel.name.endswith(f"-py3-none-{tag}.whl")
        (about,) = (name for name in file.namelist() if name.endswith("dist-info/WHEEL"))
        said = file.read(about).decode().splitlines()
        assert f"Root-Is-Purelib: {str(tag == 'any').lower()}" in said
        assert [line for line in said if line.startswith("Tag: ")] == [f"Tag: py3-none-{tag}"]
        return names, libraries


WHEEL = ("setup.py", "-q", "build", "--build-base=older", "--build-lib=older/lib", "bdist_wheel")


def files_of(root: Path, folder: str) -> set[str]:
    """The sources in `folder`."""
    found = (
        path for path in (root / folder).rglob("*") if path.suffix in (".py", ".typed", ".json")
    )
    return {str(path.relative_to(root)) for path in found}


@pytest.mark.parametrize("value", ["none", "auto"])
def test_a_wheel_holds_no_library_that_its_build_did_not_make(packages, value):
    root = packages(value, *WHEEL)
    assert wheel_of(root) == (files_of(root, "lora_kernels"), {})


def test_a_wheel_holds_the_library_that_its_build_made(packages):
    root = packages("cpu", *WHEEL)
    assert wheel_of(root)[1] == {"lora_kernels/_cpu.so": NEW}
    assert (root / "lora_kernels/_cpu.so").read_text() == OLD


def test_a_wheel_takes_libraries_that_were_built_elsewhere(packages, tmp_path, monkeypatch):
    """One for each minor version of torch, and nothing of what lay about."""
    folder = tmp_path / "prebuilt"
    folder.mkdir()
    for version in ("2.10", "2.13"):
        (folder / f"_cpu-torch{version}.so").write_text(f"for {version}")
    monkeypatch.setenv("LORA_KERNELS_PREBUILT", str(folder))
    _, libraries = wheel_of(packages("none", *WHEEL))
    assert libraries == {
        f"lora_kernels/_cpu-torch{version}.so": f"for {version}" for version in ("2.10", "2.13")
    }


@pytest.mark.parametrize("names", [[], ["_cpu.so"], ["_cpu-torch2.10.so", "_cpu-torch2.so"]])
def test_a_folder_of_other_libraries_is_refused(packages, tmp_path, monkeypatch, names):
    folder = tmp_path / "prebuilt"
    folder.mkdir()
    for name in names:
        (folder / name).touch()
    monkeypatch.setenv("LORA_KERNELS_PREBUILT", str(folder))
    with pytest.raises(AssertionError, match="LORA_KERNELS_PREBUILT must be a folder of libraries"):
        packages("none", *WHEEL)


@pytest.mark.parametrize("system, machine", [("Windows", "AMD64"), ("Darwin", "arm64")])
def test_elsewhere_the_cpu_extension_is_left_out_with_the_reason(build, tmp_path, system, machine):
    """What the build asks for first, by a stand-in for the platform."""
    stand_in = f"import platform\nplatform.system = lambda: {system!r}\nplatform.machine = lambda: {machine!r}\n"
    (tmp_path / "sitecustomize.py").write_text(stand_in)
    done = build("auto", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert f"cpu: it is for Linux x86_64, this is {system} {machine}" in done.stderr


def test_an_editable_installation_finds_its_library_in_the_sources(packages):
    code = "from setuptools import build_meta; build_meta.build_editable('.')"
    root = packages("cpu", "-c", code)
    assert (root / "lora_kernels/_cpu.so").read_text().strip() == NEW
    assert (root / "lora_kernels/_cuda.so").read_text() == OLD  # not this build's to take away


def test_a_source_distribution_holds_every_source_and_no_library(packages):
    root = packages("none", "setup.py", "-q", "sdist")
    (archive,) = (root / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert not [name for name in names if name.endswith(".so")]
    sources = {str(path.relative_to(root)) for path in (root / "csrc").rglob("*.*")}
    wanted = {"setup.py", "pyproject.toml", "README.md", "LICENSE"}
    assert len(sources) > 20 and names >= sources | files_of(root, "lora_kernels") | wanted


def test_the_readme_installs_what_the_build_needs():
    """Without build isolation, pip leaves that to the user."""
    required = re.search(r"^requires = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), re.M)
    lines = (ROOT / "README.md").read_text().splitlines()
    (at,) = (i for i, line in enumerate(lines) if line.startswith("pip install --no-build-iso"))
    named = lines[at - 1].partition("#")[0].replace('"', "").split()
    assert named == ["pip", "install", *ast.literal_eval(required[1])]
