"""`grouped_lora_linear` against a loop over the groups in float64: forward, every gradient, layouts, transforms, errors."""

from __future__ import annotations

import re

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.functional import hessian

from lora_kernels import explain, grouped_lora_linear, lora_linear, plan
from lora_kernels.backends.composite import PRODUCTS as COMPOSITE
from lora_kernels.dropout import Dropout, scaled_mask
from lora_kernels.operands import Adapter, Groups
from lora_kernels.problem import Problem
from tests.grouped import NAMES, loop
from tests.oracle import assert_bits, check_function, saved_inside, with_gradients
from tests.toy_format import Int8Rows

f32, bf16, f16, f64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
ROUTINGS = {
    "mixed": [0, 3, 3, 4, 11, 40],
    "first": [0, 9, 9, 9, 9, 9],
    "last": [0, 0, 0, 0, 0, 7],
    "ones": [0, 1, 2, 3, 4, 5],
    "no_rows": [0, 0, 0, 0, 0, 0],
}


def operands(offsets, dtype=f32, *, K=13, N=9, R=5, shared=False, adapter_dtype=None):
    """((x, weight, A, B, bias), offsets, scale) of as many groups as offsets say."""
    torch.manual_seed(0)
    G, T = len(offsets) - 1, offsets[-1]
    own = () if shared else (G,)
    shapes = ((T, K), (*own, N, K), (G, K, R), (G, R, N), (*own, N))
    dtypes = (dtype, dtype, adapter_dtype or dtype, adapter_dtype or dtype, dtype)
    made = (torch.randn(shape).to(d) for shape, d in zip(shapes, dtypes, strict=True))
    return tuple(t.requires_grad_() for t in made), as_offsets(offsets), torch.rand(G) + 0.5


def as_offsets(numbers):
    return torch.tensor(numbers, dtype=torch.int32)


def called(tensors, offsets, scale, **options):
    x, weight, A, B, bias = tensors
    return grouped_lora_linear(x, weight, A, B, offsets, scale, bias, **options)


def check(tensors, offsets, scale, mask=None, **options):
    """Forward and the gradients of what requires one are within the budget of the loop's own error."""
    check_function(
        lambda *t: called(t, offsets, scale, **options),
        lambda *t: loop(t, offsets.tolist(), scale, mask),
        tensors,
    )


@pytest.mark.parametrize("shared", [False, True], ids=["experts", "shared"])
@pytest.mark.parametrize("dtype", [f32, bf16, f16, f64], ids=str)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_forward_and_gradients_are_those_of_a_loop(routing, dtype, shared, backend):
    if dtype == f64:
        backend = "auto"
    check(*operands(ROUTINGS[routing], dtype, shared=shared), backend=backend)


@pytest.mark.parametrize(
    "sizes", [(1, 1, 1), (64, 48, 16), (70, 130, 33), (5, 3, 12), (0, 4, 2), (4, 0, 2), (4, 4, 0)]
)
@pytest.mark.parametrize("shared", [False, True], ids=["experts", "shared"])
def test_sizes(sizes, shared, backend):
    K, N, R = sizes
    check(*operands([0, 2, 2, 19, 60], K=K, N=N, R=R, shared=shared), backend=backend)


@pytest.mark.parametrize("dtype", [bf16, f16], ids=str)
def test_float32_adapters_on_a_half_base(dtype, backend):
    check(*operands(ROUTINGS["mixed"], dtype, adapter_dtype=f32), backend=backend)


@pytest.mark.parametrize(
    "needs", ["x", "A", "B", "A B", "x weight", "weight", "bias", "x A B", "x bias"]
)
@pytest.mark.parametrize("shared", [False, True], ids=["experts", "shared"])
def test_any_subset_of_gradients(needs, shared, backend):
    tensors, *rest = operands(ROUTINGS["mixed"], shared=shared)
    for name, t in zip(NAMES, tensors, strict=True):
        t.requires_grad_(name in needs.split())
    check(tensors, *rest, backend=backend)


@pytest.mark.parametrize("bias", ["own", "one", "none"])
@pytest.mark.parametrize("scale", [0.75, "0-d", "[G]", "[G] float64"])
@pytest.mark.parametrize("shared", [False, True], ids=["experts", "shared"])
def test_scales_and_biases(scale, bias, shared, backend):
    (*tensors, _), offsets, scales = operands(ROUTINGS["mixed"], shared=shared)
    given = {"0-d": torch.tensor(0.3), "[G]": scales, "[G] float64": scales.double()}
    shape = {"own": (5, 9), "one": (9,), "none": None}[bias]
    made = None if shape is None else torch.randn(shape, requires_grad=True)
    check((*tensors, made), offsets, given.get(scale, scale), backend=backend)


