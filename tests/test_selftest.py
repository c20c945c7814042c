"""The self-test: it passes what is right, notices what is wrong, and its verdict decides and is kept."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from lora_kernels import backends, selftest
from lora_kernels.backends.base import Candidate
from lora_kernels.backends.eager import EagerBackend, EagerProducts


def test_every_backend_passes_here(backend):
    results = selftest.run(backends.get(backend), "cpu")
    assert {r.tensor for r in results} == {"y", "dx", "dA", "dB"}
    assert len(results) >= 16
    failed = [str(r) for r in results if not r.passed]
    assert not failed, "\n".join(failed)


class BrokenProducts(EagerProducts):
    """One product is off by `roundings` of the base's dtype, everywhere."""

    def __init__(self, product, roundings):
        self.product, self.roundings = product, roundings

    def off(self, product, t, dtype):
        wrong = product == self.product
        return t * (1 + self.roundings * torch.finfo(dtype).eps) if wrong else t

    def shrink(self, x, adapter):
        return self.off("shrink", super().shrink(x, adapter), adapter.A.dtype)

    def expand(self, *args):
        y = super().expand(*args)
        if self.product == "nan":
            y[-1, -1] = float("nan")
        return self.off("expand", y, y.dtype)

    def wgrad(self, left, right, dtype, dropout=None):
        return self.off("wgrad", super().wgrad(left, right, dtype, dropout), dtype)


class Broken(EagerBackend):
    """A backend whose products are wrong in one of them."""

    def __init__(self, product, roundings=0.0):
        self.products = BrokenProducts(product, roundings)

    def candidates(self, problem, target):
        return [Candidate("broken", self.products)]


@pytest.mark.parametrize("product", ["shrink", "expand", "wgrad"])
def test_a_broken_product_is_noticed(product):
    """An error a little above what rounding explains, in every combination of types; one below is none."""
    results = selftest.run(Broken(product, 8), "cpu")
    types = {(r.problem.dtype, r.problem.adapter_dtype) for r in results}
    assert {(r.problem.dtype, r.problem.adapter_dtype) for r in results if not r.passed} == types
    assert all(r.passed for r in selftest.run(Broken(product, 0.5), "cpu"))


def test_nothing_tested_is_a_failure():
    assert "refuses every problem" in selftest.failure_of([])


def test_a_nan_is_noticed():
    assert {r.tensor for r in selftest.run(Broken("nan"), "cpu") if not r.passed} == {"y", "dx"}


def says(*answers):
    """A program that answers as the self-test's process does, among other lines."""
    lines = [f"print({selftest._MARK + answer!r}, flush=True)" for answer in answers]
    return "\n".join(["print('something else')", *lines, ""])


def told(failure=None, unable=None):
    return json.dumps({"failure": failure, "unable": unable})


RIGHT = says("begins", told())
WRONG = says("begins", told("y is off by more than 1.0"))


