"""What every test shares: a seed, a cache folder of its own, no network, and which backends run on this machine's CPU."""

from __future__ import annotations

import gc
import os
from importlib.metadata import version
from types import SimpleNamespace

# Tests run in several processes beside each other: a thread that waits must not keep a core busy. Read when torch loads.
os.environ["OMP_WAIT_POLICY"] = "passive"
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import pytest

from tests.artefacts import FOLDER, digest, sources

os.environ["HF_HUB_OFFLINE"] = "1"
# What compilers keep lies in this checkout. Triton's keys hold the whole source; Inductor's do not hold the operators that
# its code calls, so code compiled for an earlier version of this package must not be found.
os.environ["TRITON_CACHE_DIR"] = str(FOLDER / "triton")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(
    FOLDER / "inductor" / digest(version("torch"), *sources("lora_kernels"))
)
# Its key knows the forward graph alone: a compiled backward of an earlier version of this package would be run again.
os.environ["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "0"


def pytest_collection_finish():
    """The collector leaves alone what imports made, and comes less often: it took a third of the emulator's time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


@pytest.fixture(autouse=True)
def _seed():
    import torch  # not above: the process that hands out the tests needs none

    # For a GPU that has not been used torch.manual_seed keeps a traceback, each time: half a millisecond.
    (torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed)(0)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """Tuned tables and verdicts of the user's cache neither help nor hurt a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_KERNELS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with a GPU and nothing tuned: its `target` may be changed, and `missing` names backends that cannot run."""
    from lora_kernels import plan, selftest
    from lora_kernels.backends import cuda, triton
    from lora_kernels.tuning.targets import TARGETS

    made = SimpleNamespace(target="sm_90", missing=set())
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path))
    monkeypatch.delenv("LORA_KERNELS_BACKEND", raising=False)
    monkeypatch.setattr(plan, "current_target", lambda *device: TARGETS[made.target])
    monkeypatch.setattr(selftest, "trusted", lambda backend, device: None)
    for backend in (cuda.CudaBackend, triton.TritonBackend):
        monkeypatch.setattr(
            backend, "unavailable", lambda self: "it rains" if self.name in made.missing else None
        )
    plan.forget()
    yield made
    plan.forget()


@pytest.fixture
def fresh_dynamo():
    """What an earlier test compiled is not counted, and nothing is left for the next."""
    import torch

    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def trained_together(monkeypatch):
    """Projections of small problems are trained together too."""
    from lora_kernels import plan
    from lora_kernels.backends import cpu

    monkeypatch.setattr(cpu, "_TRAINED_TOGETHER", 0)
    plan.forget()
    yield
    plan.forget()


@pytest.fixture(params=["eager", "cpu"])
def backend(request):
    """The name of each backend that computes on CPU tensors here."""
    from lora_kernels import backends

    reason = backends.get(request.param).unavailable()
    if reason is not None:
        pytest.skip(f"{request.param} backend: {reason}")
    return request.param
