"""The commands that look at a machine and choose for it say what the package does; every command fails in words."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lora_kernels import backends, plan, selftest
from lora_kernels.__main__ import COMMANDS, main
from lora_kernels.backends import device
from lora_kernels.backends.base import fastest
from lora_kernels.backends.eager import EagerProducts
from lora_kernels.backends.triton.configs import tiles_for
from lora_kernels.cli import info
from lora_kernels.problem import Problem
from lora_kernels.tuning import cost, tables
from lora_kernels.tuning.targets import TARGETS


def printed(capsys, *command):
    """The exit code and the JSON that a command prints."""
    code = main([*command, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_info_says_what_a_plan_does(capsys):
    code, found = printed(capsys, "info")
    assert code == 0 and found["versions"]["torch"] == torch.__version__
    assert set(found["backends"]["cpu"]) == set(backends.BACKENDS)
    for name, reason in found["backends"]["cpu"].items():
        problem = Problem(256, 256, 256, 8, "float32", "float32", "cpu")
        if reason is None:
            assert plan.explain(problem, name).backend == name
        else:
            with pytest.raises(RuntimeError) as refused:
                plan.explain(problem, name)
            assert reason in str(refused.value) and "asked for" not in reason


def test_info_names_the_variables(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path))
    main(["info"])
    out = capsys.readouterr().out
    assert f"cache: {tmp_path}" in out and f"LORA_KERNELS_CACHE={tmp_path}" in out
    assert "eager   usable" in out and "triton  not usable: " in out


def test_info_says_what_a_call_takes(capsys):
    code, found = printed(capsys, "info")
    taken = found["choices"]["cpu"]
    assert code == 0 and list(taken) == ["float32", "bfloat16", "float16"]
    for dtype, backend in taken.items():
        assert plan.explain(Problem(256, 256, 256, 8, dtype, dtype, "cpu")).backend == backend
    main(["info"])
    out = capsys.readouterr().out
    assert f"a call that names no backend takes {taken['float32']} for float32" in out


def test_info_finds_the_compilers(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    _, found = printed(capsys, "info")
    assert found["compilers"] == {"c++": None, "nvcc": None, "ninja": None}
    (tmp_path / "nvcc").touch(0o755)
    main(["info"])
    assert f"compilers: c++: none, nvcc: {tmp_path}/nvcc, ninja: none" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "version", "wrong"),
    [
        ("torch", "2.9.1+cu128", ">= 2.10"),
        ("torch", "2.10.0", None),
        ("torch", "3.0.0a0", None),
        ("triton", "3.5.1", ">= 3.6, < 3.10"),
        ("triton", "3.6.0", None),
        ("triton", "3.10.0", ">= 3.6, < 3.10"),
        ("triton", None, None),
    ],
)
def test_info_names_versions_that_are_not_tested(name, version, wrong, capsys, monkeypatch):
    versions = {"python": "3.12", "torch": "2.12.0", name: version}
    versions = {key: value for key, value in versions.items() if value is not None}
    monkeypatch.setattr(info.machine, "versions", lambda: versions)
    main(["info"])
    out = capsys.readouterr().out
    said = f"NOT TESTED: {name} {version} is outside of what this release is tested with ({wrong})"
    assert (said in out) == (wrong is not None) and out.count("NOT TESTED") == (wrong is not None)


def test_the_tested_versions_are_those_that_are_installed():
    project = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    for name, (oldest, beyond) in info.SUPPORTED.items():
        assert f'"{name}>={oldest}{f",<{beyond}" if beyond else ""}"' in project


def test_info_has_every_gpu_with_its_own_reasons(capsys, monkeypatch):
    """On two pretended ones, an old one and a new one: each line is of its own device."""
    chips = [
        SimpleNamespace(major=7, minor=5, name="old", shared_memory_per_block_optin=64 << 10),
        SimpleNamespace(major=12, minor=1, name="new", shared_memory_per_block_optin=99 << 10),
    ]
    for chip in chips:
        chip.multi_processor_count, chip.total_memory = 40, 16 << 30
    current = [0]

    class Entered:
        def __init__(self, device):
            self.index = torch.device(device).index or 0

        def __enter__(self):
            current.append(self.index)

        def __exit__(self, *error):
            current.pop()

    def properties(device):
        return chips[device if isinstance(device, int) else torch.device(device).index]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", Entered)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(selftest, "trusted", lambda backend, device: None)
    monkeypatch.setattr(type(backends.get("triton")), "unavailable", lambda self: None)
    device._target.cache_clear()
    plan.forget()
    code, found = printed(capsys, "info")
    assert code == 0 and list(found["devices"]) == ["cpu", "cuda:0", "cuda:1"]
    old, new = (found["backends"][f"cuda:{index}"]["triton"] for index in (0, 1))
    assert new is None and "got 'sm_75'" in old
    assert found["choices"]["cuda:0"] == dict.fromkeys(("float32", "bfloat16", "float16"), "eager")
    facts = found["devices"]["cuda:1"]
    assert facts["name"] == "new" and facts["shared_kib"] == 99
    assert (facts["tiles_of"], facts["tiles_kib"]) == ("sm_120", 99)
    assert found["devices"]["cuda:0"]["shared_kib"] == 64
    assert "tiles_of" not in found["devices"]["cuda:0"]
    device._target.cache_clear()
    plan.forget()


@pytest.mark.parametrize(
    ("name", "reason"),
    [("nonsense", "LORA_KERNELS_BACKEND must be one of"), ("triton", "runs on cuda tensors only")],
)
def test_info_says_that_calls_raise(name, reason, capsys, monkeypatch):
    monkeypatch.setenv("LORA_KERNELS_BACKEND", name)
    assert main(["info"]) == 1
    out = capsys.readouterr().out
    assert f"every call that names no backend raises: {reason}" in out
    assert f"LORA_KERNELS_BACKEND={name}" in out and "eager   usable" in out
    code, found = printed(capsys, "info")
    assert code == 1 and reason in found["auto"]["cpu"]


def test_a_bad_log_level_is_refused_in_words(capsys, monkeypatch):
    monkeypatch.setenv("LORA_KERNELS_LOG", "nonsense")
    assert main(["info"]) == 2
    out, err = capsys.readouterr()
    message = "LORA_KERNELS_LOG must be a logging level such as INFO, got 'nonsense'"
    assert err == f"lora_kernels info: {message}\n" and out == ""


def test_explain_is_the_plans_word_for_both_directions(capsys):
    code, found = printed(
        capsys, "explain", "--shape", "512", "768", "3072", "16", "--device", "cpu"
    )
    problem = Problem(512, 3072, 768, 16, "float32", "float32", "cpu", bias=True)
    assert code == 0
    for name, each in {"forward": problem, "backward": problem.adjoint()}.items():
        explanation = plan.explain(each)
        assert Problem(**found[name].pop("problem")) == each
        assert found[name].pop("chosen").partition(",")[0] == explanation.backend
        assert found[name] == explanation.rejected


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", ["4096 4096 4096 16", "8 4096 4096 16", "300 1000 64 200"])
def test_predictions_are_the_cost_models(capsys, target, shape):
    sizes = shape.split()
    code, found = printed(
        capsys, "explain", "--shape", *sizes, "--dtype", "bfloat16", "--target", target
    )
    M, K, N, R = map(int, sizes)
    problem = Problem(M, N, K, R, "bfloat16", "bfloat16", "cuda", bias=True)
    candidates = {candidate.name: candidate for candidate in plan.predict(problem, TARGETS[target])}
    chosen = fastest(candidates.values())
    assert code == 0 and found["forward"]["chosen"].startswith(f"{chosen.name} (cost model)")
    frozen = cost.frozen_us(problem, TARGETS[target])
    assert found["forward"]["frozen layer"] == f"predicted {frozen:.1f} us"
    times = {name: candidate.predicted_us for name, candidate in candidates.items()}
    times |= {
        name: cost.predict_us(name, problem, TARGETS[target]) for name in ("addmm", "reference")
    }
    for name, us in times.items():
        text = f"predicted {us:.1f} us, {us / frozen:.2f} of the frozen layer"
        assert found["forward"][name] == text
    assert found["forward"].keys() == {"problem", "chosen", "frozen layer", *times}
    assert ("decode" in found["forward"]) == tiles_for(problem, TARGETS[target]).has("decode")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("explain --shape 1 2 3 -4", "not negative"),
        ("explain --shape 1 2 3 4 --backend turbo", "backend must be one of"),
        ("explain --shape 1 2 3 4 --backend triton --device cpu", "runs on cuda tensors only"),
        ("explain --shape 1 2 3 4 --target sm_90 --device cpu", "--target"),
        (f"explain --shape {10**23} 2 3 4", f"at most 2^63 - 1 elements, got {10**23} 2 3 4"),
        (f"explain --shape {2**40} 2 {2**30} 4 --target sm_90", "at most 2^63 - 1 elements"),
        (f"explain --shape 1 {2**62} 1 8", "at most 2^63 - 1 elements"),
        (f"bench --shape 1 {10**400} 3 4", "at most 2^63 - 1 elements"),
        (f"tune --shape 1 2 3 {2**63}", "at most 2^63 - 1 elements"),
        ("explain --shape 0 0 0 -1", "not negative, got 0 0 0 -1"),
        ("bench --shape 0 1 1 1", "--shape must be four sizes that are positive, got 0 1 1 1"),
        ("bench --preset quick --rounds 1", "--rounds at least 3"),
        ("bench --preset quick --cold --device cpu", "cuda only"),
        ("bench --compare nowhere.json", "nowhere.json does not exist"),
        ("bench --compare nowhere.json --preset quick", "no preset"),
        ("bench --compare nowhere.json --fail-over 1", "--fail-over must be more than 1, got 1.0"),
        ("bench --device cuda", "needs a GPU"),
        ("bench --preset gpu", "--preset gpu needs a GPU"),
        ("report nowhere", "nowhere does not exist"),
        ("selftest --device cuda", "there is none"),
        ("tune --shape 1 2 3 4", "needs a GPU"),
        ("tune --shape 0 2 3 4", "sizes that are positive"),
        ("tune --shape 1 2 3 4 --seconds 0", "--seconds must be positive"),
    ],
)
def test_bad_input_is_refused_in_words(command, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(command.split()) == 2
    out, err = capsys.readouterr()
    assert message in err and out == "" and err.count("\n") == 1


def test_selftest_passes_here(capsys, monkeypatch):
    """For every backend of the registry, also one that was added to it."""
    monkeypatch.setattr(backends, "BACKENDS", {"toy": "tests.toy_backend", **backends.BACKENDS})
    code, found = printed(capsys, "selftest", "--device", "cpu")
    usable = [name for name in ("eager", "cpu", "toy") if backends.get(name).unavailable() is None]
    assert code == 0 and found["passed"]
    ran = [each for each in found["backends"] if each["skipped"] is None]
    assert [each["backend"] for each in ran] == usable
    assert all(each["checks"] > 30 and each["closest"] <= 1.0 for each in ran)


def test_selftest_fails_where_a_product_is_wrong(capsys, monkeypatch):
    right = EagerProducts.wgrad

    def wrong(self, left, right_operand, dtype, dropout=None):
        return right(self, left, right_operand, dtype, dropout) * 1.05

    monkeypatch.setattr(EagerProducts, "wgrad", wrong)
    code, found = printed(capsys, "selftest", "--backend", "eager", "--device", "cpu")
    assert code == 1 and not found["passed"]
    failed = found["backends"][0]["failed"]
    assert failed and all(text.startswith(("dA", "dB")) for text in failed)


def test_selftest_fails_where_a_product_raises(capsys, monkeypatch):
    def run(backend, device):
        raise ZeroDivisionError("of a kernel")

    monkeypatch.setattr(selftest, "run", run)
    assert main(["selftest", "--backend", "eager", "--device", "cpu"]) == 1
    assert "raised ZeroDivisionError: of a kernel" in capsys.readouterr().out


def test_a_named_backend_that_is_not_usable_fails_the_selftest(capsys):
    assert main(["selftest", "--backend", "triton", "--device", "cpu"]) == 1
    assert "not usable: does not run on cpu" in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert COMMANDS[command][:20] in out and "--json" in out


def test_a_command_that_is_not_there(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["dance"])
    assert ended.value.code == 2 and "explain" in capsys.readouterr().err


@pytest.mark.parametrize("shape", ["0 2 3 4", "1 2 3 0", f"{2**62} 1 1 1", f"1 1 1 {2**62}"])
def test_the_largest_and_the_smallest_sizes_are_explained(shape, capsys):
    code, found = printed(capsys, "explain", "--shape", *shape.split(), "--device", "cpu")
    assert code == 0 and found["forward"]["problem"]["M"] == int(shape.split()[0])


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (KeyboardInterrupt, 130),
        (OSError("disk full"), 2),
        (OverflowError("int too large to convert to float"), 2),
        (MemoryError(), 2),
        (RuntimeError("no memory\nframe #0: c10::Error"), 2),
    ],
)
def test_what_stops_a_command_is_an_exit_code(raised, code, capsys, monkeypatch):
    def run(args):
        raise raised

    monkeypatch.setattr("lora_kernels.cli.info.run", run)
    assert main(["info"]) == code
    error = capsys.readouterr().err
    assert (
        error.startswith("lora_kernels info: ") and error.count("\n") == 1 and "frame" not in error
    )


@pytest.mark.parametrize("buffering", [1, -1], ids=["line by line", "at the end"])
def test_a_reader_that_has_seen_enough_is_no_error(buffering, monkeypatch, capsys):
    """Nor is the flush with which the interpreter ends."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", buffering) as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert main(["explain", "--shape", "1", "2", "3", "4", "--device", "cpu"]) == 0
    assert capsys.readouterr().err == ""


