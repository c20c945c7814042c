"""Writes a Hugging Face Hub kernel of this tree, pure Python: `python release/hub.py FOLDER [--built]`.

FOLDER gets build.toml and torch-ext/lora_kernels, from which the Hub's kernel-builder builds. Several versions of a kernel
may be loaded by one process, from folders that are on no path: so imports become relative, and the names of operators get
the prefix of the `_ops` module that the builder adds. Only the standard library, torch and triton may be imported: the
public names whose modules need more are left out. --built adds a stand-in for `_ops`, so that the folder can be loaded.
"""

from __future__ import annotations

import argparse
import ast
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAME = "lora_kernels"
ALLOWED = {*sys.stdlib_module_names, "torch", "triton", NAME}
BUILD = """\
[general]
name = "lora-kernels"
version = {major}
edition = 5
license = "Apache-2.0"
backends = ["cpu", "cuda", "rocm"]

[torch-noarch]
pyext = ["py", "json"]
"""
OPS = '''\
"""A stand-in for the module that kernel-builder writes: the namespace of this copy's operators."""

import torch

ops = torch.ops._{namespace}


def add_op_namespace_prefix(op_name: str) -> str:
    """The operator's name with this copy's namespace."""
    return f"_{namespace}::{{op_name}}"
'''


def modules() -> dict[str, Path]:
    """Each module of the package and its file; a package's own module has the package's name."""
    found = {}
    for path in sorted((ROOT / NAME).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(source: str, known: dict[str, Path]) -> set[str]:
    """The modules of this package that a source imports, by statements and as values of a registry."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == NAME:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in known}
        elif isinstance(node, ast.Constant) and node.value in known and "." in str(node.value):
            found.add(node.value)
    return found


def foreign(source: str) -> set[str]:
    """The packages that importing a source needs and a kernel may not have; a function's imports are needed when it runs."""
    found = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found - ALLOWED


def closure(start: set[str], known: dict[str, Path]) -> set[str]:
    """These modules with all that they import, and the packages that hold them, without the public names' own."""
    found: set[str] = set()
    waiting = set(start)
    while waiting:
        name = waiting.pop()
        found.add(name)
        parents = {name.rsplit(".", depth)[0] for depth in range(1, name.count("."))}
        waiting |= (imported(known[name].read_text(), known) | parents) - found - {NAME}
    return found


def relative(source: str, module: str, is_package: bool) -> str:
    """`source` with relative imports, and with operators in the namespace of `_ops`."""
    depth = module.count(".") + is_package
    dots = "." * depth
    source = re.sub(rf"from {NAME} import", f"from {dots} import", source)
    source = re.sub(rf"from {NAME}\.", f"from {dots}", source)
    source = re.sub(rf'"{NAME}::(\w+)"', r'add_op_namespace_prefix("\1")', source)
    source = re.sub(rf'Library\("{NAME}"', 'Library(add_op_namespace_prefix("")[:-2]', source)
    source = source.replace(f"torch.ops.{NAME}.", "_registered.")
    source = re.sub(rf'"{re.escape(module)}\.(\w+)"', r'__name__ + ".\1"', source)
    uses = ("add_op_namespace_prefix", "_registered")
    if any(name in source for name in uses):
        line = f"from {dots}_ops import add_op_namespace_prefix, ops as _registered  # noqa: F401\n"
        at = re.search(r"^import torch\n", source, re.M)
        assert at is not None
        source = source[: at.end()] + line + source[at.end() :]
    return source


def public(source: str, left_out: set[str]) -> str:
    """The package's own module without the names of `left_out`."""
    tree = ast.parse(source)
    gone: set[str] = set()
    lines = source.splitlines(keepends=True)
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module in left_out:
            gone |= {alias.asname or alias.name for alias in node.names}
            for index in range(node.lineno - 1, node.end_lineno or node.lineno):
                lines[index] = ""
    listed = re.compile(rf'^    "({"|".join(map(re.escape, sorted(gone)))})",\n$')
    return "".join(line for line in lines if not (gone and listed.match(line)))


def check(source: str, module: str) -> None:
    """RuntimeError where something of a source still needs the package under its own name."""
    for node in ast.walk(ast.parse(source)):
        absolute = isinstance(node, ast.Import) and any(
            alias.name.split(".")[0] == NAME for alias in node.names
        )
        absolute |= (
            isinstance(node, ast.ImportFrom)
            and node.level == 0
            and (node.module or "").split(".")[0] == NAME
        )
        text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
        if absolute or re.match(rf"{NAME}(::|\.\w+$)", text):
            raise RuntimeError(f"{module}: {ast.unparse(node)} needs {NAME} on a path")


def write(folder: Path, built: bool = False) -> list[str]:
    """Write the kernel into `folder`, which must not hold one; returns the modules that it has."""
    known = modules()
    own = known.pop(NAME)
    version = re.search(r'__version__ = "([\d.]+)"', own.read_text())
    assert version is not None
    offered = imported(own.read_text(), known)
    needs = {name: closure({name}, known) for name in offered}
    left_out = {
        name
        for name, wanted in needs.items()
        if any(foreign(known[each].read_text()) for each in wanted)
    }
    kept = set().union(*(needs[name] for name in offered - left_out)) | closure(
        imported(known[f"{NAME}.backends"].read_text(), known), known
    )
    target = folder / "torch-ext" / NAME
    target.mkdir(parents=True)
    (folder / "build.toml").write_text(BUILD.format(major=int(version[1].split(".")[0]) or 1))
    shutil.copy(ROOT / "LICENSE", folder)
    for module in sorted({NAME, *kept}):
        path = own if module == NAME else known[module]
        source = path.read_text(encoding="utf-8")
        if module == NAME:
            source = public(source, left_out)
        source = source.replace('_version("lora-kernels")', f'"{version[1]}"')
        source = relative(source, module, path.name == "__init__.py")
        check(source, module)
        file = target / path.relative_to(ROOT / NAME)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source, encoding="utf-8")
        for table in path.parent.glob("*.json"):
            shutil.copy(table, file.parent)
    if built:
        namespace = f"{NAME}_{version[1].replace('.', '_')}"
        (target / "_ops.py").write_text(OPS.format(namespace=namespace))
    return sorted(kept)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--built", action="store_true", help="with a stand-in for _ops, to be loaded"
    )
    asked = parser.parse_args()
    made = write(asked.folder, asked.built)
    print(f"{asked.folder}: {len(made)} modules; left out is what needs more than torch and triton")
