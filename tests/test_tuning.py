"""Targets, limits, the cost model and selection: numbers alone, no device and no Triton."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from random import Random

import pytest

from lora_kernels import plan
from lora_kernels.backends.base import fastest
from lora_kernels.backends.triton.configs import shipped, tiles_for, tiles_of
from lora_kernels.problem import Problem
from lora_kernels.tuning import cost, tables
from lora_kernels.tuning.config import (
    LOWRANK_KERNELS,
    TileConfig,
    fits,
    rank_block,
    row_blocks,
    runs_beside,
    shrink_beside,
    smem_bytes,
    waits_us,
)
from lora_kernels.tuning.cost import frozen_us, full_rate, predict_us, product_us, rate
from lora_kernels.tuning.cycles import Cycles, Tile, cycles, flops_per_clock, tiles
from lora_kernels.tuning.lowrank import lowrank_us
from lora_kernels.tuning.tables import Entry, bucket
from lora_kernels.tuning.targets import TARGETS, target_of

BIG = Problem(8192, 4096, 4096, 16, "bfloat16", "bfloat16", device="cuda")
TILE = TileConfig("expand", 128, 128, 32, 4, 4)


def select(problem, target, *names):
    """The fastest candidate of a machine with this GPU, among the algorithms of these names where there are any."""
    return fastest(c for c in plan.predict(problem, target) if not names or c.name in names)


OURS = ("two_kernel", "one_pass", "decode", "eager")  # what can run without the CUDA extension


def test_it_needs_neither_torch_nor_triton():
    folder = Path(__file__).parent.parent
    tuning = sorted(file.stem for file in (folder / "lora_kernels" / "tuning").glob("*.py"))
    names = [f"lora_kernels.tuning.{name}" for name in tuning if name != "__init__"]
    assert "lora_kernels.tuning.search" in names
    names.append("lora_kernels.backends.triton.configs")
    # The packages without their own __init__, which import torch.
    code = """if True:
        import sys, types
        for name in ("lora_kernels", "lora_kernels.backends", "lora_kernels.backends.triton"):
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__path__ = [name.replace(".", "/")]
    """
    code += f"\nimport {', '.join(names)}\nprint('torch' in sys.modules, 'triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    assert done.stdout.split() == ["False", "False"], done.stderr


class TestTargets:
    @pytest.mark.parametrize(
        "architecture, name",
        [
            ("sm_80", "sm_80"),
            ("sm_87", "sm_86"),
            ("sm_103", "sm_100"),
            ("sm_121", "sm_120"),
            ("gfx950", "gfx942"),
        ],
    )
    def test_an_unlisted_chip_is_like_the_nearest_older_one(self, architecture, name):
        assert target_of(architecture).name == name

    @pytest.mark.parametrize("architecture", ["sm_75", "gfx906", "cpu"])
    def test_older_ones_are_refused(self, architecture):
        with pytest.raises(ValueError, match=f"got '{architecture}'"):
            target_of(architecture)


class TestFits:
    @pytest.mark.parametrize(
        "change, rule",
        [
            ({"block_m": 96}, "block_m must be a power of two, got 96"),
            ({"num_warps": 0}, "num_warps must be a power of two, got 0"),
            ({"num_stages": -1}, "num_stages must be a positive integer, got -1"),
            ({"kernel": "gemm"}, "kernel must be one of"),
            ({"block_k": 8}, "at least 16"),
            ({"tma": True}, "sm_80 has no tensor descriptors"),
            ({"block_m": 256, "block_n": 256, "num_stages": 8}, "bytes of shared memory"),
        ],
    )
    def test_a_broken_rule_is_named(self, change, rule):
        assert fits(TILE, BIG, TARGETS["sm_80"]) is None
        assert rule in fits(replace(TILE, **change), BIG, TARGETS["sm_80"])

    def test_products_in_parts_keep_out_of_tensor_memory(self):
        """An older table may hold such a tile: the compiler lets the next step's parts overwrite what is still read."""
        mixed, sm_100 = replace(BIG, adapter_dtype="float32"), TARGETS["sm_100"]
        for kernel, sizes in (
            ("shrink", (64, 1, 32)),
            ("wgrad", (32, 64, 16)),
            ("shrink_wgrad", (32, 64, 16)),
        ):
            four, two = (TileConfig(kernel, *sizes, warps, 2) for warps in (4, 2))
            assert "has a race in tensor memory of sm_100" in fits(four, mixed, sm_100)
            assert fits(two, mixed, sm_100) is None
            assert fits(four, BIG, sm_100) is None and fits(four, mixed, TARGETS["sm_90"]) is None

    @pytest.mark.parametrize(
        "change, rule",
        [
            ({"ctas": 0}, "ctas of persistent on sm_100 must be one of (1, 2), got 0"),
            ({"kernel": "expand"}, "ctas of expand on sm_100 must be one of (0,), got 1"),
            ({"tma": False}, "persistent fetches by tensor descriptors"),
            ({"block_m": 256}, "two accumulators of 128 rows a CTA, got 256x256 by 1"),
            ({"block_n": 512}, "two accumulators of 128 rows a CTA, got 128x512 by 1"),
            ({"num_stages": 5}, "bytes of shared memory"),
        ],
    )
    def test_tensor_memory_has_rules_of_its_own(self, change, rule):
        tile = TileConfig("persistent", 128, 256, 64, 4, 4, tma=True, ctas=1)
        assert fits(tile, BIG, TARGETS["sm_100"]) is None
        assert rule in fits(replace(tile, **change), BIG, TARGETS["sm_100"])

    def test_decode_takes_few_rows_and_no_dropout(self):
        config = TileConfig("decode", 64, 32, 64, 4, 3)
        few = replace(BIG, M=64)
        assert fits(config, few, TARGETS["sm_90"]) is None
        assert "at most 64 rows, got 65" in fits(config, replace(few, M=65), TARGETS["sm_90"])
        assert "no dropout" in fits(config, replace(few, dropout=True), TARGETS["sm_90"])

    def test_decode_by_a_warp_group_has_a_race_on_sm_90(self):
        """For fewer than 64 ranks, or a packed weight; two warps, or a block of fewer columns, take no such instruction."""
        config, few = TileConfig("decode", 16, 64, 64, 4, 3), replace(BIG, M=16)
        for problem in (few, replace(few, R=64, weight_format="int8")):
            assert "a race in shared memory" in fits(config, problem, TARGETS["sm_90"])
            for other in (replace(config, num_warps=2), replace(config, block_n=32)):
                assert fits(other, problem, TARGETS["sm_90"]) is None
        assert fits(config, replace(few, R=64), TARGETS["sm_90"]) is None
        assert fits(config, few, TARGETS["sm_80"]) is None

    @pytest.mark.parametrize(
        "R, block", [(1, 16), (16, 16), (17, 32), (33, 64), (64, 64), (512, 64)]
    )
    def test_rank_blocks_are_powers_of_two_of_at_least_16(self, R, block):
        assert rank_block(R, 64) == block


