"""The benchmarks measure what they say: clocks, contenders, ratios, comparison, models, report and plots."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lora_kernels import samples
from lora_kernels.__main__ import main
from lora_kernels.bench import (
    check,
    clock,
    compare,
    contenders,
    linear,
    machine,
    memory,
    plots,
    presets,
    report,
    results,
    roofline,
    tiles,
    training,
)
from lora_kernels.bench import run as runner
from lora_kernels.bench.results import Results, Row
from lora_kernels.cli import check_output
from lora_kernels.problem import Problem
from lora_kernels.tuning import cost
from lora_kernels.tuning.search import Choice
from lora_kernels.tuning.targets import TARGETS

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
ON_CPU = ("reference", "addmm", "peft", "ours[eager]", "ours[cpu]")


@pytest.fixture(autouse=True)
def _one_thread():
    """What is tested is not how fast; and threads wait for each other where other tests run beside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def made_row(contender, value, to_floor, **more):
    about = {"suite": "linear", "case": "a case", "mode": "step", "unit": "us", "rounds": 9}
    about |= {"low": value, "high": value, "problem": asdict(PROBLEM), "to_reference": to_floor / 2}
    spread = {"to_floor_low": round(0.97 * to_floor, 4), "to_floor_high": round(1.03 * to_floor, 4)}
    return Row(contender=contender, value=value, to_floor=to_floor, **{**about, **spread, **more})


def made_results(*rows):
    facts = {"device": "cpu", "name": "A Machine", "threads": 2}
    return Results(facts, {"torch": "9"}, "abc", "2026-11-24", "bench", RATES, list(rows))


KEYS = json.dumps({"schema": 1, "machine": {}, "versions": {}, "sha": "", "date": ""})[:-1]
KEYS += ', "command": "", "ceilings": {}, '


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
    taken |= {"frozen": taken["a"], "reference": taken["c"]}
    rows = {name: results.row("linear", "a case", "step", name, taken) for name in "bc"}
    assert rows["b"].to_floor == pytest.approx(2.0, rel=0.03)
    assert rows["c"].to_floor == pytest.approx(1.0, rel=0.03)
    assert rows["b"].to_reference == pytest.approx(2.0, rel=0.03)
    rounds = fake.order[6:]  # the first six found out how often to repeat
    firsts = [rounds[start] for start in range(0, len(rounds), 3)]
    assert set(firsts) == set(calls.values())


def test_rounds_that_take_long_are_few(monkeypatch):
    """PyTorch's bfloat16 products take minutes on a processor without instructions for them."""
    now = iter(range(0, 1000, 9))
    monkeypatch.setattr(clock.time, "perf_counter", lambda: float(next(now)))
    fake = SimpleNamespace(time_us=lambda call, inner: 9e6)
    taken = clock.interleaved({"one": lambda: None}, fake, seconds=1.0, rounds=(7, 200))
    assert len(taken["one"]) == 3


def test_the_host_clock_counts_one_repetition():
    calls = []
    us = clock.HostClock(lambda: calls.append("wait")).time_us(lambda: calls.append("call"), 5)
    assert calls == ["call"] * 5 + ["wait"] and 0 < us < 1e5


@pytest.mark.parametrize(
    ("samples", "quartiles"),
    [
        ([7.0], (7.0, 7.0, 7.0)),
        ([1.0, 9.0], (3.0, 5.0, 7.0)),
        ([16.0, 1.0, 4.0, 9.0], (3.25, 6.5, 10.75)),
        ([25.0, 1.0, 16.0, 4.0, 9.0], (4.0, 9.0, 16.0)),
        ([36.0, 1.0, 25.0, 16.0, 4.0, 9.0], (5.25, 12.5, 22.75)),
    ],
)
def test_median_and_quartiles(samples, quartiles):
    """Distinct neighbours, so that a quartile between two of them says how it lies there."""
    assert results.summary(samples) == results.Summary(*quartiles)
    row = results.row(
        "linear", "a case", "step", "it", {"it": samples, "frozen": [2.0] * len(samples)}
    )
    assert (row.low, row.value, row.high) == quartiles and row.rounds == len(samples)
    ratios = (row.to_floor_low, row.to_floor, row.to_floor_high)
    assert ratios == tuple(each / 2 for each in quartiles) and row.to_reference is None


