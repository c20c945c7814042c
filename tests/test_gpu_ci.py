"""The GPU's script, its workflow and the action for others, without a GPU: each can fail, in the time it has."""

from __future__ import annotations

import ast
import fnmatch
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

ROOT = Path(__file__).parent.parent
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/gpu.yml").read_text())
JOB = WORKFLOW["jobs"]["device"]
(RUN,) = (step for step in JOB["steps"] if step.get("run", "").startswith("make gpu"))


def test_every_step_may_take_its_limit():
    script = (ROOT / "benchmarks/gpu.sh").read_text()
    steps = re.search(r"^STEPS=\$\{\*:-([a-z ]+)\$\{BASELINE:\+ compare\}", script, re.M)[1].split()
    installing = 15
    needed = (len(steps) + 1) * RUN["env"]["LIMIT"] / 60 + installing
    assert len(steps) == 7 and needed <= JOB["timeout-minutes"]


def run_gpu_script(python, tmp_path, *steps, limit=600):
    return subprocess.run(
        ["sh", str(ROOT / "benchmarks" / "gpu.sh"), *steps],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ
        | {"PYTHON": str(python), "RESULTS": str(tmp_path), "LIMIT": str(limit)}
        | {"LOG": f"{tmp_path}/log"},
    )


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_script_without_a_gpu(tmp_path):
    done = run_gpu_script(sys.executable, tmp_path)
    assert done.returncode == 2 and "finds no GPU" in done.stderr and done.stdout == ""
    assert list(tmp_path.iterdir()) == []
    done = run_gpu_script("/nonexistent/python", tmp_path)
    assert done.returncode == 2 and "has no torch" in done.stderr


def stand_in(tmp_path, pattern, does):
    """For Python: writes down what it is asked, and `does` something else where that matches a shell pattern."""
    python = tmp_path / "python"
    parts = 'case "$*" in *total_memory*) echo 4; exit;; esac'
    python.write_text(
        f'#!/bin/sh\necho "$@" >>"$LOG"\n{parts}\ncase "$*" in {pattern}) {does};; esac\n'
    )
    python.chmod(0o755)
    return python


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "does", "limit", "text"),
    [
        ("nothing", "exit 1", 600, "gpu.sh: done"),
        ('*"kernels tune "*', "exit 1", 600, "gpu.sh: failed: tune"),
        ('*"kernels selftest"*', "exec sleep 100", 5, "gpu.sh: failed: selftest"),
        ('*"--part 3/4"*', "exit 1", 600, "gpu.sh: failed: tests"),
    ],
    ids=["all well", "a step fails", "a kernel hangs", "a part fails"],
)
def test_gpu_script_runs_every_step(tmp_path, pattern, does, limit, text):
    """A step that fails or does not end does not stop the rest."""
    done = run_gpu_script(stand_in(tmp_path, pattern, does), tmp_path, limit=limit)
    assert done.returncode == ("failed" in text), done.stderr
    assert done.stderr.splitlines()[-1].startswith(text)
    lines = (tmp_path / "log").read_text()
    places = [
        lines.index(f"lora_kernels {name}") for name in ("selftest", "tune", "bench", "report")
    ]
    assert places == sorted(places) and "pip" not in lines
    assert all(f"--part {part}/4" in lines for part in (1, 2, 3, 4))


def test_gpu_script_runs_the_steps_that_are_named(tmp_path):
    python = stand_in(tmp_path, "nothing", "exit 1")
    assert run_gpu_script(python, tmp_path, "tune", "bench").returncode == 0
    lines = (tmp_path / "log").read_text()
    assert lines.index("lora_kernels tune") < lines.index("lora_kernels bench")
    assert "kernels selftest" not in lines and "-m pytest" not in lines
    done = run_gpu_script(python, tmp_path, "tune", "banch")
    assert done.returncode == 2 and "banch" in done.stderr


def imported(path, seen):
    """`path` and the test modules that it imports."""
    if path in seen or not path.exists():
        return seen
    seen.add(path)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tests"):
            imported(ROOT / (node.module.replace(".", "/") + ".py"), seen)
    return seen


