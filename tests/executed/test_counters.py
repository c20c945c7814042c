"""What the compiled code moves, counted while it runs, against what the cost model says it moves."""

from __future__ import annotations

import math

import pytest
import torch

from lora_kernels.backends.triton.configs import tiles_of
from lora_kernels.backends.triton.expand import expand
from lora_kernels.backends.triton.shrink import shrink
from lora_kernels.backends.triton.shrink_wgrad import shrink_wgrad
from lora_kernels.backends.triton.wgrad import wgrad
from lora_kernels.problem import Problem
from lora_kernels.tuning.config import TileConfig
from lora_kernels.tuning.targets import TARGETS
from tests.executed.test_executed import EXECUTED
from tests.oracle import assert_budget
from tests.ptx.counters import Counters
from tests.ptx.launch import emulate

pytestmark = pytest.mark.slow


def operands(M, N, K, R):
    torch.manual_seed(0)
    x, w = torch.randn(M, K).bfloat16(), torch.randn(N, K).bfloat16().t()
    return x, w, torch.randn(M, R), torch.randn(R, N).bfloat16(), torch.randn(N).bfloat16()


def product(target: str, config: TileConfig, M: int, N: int, K: int, R: int) -> Counters:
    x, w, s, b, bias = operands(M, N, K, R)
    with emulate(target) as executed:
        expand(x, w, s, b, bias, config)
    return executed[0].counters


@pytest.fixture(params=EXECUTED)
def target(request):
    return request.param


def tile(target: str) -> TileConfig:
    problem = Problem(256, 256, 256, 16, "bfloat16", "bfloat16", device="cuda")
    return tiles_of("expand", problem, TARGETS[target])[-1]


def test_bytes_of_the_product(target):
    """x once for each block of columns, w once for each block of rows, s and b likewise; y stored once, never read."""
    config = tile(target)
    M, N, K, R = 2 * config.block_m, 2 * config.block_n, 4 * config.block_k, 16
    tensors = product(target, config, M, N, K, R).tensors
    rows, columns = math.ceil(M / config.block_m), math.ceil(N / config.block_n)
    assert tensors["x"].bytes_loaded == columns * M * K * 2
    assert tensors["w"].bytes_loaded == rows * N * K * 2
    assert tensors["s_ptr"].bytes_loaded >= columns * M * R * 4
    assert tensors["y_ptr"].bytes_stored == M * N * 2 and tensors["y_ptr"].bytes_loaded == 0
    assert (tensors["y_ptr"].stores == 1).all()
    assert all(t.bytes_stored == 0 for name, t in tensors.items() if name != "y_ptr")
    assert not any(t.atomics for t in tensors.values())


def test_accesses_are_coalesced(target):
    config = tile(target)
    tensors = product(
        target, config, 2 * config.block_m, config.block_n, 2 * config.block_k, 16
    ).tensors
    for name in ("x", "w", "y_ptr"):
        t = tensors[name]
        if name == "y_ptr" or not config.tma:  # a tensor descriptor moves whole boxes
            assert t.load_sectors == t.fewest_load_sectors, name
            assert t.store_sectors == t.fewest_store_sectors, name


def test_the_main_loop_has_no_bank_conflicts(target):
    """More steps of K add no wavefront beyond the fewest: what conflicts there are, the tail and the end have once."""
    config = tile(target)
    sizes = config.block_m, config.block_n
    short, long = (product(target, config, *sizes, n * config.block_k, 16) for n in (4, 8))
    assert long.wavefronts - long.fewest_wavefronts == short.wavefronts - short.fewest_wavefronts


