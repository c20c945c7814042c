"""The search for tiles: whatever the times are, the fastest choice that works becomes the table's, and is found again."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_kernels import plan
from lora_kernels.backends.triton.configs import lowrank_tiles, tiles_for, tiles_of
from lora_kernels.problem import Problem
from lora_kernels.tuning import cost, tables
from lora_kernels.tuning.config import fits
from lora_kernels.tuning.search import _splits, search, search_lowrank
from lora_kernels.tuning.tables import lowrank
from lora_kernels.tuning.targets import TARGETS
from tests.test_tuning import select

PROBLEMS = [
    Problem(16, 4096, 4096, 16, "bfloat16", "bfloat16", "cuda"),
    Problem(2048, 1024, 4096, 64, "bfloat16", "float32", "cuda"),
    Problem(256, 768, 768, 8, "float32", "float32", "cuda", w_k_major=False),
]


pytestmark = pytest.mark.usefixtures("machine")


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
    entry, done = search(problem, target, lambda choices: [next(left) for _ in choices], tiles_of)
    assert done[-1].choice.algorithm == "eager"
    working = [timed for timed in done if timed.us is not None]
    if not working:
        assert entry is None
        return
    assert entry.times.keys() == {timed.choice.algorithm for timed in working}
    for algorithm, us in entry.times.items():
        assert us == min(timed.us for timed in working if timed.choice.algorithm == algorithm)
    best = min(working, key=lambda timed: timed.us)
    for config in best.choice.tiles.configs:
        assert config in entry.configs
    tried = {config for timed in working for config in timed.choice.tiles.configs}
    assert set(entry.configs) <= tried  # a tile that never worked is in no table
    assert len({config.kernel for config in entry.configs}) == len(entry.configs)
    assert all(fits(config, problem, target) is None for config in entry.configs)


def test_every_choice_is_measured_once():
    problem, target = PROBLEMS[0], TARGETS["sm_90"]
    asked = []

    def measure(choices):
        asked.extend(choices)
        return [1.0] * len(choices)

    search(problem, target, measure, tiles_of)
    assert len(asked) == len(set(asked))
    assert set(cost.ALGORITHMS) == {choice.algorithm for choice in asked}
    for algorithm, kernel in (("two_kernel", "shrink"), ("decode", "decode")):
        splits = {c.tiles.config(kernel).split for c in asked if c.algorithm == algorithm}
        assert len(splits) > 1


@pytest.mark.parametrize("algorithm", ["two_kernel", "one_pass", "eager"])
def test_select_takes_what_was_found(algorithm):
    problem, target = PROBLEMS[1], TARGETS["sm_80"]
    entry, _ = search(
        problem, target, lambda cs: [1.0 if c.algorithm == algorithm else 2.0 for c in cs], tiles_of
    )
    tables.save([entry], target)
    for same in (problem, replace(problem, M=1500, bias=True)):
        chosen = select(same, target)
        assert (chosen.name, chosen.measured_us) == (algorithm, 1.0)
        assert set(entry.configs) <= set(tiles_for(same, target).configs)
    backward = replace(problem, backward=True)
    chosen = select(backward, target)
    assert chosen.measured_us and set(entry.configs) <= set(tiles_for(backward, target).configs)
    assert chosen.name == ("two_kernel" if algorithm == "one_pass" else algorithm)
    for other in (replace(problem, w_k_major=False), replace(problem, N=1025)):
        assert all(c.measured_us is None for c in plan.predict(other, target))


def test_who_asks_gets_the_fastest_that_it_can_run(machine):
    """One table: the CUDA backend's kernel stands in it beside Triton's, which count only where Triton runs."""
    problem, target = PROBLEMS[0], TARGETS["sm_90"]
    times = {"two_kernel": 40.0, "one_pass": "off by 3.0", "decode": 12.0, "eager": 20.0}
    times |= {"cuda_decode": 11.0, "persistent": 30.0}
    times |= {"one_launch": 31.0, "persistent_one_launch": 31.0}
    entry, _ = search(problem, target, lambda cs: [times[c.algorithm] for c in cs], tiles_of)
    tables.save([entry], target)
    told = plan.explain(problem)
    assert told.candidate.name == "cuda_decode" and "one_pass" not in told.plan
    assert "measured: cuda_decode 11.0 us, decode 12.0 us, eager 20.0 us" in told.plan
    assert plan.explain(problem, "eager").candidate.name == "eager"
    forced = plan.explain(problem, "triton", "two_kernel")
    assert forced.plan.endswith(", measured: two_kernel 40.0 us")
    machine.missing.add("cuda")
    told = plan.explain(problem)
    assert told.candidate.name == "decode" and told.rejected["cuda"] == "it rains"
    assert told.rejected["eager"] == "decode is measured faster: 12.0 us, not 20.0 us"
    machine.missing.add("triton")
    assert plan.explain(problem).candidate.name == "eager"


def test_what_was_not_measured_is_not_taken():
    """A kernel that was wrong on this device is in no table, and the model does not bring it back."""
    problem, target = PROBLEMS[0], TARGETS["sm_90"]
    works = {"eager": 20.0}
    entry, _ = search(
        problem, target, lambda cs: [works.get(c.algorithm, "wrong") for c in cs], tiles_of
    )
    assert entry.configs == () and entry.times == works
    tables.save([entry], target)
    told = plan.explain(problem)
    assert (told.candidate.name, told.candidate.measured_us) == ("eager", 20.0)
    why = "eager is measured faster: 20.0 us, it has no such time"
    assert told.rejected["triton"] == why
    assert told.rejected["cuda"].startswith("it is taken where `tune` has timed it")


def test_lowrank_kernels_get_a_tile_and_a_split_of_their_own():
    problem, target = PROBLEMS[1], TARGETS["sm_90"]
    asked, wanted = [], {"shrink": 4, "wgrad": 2, "shrink_wgrad": 1}

    def measure(choices):
        asked.extend(choices)
        return [2.0 - (c.tiles.configs[0].split == wanted[c.algorithm]) for c in choices]

    entry, done = search_lowrank(replace(problem, M=1500), target, measure, tiles_of)
    assert len(asked) == len(set(asked)) == len(done)
    assert entry.problem == lowrank(problem) and entry.problem.N == 0
    assert entry.times == {"shrink": 1.0, "wgrad": 1.0, "shrink_wgrad": 1.0}
    assert {c.kernel: c.split for c in entry.configs} == wanted
    tables.save([entry], target)
    for asks in (problem, problem.adjoint().adjoint(), replace(problem, M=1100, dropout=True)):
        tiles = lowrank_tiles(lowrank(asks), target)
        assert set(entry.configs) <= set(tiles.configs) and tiles.measured == entry.times
    assert not lowrank_tiles(replace(problem, K=1024), target).measured


@pytest.mark.parametrize("kernel", ["shrink", "decode", "wgrad", "shrink_wgrad"])
def test_a_sum_is_split_until_each_part_has_one_step(kernel):
    """Over K, or over M where the sum is over rows; every split is the same code and is timed."""
    tile = tiles_of(kernel, PROBLEMS[0], TARGETS["sm_90"])[0]
    rows = kernel in ("wgrad", "shrink_wgrad")
    sizes = {"M": 4 * tile.block_m} if rows else {"K": 4 * tile.block_k, "M": 16}
    found = list(_splits([tile], replace(PROBLEMS[0], **sizes), TARGETS["sm_90"]))
    assert [config.split for config in found] == [1, 2, 4]
    assert {replace(config, split=tile.split) for config in found} == {tile}


def test_rows_are_taken_to_their_bucket():
    entry, _ = search(
        replace(PROBLEMS[1], M=1025), TARGETS["sm_80"], lambda cs: [1.0] * len(cs), tiles_of
    )
    assert entry.problem.M == 2048