def test_a_push_of_what_the_job_runs_starts_it():
    patterns = WORKFLOW[True]["push"]["paths"]  # YAML reads the key `on` as true
    used = {"benchmarks/gpu.sh", "Makefile", "setup.py", "pyproject.toml", "requirements-dev.txt"}
    used |= {"lora_kernels/ops.py", "csrc/cuda/build.py", "tests/conftest.py", "tests/__init__.py"}
    for path in (ROOT / "tests/gpu").glob("*.py"):
        used |= {str(p.relative_to(ROOT)) for p in imported(path, set())}
    assert "tests/executed/shipped.py" in used
    assert not {u for u in used if not any(fnmatch.fnmatch(u, p) for p in patterns)}


def without_nvcc():
    return os.pathsep.join(
        folder
        for folder in os.environ["PATH"].split(os.pathsep)
        if not os.path.exists(os.path.join(folder, "nvcc"))
    )


@pytest.mark.parametrize("require", ["", "1"])
def test_a_runner_without_nvcc_or_pytest(tmp_path, monkeypatch, require):
    """The workflow says that both must be there."""
    assert RUN["env"]["REQUIRE"]
    monkeypatch.setenv("PATH", without_nvcc())
    monkeypatch.setenv("REQUIRE", require)
    python = stand_in(tmp_path, '*"import pytest"*', "exit 1")
    done = run_gpu_script(python, tmp_path, "build", "tests")
    assert "there is no nvcc" in done.stderr and "there is no pytest" in done.stderr
    assert done.stderr.splitlines()[-1].startswith(
        "gpu.sh: failed: build tests" if require else "gpu.sh: done"
    )
    assert done.returncode == bool(require)


def test_the_devices_tests_are_told_what_must_be_there(tmp_path, monkeypatch):
    for require, asked in (("", 0), ("1", 4)):
        monkeypatch.setenv("REQUIRE", require)
        folder = tmp_path / f"required{require}"
        folder.mkdir()
        run_gpu_script(stand_in(folder, "nothing", "exit 1"), folder, "tests")
        assert (folder / "log").read_text().count("--require triton,cuda") == asked


def test_what_became_slower_fails_from_the_second_run_on(tmp_path, monkeypatch):
    baseline = tmp_path / "of this runner" / "torch.json"
    assert RUN["env"]["BASELINE"].endswith(".json")
    monkeypatch.setenv("BASELINE", str(baseline))
    writes = """for a in "$@"; do case "$a" in *.part.json) echo made >"$a";; esac; done"""
    dies = run_gpu_script(
        stand_in(tmp_path, "*part.json*", f"{writes}; exit 1"), tmp_path, "compare"
    )
    assert dies.returncode == 1 and not baseline.exists()
    first = run_gpu_script(stand_in(tmp_path, "*part.json*", writes), tmp_path, "compare")
    assert first.returncode == 0 and "there was none to compare with" in first.stderr
    assert baseline.read_text() == "made\n"
    slower = stand_in(tmp_path, f'*"--compare {baseline}"*', "exit 1")
    second = run_gpu_script(slower, tmp_path)
    assert second.returncode == 1 and second.stderr.splitlines()[-1] == "gpu.sh: failed: compare"
    monkeypatch.delenv("BASELINE")
    assert run_gpu_script(slower, tmp_path, "compare").returncode == 2


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_action_fails_on_a_runner_that_has_lost_its_gpu():
    action = yaml.safe_load((ROOT / "action.yml").read_text())
    step = action["runs"]["steps"][0]
    assert step["env"]["DEVICE"] == "${{ inputs.device }}"
    for device, code in ((action["inputs"]["device"]["default"], 2), ("cpu", 0)):
        environment = {**os.environ, "CHOSEN_PYTHON": sys.executable, "DEVICE": device}
        done = subprocess.run(
            ["sh", "-e", "-c", step["run"]],
            env=environment,
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        assert done.returncode == code, done.stderr