class FakeCuda:
    """torch.cuda as far as the clock uses it; a call costs a millisecond of it, and `host_us` of the host."""

    def __init__(self, host_us=0.0):
        self.ms, self.log = 0.0, []
        self.host_us, self.held_us = host_us, 0.0
        self.holds, self.longest_us = 0, 0.0

    def _sleep(self, cycles):
        self.held_us = cycles / clock.CYCLES
        self.holds, self.longest_us = self.holds + 1, max(self.longest_us, self.held_us)

    def work(self):
        self.ms += 1.0
        self.held_us -= self.host_us
        self.log.append("call")

    def Event(self, enable_timing):
        cuda = self

        class Event:
            def record(self):
                self.at = cuda.ms

            def query(self):
                return cuda.held_us < 0

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


@pytest.mark.parametrize("host_us", [0.0, 300.0, 1e9])
def test_the_gpu_waits_until_everything_is_enqueued(host_us):
    """A sample in which it was there first is taken again, with a longer wait, which the next one has from the start."""
    cuda = FakeCuda(host_us)
    timer = clock.CudaClock(cuda=cuda)
    for _ in range(2):
        assert timer.time_us(cuda.work, 4) == pytest.approx(1000.0)
        assert cuda.held_us >= 0 or host_us == 1e9, "the host was later than the GPU"
    assert cuda.log.count("wait") == {0.0: 1, 300.0: 3, 1e9: 6}[host_us] + 1
    assert cuda.longest_us <= clock.MOST_HOLD_US
    holds = cuda.holds
    timer.time_us(cuda.work, 4)
    assert cuda.holds == holds + (host_us < 1e9), "one that waits for the GPU itself is not held"


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
@pytest.mark.parametrize("name", ON_CPU)
def test_contenders_compute_the_formula(name, problem):
    if name == "peft":
        pytest.importorskip("peft")
    if reason := name.startswith("ours") and contenders.left_out(name, problem):
        pytest.skip(reason)
    if name == "addmm" and problem is MIXED:
        pytest.skip("this form rounds float32 adapters to the base's dtype: another computation")
    oracle = check.Oracle(problem)
    assert 0 < oracle.check(name, contenders.build(name, oracle.layer)) < 0.1


@pytest.mark.parametrize("name", contenders.FORCED)
def test_forced_algorithms_are_formulas_over_tritons_plan(name, monkeypatch):
    asked = []
    planned = contenders.plan.explain(PROBLEM, "eager")
    monkeypatch.setattr(contenders.plan, "explain", lambda *facts: asked.append(facts) or planned)
    oracle = check.Oracle(PROBLEM)
    oracle.check(name, contenders.build(name, oracle.layer))
    assert asked and {facts[1:] for facts in asked} == {("triton", name)}
    assert all(replace(facts[0], bias=PROBLEM.bias) == PROBLEM for facts in asked)


def test_a_loop_is_the_frozen_layer(monkeypatch):
    """By the products of any plan; it has no backward, and is no rival."""
    planned = contenders.plan.explain(PROBLEM, "eager")
    with monkeypatch.context() as patch:
        patch.setattr(contenders.plan, "explain", lambda *facts: planned)
        layer, (x, _) = contenders.make_layer(PROBLEM), contenders.make_input(PROBLEM)
        y = contenders.build("loop", layer).function(x)
        torch.testing.assert_close(y, torch.nn.functional.linear(x, layer.weight, layer.bias))
    monkeypatch.setattr(contenders, "left_out", lambda name, problem: None)
    monkeypatch.setattr(linear, "clock_for", lambda *rest: clock.HostClock())
    notes = {}
    case = linear.Case("case", PROBLEM, "step")
    linear.measure(case, ("loop",), linear.Effort(0.0, (1, 1)), {}, notes)
    assert notes == {"loop": "measured forward only"}
    rows = [
        made_row(name, 1.0, 1.0, auto=name == "ours[cpu]" or None)
        for name in ("frozen", "loop", "ours[cpu]", "addmm")
    ]
    assert [other.contender for _, other in report.pairs(made_results(*rows))] == ["addmm"]


