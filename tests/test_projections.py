"""`lora_projections` against one product after another in float64: results, every gradient, masks, compiled code, errors."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from lora_kernels import Projection, lora_linear, lora_projections, plan
from lora_kernels.backends import cpu
from lora_kernels.dropout import Dropout, scaled_mask
from tests.oracle import assert_budget, reference
from tests.toy_format import Int8Rows

f32, bf16, f16, f64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
NEEDS = ("x", "weight", "A", "B", "bias")


pytestmark = pytest.mark.usefixtures("trained_together")
needs_cpu = pytest.mark.skipif(cpu.BACKEND.unavailable() is not None, reason="no cpu backend")


def operands(
    dtype=f32, *, lead=(21,), K=37, Ns=(24, 9, 16), Rs=(5, 2, 20), needs=NEEDS, p=0.0, adapter=None
):
    """x and three projections of different widths, ranks, scales, masks; the second has no bias."""

    def made(name, *shape, to=dtype):
        values = torch.randn(shape, dtype=f64) * max(K, 1) ** -0.5
        return values.to(to).requires_grad_(name in needs)

    x = (torch.randn(*lead, K, dtype=f64)).to(dtype).requires_grad_("x" in needs)
    parts = []
    for place, (N, R) in enumerate(zip(Ns, Rs, strict=True)):
        A = made("A", K, R, to=adapter or dtype)
        B = made("B", R, N, to=adapter or dtype)
        bias = None if place == 1 else made("bias", N)
        seed = 11 + place if p else None
        parts.append(Projection(made("weight", N, K), A, B, 0.5 + place, bias, p, seed))
    return x, parts


def apart(x, parts):
    """The definition, each projection after the other, in the operands' own dtypes."""
    M, K = x[..., 0].numel(), x.shape[-1]
    ys = []
    for weight, A, B, scale, bias, p, seed in parts:
        mask = None
        if p:
            mask = scaled_mask(Dropout(p, torch.tensor(seed)), M, K, x.dtype).view(x.shape)
        ys.append(reference(x, weight, A, B, scale, bias, mask))
    return ys


def leaves_of(x, parts):
    named = [("x", x)]
    for place, part in enumerate(parts):
        each = zip(NEEDS[1:], (part.weight, part.A, part.B, part.bias), strict=True)
        named += [(f"{name} {place}", t) for name, t in each if t is not None]
    return {name: t for name, t in named if t.requires_grad}


def in_float64(x, parts):
    """The same values as leaves of their own, whose gradients are added in float64."""

    def wide(t):
        if not isinstance(t, torch.Tensor):
            return t
        return t.detach().double().requires_grad_(t.requires_grad)

    return wide(x), [Projection(*map(wide, part)) for part in parts]


def gradients(ys, x, parts, used, dys):
    leaves = leaves_of(x, parts)
    given = [(ys[p], dy) for p, dy in zip(used, dys, strict=True) if ys[p].requires_grad]
    dys = [dy.to(y.dtype) for y, dy in given]
    found = torch.autograd.grad([y for y, _ in given], [*leaves.values()], dys, allow_unused=True)
    return dict(zip(leaves, found, strict=True))


def check(x, parts, used=(0, 1, 2), together=True):
    """Results and gradients of the `used` ones are within the budget of eager's own error."""
    wide = in_float64(x, parts)
    ours, eager, exact = lora_projections(x, parts), apart(x, parts), apart(*wide)
    for got, theirs, right in zip(ours, eager, exact, strict=True):
        assert_budget(got, theirs, right.detach(), "y")
    if not leaves_of(x, parts):
        return
    if x.ndim == 2:
        assert ("LoRAProjections" in type(ours[0].grad_fn).__name__) is together
    dys = [torch.randn(ours[p].shape, dtype=f64).to(x.dtype) for p in used]
    got, theirs = (gradients(ys, x, parts, used, dys) for ys in (ours, eager))
    for name, right in gradients(exact, *wide, used, dys).items():
        assert (got[name] is None) == (right is None), name
        if right is not None:
            assert_budget(got[name], theirs[name], right, f"gradient of {name}")


