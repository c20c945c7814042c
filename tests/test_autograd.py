"""Derivatives: every subset of required gradients, higher orders, forward mode, function transforms, what is saved."""

from __future__ import annotations

import gc
import itertools
import weakref
from functools import partial

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lora_kernels import lora_linear, lora_projections, use_backend
from lora_kernels.dropout import Dropout, scaled_mask
from tests.oracle import assert_bits, reference, saved_inside, with_gradients
from tests.test_functional import NAMES, operands

SUBSETS = [s for n in range(1, 6) for s in itertools.combinations(NAMES, n)]


def doubles(needed=NAMES, M=4, N=3, K=5, R=2):
    tensors = operands(M, N, K, R, dtype=torch.float64)
    return tuple(t.requires_grad_(name in needed) for name, t in zip(NAMES, tensors, strict=True))


def ours(x, weight, A, B, bias, **options):
    return lora_linear(x, weight, A, B, 0.75, bias, **options)


def plain(x, weight, A, B, bias):
    return reference(x, weight, A, B, 0.75, bias)


def tangent_of(function):
    """The tangent, or tangents, of what `function` returns within a dual level."""
    with forward_ad.dual_level():
        out = function()
        if isinstance(out, tuple):
            return [forward_ad.unpack_dual(t).tangent for t in out]
        return forward_ad.unpack_dual(out).tangent


@pytest.mark.parametrize("needed", SUBSETS, ids="+".join)
class TestSubsets:
    def test_gradients(self, needed):
        assert torch.autograd.gradcheck(ours, doubles(needed), check_forward_ad=True)

    def test_second_derivatives(self, needed):
        assert torch.autograd.gradgradcheck(ours, doubles(needed))

    def test_gradients_exist_exactly_where_they_are_required(self, backend, needed):
        tensors = [
            t.detach().requires_grad_(n in needed) for n, t in zip(NAMES, operands(), strict=True)
        ]
        with use_backend(backend):
            ours(*tensors).backward(dy := torch.randn(9, 7))
        assert [t.grad is not None for t in tensors] == [name in needed for name in NAMES]
        wanted = [t for t in tensors if t.requires_grad]
        expected = list(torch.autograd.grad(plain(*tensors), wanted, dy))
        torch.testing.assert_close([t.grad for t in wanted], expected)

    def test_only_what_a_needed_gradient_reads_is_saved(self, needed):
        with saved_inside() as saved:
            ours(*doubles(needed, M=11, N=13, K=17, R=3))
        expected = []
        if {"weight", "A"} & {*needed}:
            expected.append((11, 17))  # x
        if "x" in needed:
            expected += [(13, 17), (17, 3)]  # weight, A
        if {"x", "A"} & {*needed}:
            expected.append((3, 13))  # B
        if "B" in needed:
            expected.append((11, 3))  # s
        assert sorted(tuple(t.shape) for t in saved) == sorted(expected)


class _Products(TorchDispatchMode):
    """The shapes of all matrix products that run inside."""

    def __init__(self):
        super().__init__()
        self.results: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.results.append(tuple(out.shape))
        return out


def test_a_frozen_base_costs_no_product_of_its_weights_size():
    x, weight, A, B, _ = operands(M=31, N=29, K=23, R=3)
    weight.requires_grad_(False)
    y = lora_linear(x, weight, A, B, 1.0, backend="eager")
    with _Products() as products:
        y.sum().backward()
    assert (29, 23) not in products.results and len(
        products.results
    ) == 5  # q, dB, q·Aᵀ, + dy·W, dA
    weight.requires_grad_(True)
    y = lora_linear(x, weight, A, B, 1.0, backend="eager")
    with _Products() as products:
        y.sum().backward()
    assert (29, 23) in products.results


def test_memory_that_backward_does_not_read_is_free_after_forward():
    """With only A and B trained, W is not kept and neither is anything of y's size."""
    x, weight, A, B, _ = operands()
    x, weight = x.detach(), weight.detach().clone()
    alive = weakref.ref(weight)
    y = lora_linear(x, weight, A, B, 1.0)
    del weight
    gc.collect()
    assert alive() is None
    y.sum().backward()
    assert A.grad is not None


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_saved_bytes_of_a_half_layer_are_x_and_s(half):
    x, weight, A, B, _ = operands(M=64, N=48, K=40, R=4, dtype=half, adapter_dtype=torch.float32)
    weight.requires_grad_(False)
    own = {t.data_ptr() for t in (weight, A, B)}
    with saved_inside() as saved:
        lora_linear(x, weight, A, B, 1.0)
    assert sum(t.nbytes for t in saved if t.data_ptr() not in own) == 64 * 40 * 2 + 64 * 4 * 4