def test_a_selftest_of_nothing_fails(capsys, monkeypatch):
    monkeypatch.setattr(selftest, "run", lambda backend, device: [])
    code, found = printed(capsys, "selftest", "--backend", "eager", "--device", "cpu")
    (each,) = found["backends"]
    assert code == 1 and not found["passed"]
    assert each["failed"] == ["it refuses every problem of the self-test"]


def test_selftest_on_a_gpu_keeps_its_verdict(capsys, monkeypatch):
    """On a pretended one; for processes that cannot start another to test."""
    run, kept = selftest.run, []
    backend = type(backends.get("eager"))()
    backend.name = "triton"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(backends, "get", lambda name: backend)
    monkeypatch.setattr(selftest, "run", lambda backend, device: run(backend, "cpu"))
    monkeypatch.setattr(selftest, "keep", lambda *what: kept.append(what))
    assert main(["selftest", "--backend", "triton", "--device", "cuda"]) == 0
    assert kept == [(backend, 0, None)]


@pytest.mark.parametrize(
    "shape, how",
    [
        ("8 4096 4096 16", "decode (cost model), the nf4 weight decoded in the loop"),
        ("8 4000 4096 16", "two_kernel (cost model), the nf4 weight decoded by dequantise"),
        ("4096 4096 4096 16", "two_kernel (cost model), the nf4 weight decoded by dequantise"),
    ],
)
def test_predictions_of_a_quantised_weight(capsys, shape, how):
    """Every form has the time of what it does about the format; PyTorch's own forms are left out."""
    sizes = shape.split()
    command = ["explain", "--shape", *sizes, "--dtype", "bfloat16", "--target", "sm_90"]
    _, dense = printed(capsys, *command)
    code, found = printed(capsys, *command, "--weight", "nf4")
    forward = found["forward"]
    assert code == 0 and forward["chosen"].startswith(how)
    assert forward["problem"]["weight_format"] == "nf4" and "reference" not in forward

    def us(told, name):
        return float(told["forward"][name].split()[1])

    assert us(found, "two_kernel") > us(dense, "two_kernel") + TARGETS["sm_90"].gap_us
    assert us(found, "eager") > us(dense, "eager") + 100  # 20 bytes an element
    if "decode" in forward:
        assert us(found, "decode") < us(dense, "decode")


def test_tune_takes_a_format(monkeypatch, capsys):
    """Both directions of the problem have it, so that a table's entries of a dense weight stay what they are."""
    from lora_kernels.cli import tune

    asked = tune._problems(
        argparse.Namespace(
            preset=None,
            shape=[(16, 72, 40, 5)],
            rows=None,
            dtype="bfloat16",
            adapter_dtype=None,
            weight="nf4",
        )
    )
    types = "bfloat16", "bfloat16", "cuda"
    forward = Problem(16, 40, 72, 5, *types, weight_format="nf4")
    back = Problem(16, 72, 40, 5, *types, w_k_major=False, weight_format="nf4")
    assert asked == [forward, back]
    assert tables.lowrank(forward) == tables.lowrank(replace(forward, weight_format="dense"))
    assert tables.bucketed(forward) != tables.bucketed(replace(forward, weight_format="dense"))


def test_a_closed_output_is_no_failure():
    done = subprocess.run(
        f"exec {sys.executable} -m lora_kernels info >&-", shell=True, stderr=subprocess.PIPE
    )
    assert done.returncode == 0 and not done.stderr
