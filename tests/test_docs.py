"""The documents: their Python runs, their links and commands lead somewhere, and the tests they name exist."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lora_kernels.__main__ import COMMANDS

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
RUN_TIMEOUT_S = 240


def blocks(document, language):
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", document.read_text(), re.M | re.S)


def with_python():
    return [document for document in DOCUMENTS if blocks(document, "python")]


def links(document):
    """Targets of links and pictures within the repository, as (path, heading)."""
    text = re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http://", "https://", "mailto:")):
            path, _, heading = target.partition("#")
            yield path, heading


def headings(document):
    """Anchors as they are made from a document's headings."""
    titles = re.findall(r"^#+ (.*)$", document.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def names_in(file):
    return {
        node.name
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def short(path):
    return str(path.relative_to(ROOT))


@pytest.mark.slow
@pytest.mark.parametrize("document", with_python(), ids=short)
def test_python_blocks_run(document, tmp_path):
    """Top to bottom in one process, as a reader would; a block that needs a package that is not here is left out."""
    has_peft = importlib.util.find_spec("peft") is not None
    code = "\n".join(b for b in blocks(document, "python") if has_peft or "from peft" not in b)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LORA_KERNELS_CACHE": str(tmp_path)}
    # Each document says what its names stand for; the README's line of the formula names a layer without making one.
    prologue = "import torch\nlinear, x = torch.nn.Linear(8, 4), torch.randn(3, 8)\n"
    prologue += "A, B, alpha = torch.randn(8, 2), torch.randn(2, 4), 0.5\n"
    done = subprocess.run(
        [sys.executable, "-c", prologue + code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=RUN_TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr


def test_the_readme_has_python():
    assert ROOT / "README.md" in with_python()


@pytest.mark.parametrize("document", DOCUMENTS, ids=short)
def test_links_lead_somewhere(document):
    for path, heading in links(document):
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), f"{short(document)}: {path} does not exist"
        if heading and target.suffix == ".md":
            assert heading in headings(target), f"{short(document)}: {path} has no #{heading}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=short)
def test_commands_exist(document):
    """Subcommands and make targets that shell blocks use."""
    shell = "\n".join(blocks(document, "sh") + blocks(document, "yaml"))
    for command in re.findall(r"-m lora_kernels (\S+)", shell):
        assert command in COMMANDS, f"{short(document)}: lora_kernels {command}"
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    for target in re.findall(r"^make ([a-z]+)", shell, re.M):
        assert target in targets, f"{short(document)}: make {target}"


def test_commands_that_documents_show_are_valid():
    """Every whole command line of the documents is one that the parser takes."""
    import shlex

    from lora_kernels.__main__ import parser_for

    found = 0
    for document in DOCUMENTS:
        for line in "\n".join(blocks(document, "sh") + blocks(document, "yaml")).splitlines():
            shown = re.search(r"python -m lora_kernels (.*)", line)
            if shown and "..." not in line:
                asked = shlex.split(shown[1], comments=True)
                if "--help" not in asked:
                    parser_for(asked).parse_args(asked)
                found += 1
    assert found > 5


def test_what_is_slower_is_counted_from_the_measurements():
    """The README's and the CPU page's counts of losses are the grid's."""
    cells = json.loads((ROOT / "benchmarks/results/cpu-zen4-grid.json").read_text())["cells"]

    def losses(other):
        times = [(cell["milliseconds"], cell) for cell in cells]
        return [(t["ours"] / t[other], cell) for t, cell in times if t["ours"] > 1.05 * t[other]]

    behind = losses("reference")
    one_row = [slow for slow, cell in behind if cell["M"] == 1 and cell["dtype"] == "float32"]
    high_rank = [slow for slow, cell in behind if cell["R"] == 64 and cell["dtype"] == "bfloat16"]
    others = len(behind) - len(one_row) - len(high_rank)
    ((worst, _),) = losses("addmm")
    readme, page = (
        " ".join((ROOT / name).read_text().split())
        for name in ("README.md", "docs/performance/cpu.md")
    )
    for told in (
        f"grid of {len(cells)} cases",
        f"form in one case ({100 * (worst - 1):.2f} %), and than the reference in {len(behind)}:",
        f"({len(one_row)} cases, down to {1 / max(one_row):.2f} of its speed",
        f"({len(high_rank)}, down to {1 / max(high_rank):.2f}), and",
        f"in bfloat16 ({others}, ",
    ):
        assert told in readme
    for told in (
        f"{len(cells)} cases",
        f"{len(behind)} are slower than the reference by more than 5 %",
        f"one than the eager backend ({100 * (worst - 1):.2f} %",
        f"{1 / max(one_row):.2f} to {1 / min(one_row):.2f} of the reference's speed",
        f"up to {max(high_rank):.2f} times as fast",
    ):
        assert told in page


def test_every_failure_mode_names_tests_that_exist():
    text = (ROOT / "docs" / "verification.md").read_text()
    table = text[text.index("| what goes wrong |") :]
    rows = [line for line in table.splitlines()[2:] if line.startswith("| ")]
    modes = [row for row in rows if not row.startswith("| **")]
    assert len(modes) > 40
    known = {}
    for row in modes:
        named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", row)
        assert named, f"no test is named: {row}"
        for file, test in named:
            if file not in known:
                known[file] = names_in(ROOT / "tests" / file)
            assert test in known[file], f"tests/{file} has no {test}"


def test_lanes_are_folders_of_tests():
    """The lanes that the first table names are there, so that its promises are kept by something."""
    text = (ROOT / "docs" / "verification.md").read_text()
    for folder in re.findall(r"`(tests/\w+/)`", text):
        assert list((ROOT / folder).glob("*.py")), folder