class TestHigherOrder:
    def test_gradient_penalty_is_eagers(self):
        """A backward that hides its intermediates would drop terms here without a word."""
        totals = []
        for function in (ours, plain):
            torch.manual_seed(1)
            x, weight, A, B, bias = doubles()
            (dx,) = torch.autograd.grad(
                function(x, weight, A, B, bias).square().sum(), x, create_graph=True
            )
            penalty = dx.square().sum()
            totals.append(torch.autograd.grad(penalty, (weight, A, B)))
        torch.testing.assert_close(*totals)

    @pytest.mark.parametrize("transform", [jacrev, jacfwd, hessian], ids=lambda t: t.__name__)
    @pytest.mark.parametrize("argument", range(5), ids=NAMES)
    def test_transforms(self, transform, argument):
        tensors = [t.detach() for t in doubles()]

        def scalar_or_vector(function):
            return lambda *t: function(*t).square().sum() if transform is hessian else function(*t)

        mine = transform(scalar_or_vector(ours), argnums=argument)(*tensors)
        theirs = transform(scalar_or_vector(plain), argnums=argument)(*tensors)
        torch.testing.assert_close(mine, theirs)

    def test_jvp(self):
        tensors = tuple(t.detach() for t in doubles())
        tangents = tuple(torch.randn_like(t) for t in tensors)
        torch.testing.assert_close(*(jvp(f, tensors, tangents) for f in (ours, plain)))

    @pytest.mark.parametrize("p", [0.0, 0.5])
    @pytest.mark.parametrize("call", ["lora_linear", "a tensor as alpha", "DoRA", "projections"])
    def test_forward_over_forward(self, call, p):
        """jacfwd of jacfwd, in each two operands."""
        tensors = x, weight, A, B, _ = [t.detach() for t in doubles()]
        mask = scaled_mask(Dropout(p, torch.tensor(5)), *x.shape, x.dtype) if p else None
        alpha = torch.tensor(0.75).double() if call == "a tensor as alpha" else 0.75
        magnitude = torch.rand(3).double() if call == "DoRA" else None
        norms = torch.linalg.vector_norm(weight + alpha * (A @ B).t(), dim=1)

        def mine(x, weight, A, B, bias):
            if call == "projections":
                part = weight, A, B, alpha, bias, p, 5
                return sum(lora_projections(x, [part, part]))
            options = {"magnitude": magnitude, "dropout_p": p, "seed": 5}
            return lora_linear(x, weight, A, B, alpha, bias, **options)

        def theirs(x, weight, A, B, bias):
            if magnitude is None:
                y = reference(x, weight, A, B, 0.75, bias, mask=mask)
                return 2 * y if call == "projections" else y
            v = x if mask is None else mask * x
            c = magnitude / norms
            return (x - v) @ weight.t() + c * reference(v, weight, A, B, 0.75) + bias

        for first, second in itertools.combinations(range(5), 2):
            got, want = (
                jacfwd(jacfwd(lambda *t, f=f: f(*t).square().sum(), first), second)(*tensors)
                for f in (mine, theirs)
            )
            torch.testing.assert_close(got, want)

    @pytest.mark.parametrize("p", [0.0, 0.5])
    def test_forward_mode_in_alpha(self, p):
        """By hand, under other transforms, and in the derivatives of a derivative."""
        x, weight, A, B, bias = (t.detach() for t in doubles())
        mask = scaled_mask(Dropout(p, torch.tensor(5)), *x.shape, x.dtype) if p else None

        def mine(alpha, a=A):
            return lora_linear(x, weight, a, B, alpha, bias, dropout_p=p, seed=5).square().sum()

        def theirs(alpha, a=A):
            return reference(x, weight, a, B, alpha, bias, mask=mask).square().sum()

        alpha, one = torch.tensor(0.75).double(), torch.tensor(1.0).double()
        for f in (
            lambda g: jvp(g, (alpha,), (one,)),
            lambda g: jacfwd(g)(alpha),
            lambda g: jacfwd(jacfwd(g))(alpha),
            lambda g: jvp(lambda scale: grad(lambda a: g(scale, a))(A), (alpha,), (one,)),
            lambda g: vmap(jacfwd(g))(torch.stack((alpha, one))),
            lambda g: grad(lambda a: jvp(lambda scale: g(scale, a), (alpha,), (one,))[1])(A),
            lambda g: tangent_of(lambda: g(forward_ad.make_dual(alpha, one))),
        ):
            torch.testing.assert_close(f(mine), f(theirs))

    def test_reverse_mode_in_alpha_is_refused(self):
        tensors = [t.detach() for t in doubles()]
        alpha = torch.tensor(0.75).double()

        def of_alpha(scale):
            return lora_linear(*tensors[:4], scale, tensors[4]).sum()

        for derivative in (grad, jacrev, lambda f: grad(jacfwd(f))):
            with pytest.raises(ValueError, match="alpha must not require grad"):
                derivative(of_alpha)(alpha)
        with pytest.raises(ValueError, match="alpha must not require grad"):
            vmap(grad(of_alpha))(alpha.expand(2))

    def test_forward_over_reverse_and_reverse_over_forward(self, backend):
        """Within a dual level, without a function transform: also where only the incoming gradient is dual."""
        x, weight, A, B, bias = (t.detach() for t in operands())
        dx, ddy = torch.randn_like(x), torch.randn(9, 7)

        def derivatives(function):
            leaves = [t.clone().requires_grad_() for t in (x, A, B)]

            def y(first):
                return function(first, weight, leaves[1], leaves[2], bias)

            def over_reverse():
                dual = forward_ad.make_dual(leaves[0], dx)
                return torch.autograd.grad(y(dual).square().sum(), leaves)

            def over_forward():
                return y(forward_ad.make_dual(leaves[0], dx)).square().sum()

            made = y(leaves[0])
            with forward_ad.dual_level():
                tangent = forward_ad.unpack_dual(over_forward()).tangent
                found = list(torch.autograd.grad(tangent, leaves))
            found += tangent_of(over_reverse)
            found += tangent_of(
                lambda: torch.autograd.grad(
                    made, leaves, forward_ad.make_dual(torch.ones_like(ddy), ddy)
                )
            )
            return found

        with use_backend(backend):
            mine = derivatives(ours)
        torch.testing.assert_close(mine, derivatives(plain), rtol=1e-4, atol=1e-4)

    def test_per_sample_gradients(self):
        x, weight, A, B, bias = (t.detach() for t in doubles())
        results = [
            vmap(
                grad(
                    lambda a, b, sample, f=f: f(sample, weight, a, b, bias).square().sum(),
                    argnums=(0, 1),
                ),
                in_dims=(None, None, 0),
            )(A, B, x)
            for f in (ours, plain)
        ]
        torch.testing.assert_close(*results)

    def test_an_ensemble_of_adapters(self):
        x, weight, A, B, bias = (t.detach() for t in doubles())
        stacked_A, stacked_B = torch.randn(4, *A.shape).double(), torch.randn(4, *B.shape).double()
        mine, theirs = (
            vmap(lambda a, b, f=f: f(x, weight, a, b, bias))(stacked_A, stacked_B)
            for f in (ours, plain)
        )
        torch.testing.assert_close(mine, theirs)

    def test_functional_call_on_the_module(self):
        from lora_kernels import LinearWithLoRA

        layer = LinearWithLoRA(torch.nn.Linear(5, 3), 2, 1.0).double()
        parameters = {name: torch.randn_like(p) for name, p in layer.named_parameters()}
        x = torch.randn(4, 5).double()
        jacobian = jacrev(lambda p: functional_call(layer, p, (x,)))(parameters)
        expected = jacrev(
            lambda p: reference(
                x, p["linear.weight"], p["lora.A"], p["lora.B"], 1.0, p["linear.bias"]
            )
        )(parameters)
        torch.testing.assert_close(jacobian, expected)


