"""What the interpreter's tests share: Triton on CPU tensors, with tiles so small that small problems need many."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from lora_kernels import plan
from lora_kernels.backends import triton as backend_module
from lora_kernels.backends.triton import configs, products
from lora_kernels.problem import DENSE, Problem
from lora_kernels.tuning.config import (
    DECODE_ROWS,
    FUSED_RANK,
    GROUPED_KERNELS,
    KERNELS,
    TileConfig,
    Tiles,
)
from lora_kernels.tuning.targets import TARGETS, Target
from tests import pretended
from tests.planned import Planned

if importlib.util.find_spec("triton") is None:  # an optional dependency
    collect_ignore_glob = ["test_*.py"]

VARIANTS = {  # name -> (algorithm, target, changes to the small tiles by kernel)
    "two_kernel": ("two_kernel", "sm_80", {}),
    "tma": ("two_kernel", "sm_90", {"expand": {"tma": True}, "shrink": {"split": 1}}),
    "one_launch": ("one_launch", "sm_80", {}),
    "one_pass": ("one_pass", "sm_80", {}),
    "decode": ("decode", "sm_80", {}),
}
_TILES = (
    TileConfig("shrink", 32, 1, 32, 4, 2, split=3, rank_chunk=32),
    TileConfig("expand", 32, 32, 32, 4, 2, group_m=2, rank_chunk=16),
    TileConfig("one_launch", 32, 32, 32, 4, 2, group_m=2, rank_chunk=16),
    TileConfig("one_pass", 32, 32, 32, 4, 2, group_m=2, rank_chunk=32),
    TileConfig("decode", DECODE_ROWS, 32, 32, 4, 2, split=2, rank_chunk=FUSED_RANK),
    TileConfig("wgrad", 16, 32, 16, 4, 2, split=2, rank_chunk=32),
    TileConfig("shrink_wgrad", 16, 32, 16, 4, 2, split=3, rank_chunk=FUSED_RANK),
    TileConfig("dequantise", 1, 64, 64, 4, 1),
)


def small_tiles(changes: dict[str, dict] | None = None) -> Callable[..., Tiles]:
    """A stand-in for `tiles_for` with tiles of 16 and 32, with `changes` by kernel."""
    configs = tuple(replace(c, **(changes or {}).get(c.kernel, {})) for c in _TILES)

    def tiles_for(problem: Problem, target: Target) -> Tiles:
        able = set(KERNELS)
        if problem.R > FUSED_RANK:
            able -= {"decode", "shrink_wgrad"}
        if problem.weight_format == DENSE:
            able -= {"dequantise"}
        packed = problem.weight_format != DENSE
        straddles = problem.weight_format == "nf4" and problem.K % 64 != 0
        if problem.M > DECODE_ROWS or problem.dropout or straddles:
            able -= {"decode"}
        if packed and not problem.w_k_major:
            able -= {"decode"}
        if problem.groups:
            able &= set(GROUPED_KERNELS)
        return Tiles(tuple(config for config in configs if config.kernel in able))

    return tiles_for


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
def triton_products(monkeypatch):
    """Makes the products of a variant, as `triton_products("tma")`; "triton" then takes its algorithm on CPU tensors."""

    def make(variant: str, **changes: dict) -> Planned:
        algorithm, target, own = VARIANTS[variant]
        on_target(monkeypatch, target, algorithm)
        monkeypatch.setattr(configs, "tiles_for", small_tiles({**own, **changes}))
        return Planned(backend_module.BACKEND, TARGETS[target], algorithm)

    yield make
    plan.forget()


def on_target(monkeypatch: pytest.MonkeyPatch, target: str, algorithm: str | None = None) -> None:
    """`on_target` of tests/pretended.py, for what the interpreter runs."""
    pretended.on_target(monkeypatch, target, algorithm)
    monkeypatch.setattr(configs, "untried", lambda *_: "the interpreter does not run Gluon")
    # A question of bytes, not of results, which small tiles always answer with no.
    monkeypatch.setattr(products, "one_reading_pays", lambda itemsize, R, *rest: R <= 40)