def test_layouts_of_peft(backend):
    """A as `lora_A.reshape(E, r, in)` transposed, B as `lora_B.reshape(out, r, E)` permuted, W transposed, x sliced."""
    _, offsets, scale = operands(ROUTINGS["mixed"])
    G, K, N, R, T = 5, 13, 9, 5, 40
    x = torch.randn(T, 2 * K)[:, ::2].requires_grad_()
    weight = torch.randn(G, K, N).mT.requires_grad_()
    A = torch.randn(G * R, K).reshape(G, R, K).mT.requires_grad_()
    B = torch.randn(N, R * G).reshape(N, R, G).permute(2, 1, 0).requires_grad_()
    bias = torch.randn(N, G).mT.requires_grad_()
    check((x, weight, A, B, bias), offsets, scale, backend=backend)


def test_one_group_has_the_bits_of_lora_linear(backend):
    for dtype, rows in ((f32, 3), (f32, 70), (bf16, 20)):
        tensors, offsets, _ = operands([0, rows], dtype, K=40, N=24, R=8)
        one = tuple(
            (t if i == 0 else t[0]).detach().requires_grad_() for i, t in enumerate(tensors)
        )
        bias = one[4].requires_grad_(False)  # autograd's sum
        y = called((*tensors[:4], tensors[4].detach()), offsets, 0.75, backend=backend)
        plain = lora_linear(*one[:4], 0.75, bias, backend=backend)
        assert torch.equal(y, plain)
        dy = torch.randn_like(y)
        grads = torch.autograd.grad(y, (tensors[0], *tensors[2:4]), dy)
        right = torch.autograd.grad(plain, (one[0], *one[2:4]), dy)
        assert_bits([grads[0], *(t[0] for t in grads[1:])], list(right))


@pytest.mark.parametrize("shared", [False, True], ids=["experts", "shared"])
def test_dropout_masks_x_as_a_whole(shared, backend):
    tensors, offsets, scale = operands(ROUTINGS["mixed"], shared=shared)
    mask = scaled_mask(Dropout(0.4, torch.tensor(11)), 40, 13, f32)
    check(tensors, offsets, scale, mask, dropout_p=0.4, seed=11, backend=backend)


@pytest.mark.parametrize("what", ["x", "weight", "A", "B"])
def test_nan_and_infinity_stay_in_their_group(what, backend):
    """Also those of a group without rows, which nothing reads."""
    tensors, offsets, scale = operands([0, 5, 5, 12, 40])
    clean = called(tensors, offsets, scale, backend=backend)
    bad = {n: t.detach().clone() for n, t in zip(NAMES, tensors, strict=True)}
    if what == "x":
        bad["x"][5:12] = float("inf")
    else:
        bad[what][1], bad[what][2] = float("nan"), float("inf")
    leaves = tuple(t.requires_grad_() for t in bad.values())
    y = called(leaves, offsets, scale, backend=backend)
    outside = torch.tensor([*range(5), *range(12, 40)])
    assert torch.equal(y[outside], clean[outside]) and not y[5:12].isfinite().any()
    dx, dW, dA, dB, _ = torch.autograd.grad(y, leaves, torch.ones_like(y))
    assert dx[outside].isfinite().all()
    assert all(t[[0, 3]].isfinite().all() and not t[1].any() for t in (dW, dA, dB))


def test_no_gradient_reaches_a_group_without_rows(backend):
    tensors, offsets, scale = operands(ROUTINGS["mixed"])
    grads = torch.autograd.grad(called(tensors, offsets, scale, backend=backend).sum(), tensors)
    assert all(not t[1].any() and t[0].any() for t in grads[1:])


@pytest.mark.slow
def test_derivatives_of_any_order():
    tensors, offsets, scale = operands([0, 1, 1, 4], f64, K=3, N=2, R=1)

    def f(*leaves):
        return called(leaves, offsets, scale)

    assert gradcheck(f, tensors, check_forward_ad=True) and gradgradcheck(f, tensors)


