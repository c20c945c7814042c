"""The self-test: it passes what is right, notices what is wrong, and its verdict decides and is kept."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import pytest
import torch

from lora_kernels import plan, selftest
from lora_kernels.backends.base import Candidate
from lora_kernels.backends.eager import EagerBackend, EagerProducts


def test_every_backend_passes_here(backend):
    results = selftest.run(plan.get(backend), "cpu")
    assert {r.tensor for r in results} == {"y", "dx", "dA", "dB"}
    assert len(results) >= 16
    failed = [str(r) for r in results if not r.passed]
    assert not failed, "\n".join(failed)


class BrokenProducts(EagerProducts):
    """Wrong in one product only."""

    def __init__(self, product):
        self.product = product

    def shrink(self, x, adapter):
        s = super().shrink(x, adapter)
        return s * 1.01 if self.product == "shrink" else s

    def expand(self, *args):
        y = super().expand(*args)
        if self.product == "nan":
            y[-1, -1] = float("nan")
        if self.product == "raises":
            raise RuntimeError("an illegal memory access was encountered\nmore")
        return y * 1.02 if self.product == "expand" else y

    def wgrad(self, *args):
        out = super().wgrad(*args)
        return out * 1.02 if self.product == "wgrad" else out


class Broken(EagerBackend):
    """A backend whose products are wrong in one of them."""

    def __init__(self, product):
        self.products = BrokenProducts(product)

    def candidates(self, problem, target):
        return [Candidate("broken", self.products)]


@pytest.mark.parametrize("product", ["shrink", "expand", "wgrad", "nan"])
def test_a_broken_product_is_noticed(product):
    results = selftest.run(Broken(product), "cpu")
    assert any(not r.passed for r in results)
    assert all(r.passed for r in selftest.run(Broken("none"), "cpu"))


class TestVerdict:
    @pytest.fixture
    def device(self, monkeypatch, tmp_path):
        """A pretended GPU on which the problems are computed on the CPU."""
        run = selftest.run
        properties = SimpleNamespace(name="Pretended", major=9, minor=0)
        monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda index: None)
        self.runs = []
        monkeypatch.setattr(selftest, "run", lambda b, d: self.runs.append(b) or run(b, "cpu"))
        selftest._verdict.cache_clear()
        self.properties, self.folder = properties, tmp_path / "selftest"
        yield torch.device("cuda", 0)
        selftest._verdict.cache_clear()

    def test_a_right_backend_is_tested_once_and_trusted(self, device):
        backend = Broken("none")
        assert selftest.trusted(backend, device) is None
        selftest._verdict.cache_clear()  # a new process
        assert selftest.trusted(backend, device) is None
        assert len(self.runs) == 1
        (file,) = self.folder.iterdir()
        assert json.loads(file.read_text())["failure"] is None

    def test_a_wrong_backend_is_refused_with_a_warning_once(self, device, caplog):
        backend = Broken("shrink")
        with caplog.at_level(logging.WARNING, "lora_kernels"):
            for _ in range(3):
                reason = selftest.trusted(backend, device)
        assert "its self-test failed" in reason and "is off by more than" in reason
        assert len(caplog.records) == 1 and len(self.runs) == 1

    def test_a_backend_that_raises_is_refused(self, device):
        reason = selftest.trusted(Broken("raises"), device)
        assert (
            reason == "its self-test raised RuntimeError: an illegal memory access was encountered"
        )

    def test_another_device_or_damage_in_the_cache_means_another_test(self, device):
        backend = Broken("none")
        selftest.trusted(backend, device)
        self.properties.name = "Another"
        selftest.trusted(backend, device)
        assert len(self.runs) == 2
        for file in self.folder.iterdir():
            file.write_text("{")
        selftest._verdict.cache_clear()
        assert selftest.trusted(backend, device) is None
        assert len(self.runs) == 3

    def test_a_cache_that_cannot_be_written_is_no_error(self, device, monkeypatch):
        monkeypatch.setenv("LORA_KERNELS_CACHE", "/proc/nowhere")
        assert selftest.trusted(Broken("none"), device) is None

    def test_an_earlier_kernels_error_is_no_verdict(self, device, monkeypatch):
        def synchronize(index):
            raise RuntimeError("an illegal memory access was encountered")

        monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
        with pytest.raises(RuntimeError, match="illegal memory access"):
            selftest.trusted(Broken("none"), device)
        assert not self.runs and not self.folder.exists()

    def test_nothing_is_tested_while_a_graph_is_captured(self, device, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert "CUDA graph" in selftest.trusted(Broken("none"), device)
        assert not self.runs and not self.folder.exists()
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        assert selftest.trusted(Broken("none"), device) is None
