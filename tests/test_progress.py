"""Long commands: how far they are, and what they keep when a step fails or they are stopped."""

from __future__ import annotations

import json

import pytest
import torch

from lora_kernels import backends
from lora_kernels.__main__ import main
from lora_kernels.bench import linear, page, plots, results
from lora_kernels.bench import run as runner
from lora_kernels.bench.progress import counted
from lora_kernels.cli import tune as tuning
from lora_kernels.problem import Problem
from lora_kernels.tuning import tables
from lora_kernels.tuning.targets import TARGETS
from tests.test_benchmarks import RATES, a_run, made_row


def test_an_estimate_follows_the_pace_so_far():
    seconds = iter([0.0, 10.0, 120.0, 6 * 3600.0, 6 * 3600.0])
    assert list(counted("abcde", now=lambda: next(seconds))) == [
        ("[1/5]", "a"),
        ("[2/5, about 40 s left]", "b"),
        ("[3/5, about 3 min left]", "c"),
        ("[4/5, about 4.0 h left]", "d"),
        ("[5/5, about 1.5 h left]", "e"),
    ]


@pytest.fixture
def steps(monkeypatch):
    """steps(outcomes): a benchmark's cases give these rows, or raise these."""

    def give(*outcomes):
        waiting = list(outcomes)

        def measure(*args):
            outcome = waiting.pop(0)
            if isinstance(outcome, BaseException):
                raise outcome
            return [outcome]

        monkeypatch.setattr(runner.machine, "ceilings", lambda *a: RATES)
        monkeypatch.setattr(linear, "measure", measure)

    return give


SHAPES = [word for size in (8, 16, 24) for word in ("--shape", str(size), "16", "16", "2")]
BENCH = ["bench", *SHAPES, "--mode", "step", "--device", "cpu"]


def test_a_bench_that_is_stopped_keeps_and_prints_what_it_has(steps, tmp_path, capsys):
    steps(made_row("frozen", 100.0, 1.0), KeyboardInterrupt())
    file = tmp_path / "a.json"
    assert main([*BENCH, "--output", str(file)]) == 130
    out, err = capsys.readouterr()
    assert f"stopped: 1 rows were measured, in {file}" in err and "[2/3, about " in err
    assert "frozen" in out and [row.contender for row in results.load(file).rows] == ["frozen"]


def test_a_bench_that_is_stopped_before_its_first_step(steps, capsys):
    steps(KeyboardInterrupt())
    assert main(BENCH) == 130
    assert capsys.readouterr().err.endswith("lora_kernels bench: stopped\n")


def test_a_step_that_fails_is_listed_and_the_others_are_measured(steps, tmp_path, capsys):
    steps(made_row("frozen", 1.0, 1.0), MemoryError("8 GiB"), made_row("addmm", 2.0, 2.0))
    assert main([*BENCH, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [row["contender"] for row in found["rows"]] == ["frozen", "addmm"]
    assert len(found["failed"]) == 1 and "8 GiB" in str(found["failed"])


@pytest.fixture
def device(monkeypatch, tmp_path):
    """A machine with a GPU, by name; the cache is the test's."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(type(backends.get("triton")), "unavailable", lambda self: None)
    monkeypatch.setattr("lora_kernels.backends.device.current_target", lambda: TARGETS["sm_90"])
    monkeypatch.setattr(tuning, "_untiled", lambda problem, target: ("eager",))
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError("no room")], ids=type)
def test_a_tune_keeps_its_table(device, monkeypatch, tmp_path, capsys, error):
    """The first problem is measured; the second is stopped, or has no memory, and then the others go on."""
    problems = []

    class Subject:
        def __init__(self, problem, device):
            problems.append(problem)
            if len(problems) == 2:
                raise error

        def measure(self, choices, effort, clock):
            return [10.0 + index for index, _ in enumerate(choices)]

    monkeypatch.setattr(tuning, "Product", Subject)
    monkeypatch.setattr(tuning, "LowRank", Subject)
    file = tmp_path / "all.json"
    command = ["tune", "--shape", "64", "64", "64", "8", "--output", str(file)]
    stopped = isinstance(error, KeyboardInterrupt)
    assert main(command) == (130 if stopped else 1)
    err = capsys.readouterr().err
    kept = tables.load(tables.path(TARGETS["sm_90"]), TARGETS["sm_90"])
    measured = json.loads(file.read_text())["measured"]
    assert len({Problem(**each["problem"]) for each in measured}) == len(kept)
    if stopped:
        assert len(kept) == 1 and len(problems) == 2 and "stopped: " in err
    else:
        assert len(kept) == len(problems) - 1 >= 2 and "MemoryError: no room" in err
    assert "entries written to" in err


def test_tune_checks_what_it_writes_before_it_measures(device, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tuning, "tune", lambda *a, **k: pytest.fail("measured"))
    (tmp_path / "file").touch()
    command = ["tune", "--shape", "1", "2", "3", "4"]
    assert main([*command, "--output", str(tmp_path)]) == 2
    said = f"--output must be a file that can be written, got {tmp_path}:"
    assert said in capsys.readouterr().err
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path / "file"))
    assert main(command) == 2
    assert "LORA_KERNELS_CACHE must be a file that can be written" in capsys.readouterr().err
    monkeypatch.setattr(tuning, "tune", lambda *a, **k: ([], [], []))
    assert main([*command, "--dry-run"]) == 0, "nothing is written into the cache"


@pytest.mark.parametrize(
    "error, code", [(ValueError("odd rows"), 1), (KeyboardInterrupt(), 130)], ids=str
)
def test_a_report_is_written_with_the_plots_that_there_are(
    monkeypatch, tmp_path, capsys, error, code
):
    for name in ("a", "b"):
        results.save(a_run(), tmp_path / f"{name}.json")

    def draw(run, folder, stem, suffix):
        if stem == "b":
            raise error
        return {folder / "a-price.png": "<svg><text>a</text></svg>"}

    monkeypatch.setattr(plots, "draw", draw)
    assert main(["report", str(tmp_path)]) == code
    said = capsys.readouterr().err
    assert (
        "FAILED the plots of b.json: ValueError: odd rows" if code == 1 else "of 1 of 2 runs"
    ) in said
    text = (tmp_path / "report.md").read_text()
    assert "(a-price.png)" in text and "## A Machine (b)" in text
    assert "<svg><text>a</text></svg>" in (tmp_path / "report.html").read_text()


def test_the_page_has_the_reports_words_and_needs_nothing_else():
    markdown = "# A <title>\n\nUse `a|b` & go.\n\n* one\n* two\n\n![a price](a.png)\n\n"
    markdown += "<details><summary>9 rows</summary>\n\n| x | y |\n| --- | ---: |\n| a < b | 1.5 |\n\n</details>\n"
    drawing = '<?xml version="1.0"?><svg><metadata>x</metadata><g style="fill: #000000; stroke: #ffffff"/></svg>'
    text = page.html(markdown, {"a.png": drawing})
    for part in (
        "<title>A &lt;title&gt;</title>",
        "<p>Use <code>a|b</code> &amp; go.</p>",
        "<ul><li>one</li><li>two</li></ul>",
        '<figure role="img" aria-label="a price"><svg><g style="fill: var(--ink); stroke: var(--page)"/></svg></figure>',
        "<details><summary>9 rows</summary>",
        '<tr><td>a &lt; b</td><td class="right">1.5</td></tr>',
    ):
        assert part in text, part
    assert "prefers-color-scheme: dark" in text and "http" not in text and "src=" not in text
    assert "<figure" not in page.html(markdown, {}), "a plot that is not there"