def test_function_transforms(backend):
    tensors, offsets, scale = operands(ROUTINGS["mixed"], f64)
    if backend == "cpu":
        tensors = tuple(t.detach().float().requires_grad_() for t in tensors)
    dy = torch.randn(40, 9, dtype=tensors[0].dtype)

    scale = scale.double()  # of a wider dtype than s

    def ours(*leaves):
        return called(leaves, offsets, scale)

    def plain(*leaves):
        return loop(leaves, offsets.tolist(), scale)

    both = (
        torch.func.grad(lambda *t, f=f: (f(*t) * dy).sum(), (0, 1, 2, 3, 4)) for f in (ours, plain)
    )
    torch.testing.assert_close(*(gradient(*tensors) for gradient in both))
    batch = torch.randn(3, *tensors[0].shape, dtype=dy.dtype)
    each = torch.vmap(lambda x: ours(x, *tensors[1:]))(batch)
    torch.testing.assert_close(each, torch.stack([plain(x, *tensors[1:]) for x in batch]))


def test_a_transform_checks_offsets_that_it_can_read():
    tensors, _, scale = operands(ROUTINGS["mixed"])
    wrong = as_offsets([0, 3, 3, 4, 11, 39])
    with pytest.raises(ValueError, match="offsets must end at T = 40"):
        torch.func.grad(lambda x: called((x, *tensors[1:]), wrong, scale).sum())(tensors[0])


def test_the_host_does_not_read_offsets_of_composite_products():
    """Sizes alone decide its shapes: on the meta device, where nothing can be read, they are right."""
    tensors, offsets, scale = operands(ROUTINGS["mixed"])
    x, weight, A, B, bias = (t.detach().to("meta") for t in tensors)
    products = COMPOSITE.grouped(Groups(offsets.to("meta"), True, True))
    y, s = products.shrink_expand(x, weight.mT, Adapter(A, B, scale.to("meta")), bias)
    assert y.shape == (40, 9) and s.shape == (40, 5)
    assert (
        products.wgrad(x, s, f32).shape == A.shape
        and products.weight_grad(y, x).shape == weight.shape
    )
    out = grouped_lora_linear(x, weight, A, B, offsets.to("meta"), 0.5, bias)
    assert out.shape == (40, 9) and out.is_meta


def test_a_rank_of_zero():
    """What an expert without an adapter gets, by the composite products as well: in forward mode, in vmap, on no device."""
    x, w, offsets = torch.randn(4, 8), torch.randn(2, 3, 8), torch.tensor([0, 1, 4]).int()
    A, B = torch.empty(2, 8, 0), torch.empty(2, 0, 3)

    def call(x):
        return grouped_lora_linear(x, w, A, B, offsets, 1.0)

    want = torch.cat([x[:1] @ w[0].t(), x[1:] @ w[1].t()])
    for found in (*torch.func.jvp(call, (x,), (x,)), torch.vmap(call)(x[None])[0]):
        torch.testing.assert_close(found, want)
    meta = [t.to("meta") for t in (x, w, A, B, offsets)]
    assert grouped_lora_linear(*meta, 1.0).shape == want.shape


@pytest.mark.parametrize(
    "numbers", [[0, 30, 10, 12, 4, 40], [3, 4, 5, 6, 7, 90], [-9, 0, 0, 0, 0, 20], [50] * 6]
)
def test_composite_products_stay_within_their_operands_for_any_offsets(numbers):
    """On a device offsets are not checked: an index out of range would raise here."""
    tensors, _, scale = operands(ROUTINGS["mixed"])
    x, weight, A, B, bias = (t.detach() for t in tensors)
    products = COMPOSITE.grouped(Groups(as_offsets(numbers), True, True))
    y, s = products.shrink_expand(x, weight.mT, Adapter(A, B, scale), bias)
    assert y.isfinite().all() and products.wgrad(x, s, f32).isfinite().all()