class TestCost:
    def test_the_floor_is_arithmetic_or_bandwidth(self):
        h100 = TARGETS["sm_90"]
        assert frozen_us(BIG, h100) == pytest.approx(2 * 8192 * 4096 * 4096 / 798e6)
        one = replace(BIG, M=1)
        assert frozen_us(one, h100) == pytest.approx(one.frozen_bytes / (0.92 * 3000e3))

    @pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
    def test_no_form_beats_the_floor_and_every_pass_costs(self, target):
        for problem in (BIG, BIG.adjoint(), replace(BIG, M=128, R=64)):
            forms = "frozen", "eager", "addmm", "reference", "two_kernel"
            times = {form: predict_us(form, problem, target) for form in forms}
            assert min(times, key=times.__getitem__) == "frozen"
            assert times["eager"] < times["addmm"] < times["reference"]

    def test_more_rows_columns_terms_and_ranks_cost_more(self):
        target = TARGETS["sm_80"]
        for form in ("two_kernel", "one_pass", "eager", "reference"):
            base = predict_us(form, BIG, target)
            for name in ("M", "N", "K"):
                twice = replace(BIG, **{name: 2 * getattr(BIG, name)})
                assert predict_us(form, twice, target) > 1.5 * base
        wide, narrow = (predict_us("one_pass", replace(BIG, R=R), target) for R in (128, BIG.R))
        assert wide > narrow

    @pytest.mark.parametrize("K, N", [(4096, 4096), (4096, 14336), (14336, 4096)])
    def test_published_ratios_are_met(self, K, N):
        """Of eager and the frozen layer on an H100, within 5 %: 1.2 to 1.55 forward; backward, where alpha·dy
        passes over dy and the sum over dx, 1.4 to 1.75."""
        problem, h100 = replace(BIG, K=K, N=N), TARGETS["sm_90"]
        for each, least, most in ((problem, 1.14, 1.63), (problem.adjoint(), 1.33, 1.84)):
            assert least < predict_us("reference", each, h100) / frozen_us(each, h100) < most

    @pytest.mark.parametrize(
        "target, size, least, most",
        [
            ("sm_80", 4096, 0.89, 0.99),
            ("sm_90", 4096, 0.90, 0.98),
            ("sm_100", 4096, 0.53, 0.65),
            ("sm_100", 8192, 0.55, 0.70),
        ],
    )
    def test_published_triton_products_are_met(self, target, size, least, most):
        """The share of the library's rate that products with pointer loads, not persistent, were published to reach."""
        problem = replace(BIG, M=size, N=size, K=size)
        ours = product_us("expand", problem, TARGETS[target], pointers=True)
        assert least < frozen_us(problem, TARGETS[target]) / ours < most

    def test_published_gain_of_lorafusion_is_met(self):
        """Over eager 1.27 on average and 1.39 at most, forward and backward; the model was not set by it."""
        for size in (4096, 5120, 8192):
            problem = replace(BIG, N=size, K=size)
            eager, fused = (
                sum(predict_us(f, p, TARGETS["sm_90"]) for p in (problem, problem.adjoint()))
                for f in ("reference", "lorafusion")
            )
            assert 1.1 < eager / fused < 1.4

    @pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
    def test_no_tile_is_faster_than_its_matrix_pipe(self, target):
        for dtype in ("bfloat16", "float16", "float32"):
            for problem in (replace(BIG, dtype=dtype), replace(BIG, dtype=dtype).adjoint()):
                for tile in tiles("expand", problem, target.name):
                    assert 0 < rate(tile, problem, target) <= full_rate(tile, problem, target) < 1

    def test_a_tile_that_was_not_counted_is_scaled_from_its_neighbour(self):
        (counted,) = (t for t in tiles("expand", BIG, "sm_80") if t.config.block_m == 128)

        def changed(**sizes):
            return counted._replace(config=replace(counted.config, **sizes))

        known = cycles(counted, 16)
        deep = cycles(changed(block_k=64, num_stages=3), 16)
        assert deep == Cycles(tuple(2 * s for s in known.step), known.rest)
        wide = cycles(changed(block_n=256), 16)
        assert wide.step[0] == 2 * known.step[0] and wide.step[3] == 1.5 * known.step[3]
        assert wide.rest == tuple(2 * r for r in known.rest)
        assert cycles(counted, 8) == known  # a rank below 16 takes 16 columns

    def test_a_neighbour_of_the_same_kind_of_loads_goes_before(self):
        for tma in (False, True):
            same = [t for t in tiles("expand", BIG, "sm_90") if t.config.tma == tma]
            for tile in same:
                deep = replace(tile.config, block_k=2 * tile.config.block_k)
                assert cycles(tile._replace(config=deep), 16).rest == cycles(tile, 16).rest

    def test_two_blocks_overlap_where_a_multiprocessor_has_two_and_holds_both(self, monkeypatch):
        target = TARGETS["sm_90"]
        small = TileConfig("expand", 128, 128, 64, 4, 2)
        wide = replace(small, block_n=256)  # no registers for two accumulators
        monkeypatch.setattr(cost, "cycles", lambda *facts: Cycles((2.0, 1.0), (1.0, 4.0)))
        for config, each, expected in ((small, 1, 20.0), (small, 2, 17.0), (wide, 2, 20.0)):
            assert 2 * smem_bytes(config, BIG, target) <= target.smem_bytes
            tile = Tile.of(config, BIG, "sm_90")
            assert cost._block_cycles(tile, BIG, target, 8, each) == expected
        # Two accumulators of one block, in tensor memory.
        config = TileConfig("persistent", 256, 256, 64, 4, 6, tma=True, ctas=2)
        for each, expected in ((1, 20.0), (2, 17.0)):
            tile = Tile.of(config, BIG, "sm_100")
            assert cost._block_cycles(tile, BIG, TARGETS["sm_100"], 8, each) == expected

    def test_a_pair_of_ctas_takes_two_multiprocessors(self):
        target = TARGETS["sm_100"]
        pairs = target.multiprocessors // 2
        problem = Problem(256 * pairs, 256, 4096, 16, "bfloat16", "bfloat16", device="cuda")
        config = TileConfig("persistent", 256, 256, 64, 4, 6, tma=True, ctas=2)
        tile = Tile.of(config, problem, "sm_100")
        matrix, shared, *_ = cycles(tile, 16).step
        assert shared <= matrix == 2 * 256 * 256 * 64 / 8192 / 2
        own = rate(tile, problem, target)
        assert 0.9 < own <= full_rate(tile, problem, target) < 1
        more = replace(problem, M=problem.M + 1)  # a second tile for one of them
        assert rate(tile, more, target) == pytest.approx(own / 2, rel=0.05)
        # Not counted: scaled from its like.
        half = Tile.of(replace(config, block_n=128), problem, "sm_100")
        assert cycles(half, 16).step[0] == matrix / 2

    @pytest.mark.parametrize("target", ["sm_90", "sm_100"])
    def test_a_rank_tail_in_parts(self, target):
        """Three times the rank, in blocks of 64, on the matrix pipe; and a launch that makes parts of b."""
        own = TARGETS[target]
        wide = replace(BIG, adapter_dtype="float32")
        for R, blocks in ((16, 1), (64, 3)):
            for tile in tiles("persistent", wide, target):
                whole, config = tile._replace(types="bfloat16"), tile.config
                assert cycles(tile, R).step[0] == cycles(whole, R).step[0]
                block = 2 * config.block_m * config.block_n * 64 / max(1, config.ctas)
                per_clock = flops_per_clock(target, "bfloat16")
                assert cycles(tile, R).rest[0] == blocks * block / per_clock
        half = replace(wide, dtype="float16", adapter_dtype="float16")
        for problem in (wide, half, wide.adjoint()):
            two, one = (predict_us(name, problem, own) for name in ("two_kernel", "persistent"))
            before, after = (product_us(name, problem, own) for name in ("expand", "persistent"))
            assert one - two == pytest.approx(after - before + cost.MIN_KERNEL_US + own.gap_us)

    def test_what_x_a_adds_to_the_persistent_product_that_computes_it(self):
        """A clearing and a gap; and a block of rows by each program, unless those with a tile less do them all."""
        target, config = TARGETS["sm_90"], TileConfig("persistent", 128, 256, 64, 8, 3, tma=True)
        name, problem = "persistent_one_launch", replace(BIG, M=8192, N=4096, K=4096)
        own = replace(config, kernel=name)
        launch_us = cost.MIN_KERNEL_US + target.gap_us
        # Of 132 programs 32 have a tile less for 64 blocks, and at 9216 rows 36 for 72; at 8448 there is none.
        for rows, delayed in ((8192, False), (9216, False), (8448, True)):
            each = replace(problem, M=rows)
            main = product_us("persistent", each, target, config)
            added = predict_us(name, each, target, own) - main - launch_us
            clock_ghz = target.half_tflops * 1e3 / target.multiprocessors / 4096
            alone = 128 * each.K * 2 / (32 * clock_ghz * 1e3)
            assert added == pytest.approx(
                delayed * max(alone, rows * each.K * 2 / 0.9 / target.bandwidth_gbs / 1e3)
            )

    def test_what_is_added_to_the_product(self):
        """Its launches, what hides them, and the second reading of dy by what gets q and dB apart."""
        target = replace(TARGETS["sm_90"], gap_us=1000.0)
        main = product_us("expand", BIG, target)
        shrink = predict_us("lorafusion", BIG, target)
        shrink -= product_us("expand", BIG, target, pointers=True) + 1000.0
        ours = predict_us("two_kernel", BIG, target)
        assert ours == pytest.approx(main + shrink + 1000.0 - 0.5 * main)
        back = BIG.adjoint()
        pointers = product_us("expand", back, target, pointers=True)
        other = predict_us("lorafusion", back, target) - pointers
        assert other == pytest.approx(
            predict_us("two_kernel", back, target) - product_us("expand", back, target)
        )
        assert predict_us("decode", Problem(1, 16, 16, 1, "bfloat16", "bfloat16"), target) == 2.0

    def test_what_runs_beside_the_persistent_product(self):
        """The pipes of the busiest multiprocessor, a launch, and in a backward the rounding of s."""
        target, config = TARGETS["sm_90"], TileConfig("persistent", 128, 256, 64, 8, 3, tma=True)
        own = cycles(Tile.of(config, BIG, "sm_90"), 16)
        (shrink,) = tiles("shrink", BIG, "sm_90")
        # 1,024 tiles and 128 blocks of rows on 132 multiprocessors: the shared memory is the busiest.
        product_cycles = 8 * (64 * own.step[1] + own.rest[1])
        shared = 64 * cycles(shrink, 16).step[1] + cycles(shrink, 16).rest[1]
        main = product_us("persistent", BIG, target, config)
        assert predict_us("persistent", BIG, target, config) == pytest.approx(
            main * (1 + shared / product_cycles) + target.gap_us
        )
        back, (sums,) = BIG.adjoint(), tiles("wgrad", BIG.adjoint(), "sm_90")
        own, (shrink,) = cycles(Tile.of(config, back, "sm_90"), 16), tiles("shrink", back, "sm_90")
        product_cycles = 8 * (64 * own.step[1] + own.rest[1])
        shared = 64 * cycles(shrink, 16).step[1] + cycles(shrink, 16).rest[1]
        shared += 256 * cycles(sums, 16).step[1] + cycles(sums, 16).rest[1]  # 64 blocks of each
        main = product_us("persistent", back, target, config)
        assert predict_us("persistent", back, target, config) == pytest.approx(
            main * (1 + shared / product_cycles) + 2 * target.gap_us + cost.MIN_KERNEL_US
        )
        # Without room, for other types or beside a mask nothing of a backward is hidden.
        apart = predict_us("persistent", back, target, replace(config, num_stages=4))
        assert apart > predict_us("persistent", back, target, config) + 15
        # What memory cannot deliver in that time is waited for.
        slow = replace(target, bandwidth_gbs=500)
        moved = (back.frozen_bytes + back.lowrank_bytes + 3 * 8192 * 4096 * 2) / (0.92 * 500e3)
        assert predict_us("persistent", back, slow, config) > moved

    def test_where_low_rank_kernels_run_beside_the_persistent_product(self):
        """In one type, without a mask, by a wide tile; in a backward where dx takes longer than the sums of dB and dA."""
        wide, narrow = (
            TileConfig("persistent", 128, n, 64, 8, stages, tma=True)
            for n, stages in ((256, 3), (128, 4))
        )
        sm_90, sm_100 = TARGETS["sm_90"], TARGETS["sm_100"]
        pair = TileConfig("persistent", 256, 256, 64, 4, 5, tma=True, ctas=2)
        few, back = replace(BIG, M=2048), BIG.adjoint()
        assert runs_beside(wide, BIG, sm_90) and runs_beside(wide, few, sm_90)
        assert runs_beside(pair, BIG, sm_100) and not runs_beside(pair, few, sm_100)
        assert runs_beside(wide, back, sm_90) and not runs_beside(pair, back, sm_100)
        small, packed = replace(back, N=2048, K=2048), replace(back, weight_format="nf4")
        assert not runs_beside(wide, small, sm_90) and not runs_beside(wide, packed, sm_90)
        for other in ({"dropout": True}, {"R": 65}, {"adapter_dtype": "float32"}, {"M": 0}):
            assert not runs_beside(wide, replace(BIG, **other), sm_90)
        assert not runs_beside(narrow, BIG, sm_90)
        assert not runs_beside(replace(wide, num_stages=4), BIG, sm_90)

    def test_a_range_has_the_prediction_in_its_middle(self):
        """It is what a loop reaches of the library: nothing for the library itself, or where bytes decide."""
        for name, target in TARGETS.items():
            least, most = target.reaches
            assert 0.5 < least < most < 1.1, name
            quick, slow = cost.predict_range("two_kernel", BIG, target)
            assert quick < predict_us("two_kernel", BIG, target) < slow
            config = tiles_for(BIG, target).config("expand")
            quick, slow = (
                product_us("expand", BIG, replace(target, reaches=(share, share)), config)
                for share in (most, least)
            )
            assert slow / quick == pytest.approx(most / least)
            for form in ("eager", "frozen"):
                assert len(set(cost.predict_range(form, BIG, target))) == 1

    def test_what_the_first_programs_of_one_launch_cost(self):
        """Nothing where the last wave has a place for each; else the time of one, of its own reading or of all."""
        target = TARGETS["sm_80"]
        config = TileConfig("one_launch", 128, 128, 32, 4, 4)  # two on each of 108 multiprocessors
        free = Problem(8192, 4096, 4096, 16, "bfloat16", "bfloat16", device="cuda")
        # 2048 tiles in ten waves of 216.
        assert cost._first_us("expand", free, target, config) == 0.0
        full = replace(free, N=128 * 27 * 8)  # 64 blocks of rows: 64 waves
        read = full.M * full.K * 2 / (0.9 * target.bandwidth_gbs * 1e3)
        assert cost._first_us("expand", full, target, config) == pytest.approx(read)
        few = replace(full, M=128, N=128 * 216)
        alone = few.K * 128 * 2 / 1e3 / (32 * 270e3 / 108 / 2048)
        assert cost._first_us("expand", few, target, config) == pytest.approx(alone)
        ours = predict_us("one_launch", full, target, config)
        main = product_us("expand", full, target, config)
        assert ours == pytest.approx(main + read + cost.MIN_KERNEL_US + target.gap_us)

    def test_an_unknown_form_is_refused(self):
        with pytest.raises(ValueError, match="got 'magic'"):
            predict_us("magic", BIG, TARGETS["sm_80"])

    def test_the_cuda_kernel_reads_a_once_a_block_or_launches_for_it(self):
        few = Problem(8, 14336, 4096, 32, "bfloat16", "bfloat16", device="cuda")
        slow_l2 = replace(TARGETS["sm_90"], l2_gbs=1.0)
        a_us = few.K * few.R * 2 / 1e3
        assert predict_us("cuda_decode", few, slow_l2) == pytest.approx(112 * a_us + 0.5)
        target = TARGETS["sm_90"]
        fused_us = predict_us("cuda_decode", few, target)
        launch_us = cost.MIN_KERNEL_US + target.gap_us
        for change in ({"w_k_major": False}, {"adapter_dtype": "float32"}, {"R": 33}):
            apart = predict_us("cuda_decode", replace(few, **change), target)
            assert apart >= fused_us + launch_us