def test_what_units_move_in_shared_memory(target):
    """A step's tensor copies, and the operands that wgmma reads for 64 rows, tcgen05 for 128; mma.sync has registers."""
    config = tile(target)
    m, n, k = config.block_m, config.block_n, config.block_k
    short, long = (product(target, config, m, n, steps * k, 16) for steps in (4, 8))
    groups = {"sm_90": m // 64, "sm_100": m // 128}.get(target, 0)
    read, copied = 2 * k * (m + groups * n), 2 * k * (m + n)
    expected = read + copied if config.tma else 0
    assert long.unit_bytes - short.unit_bytes == 4 * expected


def test_exact_float32_is_counted_in_the_fma_pipe(target):
    problem = Problem(256, 256, 256, 16, "float32", "float32", device="cuda")
    (config,) = tiles_of("expand", problem, TARGETS[target])
    M, N, K = config.block_m, config.block_n, 2 * config.block_k
    with emulate(target) as executed:
        expand(
            torch.zeros(M, K),
            torch.zeros(K, N),
            torch.zeros(M, 16),
            torch.zeros(16, N),
            None,
            config,
        )
    counters = executed[0].counters
    assert counters.fma_flops == 2 * M * N * (K + 16) and counters.flops == 0


def test_the_tail_costs_its_share_of_the_matrix_work(target):
    """FLOPs executed: 2·M·N·K of the product and, once, the tail's padded rank."""
    config = tile(target)
    M, N, K = config.block_m, config.block_n, 4 * config.block_k
    counted = product(target, config, M, N, K, 16).flops
    tail = counted - 2 * M * N * K
    assert tail == 2 * M * N * 16


def test_shrink_reads_x_once(target):
    config = TileConfig("shrink", 64, 1, 64, 4, 3, split=2)
    x, _, _, _, _ = operands(128, 16, 256, 16)
    a = torch.randn(256, 16).bfloat16()
    with emulate(target) as executed:
        shrink(x, a, 0.5, config)
    tensors = executed[0].counters.tensors
    assert tensors["x_ptr"].bytes_loaded == x.nbytes
    assert tensors["a_ptr"].bytes_loaded == 2 * a.nbytes  # once for each block of 64 rows
    assert tensors["out_ptr"].bytes_stored == 2 * 128 * 16 * 4


def test_shrink_for_several_layers_reads_x_once(target):
    """Fused q, k and v: their ranks fit one block of columns."""
    config = TileConfig("shrink", 64, 1, 64, 4, 3)
    x, _, _, _, _ = operands(64, 16, 128, 16)
    matrices = [torch.randn(128, R).bfloat16() for R in (16, 8, 24)]
    with emulate(target) as executed:
        s = shrink(x, torch.cat(matrices, 1), 0.5, config)
    exact = torch.cat([0.5 * x.double() @ a.double() for a in matrices], 1)
    assert_budget(s, torch.cat([0.5 * x @ a for a in matrices], 1).float(), exact)
    assert executed[0].counters.tensors["x_ptr"].bytes_loaded == x.nbytes


def test_the_backward_reads_dy_once_for_q_and_dB(target):
    config = TileConfig("shrink_wgrad", 32, 64, 16, 4, 2)
    dy, s, b_t = (
        torch.randn(64, 128).bfloat16(),
        torch.randn(64, 16),
        torch.randn(128, 16).bfloat16(),
    )
    with emulate(target) as executed:
        shrink_wgrad(dy, b_t, 0.5, s, torch.bfloat16, config)
    tensors = executed[0].counters.tensors
    assert tensors["dy_ptr"].bytes_loaded == dy.nbytes
    assert tensors["q_ptr"].bytes_loaded == tensors["db_ptr"].bytes_loaded == 0


def test_wgrad_reads_its_wide_operand_once(target):
    config = TileConfig("wgrad", 32, 64, 16, 4, 2, split=2)
    x, q = torch.randn(128, 128).bfloat16(), torch.randn(128, 16)
    with emulate(target) as executed:
        wgrad(x, q, torch.bfloat16, config)
    tensors = executed[0].counters.tensors
    assert tensors["wide_ptr"].bytes_loaded == x.nbytes
    assert all((t.stores <= 1).all() for t in tensors.values())