@needs_cpu
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("dtype", [f32, bf16, f16], ids=str)
@pytest.mark.parametrize("lead", [(1,), (3,), (2, 8), (64,), (520,)], ids=str)
def test_results_and_gradients(lead, dtype, p):
    check(*operands(dtype, lead=lead, p=p, needs=("x", "A", "B")))


@needs_cpu
@pytest.mark.parametrize(
    "sizes", [(7, (3, 1, 5), (1, 1, 2)), (130, (70, 33, 64), (8, 8, 8))], ids=str
)
@pytest.mark.parametrize("M", [1, 5, 513])
def test_sizes(M, sizes):
    K, Ns, Rs = sizes
    check(*operands(lead=(M,), K=K, Ns=Ns, Rs=Rs, needs=("x", "A", "B")))


@needs_cpu
def test_dA_of_a_large_x_is_one_reduction():
    """2^20 elements of x: all dA come out of one reading of it."""
    check(*operands(lead=(1024,), K=1024, Ns=(8, 8, 8), Rs=(3, 1, 2), needs=("x", "A", "B")))


@needs_cpu
@pytest.mark.parametrize("needs", [*NEEDS, "A B", "x weight bias", "x weight A B bias", ""])
def test_any_subset_of_gradients(needs):
    check(*operands(needs=needs.split()))


@needs_cpu
@pytest.mark.parametrize("used", [(0,), (2,), (0, 1)], ids=str)
def test_results_that_are_not_used_take_no_part(used):
    check(*operands(needs=("x", "A", "B")), used=used)


@needs_cpu
def test_different_needs_of_the_projections():
    x, parts = operands(needs=("x", "A", "B"))
    parts[1].A.requires_grad_(False)
    parts[2].B.requires_grad_(False)
    check(x, parts)


@needs_cpu
@pytest.mark.parametrize("dtype", [bf16, f16], ids=str)
def test_float32_adapters_on_a_half_base(dtype):
    check(*operands(dtype, adapter=f32, needs=("x", "A", "B")))


def test_float64_and_no_rows_are_computed_one_by_one():
    check(*operands(f64), together=False)
    check(*operands(lead=(0,)), together=False)


@needs_cpu
def test_strides():
    x, parts = operands(needs=())
    wide = torch.full((21, 74), float("nan"))
    sliced = wide[:, ::2].copy_(x).requires_grad_()
    turned = [
        part._replace(
            weight=part.weight.t().contiguous().t(),
            A=part.A.t().contiguous().t().requires_grad_(),
            B=part.B.t().contiguous().t().requires_grad_(),
        )
        for part in parts
    ]
    check(sliced, turned)


@needs_cpu
def test_dx_is_rounded_once():
    """dx is summed in float32: closer to float64 than three bfloat16 sums added to each other."""
    x, parts = operands(bf16, lead=(64,), needs=("x", "A", "B"))
    dys = [torch.randn(64, part.weight.shape[0]).to(bf16) for part in parts]
    wide = in_float64(x, parts)
    exact = gradients(apart(*wide), *wide, range(3), dys)["x"]
    one = gradients(lora_projections(x, parts), x, parts, range(3), dys)["x"]
    each = [lora_linear(x, *part[:5]) for part in parts]
    added = gradients(each, x, parts, range(3), dys)["x"]
    assert (one - exact).square().mean() < 0.7 * (added - exact).square().mean()


@needs_cpu
def test_each_has_its_own_mask_and_shares_one_on_request():
    K = 32
    x, eye, zero = torch.ones(4, K), torch.eye(K), torch.zeros(K, K)
    part = Projection(zero, eye, eye, 1.0, None, 0.5)
    torch.manual_seed(1)
    first, second = lora_projections(x, [part, part])
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    again = lora_projections(x, [part, part])
    assert torch.equal(first, again[0]) and torch.equal(second, again[1])
    torch.manual_seed(1)
    assert torch.equal(first, lora_linear(x, *part[:5], dropout_p=0.5))  # the draws of single calls
    shared = [part._replace(seed=3), part._replace(seed=3)]
    one, other = lora_projections(x, shared)
    assert torch.equal(one, other) and 0 < (one == 0).float().mean() < 1