class TestVerdict:
    @pytest.fixture
    def device(self, monkeypatch, tmp_path):
        """A pretended GPU; `program_is(program)` sets what runs instead of a self-test's process."""
        self.properties = SimpleNamespace(name="Pretended", major=9, minor=0, uuid="GPU-1")
        self.log, self.folder = tmp_path / "log", tmp_path / "selftest"
        monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: self.properties)
        self.patch = monkeypatch
        self.program_is(RIGHT)
        selftest._verdict.cache_clear()
        yield torch.device("cuda", 0)
        selftest._verdict.cache_clear()

    def program_is(self, program):
        noted = f"print('x', end='', file=open({str(self.log)!r}, 'a'))\n"
        self.patch.setattr(selftest, "_PROGRAM", noted + program)

    @property
    def runs(self):
        return len(self.log.read_text()) if self.log.exists() else 0

    def test_a_right_backend_is_tested_once_and_trusted(self, device):
        backend = EagerBackend()
        assert selftest.trusted(backend, device) is None
        selftest._verdict.cache_clear()  # a new process
        assert selftest.trusted(backend, device) is None
        assert self.runs == 1
        (file,) = self.folder.iterdir()
        assert json.loads(file.read_text())["failure"] is None

    def test_a_wrong_backend_is_refused_with_a_warning_once(self, device, caplog):
        self.program_is(WRONG)
        backend = EagerBackend()
        with caplog.at_level(logging.WARNING, "lora_kernels"):
            reasons = {selftest.trusted(backend, device) for _ in range(3)}
        assert reasons == {"y is off by more than 1.0"}
        assert len(caplog.records) == 1 and self.runs == 1
        selftest._verdict.cache_clear()
        assert selftest.trusted(backend, device) in reasons and self.runs == 1

    @pytest.mark.parametrize(
        ("end", "reason"),
        [
            ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "ended with SIGSEGV"),
            ("import os; os.abort()", "ended with SIGABRT"),
            (says(told()) + "import os; os.abort()", "ended with SIGABRT"),
            ("print('x' * 10**6); sys.exit('no such kernel')", "ended with exit code 1: no such"),
            ("import time; time.sleep(100)", "did not end within 2 s"),
            ("", "ended with exit code 0: it printed nothing"),
        ],
        ids=["segfault", "abort", "abort after its answer", "exit", "hang", "silence"],
    )
    def test_a_crash_or_a_hang_is_a_verdict(self, device, end, reason):
        """It ends the test's process, and that one alone."""
        self.patch.setattr(selftest, "LIMIT", 2.0)
        self.program_is(says("begins") + f"import sys\n{end}")
        assert selftest.trusted(EagerBackend(), device).startswith(f"its self-test {reason}")
        selftest._verdict.cache_clear()
        assert reason in selftest.trusted(EagerBackend(), device) and self.runs == 1

    def test_what_a_hung_test_has_started_ends_with_it(self, device, tmp_path):
        self.patch.setattr(selftest, "LIMIT", 1.0)
        mark = tmp_path / "mark"
        later = f"import time; time.sleep(3); open({str(mark)!r}, 'w')"
        start = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {later!r}])"
        self.program_is(says("begins") + start)
        assert "did not end" in selftest.trusted(EagerBackend(), device)
        time.sleep(3)
        assert not mark.exists()

    @pytest.mark.parametrize(
        ("program", "reason"),
        [
            (says(told(unable="all devices are busy")), "cannot use the device: all devices"),
            (says("begins", told(unable="out of memory")), "cannot use the device: out of mem"),
            ("import nowhere", "before the test began: ModuleNotFoundError"),
            ("print('usage: program [file]')", "ended with exit code 0 before the test began"),
            ("import time; time.sleep(100)", "did not end within 1 s before the test began"),
        ],
        ids=["busy", "out of memory", "no package", "another program", "never begins"],
    )
    def test_where_nothing_was_tested_nothing_is_trusted_or_kept(self, device, program, reason):
        self.patch.setattr(selftest, "LIMIT", 1.0)
        self.program_is(program)
        said = selftest.trusted(EagerBackend(), device)
        assert reason in said and "run `python -m lora_kernels selftest`" in said
        assert not self.folder.exists()
        self.program_is(RIGHT)
        selftest._verdict.cache_clear()
        assert selftest.trusted(EagerBackend(), device) is None

    @pytest.mark.parametrize(
        ("executable", "frozen", "reason"),
        [
            (None, False, "has no Python interpreter"),
            (sys.executable, True, "has no Python interpreter"),
            ("/nowhere/python", True, "none could be started"),
        ],
    )
    def test_a_program_without_an_interpreter(self, device, executable, frozen, reason):
        self.patch.setattr(selftest, "get_executable", lambda: executable)
        self.patch.setattr(sys, "frozen", frozen, raising=False)
        assert reason in selftest.trusted(EagerBackend(), device)
        assert not self.folder.exists() and self.runs == 0

    def test_the_command_line_keeps_a_verdict(self, device):
        """For where no second process can open the device; and a new one after a failure."""
        backend = EagerBackend()
        for failure in ("y is off", None):
            selftest.keep(backend, 0, failure)
            selftest._verdict.cache_clear()
            assert selftest.trusted(backend, device) == failure
        assert self.runs == 0

    def test_threads_wait_for_one_test(self, device):
        backend, found = EagerBackend(), []
        threads = [
            threading.Thread(target=lambda: found.append(selftest.trusted(backend, device)))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [None] * 4 and self.runs == 1

    @pytest.mark.parametrize(
        "changed", ["name", "major", "minor", "driver", "torch", "triton", "lora-kernels"]
    )
    def test_another_device_or_version_means_another_test(self, device, changed):
        backend, version = EagerBackend(), selftest.importlib.metadata.version
        selftest.trusted(backend, device)
        if hasattr(self.properties, changed):
            setattr(self.properties, changed, "another")
        elif changed == "driver":
            self.patch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 99, raising=False)
        elif changed == "torch":
            self.patch.setattr(torch, "__version__", "another")
        else:
            self.patch.setattr(
                selftest.importlib.metadata, "version", lambda n: "another" if n == changed else version(n)
            )  # fmt: skip
        selftest.trusted(backend, device)
        assert self.runs == 2

    def test_damage_in_the_cache_means_another_test(self, device):
        backend = EagerBackend()
        selftest.trusted(backend, device)
        for file in self.folder.iterdir():
            file.write_text("{")
        selftest._verdict.cache_clear()
        assert selftest.trusted(backend, device) is None
        assert self.runs == 2

    def test_a_cache_that_cannot_be_written_is_no_error(self, device, monkeypatch):
        monkeypatch.setenv("LORA_KERNELS_CACHE", "/proc/nowhere")
        assert selftest.trusted(EagerBackend(), device) is None