def test_autocast(backend):
    tensors, offsets, scale = operands(ROUTINGS["mixed"])
    with torch.autocast("cpu", bf16):
        y = called(tensors, offsets, scale, backend=backend)
    x, weight, A, B, bias = tensors
    halves = (x.to(bf16), weight.to(bf16), A, B, bias.to(bf16))
    assert y.dtype == bf16 and torch.equal(y, called(halves, offsets, scale, backend=backend))


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True], ids=["experts", "shared"])
def test_compiled_once_for_every_routing(shared):
    tensors, _, scale = operands(ROUTINGS["mixed"], shared=shared)
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(
        lambda offsets, *t: called(t, offsets, scale), backend=counter, fullgraph=True
    )
    for routing in ([0, 3, 3, 4, 11, 40], [0, 0, 20, 20, 30, 40]):
        offsets = as_offsets(routing)
        both = step, lambda offsets, *t: called(t, offsets, scale)
        assert_bits(*(with_gradients(f, (offsets, *tensors)) for f in both))
    assert counter.frame_count == 1
    with pytest.raises(ValueError, match="offsets must not fall"):
        step(as_offsets([0, 3, 2, 4, 11, 40]), *tensors)


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True], ids=["experts", "shared"])
def test_the_operators_are_registered_as_they_are(shared):
    (x, weight, A, B, bias), offsets, scale = operands([0, 2, 2, 5], shared=shared)
    args = (x, weight, A, B, bias, scale, 0.0, None, "auto", offsets)
    torch.library.opcheck(torch.ops.lora_kernels.lora_linear, args)
    plain = tuple(t.detach() for t in (x, weight, A, B))
    s = torch.randn(5, 5)
    rest = (scale, 0.0, None, "auto", offsets, not shared, not shared)
    args = (torch.randn(5, 9), f32, [True] * 5, 13, 5, *plain, s, *rest)
    torch.library.opcheck(torch.ops.lora_kernels.lora_linear_backward, args)


def test_what_is_saved_for_backward():
    """Of a frozen base x, s in float32 and the operands themselves; nothing else, and no x where A is frozen."""
    tensors, offsets, _ = operands(ROUTINGS["mixed"])
    _, weight, A, B, bias = tensors
    for t in (weight, bias):
        t.requires_grad_(False)

    def saved():
        with saved_inside() as kept:
            called(tensors, offsets, 0.5)
        own = {t.data_ptr() for t in (weight, A, B, offsets)}
        return sorted((t.dtype, tuple(t.shape)) for t in kept if t.data_ptr() not in own)

    order = sorted([(f32, (40, 13)), (f32, (40, 5))], key=str)
    assert sorted(saved(), key=str) == order
    A.requires_grad_(False)
    B.requires_grad_(False)
    assert saved() == []


def test_explain_and_problem():
    (x, weight, A, B, bias), offsets, scale = operands(ROUTINGS["mixed"])
    made = explain(x, weight, A, B, scale, bias, offsets=offsets)
    assert made.problem == Problem(
        40, 9, 13, 5, "float32", "float32", bias=True, groups=5, weights=5
    )
    assert "5 groups on cpu" in str(made) and made.adjoint.problem.groups == 5
    one = explain(x, weight[0], A, B, scale, bias, offsets=offsets).problem
    assert one.weights == 1 and "5 groups of one weight" in str(one)
    assert one.frozen_bytes == (40 * 13 + 13 * 9 + 9 + 40 * 9) * 4
    assert made.problem.frozen_bytes == (40 * 13 + 5 * (13 * 9 + 9) + 40 * 9) * 4
    assert one.lowrank_bytes == 5 * (13 + 9) * 5 * 4 + 2 * 40 * 5 * 4
    rejected = plan.explain(Problem(40, 9, 13, 5, "float32", "float32", "cuda", groups=5)).rejected
    assert rejected["cuda"] == "it has no products over groups of rows" or "cuda" in rejected
    with pytest.raises(ValueError, match="weights must be 1, or groups, 5, got 3"):
        Problem(40, 9, 13, 5, "float32", "float32", groups=5, weights=3)