@needs_cpu
def test_equal_calls_give_equal_bits():
    x, parts = operands(bf16, lead=(64,), p=0.2)
    leaves = list(leaves_of(x, parts).values())
    dys = [torch.randn(64, n).to(bf16) for n in (24, 9, 16)]
    runs = []
    for _ in range(2):
        ys = lora_projections(x, parts)
        runs.append([*ys, *torch.autograd.grad(ys, leaves, dys)])
    assert all(map(torch.equal, *runs))


@needs_cpu
def test_results_may_be_changed_in_place():
    x, parts = operands(lead=(2, 3), needs=("x", "A", "B"))
    ys = lora_projections(x, parts)
    both = [y.relu_() for y in ys], [y.relu() for y in apart(x, parts)]
    torch.testing.assert_close(*both, atol=1e-5, rtol=1e-5)
    grads = (torch.autograd.grad(sum(y.sum() for y in each), x) for each in both)
    torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-4)


@needs_cpu
def test_second_derivatives():
    x, parts = operands(lead=(4,), K=6, Ns=(3, 2, 4), Rs=(2, 1, 3), p=0.3, needs=("x", "A", "B"))
    leaves = list(leaves_of(x, parts).values())
    seconds = []
    for function in (lora_projections, apart):
        loss = sum(y.square().sum() for y in function(x, parts))
        grads = torch.autograd.grad(loss, leaves, create_graph=True)
        assert not torch.equal(grads[0], torch.zeros_like(x))
        seconds.append(torch.autograd.grad(sum(g.square().sum() for g in grads), leaves))
    torch.testing.assert_close(*seconds, atol=1e-3, rtol=1e-3)


def test_every_derivative_in_float64():
    x, parts = operands(f64, lead=(3,), K=4, Ns=(2, 3, 2), Rs=(1, 2, 1))
    flat = tuple(leaves_of(x, parts).values())

    def function(x, w0, A0, B0, b0, w1, A1, B1, w2, A2, B2, b2):
        given = [(w0, A0, B0, 0.5, b0), (w1, A1, B1, 1.5), (w2, A2, B2, 2.5, b2)]
        return lora_projections(x, given)

    assert gradcheck(function, flat, check_forward_ad=True) and gradgradcheck(function, flat)


def test_transforms_see_each_projection():
    x, parts = operands(needs=())
    one = torch.func.jvp(lambda t: lora_projections(t, parts), (x,), (torch.ones_like(x),))[1]
    for got, part in zip(one, parts, strict=True):
        low = part.scale * (torch.ones_like(x) @ part.A @ part.B)
        torch.testing.assert_close(got, torch.ones_like(x) @ part.weight.T + low)


def test_compiled_without_a_graph_break():
    x, parts = operands(p=0.25, needs=("x", "A", "B"))
    leaves = list(leaves_of(x, parts).values())
    compiled = torch.compile(lora_projections, fullgraph=True, backend="aot_eager")
    both = [
        [*ys, *torch.autograd.grad(ys, leaves, [torch.ones_like(y) for y in ys])]
        for ys in (compiled(x, parts), apart(x, parts))
    ]
    torch.testing.assert_close(*both, atol=1e-4, rtol=1e-4)


@needs_cpu
def test_autocast_casts_as_lora_linear_does():
    x, parts = operands(p=0.25, needs=("x", "A", "B"))
    with torch.autocast("cpu", torch.bfloat16):
        ys = lora_projections(x, parts)
        each = [lora_linear(x, *part[:5], dropout_p=part[5], seed=part[6]) for part in parts]
    assert all("LoRAProjections" in type(y.grad_fn).__name__ for y in ys)
    for y, z in zip(ys, each, strict=True):
        assert y.dtype == z.dtype == bf16 and torch.equal(y, z)
    grads = torch.autograd.grad(sum(y.sum() for y in ys), (x, parts[0].A))
    assert [g.dtype for g in grads] == [f32, f32]


def test_a_quantised_weight_and_a_tensor_as_scale_are_computed_one_by_one():
    x, parts = operands(needs=())
    packed = parts[0]._replace(weight=Int8Rows.quantize(parts[0].weight))
    scaled = parts[1]._replace(scale=torch.tensor(0.25))
    ys = lora_projections(x, [packed, scaled])
    assert torch.equal(ys[0], lora_linear(x, *packed[:5]))
    assert torch.equal(ys[1], lora_linear(x, *scaled[:5]))


