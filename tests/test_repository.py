"""What strangers meet first: a version that has one place, templates that ask for `info`, a hook that is `make lint`."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml

import lora_kernels
from lora_kernels.__main__ import parser_for
from tests.processes import python

ROOT = Path(__file__).parent.parent
TEMPLATES = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
COMMUNITY = ("CHANGELOG.md", "CODE_OF_CONDUCT.md", "SECURITY.md", "CITATION.cff")
INFO = "python -m lora_kernels info"


def load(path):
    return yaml.safe_load((ROOT / path).read_text())


def test_the_version_has_one_place():
    """`__version__`; the package takes it from there, and the changes say what is in it."""
    project = (ROOT / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in project and 'attr = "lora_kernels.__version__"' in project
    assert not re.search(r"^version = \"", project, re.M)
    assert re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[0] == (
        lora_kernels.__version__
    )
    assert "version" not in load("CITATION.cff")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_setuptools_reads_that_version(monkeypatch):
    from setuptools.config.pyprojecttoml import read_configuration

    monkeypatch.chdir(ROOT)
    found = read_configuration("pyproject.toml", expand=True)
    assert found["project"]["version"] == lora_kernels.__version__


def test_the_citation_can_be_cited():
    cited = load("CITATION.cff")
    assert cited["cff-version"] == "1.2.0" and cited["license"] == "Apache-2.0"
    assert {"title", "authors", "message"} <= cited.keys() and all(
        author.get("name") for author in cited["authors"]
    )


def test_a_report_of_a_bug_or_of_slowness_needs_info():
    for path in TEMPLATES:
        if path.stem == "config":
            continue
        form = load(path)
        assert form["name"] and form["description"]
        fields = {each["id"]: each for each in form["body"]}
        label = fields["info"]["attributes"]["label"]
        assert INFO in label, path.name
        required = fields["info"].get("validations", {}).get("required", False)
        assert required == (path.stem in ("bug", "slow")), path.name
    assert {path.stem for path in TEMPLATES} == {"bug", "slow", "feature", "config"}
    assert INFO in (ROOT / ".github/pull_request_template.md").read_text()


def test_commands_of_the_templates_are_valid():
    sizes = {"M": "8", "K": "16", "N": "16", "R": "4", "DTYPE": "float32"}
    found = 0
    for path in TEMPLATES:
        for command in re.findall(r"`python -m lora_kernels ([^`]*)`", path.read_text()):
            asked = [sizes.get(word, word) for word in command.split()]
            parser_for(asked).parse_args(asked)
            found += 1
    assert found >= 6


def test_the_hook_is_make_lint():
    (repository,) = load(".pre-commit-config.yaml")["repos"]
    (hook,) = repository["hooks"]
    assert hook["entry"] == "make lint" and hook["pass_filenames"] is False
    assert re.search(r"^lint:", (ROOT / "Makefile").read_text(), re.M)


def test_the_bot_updates_what_is_pinned():
    kinds = {each["package-ecosystem"]: each for each in load(".github/dependabot.yml")["updates"]}
    pinned = re.findall(r"^([\w-]+)==", (ROOT / "requirements-dev.txt").read_text(), re.M)
    linters = set(re.findall(r"^\t\$\(BIN\)/([\w-]+)", (ROOT / "Makefile").read_text(), re.M))
    allowed = {each["dependency-name"] for each in kinds["pip"]["allow"]}
    assert allowed == set(pinned) & linters and len(allowed) == 3 and "github-actions" in kinds


def test_ci_runs_the_readmes_test_command():
    assert (ROOT / ".ci/run").read_text().rstrip().endswith("exec make test")
    assert re.search(r"^make test\b", (ROOT / "README.md").read_text(), re.M)


@pytest.mark.parametrize("name", COMMUNITY)
def test_nothing_is_left_to_fill_in(name):
    text = (ROOT / name).read_text()
    assert not re.search(r"\[INSERT|TODO|FIXME|@example|<your|YOUR_|lorem", text, re.I)
    assert not re.search(r"[\w.]+@[\w.]+\.\w+", text), "an address that nobody here has"


@pytest.mark.slow
def test_the_pages_have_every_public_name_with_its_formula(tmp_path):
    """As `make docs` makes them; `python -m pdoc` is what it runs."""
    pytest.importorskip("pdoc")
    makefile = (ROOT / "Makefile").read_text()
    asked = shlex.split(re.search(r"^PAGES := (.*)$", makefile, re.M)[1])
    python("-m", "pdoc", "--no-show-source", "--output-directory", tmp_path, *asked, cwd=ROOT)
    pages = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.html")}
    assert pages == {
        "index.html",
        "lora_kernels.html",
        "lora_kernels/integrations/peft.html",
        "lora_kernels/distributed.html",
    }
    page = (tmp_path / "lora_kernels.html").read_text()
    for name in lora_kernels.__all__:
        assert f'<section id="{name}"' in page, name
    assert "y = x·weightᵀ + bias + alpha·(dropout(x)·A)·B" in page
