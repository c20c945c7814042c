"""Importing is inert, and works with no Triton, no compiler, no extension and no optional package."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

from tests.processes import python

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
    base = {"PATH": "", "PYTHONPATH": str(ROOT), "HOME": "/nonexistent"}
    return python("-c", code, timeout=120, cwd=ROOT, env=base | environment)


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
for name in ("triton", "peft", "transformers", "matplotlib", "torch.distributed.tensor"):
    assert name not in sys.modules, name
"""
    result = fresh_process(code, PYTHONDONTWRITEBYTECODE="1")
    assert result.stdout == "" and result.stderr == ""


@pytest.mark.slow
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


def test_it_works_where_triton_finds_no_gpu_and_the_cache_cannot_be_written():
    """The backend is chosen by the tensor's device, not by what can be imported."""
    pytest.importorskip("triton")
    text = fresh_process("import triton\n" + USE, LORA_KERNELS_CACHE="/proc/nowhere").stdout
    assert "triton: runs on cuda tensors only" in text


def test_everything_promised_is_there():
    import lora_kernels

    for name in lora_kernels.__all__:
        assert getattr(lora_kernels, name).__doc__ or name.startswith("__"), name
    assert (ROOT / "lora_kernels" / "py.typed").exists()


def test_the_log_level_comes_from_the_environment():
    """One that is none is one warning: it must not break a call that wants to log something."""
    code = """
import os
from lora_kernels import env
for level in ("nonsense", "nonsense", "debug"):
    os.environ["LORA_KERNELS_LOG"] = level
    print(env.logger().level)
"""
    done = fresh_process(code, PYTHONWARNINGS="always")
    assert done.stdout.split() == ["0", "0", "10"]
    assert done.stderr.count("LORA_KERNELS_LOG must be a logging level such as INFO") == 1


# The package from the ground up. A name is a module or a folder; a module that is named apart from its folder is not
# part of the folder's entry. Entries of one line do not import one another, and the modules of one folder may.
LAYERS = (
    ("problem", "dropout", "once", "ahead", "routing", "wrappers"),
    ("declined", "env", "operands", "reference"),
    ("quantized", "tuning"),
    ("samples", "backends.base"),
    ("backends.composite", "formulas"),
    ("backends",),
    ("selftest",),
    ("plan",),
    ("autograd",),
    ("ops",),
    ("arguments", "dora"),
    ("functional",),
    ("bases", "grouped", "projections"),
    ("modules",),
    ("adapter_file", "merge", "mixed", "siblings", "distributed"),
    ("adapters",),
    ("named", "integrations"),
    ("lora_kernels",),  # what `import lora_kernels` gives
    ("demo",),
    ("bench",),
    ("cli",),
    ("__main__",),
)


def modules(root):
    """Each module's name and source, without the package's name; the package itself is "lora_kernels"."""
    found = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name or "lora_kernels"] = path.read_text()
    return found


def imports(source, known):
    """The modules that a source imports: anywhere in it, and by a string where it calls `import_module`."""
    nodes = list(ast.walk(ast.parse(source)))
    named = set()  # dotted names
    for node in nodes:
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            named |= {f"{node.module}.{alias.name}" for alias in node.names}
    if any(getattr(node, "attr", getattr(node, "id", "")) == "import_module" for node in nodes):
        # "lora_kernels.cli." of an f-string is every module of that folder.
        texts = {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        named |= {text for text in texts if text.startswith("lora_kernels.")}
    found = set()
    for name in named:
        package, _, inner = name.partition(".")
        if package != "lora_kernels":
            continue
        if inner.endswith("."):
            found |= {each for each in known if each.startswith(inner)}
        else:  # a module, else what a module holds
            holder = inner.rpartition(".")[0] or "lora_kernels"
            found.add(inner if inner in known else holder)
    return found


def violations(sources, layers):
    """What is wrong with a package's imports, a line each."""
    height = {entry: level for level, line in enumerate(layers) for entry in line}
    wrong, used = [], set()

    def entry_of(module):
        parts = module.split(".")
        heads = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
        return next((head for head in heads if head in height), None)

    graph = {name: imports(source, sources) - {name} for name, source in sources.items()}
    folders = {}
    for name, imported in graph.items():
        above = entry_of(name)
        used.add(above)
        if above is None:
            wrong.append(f"{name} is in no layer")
            continue
        for other in imported:
            below = entry_of(other)
            if below != above and height.get(below, len(layers)) >= height[above]:
                wrong.append(f"{name} imports {other}, which is not below it")
            if "." in name and "." in other:
                source, target = (module.partition(".")[0] for module in (name, other))
                folders.setdefault(source, set()).update({target} - {source})
    wrong += [f"{entry} is in a layer and not in the package" for entry in height.keys() - used]
    for what, edges in (("modules", graph), ("folders", folders)):
        try:
            graphlib.TopologicalSorter(edges).prepare()
        except graphlib.CycleError as cycle:
            wrong.append(f"a cycle of {what}: {', '.join(sorted(set(cycle.args[1])))}")
    return sorted(wrong)


def test_the_page_has_the_same_layers():
    """The table of docs/design.md, from the top down."""
    page = (ROOT / "docs" / "design.md").read_text()
    table = page[page.index("## Layers") : page.index("## Decisions")]
    firsts = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    shown = [tuple(name.strip(" `") for name in first.split(",")) for first in firsts]
    assert list(map(set, reversed(shown))) == list(map(set, LAYERS))


def test_layers_import_downward_only():
    """No module is left out, nor an import inside a function or by name; and no cycle of modules or of folders."""
    sources = modules(ROOT / "lora_kernels")
    assert len(sources) > 50 and not violations(sources, LAYERS)


@pytest.mark.parametrize(
    "module, source, wrong",
    [
        ("low", "import lora_kernels.high", "low imports high, which is not below it"),
        ("low", "from lora_kernels import high", "low imports high, which is not below it"),
        ("low", "def f():\n    from lora_kernels.high import g", "low imports high, which is not below it"),
        ("low", "from lora_kernels.beside import g", "low imports beside, which is not below it"),
        ("low", "import importlib\nimportlib.import_module('lora_kernels.high')",
         "low imports high, which is not below it"),
        ("low", "from importlib import import_module\nimport_module(f'lora_kernels.box.{1}')",
         "low imports box.b, which is not below it"),
        ("low", "from lora_kernels import __version__", "low imports lora_kernels, which is not below it"),
        ("box.a", "from lora_kernels.box import b", "a cycle of modules: box.a, box.b"),
        ("jar.c", "from lora_kernels.box.a import f", "a cycle of folders: box, jar"),
        ("new", "", "new is in no layer"),
    ],
)  # fmt: skip
def test_what_breaks_the_layers_is_found(module, source, wrong):
    sources = {
        "low": "", "beside": "", "jar.c": "", "box.a": "", "high": "import os, lora_kernels.low", "lora_kernels": "",
        "box.b": "from lora_kernels.box import a\nfrom lora_kernels.jar.c import anything",
    }  # fmt: skip
    layers = (("low", "beside"), ("jar",), ("box",), ("high",), ("lora_kernels",))
    assert not violations(sources, layers)
    assert wrong in violations(sources | {module: source}, layers)
    assert violations(sources, (*layers, ("gone",))) == [
        "gone is in a layer and not in the package"
    ]
