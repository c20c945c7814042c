"""The search for tiles: whatever the times are, the fastest choice that works becomes the table's, and is found again."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_kernels.problem import Problem
from lora_kernels.tuning import select as selection
from lora_kernels.tuning import tables
from lora_kernels.tuning.config import fits
from lora_kernels.tuning.search import search
from lora_kernels.tuning.targets import TARGETS

PROBLEMS = [
    Problem(16, 4096, 4096, 16, "bfloat16", "bfloat16", "cuda"),
    Problem(2048, 1024, 4096, 64, "bfloat16", "float32", "cuda"),
    Problem(256, 768, 768, 8, "float32", "float32", "cuda", w_k_major=False),
]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path))
    selection._select.cache_clear()
    yield
    selection._select.cache_clear()


@given(
    problem=st.sampled_from(PROBLEMS),
    target=st.sampled_from(["sm_80", "sm_90", "gfx942"]),
    times=st.lists(
        st.one_of(st.floats(1, 1e3), st.just("wrong")), min_size=40, max_size=40, unique_by=id
    ),
)
@settings(max_examples=60, deadline=None)
def test_the_fastest_that_works_is_written_down(problem, target, times):
    target = TARGETS[target]
    left = iter(times)
    entry, done = search(problem, target, lambda choices: [next(left) for _ in choices])
    assert done[-1].choice.algorithm == "aten"
    working = [timed for timed in done if timed.us is not None]
    tiled = [timed for timed in working if timed.choice.configs]
    if not tiled:
        assert entry is None
        return
    best = min(working, key=lambda timed: timed.us)
    assert entry.algorithm == best.choice.algorithm
    for config in best.choice.configs:
        assert config in entry.configs
    tried = {config for timed in tiled for config in timed.choice.configs}
    assert set(entry.configs) <= tried  # a tile that never worked is in no table
    assert len({config.kernel for config in entry.configs}) == len(entry.configs)
    assert all(fits(config, problem, target) is None for config in entry.configs)


def test_every_choice_is_measured_once():
    problem, target = PROBLEMS[0], TARGETS["sm_90"]
    asked = []

    def measure(choices):
        asked.extend(choices)
        return [1.0] * len(choices)

    search(problem, target, measure)
    assert len(asked) == len(set(asked))
    assert {"two_kernel", "one_pass", "decode", "aten"} == {choice.algorithm for choice in asked}
    assert len({c.config("shrink").split for c in asked if c.algorithm == "two_kernel"}) > 1


@pytest.mark.parametrize("algorithm", ["two_kernel", "one_pass", "aten"])
def test_select_takes_what_was_found(algorithm):
    problem, target = PROBLEMS[1], TARGETS["sm_80"]
    entry, _ = search(
        problem, target, lambda cs: [1.0 if c.algorithm == algorithm else 2.0 for c in cs]
    )
    tables.save([entry], target)
    for same in (problem, replace(problem, M=1500, bias=True), replace(problem, backward=True)):
        chosen = selection.select(same, target)
        assert (chosen.algorithm, chosen.source) == (algorithm, "tuned")
        assert set(entry.configs) <= set(chosen.configs)
    for other in (replace(problem, w_k_major=False), replace(problem, N=1025)):
        assert selection.select(other, target).source == "cost model"


def test_rows_are_taken_to_their_bucket():
    entry, _ = search(replace(PROBLEMS[1], M=1025), TARGETS["sm_80"], lambda cs: [1.0] * len(cs))
    assert entry.problem.M == 2048