@needs_cpu
def test_one_call_of_the_products(monkeypatch):
    """A forward shrinks once for all, a backward sums dx once."""
    calls = []
    for name in ("shrink", "expand", "expand_sum", "wgrad"):
        inner = getattr(cpu.CpuProjectionProducts, name)

        def counted(self, *args, inner=inner, name=name):
            calls.append(name)
            return inner(self, *args)

        monkeypatch.setattr(cpu.CpuProjectionProducts, name, counted)
    x, parts = operands(needs=("x", "A", "B"))
    ys = lora_projections(x, parts)
    assert calls == ["shrink", "expand"]
    sum(y.sum() for y in ys).backward()
    assert calls[2:] == ["shrink", "expand_sum", "wgrad", "wgrad"]


@needs_cpu
def test_small_ones_are_trained_one_by_one(monkeypatch):
    """Where a layer's own operator is faster the plan takes it: as measured, see backends/cpu.py."""
    monkeypatch.undo()
    plan.forget()
    x, parts = operands(needs=("x", "A", "B"))
    assert "LoRAProjections" not in type(lora_projections(x, parts)[0].grad_fn).__name__


def test_a_named_backend_computes_or_raises():
    x, parts = operands(needs=())
    for y, part in zip(lora_projections(x, parts, backend="eager"), parts, strict=True):
        assert torch.equal(y, lora_linear(x, *part[:5], backend="eager"))
    with pytest.raises(RuntimeError, match="cuda"):
        lora_projections(x, parts, backend="cuda")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"A": torch.ones(3, 2)}, ValueError, r"projections\[1\]: A must be \[K, R\] with K = 37"),
        (
            {"weight": torch.ones(9, 37, dtype=f64)},
            TypeError,
            r"projections\[1\]: weight must have x's dtype",
        ),
        ({"scale": "1"}, TypeError, r"projections\[1\]: alpha must be a number"),
        ({"dropout_p": 1.0}, ValueError, r"projections\[1\]: dropout_p must be in \[0, 1\)"),
        ({"seed": 0.5}, TypeError, r"projections\[1\]: seed must be"),
    ],
)
def test_errors_name_the_projection(change, error, message):
    x, parts = operands(needs=())
    with pytest.raises(error, match=message):
        lora_projections(x, [parts[0], parts[1]._replace(**change), parts[2]])


def test_no_projections_and_one():
    x, parts = operands(needs=())
    assert lora_projections(x, []) == ()
    assert torch.equal(lora_projections(x, parts[:1])[0], lora_linear(x, *parts[0][:5]))
    with pytest.raises(TypeError, match=r"projections\[0\] must be"):
        lora_projections(x, [(parts[0].weight, parts[0].A)])


@needs_cpu
def test_lists_that_do_not_fit_are_errors_of_the_operators():
    """Nothing past the end of a list, or of s, is read."""
    ops = cpu._OPS
    lora_projections(*operands())  # loads the library
    x, a, w, b = torch.randn(4, 8), torch.randn(8, 2), torch.randn(8, 6), torch.randn(2, 6)
    s, none = torch.randn(4, 4), [None, None]
    calls = [
        lambda: ops.projections_shrink([x, x], [a, a, a], [1.0] * 3, [], [], []),
        lambda: ops.projections_shrink([x], [a, a], [1.0], [], [], []),
        lambda: ops.projections_shrink([x], [a, a], [1.0, 1.0], [5, 5], [1], [1.0, 1.0]),
        lambda: ops.projections_shrink([x], [a, a], [1.0, 1.0], [5], [1], [1.0]),
        lambda: ops.projections_expand(x, [w, w], s, [b], none),
        lambda: ops.projections_expand(x, [w, w], s[:, :3].contiguous(), [b, b], none),
        lambda: ops.projections_expand(x, [w, w], s[:2], [b, b], none),
        lambda: ops.projections_expand(x, [w, w], s.double(), [b, b], none),
        lambda: ops.projections_expand(x, [w, w], s, [b, b], [None]),
        lambda: ops.projections_sum([x, x], [w], s, [b, b], [], [], []),
        lambda: ops.projections_sum([x, x], [w, w], s[:, :2], [b, b], [], [], []),
        lambda: ops.projections_wgrad([x, x], [s, s, s], f32, [], [], []),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="must"):
            call()