@pytest.mark.parametrize("name", ["peft", "dense", "ours[eager]", "ours[cpu]"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_contenders_over_nf4(name, dtype):
    """All read the codes of one weight: PEFT's over bitsandbytes' own layer."""
    if name == "peft":
        pytest.importorskip("bitsandbytes")
    problem = Problem(5, 96, 128, 4, dtype, dtype, bias=True, weight_format="nf4")
    if reason := contenders.left_out(name, problem):
        pytest.skip(reason)
    oracle = check.Oracle(problem)
    built = contenders.build(name, oracle.layer)
    assert 0 < oracle.check(name, built) < 0.1
    if name == "peft":
        packed = built.function.base_layer.weight
        assert type(packed).__name__ == "Params4bit"
        assert packed.data_ptr() == oracle.layer.packed.packed.data_ptr()
    kept = memory.saved_bytes(built, oracle.layer, oracle.x)
    assert kept < problem.N * problem.K, "the packed tensors are the layer's own, W is not saved"


def test_contenders_that_a_format_has_not(monkeypatch):
    nf4, int8 = (replace(PROBLEM, weight_format=kind) for kind in ("nf4", "int8"))
    assert contenders.left_out("dense", PROBLEM) == "the weight is dense"
    assert contenders.left_out("peft", int8) == "it has no layer over int8 here"
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else name
    )
    assert contenders.left_out("peft", nf4) == "bitsandbytes is not installed"
    assert contenders.left_out("peft", PROBLEM) is None
    cases = presets.cases("nf4", "cpu")
    assert {case.problem.weight_format for case in cases} == {"nf4"}
    assert presets.names("nf4") == ("frozen", "reference", "dense", "peft", "ours")


def test_the_codes_of_nf4_are_bitsandbytes_own():
    bnb = pytest.importorskip("bitsandbytes")
    table = bnb.functional.get_4bit_type("nf4", device="cpu")
    torch.testing.assert_close(samples.nf4_codes(), table, rtol=0, atol=1.2e-7)


def test_names_are_checked():
    with pytest.raises(ValueError, match="contender must be one of"):
        contenders.build("fastest", contenders.make_layer(PROBLEM))
    for name in ("loop", *contenders.FORCED):
        assert "cuda only" in contenders.left_out(name, PROBLEM)
    assert "cuda tensors only" in contenders.left_out("ours[triton]", PROBLEM)
    ours = {device: contenders.with_backends(("ours",), device) for device in ("cpu", "cuda")}
    assert ours["cpu"] == ("ours[eager]", "ours[cpu]")
    assert ours["cuda"] == ("ours[eager]", "ours[triton]", "ours[cuda]")


class Fixed(torch.autograd.Function):
    """y and gradients as they are given."""

    @staticmethod
    def forward(ctx, x, A, B, found):
        ctx.found = found
        return found["y"].clone()

    @staticmethod
    def backward(ctx, dy):
        return ctx.found["dx"], ctx.found["dA"], ctx.found["dB"], None


def fixed(layer, found):
    """A contender that gives these results on any input."""
    A, B = layer.A, layer.B
    return contenders.Built(lambda x: Fixed.apply(x, A, B, found), (A, B))


def test_a_wrong_contender_is_left_out_and_ours_fails(monkeypatch):
    oracle, case, notes = check.Oracle(PROBLEM), linear.Case("a", PROBLEM), {}
    found = {**oracle.plain, "dA": 1.001 * oracle.plain["dA"]}
    build = contenders.build

    def wrong(name, layer):
        return fixed(layer, found) if name in ("addmm", "ours[eager]") else build(name, layer)

    monkeypatch.setattr(contenders, "build", wrong)
    rows = linear.measure(case, ("addmm",), QUICK, RATES, notes)
    assert "dA is off" in notes["addmm"]
    assert {row.contender for row in rows} == {"frozen", "reference"}
    with pytest.raises(check.Wrong):
        linear.measure(case, ("ours[eager]",), QUICK, RATES, {})
    failed = {}
    rows = linear.measure(case, ("ours[eager]",), QUICK, RATES, {}, failed)
    assert failed.popitem()[1].startswith("ours[eager]: ") and not failed
    assert {row.contender for row in rows} == {"frozen", "reference"}


@pytest.mark.parametrize("what", check.NAMES)
def test_a_wrong_tensor_is_refused(what):
    """One thousandth everywhere, or in any one element what is no number or infinite."""
    oracle = check.Oracle(PROBLEM)
    for value in (None, float("nan"), float("inf")):
        found = {name: t.clone() for name, t in oracle.plain.items()}
        if value is None:
            found[what] *= 1.001
        else:
            found[what].view(-1)[-1] = value
        says = f"it: {what} is off by {'' if value is None else value}"
        with pytest.raises(check.Wrong, match=says):
            oracle.check("it", fixed(oracle.layer, found))


@pytest.mark.parametrize("what", check.NAMES)
def test_the_error_of_a_contender_is_the_largest_of_its_tensors(what):
    oracle = check.Oracle(PROBLEM)
    found = {name: t.float() for name, t in oracle.exact.items()}
    found[what].view(-1)[0] += 1e-6 * found[what].abs().max()
    assert oracle.check("it", fixed(oracle.layer, found)) == pytest.approx(1e-6, rel=0.2)


ULP = 2.0**-20  # of float32 at 8


@pytest.mark.parametrize(
    ("dtype", "longest", "plain", "right", "wrong"),
    [
        (torch.float32, 1, 0.0, 6 * ULP, 7 * ULP),
        (torch.float32, 10000, 0.0, 204 * ULP, 205 * ULP),
        (torch.bfloat16, 1, 0.0, 4 / 16, 5 / 16),
        (torch.float32, 1, 0.5, 1.0, 1.01),
    ],
    ids=["a sum of one", "a long sum", "a short dtype", "a plain formula that is off"],
)
def test_the_budget_counts_each_of_its_parts(dtype, longest, plain, right, wrong):
    """Twice the plain formula's error, four roundings of the result, and a walk over the longest sum."""
    exact = torch.full((4,), 8.0, dtype=torch.float64)
    budget = exact, exact + plain, longest
    assert check.relative_error("it", (exact + right).to(dtype), *budget) == right / 8
    with pytest.raises(check.Wrong, match="it is off by"):
        check.relative_error("it", (exact + wrong).to(dtype), *budget)
    with pytest.raises(check.Wrong, match=r"it is \[3\], not \[4\]"):
        check.relative_error("it", exact[:3], *budget)


@pytest.mark.parametrize("off", [float("nan"), 0.01, 5e-6])
def test_a_tile_that_computes_something_else_does_not_count(off, monkeypatch):
    """Even by little: float32 sums of 48 terms are off by 2e-6 of the largest value at most."""
    product = tiles.Product(replace(PROBLEM, bias=False), "cpu")
    choice = Choice("eager")
    assert product.wrong(choice) is None
    (right,) = product.call(choice)()
    wrong = right.clone()
    wrong[-1, -1] += off * right.abs().max()
    monkeypatch.setattr(tiles.Product, "call", lambda self, choice: lambda: (wrong,))
    assert product.wrong(choice).startswith("the result is off by")
    assert product.measure([choice], QUICK) == [product.wrong(choice)]


def test_no_contender_vanishes(monkeypatch):
    """Each that is asked for has a row, or a reason why not; in the results, their file, and the table."""
    names = "addmm", "peft", "two_kernel", "ours[eager]", "ours[cpu]", "ours[triton]"
    build = contenders.build

    def broken(name, layer):
        if name == "ours[cpu]":
            raise RuntimeError("out of order\nmore")
        return build(name, layer)

    monkeypatch.setattr(contenders, "build", broken)
    run = made_results()
    for mode in linear.MODES:
        case = linear.Case("a case", PROBLEM, mode)
        rows = runner.case_rows(case, names, QUICK, run)
        run.rows += rows
        measured = [row.contender for row in rows]
        assert len(set(measured)) == len(measured) and {row.mode for row in rows} == {mode}
        refused = {what.partition(",")[0] for what in run.failed if f", {mode} of" in what}
        assert {"frozen", "reference", *names} == {*measured, *run.left_out, *refused}
        assert run.failed[f"ours[cpu], {mode} of {PROBLEM}"] == "out of order"
    assert {"ours[triton]", "two_kernel"} <= set(run.left_out)
    table = report.plain_table(run)
    lines = [line for line in table.splitlines() if line.startswith("a case")]
    assert len(lines) == len(run.rows) and all(
        f"left out: {name}" in table for name in run.left_out
    )


@pytest.mark.parametrize("mode", linear.MODES)
def test_a_row_says_what_was_measured(mode):
    case = linear.Case("a case", PROBLEM, mode)
    rows = linear.measure(case, ("ours[eager]",), QUICK, RATES, {})
    floor, reference, ours = rows
    assert [row.contender for row in rows] == ["frozen", "reference", "ours[eager]"]
    assert floor.to_floor == 1.0 and reference.to_reference == 1.0
    assert ours.error < 1e-5 and ours.as_problem() == PROBLEM and ours.rounds >= 3
    assert ours.low <= ours.value <= ours.high
    flops, moved = roofline.work(PROBLEM, mode)
    assert ours.ceiling_share == pytest.approx(max(flops / 1e5, moved / 1e4) / ours.value)


def test_work_of_a_step_counts_every_product():
    M, N, K, R = PROBLEM.M, PROBLEM.N, PROBLEM.K, PROBLEM.R
    products = [(M, K, N), (M, K, R), (M, R, N)]  # forward
    assert roofline.work(PROBLEM, "forward")[0] == sum(2 * a * b * c for a, b, c in products)
    products += [(M, N, K), (M, N, R), (M, R, K), (K, M, R), (R, M, N)]  # dx, q, q·At, dA, dB
    assert roofline.work(PROBLEM, "step")[0] == sum(2 * a * b * c for a, b, c in products)


def test_the_gpu_presets_are_predicted_before_they_are_measured():
    """Every GPU case up to its launch: problems, predictions and choices need no device."""
    cases = presets.cases("gpu", "cuda")
    assert any(case.cold for case in cases) and any(case.graph for case in cases)
    target = TARGETS["sm_90"]
    for case in cases:
        about = {"problem": asdict(case.problem), "mode": case.mode, "suite": case.suite}
        predicted = {
            name: report.predicted_us(made_row(name, 1.0, 1.0, **about), target)
            for name in (*contenders.NAMES, "ours[triton]")
        }
        directions = [case.problem, case.problem.adjoint()][: 1 + (case.mode == "step")]
        for name, algorithm in {
            "frozen": "frozen",
            "reference": "reference",
            "ours[eager]": "eager",
        }.items():
            expected = sum(cost.predict_us(algorithm, each, target) for each in directions)
            assert predicted[name] == pytest.approx(expected), (case, name)
        assert 0 < predicted["frozen"] < predicted["ours[triton]"] < 20 * predicted["frozen"], case
        assert predicted["peft"] is None and predicted["ours[cpu]"] is None
    row = made_row("frozen", 1.0, 1.0, problem=asdict(case.problem))
    assert report.predicted_us(row, None) is None
    assert report.predicted_us(made_row("frozen", 1.0, 1.0), target) is None, "of a CPU"


@pytest.mark.parametrize("preset", [name for name in presets.PRESETS if name != "gpu"])
def test_presets_name_each_measurement_once(preset):
    cases = presets.cases(preset, "cpu")
    assert cases and len(set(cases)) == len(cases)
    assert {case.mode for case in cases} <= set(linear.MODES)


def test_the_grid_is_what_the_documents_say(monkeypatch, capsys):
    """Two modes and two types of every layer, row count and rank, but the largest; frozen, reference, addmm and ours."""
    cases = presets.cases("grid", "cpu")
    layers = {(case.problem.K, case.problem.N) for case in cases}
    rows, ranks = {case.problem.M for case in cases}, {case.problem.R for case in cases}
    assert (rows, ranks, len(layers)) == ({1, 16, 128, 512, 2048}, {8, 16, 64}, 8)
    assert len(cases) == 2 * 2 * 3 * (8 * 5 - 1) and (2048, 2048) in layers
    assert max(c.problem.M for c in cases if c.problem.K == 4096) == 512
    neighbours = list(zip(cases[::2], cases[1::2], strict=True))
    assert all(a.problem == b.problem and a.mode != b.mode for a, b in neighbours), (
        "one oracle each"
    )
    orders = []
    monkeypatch.setattr(runner, "run", lambda order, *a: orders.append(order) or made_results())
    assert main(["bench", "--preset", "grid", "--device", "cpu"]) == 0
    assert orders[0].names == ("frozen", "reference", "addmm", "ours")
    assert orders[0].suites == ("linear", "growth") and orders[0].cases == cases


def test_an_oracle_is_that_of_its_problem(monkeypatch):
    """It is made once for the modes of one problem, and anew for another."""
    made, oracles = [], {}
    right = linear.Oracle
    monkeypatch.setattr(linear, "Oracle", lambda problem: made.append(problem) or right(problem))
    other = replace(PROBLEM, K=24)
    for problem, mode in ((PROBLEM, "forward"), (PROBLEM, "step"), (other, "step")):
        case = linear.Case("a", problem, mode)
        rows = linear.measure(case, (), QUICK, RATES, {}, None, oracles)
        assert {row.as_problem() for row in rows} == {problem}
        assert list(oracles) == [problem] == made[-1:]
    assert len(made) == 2


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


def test_memory_rows_are_bytes_over_the_frozen_layers():
    notes = {}
    rows = memory.measure(linear.Case("a case", PROBLEM), ("addmm", "two_kernel"), notes)
    found = {(row.mode, row.contender): row for row in rows}
    assert set(found) == {
        (m, n) for m in ("saved", "peak") for n in ("frozen", "reference", "addmm")
    }
    assert notes == {"memory: two_kernel": "measured on cuda only"}
    saved, peak = found["saved", "addmm"], found["peak", "addmm"]
    assert saved.value == 4 * PROBLEM.M * PROBLEM.K and saved.unit == peak.unit == "bytes"
    assert saved.to_floor is None, "the frozen layer saves nothing"
    assert saved.to_reference == saved.value / found["saved", "reference"].value
    assert peak.to_floor == peak.value / found["peak", "frozen"].value > 1
    assert peak.as_problem() == PROBLEM and peak.rounds == 1


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


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "must be JSON"),
        ("{", "must be JSON"),
        ("[]", """with the key "schema": 1; it has list"""),
        (
            '{"machine": {}, "cells": []}',
            """with the key "schema": 1; it has ['cells', 'machine']""",
        ),
        ('{"schema": 7, "rows": []}', "must have schema 1, and has 7"),
        (
            '{"schema": 1, "rows": []}',
            "missing ['ceilings', 'command', 'date', 'machine', 'sha', 'versions']",
        ),
        (KEYS + '"rows": {}}', "rows must be a list, and is dict"),
        (KEYS + '"rows": [3]}', "rows[0] must be an object, and is int"),
        (KEYS + '"rows": [{"suite": "linear", "speed": 3}]}', "unknown ['speed']"),
    ],
)
def test_other_files_are_no_results(tmp_path, text, says, capsys):
    """The message names the file, the rule and what the file has instead."""
    file = tmp_path / "a.json"
    file.write_text(text)
    with pytest.raises(ValueError) as refused:
        results.load(file)
    assert str(refused.value).startswith(str(file)) and says in str(refused.value)
    assert main(["report", str(file)]) == 2
    assert capsys.readouterr().err == f"lora_kernels report: {refused.value}\n"
    # In a folder, files of other tools are passed over, and results of another version are not.
    if '"rows"' in text:
        assert results.find([tmp_path]) == [file]
    else:
        with pytest.raises(FileNotFoundError, match="no benchmark results"):
            results.find([tmp_path])


