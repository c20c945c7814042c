"""The registered operators: their registration, fake kernels, and compiled graphs that do not multiply."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from lora_kernels import LinearWithLoRA, lora_linear, ops
from tests.oracle import assert_budget, reference
from tests.test_functional import operands


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def arguments(tensors, p=0.0):
    seed = torch.tensor(3) if p else None
    return (*tensors, torch.tensor(0.75), p, seed, "eager")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": torch.bfloat16, "adapter_dtype": torch.float32},
        {"dtype": torch.float64, "bias": False},
        {"M": 0},
    ],
    ids=str,
)
def test_forward_registration(options):
    torch.library.opcheck(torch.ops.lora_kernels.lora_linear, arguments(operands(**options)))


def test_forward_registration_with_strides_and_dropout():
    x, weight, A, B, bias = operands()
    x = torch.randn(6, 9).t().requires_grad_()
    A = torch.randn(3, 6).t().requires_grad_()
    torch.library.opcheck(
        torch.ops.lora_kernels.lora_linear, arguments((x, weight, A, B, bias), 0.3)
    )


@pytest.mark.parametrize(
    "needs", [(True,) * 5, (True, False, True, True, False), (False, False, True, True, False)]
)
def test_backward_registration(needs):
    x, weight, A, B, _ = (t.detach() for t in operands())
    dy, s = torch.randn(9, 7), torch.randn(9, 3)
    args = (
        dy,
        torch.float32,
        list(needs),
        x,
        weight,
        A,
        B,
        s,
        torch.tensor(0.5),
        0.0,
        None,
        "eager",
    )
    torch.library.opcheck(torch.ops.lora_kernels.lora_linear_backward, args)


@pytest.mark.parametrize(
    "needed", [s for n in (1, 2, 5) for s in itertools.combinations(range(5), n)], ids=str
)
def test_the_operators_gradients(needed):
    tensors = [
        t.requires_grad_(i in needed) for i, t in enumerate(operands(4, 3, 5, 2, torch.float64))
    ]
    assert torch.autograd.gradcheck(
        lambda *t: ops.lora_linear(*arguments(t))[0], tensors, check_batched_grad=False
    )


def test_double_backward_of_a_compiled_call_is_refused_and_not_wrong():
    tensors = operands(dtype=torch.float64)
    y = torch.compile(lambda *t: lora_linear(*t[:4], 0.5, t[4]), backend="aot_eager")(*tensors)
    with pytest.raises(RuntimeError, match=r"double backward|does not require grad|create_graph"):
        (dx,) = torch.autograd.grad(y.square().sum(), tensors[0], create_graph=True)
        dx.square().sum().backward()


class TestCompile:
    def count(self, **options):
        counter = CompileCounter()
        layer = LinearWithLoRA(torch.nn.Linear(6, 7), 3, 1.0)
        torch.nn.init.normal_(layer.lora.B)
        return layer, torch.compile(layer, backend=counter, fullgraph=True, **options), counter

    def check(self, layer, compiled, x):
        torch.testing.assert_close(compiled(x), layer.linear(x) + layer.lora(x))

    def test_a_new_alpha_compiles_nothing(self):
        layer, compiled, counter = self.count()
        x = torch.randn(5, 6)
        for alpha in (1.0, 2.0, -0.5, 0.0, 16):
            layer.lora.alpha = alpha
            self.check(layer, compiled, x)
        assert counter.frame_count == 1

    def test_a_new_batch_size_compiles_nothing_more(self):
        layer, compiled, counter = self.count(dynamic=True)
        for M in (5, 6, 7, 9, 12, 100):
            self.check(layer, compiled, torch.randn(M, 6))
        assert counter.frame_count == 1

    def test_by_default_the_second_size_makes_the_graph_dynamic(self):
        layer, compiled, counter = self.count()
        for M in (5, 6, 7, 9, 12, 100):
            self.check(layer, compiled, torch.randn(M, 6))
        assert counter.frame_count == 2

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_inductor_forward_and_backward(self, dtype):
        tensors = operands(M=33, N=20, K=24, R=4, dtype=dtype, lead=(3, 11))
        function = torch.compile(
            lambda x, w, a, b, c: lora_linear(x, w, a, b, 0.75, c).mul(1.0), fullgraph=True
        )

        def run(f, leaves):
            y = f(*leaves)
            return [y, *torch.autograd.grad(y, leaves, torch.ones_like(y))]

        def plain(*t):
            return reference(*t[:4], 0.75, t[4])

        exact = run(plain, [t.detach().double().requires_grad_() for t in tensors])
        for mine, eager, true in zip(
            run(function, tensors), run(plain, tensors), exact, strict=True
        ):
            assert_budget(mine, eager, true)

    def test_inside_a_checkpoint_with_dropout(self):
        """<dB, B> is the sum of what the branch added, if backward replays the mask that forward drew."""
        layer = LinearWithLoRA(torch.nn.Linear(60, 6), 3, 1.0, dropout=0.5)
        torch.nn.init.normal_(layer.lora.B)

        def step(x):
            return checkpoint(layer, x, use_reentrant=False)

        x = torch.randn(50, 60, requires_grad=True)
        y = torch.compile(step, fullgraph=True, backend="aot_eager")(x)
        y.sum().backward()
        added = (y - layer.linear(x)).sum()
        torch.testing.assert_close(
            (layer.lora.B.grad * layer.lora.B).sum(), added, rtol=1e-4, atol=1e-3
        )

    def test_the_choice_of_backend_is_no_part_of_the_graph(self):
        """Whatever M is at run time, the op inside the graph asks for it then."""
        layer, _, _ = self.count(dynamic=True)
        graphs = []
        torch.compile(layer, backend=lambda g, i: graphs.append(g) or g.forward, fullgraph=True)(
            torch.randn(5, 6)
        )
        targets = [str(n.target) for g in graphs for n in g.graph.nodes if n.op == "call_function"]
        assert sum("lora_kernels.lora_linear" in t for t in targets) == 1