class TestAnswer:
    """What the process of a self-test does, here in this one."""

    @pytest.fixture(autouse=True)
    def devices(self, monkeypatch):
        """Three pretended GPUs, on which problems of one type are computed on the CPU."""
        monkeypatch.setattr(selftest, "_DTYPES", selftest._DTYPES[:1])
        run, zeros = selftest.run, torch.zeros
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"GPU-{index}")
        )
        self.opened = []
        monkeypatch.setattr(
            torch, "zeros", lambda *n, device=None, **k: self.opened.append(device) or zeros(*n, **k)
        )  # fmt: skip
        monkeypatch.setattr(selftest, "run", lambda backend, device: run(backend, "cpu"))

    def answers(self, capsys, *asked):
        selftest.answer(*asked)
        lines = capsys.readouterr().out.splitlines()
        said = [s.removeprefix(selftest._MARK) for s in lines if s.startswith(selftest._MARK)]
        return said[:-1], json.loads(said[-1])

    @pytest.mark.parametrize("uuid", ["GPU-0", "GPU-1", "GPU-2"])
    def test_the_device_is_found_by_its_name(self, capsys, uuid):
        """Its number may be another one, where CUDA_VISIBLE_DEVICES has changed."""
        assert self.answers(capsys, "eager", 1, uuid) == (["begins"], json.loads(told()))
        assert self.opened[0] == torch.device("cuda", int(uuid[-1]))

    def test_a_device_that_is_not_there_cannot_be_used(self, capsys):
        before, answer = self.answers(capsys, "eager", 0, "GPU-9")
        assert not before and answer["failure"] is None and "GPU-9" in answer["unable"]

    @pytest.mark.parametrize(
        ("error", "verdict"),
        [
            (RuntimeError("an illegal memory access\nmore"), "failure"),
            (torch.OutOfMemoryError("no memory"), "unable"),
        ],
    )
    def test_a_backend_that_raises(self, capsys, monkeypatch, error, verdict):
        def raises(*args, **kwargs):
            raise error

        monkeypatch.setattr(EagerProducts, "expand", raises)
        before, answer = self.answers(capsys, "eager", 0, "GPU-0")
        name, text = type(error).__name__, str(error).splitlines()[0]
        assert before == ["begins"] and answer.pop(verdict).endswith(f"{name}: {text}")
        assert list(answer.values()) == [None]

    def test_a_wrong_result(self, capsys, monkeypatch):
        monkeypatch.setattr(backends, "get", lambda name: Broken("wgrad", 16))
        _, answer = self.answers(capsys, "eager", 0, "GPU-0")
        assert "its self-test failed" in answer["failure"] and "is off by more" in answer["failure"]
        assert answer["unable"] is None


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_real_process_has_this_ones_path_and_finds_no_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(selftest, "_uuid", lambda index: "GPU-1")
    (tmp_path / "json.py").write_text("raise SystemExit('shadowed')")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(selftest.NoVerdictError, match="no device 0 with uuid GPU-1 among 0"):
        selftest._failure_elsewhere("eager", 0)
