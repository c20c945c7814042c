"""Dropout on the LoRA branch: the mask's numbers, its statistics, and that backward uses the forward's mask."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from lora_kernels import LinearWithLoRA, dropout, functional, lora_linear, plan, use_backend
from lora_kernels.dropout import Dropout, _philox, keep_mask, masked, scaled_mask, threshold
from tests.oracle import check_function, reference
from tests.test_functional import operands


def philox_in_python(counter: int, key: int) -> list[int]:
    """Philox-4x32-10 with Python's own integers, from the definition."""
    c = [counter & 0xFFFFFFFF, counter >> 32, 0, 0]
    k = [key & 0xFFFFFFFF, key >> 32]
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [
            (second >> 32) ^ c[1] ^ k[0],
            second & 0xFFFFFFFF,
            (first >> 32) ^ c[3] ^ k[1],
            first & 0xFFFFFFFF,
        ]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def test_zero_key_and_counter_give_the_published_words():
    words = _philox(torch.tensor(0), torch.tensor([0]))[0].tolist()
    assert [f"{word:08x}" for word in words] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**40 + 17, 2**63 - 1, -1, -(2**63)])
def test_words_are_philox_for_every_seed_and_large_counters(seed):
    counters = [0, 1, 2**31, 2**32 - 1, 2**32, 2**45 + 3]
    words = _philox(torch.tensor(seed), torch.tensor(counters))
    key = seed % 2**64  # a negative seed is its 64 bits
    assert words.tolist() == [philox_in_python(c, key) for c in counters]


def test_a_part_of_the_mask_is_the_masks_part():
    dropout = Dropout(0.3, torch.tensor(77))
    whole = keep_mask(dropout, 20, 13)
    assert torch.equal(keep_mask(dropout._replace(row=8), 5, 13), whole[8:13])


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_elements_are_dropped_with_probability_p_and_without_pattern(p):
    kept = keep_mask(Dropout(p, torch.tensor(5)), 500, 400).double()
    deviation = (p * (1 - p) / kept.numel()) ** 0.5
    assert abs(1 - kept.mean().item() - p) < 5 * deviation
    for axis, count in ((0, 500), (1, 400)):
        spread = kept.mean(axis) - (1 - p)
        assert spread.abs().max() < 6 * (p * (1 - p) / count) ** 0.5
    flat = kept.flatten() - kept.mean()
    for lag in (1, 4, 400):
        correlation = (flat[lag:] * flat[:-lag]).mean() / flat.square().mean()
        assert abs(correlation) < 0.02
    other = keep_mask(Dropout(p, torch.tensor(6)), 500, 400).double()
    assert np.corrcoef(kept.flatten(), other.flatten())[0, 1] < 0.02


def test_threshold_is_a_probability():
    assert threshold(0.5) == 2**31
    assert threshold(1 - 1e-12) == 2**32 - 1


@pytest.mark.parametrize("seed", [12345, -7, -(2**63)])
def test_forward_and_every_gradient_use_one_mask(backend, seed):
    mask = scaled_mask(Dropout(0.4, torch.tensor(seed)), 24, 30, torch.float64)

    def ours(x, weight, A, B, bias):
        return lora_linear(x, weight, A, B, 0.75, bias, dropout_p=0.4, seed=seed)

    def plain(x, weight, A, B, bias):
        return reference(x, weight, A, B, 0.75, bias, mask=mask)

    with use_backend(backend):
        check_function(ours, plain, operands(M=24, N=20, K=30, R=4))


class TestKeptMask:
    """Plain ATen computes its mask once and keeps it for the backward; it is the seed's, as everywhere."""

    def call(self, *tensors, **seed):
        x, weight, A, B, bias = tensors
        return lora_linear(x, weight, A, B, 0.75, bias, dropout_p=0.4, **seed)

    @pytest.mark.parametrize("seed", [{}, {"seed": 5}], ids=["drawn", "given"])
    def test_it_is_computed_once(self, seed, monkeypatch):
        computed = []
        kept = functional.keep_mask
        monkeypatch.setattr(functional, "keep_mask", lambda *a: computed.append(a) or kept(*a))
        monkeypatch.setattr(dropout, "_philox", lambda *a: computed.append(a) or _philox(*a))
        leaves = operands(24, 20, 30, 4)
        with use_backend("eager"):
            y = self.call(*leaves, **seed)
        torch.autograd.grad(y.square().sum(), leaves)
        assert len(computed) == 2  # the mask, and its words

    @pytest.mark.parametrize("name", ["auto", "eager"])
    def test_one_plan_is_made(self, name, monkeypatch):
        """Of two, another thread's `use_backend` between them could give a kernel eager's mask."""
        made = []
        planned = plan.plan_call
        monkeypatch.setattr(plan, "plan_call", lambda *a: made.append(a) or planned(*a))
        leaves = operands(24, 20, 30, 4)
        with use_backend(name):
            self.call(*leaves)
            self.call(*(t.detach() for t in leaves))
        assert len(made) == 2

    def test_second_derivatives(self):
        leaves = operands(4, 3, 6, 2, torch.float64)
        assert torch.autograd.gradgradcheck(lambda *t: self.call(*t, seed=3), leaves)

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_a_checkpoint_that_is_computed_again_by_another_backend_has_the_same(self, reentrant):
        leaves = operands(24, 20, 30, 4)
        torch.manual_seed(9)
        expected = torch.autograd.grad(self.call(*leaves).square().sum(), leaves)
        torch.manual_seed(9)
        with use_backend("eager"):
            y = checkpoint(self.call, *leaves, use_reentrant=reentrant, determinism_check="none")
            if not reentrant:
                y.square().sum().backward()
        if reentrant:
            y.square().sum().backward()
        for t, g in zip(leaves, expected, strict=True):
            torch.testing.assert_close(t.grad, g)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("rows, cols", [(0, 5), (3, 0), (0, 0)])
