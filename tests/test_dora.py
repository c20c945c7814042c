"""DoRA: values, every derivative, the norms that are never stale, dropout, traced code, what a step costs."""

from __future__ import annotations

import copy
import itertools
from functools import partial

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.func import grad, jvp, vmap
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lora_kernels import (
    LinearWithLoRA,
    backends,
    bases,
    dora,
    explain,
    formulas,
    freeze_base,
    load_adapter,
    lora_linear,
    lora_parameters,
    lora_state_dict,
    merge_lora,
    replace_linear_with_lora,
    save_adapter,
    unmerge_lora,
    use_backend,
)
from lora_kernels.backends.composite import PRODUCTS as COMPOSITE
from lora_kernels.backends.cpu import PRODUCTS as CPU
from lora_kernels.backends.eager import PRODUCTS as EAGER
from lora_kernels.bench.memory import peak_bytes
from lora_kernels.dropout import Dropout, scaled_mask
from lora_kernels.integrations.peft import accelerate, restore, why_not_fused
from lora_kernels.operands import Adapter
from lora_kernels.samples import sample
from tests.oracle import (
    AWKWARD,
    FLOAT64,
    assert_bits,
    assert_budget,
    check_function,
    named_gradients,
    saved_inside,
    second_derivatives,
    with_gradients,
)
from tests.test_adapters import assert_refused, edit_weights
from tests.toy_format import Int8Rows

NAMES = ("x", "weight", "A", "B", "bias", "magnitude")
HALF = (torch.bfloat16, torch.float16)


def norms_of(weight, A, B, alpha):
    """PEFT's: the row norms of W + s·B·A in the adapters' dtype, detached."""
    merged = weight.to(A.dtype) + alpha * (A @ B).t()
    return torch.linalg.vector_norm(merged, dim=1).to(A.dtype).detach()


def reference(x, weight, A, B, alpha, bias, magnitude, mask=None, norms=None):
    """PEFT's sum, naively, in the operands' own dtypes: base + (c - 1)∘x̂·W + c∘alpha·(x̂·A)·B."""
    c = magnitude / (norms_of(weight, A, B, alpha) if norms is None else norms)
    dropped = x if mask is None else x * mask.to(x.dtype)
    base, inner = x @ weight.t(), dropped @ weight.t()
    lowrank = alpha * (dropped.to(A.dtype) @ A @ B)
    y = base + ((c - 1) * inner + c * lowrank).to(x.dtype)
    return y if bias is None else y + bias


def operands(M=9, N=7, K=6, R=3, dtype=torch.float32, adapter_dtype=None, lead=None, seed=0):
    """Leaves x, weight, A, B, bias, magnitude that require grad."""
    generator = torch.Generator().manual_seed(seed)
    adapter_dtype = adapter_dtype or dtype
    lead = (M,) if lead is None else lead
    shapes = [((*lead, K), dtype), ((N, K), dtype), ((K, R), adapter_dtype)]
    shapes += [((R, N), adapter_dtype), ((N,), dtype), ((N,), adapter_dtype)]
    made = [torch.randn(s, dtype=torch.float64, generator=generator).mul(0.5) for s, _ in shapes]
    return [t.to(d).requires_grad_() for t, (_, d) in zip(made, shapes, strict=True)]


def ours(x, weight, A, B, bias, magnitude, alpha=0.75, **options):
    return lora_linear(x, weight, A, B, alpha, bias, magnitude=magnitude, **options)


def plain(x, weight, A, B, bias, magnitude, alpha=0.75, mask=None):
    """`reference` of the operands in our order."""
    return reference(x, weight, A, B, alpha, bias, magnitude, mask)


def of_case(case):
    """(operands that require grad, dy, alpha)."""
    o = case.operands()
    magnitude = torch.linspace(-1.0, 2.0, case.N).to(o.a.dtype)
    tensors = o.x, o.w.t(), o.a, o.b, o.bias, magnitude
    return [t if t is None else t.detach().requires_grad_() for t in tensors], o.dy, case.alpha