class TestSelect:
    @pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
    def test_a_mask_costs_eager_passes_and_others_none(self, target):
        """So with dropout a kernel that computes the mask is taken, for eager's formula too."""
        for M, N, K in ((8192, 4096, 4096), (512, 768, 768), (16, 4096, 4096)):
            plain = replace(BIG, M=M, N=N, K=K)
            for problem in (plain, plain.adjoint()):
                masked = replace(problem, dropout=True)
                assert select(masked, target).name not in ("eager", "decode")
                eager, tail_first = (predict_us(n, masked, target) for n in ("eager", "tail_first"))
                assert tail_first == predict_us("eager", problem, target)
                read = 2 * M * N if problem.backward else M * K  # dx, and x for dA
                assert eager - tail_first > 27 * read / (target.bandwidth_gbs * 1e3)
                names = {c.name for c in plan.predict(problem, target)}
                assert "tail_first" not in names

    def test_few_rows_are_decoded_in_one_launch(self):
        for name in ("sm_80", "sm_90", "sm_120"):
            assert select(replace(BIG, M=1), TARGETS[name], *OURS).name == "decode"

    def test_large_problems_get_the_cheaper_of_two_kernels_and_eager(self):
        for name in ("sm_80", "sm_90"):
            tile = tiles_for(BIG, TARGETS[name]).config("expand")
            ours = predict_us("two_kernel", BIG, TARGETS[name], tile)
            eager = predict_us("eager", BIG, TARGETS[name])
            assert select(BIG, TARGETS[name]).name == ("two_kernel" if ours <= eager else "eager")

    def test_a_backward_has_q_already(self):
        """So what computes x·a beside the product does not take part."""
        few, target = replace(BIG, M=8).adjoint(), TARGETS["sm_90"]
        compared = {c.name for c in plan.predict(few, target) if c.slower is None}
        assert compared == {"two_kernel", "eager"}
        assert select(few, target).name in compared
        assert select(few, target, "decode").name == "decode"

    def test_lengths_share_buckets_and_so_compiled_kernels(self):
        assert len({bucket(M) for M in range(1, 2**15)}) <= 12
        first, second = (tiles_for(replace(BIG, M=M), TARGETS["sm_90"]) for M in (2049, 4096))
        assert first is second
        assert all(bucket(M) >= M for M in range(1, 8193))

    def test_all_candidates_are_compared_at_the_same_rows(self):
        """The bucket's, without a bias: a time for 2049 rows would not be comparable with one for 4096."""
        for bucketed, rows in ((4096, 2049), (16, 3)):
            same, own = (
                plan.predict(problem, TARGETS["sm_90"])
                for problem in (replace(BIG, M=bucketed), replace(BIG, M=rows, bias=True))
            )
            assert {c.name for c in same} >= {"two_kernel", "one_pass", "eager"}
            for one, other in zip(same, own, strict=True):
                if one.name != "cuda_decode":
                    assert (one.name, one.predicted_us) == (other.name, other.predicted_us)

    @pytest.mark.usefixtures("machine")
    def test_a_forced_algorithm_is_taken_or_refused(self):
        forced = plan.explain(BIG, "triton", "one_pass")
        assert forced.candidate.name == forced.adjoint.candidate.name == "one_pass"
        with pytest.raises(RuntimeError, match=r"cannot compute .*: decode takes at most 64 rows"):
            plan.explain(BIG, "triton", "decode")
        with pytest.raises(RuntimeError, match="no algorithm 'fastest'"):
            plan.explain(BIG, "triton", "fastest")

    def test_a_missing_kernel_is_named(self):
        tiles = tiles_for(BIG, TARGETS["sm_90"])
        assert not tiles.has("decode")
        with pytest.raises(ValueError, match=r"kernel must be one of .*'expand'.*, got 'decode'"):
            tiles.config("decode")

    @pytest.mark.parametrize("groups", [0, 8])
    @pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
    def test_there_are_tiles_for_nothing(self, target, groups):
        """A rank of 0 is what DoRA's dropout, a batch of the base alone and an expert without an adapter plan."""
        for sizes in product((0, 200), repeat=4):
            problem = Problem(*sizes, "bfloat16", "bfloat16", "cuda", groups=groups)
            for each in (problem, problem.adjoint()):
                for kernel in ("expand", "shrink", "wgrad"):
                    assert tiles_for(each, target).has(kernel), f"{kernel} of {each}"

    @pytest.mark.parametrize("groups", [0, 8])
    @pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
    def test_everything_shipped_fits(self, target, groups):
        pairs = shipped(target, groups)
        assert len(pairs) >= 15
        assert all(fits(config, problem, target) is None for problem, config in pairs)

    @pytest.mark.parametrize("groups", [0, 7])
    @pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
    def test_whatever_is_selected_is_shipped(self, target, groups):
        """So the lanes that compile and execute what is shipped see every code that a call can reach."""

        def code(problem, config):
            types = problem.dtype, problem.adapter_dtype
            if config.kernel not in LOWRANK_KERNELS[types == ("float16", "float16") :]:
                types = tuple({"float16": "bfloat16"}.get(name, name) for name in types)
            return replace(config, split=min(config.split, 2)), *types

        known = {}
        for problem, config in shipped(target, 8 if groups else 0):
            ranks = rank_block(problem.R, config.rank_chunk)
            known.setdefault(code(problem, config), set()).add(ranks)
        random = Random(0)
        half = (("bfloat16", "bfloat16"), ("float16", "float16"))
        types = (*half, *((name, "float32") for name in ("bfloat16", "float16", "float32")))
        for _ in range(500):
            M, N, K = (int(2 ** random.uniform(0, 16)) for _ in range(3))
            R = random.choice((1, 8, 16, 17, 32, 48, 64, 65, 512))
            stack = {"groups": groups, "weights": random.choice((groups or 1, 1))}
            problem = Problem(M, N, K, R, *random.choice(types), device="cuda", **stack)
            problem = random.choice((problem, problem.adjoint(), replace(problem, dropout=True)))
            for config in tiles_for(problem, target).configs:
                ranks = known.get(code(problem, config), {0})
                reached = rank_block(problem.R, config.rank_chunk)
                assert min(ranks) <= reached <= max(ranks), f"{config} for {problem}"