def ours(ratio, **more):
    return made_row("ours[cpu]", ratio, ratio, **more)


def compared(before, *measured):
    """The verdict on one row, which takes exactly these measurements."""
    further = list(measured[1:])
    base, now = made_results(before), made_results(*measured[:1])
    (verdict,) = compare.compare(base, now, 1.05, lambda row: further.pop(0))
    assert not further
    return verdict


@pytest.mark.parametrize(
    ("before", "measured", "slower"),
    [
        (ours(1.0), [ours(1.3)] * 3, True),
        (ours(1.0), [ours(1.3), ours(1.0)], False),
        (ours(1.0, to_floor_high=1.2), [ours(1.3, to_floor_low=1.1)], False),
        (ours(1.0, to_floor_high=1.2), [ours(1.3, to_floor_low=1.25)] * 3, True),
        (ours(1.0, to_floor_high=1.0), [ours(1.04)], False),
        (ours(1.0, to_floor_high=1.0), [ours(1.07)] * 3, True),
        (ours(1.0), [ours(0.5)], False),
    ],
    ids=["always", "once", "spreads overlap", "spreads apart", "within", "beyond", "faster"],
)
def test_slower_is_what_is_so_in_every_measurement(before, measured, slower):
    """By more than the factor, and beyond the spread of both."""
    verdict = compared(before, *measured)
    assert verdict.slower == slower and verdict.tries == len(measured)
    assert verdict.change == pytest.approx(measured[-1].to_floor)
    assert str(verdict).startswith("SLOWER" if slower else "ok")
    assert ("measurements" in str(verdict)) == (len(measured) > 1)