CASES = [
    case
    for case in AWKWARD
    if not case.dropout and case.alpha == case.alpha and 0 not in (case.N, case.K)
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(backend, case):
    tensors, dy, alpha = of_case(case)
    with use_backend(backend):
        check_function(partial(ours, alpha=alpha), partial(plain, alpha=alpha), tensors, dy)


@pytest.mark.parametrize("case", [c for c in FLOAT64 if 0 not in (c.N, c.K)], ids=str)
def test_values_and_gradients_in_float64(case):
    tensors, dy, alpha = of_case(case)
    found = [with_gradients(partial(f, alpha=alpha), tensors, dy) for f in (ours, plain)]
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("case", CASES[:11:3] + CASES[15:20], ids=str)
def test_without_gradients(backend, case):
    """The scale in the product's own store, or in place: no z is kept."""
    tensors, _, alpha = of_case(case)
    tensors = [t if t is None else t.detach() for t in tensors]
    with use_backend(backend), torch.no_grad():
        check_function(partial(ours, alpha=alpha), partial(plain, alpha=alpha), tensors)
        assert torch.equal(*(ours(*tensors, alpha=alpha) for _ in range(2)))


@pytest.mark.parametrize("lead", [(), (2, 3), (2, 1, 3, 2), (0,), (2, 0)], ids=str)
def test_any_leading_shape(backend, lead):
    with use_backend(backend):
        check_function(ours, plain, operands(lead=lead))


@pytest.mark.parametrize("sizes", [(5, 0, 8, 4), (5, 8, 0, 4)], ids=str)
def test_nothing_to_multiply(backend, sizes):
    """Without columns of x a row's norm is 0, and 0·(m/0) is NaN, as PEFT's is."""
    M, N, K, R = sizes
    with use_backend(backend):
        y = ours(*operands(M, N, K, R))
    assert y.shape == (M, N) and y.isnan().all()


@pytest.mark.parametrize("dtype", (torch.float32, *HALF), ids=str)
def test_a_magnitude_of_zero_still_learns(backend, dtype):
    """dm is a sum over z, which y does not hold where its scale is 0."""
    tensors = operands(dtype=dtype)
    tensors[5] = torch.zeros_like(tensors[5]).requires_grad_()
    with use_backend(backend):
        check_function(ours, plain, tensors)
        ours(*tensors).sum().backward()
    assert (tensors[5].grad != 0).all() and (tensors[0].grad == 0).all()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_the_magnitude_has_a_dtype_of_its_own(backend, dtype):
    tensors = operands(dtype=dtype)
    tensors[5] = tensors[5].detach().to(torch.float64).requires_grad_()
    with use_backend(backend):
        y = ours(*tensors)
        y.sum().backward()
    assert y.dtype == dtype and tensors[5].grad.dtype == torch.float64


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("adapter_dtype", (None, torch.float32), ids=str)
def test_a_fresh_layer_is_the_base(backend, dtype, adapter_dtype):
    """m made of the norms as PEFT makes it, in the adapter's dtype, and B = 0: c is exactly 1."""
    x, weight, A, B, *_ = operands(64, 96, 80, 4, dtype, adapter_dtype)
    B = torch.zeros_like(B)
    with use_backend(backend):
        y = ours(x, weight, A, B, None, norms_of(weight, A, B, 0.5), alpha=0.5)
        base = lora_linear(x, weight, A, B, 0.5)
    assert (y == base).float().mean() > 0.999


SUBSETS = [s for n in (1, 2, 5, 6) for s in itertools.combinations(NAMES, n)]


@pytest.mark.parametrize("needed", SUBSETS, ids="+".join)
class TestSubsets:
    """n is a constant for every derivative, which finite differences do not know: it is held still for them."""

    def tensors(self, needed):
        made = operands(4, 3, 5, 2, dtype=torch.float64)
        return tuple(t.requires_grad_(n in needed) for n, t in zip(NAMES, made, strict=True))

    def test_derivatives(self, needed, monkeypatch):
        tensors = self.tensors(needed)
        norms = norms_of(*tensors[1:4], 0.75)
        monkeypatch.setattr(dora, "row_norms", lambda *_, **__: norms)
        assert torch.autograd.gradcheck(ours, tensors, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(ours, tensors)

    def test_gradients_exist_exactly_where_they_are_required(self, backend, needed):
        tensors = self.tensors(needed)
        single = [t.detach().float().requires_grad_(t.requires_grad) for t in tensors]
        with use_backend(backend):
            ours(*single).backward(torch.ones(4, 3))
        plain(*tensors).backward(torch.ones(4, 3, dtype=torch.float64))
        mine, exact = ([t.grad for t in each] for each in (single, tensors))
        torch.testing.assert_close(mine, exact, rtol=1e-4, atol=1e-5, check_dtype=False)


def test_a_gradient_penalty():
    """A second derivative passes through z, and not through the norms."""

    def penalty(function):
        tensors = operands(dtype=torch.float64)
        y = function(*tensors)
        (dx,) = torch.autograd.grad(y.square().sum(), tensors[0], create_graph=True)
        return torch.autograd.grad(dx.square().sum(), tensors)

    torch.testing.assert_close(penalty(ours), penalty(plain))


def test_function_transforms():
    tensors = [t.detach() for t in operands(dtype=torch.float64)]
    tangents = [torch.randn_like(t) for t in tensors]
    # The reference's norms are detached for forward mode as well.
    torch.testing.assert_close(*(jvp(f, tuple(tensors), tuple(tangents)) for f in (ours, plain)))

    def loss(function, x, magnitude):
        return function(x, *tensors[1:5], magnitude).square().sum()

    both = [
        vmap(grad(lambda x, m, f=f: loss(f, x, m), argnums=(0, 1)), in_dims=(0, None))(
            tensors[0], tensors[5]
        )
        for f in (ours, plain)
    ]
    torch.testing.assert_close(*both)
    batched = torch.stack([tensors[2], 2 * tensors[2]])
    found = vmap(lambda A: ours(*tensors[:2], A, *tensors[3:]))(batched)
    expected = torch.stack([ours(*tensors[:2], A, *tensors[3:]) for A in batched])
    torch.testing.assert_close(found, expected)


def test_a_sparse_gradient(backend):
    """A gather with sparse_grad hands one over."""
    index = torch.tensor([[0, 2]] * 9)
    with use_backend(backend):
        results = [
            with_gradients(
                lambda *t, sparse=sparse: torch.gather(ours(*t), 1, index, sparse_grad=sparse),
                operands(),
            )
            for sparse in (False, True)
        ]
    torch.testing.assert_close(*results)


class TestNorms:
    @pytest.mark.parametrize("products", (EAGER, CPU, COMPOSITE), ids=lambda p: type(p).__name__)
    @pytest.mark.parametrize("dtype", (torch.float32, *HALF), ids=str)
    @pytest.mark.parametrize("sizes", ((1, 1, 1), (96, 80, 16), (300, 1100, 5), (65, 17, 40)))
    def test_they_are_those_of_the_merged_weight(self, products, dtype, sizes):
        (N, K, R), alpha = sizes, 1.5
        _, weight, A, B, *_ = (t.detach() for t in operands(1, N, K, R, dtype, torch.float32))
        for stored in (weight, weight.t().contiguous().t()):
            norms = formulas.row_norms(products, stored.detach(), Adapter(A, B, alpha))
            exact = norms_of(weight.double(), A.double(), B.double(), alpha)
            torch.testing.assert_close(norms.double(), exact, rtol=3e-6, atol=0.0)

    @pytest.mark.parametrize("products", (EAGER, CPU), ids=lambda p: type(p).__name__)
    def test_a_weight_that_the_adapter_takes_away(self, products):
        """Where nothing is left of W the sum is about 0, perhaps below it: a norm of 0 and not NaN."""
        _, _, A, B, *_ = (t.detach() for t in operands(1, 50, 40, 3, seed=3))
        weight = -(A @ B).t().contiguous()
        norms = formulas.row_norms(products, weight, Adapter(A, B, 1.0))
        assert not norms.isnan().any()
        assert (norms <= 1e-3 * weight.norm(dim=1)).all()

    def test_special_values(self, backend):
        _, weight, A, B, *_ = (t.detach() for t in operands())
        weight[0, 0], weight[1, 1], weight[2] = float("nan"), float("inf"), 0.0
        B[:, 2] = 0.0
        norms = dora.row_norms(weight, A, B, 0.5, backend)
        assert torch.isfinite(norms).tolist() == [False, False] + [True] * 5 and norms[2] == 0


def refill_storage(weight):
    """As sharded training frees and gathers a weight: the same tensor and storage, an unchanged version."""
    values, version = weight.detach() * 2, weight._version
    size = weight.untyped_storage().nbytes()
    weight.untyped_storage().resize_(0)
    weight.untyped_storage().resize_(size)
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(weight):
        weight.copy_(values)
    assert weight._version == version


CHANGES = {
    "data swapped": lambda weight: setattr(weight, "data", weight.data * 2),
    "data edited, which keeps the version": lambda weight: weight.data.mul_(2),
    "memory edited": lambda weight: weight.detach().numpy().fill(0.5),
    "storage refilled": refill_storage,
    "edited": torch.no_grad()(lambda weight: weight.mul_(2)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_norms_are_never_those_of_another_weight(backend, change):
    tensors = [t.detach() for t in operands()]
    tensors[1] = nn.Parameter(tensors[1], requires_grad=False)
    with use_backend(backend):
        ours(*tensors)
        change(tensors[1])
        torch.testing.assert_close(ours(*tensors), plain(*tensors))


class TestDropout:
    @pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
    def test_it_takes_the_base_product_of_what_is_dropped(self, backend, dtype):
        mask = scaled_mask(Dropout(0.4, torch.tensor(11)), 33, 40, dtype)
        dropped = partial(ours, dropout_p=0.4, seed=11), partial(plain, mask=mask)
        with use_backend(backend):
            check_function(*dropped, operands(33, 20, 40, 4, dtype))

    def test_its_generator_and_a_checkpoint(self):
        tensors, dropped = operands(), partial(ours, dropout_p=0.5)
        again = partial(checkpoint, dropped, use_reentrant=False)
        found = []
        for function in (dropped, again):
            torch.manual_seed(5)
            found.append(with_gradients(function, tensors))
        torch.testing.assert_close(*found)
        first = found[0]
        torch.manual_seed(6)
        assert not torch.equal(ours(*tensors, dropout_p=0.5), first[0])


@pytest.mark.usefixtures("fresh_dynamo")
class TestTraced:
    @pytest.fixture
    def tensors(self):
        made = operands()
        made[1].requires_grad_(False)
        return made

    def test_compiled_once_for_every_alpha(self, tensors):
        counter = CompileCounter()
        layer = torch.compile(ours, backend=counter, fullgraph=True)
        for alpha in (0.5, -1.0, 3.0):
            found = with_gradients(partial(layer, alpha=torch.tensor(alpha)), tensors)
            expected = with_gradients(partial(ours, alpha=alpha), tensors)
            torch.testing.assert_close(found, expected)
        assert counter.frame_count == 1

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
    def test_inductor(self, dtype, tensors):
        tensors = [t.detach().to(dtype).requires_grad_(t.requires_grad) for t in tensors]
        tolerance = {"rtol": 2e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {}
        layers = torch.compile(ours, fullgraph=True), ours
        torch.testing.assert_close(*(with_gradients(f, tensors) for f in layers), **tolerance)

    def test_exported(self):
        class Layer(nn.Module):
            def forward(self, *tensors):
                return ours(*tensors)

        tensors = tuple(t.detach() for t in operands())
        batch = ({0: torch.export.Dim("batch")}, *[None] * 5)
        program = torch.export.export(Layer(), tensors, dynamic_shapes={"tensors": batch})
        longer = (torch.cat([tensors[0]] * 2), *tensors[1:])
        torch.testing.assert_close(program.module()(*longer), ours(*longer))

    def test_a_quantised_weight(self, tensors):
        tensors[1] = Int8Rows.quantize(tensors[1])
        expected = with_gradients(plain, [tensors[0], tensors[1].dense(), *tensors[2:]])
        for function in (torch.compile(ours, backend="aot_eager", fullgraph=True), ours):
            torch.testing.assert_close(with_gradients(function, tensors), expected)

    def test_the_operator_of_the_norms(self):
        _, weight, A, B, *_ = (t.detach() for t in operands())
        torch.library.opcheck(
            torch.ops.lora_kernels.row_norms,
            ([weight], "dense", [], weight.dtype, A, B, torch.tensor(0.5), "auto"),
        )


@pytest.mark.parametrize("half", HALF, ids=str)
def test_autocast(backend, half):
    tensors = operands(33, 20, 40, 4)
    with use_backend(backend), torch.autocast("cpu", half):
        y = ours(*tensors)
    exact = plain(*(t.double() for t in tensors))
    assert y.dtype == half
    torch.testing.assert_close(y.double(), exact, rtol=2e-2, atol=2e-2)
    grads = torch.autograd.grad(y.sum(), tensors)
    assert [g.dtype for g in grads] == [t.dtype for t in tensors]


def test_the_norms_are_exact_under_autocast(backend):
    """Also where the layer's parts are called as modules: W - 0.9·W leaves a tenth, of which half precision rounds most."""
    linear = nn.Linear(16, 128, bias=False)
    layer = LinearWithLoRA(linear, 16, 1.0, dora=True)
    with torch.no_grad():
        layer.lora.A.copy_(torch.eye(16))
        layer.lora.B.copy_(-0.9 * linear.weight.t())
    x = torch.randn(4, 16)
    exact = layer.double()(x.double())
    layer.float().lora.register_forward_hook(lambda *call: None)
    with use_backend(backend), torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    torch.testing.assert_close(y.double(), exact, rtol=0.05, atol=0.05)


def test_a_mode_that_counts_operations():
    """Two base products forward and backward, and what has the size of the rank."""
    M, N, K, R = 8, 16, 32, 2
    tensors = operands(M, N, K, R)
    tensors[1].requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        ours(*tensors).sum().backward()
    base = 2 * M * N * K
    assert 2 * base <= counter.get_total_flops() < 2.6 * base + 8 * N * K * R


@pytest.mark.parametrize("trained", (True, False))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_no_temporary_of_the_weights_size(backend, trained, dtype):
    """A step over a large weight takes blocks and results, and nothing [N, K]."""
    M, N, K, R = 4, 1500, 1400, 4
    tensors = operands(M, N, K, R, dtype)
    tensors[1].requires_grad_(False)

    def step():
        with use_backend(backend), torch.set_grad_enabled(trained):
            y = ours(*tensors)
            if trained:
                y.backward(torch.ones_like(y))

    step()
    assert peak_bytes(step, "cpu") < 0.7 * 4 * N * K  # eager's blocks take up to 2 MB


@pytest.mark.parametrize(
    "magnitude, error, words",
    [
        (torch.ones(8), ValueError, r"magnitude must be \[N\] = \[7\]"),
        (torch.ones(7, 1), ValueError, "magnitude must be"),
        (1.0, TypeError, "magnitude must be a Tensor, got float"),
        (torch.ones(7, dtype=torch.int32), TypeError, "magnitude must"),
        (torch.ones(7, device="meta"), ValueError, "magnitude must be on"),
    ],
)
def test_bad_magnitudes(magnitude, error, words):
    x, weight, A, B, bias, _ = (t.detach() for t in operands())
    for call in (lora_linear, explain):
        with pytest.raises(error, match=words):
            call(x, weight, A, B, 0.75, bias, magnitude=magnitude)


class Net(nn.Module):
    """Two layers of different widths, the first without a bias."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(4)
        self.up = nn.Linear(12, 20, bias=False, dtype=dtype)
        self.down = nn.Linear(20, 9, dtype=dtype)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def moved(model):
    """The model, ours or PEFT's, with adapters that are not those it began with."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora" in name:
                p.add_(torch.randn(p.shape, generator=generator).mul(0.3).to(p.dtype))
    return model


def dora_net(dtype=torch.float32, **options):
    model = Net(dtype)
    replace_linear_with_lora(model, 3, 2.0, dora=True, scaling="alpha/rank", **options)
    freeze_base(model)
    return model


def peft_net(dtype=torch.float32, cast=True, **options):
    config = LoraConfig(r=3, lora_alpha=2, target_modules=["up", "down"], use_dora=True, **options)
    return moved(get_peft_model(Net(dtype), config, autocast_adapter_dtype=cast))


def batch(dtype=torch.float32):
    return torch.randn(7, 12, generator=torch.Generator().manual_seed(1)).to(dtype)


class TestModules:
    @pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
    def test_it_begins_as_the_base(self, dtype):
        x, rounding = batch(dtype), {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(dora_net(dtype)(x), Net(dtype)(x), **rounding)

    def test_its_parameters(self):
        model = dora_net()
        keys = [f"{layer}.lora.{p}" for layer in ("up", "down") for p in ("A", "B", "magnitude")]
        assert sorted(lora_state_dict(model)) == sorted(keys)
        assert len(list(lora_parameters(model))) == 6
        model(batch()).sum().backward()
        trained = {name for name, p in model.named_parameters() if p.grad is not None}
        assert trained == set(keys)
        assert "lora.magnitude" not in LinearWithLoRA(nn.Linear(3, 3), 1, 1.0).state_dict()

    def test_the_state_comes_back(self):
        model, other = moved(dora_net()), dora_net()
        other.load_state_dict(copy.deepcopy(model.state_dict()))
        torch.testing.assert_close(other(batch()), model(batch()))
        torch.testing.assert_close(copy.deepcopy(model)(batch()), model(batch()))
        torch.testing.assert_close(model.double()(batch().double()).float(), other(batch()))

    def test_meta(self):
        with torch.device("meta"):
            model = dora_net()
        assert model.up.lora.magnitude.is_meta
        model.to_empty(device="cpu").load_state_dict(moved(dora_net()).state_dict())
        torch.testing.assert_close(model(batch()), moved(dora_net())(batch()))

    def test_hooks_on_its_parts_run(self):
        model, calls = moved(dora_net()), []
        expected = model(batch())
        model.up.linear.register_forward_hook(lambda *_: calls.append("linear"))
        model.down.lora.register_forward_hook(lambda *_: calls.append("lora"))
        torch.testing.assert_close(model(batch()), expected)
        assert calls == ["linear", "lora"]

    @pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
    @pytest.mark.parametrize("unload", (True, False))
    def test_merged_and_undone(self, dtype, unload):
        model = moved(dora_net(dtype))
        before = {k: v.clone() for k, v in model.state_dict().items()}
        expected = model(batch(dtype))
        assert merge_lora(model, unload=unload) == ["up", "down"]
        rounding = {"rtol": 0.03, "atol": 0.03} if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(model(batch(dtype)), expected, **rounding)
        if not unload:
            unmerge_lora(model)
            assert_bits(dict(model.state_dict()), before)
            assert torch.equal(model(batch(dtype)), expected)

    def test_a_conv1d(self):
        from transformers.pytorch_utils import Conv1D

        torch.manual_seed(0)
        base = Conv1D(9, 12)
        layer = LinearWithLoRA(base, 3, 2.0, dora=True)
        torch.testing.assert_close(layer(batch()), base(batch()))
        A, B, magnitude = moved(layer).lora.parameters()
        expected = plain(batch(), base.weight.t(), A, B, base.bias, magnitude, alpha=2.0)
        torch.testing.assert_close(layer(batch()), expected)
        merge_lora(layer)
        torch.testing.assert_close(layer(batch()), expected)

    def test_sharding_by_tensor_parallel_styles_is_refused(self):
        from lora_kernels.distributed import ColwiseLoRA

        with pytest.raises(ValueError, match="must not be DoRA"):
            ColwiseLoRA()._apply(dora_net().up, None)


class TestFiles:
    @pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
    def test_ours_into_peft_and_back(self, tmp_path, dtype):
        model = moved(dora_net(dtype))
        save_adapter(model, tmp_path / "ours")
        theirs = PeftModel.from_pretrained(
            Net(dtype), tmp_path / "ours", autocast_adapter_dtype=False
        )
        close = {"rtol": 0.05, "atol": 0.05} if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(theirs(batch(dtype)), model(batch(dtype)), **close)
        theirs.save_pretrained(tmp_path / "theirs")
        for start in (Net(dtype), dora_net(dtype)):
            assert sorted(load_adapter(start, tmp_path / "theirs")) == ["down", "up"]
            assert torch.equal(start(batch(dtype)), model(batch(dtype)))

    def test_what_does_not_fit_changes_nothing(self, tmp_path):
        save_adapter(moved(dora_net()), tmp_path / "dora")
        plain = Net()
        replace_linear_with_lora(plain, 3, 2.0)
        save_adapter(plain, tmp_path / "plain")
        for model, file in ((plain, "dora"), (dora_net(), "plain")):
            assert_refused(model, tmp_path / file, ValueError, "DoRA")
        mixed = dora_net()
        mixed.up.lora.magnitude = None
        with pytest.raises(ValueError, match="all be DoRA or all plain"):
            save_adapter(mixed, tmp_path / "mixed")
        assert not (tmp_path / "mixed").exists()

    @pytest.mark.parametrize("value", (None, torch.ones(4), torch.ones(20, 1)), ids=str)
    def test_a_damaged_magnitude(self, tmp_path, value):
        key = "base_model.model.up.lora_magnitude_vector"
        save_adapter(moved(dora_net()), tmp_path)
        edit_weights(lambda t: t.pop(key) if value is None else t.update({key: value}))(tmp_path)
        assert_refused(dora_net(), tmp_path, ValueError, "magnitude")


def peft_step(model, x, training=True):
    """y and the gradients of what PEFT trains."""
    y = model.train(training)(x)
    y.float().square().sum().backward()
    return y.detach(), named_gradients(model)


class TestPeft:
    @pytest.mark.parametrize(
        "dtype, cast",
        ((torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)),
        ids=str,
    )
    def test_fused_and_restored(self, dtype, cast):
        model = peft_net(dtype, cast)
        plain = peft_step(model, batch(dtype))
        report = accelerate(model)
        assert len(report.fused) == 2 and not report.left_alone
        fused = peft_step(model, batch(dtype))
        close = {"rtol": 0.05, "atol": 0.3} if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(fused, plain, **close)
        assert sum("magnitude" in name for name in fused[1]) == 2
        restore(model)
        torch.testing.assert_close(peft_step(model, batch(dtype)), plain, rtol=0, atol=0)

    def test_dropout_is_peft_s(self):
        """Both draw a mask of x by torch's own dropout."""
        model = peft_net(lora_dropout=0.5)
        torch.manual_seed(7)
        plain = peft_step(model, batch())
        accelerate(model)
        torch.manual_seed(7)
        torch.testing.assert_close(peft_step(model, batch()), plain)
        torch.testing.assert_close(
            peft_step(model, batch(), training=False)[0],
            peft_step((restore(model), model)[1], batch(), training=False)[0],
        )

    def test_merging_takes_peft_s_own_path(self):
        model = peft_net()
        expected = model(batch())
        accelerate(model)
        model.merge_adapter()
        torch.testing.assert_close(model(batch()), expected)
        model.unmerge_adapter()
        torch.testing.assert_close(model(batch()), expected)

    def test_hooks_on_the_magnitude_are_left_to_peft(self):
        model = peft_net()
        accelerate(model)
        layer, calls = model.base_model.model.up, []
        layer.lora_magnitude_vector["default"].register_forward_hook(lambda *_: calls.append(1))
        assert "magnitude" in why_not_fused(layer)
        model(batch())
        assert calls

    def test_a_quantised_base(self):
        """bitsandbytes' NF4: the norms are those of the weight as it is read."""
        kind = pytest.importorskip("bitsandbytes").nn.Linear4bit
        torch.manual_seed(2)
        host = nn.Sequential(kind(128, 64, quant_type="nf4", compute_dtype=torch.float32).to("cpu"))
        host.is_loaded_in_4bit = True
        config = LoraConfig(r=4, target_modules=["0"], use_dora=True, init_lora_weights=False)
        model = get_peft_model(host, config)
        x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1))
        plain = peft_step(model, x)
        assert len(accelerate(model).fused) == 1
        torch.testing.assert_close(peft_step(model, x), plain, rtol=2e-3, atol=2e-3)
        layer = LinearWithLoRA(host[0].base_layer, 4, 2.0, dora=True)
        torch.testing.assert_close(layer(x), host[0].base_layer(x), rtol=1e-3, atol=1e-3)


@pytest.fixture
def one_operator(monkeypatch):
    """The cpu backend, whose operator must be what computes: no other path has a derivative."""
    if backends.get("cpu").unavailable() is not None:
        pytest.skip("the cpu backend is off")

    def never(*args):
        raise AssertionError("not by the layer's operator")

    monkeypatch.setattr(dora.DoRALinear, "apply", never)
    with use_backend("cpu"):
        yield


@pytest.mark.usefixtures("one_operator")
class TestOneOperator:
    """Over a frozen base, with both adapters trained or none."""

    TRAINED = (
        ("x", "A", "B", "magnitude"),
        ("A", "B"),
        ("A", "B", "magnitude"),
        ("magnitude",),
        ("x",),
    )
    trained = pytest.mark.parametrize("needed", TRAINED, ids="+".join)

    def operands(self, needed, **options):
        """Leaves of which `needed` require grad."""
        made = operands(33, 24, 40, 5, **options)
        return [t.requires_grad_(n in needed) for n, t in zip(NAMES, made, strict=True)]

    def both(self, needed, **options):
        """Such leaves, and the same in float64."""
        single = self.operands(needed, **options)
        return single, [t.detach().double().requires_grad_(t.requires_grad) for t in single]

    @trained
    @pytest.mark.parametrize("bias", (True, False), ids=("bias", ""))
    @pytest.mark.parametrize(
        "dtype, adapter_dtype",
        [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)],
        ids=str,
    )
    def test_values_and_gradients(self, needed, bias, dtype, adapter_dtype):
        tensors = self.operands(needed, dtype=dtype, adapter_dtype=adapter_dtype)
        check_function(ours, plain, tensors if bias else [*tensors[:4], None, tensors[5]])

    @trained
    def test_a_second_derivative(self, needed):
        """It is that of the sums as they are, norms held still, also of the gradient of m."""
        both = zip((ours, plain), self.both(needed, lead=(2, 3)), strict=True)
        found = [second_derivatives(function, tensors) for function, tensors in both]
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-3, check_dtype=False)

    def test_a_part_of_the_gradients(self):
        """What is asked for may be less than what requires a gradient."""
        both = list(zip((ours, plain), self.both(self.TRAINED[0]), strict=True))
        for asked in (0, 2, 3, 5):
            found = [torch.autograd.grad(f(*t).square().sum(), t[asked]) for f, t in both]
            torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4, check_dtype=False)

    def test_z_is_kept_for_m_alone(self):
        for needed, held in ((("x", "A", "B"), 0), (("x", "A", "B", "magnitude"), 1)):
            with saved_inside() as saved:
                ours(*self.operands(needed))
            assert [t.shape for t in saved].count((33, 24)) == held

    def test_y_may_be_changed_in_place(self):
        tensors = self.operands(self.TRAINED[0])
        functions = (lambda *t: ours(*t).relu()), (lambda *t: ours(*t).relu_())
        torch.testing.assert_close(*(with_gradients(f, tensors) for f in functions))


@pytest.mark.parametrize("format", ("nf4", "int8"))
class TestPackedWeights:
    """The packed weight and its dense copy make the same layer."""

    def operands(self, format, dtype=torch.float32):
        """The packed weight, its dense copy, and x, A, B, bias, magnitude."""
        x, _, *others = operands(20, 48, 64, 4, dtype)
        weight = sample(format, 48, 64, dtype)
        return weight, weight.dense(), [x, *others]

    def over(self, weight, **options):
        """The layer over a weight as a function of all else."""
        return lambda x, *others: ours(x, weight.to(x.dtype), *others, **options)

    @pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
    def test_gradients(self, backend, format, dtype):
        packed, dense, tensors = self.operands(format, dtype)
        with use_backend(backend):
            dy = torch.randn(20, 48).to(dtype)
            found = [with_gradients(self.over(w), tensors, dy) for w in (packed, dense)]
        wide = [t.detach().double().requires_grad_() for t in tensors]
        exact = with_gradients(self.over(dense), wide, dy)
        for name, *triple in zip(("y", "x", "A", "B", "bias", "m"), *found, exact, strict=True):
            assert_budget(*triple, what=name)

    @pytest.mark.parametrize("rows", (1, 4, 20, 0), ids=str)
    def test_without_gradients(self, backend, format, rows):
        """Few rows take other kernels over the codes."""
        packed, dense, (x, *others) = self.operands(format)
        with use_backend(backend), torch.no_grad():
            ys = [self.over(w)(x[:rows], *others) for w in (packed, dense)]
        torch.testing.assert_close(*ys, rtol=1e-5, atol=1e-5)

    def test_dropout(self, backend, format):
        packed, dense, tensors = self.operands(format)
        with use_backend(backend):
            both = (self.over(w, dropout_p=0.5, seed=3) for w in (packed, dense))
            found = [with_gradients(function, tensors) for function in both]
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)

    def test_transforms_and_compiled_code(self, format):
        weight, dense, (x, A, B, bias, magnitude) = self.operands(format)
        rest = A.detach(), B.detach(), bias.detach()

        def gradient(w):
            def loss(x, m):
                return ours(x, w, *rest, m).square().sum()

            return vmap(grad(loss, argnums=(0, 1)), in_dims=(0, None))(
                x.detach(), magnitude.detach()
            )

        torch.testing.assert_close(gradient(weight), gradient(dense), rtol=1e-4, atol=1e-4)
        tangents = torch.ones_like(x), torch.ones_like(magnitude)
        primals = x.detach(), magnitude.detach()
        found = [
            jvp(lambda x, m, w=w: ours(x, w, *rest, m), primals, tangents) for w in (weight, dense)
        ]
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
        compiled = torch.compile(
            lambda x, m: ours(x, weight, *rest, m), backend="aot_eager", fullgraph=True
        )
        torch.testing.assert_close(compiled(*primals), ours(primals[0], dense, *rest, primals[1]))


