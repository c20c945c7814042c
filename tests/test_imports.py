"""Importing is inert, and works with no Triton, no compiler, no extension and no optional package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)
sys.meta_path.insert(0, Blocker())
"""

USE = """
import torch
from lora_kernels import LinearWithLoRA, explain, lora_linear
layer = LinearWithLoRA(torch.nn.Linear(8, 6), 2, 1.0)
x = torch.randn(4, 8, requires_grad=True)
layer(x).sum().backward()
assert x.grad is not None and layer.lora.B.grad is not None
print(explain(x, layer.weight, layer.lora.A, layer.lora.B, 1.0))
"""


def fresh_process(code, **environment):
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env={"PATH": "", "PYTHONPATH": str(ROOT), "HOME": "/nonexistent", **environment},
    )
    assert result.returncode == 0, result.stderr
    return result


def test_import_is_inert():
    code = """
import os, subprocess, sys, threading
def forbidden(*args, **kwargs):
    raise AssertionError("a subprocess at import")
import torch
subprocess.Popen.__init__ = forbidden
opened = []
def watch(event, args):
    if event == "open" and args[1] and set("wa+") & set(str(args[1])):
        opened.append(args)
sys.addaudithook(watch)
environment, threads, patched = dict(os.environ), threading.active_count(), torch.nn.Linear.forward
import lora_kernels, lora_kernels.backends.cpu, lora_kernels.backends.triton, lora_kernels.backends.cuda
assert not torch.cuda.is_initialized()
assert dict(os.environ) == environment and threading.active_count() == threads
assert torch.nn.Linear.forward is patched
assert not opened, opened
for name in ("triton", "peft", "transformers", "matplotlib"):
    assert name not in sys.modules, name
"""
    result = fresh_process(code, PYTHONDONTWRITEBYTECODE="1")
    assert result.stdout == "" and result.stderr == ""


@pytest.mark.parametrize(
    "blocked",
    [
        ("triton",),
        ("peft", "transformers", "matplotlib", "tqdm", "pytest", "hypothesis"),
        ("ninja", "setuptools"),
    ],
    ids="+".join,
)
def test_it_works_without(blocked):
    fresh_process(BLOCKED.format(blocked=blocked) + USE)


def test_it_works_where_triton_finds_no_gpu():
    """The backend is chosen by the tensor's device, not by what can be imported."""
    pytest.importorskip("triton")
    text = fresh_process("import triton\n" + USE).stdout
    assert "triton: runs on cuda tensors only" in text


def test_everything_promised_is_there():
    import lora_kernels

    for name in lora_kernels.__all__:
        assert getattr(lora_kernels, name).__doc__ or name.startswith("__"), name
    assert (ROOT / "lora_kernels" / "py.typed").exists()


def test_an_unwritable_cache_is_no_error():
    fresh_process(USE, LORA_KERNELS_CACHE="/proc/nowhere")


def test_the_log_level_comes_from_the_environment():
    code = "from lora_kernels import env\nprint(env.logger().level)"
    assert fresh_process(code, LORA_KERNELS_LOG="debug").stdout.strip() == "10"


def test_a_bad_log_level_is_one_warning():
    """It must not break a call that wants to log something."""
    code = "from lora_kernels import env\nfor _ in range(3):\n    print(env.logger().level)"
    done = fresh_process(code, LORA_KERNELS_LOG="nonsense", PYTHONWARNINGS="always")
    assert done.stdout.split() == ["0"] * 3
    assert done.stderr.count("LORA_KERNELS_LOG must be a logging level such as INFO") == 1


def test_layers_import_downward_only():
    """No cycle: each layer of the package imports only from those below it."""
    import ast

    tuning = {"problem", "env", "tuning.targets"}
    tuning_all = tuning | {f"tuning.{name}" for name in ("config", "cycles", "cost", "tables")}
    operands = {"problem", "dropout", "operands"}
    products = operands | {"tuning.targets", "backends.base"}
    backends = products | tuning_all | {"env"}
    planning = products | {"env", "backends.device", "selftest"}
    below = {
        "problem": set(),
        "dropout": set(),
        "env": set(),
        "tuning.targets": set(),
        "tuning.config": tuning,
        "tuning.cycles": tuning | {"tuning.config"},
        "tuning.cost": tuning | {"tuning.config", "tuning.cycles"},
        "tuning.tables": tuning_all - {"tuning.tables"},
        "tuning.search": tuning_all,
        "operands": operands - {"operands"},
        "backends.base": products - {"backends.base"},
        "formulas": products,
        "backends.composite": products,
        "backends.device": {"tuning.targets"},
        "backends.eager": backends,
        "backends.cpu": backends | {"formulas", "backends.composite"},
        "backends.cuda": backends,
        "backends.triton.configs": tuning_all,
        "backends.triton.products": backends
        | {f"backends.triton.{name}" for name in ("configs", "decode", "expand", "one_pass")}
        | {f"backends.triton.{name}" for name in ("shrink", "shrink_wgrad", "wgrad")},
        "plan": planning,
        "autograd": products | {"plan", "formulas", "backends.composite"},
        "ops": products | {"plan", "formulas", "autograd"},
        "functional": products | {"plan", "formulas", "autograd", "ops"},
        "modules": {"functional", "plan"},
        "adapters": {"modules"},
        "merge": {"modules"},
    }
    for name, allowed in below.items():
        source = ROOT / "lora_kernels" / (name.replace(".", "/") + ".py")
        imported = set()
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lora_kernels"):
                module = node.module.removeprefix("lora_kernels").lstrip(".")
                folder = (ROOT / "lora_kernels").joinpath(*filter(None, module.split(".")))
                inner = {f"{module}.{alias.name}".lstrip(".") for alias in node.names}
                imported |= inner if folder.is_dir() else {module}
        assert imported <= allowed, (name, imported - allowed)