def test_what_vanished_is_a_failure_and_rivals_are_not_compared():
    for measured in ((), (ours(1.3), None)):
        verdict = compared(ours(1.0), *measured)
        assert verdict.slower and str(verdict).startswith("MISSING") and verdict.change is None
    rivals = made_results(made_row("peft", 1.0, 1.0))
    assert compare.compare(rivals, made_results(), 1.1, lambda row: None) == []
    with pytest.raises(ValueError, match="holds none"):
        compare.cases_of(rivals)


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
    compared = {(ours.contender, other.contender) for ours, other in report.pairs(a_run())}
    assert compared == {("ours[cpu]", "reference"), ("ours[cpu]", "addmm")}
    text = report.markdown({"a": (a_run(), [Path("a-price.png")])})
    assert "| a case | 33, 48, 20, 5 | 100 µs | 1.50× | 1.20× | 1.10×* | 80 % |" in text
    lost = "| lost | 33, 48, 20, 5 | float32 | step | ours[cpu] 140 µs | addmm 120 µs | 1.17 |"
    assert lost in text and "| addmm | float32 | 2 | 0.97 | 0.86 | 1.09 | 1 |" in text
    assert "| reference | float32 | 2 | 1.22 | 1.07 | 1.36 | 0 |" in text
    assert "![a price](a-price.png)" in text and "commit abc" in text and "M = 77" in text
    assert report.losses(made_results(*a_run().rows[:4])) == []


