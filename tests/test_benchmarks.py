"""The benchmarks measure what they say: clocks, contenders, ratios, comparison, models, report and plots."""

from __future__ import annotations

import contextlib
import json
import os
import random
import statistics as stdlib
import subprocess
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from lora_kernels.__main__ import main
from lora_kernels.bench import (
    check,
    clock,
    compare,
    contenders,
    cost_model,
    linear,
    machine,
    memory,
    presets,
    report,
    results,
    statistics,
    training,
)
from lora_kernels.bench import run as runner
from lora_kernels.bench.results import Results, Row
from lora_kernels.problem import Problem

ROOT = Path(__file__).parent.parent
PROBLEM = Problem(33, 20, 48, 5, "float32", "float32", bias=True)
MIXED = Problem(16, 40, 24, 3, "bfloat16", "float32")
RATES = {
    "copy_gbs": 10.0,
    "cache_gbs": 100.0,
    "call_us": 1.0,
    "float32_gflops": 100.0,
    "float32_aten_gflops": 100.0,
    "float32_ours_gflops": 80.0,
}
QUICK = linear.Effort(0.01, (3, 5))
ON_CPU = ("frozen", "reference", "addmm", "expand_first", "peft", "ours[eager]", "ours[cpu]")


@pytest.fixture(autouse=True)
def _one_thread():
    """What is tested is not how fast; and threads wait for each other where other tests run beside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def made_row(contender, value, to_floor, **more):
    spread = {"to_floor_low": round(0.97 * to_floor, 4), "to_floor_high": round(1.03 * to_floor, 4)}
    about = {"suite": "linear", "case": "a case", "mode": "step", "problem": asdict(PROBLEM)}
    about |= {
        "unit": "us",
        "low": value,
        "high": value,
        "rounds": 9,
        "to_reference": to_floor / 2,
    }
    return Row(contender=contender, value=value, to_floor=to_floor, **{**about, **spread, **more})


def made_results(*rows):
    facts = {"device": "cpu", "name": "A Machine", "threads": 2}
    return Results(facts, {"torch": "9"}, "abc", "2026-11-24", "bench", RATES, list(rows))


class DriftingClock:
    """Every sample takes longer than the one before: a machine that gets slower."""

    def __init__(self):
        self.now, self.order = 1.0, []

    def time_us(self, call, inner):
        self.now *= 1.02
        self.order.append(call)
        return call() * self.now


def test_calls_take_turns_so_that_drift_cancels():
    fake, calls = DriftingClock(), {"a": lambda: 100.0, "b": lambda: 200.0, "c": lambda: 100.0}
    taken = clock.interleaved(calls, fake, seconds=0.0, rounds=(24, 24))
    assert {len(samples) for samples in taken.values()} == {24}
    assert taken["a"][-1] > 3 * taken["a"][0]
    assert statistics.ratios(taken["b"], taken["a"]).median == pytest.approx(2.0, rel=0.03)
    assert statistics.ratios(taken["c"], taken["a"]).median == pytest.approx(1.0, rel=0.03)
    rounds = fake.order[3:]  # the first three found out how often to repeat
    firsts = [rounds[start] for start in range(0, len(rounds), 3)]
    assert set(firsts) == set(calls.values())


def test_the_host_clock_counts_one_repetition():
    calls = []
    us = clock.HostClock(lambda: calls.append("wait")).time_us(lambda: calls.append("call"), 5)
    assert calls == ["call"] * 5 + ["wait"] and 0 < us < 1e5


def test_median_and_quartiles():
    samples = [random.Random(0).random() for _ in range(1)] + [float(i * i % 17) for i in range(30)]
    found = statistics.summary(samples)
    low, middle, high = stdlib.quantiles(samples, n=4, method="inclusive")
    assert (found.low, found.median, found.high) == pytest.approx((low, middle, high))
    assert statistics.summary([3.0]) == statistics.Summary(3.0, 3.0, 3.0)


class FakeCuda:
    """torch.cuda as far as the clock uses it; every call costs one millisecond of device time."""

    def __init__(self):
        self.ms, self.log = 0.0, []

    def work(self):
        self.ms += 1.0
        self.log.append("call")

    def Event(self, enable_timing):
        cuda = self

        class Event:
            def record(self):
                self.at = cuda.ms

            def synchronize(self):
                cuda.log.append("wait")

            def elapsed_time(self, end):
                return end.at - self.at

        return Event()

    def Stream(self):
        return self

    current_stream = Stream

    def wait_stream(self, stream):
        self.log.append("order")

    def stream(self, stream):
        return contextlib.nullcontext()

    def CUDAGraph(self):
        cuda = self

        class Graph:
            def replay(self):
                cuda.ms += 0.25
                cuda.log.append("replay")

        return Graph()

    @contextlib.contextmanager
    def graph(self, graph):
        self.log.append("capture")
        yield


def test_warm_events_enclose_all_repetitions():
    cuda = FakeCuda()
    assert clock.CudaClock(cuda=cuda).time_us(cuda.work, 4) == pytest.approx(1000.0)
    assert cuda.log == ["call"] * 4 + ["wait"]


def test_cold_overwrites_l2_before_every_repetition_and_does_not_count_it(monkeypatch):
    cuda = FakeCuda()

    class Flush:
        def zero_(self):
            cuda.ms += 50.0
            cuda.log.append("flush")

    made = []
    monkeypatch.setattr(torch, "empty", lambda *a, **k: made.append((a, k)) or Flush())
    assert clock.CudaClock(cold=True, cuda=cuda).time_us(cuda.work, 3) == pytest.approx(1000.0)
    assert cuda.log == ["flush", "call", "wait"] * 3
    assert made == [((clock.FLUSH_BYTES,), {"dtype": torch.int8, "device": "cuda"})]


def test_a_graph_is_captured_once_and_replayed():
    cuda = FakeCuda()
    timer = clock.CudaClock(graph=True, cuda=cuda)
    assert [timer.time_us(cuda.work, 4) for _ in range(2)] == pytest.approx([250.0, 250.0])
    assert cuda.log.count("capture") == 1 and cuda.log.count("replay") == 8
    assert cuda.log.index("capture") > cuda.log.index("call"), "nothing ran before the capture"


def test_cold_and_graph_are_refused_on_a_cpu():
    with pytest.raises(ValueError, match="cuda only"):
        clock.clock_for("cpu", cold=True)


@pytest.mark.parametrize("problem", [PROBLEM, MIXED], ids=str)
@pytest.mark.parametrize("name", ON_CPU[1:])
def test_contenders_compute_the_formula(name, problem):
    if name == "peft":
        pytest.importorskip("peft")
    if reason := name.startswith("ours") and contenders.left_out(name, problem):
        pytest.skip(reason)
    layer, (x, dy) = contenders.make_layer(problem), contenders.make_input(problem)
    if name in ("addmm", "expand_first") and problem is MIXED:
        pytest.skip("these forms round float32 adapters to the base's dtype: another computation")
    oracle = check.Oracle(layer, x, dy)
    assert 0 < oracle.check(name, contenders.build(name, layer)) < 0.1


def test_two_kernels_are_formulas_over_the_forced_triton_algorithm(monkeypatch):
    asked = []
    planned = contenders.plan.explain(PROBLEM, "eager")
    monkeypatch.setattr(contenders.plan, "explain", lambda *facts: asked.append(facts) or planned)
    layer, (x, dy) = contenders.make_layer(PROBLEM), contenders.make_input(PROBLEM)
    check.Oracle(layer, x, dy).check("two_kernel", contenders.build("two_kernel", layer))
    assert asked and {facts[1:] for facts in asked} == {("triton", "two_kernel")}
    assert all(replace(facts[0], bias=PROBLEM.bias) == PROBLEM for facts in asked)


def test_names_are_checked():
    with pytest.raises(ValueError, match="contender must be one of"):
        contenders.build("fastest", contenders.make_layer(PROBLEM))
    assert "cuda only" in contenders.left_out("two_kernel", PROBLEM)
    assert "cuda tensors only" in contenders.left_out("ours[triton]", PROBLEM)


class WrongIn(torch.autograd.Function):
    """Identity with an error of one in a thousand, in the value or in the gradient."""

    @staticmethod
    def forward(ctx, t, where):
        ctx.where = where
        return t * 1.001 if where == "y" else t.clone()

    @staticmethod
    def backward(ctx, g):
        return (g * 1.001 if ctx.where == "gradients" else g), None


@pytest.mark.parametrize(("where", "told"), [("y", "y is off"), ("gradients", "dx is off")])
def test_a_wrong_contender_is_refused(where, told, monkeypatch):
    layer, (x, dy) = contenders.make_layer(PROBLEM), contenders.make_input(PROBLEM)
    wrong = contenders.Built(
        lambda x: WrongIn.apply(contenders.reference(x, layer), where), (layer.A, layer.B)
    )
    with pytest.raises(check.Wrong, match=told):
        check.Oracle(layer, x, dy).check("it", wrong)
    build, case, notes = contenders.build, linear.Case("a", PROBLEM), {}
    monkeypatch.setattr(
        contenders, "build", lambda n, at: wrong if n in ("addmm", "ours[eager]") else build(n, at)
    )
    rows = linear.measure(case, ("addmm",), QUICK, RATES, notes)
    assert told in notes["addmm"] and {row.contender for row in rows} == {"frozen", "reference"}
    with pytest.raises(check.Wrong):
        linear.measure(case, ("ours[eager]",), QUICK, RATES, {})
    failed = {}
    rows = linear.measure(case, ("ours[eager]",), QUICK, RATES, {}, failed)
    assert failed.popitem()[1].startswith("ours[eager]: ") and not failed
    assert {row.contender for row in rows} == {"frozen", "reference"}


@pytest.mark.parametrize("mode", linear.MODES)
def test_a_row_says_what_was_measured(mode):
    case = linear.Case("a case", PROBLEM, mode)
    rows = linear.measure(case, ("ours[eager]",), QUICK, RATES, {})
    floor, reference, ours = rows
    assert [row.contender for row in rows] == ["frozen", "reference", "ours[eager]"]
    assert floor.to_floor == 1.0 and reference.to_reference == 1.0
    assert ours.error < 1e-5 and ours.as_problem() == PROBLEM and ours.rounds >= 3
    assert ours.low <= ours.value <= ours.high
    flops, moved = cost_model.work(PROBLEM, mode)
    assert ours.ceiling_share == pytest.approx(max(flops / 1e5, moved / 1e4) / ours.value)


def test_work_of_a_step_counts_every_product():
    M, N, K, R = PROBLEM.M, PROBLEM.N, PROBLEM.K, PROBLEM.R
    products = [(M, K, N), (M, K, R), (M, R, N)]  # forward
    assert cost_model.work(PROBLEM, "forward")[0] == sum(2 * a * b * c for a, b, c in products)
    products += [(M, N, K), (M, N, R), (M, R, K), (K, M, R), (R, M, N)]  # dx, q, q·At, dA, dB
    assert cost_model.work(PROBLEM, "step")[0] == sum(2 * a * b * c for a, b, c in products)


def test_the_cpu_model_orders_the_forms_and_knows_the_limits():
    big = replace(PROBLEM, M=2048, N=2048, K=2048, R=16)
    times = [
        cost_model.predict_cpu_us(name, big, "forward", RATES)
        for name in ("frozen", "ours[eager]", "addmm", "reference")
    ]
    assert times == sorted(times) and len(set(times)) == 4
    assert times[0] == pytest.approx(2 * 2048**3 / 1e5 + 1.0)
    narrow = replace(big, M=1)
    moved = narrow.frozen_bytes / 1e4
    assert cost_model.predict_cpu_us("frozen", narrow, "forward", RATES) == pytest.approx(moved + 1)
    assert cost_model.predict_cpu_us("peft", big, "step", RATES) is None
    assert cost_model.predict_cpu_us("frozen", MIXED, "step", RATES) is None


def test_the_gpu_presets_are_predicted_before_they_are_measured():
    """Every GPU case up to its launch: problems, predictions and choices need no device."""
    cases = presets.cases("gpu", "cuda")
    assert any(case.cold for case in cases) and any(case.graph for case in cases)
    for case in cases:
        frozen = cost_model.predict_gpu_us("frozen", case.problem, case.mode, "sm_90")
        ours = cost_model.predict_gpu_us("ours[triton]", case.problem, case.mode, "sm_90")
        assert 0 < frozen < ours < 20 * frozen, case
    assert cost_model.predict_gpu_us("frozen", case.problem, "step", "sm_70") is None


@pytest.mark.parametrize("preset", [name for name in presets.PRESETS if name != "gpu"])
def test_presets_name_each_measurement_once(preset):
    cases = presets.cases(preset, "cpu")
    assert cases and len(set(cases)) == len(cases)
    assert {case.mode for case in cases} <= set(linear.MODES)


def test_growth_moves_one_size_at_a_time():
    centre, *others = presets.growth_cases("cpu", "float32")
    for case in others:
        differ = [n for n in "MNKR" if getattr(case.problem, n) != getattr(centre.problem, n)]
        assert differ == [case.label]
    assert {case.label for case in others} == set("MNKR")


def test_saved_bytes_are_x_and_s():
    layer, (x, _) = contenders.make_layer(PROBLEM), contenders.make_input(PROBLEM)
    M, K, R = PROBLEM.M, PROBLEM.K, PROBLEM.R
    assert memory.saved_bytes(contenders.build("frozen", layer), layer, x) == 0
    assert memory.saved_bytes(contenders.build("addmm", layer), layer, x) == 4 * M * K
    ours = memory.saved_bytes(contenders.build("ours[eager]", layer), layer, x)
    assert ours == 4 * M * (K + R)


def test_peak_is_of_what_lives_at_once():
    def step():
        first = torch.ones(1 << 16)  # 256 KiB
        second = first + 1  # 512 KiB live
        del first
        return second + 1  # 512 KiB again

    live = 2 * 4 * (1 << 16)
    assert live <= memory.peak_bytes(step, "cpu") < live + 1024  # and a few scalars


def test_results_survive_a_file(tmp_path):
    kept = made_results(made_row("ours[cpu]", 1.25, 1.1, auto=True), made_row("frozen", 1.0, 1.0))
    kept.left_out["peft"] = "not here"
    file = results.save(kept, tmp_path / "new" / "a.json")
    assert results.load(file) == kept
    flat = next(kept.flat())
    needed = {"name", "threads", "torch", "sha", "date", "problem", "to_floor", "ceiling_share"}
    assert needed <= set(flat)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 2}', '{"schema": 1, "rows": [{}]}'])
def test_other_files_are_no_results(tmp_path, text):
    file = tmp_path / "a.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"a\.json must hold benchmark results"):
        results.load(file)
    (tmp_path / "b.json").write_text('{"schema": 7, "rows": []}')
    if "rows" not in text:
        with pytest.raises(FileNotFoundError, match="no benchmark results"):
            results.find([tmp_path])


def compared(before, *looks, fail_over=1.10):
    """The verdict on one row, and how many further looks it took."""
    asked = list(looks[1:])
    base, now = made_results(before), made_results(*([looks[0]] if looks else []))
    (verdict,) = compare.compare(base, now, fail_over, lambda row: asked.pop(0))
    return verdict, len(looks) - 1 - len(asked)


def test_slower_in_every_look_is_slower():
    before, slow = made_row("ours[cpu]", 1.0, 1.0), made_row("ours[cpu]", 1.3, 1.3)
    verdict, further = compared(before, slow, slow, slow)
    assert verdict.slower and further == 2 and verdict.change == pytest.approx(1.3)
    assert str(verdict).startswith("SLOWER") and "3 looks" in str(verdict)


def test_a_slow_look_alone_is_a_mood():
    before, slow = made_row("ours[cpu]", 1.0, 1.0), made_row("ours[cpu]", 1.3, 1.3)
    verdict, further = compared(before, slow, before, slow)
    assert not verdict.slower and further == 1


def test_spreads_that_overlap_are_noise():
    before = made_row("ours[cpu]", 1.0, 1.0, to_floor_high=1.2)
    noisy = made_row("ours[cpu]", 1.3, 1.3, to_floor_low=1.1)
    assert not compared(before, noisy)[0].slower
    assert compared(before, *[replace(noisy, to_floor_low=1.25)] * 3)[0].slower


def test_within_the_factor_or_faster_is_fine():
    before = made_row("ours[cpu]", 1.0, 1.0, to_floor_high=1.0)
    assert not compared(before, made_row("ours[cpu]", 1.09, 1.09))[0].slower
    assert not compared(before, made_row("ours[cpu]", 0.5, 0.5))[0].slower
    assert compared(before, *[made_row("ours[cpu]", 1.09, 1.09)] * 3, fail_over=1.05)[0].slower


def test_what_vanished_is_a_failure_and_rivals_are_not_compared():
    verdict, _ = compared(made_row("ours[cpu]", 1.0, 1.0))
    assert verdict.slower and str(verdict).startswith("MISSING")
    rivals = made_results(made_row("peft", 1.0, 1.0))
    assert compare.compare(rivals, made_results(), 1.1, lambda row: None) == []
    with pytest.raises(ValueError, match="holds none"):
        compare.cases_of(rivals)
    with pytest.raises(ValueError, match="more than 1"):
        compare.compare(rivals, rivals, 1.0, lambda row: None)


def test_a_baselines_cases_are_those_that_were_measured():
    case = linear.Case("a case", PROBLEM, "forward", "growth")
    baseline = made_results(*linear.measure(case, ("ours[eager]",), QUICK, RATES, {}))
    assert compare.cases_of(baseline) == [case]
    assert compare.names_of(baseline) == ("ours[eager]",)


def a_run():
    """Results with a win, a loss and a growth curve."""
    rows = [
        made_row("frozen", 100.0, 1.0),
        made_row("reference", 150.0, 1.5),
        made_row("addmm", 120.0, 1.2),
        made_row("ours[cpu]", 110.0, 1.1, auto=True, ceiling_share=0.8),
    ]
    lost = [replace(row, case="lost") for row in rows[:3]]
    lost.append(made_row("ours[cpu]", 140.0, 1.4, auto=True, case="lost"))
    growing = [made_row("frozen", 90.0, 1.0, suite="growth", case="centre")]
    for letter in "MNKR":
        sizes = {**asdict(PROBLEM), letter: 77}
        growing.append(made_row("frozen", 99, 1.0, suite="growth", case=letter, problem=sizes))
    return made_results(*rows, *lost, *growing)


def test_the_report_shows_wins_and_losses():
    ours, best = report.losses(a_run())[0]
    assert (ours.case, best.contender) == ("lost", "addmm") and len(report.losses(a_run())) == 1
    text = report.markdown({"a": (a_run(), [Path("a-price.png")])})
    assert "| a case | 33, 48, 20, 5 | 100 µs | 1.50× | 1.20× | 1.10×* | 80 % |" in text
    assert "| lost | 33, 48, 20, 5 | step | ours[cpu] 140 µs | addmm 120 µs | 1.17 |" in text
    assert "![a price](a-price.png)" in text and "commit abc" in text and "M = 77" in text
    assert report.losses(made_results(*a_run().rows[:4])) == []


def test_predictions_stand_beside_measurements():
    found = {(r.suite, r.case, r.contender): us for r, us in report.predictions(a_run())}
    assert found["linear", "a case", "frozen"] == cost_model.predict_cpu_us(
        "frozen", PROBLEM, "step", RATES
    )
    assert ("linear", "a case", "peft") not in found and len(found) == 13
    text = report.markdown({"a": (a_run(), [])})
    assert "Predicted against measured" in text and "fitted to none of these rows" in text


def test_plots_show_the_rows():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    import matplotlib

    from lora_kernels.bench import plots

    matplotlib.use("Agg")
    bars = plots.price(a_run(), pyplot)
    heights = sorted(patch.get_height() for patch in bars.axes[0].patches)
    assert heights == pytest.approx([1.1, 1.2, 1.2, 1.4, 1.5, 1.5])
    lines = plots.growth(a_run(), pyplot)
    assert [axes.get_xlabel() for axes in lines.axes[:4]] == list("MKNR")
    xs, ys = lines.axes[0].lines[0].get_data()
    assert list(xs) == [33, 77] and list(ys) == pytest.approx([0.09, 0.099])
    roof = plots.roofline(a_run(), pyplot).axes[0].lines[0].get_data()
    assert max(roof[1]) == RATES["float32_gflops"]
    assert plots.price(made_results(), pyplot) is None
    pyplot.close("all")


def test_plots_are_files(tmp_path):
    pytest.importorskip("matplotlib")
    from lora_kernels.bench import plots

    written = plots.draw(a_run(), tmp_path, "a", "png")
    assert [file.name for file in written] == ["a-price.png", "a-growth.png", "a-roofline.png"]
    assert all(file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for file in written)


@pytest.fixture
def small_block(monkeypatch):
    for name, value in {"WIDTH": 32, "HEADS": 2, "LENGTH": 8, "BATCH": 2}.items():
        monkeypatch.setattr(training, name, value)


def test_the_blocks_losses_are_the_references(small_block):
    names = ("addmm", "ours", "frozen")
    rows = training.measure("block", "cpu", QUICK, {}, names)
    assert {row.contender for row in rows} == {"reference", *names}
    assert all(row.to_floor and row.to_reference for row in rows)


@pytest.mark.parametrize("wrong", ["addmm", "ours"])
def test_a_block_that_learns_something_else_is_not_timed(small_block, monkeypatch, wrong):
    """A rival is left out with the reason; one of ours ends the run."""
    start = training.block_step
    step = lambda name, *a: lambda: start(name, *a)() * (1.01 if name == wrong else 1.0)  # noqa: E731
    monkeypatch.setitem(training.STEPS, "block", step)
    if wrong == "ours":
        with pytest.raises(RuntimeError, match="block: ours: losses differ"):
            training.measure("block", "cpu", QUICK, {}, ("addmm", "ours"))
        return
    left_out: dict[str, str] = {}
    rows = training.measure("block", "cpu", QUICK, left_out, ("addmm", "ours"))
    assert "addmm" not in {row.contender for row in rows}
    assert "losses differ" in left_out["block: addmm"]


@pytest.fixture
def fast_machine(monkeypatch):
    monkeypatch.setattr(machine, "ceilings", lambda device, dtypes, seconds=0.3: dict(RATES))


BENCH = ["bench", "--shape", "24", "32", "40", "4", "--seconds", "0.01", "--rounds", "3"]
BENCH += ["--contender", "ours", "--contender", "addmm", "--device", "cpu", "--mode", "step"]


def test_bench_report_and_compare(tmp_path, capsys, fast_machine):
    assert main([*BENCH, "--output", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "ours[eager]" in shown and "x frozen" in shown
    (file,) = tmp_path.glob("*-shapes.json")
    found = results.load(file)
    assert found.machine["threads"] == torch.get_num_threads() and found.versions["torch"]
    assert {"frozen", "reference", "addmm", "ours[eager]"} <= {r.contender for r in found.rows}
    assert main(["report", str(tmp_path), "--no-plots"]) == 0
    assert "24, 32, 40, 4" in (tmp_path / "report.md").read_text()

    # A baseline that was far slower finds nothing, one that was far faster finds everything slower.
    times = [(1e4, 0), (1e-4, 1)]
    for factor, code in times:
        changed = replace_ratios(found, factor)
        baseline = results.save(changed, tmp_path / "baseline" / f"{code}.json")
        arguments = ["bench", "--compare", str(baseline), "--seconds", "0.01", "--rounds", "3"]
        assert main(arguments) == code, capsys.readouterr().out
        out = capsys.readouterr().out
        assert ("SLOWER" in out) == bool(code) and "ours[eager]" in out and "addmm" not in out


def replace_ratios(found, factor):
    names = ("to_floor", "to_floor_low", "to_floor_high")
    rows = [replace(r, **{n: factor * getattr(r, n) for n in names}) for r in found.rows]
    return replace(found, rows=rows)


def test_a_wrong_backend_fails_the_run_and_the_rest_is_kept(
    tmp_path, capsys, fast_machine, monkeypatch
):
    eager = type(contenders.plan.explain(PROBLEM, "eager").products)
    right = eager.shrink
    monkeypatch.setattr(eager, "shrink", lambda *a, **k: right(*a, **k) * 1.01)
    assert main([*BENCH, "--output", str(tmp_path / "a.json")]) == 1
    assert "FAILED ours[eager], step of M=24" in capsys.readouterr().err
    found = results.load(tmp_path / "a.json")
    assert len(found.failed) == 1
    names = {row.contender for row in found.rows}
    assert "ours[eager]" not in names and {"frozen", "addmm"} <= names
    assert "### Failed" in report.markdown({"a": (found, [])})


def test_a_contender_that_cannot_be_timed_is_left_out(monkeypatch):
    """As one that a CUDA graph cannot capture: right when it is checked, and an error when the clock calls it."""
    build, calls = contenders.build, []

    def checked_once(x, right):
        calls.append(x)
        if len(calls) > 1:
            raise RuntimeError("operation not permitted when stream is capturing")
        return right(x)

    def broken(name, layer):
        built = build(name, layer)
        if name != "addmm":
            return built
        return replace(built, function=lambda x: checked_once(x, built.function))

    monkeypatch.setattr(contenders, "build", broken)
    notes = {}
    rows = linear.measure(linear.Case("a case", PROBLEM), ("addmm",), QUICK, RATES, notes)
    assert {row.contender for row in rows} == {"frozen", "reference"}
    assert notes == {"addmm": "operation not permitted when stream is capturing"}


def test_a_suite_that_fails_does_not_stop_the_rest(monkeypatch, fast_machine):
    def training_measure(which, device, effort, left_out, dtype):
        raise RuntimeError(f"{which} is wrong\nmore")

    monkeypatch.setattr(training, "measure", training_measure)
    order = runner.Order("cpu", [], ("training", "overhead"), effort=QUICK)
    kept = []
    found = runner.run(order, keep=lambda results: kept.append(len(results.rows)))
    assert found.failed == {f"training: {m}, float32": f"{m} is wrong" for m in training.MODELS}
    assert found.of(suite="overhead") and kept[-1] == len(found.rows)


def test_training_without_the_demos_packages_is_left_out(monkeypatch):
    monkeypatch.setattr(training.demo, "missing_packages", lambda: ["a-package"])
    notes = {}
    assert training.measure("minilm", "cpu", QUICK, notes) == []
    assert notes["minilm: ours"] == notes["minilm: reference"] == "needs a-package"


def test_explain_predicts_from_measured_rates(capsys, fast_machine):
    command = ["explain", "--shape", "64", "96", "128", "8", "--device", "cpu", "--json"]
    assert main([*command, "--backend", "eager", "--measure"]) == 0
    told = json.loads(capsys.readouterr().out)["forward and backward on this CPU"]
    problem = Problem(64, 128, 96, 8, "float32", "float32", "cpu", bias=True)
    us = cost_model.predict_cpu_us("ours[eager]", problem, "step", RATES)
    assert told["ours[eager]"].startswith(f"predicted {us:.1f} us") and "roofline" in told
    assert main([*command, "--measure", "--dtype", "float64"]) == 2


def test_bench_as_json(capsys, fast_machine):
    assert main([*BENCH, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ceilings"] == RATES and told["comparison"] == []
    assert {row["problem"]["K"] for row in told["rows"]} == {32}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["bench", "--shape", "0", "1", "1", "1"], "--shape must be four positive numbers"),
        (["bench", "--preset", "quick", "--rounds", "1"], "--rounds at least 3"),
        (["bench", "--preset", "quick", "--cold", "--device", "cpu"], "cuda only"),
        (["bench", "--compare", "nowhere.json"], "nowhere.json does not exist"),
        (["bench", "--compare", "nowhere.json", "--preset", "quick"], "no preset"),
        (["report", "nowhere"], "nowhere does not exist"),
    ],
    ids=lambda value: " ".join(value[:4]) if isinstance(value, list) else "",
)
def test_bad_input_ends_with_a_sentence(arguments, told, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert told in error and "Traceback" not in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("arguments", [["--device", "cuda"], ["--preset", "gpu"]], ids=str)
def test_a_gpu_that_is_not_there(arguments, capsys):
    assert main(["bench", *arguments]) == 2
    assert "GPU" in capsys.readouterr().err


def run_gpu_script(python, tmp_path, *steps, limit=600):
    return subprocess.run(
        ["sh", str(ROOT / "benchmarks" / "gpu.sh"), *steps],
        capture_output=True,
        text=True,
        timeout=120,
        env={
            **os.environ,
            "PYTHON": str(python),
            "RESULTS": str(tmp_path),
            "LOG": f"{tmp_path}/log",
            "LIMIT": str(limit),
        },
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_script_without_a_gpu(tmp_path):
    import sys

    done = run_gpu_script(sys.executable, tmp_path)
    assert done.returncode == 2 and "finds no GPU" in done.stderr and done.stdout == ""
    assert list(tmp_path.iterdir()) == []
    done = run_gpu_script("/nonexistent/python", tmp_path)
    assert done.returncode == 2 and "has no torch" in done.stderr


def stand_in(tmp_path, pattern, does):
    """For Python: writes down what it is asked, and `does` something else where that matches a shell pattern."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >>"$LOG"\ncase "$*" in {pattern}) {does};; esac\n')
    python.chmod(0o755)
    return python


@pytest.mark.parametrize(
    ("pattern", "does", "limit", "told"),
    [
        ("nothing", "exit 1", 600, "gpu.sh: done"),
        ('*"kernels tune "*', "exit 1", 600, "gpu.sh: failed: tune"),
        ('*"kernels selftest"*', "exec sleep 100", 5, "gpu.sh: failed: selftest"),
        ('*"--part 3/4"*', "exit 1", 600, "gpu.sh: failed: tests"),
    ],
    ids=["all well", "a step fails", "a kernel hangs", "a part fails"],
)
def test_gpu_script_runs_every_step(tmp_path, pattern, does, limit, told):
    """A step that fails or does not end does not stop the rest."""
    done = run_gpu_script(stand_in(tmp_path, pattern, does), tmp_path, limit=limit)
    assert done.returncode == ("failed" in told), done.stderr
    assert done.stderr.splitlines()[-1].startswith(told)
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
