"""Products on the device: every awkward problem by every backend, and every configuration that can be chosen there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lora_kernels import selftest
from lora_kernels.bench.tiles import Narrow, Product
from lora_kernels.problem import Problem
from lora_kernels.tuning.config import NARROW_KERNELS
from lora_kernels.tuning.select import Choice
from tests.gpu.conftest import DEVICE
from tests.oracle import AWKWARD, Case, check_backend

LARGE = [  # many tiles, splits, a second wave; sizes that no tile divides
    Case(513, 1025, 2049, 16, dtype=torch.bfloat16),
    Case(4096, 1024, 4096, 64, dtype=torch.bfloat16, layout="peft"),
    Case(2000, 3000, 1000, 8, dtype=torch.float16, dropout=0.1),
    Case(300, 4096, 4096, 256, dtype=torch.bfloat16, adapter_dtype=torch.float32),
    Case(1, 4096, 4096, 16, dtype=torch.bfloat16),
    Case(64, 4096, 4104, 16, dtype=torch.bfloat16),
    Case(257, 300, 1030, 12),
]


def problem_of(case: Case) -> Problem:
    names = [str(d).removeprefix("torch.") for d in (case.dtype, case.adapter_dtype or case.dtype)]
    dropout = bool(case.dropout)
    return Problem(case.M, case.N, case.K, case.R, *names, DEVICE, case.bias, dropout)


@pytest.mark.parametrize("case", [*AWKWARD, *LARGE], ids=str)
def test_products(case, gpu_backend):
    reason = gpu_backend.declines(problem_of(case))
    if reason is not None:
        pytest.skip(reason)
    check_backend(gpu_backend, replace(case, device=DEVICE))


def test_selftest_passes(gpu_backend):
    results = selftest.run(gpu_backend, DEVICE)
    assert results and all(result.passed for result in results), [
        str(result) for result in results if not result.passed
    ]


def test_every_shipped_configuration_is_right():
    """What the compiled lane compiles for this architecture, on a problem that it was chosen for, but without dropout."""
    from lora_kernels.backends.device import current_target
    from lora_kernels.backends.triton import BACKEND
    from lora_kernels.tuning.select import select, shipped

    if BACKEND.unavailable() is not None:
        pytest.skip(str(BACKEND.unavailable()))
    target, failures, product = current_target(), [], None
    for problem, config in shipped(target):
        problem = replace(problem, dropout=False)
        if config.kernel in NARROW_KERNELS:
            wrong = Narrow(problem, DEVICE).wrong(Choice(config.kernel, "test", (config,)))
            failures += [f"{config} for {problem}: {wrong}"] if wrong else []
            continue
        algorithm = {"lowrank_matmul": "two_kernel"}.get(config.kernel, config.kernel)
        shrink = select(problem, target, "two_kernel").config("shrink")
        if product is None or product.problem != problem:
            product = Product(problem, DEVICE)
        wrong = product.wrong(Choice(algorithm, "test", (shrink, config)))
        failures += [f"{config} for {problem}: {wrong}"] if wrong else []
    assert not failures, failures


def test_many_equal_calls_give_equal_bits(gpu_backend):
    """Programs run in another order every time: sums must not."""
    case = Case(512, 768, 1024, 16, dtype=torch.bfloat16, device=DEVICE)
    if gpu_backend.declines(problem_of(case)) is not None:
        case = replace(case, M=8)
    o = case.operands()
    first = gpu_backend.lowrank_matmul(o.x, o.w, o.a, o.b, 0.5, o.bias)
    outer = gpu_backend.shrink_outer(o.dy, o.b.t(), 0.5, first[1], o.b.dtype)
    for _ in range(50):
        again = gpu_backend.lowrank_matmul(o.x, o.w, o.a, o.b, 0.5, o.bias)
        assert all(map(torch.equal, first, again))
        again = gpu_backend.shrink_outer(o.dy, o.b.t(), 0.5, first[1], o.b.dtype)
        assert all(map(torch.equal, outer, again))


def test_offsets_pass_two_to_the_31(gpu_backend):
    """x of more than 2^31 elements; its last rows are compared with those of a small product."""
    K, N, R = 4096, 8, 4
    M = 2**31 // K + 64
    if torch.cuda.mem_get_info()[0] < 3 * 2 * M * K:
        pytest.skip("needs 13 GB of free memory")
    if gpu_backend.declines(Problem(M, N, K, R, "bfloat16", "bfloat16", DEVICE)) is not None:
        pytest.skip("declined")
    x = torch.zeros(M, K, dtype=torch.bfloat16, device=DEVICE)
    x[-64:] = torch.randn(64, K, device=DEVICE).bfloat16()
    w, a, b = (
        torch.randn(size, device=DEVICE).mul(0.05).bfloat16() for size in ((K, N), (K, R), (R, N))
    )
    y, s = gpu_backend.lowrank_matmul(x, w, a, b, 0.5)
    small, small_s = gpu_backend.lowrank_matmul(x[-128:], w, a, b, 0.5)
    torch.testing.assert_close(y[-128:], small)
    torch.testing.assert_close(s[-128:], small_s)
    assert not y[:-64].any()
