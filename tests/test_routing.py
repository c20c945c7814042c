"""Rows sorted by group and brought back: against loops over the tokens, with every derivative."""

from __future__ import annotations

import pytest
import torch

from lora_kernels.routing import sorted_by_group
from tests.oracle import with_gradients

ROUTES = {
    "two slots": torch.tensor([[2, 0], [0, 3], [2, 1], [3, 2], [0, 2]]),
    "one slot": torch.tensor([1, 0, 1, 3, 3, 0]),
    "an empty group in the middle and one at the end": torch.tensor([[0, 2], [2, 0]]),
    "one group": torch.tensor([[3, 3], [3, 3], [3, 3]]),
    "no token": torch.empty(0, 2, dtype=torch.int64),
    "int32": torch.tensor([[1, 3], [0, 1]], dtype=torch.int32),
}
GROUPS = 4


@pytest.mark.parametrize("groups", ROUTES.values(), ids=ROUTES)
def test_offsets_and_order(groups):
    routing = sorted_by_group(groups, GROUPS)
    flat = groups.flatten().tolist()
    wanted = sorted(range(len(flat)), key=lambda i: flat[i])  # stable
    assert routing.order.tolist() == wanted
    assert routing.inverse[routing.order].tolist() == list(range(len(flat)))
    below = [sum(g < bound for g in flat) for bound in range(GROUPS + 1)]
    assert routing.offsets.tolist() == below and routing.offsets.dtype == torch.int32


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("groups", ROUTES.values(), ids=ROUTES)
def test_spread_and_gather(groups, weighted):
    routing = sorted_by_group(groups, GROUPS)
    T = groups.shape[0]
    x = torch.randn(T, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(T, routing.slots, dtype=torch.float64, requires_grad=True)

    def there_and_back(x, weights):
        rows = routing.spread(x)
        return routing.gather(rows * rows, weights if weighted else None)

    total = weights.sum(1, keepdim=True) if weighted else routing.slots
    torch.testing.assert_close(there_and_back(x, weights), x * x * total)
    for s, token in enumerate((routing.order // routing.slots).tolist()):
        assert torch.equal(routing.spread(x)[s], x[token])
    if T:
        assert torch.autograd.gradcheck(there_and_back, (x, weights), check_forward_ad=True)
        assert torch.autograd.gradgradcheck(there_and_back, (x, weights))


@pytest.mark.parametrize("groups", [ROUTES["two slots"], ROUTES["one slot"]])
def test_a_batch_of_gradients_keeps_its_graph(groups):
    """is_grads_batched with create_graph: the second derivatives are those of the gradients taken one by one."""
    routing = sorted_by_group(groups, GROUPS)
    x = torch.randn(groups.shape[0], 3, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(groups.shape[0], routing.slots, dtype=torch.float64, requires_grad=True)
    y = routing.gather(routing.spread(x), weights)
    dys = torch.randn(4, *y.shape, dtype=torch.float64)
    (batched,) = torch.autograd.grad(y, x, dys, is_grads_batched=True, create_graph=True)
    single = torch.stack(
        [torch.autograd.grad(y, x, dy, create_graph=True)[0] for dy in dys.unbind()]
    )
    torch.testing.assert_close(batched, single)
    both = (torch.autograd.grad(each.square().sum(), weights) for each in (batched, single))
    torch.testing.assert_close(*both)


def test_the_derivative_adds_a_tokens_slots_in_one_order():
    """In float32 sums of bfloat16, rounded once, where autograd's own would round after each slot."""
    routing = sorted_by_group(torch.zeros(1, 64, dtype=torch.int64), GROUPS)
    x = torch.ones(1, 2, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.rand(64, 2).bfloat16()
    routing.spread(x).backward(dy)
    assert torch.equal(x.grad, dy.float().sum(0, keepdim=True).bfloat16())


def test_compiled_code_has_the_same_derivatives():
    routing = sorted_by_group(ROUTES["two slots"], GROUPS)
    x, weights = torch.randn(5, 3, requires_grad=True), torch.rand(5, 2, requires_grad=True)

    def there_and_back(x, weights):
        return routing.gather(routing.spread(x).sin(), weights)

    compiled = torch.compile(there_and_back, backend="aot_eager", fullgraph=True)
    both = (with_gradients(f, (x, weights)) for f in (compiled, there_and_back))
    torch.testing.assert_close(*both)
