"""The compiled kernels that decode a weight: bits, and what they move of whole blocks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lora_kernels.backends.triton.configs import tiles_of
from lora_kernels.backends.triton.decode import decode
from lora_kernels.backends.triton.dequantise import dequantise
from lora_kernels.problem import Problem
from lora_kernels.quantized import NF4Weight
from lora_kernels.samples import sample
from lora_kernels.tuning.targets import TARGETS
from tests.executed.layer import EXECUTED
from tests.ptx.launch import emulate

pytestmark = pytest.mark.slow
N, K = 96, 256
BYTES = {"nf4": N * K // 2, "int8": N * K, "fp8": N * K}  # of a packed weight


def run(target, weight, schedule=None):
    """(the dense copy, the traffic of each tensor)."""
    name = str(weight.dtype).removeprefix("torch.")
    problem = Problem(64, N, K, 16, name, name, "cuda", weight_format=weight.format)
    (config,) = tiles_of("dequantise", problem, TARGETS[target])
    out = torch.full(weight.shape, torch.nan, dtype=weight.dtype)
    with emulate(target, schedule) as executed:
        dequantise(weight, out, config)
    (launch,) = executed
    return out, launch.counters.tensors


@pytest.mark.parametrize(
    "name, dtype",
    [(name, torch.bfloat16) for name in BYTES] + [("nf4", torch.float32), ("plain", torch.float32)],
    ids=str,
)
@pytest.mark.parametrize("target", EXECUTED)
def test_the_bits_and_one_reading(target, name, dtype):
    """Each packed byte is read once and each element written once, in whole sectors; nf4 with either kind of scales."""
    weight = sample("nf4" if name == "plain" else name, N, K, dtype)
    if name == "plain":
        weight = NF4Weight(weight.packed, weight.scales(), weight.code, N=N, K=K, dtype=dtype)
    out, tensors = run(target, weight, schedule=3)
    assert torch.equal(out, weight.dense())
    packed, w = tensors.get("packed_ptr") or tensors["codes_ptr"], tensors["w_ptr"]
    assert packed.bytes_loaded == BYTES[weight.format] and w.bytes_loaded == 0
    assert w.bytes_stored == N * K * dtype.itemsize and (w.stores == 1).all()
    assert packed.load_sectors == packed.fewest_load_sectors
    assert w.store_sectors == w.fewest_store_sectors


def test_product_and_sum_of_a_scale_round_one_after_the_other():
    """Rounded once, as the compiler would for another kernel, some of these scales have another last bit."""
    weight = sample("nf4", N, K, torch.float32)
    products = (
        weight.code2[weight.absmax.int()].double()
        * weight.absmax2.repeat_interleave(256)[: weight.absmax.numel()].double()
    )
    once = (products + weight.offset.double()).float()
    assert (once != weight.scales()).any()
    assert torch.equal(run("sm_90", weight)[0], weight.dense())


@pytest.mark.parametrize("name", BYTES)
@pytest.mark.parametrize("target", EXECUTED)
def test_few_rows_read_the_packed_bytes_once(target, name):
    """A quarter, or half, of the bytes of a half w, in whole sectors; what a dense w gives, bit for bit."""
    weight = sample(name, N, K, torch.bfloat16)
    problem = Problem(16, N, K, 16, "bfloat16", "bfloat16", "cuda", weight_format=name)
    (config,) = tiles_of("decode", problem, TARGETS[target])
    config = replace(config, split=2)
    x, a, b = (torch.randn(size).bfloat16() for size in ((16, K), (K, 16), (16, N)))
    with emulate(target, 5) as executed:
        y, _ = decode(x, weight.t(), a, b, 0.5, None, config)
        dense, _ = decode(x, weight.t().dense(), a, b, 0.5, None, config)
    packed, other = (launch.counters.tensors for launch in executed)
    assert torch.equal(y, dense)
    w = packed["w_ptr"]
    assert w.bytes_loaded == BYTES[name] and other["w_ptr"].bytes_loaded == 2 * N * K
    assert w.load_sectors == w.fewest_load_sectors
    for each in ("x_ptr", "a_ptr", "b_ptr"):
        assert packed[each].bytes_loaded == other[each].bytes_loaded