@pytest.mark.parametrize("kind", ("Linear4bit", "Linear8bitLt"))
def test_a_layer_over_bitsandbytes(kind):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(2)
    options = {
        "Linear4bit": {"compute_dtype": torch.float32, "quant_type": "nf4"},
        "Linear8bitLt": {"has_fp16_weights": False},
    }[kind]
    base = getattr(bnb.nn, kind)(128, 64, **options).to("cpu").requires_grad_(False)
    x = torch.randn(5, 128, requires_grad=True)
    layer = LinearWithLoRA(base, 4, 2.0, dora=True)
    dense = bases.row_norms_on(base, torch.zeros(128, 4), torch.zeros(4, 64), 2.0)
    assert torch.equal(layer.lora.magnitude, dense)
    torch.testing.assert_close(layer(x), base(x), rtol=2e-2, atol=2e-2)
    with torch.no_grad():
        layer.lora.B.normal_()
        layer.lora.magnitude.mul_(2)
    weight = bases.quantized_weight(base).dense().float()
    both = (lambda x, *_: layer(x)), (lambda x, A, B, m: plain(x, weight, A, B, base.bias, m, 2.0))
    found = [with_gradients(function, [x, *layer.lora.parameters()]) for function in both]
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


def test_what_explain_says_of_the_scale():
    tensors = [t.detach() for t in operands()]
    operands_of = (*tensors[:4], 0.75, tensors[4])
    for backend, where in (("cpu", "in the same product"), ("eager", "in a pass of its own")):
        told = str(explain(*operands_of, magnitude=tensors[5], backend=backend))
        assert f"DoRA's scale {where}" in told
        assert "DoRA" not in str(explain(*operands_of, backend=backend))