class TestInPlace:
    def test_a_change_of_a_saved_tensor_is_an_error(self):
        tensors = operands()
        y = ours(*tensors)
        with torch.no_grad():
            tensors[3].add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()

    def test_the_result_may_be_changed(self):
        both = (lambda *t: ours(*t).add_(1.0).mul_(2.0)), (lambda *t: 2 * (plain(*t) + 1))
        tensors = operands()
        torch.testing.assert_close(*(with_gradients(f, tensors) for f in both))

    def test_no_operand_is_changed(self, backend):
        tensors = operands()
        before = [t.detach().clone() for t in tensors]
        dy = torch.randn(9, 7)
        dy_before = dy.clone()
        with use_backend(backend):
            ours(*tensors).backward(dy)
        assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))
        assert torch.equal(dy, dy_before)

    def test_backward_twice_with_a_kept_graph(self, backend):
        tensors = operands()
        with use_backend(backend):
            y = ours(*tensors)
            first = torch.autograd.grad(y, tensors, torch.ones_like(y), retain_graph=True)
            second = torch.autograd.grad(y, tensors, torch.ones_like(y))
        assert_bits(first, second)


class TestCheckpoint:
    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("p", [0.0, 0.4])
    def test_recomputed_gradients_are_the_same_bits(self, reentrant, p):
        """The mask's seed is drawn again in the replay, from the restored generator."""

        def forward(*t):
            return ours(*t, dropout_p=p).relu()

        grads = []
        for function in (forward, partial(checkpoint, forward, use_reentrant=reentrant)):
            torch.manual_seed(3)
            tensors = operands()
            function(*tensors).square().sum().backward()
            grads.append([t.grad for t in tensors])
        assert_bits(*grads)

    def test_a_frozen_input_needs_the_form_without_reentry(self):
        x, weight, A, B, bias = operands()
        x.requires_grad_(False)
        y = checkpoint(lambda t: ours(t, weight, A, B, bias), x, use_reentrant=False)
        y.sum().backward()
        assert A.grad is not None and B.grad is not None