NESTED = torch.nested.as_nested_tensor(torch.ones(2, 3, 4))
GOOD = dict(zip(NAMES, (t.detach() for t in operands(ROUTINGS["mixed"])[0]), strict=True))
GOOD |= {"offsets": as_offsets(ROUTINGS["mixed"]), "scale": 0.5}


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"offsets": [0, 40]}, TypeError, "offsets must be a Tensor, got list"),
        ({"offsets": torch.zeros(6)}, TypeError, "offsets must be int32, got torch.float32"),
        ({"offsets": torch.zeros(6, dtype=torch.int64)}, TypeError, "offsets must be int32, got torch.int64"),
        ({"offsets": as_offsets([0])}, ValueError, "offsets must be [G + 1] for G >= 1 groups, got [1]"),
        ({"offsets": as_offsets([[0, 40]])}, ValueError, "offsets must be [G + 1] for G >= 1 groups, got [1, 2]"),
        ({"offsets": as_offsets([0] * 6).to("meta")}, ValueError, "offsets must be on x's device, cpu, got meta"),
        ({"offsets": as_offsets([0, 40])}, ValueError, "weight must be [G, N, K] with G = 1 or [N, K], got [5, 9, 13]"),
        ({"offsets": as_offsets([1, 3, 3, 4, 11, 40])}, ValueError, "offsets must begin with 0, got 1"),
        ({"offsets": as_offsets([0, 5, 3, 4, 11, 40])}, ValueError, "offsets must not fall, got 5 before 3 at 1"),
        ({"offsets": as_offsets([0, 3, 3, 4, 11, 39])}, ValueError, "offsets must end at T = 40, the rows of x, got 39"),
        ({"offsets": as_offsets([0, 3, 3, 4, 11, 41])}, ValueError, "offsets must end at T = 40, the rows of x, got 41"),
        ({"x": torch.randn(2, 20, 13)}, ValueError, "x must be [T, K] with K = 13 as in weight, got [2, 20, 13]"),
        ({"x": torch.randn(40, 12)}, ValueError, "x must be [T, K] with K = 13 as in weight, got [40, 12]"),
        ({"weight": torch.randn(4, 9, 13)}, ValueError, "weight must be [G, N, K] with G = 5 or [N, K], got [4, 9, 13]"),
        ({"weight": torch.randn(13)}, ValueError, "weight must be [G, N, K] with G = 5 or [N, K], got [13]"),
        ({"A": torch.randn(13, 5)}, ValueError, "A must be [G, K, R] with G, K = 5, 13, got [13, 5]"),
        ({"A": torch.randn(4, 13, 5)}, ValueError, "A must be [G, K, R] with G, K = 5, 13, got [4, 13, 5]"),
        ({"B": torch.randn(5, 9, 5)}, ValueError, "B must be [G, R, N] = [5, 5, 9], got [5, 9, 5]"),
        ({"bias": torch.randn(5)}, ValueError, "bias must be [G, N] = [5, 9] or [N], got [5]"),
        ({"scale": torch.rand(4)}, ValueError, "scale must be a number or [G] = [5], got [4]"),
        ({"scale": torch.rand(5).requires_grad_()}, ValueError, "scale must not require grad"),
        ({"scale": "1"}, TypeError, "scale must be a number or a [G] tensor, got str"),
        *(({name: NESTED}, TypeError, f"{name} must be a dense tensor, got a nested one")
          for name in (*NAMES, "offsets")),
        ({"scale": NESTED}, TypeError, "scale must be a number or a [G] tensor, got a nested one"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p must be in [0, 1), got 1.0"),
        ({"backend": "gpu"}, ValueError, "backend must be one of"),
    ],
)  # fmt: skip
def test_bad_operands_are_named(change, error, message, backend):
    with pytest.raises(error, match=re.escape(message)):
        grouped_lora_linear(**{"backend": backend, **GOOD, **change})


def test_a_quantised_weight_is_every_groups():
    (x, _, A, B, _), offsets, scale = operands(ROUTINGS["mixed"], shared=True, K=16, N=8)
    weight = Int8Rows.quantize(torch.randn(8, 16))
    found = [
        with_gradients(
            lambda x, A, B, w=w: grouped_lora_linear(x, w, A, B, offsets, scale), (x, A, B)
        )
        for w in (weight, weight.dense())
    ]
    torch.testing.assert_close(*found)


def test_batched_gradients(backend):
    """`is_grads_batched`: each of several dy in one backward."""
    tensors, offsets, scale = operands(ROUTINGS["mixed"])
    y = called(tensors, offsets, scale, backend=backend)
    dys = torch.randn(3, *y.shape)
    found = torch.autograd.grad(y, tensors, dys, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(y, tensors, dy, retain_graph=True) for dy in dys]
    right = [torch.stack(t) for t in zip(*each, strict=True)]
    torch.testing.assert_close(list(found), right, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("strategy", ["forward-mode", "reverse-mode"])
@pytest.mark.parametrize("shared", [False, True], ids=["experts", "shared"])
def test_vectorised_hessians(shared, strategy):
    """Of torch.autograd.functional, in all operands, with a group without rows among them."""
    tensors, offsets, scale = operands([0, 2, 2, 5], f64, K=4, N=3, R=2, shared=shared)
    scale = scale.double()
    found = hessian(
        lambda *t: called(t, offsets, scale).square().sum(),
        tensors,
        vectorize=True,
        outer_jacobian_strategy=strategy,
    )
    right = hessian(lambda *t: loop(t, offsets.tolist(), scale, None).square().sum(), tensors)
    torch.testing.assert_close(found, right)
