"""The cpu backend's products over groups: lora_linear's bits in each group, on any threads, and nothing out of bounds."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
import torch

from lora_kernels import explain, grouped_lora_linear, lora_linear
from lora_kernels.backends.cpu import BACKEND
from lora_kernels.quantized import NF4Weight
from tests import test_cpu_backend
from tests.oracle import assert_bits, with_gradients
from tests.test_cpu_backend import same_on_any_threads

if (_why_not := BACKEND.unavailable()) is not None:
    pytest.skip(f"cpu backend: {_why_not}", allow_module_level=True)

OPS = torch.ops.lora_kernels_cpu
isa, poisoned = test_cpu_backend.isa, test_cpu_backend.poisoned  # fixtures
f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
# Few rows, the edges of the forms (4, 16 and 32 rows), packed panels; none at the ends.
OFFSETS = [0, 0, 1, 5, 21, 38, 38, 71, 240, 241, 241]


def as_offsets(numbers):
    return torch.tensor(numbers, dtype=torch.int32)


def operands(dtype=f32, *, K=70, N=150, R=8, shared=False, adapter_dtype=None):
    """x, weight, A, B, bias of the groups of OFFSETS."""
    torch.manual_seed(1)
    G, T = len(OFFSETS) - 1, OFFSETS[-1]
    own = () if shared else (G,)
    x, weight = torch.randn(T, K).to(dtype), torch.randn(*own, N, K).to(dtype)
    A, B = torch.randn(G, K, R), torch.randn(G, R, N)
    A, B = (t.to(adapter_dtype or dtype).requires_grad_() for t in (A, B))
    return x.requires_grad_(), weight, A, B, torch.randn(*own, N).to(dtype)


def results(x, weight, A, B, bias, offsets, **options):
    """y, dx, dA, dB."""
    y = grouped_lora_linear(x, weight, A, B, offsets, 0.75, bias, backend="cpu", **options)
    generator = torch.Generator().manual_seed(2)
    dy = torch.randn(y.shape, generator=generator).to(y.dtype)
    return y, *torch.autograd.grad(y, (x, A, B), dy), dy


CASES = [
    {},
    {"K": 17, "N": 33, "R": 5},
    {"K": 600, "N": 1100, "R": 33},
    {"dtype": bf16, "adapter_dtype": f32},
    {"dtype": bf16, "R": 24},
    {"dtype": f16},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_group_has_the_bits_of_lora_linear(case, isa, poisoned):
    x, weight, A, B, bias = operands(**case)
    y, dx, dA, dB, dy = results(x, weight, A, B, bias, as_offsets(OFFSETS))
    for g, (begin, end) in enumerate(pairwise(OFFSETS)):
        if begin == end:
            assert not dA[g].any() and not dB[g].any()
            continue
        one = tuple(t.detach().requires_grad_() for t in (x[begin:end], A[g], B[g]))
        right = lora_linear(one[0], weight[g], *one[1:], 0.75, bias[g], backend="cpu")
        grads = torch.autograd.grad(right, one, dy[begin:end])
        assert_bits((y[begin:end], dx[begin:end], dA[g], dB[g]), (right, *grads))


@pytest.mark.parametrize("shared", [False, True], ids=["experts", "shared"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_any_number_of_threads_gives_the_same_bits(shared, dropout_p):
    tensors = operands(K=600, N=700, shared=shared)
    same_on_any_threads(lambda: results(*tensors, as_offsets(OFFSETS), dropout_p=dropout_p, seed=3))


@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
def test_a_shared_weight_is_one_product_with_many_adapters(dtype, isa, poisoned):
    """Its base is that of all rows; the parts of the groups are those of one adapter, bit for bit, where all have it."""
    x, weight, A, B, bias = operands(dtype, shared=True)
    offsets, G = as_offsets(OFFSETS), len(OFFSETS) - 1
    same_A, same_B = (t[:1].detach().expand(G, -1, -1) for t in (A, B))
    y = grouped_lora_linear(x, weight, same_A, same_B, offsets, 0.75, bias, backend="cpu")
    s = OPS.grouped_shrink(x.detach(), same_A, offsets, [0.75], 0, 0, 1.0)
    assert torch.equal(y, OPS.expand(x.detach(), weight.t(), s, same_B[0], bias, 0, 0, 1.0))


@pytest.mark.parametrize("T", [3, 241])
def test_a_shared_quantised_weight_is_read_packed(T):
    """Few rows and many: what the same weight and adapter give without groups, and every gradient."""
    torch.manual_seed(3)
    K, N, R = 128, 192, 8
    packed = torch.randint(0, 256, (N * K // 2,), dtype=torch.uint8)
    weight = NF4Weight(packed, torch.rand(N * K // 64), torch.randn(16).sort().values, N=N, K=K)
    offsets = as_offsets([0, 1, T])
    A, B = torch.randn(K, R).requires_grad_(), torch.randn(R, N).requires_grad_()
    x, dy = torch.randn(T, K).requires_grad_(), torch.randn(T, N)
    stacks = A.expand(2, K, R), B.expand(2, R, N)
    assert explain(x, weight, *stacks, 0.5, offsets=offsets).dequantises is False

    def grouped(x, A, B):
        stacks = A.expand(2, K, R), B.expand(2, R, N)
        return grouped_lora_linear(x, weight, *stacks, offsets, 0.5, backend="cpu")

    def alone(x, A, B):
        return lora_linear(x, weight, A, B, 0.5, backend="cpu")

    found = (with_gradients(f, (x, A, B), dy) for f in (grouped, alone))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-4)


def test_the_weight_gradient_is_written_for_every_group(poisoned):
    x, *_ = operands()
    dy = torch.randn(OFFSETS[-1], 150)
    dW = OPS.grouped_weight_grad(dy, x.detach(), as_offsets(OFFSETS))
    for g, (begin, end) in enumerate(pairwise(OFFSETS)):
        exact = dy[begin:end].double().t() @ x[begin:end].double()
        torch.testing.assert_close(dW[g].double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "numbers, message",
    [
        ([0, 5, 3, 4, 4, 4, 4, 4, 4, 4, 241], "offsets must not fall, got 5 before 3 at 1"),
        ([-1, *OFFSETS[1:]], "offsets must begin with 0, got -1"),
        ([*OFFSETS[:-1], 242], "offsets must end at T = 241, the rows of x, got 242"),
        ([0, 2**31 - 1, *OFFSETS[2:]], "offsets must not fall, got 2147483647 before 1 at 1"),
    ],
)
def test_offsets_are_checked_before_anything_is_read(numbers, message):
    x, weight, A, B, bias = (t.detach() for t in operands())
    offsets, s = as_offsets(numbers), torch.randn(241, 8)
    for call in (
        lambda: OPS.grouped_shrink(x, A, offsets, [1.0], 0, 0, 1.0),
        lambda: OPS.grouped_expand(x, weight.mT, s, B, bias, offsets, 0, 0, 1.0),
        lambda: OPS.grouped_wgrad(x, s, offsets, f32, 0, 0, 1.0),
        lambda: OPS.grouped_weight_grad(x, x, offsets),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"w": torch.randn(9, 70, 150)}, "w must be a [10, 70, 150] tensor"),
        ({"w": torch.randn(10, 71, 150)}, "w must be a [10, 70, 150] tensor"),
        ({"b": torch.randn(10, 7, 150)}, "b must be a [10, 8, 150] tensor"),
        ({"b": torch.randn(9, 8, 150)}, "b must be a [10, 8, 150] tensor"),
        ({"s": torch.randn(240, 8)}, "s must be a [241, 8] tensor"),
        ({"bias": torch.randn(9, 150)}, "bias must be a [10, 1, 150] tensor"),
        ({"offsets": torch.zeros(11)}, "offsets must be int32 [G + 1]"),
        ({"offsets": as_offsets([0])}, "offsets must be int32 [G + 1]"),
    ],
)
def test_the_operator_refuses_operands_of_other_sizes(change, message):
    x, weight, _, B, bias = (t.detach() for t in operands())
    good = {"x": x, "w": weight.mT, "s": torch.randn(241, 8), "b": B, "bias": bias}
    good |= {"offsets": as_offsets(OFFSETS), "threshold": 0, "seed": 0, "keep_scale": 1.0}
    OPS.grouped_expand(**good)
    with pytest.raises(RuntimeError, match=re.escape(message)):
        OPS.grouped_expand(**good | change)


def test_a_storage_that_was_freed_is_an_error():
    x, weight, _, B, bias = (t.detach() for t in operands())
    w, s = weight.mT, torch.randn(241, 8)
    weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="w must have memory for 105000 elements"):
        OPS.grouped_expand(x, w, s, B, bias, as_offsets(OFFSETS), 0, 0, 1.0)


def test_auto_takes_the_cpu_kernels():
    x, weight, A, B, bias = operands()
    assert explain(x, weight, A, B, 1.0, bias, offsets=as_offsets(OFFSETS)).backend == "cpu"
    x, weight, A, B = (t.double() for t in (x, weight, A, B))
    assert explain(x, weight, A, B, 1.0, offsets=as_offsets(OFFSETS)).backend == "eager"
