"""What the device's tests share: they are skipped where PyTorch finds no GPU; each GPU backend that can run there."""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Callable
from typing import TypeVar

import pytest
import torch

from lora_kernels import backends, env
from lora_kernels.backends.base import fastest
from lora_kernels.backends.device import current_target
from lora_kernels.tuning.config import CUDA_DECODE_ROWS
from tests.planned import Planned

DEVICE = "cuda"
VERDICTS = env.cache_dir() / "selftest"  # before `_own_cache` puts another folder in its place
T = TypeVar("T")


def pytest_addoption(parser):
    parser.addoption("--require", default="", help="backends that must be there, as triton,cuda")
    parser.addoption("--part", default="1/1", help="I/N: the I-th of N parts of the device's tests")


def pytest_collection_modifyitems(config, items):
    own = [item for item in items if item.path.is_relative_to(__file__.rpartition("/")[0])]
    part, parts = map(int, config.getoption("part", "1/1").split("/"))
    others = {item for item in own if zlib.crc32(item.nodeid.encode()) % parts != part - 1}
    items[:] = [item for item in items if item not in others]
    if not torch.cuda.is_available():
        for item in own:
            item.add_marker(pytest.mark.skip(reason="there is no GPU"))


@pytest.fixture(autouse=True, scope="session")
def _verdicts(_own_cache):
    """What `selftest` found just before: each part would find it again, for half a minute, beside the others."""
    if VERDICTS.exists():
        shutil.copytree(VERDICTS, env.cache_dir() / "selftest")


@pytest.fixture
def usable(request):
    """Gives the backend of a name; where it is not available the test is skipped, or fails if --require names it."""

    def get(name):
        backend = backends.get(name)
        reason = backend.unavailable()
        if reason is not None:
            required = name in request.config.getoption("--require").split(",")
            (pytest.fail if required else pytest.skip)(f"{name} backend: {reason}")
        return backend

    return get


@pytest.fixture
def triton_backend(usable):
    return usable("triton")


def captured(call: Callable[[], T], warm: int = 1) -> tuple[torch.cuda.CUDAGraph, T]:
    """A graph of `call` and its results, after so many calls beside the current stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


@pytest.fixture(params=["triton", "cuda"])
def gpu_backend(request, usable):
    """A backend that computes on GPU tensors here, without asking for its self-test's verdict."""
    return usable(request.param)


def declined(backend, problem):
    """Why `backend` refuses `problem`, or None: exactly where its limits say so."""
    offered = backend.candidates(problem, current_target())
    reason = None if fastest(offered) is not None else offered[0].refusal
    if backend.name == "cuda":
        limited = problem.M > CUDA_DECODE_ROWS or problem.dropout
    else:
        limited = problem.dtype == "float32" and current_target().name == "gfx1100"
    assert (reason is not None) == limited, f"{backend.name} for {problem}: {reason}"
    return reason


@pytest.fixture
def gpu_products(gpu_backend):
    """Its products, without asking for its self-test's verdict."""
    return Planned(gpu_backend, current_target())


@pytest.fixture(autouse=True)
def _float32_is_float32():
    """Budgets are eager's error; TF32 would make that of float32 a thousand times larger."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)