def test_predictions_stand_beside_measurements():
    assert report.predictions(a_run()) == [], "nothing is predicted for a CPU"
    on_gpu = {"problem": {**asdict(PROBLEM), "device": "cuda"}, "mode": "forward"}
    warm, cold = (made_row("addmm", 8.0, 1.2, caches=c, **on_gpu) for c in ("warm", "cold"))
    run = made_results(warm, cold, made_row("peft", 9.0, 1.3, **on_gpu))
    run.machine["architecture"] = "sm_70"
    assert report.predictions(run) == [], "it has no tensor cores that are used"
    run.machine |= {"architecture": "sm_90", "multiprocessors": 66}
    ((row, us),) = report.predictions(run)
    target = report.target_of_run(run)
    assert row is warm and us == report.predicted_us(warm, target)
    assert (target.multiprocessors, target.bandwidth_gbs) == (66, pytest.approx(10.0))
    text = report.markdown({"a": (run, [])})
    assert f"| addmm | forward | 1 | {us / 8:.2f} | {us / 8:.2f} | {us / 8:.2f} |" in text


@pytest.fixture
def pyplot():
    pytest.importorskip("matplotlib").use("Agg")
    from matplotlib import pyplot

    yield pyplot
    pyplot.close("all")


def test_plots_show_the_rows(pyplot):
    bars = plots.price(a_run(), pyplot)
    heights = sorted(patch.get_height() for patch in bars.axes[0].patches)
    assert heights == pytest.approx([1.1, 1.2, 1.2, 1.4, 1.5, 1.5])
    lines = plots.growth(a_run(), pyplot)
    assert [axes.get_xlabel() for axes in lines.axes[:4]] == list("MKNR")
    xs, ys = lines.axes[0].lines[0].get_data()
    assert list(xs) == [33, 77] and list(ys) == pytest.approx([0.09, 0.099])
    assert bars.axes[0].get_ylim()[0] == 0 and bars.axes[0].get_ylim()[1] > 1.03 * 1.5
    roof = plots.roofline(a_run(), pyplot).axes[0].lines[0].get_data()
    assert max(roof[1]) == RATES["float32_gflops"]
    assert plots.price(made_results(), pyplot) is None


