"""Calls that compile are made beside each other, once each, before they count."""

from __future__ import annotations

import threading
from contextlib import contextmanager

import pytest
import torch

from lora_kernels.ahead import compile_ahead


@pytest.fixture
def gpus(monkeypatch):
    """The devices that were entered, as on a machine with several."""
    entered = []

    @contextmanager
    def device(index):
        entered.append(index)
        yield

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return entered


@pytest.mark.parametrize("device, index", [("cuda", 3), ("cuda:1", 1)])
def test_each_is_made_once_whatever_the_others_do(gpus, device, index):
    made = []

    def call(number):
        made.append(number)
        if number % 2:
            raise torch.OutOfMemoryError("there is none")

    compile_ahead(((lambda n=n: call(n)) for n in range(20)), torch.device(device))
    assert sorted(made) == list(range(20)) and gpus == [index] * 20


def test_they_are_made_beside_each_other(gpus, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    met = []
    both = threading.Barrier(2, timeout=10)
    compile_ahead([lambda: met.append(both.wait())] * 2, torch.device("cuda"))
    assert sorted(met) == [0, 1]


def test_nothing_is_made_where_nothing_is_compiled(gpus):
    made = []
    compile_ahead([lambda: made.append(1)], torch.device("cpu"))
    assert made == gpus == []