class TestLowRank:
    """What the kernels that read x have on their way."""

    @pytest.mark.parametrize(
        "tile, steps, measured_us",
        [
            (TileConfig("shrink", 64, 1, 64, 4, 3), 14336 // 64, 97.5),
            (TileConfig("wgrad", 32, 64, 16, 4, 4), 8192 // 32, 82.8),
        ],
        ids=str,
    )
    def test_the_waiting_is_what_an_h200_took(self, tile, steps, measured_us):
        """x [8192, 14336], whose programs all run at one time; the bytes alone take 55 us."""
        assert waits_us(tile, steps) == pytest.approx(measured_us, rel=0.2)

    @pytest.mark.parametrize("name, least", [("sm_80", 18), ("sm_90", 40), ("sm_100", 41)])
    def test_a_plans_kernels_have_enough_on_their_way(self, name, least):
        """KiB a multiprocessor: 1.15 times the bandwidth of an H200 by a latency of 1 us, 0.9 times that of sm_100."""
        target = TARGETS[name]
        for width in (4096, 11008, 14336):
            for R in (16, 32, 64):
                problem = replace(BIG, K=width, R=R)
                for kernel in LOWRANK_KERNELS[: 2 if R > 32 else 3]:
                    read = problem.M * width * problem.itemsize
                    kept = read / lowrank_us(kernel, problem, target) / target.multiprocessors
                    assert kept >= least * 1024, f"{kernel} {width} {R}: {kept / 1024:.1f} KiB"

    def test_a_kernel_takes_no_less_than_it_waits(self):
        """The library's by its bytes alone; ours, where memory is fast, by what is on its way."""
        fast = replace(TARGETS["sm_90"], bandwidth_gbs=1e6)
        wait = lowrank_us("wgrad", replace(BIG, K=BIG.N), fast)
        for kernel, expected in (("wgrad", wait), ("", cost.MIN_KERNEL_US)):
            assert cost._lowrank_us(kernel, BIG, fast, BIG.N) == expected
        own = TARGETS["sm_90"]
        read_us = BIG.M * BIG.K * 2 / (0.9 * own.bandwidth_gbs * 1e3)
        for kernel in ("", *LOWRANK_KERNELS):
            assert cost._lowrank_us(kernel, BIG, own, BIG.K) == pytest.approx(read_us)

    @pytest.mark.parametrize("R", [16, 64])
    @pytest.mark.parametrize("name", TARGETS)
    def test_what_runs_beside_a_product_is_shipped_and_small(self, name, R):
        target, problem = TARGETS[name], replace(BIG, R=R)
        own = shrink_beside(R, target)
        assert (own is not None) == target.tma
        if own is not None:
            first, *others = tiles_of("shrink", problem, target)
            assert own in others and own.split == 1
            assert 1.5 * smem_bytes(own, problem, target) < smem_bytes(first, problem, target)


class TestGroups:
    """Rows sorted into groups: what is predicted for them, and which tiles they get."""

    EXPERTS = Problem(8192, 1536, 2048, 16, "bfloat16", "bfloat16", "cuda", groups=128, weights=128)
    TENANTS = replace(EXPERTS, groups=16, weights=1)

    def test_bytes_are_those_of_weights_that_have_rows(self):
        few, weight = replace(self.EXPERTS, M=8), 2 * 1536 * 2048
        assert few.frozen_bytes == 8 * weight + 2 * 8 * (1536 + 2048)
        assert few.lowrank_bytes == 8 * 2 * 16 * (1536 + 2048) + 2 * 8 * 16 * 4
        assert self.EXPERTS.frozen_bytes == 128 * weight + 2 * 8192 * (1536 + 2048)
        assert replace(self.TENANTS, M=8).frozen_bytes == weight + 2 * 8 * (1536 + 2048)

    def test_blocks_have_rows_of_one_group(self):
        assert row_blocks(self.EXPERTS, 64) == 128 and row_blocks(self.EXPERTS, 32) == 256
        assert row_blocks(replace(self.EXPERTS, M=3), 64) == 3
        assert row_blocks(replace(self.EXPERTS, M=0), 64) == 0
        assert row_blocks(BIG, 128) == 64

    @pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
    def test_few_rows_a_group_get_low_blocks(self, target):
        def height(M):
            return tiles_for(replace(self.EXPERTS, M=M), target).config("expand").block_m

        assert height(128) == 16 < height(128 * 256)

    @pytest.mark.parametrize("kernel", ["one_pass", "decode", "shrink_wgrad"])
    def test_kernels_without_groups_refuse_them(self, kernel):
        config = TileConfig(kernel, 16, 64, 64, 4, 3)
        few = replace(self.EXPERTS, M=16)
        assert fits(config, few, TARGETS["sm_80"]) == f"{kernel} takes no groups of rows"

    @pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
    def test_no_algorithm_beats_the_floor_and_copies_of_weights_cost(self, target):
        for problem in (self.EXPERTS, self.TENANTS, self.EXPERTS.adjoint()):
            found = {c.name: c.predicted_us for c in plan.predict(problem, target)}
            assert min(found.values()) >= frozen_us(problem, target)
            assert ("tail_first" in found) == (problem.weights == 1)
            if problem.weights > 1:
                copies = 6 * 128 * 1536 * 2048 * 2 / (target.bandwidth_gbs * 1e3)
                assert found["eager"] > frozen_us(problem, target) + copies > found["two_kernel"]

    def test_one_weight_and_few_rows_read_it_once(self):
        few = replace(self.TENANTS, M=16)
        assert select(few, TARGETS["sm_90"]).name == "tail_first"
        assert select(replace(few, weights=16), TARGETS["sm_90"]).name == "two_kernel"

    def test_dy_is_read_twice_for_the_adapters_gradients(self):
        back, target = self.TENANTS.adjoint(), TARGETS["sm_80"]
        main = product_us("expand", back, target)
        reading_us = 2 * 8192 * 1536 / (0.9 * target.bandwidth_gbs * 1e3)  # dy
        assert predict_us("two_kernel", back, target) > main + 2 * reading_us

    def test_many_rows_in_many_groups_have_buckets_of_their_own(self):
        assert tables.bucketed(replace(self.EXPERTS, M=30000)).M == 32768
        assert tables.bucketed(replace(self.EXPERTS, groups=0, weights=1, M=30000)).M == 8192

    def test_a_plan_names_its_algorithm(self):
        assert "two_kernel" in {c.name for c in plan.predict(self.EXPERTS, TARGETS["sm_80"])}
        names = {c.name for c in plan.predict(self.TENANTS, TARGETS["sm_80"])}
        assert names == {"two_kernel", "tail_first", "eager"}


class TestTables:
    @pytest.fixture(autouse=True)
    def _cache(self, monkeypatch, tmp_path):
        monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path))

    target = TARGETS["sm_90"]
    entry = Entry(
        BIG,
        {"one_pass": 9.0, "eager": 10.0},
        (TileConfig("one_pass", 64, 128, 64, 4, 3, rank_chunk=32),),
    )

    def test_a_tuned_choice_goes_before_the_model(self):
        assert select(BIG, self.target).measured_us is None
        tables.save([self.entry], self.target)
        chosen, tiles = select(BIG, self.target), tiles_for(BIG, self.target)
        assert (chosen.name, chosen.measured_us) == ("one_pass", 9.0)
        assert tiles.config("one_pass") == chosen.products.tiles.config("one_pass")
        assert tiles.config("one_pass") == self.entry.configs[0]
        assert tiles.has("shrink")  # what the entry does not name stays the model's

    def test_entries_are_added_and_replaced(self):
        tables.save([self.entry], self.target)
        other = replace(self.entry, problem=replace(BIG, R=64))
        tables.save([other, replace(self.entry, times={"eager": 8.0}, configs=())], self.target)
        loaded = tables.load(tables.path(self.target), self.target)
        assert [e.times for e in loaded.values()] == [{"eager": 8.0}, other.times]

    @pytest.mark.parametrize("text", ["{", "{}", "null", "3", ""])
    def test_a_damaged_file_counts_as_absent(self, text):
        file = tables.path(self.target)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        assert all(c.measured_us is None for c in plan.predict(BIG, self.target))

    def test_entries_that_break_a_rule_or_a_type_are_left_out(self):
        file = tables.save([self.entry], self.target)
        items = json.loads(file.read_text())
        broken = json.loads(file.read_text())[0]
        broken["configs"][0]["block_m"] = 100
        times = ({"magic": 1.0}, {"eager": "fast"}, {"eager": 0.0}, ["eager"], None)
        unknown = [json.loads(file.read_text())[0] | {"times": each} for each in times]
        for size in ("512", [512], None):
            odd = json.loads(file.read_text())[0]
            odd["problem"]["M"] = size
            unknown.append(odd)
        for part in (lambda item: item["problem"], lambda item: item["configs"][0]):
            odd = json.loads(file.read_text())[0]
            part(odd)["bias" if "bias" in part(odd) else "tma"] = []  # has no hash
            unknown.append(odd)
        before = json.loads(file.read_text())[0] | {"algorithm": "one_pass"}  # version 1
        del before["times"]
        file.write_text(json.dumps([broken, *unknown, before, 3, {"problem": {}}]))
        assert tables.load(file, self.target) == {}
        file.write_text(json.dumps([*items, broken]))
        assert len(tables.load(file, self.target)) == 1

    def test_an_interrupted_save_keeps_the_old_table(self, monkeypatch):
        file = tables.save([self.entry], self.target)
        before = file.read_bytes()

        def interrupted(*args):
            raise KeyboardInterrupt

        monkeypatch.setattr(tables.os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tables.save([replace(self.entry, times={"eager": 1.0})], self.target)
        assert file.read_bytes() == before and list(file.parent.iterdir()) == [file]
