"""Products on the device: every awkward problem by every backend, and every configuration that can be chosen there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lora_kernels import selftest
from lora_kernels.backends.device import current_target
from lora_kernels.backends.triton.configs import shipped, tiles_for, tiles_of
from lora_kernels.bench.tiles import LowRank, Product
from lora_kernels.dropout import Dropout, keep_mask
from lora_kernels.operands import Adapter
from lora_kernels.problem import Problem
from lora_kernels.tuning.config import KERNELS, LOWRANK_KERNELS
from lora_kernels.tuning.search import Choice
from tests.gpu.conftest import DEVICE, captured, declined
from tests.oracle import AWKWARD, Case, assert_budget, check_gradients, check_products
from tests.planned import Planned

LARGE = [  # many tiles, splits, a second wave; sizes that no tile divides
    Case(513, 1025, 2049, 16, dtype=torch.bfloat16),
    Case(4096, 1024, 4096, 64, dtype=torch.bfloat16, layout="peft"),
    Case(2000, 3000, 1000, 8, dtype=torch.float16, dropout=0.1),
    Case(300, 4096, 4096, 256, dtype=torch.bfloat16, adapter_dtype=torch.float32),
    Case(3000, 1024, 1504, 144, dtype=torch.bfloat16, dropout=0.1),
    Case(1, 4096, 4096, 16, dtype=torch.bfloat16),
    Case(64, 4096, 4104, 16, dtype=torch.bfloat16),
    Case(257, 300, 1030, 12),
]


PERSISTENT = [
    Case(513, 1032, 2056, 16, dtype=torch.bfloat16),
    Case(4096, 3000, 1000, 64, dtype=torch.bfloat16, layout="peft"),
    Case(2000, 4096, 8, 5, dtype=torch.bfloat16, dropout=0.1),
    Case(300, 72, 4096, 130, dtype=torch.bfloat16, bias=False),
    Case(1000, 2304, 2560, 16, dtype=torch.bfloat16),  # large enough for a backward beside it
]


def problem_of(case: Case) -> Problem:
    names = [str(d).removeprefix("torch.") for d in (case.dtype, case.adapter_dtype or case.dtype)]
    dropout = bool(case.dropout)
    return Problem(case.M, case.N, case.K, case.R, *names, DEVICE, case.bias, dropout)


@pytest.mark.parametrize("case", [*AWKWARD, *LARGE], ids=str)
def test_products(case, gpu_backend, gpu_products):
    if reason := declined(gpu_backend, problem_of(case)):
        pytest.skip(reason)
    check_products(gpu_products, replace(case, device=DEVICE))


def test_selftest_passes(gpu_backend):
    results = selftest.run(gpu_backend, DEVICE)
    assert results and all(result.passed for result in results), [
        str(result) for result in results if not result.passed
    ]


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_shipped_configuration_is_right(kernel, triton_backend):
    """Each that ships for this architecture, on a problem that it was chosen for, but without dropout."""
    target, failures, product = current_target(), [], None
    for problem, config in shipped(target):
        if config.kernel != kernel:
            continue
        problem = replace(problem, dropout=False)
        if kernel in LOWRANK_KERNELS:
            wrong = LowRank(problem, DEVICE).wrong(Choice.of(config.kernel, config))
            failures += [f"{config} for {problem}: {wrong}"] if wrong else []
            continue
        algorithm = config.kernel
        beside = [tiles_for(problem, target).config("shrink")]
        if kernel in ("expand", "dequantise"):
            algorithm = "two_kernel"
        if kernel == "dequantise":
            beside.append(tiles_for(problem, target).config("expand"))
        if product is None or product.problem != problem:
            product = Product(problem, DEVICE)
        wrong = product.wrong(Choice.of(algorithm, *beside, config))
        failures += [f"{config} for {problem}: {wrong}"] if wrong else []
    assert not failures, failures


@pytest.mark.parametrize("kernel", ["shrink", "expand", "one_launch", "one_pass", "wgrad"])
def test_every_shipped_configuration_with_dropout(kernel, triton_backend):
    """On a small problem: what is chosen for dropout, with a mask."""
    from tests.executed.shipped import compare, launch, small

    target, checked = current_target(), 0
    for problem, config in shipped(target):
        masked = replace(problem, dropout=True)
        if config.kernel == kernel and config in tiles_of(kernel, masked, target):
            job = masked, config, kernel != "expand", False
            o = replace(small(job), device=DEVICE).operands()
            found = launch(target, job, o)
            compare(found, o, f"{config} for {masked}")
            checked += 1
    assert checked


@pytest.mark.parametrize("case", [c for c in (*AWKWARD, *LARGE) if c.dropout], ids=str)
def test_a_masked_tail_before_the_librarys_product(case, triton_backend):
    products = Planned(triton_backend, current_target(), "tail_first")
    if reason := declined(triton_backend, problem_of(case)):
        pytest.skip(reason)
    check_products(products, replace(case, device=DEVICE))


@pytest.mark.parametrize("algorithm", ["persistent", "persistent_one_launch"])
@pytest.mark.parametrize("case", PERSISTENT, ids=str)
def test_the_persistent_product(case, algorithm, triton_backend):
    """Forward and dx, where `explain` offers it: ragged tiles, several for each program, short and long sums, any rank."""
    products = Planned(triton_backend, current_target(), algorithm)
    offered = triton_backend.candidates(problem_of(case), current_target())
    refusal = next(c.refusal for c in offered if c.name == algorithm)
    if refusal is not None:
        pytest.skip(refusal)
    case = replace(case, device=DEVICE)
    check_products(products, case)
    for _ in range(20):  # launches run beside each other, in another order each time
        check_gradients(products, case)


def test_one_launch_in_a_graph(triton_backend):
    """Its flags are cleared in each replay: with another x each finds another s."""
    case = Case(2000, 1000, 520, 16, dtype=torch.bfloat16, device=DEVICE)
    products = Planned(triton_backend, current_target(), "one_launch")
    offered = triton_backend.candidates(problem_of(case), current_target())
    refusal = next(c.refusal for c in offered if c.name == "one_launch")
    if refusal is not None:
        pytest.skip(refusal)
    o = case.operands()
    graph, (y, s) = captured(lambda: products.shrink_expand(o.x, o.w, o.adapter, o.bias))
    for factor in (-2.0, 0.5):
        o.x.mul_(factor)
        graph.replay()
        eager, exact = o.results(None), o.results(torch.float64)
        assert_budget(y, eager["y"], exact["y"], "y")
        assert_budget(s, eager["s"].float(), exact["s"], "s")


@pytest.mark.parametrize("seed", [5, -1])
def test_dropout_masks_are_eagers_bit_for_bit(seed, triton_backend):
    """Operands of ones and unit matrices make each of the four masked products its mask."""
    p, rows, cols, few = 0.3, 300, 521, 32  # one_pass takes no more ranks with a mask
    dropout = Dropout(p, torch.tensor(seed, device=DEVICE))
    ones, unit = torch.ones(rows, cols, device=DEVICE), torch.eye(cols, device=DEVICE)
    target = current_target()
    products = Planned(triton_backend, target)
    none = [torch.zeros(size, device=DEVICE) for size in ((rows, 1), (1, cols))]
    output = Adapter(unit[:1, :1], ones[:1], 1.0, dropout_out=dropout)
    tail = products.expand(*none, ones[:, :1].contiguous(), output)
    reduced = products.wgrad(ones, torch.eye(rows, device=DEVICE), torch.float32, dropout)
    one_pass = Planned(triton_backend, target, "one_pass")
    narrow = Adapter(unit[:few, :few], ones[:few, :96], 1.0, dropout)
    _, s = one_pass.shrink_expand(ones[:, :few].contiguous(), ones[:few, :96], narrow)
    wide = keep_mask(dropout, rows, cols)
    for result, expected in (
        (products.shrink(ones, Adapter(unit, unit, 1.0, dropout)), wide),
        (tail, wide),
        (reduced.t(), wide),
        (s, keep_mask(dropout, rows, few)),
    ):
        assert torch.equal(result != 0, expected)
        torch.testing.assert_close(result[expected], torch.full_like(result[expected], 1 / (1 - p)))


def test_many_equal_calls_give_equal_bits(gpu_backend, gpu_products):
    """Programs run in another order every time: sums must not."""
    case = Case(512, 768, 1024, 16, dtype=torch.bfloat16, device=DEVICE)
    if declined(gpu_backend, problem_of(case)):
        case = replace(case, M=8)
    o = case.operands()
    first = gpu_products.shrink_expand(o.x, o.w, o.adapter, o.bias)
    outer = gpu_products.shrink_wgrad(o.dy, o.adapter.t(), first[1], o.b.dtype)
    for _ in range(50):
        again = gpu_products.shrink_expand(o.x, o.w, o.adapter, o.bias)
        assert all(map(torch.equal, first, again))
        again = gpu_products.shrink_wgrad(o.dy, o.adapter.t(), first[1], o.b.dtype)
        assert all(map(torch.equal, outer, again))


def test_offsets_pass_two_to_the_31(gpu_backend, gpu_products):
    """x of more than 2^31 elements; its last rows are compared with those of a small product."""
    K, N, R = 4096, 8, 4
    M = 2**31 // K + 64
    if torch.cuda.mem_get_info()[0] < 3 * 2 * M * K:
        pytest.skip("needs 13 GB of free memory")
    if reason := declined(gpu_backend, Problem(M, N, K, R, "bfloat16", "bfloat16", DEVICE)):
        pytest.skip(reason)
    x = torch.zeros(M, K, dtype=torch.bfloat16, device=DEVICE)
    x[-64:] = torch.randn(64, K, device=DEVICE).bfloat16()
    w, a, b = (
        torch.randn(size, device=DEVICE).mul(0.05).bfloat16() for size in ((K, N), (K, R), (R, N))
    )
    y, s = gpu_products.shrink_expand(x, w, Adapter(a, b, 0.5))
    small, small_s = gpu_products.shrink_expand(x[-128:], w, Adapter(a, b, 0.5))
    torch.testing.assert_close(y[-128:], small)
    torch.testing.assert_close(s[-128:], small_s, rtol=1e-4, atol=1e-4)  # K in other parts
    assert not y[:-64].any()