def test_a_plot_of_prices_hides_nothing(pyplot):
    """A bar that would be too high says its value; panels have cases; many cases become boxes that show their extremes."""
    tall = made_row("peft", 1.0, 7.25)
    figure = plots.price(made_results(*a_run().rows, tall), pyplot)
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == ["7.2"]
    assert axes.get_ylim()[0] == 0 and max(p.get_height() for p in axes.patches) == plots._HIGHEST
    half = {"problem": {**asdict(PROBLEM), "dtype": "bfloat16"}}
    mixed = [made_row("peft", 1.0, 1.2, **half), made_row("peft", 1.0, 1.4, mode="forward", **half)]
    figure = plots.price(made_results(*a_run().rows, *mixed), pyplot)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == [
        "forward + backward, float32",
        "forward, bfloat16",
        "forward + backward, bfloat16",
    ]
    assert all(axes.patches for axes in figure.axes)
    many = [made_row("peft", 1.0, 1 + n / 50, case=f"case {n}") for n in range(plots._MANY + 1)]
    (axes,) = plots.price(made_results(*many, made_row("addmm", 1.0, 9.5)), pyplot).axes
    assert [text.get_text() for text in axes.texts] == ["to 9.5"]
    ends = [float(y) for line in axes.lines for y in line.get_ydata()]
    assert {1.0, 1 + plots._MANY / 50} <= set(ends) and axes.get_ylim()[0] == 0


