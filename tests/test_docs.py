"""The documents: their Python runs, their links and commands lead somewhere, and the tests they name exist."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import runpy
import shlex
from pathlib import Path
from statistics import median, quantiles

import pytest

from lora_kernels.__main__ import COMMANDS, parser_for
from lora_kernels.bench import report, results
from tests.processes import python

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    *(
        ROOT / f"{name}.md"
        for name in ("README", "CONTRIBUTING", "CHANGELOG", "SECURITY", "CODE_OF_CONDUCT")
    ),
    *sorted((ROOT / "docs").rglob("*.md")),
]


def blocks(document, language):
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", document.read_text(), re.M | re.S)


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
@pytest.mark.parametrize("document", [d for d in DOCUMENTS if blocks(d, "python")], ids=short)
def test_python_blocks_run(document, tmp_path):
    """Top to bottom in one process, as a reader would; a block that needs a package that is not here is left out."""
    optional = {"from peft": "peft", "import bitsandbytes": "bitsandbytes"}
    missing = [line for line, name in optional.items() if importlib.util.find_spec(name) is None]
    kept = [b for b in blocks(document, "python") if not any(line in b for line in missing)]
    code = "\n".join(kept)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LORA_KERNELS_CACHE": str(tmp_path)}
    # Each document says what its names stand for; the README's line of the formula names a layer without making one.
    prologue = "import torch\nlinear, x = torch.nn.Linear(8, 4), torch.randn(3, 8)\n"
    prologue += "A, B, alpha = torch.randn(8, 2), torch.randn(2, 4), 0.5\n"
    python("-c", prologue + code, cwd=tmp_path, env=environment, timeout=240)


@pytest.mark.parametrize("document", DOCUMENTS, ids=short)
def test_links_lead_somewhere(document):
    for path, heading in links(document):
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), f"{short(document)}: {path} does not exist"
        if heading and target.suffix == ".md":
            assert heading in headings(target), f"{short(document)}: {path} has no #{heading}"


def test_commands_that_documents_show_are_valid():
    """Every whole command line is one that the parser takes, and what `make` is to make is in the Makefile."""
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    found = 0
    for document in DOCUMENTS:
        for line in "\n".join(blocks(document, "sh") + blocks(document, "yaml")).splitlines():
            where = f"{short(document)}: {line}"
            if made := re.match(r"make ([a-z]+)", line):
                assert made[1] in targets, where
            if shown := re.search(r"-m lora_kernels (.*)", line):
                asked = shlex.split(shown[1], comments=True)
                assert asked[0] in COMMANDS, where
                if "..." not in line and "--help" not in asked:
                    parser_for(asked).parse_args(asked)
                    found += 1
    assert found > 5


RESULTS = ROOT / "benchmarks" / "results"


def words_of(name):
    return " ".join((ROOT / name).read_text().split())


def speeds(rows, other, **where):
    """(the other's time divided by ours, the problem) where both were measured; ours is what "auto" takes."""
    times = {}
    for row in rows:
        if row["suite"] == "linear" and all(row["problem"][k] == v for k, v in where.items()):
            case = (row["case"], row["mode"], *row["problem"].values())
            name = "auto" if row.get("auto") else row["contender"]
            times.setdefault(case, {})[name] = row["value"], row["problem"]
    return [
        (case[other][0] / case["auto"][0], case[other][1])
        for case in times.values()
        if other in case
    ]


def prices_of(preset):
    """The time of ours over each rival's, by case and mode."""
    times = {}
    for row in json.loads((RESULTS / f"cpu-zen3-{preset}.json").read_text())["rows"]:
        times.setdefault((row["case"], row["mode"]), {})[row["contender"]] = row["value"]
    return {
        case: {name: f"{of['ours'] / us:.2f}" for name, us in of.items()}
        for case, of in times.items()
    }


def test_the_pages_give_what_the_shared_presets_measured():
    pages = {
        "experts": ("docs/experts.md", ("peft, grouped_mm", "peft", "frozen")),
        "adapters": ("docs/experts.md", ("apart", "reference", "peft", "frozen")),
        "projections": ("docs/grouped.md", ("apart", "peft", "frozen")),
    }
    for preset, (page, rivals) in pages.items():
        words = words_of(page)
        for (_, mode), price in prices_of(preset).items():
            how = "forward and backward" if mode == "step" else "forward"
            row = " | ".join([how, *(price.get(name, "") for name in rivals)])
            assert f"| {row} |".replace("  ", " ") in words, (preset, row)
    block, dora = prices_of("experts"), prices_of("dora")
    tokens = [block[f"Qwen3-MoE, {n} tokens", "step"]["peft, grouped_mm"] for n in (16, 256)]
    rows = [dora[f"DoRA of 1024, {n}", "step"] for n in (16, 512)]
    for price, n in zip(rows, (16, 512), strict=True):
        assert f"| {n} | {price['peft']} | {price['lora']} | {price['peft, lora']} |" in words_of(
            "docs/dora.md"
        )
    assert (
        f"takes {tokens[0]} of PEFT's time by `grouped_mm`, its faster form, at 16 tokens and {tokens[1]} at 256, "
        f"and one of a [DoRA layer](docs/dora.md#what-it-costs) {rows[0]['peft']} at 16 rows and {rows[1]['peft']} at 512."
    ) in words_of("README.md")


def test_what_the_readme_says_of_the_grid_is_in_its_file():
    """Each number is that of the contender that the sentence names."""
    rows = json.loads((RESULTS / "amd-epyc-grid.json").read_text())["rows"]
    cases = sum(row["contender"] == "frozen" and row["suite"] == "linear" for row in rows)
    page = words_of("docs/performance/cpu.md")
    readme = words_of("README.md") + page

    def prices(dtype, wanted):
        return [
            row["to_floor"]
            for row in rows
            if row["mode"] == "step" and row["problem"]["dtype"] == dtype and wanted(row)
        ]

    types = ("float32", "bfloat16")
    ours = [prices(dtype, lambda row: row.get("auto")) for dtype in types]
    plain = [prices(dtype, lambda row: row["contender"] == "reference") for dtype in types]
    (narrow, half), (narrow_plain, half_plain) = (map(median, found) for found in (ours, plain))
    most, most_half = (quantiles(found, n=4, method="inclusive")[2] for found in ours)
    fast, fast_half = (median(s for s, _ in speeds(rows, "reference", dtype=d)) for d in types)
    slow = [each for each in speeds(rows, "reference") if each[0] * 1.05 < 1]
    eager = [each for each in speeds(rows, "ours[eager]") if each[0] * 1.05 < 1]

    def least(found):
        return f"{min((speed for speed, _ in found), default=1.0):.2f}"

    assert cases == len(speeds(rows, "reference")) == len(speeds(rows, "ours[eager]"))
    sentences = [
        f"forward and backward take {narrow:.2f} of the frozen layer's time in float32 and {half:.2f} in bfloat16, "
        f"where PyTorch's operations take {narrow_plain:.2f} and {half_plain:.2f}.",
        f"the picture's medians are of {len(ours[0])} cases each, "
        f"a quarter of them take more than {most:.2f} and {most_half:.2f}.",
        f"Ours is slower by more than 5 % than the reference in {len(slow)} of {cases} cases "
        f"(down to {least(slow)} of its speed).",
        f"A [grid of {cases} cases](../../benchmarks/results/amd-epyc-grid.json) has 1 to 2048 rows",
        f"The median speed is {fast:.2f} times the reference's in float32 and {fast_half:.2f} times in bfloat16.",
        f"than the reference in {len(slow)} cases (down to {least(slow)} of its speed), "
        f"and than our own `eager` backend in {len(eager)} (down to {least(eager)}):",
    ]
    addmm = speeds(rows, "addmm")
    behind_addmm = [each for each in addmm if each[0] * 1.05 < 1]
    sentences.append(
        f"It is slower than the addmm form in {len(behind_addmm)} cases (down to {least(behind_addmm)})."
        if addmm
        else "The addmm form was not part of this grid."
    )
    for sentence in sentences:
        assert sentence in readme

    parted = lambda p: (p["M"], p["K"], p["N"], p["dtype"]) == (512, 1536, 384, "bfloat16")  # noqa: E731
    found = [speed for speed, problem in slow if parted(problem)]
    for sentence in (
        f"'s {cases} cases",
        f"two threads, {len(slow)} are slower than the reference by more than 5 %",
        f"**bfloat16 of 512, 1536, 384** ({len(found)} cases, a step at each rank): "
        f"{min(found):.2f} to {max(found):.2f} of the reference's speed.",
    ):
        assert sentence in page
    assert len(found) == len(slow)


def test_the_table_against_the_others_is_of_the_report():
    """Every cell of the table, and what is said of bfloat16 and of MKL below it."""
    run = json.loads((RESULTS / "amd-epyc-laptop.json").read_text())
    page = words_of("docs/performance/cpu.md")
    names = ("reference", "compiled", "addmm", "peft", "ours[cpu]")
    found, halves = {}, {}
    for row in run["rows"]:
        if row["suite"] == "linear" and row["mode"] == "step":
            problem = row["problem"]
            sizes = ", ".join(str(problem[n]) for n in "MKNR")
            kept = found if problem["dtype"] == "float32" else halves
            kept.setdefault(sizes, {})[row["contender"]] = f"{row['to_floor']:.2f}"
        elif row["suite"] == "training":
            title = {"block": "a transformer block", "minilm": "the demo's MiniLM"}
            case = f"{title[row['case'].split()[0]]}, training step"
            name = "ours[cpu]" if row["contender"] == "ours" else row["contender"]
            found.setdefault(case, {})[name] = f"{row['to_floor']:.2f}"
    assert "| M, K, N, R | reference | compiled | addmm | PEFT | ours (`cpu`) |" in page
    assert len(found) == 11
    for case, prices in found.items():
        cells = " | ".join(prices.get(name, "") for name in names)
        assert " ".join(f"| {case} | {cells} |".split()) in page, case
    ours, plain = (
        sorted(each[name] for each in halves.values()) for name in ("ours[cpu]", "reference")
    )
    assert (
        f"of these take {ours[0]} to {ours[-1]} of the frozen layer's time, and the reference {plain[0]} to {plain[-1]}."
        in page
    )
    rates = [run["ceilings"][f"float32_{who}_gflops"] for who in ("aten", "ours")]
    alone = json.loads((RESULTS / "cpu-zen4-one-thread.json").read_text())["rows"]
    us = {
        row["contender"]: row["value"]
        for row in alone
        if (row["case"], row["mode"]) == ("1024x2048x2048", "forward")
        and row["problem"]["dtype"] == "float32"
    }
    one = f"{100 * us['ours[cpu]'] / us['frozen']:.0f} %"
    two = f"{100 * rates[0] / rates[1]:.0f} %"
    assert f"with two threads MKL reached {two} of the rate" in page
    assert f"with one thread {one}." in page
    model = found["the demo's MiniLM, training step"]
    assert (
        f"a training step of the demo's MiniLM takes {model['ours[cpu]']} of the frozen model's time, "
        f"with PyTorch's operations {model['reference']}." in words_of("README.md")
    )
    assert f"MKL makes {rates[0]:.0f} and these kernels {rates[1]:.0f}: {two} (" in page
    assert f"MKL reaches {one} of their rate" in page
    peaks = {}
    for file in ("amd-epyc-laptop.json", "cpu-zen4.json"):
        for row in json.loads((RESULTS / file).read_text())["rows"]:
            if row["suite"] == "memory" and row["mode"] == "peak":
                peaks.setdefault(row["contender"], []).append(row["to_floor"])
    ours, plain = (f"{max(peaks[name]):.2f}" for name in ("ours[cpu]", "reference"))
    assert f"at most {ours} times the frozen layer's, the reference's up to {plain}." in page


def test_the_table_of_a_gpu_is_of_its_run():
    """Every cell, and the largest error of the cost model there."""
    run = results.load(RESULTS / "nvidia-h200.json")
    page = words_of("docs/performance/gpu-measured.md")
    names = ("loop", "two_kernel", "ours[eager]", "addmm", "reference")
    cells = {}
    for row in run.rows:
        sizes = ", ".join(str(row.problem[n]) for n in "MKNR")
        mode = {"forward": "forward", "step": "with backward"}[row.mode]
        price = f"{row.value:.0f} µs" if row.contender == "frozen" else f"{row.to_floor:.2f}"
        cells.setdefault((sizes, mode), {})[row.contender] = price
    assert len(cells) == 6
    for case, found in cells.items():
        line = " | ".join([*case, *(found.get(name, "") for name in ("frozen", *names))])
        assert " ".join(f"| {line} |".split()) in page, line
    off = max(abs(us / row.value - 1) for row, us in report.predictions(run))
    assert f"off by at most {100 * off:.0f} % in each of these rows" in page
    few = results.load(RESULTS / "nvidia-h200-few-rows.json").rows
    for name in ("ours[triton]", "reference", "ours[cuda]"):
        one, sixteen = (f"{row.to_floor:.2f}" for row in few if row.contender == name)
        assert re.search(rf"{one} (of the frozen layer's time for 1 row )?and {sixteen}", page), (
            name
        )


def test_the_first_screen():
    """A sentence with a number, a picture of it, a program and a PEFT model: before the first heading of the README."""
    first = (ROOT / "README.md").read_text().split("\n## ")[0]
    assert re.match(r"# lora_kernels\n\n[^\n]+ measured on a CPU", first)
    assert first.index("](docs/pictures/price.svg)") < first.index("```python")
    program = blocks(ROOT / "README.md", "python")[0].strip().splitlines()
    at = next(i for i, line in enumerate(program) if line.startswith("replace_linear_with_lora"))
    assert len(program) - at == 5, "five lines for a model that is there"
    assert "accelerate(peft_model)" in first and first.count("\n") < 45


def test_measured_and_predicted_stay_apart():
    """In the README's words on speed each paragraph is one or the other; of GPUs the H200 alone has a measured number."""
    section = (ROOT / "README.md").read_text().split("\n## How fast\n")[1].split("\n## ")[0]
    cpu, measured, predicted = section.strip().split("\n\n")
    assert cpu.startswith("**Measured.** On a 2-core AMD EPYC")
    assert measured.startswith("On an NVIDIA H200") and "redict" not in cpu + measured
    assert predicted.startswith("**Predicted, not measured.** Other GPUs have not been timed")
    for gpu in ("H100", "A100", "B200", "RTX"):
        assert gpu not in cpu + measured
    rows = results.load(RESULTS / "nvidia-h200.json").rows
    for name in ("ours[triton]", "reference"):
        for mode in ("forward", "step"):
            found = [r.to_floor for r in rows if (r.contender, r.mode) == (name, mode)]
            assert f"{min(found):.2f} to {max(found):.2f}" in measured, (name, mode)
    assert not re.search(r"\d+\.\d", predicted)


def test_the_pages_of_predictions_are_what_the_cost_model_says():
    made = runpy.run_path(str(ROOT / "benchmarks" / "predicted.py"))
    folder = ROOT / "docs" / "performance"
    assert (folder / "gpu-predicted.md").read_text().startswith(made["page"](with_code=False))
    assert (folder / "cuda-decode.md").read_text() == made["decode_page"]()


def test_the_pictures_are_those_that_the_results_draw():
    """`python docs/pictures/draw.py` was run after the last change of it and of its result file."""
    pictures = runpy.run_path(str(ROOT / "docs/pictures/draw.py"))["PICTURES"]
    shown = {
        re.sub(".*/", "", path) for d in DOCUMENTS for path, _ in links(d) if path.endswith("svg")
    }
    assert shown == set(pictures)
    for name, drawn in pictures.items():
        assert (ROOT / "docs/pictures" / name).read_text(encoding="utf-8") == drawn(), name


def test_answers_quote_what_info_prints():
    """Ten questions and more; what an answer says that `info` prints is in its own words."""
    text = (ROOT / "docs/faq.md").read_text()
    answers = text.split("\n## ")[1:]
    assert len(answers) >= 10
    printed = "".join(
        (ROOT / f"lora_kernels/{file}.py").read_text()
        for file in ("cli/info", "backends/cpu", "tuning/targets")
    )
    for answer in answers:
        title, _, body = answer.partition("\n\n")
        assert title.endswith("?") and body.startswith("`info` "), title
    for words in (
        "NOT TESTED: ",
        "its extension was built with torch ",
        "build it beside this torch (docs/installing.md)",
        "its extension is for ",
        "compilers: ",
        "a call that names no backend takes ",
        "tiles_of",
        "tiles_kib",
        "shared_kib",
    ):
        assert words in printed and words.removesuffix(" (docs/installing.md)") in text, words


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
