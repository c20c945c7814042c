"""The registered operators: their registration, fake kernels, and compiled graphs that do not multiply."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lora_kernels import LinearWithLoRA, lora_linear, ops, use_backend
from tests.oracle import check_function, reference
from tests.test_functional import NAMES, operands

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


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


@pytest.mark.slow
def test_forward_registration_with_strides_and_dropout():
    x, weight, A, B, bias = operands()
    x = torch.randn(6, 9).t().requires_grad_()
    A = torch.randn(3, 6).t().requires_grad_()
    torch.library.opcheck(
        torch.ops.lora_kernels.lora_linear, arguments((x, weight, A, B, bias), 0.3)
    )


@pytest.mark.parametrize(
    "needs, dtype",
    [
        ((True,) * 5, torch.bfloat16),
        ((True, False, True, True, False), torch.float32),
        ((False, False, True, True, False), torch.bfloat16),
    ],
)
def test_backward_registration(needs, dtype):
    """Also of float32 adapters on a half base, whose gradients are float32."""
    x, weight, A, B, _ = (t.detach() for t in operands())
    x, weight, dy = (t.to(dtype) for t in (x, weight, torch.randn(9, 7)))
    first = dy, torch.float32, list(needs), *A.shape
    saved = x, weight, A, B, torch.randn(9, 3)
    args = *first, *saved, torch.tensor(0.5), 0.0, None, "eager"
    torch.library.opcheck(torch.ops.lora_kernels.lora_linear_backward, args)


@pytest.mark.parametrize(
    "needed", [s for n in (1, 2, 5) for s in itertools.combinations(range(5), n)], ids=str
)
def test_the_operators_gradients(needed):
    tensors = [
        t.requires_grad_(i in needed) for i, t in enumerate(operands(4, 3, 5, 2, torch.float64))
    ]
    assert torch.autograd.gradcheck(
        lambda *t: ops.lora_linear(*arguments(t)), tensors, check_batched_grad=False
    )  # of y and of s


class _Plain(torch.Tensor):
    """A subclass that changes nothing."""


def _traced(leaves):
    return torch.jit.trace(by_name, leaves, check_trace=False)


def _exported(leaves):
    class Model(torch.nn.Module):
        def forward(self, *t):
            return by_name(*t)

    return torch.export.export(Model(), leaves).module()


def by_name(x, weight, A, B, bias):
    return lora_linear(x, weight, A, B, 0.75, bias)


# How a call comes to the registered operator: leaves -> a function of them.
WAYS = {
    "operator": lambda leaves: lambda *t: ops.lora_linear(*arguments(t)[:-1], "auto")[0],
    "subclass x": lambda leaves: lambda x, *t: by_name(x.as_subclass(_Plain), *t),
    "subclass A": lambda leaves: lambda x, w, a, *t: by_name(x, w, a.as_subclass(_Plain), *t),
    "jit.trace": _traced,
    "make_fx": lambda leaves: make_fx(by_name)(*leaves),
    "make_fx before dispatch": lambda leaves: make_fx(by_name, pre_dispatch=True)(*leaves),
    "export": _exported,
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("way", WAYS)
def test_every_derivative_on_every_way_to_the_operator(way, dtype):
    """First, second, forward mode, forward over reverse, a batch of gradients: those of the plain formula."""
    leaves = tuple(t.detach() for t in operands(dtype=dtype))
    traced = WAYS[way](leaves)
    dx = torch.randn_like(leaves[0])

    def derivatives(function):
        def fresh():
            return [t.clone().requires_grad_() for t in leaves]

        t = fresh()
        first = torch.autograd.grad(function(*t).square().sum(), t, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), t)
        t = fresh()
        with forward_ad.dual_level():
            y = function(forward_ad.make_dual(t[0], dx), *t[1:])
            forward = forward_ad.unpack_dual(y).tangent
            g = torch.autograd.grad(y.square().sum(), t)
            tangents = [forward_ad.unpack_dual(each).tangent for each in g]
            assert None not in tangents[:4]
        y = function(*fresh())
        many = torch.autograd.grad(
            function(*t), t, torch.randn(2, *y.shape, dtype=dtype), is_grads_batched=True
        )
        return [*first, *second, forward, *tangents[:4], *many]

    torch.manual_seed(1)
    mine = derivatives(traced)
    torch.manual_seed(1)
    plain = derivatives(lambda *t: reference(*t[:4], 0.75, t[4]))
    mine = [t.as_subclass(torch.Tensor) for t in mine]
    torch.testing.assert_close(mine, plain, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("needs", [(True,) * 5, (False, False, True, True, False)])
def test_the_backward_operator_is_differentiable_itself(needs):
    x, weight, A, B, _ = (t.detach() for t in operands(4, 3, 5, 2, torch.float64))
    dy, s = torch.randn(4, 3).double(), torch.randn(4, 2).double()
    leaves = [t.requires_grad_() for t in (dy, x, weight, A, B, s)]

    def backward(dy, *saved):
        alpha = torch.tensor(0.5).double()
        grads = ops.lora_linear_backward(
            dy, dy.dtype, list(needs), *A.shape, *saved, alpha, 0.0, None, "eager"
        )
        return tuple(g for g, need in zip(grads, needs, strict=True) if need)

    assert torch.autograd.gradcheck(backward, leaves, check_forward_ad=True)


def test_an_alpha_that_requires_grad_is_refused():
    x, weight, A, B, bias = operands()
    alpha = torch.tensor(0.5, requires_grad=True)
    with pytest.raises(ValueError, match="alpha must not require grad"):
        ops.lora_linear(x, weight, A, B, bias, alpha, 0.0, None, "auto")


def test_double_backward_of_a_compiled_call_is_refused_and_not_wrong():
    tensors = operands(dtype=torch.float64)
    y = torch.compile(lambda *t: lora_linear(*t[:4], 0.5, t[4]), backend="aot_eager")(*tensors)
    with pytest.raises(RuntimeError, match=r"double backward|does not require grad|create_graph"):
        (dx,) = torch.autograd.grad(y.square().sum(), tensors[0], create_graph=True)
        dx.square().sum().backward()


class TestFlops:
    """FlopCounterMode counts the products that a layer computes."""

    M, N, K, R = 9, 7, 6, 3
    base, lowrank = 2 * M * N * K, 2 * M * R * (K + N)

    @pytest.mark.parametrize("bias", [True, False])
    def test_forward_and_backward(self, backend, bias):
        tensors = operands(self.M, self.N, self.K, self.R, bias=bias)
        tensors[1].requires_grad_(False)
        if bias:
            tensors[4].requires_grad_(False)
        with use_backend(backend), FlopCounterMode(display=False) as counter:
            y = lora_linear(*tensors[:4], 0.5, tensors[4])
            assert counter.get_total_flops() == self.base + self.lowrank
            y.sum().backward()
        assert counter.get_total_flops() == 2 * self.base + 3 * self.lowrank

    @pytest.mark.parametrize(
        "needed, base, down, up",
        [("x", 1, 1, 1), ("A", 0, 1, 1), ("B", 0, 0, 1), ("weight", 1, 0, 0), ("bias", 0, 0, 0)],
    )
    def test_what_each_gradient_costs(self, needed, base, down, up):
        """down: products of M·K·R, up: of M·N·R."""
        tensors = operands(self.M, self.N, self.K, self.R)
        for name, t in zip(NAMES, tensors, strict=True):
            t.requires_grad_(name == needed)
        with FlopCounterMode(display=False) as counter:
            y = lora_linear(*tensors[:4], 0.5, tensors[4])
            before = counter.get_total_flops()
            y.sum().backward()
        branch = 2 * self.M * self.R * (down * self.K + up * self.N)
        assert counter.get_total_flops() - before == base * self.base + branch

    def test_a_backward_that_is_counted_alone(self, backend):
        """Plain ATen computes it, and computes s again where the backend has the layer as one operator."""
        tensors = operands(self.M, self.N, self.K, self.R)
        for i in (1, 4):
            tensors[i].requires_grad_(False)
        with use_backend(backend):
            y = lora_linear(*tensors[:4], 0.5, tensors[4])
        with use_backend(backend), FlopCounterMode(display=False) as counter:
            y.sum().backward()
        again = 2 * self.M * self.K * self.R if backend == "cpu" else 0
        assert counter.get_total_flops() == self.base + 2 * self.lowrank + again

    @pytest.mark.slow
    @pytest.mark.parametrize("imported", ["before", "after"])
    def test_the_order_of_imports_does_not_matter(self, imported):
        """A counter that was made before the first call, in inference mode, knows the formula."""
        lines = ["from torch.utils.flop_counter import FlopCounterMode", "import lora_kernels"]
        code = f"""