def test_plots_are_files(tmp_path):
    pytest.importorskip("matplotlib")
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
    monkeypatch.setitem(training.MODELS, "block", step)
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
        changed.machine = {**found.machine, "capability": "another"}
        baseline = results.save(changed, tmp_path / "baseline" / f"{code}.json")
        arguments = ["bench", "--compare", str(baseline), "--seconds", "0.01", "--rounds", "3"]
        assert main(arguments) == code, capsys.readouterr().out
        out, err = capsys.readouterr()
        assert "of another machine: its capability is another, here it is " in err
        assert err.count("of another machine") == 1
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


@pytest.mark.slow
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


def test_bench_as_json(capsys, fast_machine):
    assert main([*BENCH, "--json"]) == 0
    text = json.loads(capsys.readouterr().out)
    assert text["ceilings"] == RATES and text["comparison"] == []
    assert {row["problem"]["K"] for row in text["rows"]} == {32}


def test_where_results_go_is_checked_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "taken" / "report.md").mkdir(parents=True)
    monkeypatch.setattr(runner, "run", lambda *a: pytest.fail("it was measured"))
    monkeypatch.setattr(report, "markdown", lambda *a: pytest.fail("it was made"))
    baseline = str(results.save(a_run(), tmp_path / "run.json"))
    for command in (
        [*BENCH, "--output", str(tmp_path / "file" / "new")],
        [*BENCH, "--output", str(tmp_path / "file")],
        [*BENCH, "--output", str(tmp_path / "folder.json")],
        ["report", baseline, "--no-plots", "--output", str(tmp_path / "file")],
        ["report", baseline, "--no-plots", "--output", str(tmp_path / "taken")],
    ):
        assert main(command) == 2, command
        error = capsys.readouterr().err
        assert "--output must be a " in error and f"got {command[-1]}" in error
        assert error.count("\n") == 1
    assert main([*BENCH[:-4], "--rounds", "1", "--output", str(tmp_path / "unused")]) == 2
    assert not (tmp_path / "unused").exists(), "a command that is refused leaves nothing behind"


def test_a_folder_and_a_file_that_may_not_be_changed_are_refused(tmp_path, monkeypatch):
    """Made up, because root may write everywhere."""
    file = tmp_path / "a.json"
    file.touch()
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(ValueError, match="may not be changed"):
        check_output(file, is_file=True)

    def refuse(dir):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    for path, is_file in ((tmp_path, False), (tmp_path / "new.json", True)):
        with pytest.raises(ValueError, match=f"got {path}: Read-only file system"):
            check_output(path, is_file)
