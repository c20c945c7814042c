"""What the compiled code moves, counted while it runs, against what the cost model says it moves.

Tiles, sizes and operands are those of the compiled lane, whose code this is.
"""

from __future__ import annotations

import pytest

from lora_kernels.backends.triton.configs import tiles_of
from lora_kernels.problem import Problem
from lora_kernels.tuning.config import TileConfig
from lora_kernels.tuning.targets import TARGETS
from tests.compiled.shipped import Shapes
from tests.executed.layer import EXECUTED
from tests.ptx.counters import Counters
from tests.ptx.launch import emulate

pytestmark = pytest.mark.slow
R = 16


def tile(target: str, kernel: str, dtype: str = "bfloat16") -> TileConfig:
    problem = Problem(256, 256, 256, R, dtype, dtype, device="cuda")
    return tiles_of(kernel, problem, TARGETS[target])[-1]


def counted(
    target: str, config: TileConfig, M: int, N: int, K: int, dtype: str, ranks: int = R
) -> Counters:
    """What the first launch of the forward, or of the gradients, counts."""
    problem = Problem(M, N, K, ranks, dtype, dtype, device="cuda")
    with emulate(target) as executed:
        Shapes(problem, forward=True, device="cpu").launch(config, TARGETS[target])
    return executed[0].counters


@pytest.fixture(params=EXECUTED)
def target(request):
    return request.param


def test_bytes_of_the_product(target):
    """x once for each block of columns, w once for each block of rows, s and b likewise; y stored once, never read.

    Accesses are coalesced; a tensor descriptor moves whole boxes.
    """
    config = tile(target, "expand")
    M, N, K = 2 * config.block_m, 2 * config.block_n, 4 * config.block_k
    tensors = counted(target, config, M, N, K, "bfloat16").tensors
    assert tensors["x"].bytes_loaded == 2 * M * K * 2
    assert tensors["w"].bytes_loaded == 2 * N * K * 2
    assert tensors["s_ptr"].bytes_loaded >= 2 * M * R * 2
    assert tensors["y_ptr"].bytes_stored == M * N * 2 and tensors["y_ptr"].bytes_loaded == 0
    assert (tensors["y_ptr"].stores == 1).all()
    assert all(t.bytes_stored == 0 for name, t in tensors.items() if name != "y_ptr")
    assert not any(t.atomics for t in tensors.values())
    for name in ("y_ptr",) if config.tma else ("x", "w", "y_ptr"):
        t = tensors[name]
        assert t.load_sectors == t.fewest_load_sectors, name
        assert t.store_sectors == t.fewest_store_sectors, name


def test_what_more_steps_of_k_add(target):
    """No wavefront beyond the fewest: what bank conflicts there are, the tail and the end have once.

    What units move in shared memory: a step's tensor copies, and the operands that wgmma reads for 64 rows, tcgen05 for
    128; mma.sync has registers. FLOPs: 2·M·N·K of the product and, once, the tail's padded rank.
    """
    config = tile(target, "expand")
    m, n, k = config.block_m, config.block_n, config.block_k
    short, long = (counted(target, config, m, n, steps * k, "bfloat16") for steps in (4, 8))
    assert long.wavefronts - long.fewest_wavefronts == short.wavefronts - short.fewest_wavefronts
    groups = {"sm_90": m // 64, "sm_100": m // 128}.get(target, 0)
    read, copied = 2 * k * (m + groups * n), 2 * k * (m + n)
    assert long.unit_bytes - short.unit_bytes == 4 * (read + copied if config.tma else 0)
    assert short.flops == 2 * m * n * (4 * k + R)


def test_exact_float32_is_counted_in_the_fma_pipe(target):
    config = tile(target, "expand", "float32")
    M, N, K = config.block_m, config.block_n, 2 * config.block_k
    counters = counted(target, config, M, N, K, "float32")
    assert counters.fma_flops == 2 * M * N * (K + R) and counters.flops == 0


def test_shrink_reads_x_once(target):
    config, M, K = tile(target, "shrink"), 128, 256
    tensors = counted(target, config, M, 16, K, "bfloat16").tensors
    assert tensors["x_ptr"].bytes_loaded == 2 * M * K
    assert tensors["a_ptr"].bytes_loaded == 2 * K * R * M // config.block_m
    assert tensors["out_ptr"].bytes_stored == config.split * M * R * 4


@pytest.mark.parametrize("kernel, operand", [("shrink", "x_ptr"), ("wgrad", "wide_ptr")])
def test_many_ranks_read_x_once_for_each_128(target, kernel, operand):
    large = Problem(8192, 4096, 4096, 256, "bfloat16", "bfloat16", device="cuda")
    (config,) = tiles_of(kernel, large, TARGETS[target])
    for ranks, times in ((128, 1), (144, 2), (256, 2)):
        tensors = counted(target, config, 128, 16, 256, "bfloat16", ranks).tensors
        assert tensors[operand].bytes_loaded == times * 2 * 128 * 256


def test_the_backward_reads_dy_once_for_q_and_dB(target):
    tensors = counted(target, tile(target, "shrink_wgrad"), 64, 512, 16, "bfloat16").tensors
    assert tensors["dy_ptr"].bytes_loaded == 2 * 64 * 512
    assert tensors["q_ptr"].bytes_loaded == tensors["db_ptr"].bytes_loaded == 0


def test_wgrad_reads_its_wide_operand_once(target):
    tensors = counted(target, tile(target, "wgrad"), 128, 16, 256, "bfloat16").tensors
    assert tensors["wide_ptr"].bytes_loaded == 2 * 128 * 256
    assert all((t.stores <= 1).all() for t in tensors.values())