import torch
{chr(10).join(lines if imported == "before" else reversed(lines))}
counter = FlopCounterMode(display=False)
x, w, a, b = (torch.ones(*s) for s in ((9, 6), (7, 6), (6, 3), (3, 7)))
with torch.inference_mode(), counter:
    lora_kernels.lora_linear(x, w, a, b, 1.0)
assert counter.get_total_flops() == {self.base + self.lowrank}, counter.get_total_flops()
"""
        subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=60)

    def test_a_compiled_layer(self):
        tensors = operands(self.M, self.N, self.K, self.R)
        compiled = torch.compile(by_name, backend="aot_eager")
        compiled(*tensors).sum().backward()
        with FlopCounterMode(display=False) as counter:
            compiled(*tensors).sum().backward()
        assert counter.get_total_flops() == 3 * (self.base + self.lowrank)


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

    @pytest.mark.parametrize("options, graphs", [({"dynamic": True}, 1), ({}, 2)], ids=str)
    def test_a_new_batch_size_compiles_nothing_more(self, options, graphs):
        """By default the second size makes the graph dynamic."""
        layer, compiled, counter = self.count(**options)
        for M in (5, 6, 7, 9, 12, 100):
            self.check(layer, compiled, torch.randn(M, 6))
        assert counter.frame_count == graphs

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_inductor_forward_and_backward(self, dtype):
        # Large enough that the largest of many errors is compared, not one of a few.
        tensors = operands(M=33, N=60, K=72, R=12, dtype=dtype, lead=(3, 11))
        function = torch.compile(lambda *t: by_name(*t).mul(1.0), fullgraph=True)
        check_function(function, lambda *t: reference(*t[:4], 0.75, t[4]), tensors)

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
