"""What the interpreter's tests share: the Triton backend on CPU tensors, with tiles so small that small problems need many.

Nothing in the package lets Triton compute on the CPU. Here two of its seams are replaced for a test: `current_target`, which
asks a GPU what it is, and the list of backends that dispatch offers to CPU tensors.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from lora_kernels import dispatch
from lora_kernels.backends import triton as backend_module
from lora_kernels.problem import Problem
from lora_kernels.tuning.config import DECODE_ROWS, FUSED_RANK, TileConfig
from lora_kernels.tuning.select import Choice
from lora_kernels.tuning.targets import TARGETS, Target

if importlib.util.find_spec("triton") is None:  # an optional dependency
    collect_ignore_glob = ["test_*.py"]

VARIANTS = {  # name -> (algorithm, target, changes to the small tiles by kernel)
    "two_kernel": ("two_kernel", "sm_80", {}),
    "tma": ("two_kernel", "sm_90", {"expand": {"tma": True}, "shrink": {"split": 1}}),
    "one_pass": ("one_pass", "sm_80", {}),
    "decode": ("decode", "sm_80", {}),
}
_TILES = (
    TileConfig("shrink", 32, 1, 32, 4, 2, split=3, rank_chunk=32),
    TileConfig("expand", 32, 32, 32, 4, 2, group_m=2, rank_chunk=16),
    TileConfig("one_pass", 32, 32, 32, 4, 2, group_m=2, rank_chunk=32),
    TileConfig("decode", DECODE_ROWS, 32, 32, 4, 2, split=2, rank_chunk=FUSED_RANK),
    TileConfig("wgrad", 16, 32, 16, 4, 2, split=2, rank_chunk=32),
    TileConfig("shrink_wgrad", 16, 32, 16, 4, 2, split=3, rank_chunk=FUSED_RANK),
)


def small_tiles(changes: dict[str, dict] | None = None) -> Callable[..., Choice]:
    """A stand-in for `select` with tiles of 16 and 32, changed as told."""
    configs = tuple(replace(c, **(changes or {}).get(c.kernel, {})) for c in _TILES)

    def select(
        problem: Problem, target: Target, algorithm: str | None = None, among: tuple[str, ...] = ()
    ) -> Choice:
        if algorithm == "decode" and (
            problem.M > DECODE_ROWS or problem.R > FUSED_RANK or problem.dropout
        ):
            raise ValueError("decode cannot")
        if problem.R > FUSED_RANK:
            fitting = tuple(c for c in configs if c.kernel not in ("decode", "shrink_wgrad"))
            return Choice("two_kernel", "test", fitting)
        return Choice(algorithm or "two_kernel", "test", configs)

    return select


@pytest.fixture(autouse=True)
def _lane():
    """The patched interpreter, and new tensors full of NaN, so that an element nobody writes is seen."""
    from tests.interpreter import strict

    strict.install()
    torch.use_deterministic_algorithms(True)
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def triton_backend(monkeypatch):
    """Makes the backend of a variant: `triton_backend("tma")`; CPU tensors may ask for "triton" by name from then on."""

    def make(variant: str, **changes: dict) -> backend_module.TritonBackend:
        algorithm, target, own = VARIANTS[variant]
        on_target(monkeypatch, target)
        monkeypatch.setattr(backend_module, "select", small_tiles({**own, **changes}))
        made = backend_module.TritonBackend(algorithm)
        monkeypatch.setattr(backend_module, "BACKEND", made)
        return made

    yield make
    dispatch._backend.cache_clear()


def on_target(monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    """The GPU is `target`, and CPU tensors count as being on it."""
    monkeypatch.setattr(backend_module, "current_target", lambda *device: TARGETS[target])
    monkeypatch.setattr(dispatch, "_PREFERENCE", {"cpu": ("triton", "eager")})
    # A question of bytes, not of results, which small tiles always answer with no.
    monkeypatch.setattr(backend_module, "one_reading_pays", lambda itemsize, R, *rest: R <= 40)
    dispatch._backend.cache_clear()