def test_a_mask_of_nothing(rows, cols, device):
    seed = torch.zeros((), dtype=torch.int64, device=device)
    assert keep_mask(Dropout(0.5, seed), rows, cols).shape == (rows, cols)
    x = torch.ones(rows, cols, device=device)
    A, B = torch.ones(cols, 2, device=device), torch.ones(2, 4, device=device)
    y = lora_linear(x, torch.ones(4, cols, device=device), A, B, 1.0, dropout_p=0.5, seed=1)
    assert y.shape == (rows, 4)


def test_compiled_code_computes_a_mask_in_one_piece_for_all_sizes(fresh_dynamo):
    counter = CompileCounter()
    compiled = torch.compile(
        lambda x, seed: masked(x, Dropout(0.5, seed)), backend=counter, dynamic=True
    )
    seed = torch.tensor(3)
    for rows in (300, 900, 2000):
        x = torch.randn(rows, 256)
        assert torch.equal(compiled(x, seed), masked(x, Dropout(0.5, seed)))
    assert counter.frame_count == 1 and counter.op_count < 200


def test_what_is_dropped_is_zero_and_not_the_product_of_an_overflow():
    t = torch.full((8, 8), 60000.0, dtype=torch.float16)
    result = masked(t, Dropout(0.5, torch.tensor(3)))
    assert not result.isnan().any() and (result == 0).any()


def test_gradcheck_with_a_fixed_mask():
    tensors = operands(2, 2, 6, 1, dtype=torch.float64)
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(
            lambda x, w, a, b, c: lora_linear(x, w, a, b, 0.5, c, dropout_p=0.5, seed=9), tensors
        )


def test_forward_mode_uses_the_mask_of_the_value():
    x, weight, A, B, bias = (
        t.detach() for t in operands(M=24, N=20, K=30, R=4, dtype=torch.float64)
    )
    mask = scaled_mask(Dropout(0.4, torch.tensor(9)), 24, 30, torch.float64)
    tangents = tuple(torch.randn_like(t) for t in (x, A, B))
    _, actual = torch.func.jvp(
        lambda x, a, b: lora_linear(x, weight, a, b, 0.75, bias, dropout_p=0.4, seed=9),
        (x, A, B),
        tangents,
    )
    _, expected = torch.func.jvp(
        lambda x, a, b: reference(x, weight, a, b, 0.75, bias, mask=mask), (x, A, B), tangents
    )
    torch.testing.assert_close(actual, expected)


def test_the_generator_decides_and_moves_on():
    x, weight, A, B, _ = (t.detach() for t in operands())

    def draw():
        return lora_linear(x, weight, A, B, 1.0, dropout_p=0.5)

    torch.manual_seed(4)
    first, second = draw(), draw()
    torch.manual_seed(4)
    assert torch.equal(first, draw()) and torch.equal(second, draw())
    assert not torch.equal(first, second)


def test_only_the_branch_is_dropped_and_only_in_training():
    layer = LinearWithLoRA(torch.nn.Linear(40, 30), 4, 1.0, dropout=0.9)
    x = torch.randn(8, 40)
    torch.testing.assert_close(layer(x), layer.linear(x))  # B is zero, so no mask can matter
    torch.nn.init.normal_(layer.lora.B)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    expected = layer.linear(x) + x @ layer.lora.A @ layer.lora.B
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(x), layer(x))


def test_the_mean_over_masks_is_the_undropped_branch():
    layer = LinearWithLoRA(torch.nn.Linear(16, 8), 4, 1.0, dropout=0.25)
    torch.nn.init.normal_(layer.lora.B)
    x = torch.randn(1, 16)
    mean = torch.stack([layer(x) for _ in range(3000)]).mean(0)
    layer.eval()
    assert (mean - layer(x)).abs().max() < 0.15 * (layer(x) - layer.linear(x)).abs().max() + 0.05
