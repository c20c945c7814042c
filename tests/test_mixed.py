"""Several adapters in one batch: each sample against `lora_linear` with its own adapter, values and every gradient."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import nn

from lora_kernels import lora_linear
from lora_kernels.mixed import BASE, LinearWithAdapters, mixed_lora_linear
from lora_kernels.modules import lora_parameters
from tests.oracle import named_gradients
from tests.test_modules import SPARSE

NAMES = ("fr", "de", "it")
BATCHES = {
    "mixed": ["de", "fr", BASE, "de", "fr"],
    "in runs": ["de", "de", "fr", "fr", BASE],
    "one": ["it"] * 5,
    "none": [BASE] * 5,
    "all and none": ["it", "fr", BASE, "de", "it"],
}


def layer(linear=None, **options):
    """Adapters of three ranks and scales that are not zero, on a float64 base."""
    torch.manual_seed(2)
    made = LinearWithAdapters(linear or nn.Linear(7, 5).double())
    for name, rank, alpha in zip(NAMES, (2, 4, 1), (0.5, -1.0, 3.0), strict=True):
        nn.init.normal_(made.add_adapter(name, rank, alpha, **options).B)
    return made


def one_by_one(made, x, names):
    rows = []
    for sample, name in zip(x, names, strict=True):
        y = made.linear(sample)
        if name != BASE:
            lora = made.adapters[name]
            y = y + lora.scale * (sample @ lora.A @ lora.B)
        rows.append(y)
    return torch.stack(rows)


def gradients(made, x, y):
    x.grad = None
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return {"x": x.grad, **named_gradients(made)}


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("shape", [(5, 7), (5, 3, 7), (5, 2, 3, 7)])
@pytest.mark.parametrize("names", BATCHES.values(), ids=BATCHES)
def test_each_sample_has_its_own_adapter(names, shape, as_tensor):
    """An adapter without samples has no gradient where the batch is given by names, a zero one where by a tensor."""
    made = layer()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    given = (
        torch.tensor([NAMES.index(n) if n in NAMES else -1 for n in names]) if as_tensor else names
    )
    y = made(x, given)
    want = one_by_one(made, x, names)
    torch.testing.assert_close(y, want)
    got, exact = gradients(made, x, y), gradients(made, x, want)
    for key in [key for key in got if key not in exact]:
        assert as_tensor and not got.pop(key).any()
    torch.testing.assert_close(got, exact)


def test_an_adapter_without_samples_is_left_alone_by_the_optimizer():
    made = layer()
    optimizer = torch.optim.AdamW(made.parameters(), lr=0.1, weight_decay=0.5)
    before = {n: p.detach().clone() for n, p in made.named_parameters()}
    made(torch.randn(2, 7, dtype=torch.float64), ["fr", "de"]).sum().backward()
    optimizer.step()
    kept = {n for n, p in made.named_parameters() if torch.equal(p, before[n])}
    assert kept == {"adapters.it.A", "adapters.it.B"}


def test_no_sample():
    made = layer()
    assert made(torch.empty(0, 3, 7, dtype=torch.float64), []).shape == (0, 3, 5)


@pytest.mark.parametrize(
    "given, message",
    [
        (["fr", "es"], "name must be one of .*got 'es'"),
        (["fr"], "adapters must have a name for each of x's 2 samples, got 1"),
        (torch.tensor([0, 3]), r"in \[-1, 3\) for 3 adapters"),
        (torch.tensor([0, -2]), r"in \[-1, 3\) for 3 adapters"),
        (torch.tensor([0.0, 1.0]), "int64 or int32"),
        (torch.tensor([0]), r"int64 or int32 \[2\]"),
    ],
    ids=str,
)
def test_bad_adapters_of_a_batch(given, message):
    with pytest.raises(ValueError, match=message):
        layer()(torch.randn(2, 7, dtype=torch.float64), given)


def test_adding_and_removing():
    made = layer()
    for name in ("fr", "", "a.b", BASE, 3):
        with pytest.raises(ValueError, match="name must be"):
            made.add_adapter(name, 2, 1.0)
    with pytest.raises(ValueError, match="name must be one of"):
        made.remove_adapter("es")
    made.remove_adapter("fr")
    assert made.names == ("de", "it") and len(list(lora_parameters(made))) == 4
    x = torch.randn(2, 7, dtype=torch.float64)
    torch.testing.assert_close(made(x, torch.tensor([1, 0])), one_by_one(made, x, ["it", "de"]))
    with pytest.raises(TypeError, match="linear must be"):
        LinearWithAdapters(nn.ReLU())


def test_what_is_attached_to_the_parts_runs():
    made = layer()
    x = torch.randn(3, 2, 7, dtype=torch.float64)
    want = made(x, ["fr", BASE, "it"])
    calls = []
    made.linear.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(made(x, ["fr", BASE, "it"]), want)
    torch.testing.assert_close(made(x, torch.tensor([0, -1, 2])), want)
    for name in made.names:
        made.remove_adapter(name)
    torch.testing.assert_close(made(x, BASE), made.linear(x))
    assert calls == [1] * 4


def test_a_penalty_on_a_vectorised_jacobian():
    """It trains the adapters as the penalty on the Jacobian of plain PyTorch does."""
    made = layer()
    x = torch.randn(2, 7, dtype=torch.float64)
    results = []
    for function in (made, lambda x, _: one_by_one(made, x, ["de", "fr"])):
        rows = torch.autograd.functional.jacobian(
            lambda t, f=function: f(t, torch.tensor([1, 0])), x, create_graph=True, vectorize=True
        )
        rows.square().sum().backward()
        results.append({n: g for n, g in named_gradients(made).items() if g.any()})
    torch.testing.assert_close(*results)


def test_a_vectorised_hessian_in_forward_mode():
    made = layer()
    x = torch.randn(2, 7, dtype=torch.float64)
    options = {"vectorize": True, "outer_jacobian_strategy": "forward-mode"}
    found = torch.autograd.functional.hessian(
        lambda t: made(t, torch.tensor([1, 0])).square().sum(), x, **options
    )
    right = torch.autograd.functional.hessian(
        lambda t: one_by_one(made, t, ["de", "fr"]).square().sum(), x
    )
    torch.testing.assert_close(found, right)


@pytest.mark.parametrize("hooked", [False, True])
def test_what_is_not_finite_stays_in_its_sample(hooked):
    made = layer()
    if hooked:
        made.linear.register_forward_hook(lambda *call: None)
    x = torch.randn(2, 7, dtype=torch.float64)
    x[1, 0] = torch.inf
    made(x, ["fr", "de"])[0].sum().backward()
    assert made.adapters["fr"].A.grad.isfinite().all()


NESTED = torch.nested.as_nested_tensor(torch.ones(2, 3, 4))
X, W = torch.randn(2, 8), torch.randn(4, 8)
A, B = torch.randn(8, 2), torch.randn(2, 4)
FITS = (torch.randn(8, 3), torch.randn(3, 4), 1.0)


@pytest.mark.parametrize(
    "adapter, error, message",
    [
        ((A, torch.randn(5, 4), 1.0), ValueError, "B of adapters[1] must be [R, N] = [2, 4], got [5, 4]"),
        ((torch.randn(7, 2), B, 1.0), ValueError, "A of adapters[1] must be [K, R] with K = 8, got [7, 2]"),
        ((A, B.double(), 1.0), TypeError, "B of adapters[1] must have A's dtype, torch.float32"),
        ((A.int(), B.int(), 1.0), TypeError, "A of adapters[1] must be float32, bfloat16, float16 or float64"),
        ((A, B[0, 0], 1.0), ValueError, "B of adapters[1] must be [R, N] = [2, 4], got []"),
        ((A[0], B, 1.0), ValueError, "A of adapters[1] must be [K, R] with K = 8, got [2]"),
        ((A, None, 1.0), TypeError, "B of adapters[1] must be a Tensor, got NoneType"),
        ((NESTED, B, 1.0), TypeError, "A of adapters[1] must be a dense tensor, got a nested one"),
        ((A, nn.parameter.UninitializedParameter(), 1.0), TypeError,
         "B of adapters[1] must be a dense tensor, got an UninitializedParameter"),
        ((A, B.to("meta"), 1.0), ValueError, "B of adapters[1] must be on x's device, cpu"),
        ((A, B), TypeError, "adapters[1] must be (A, B, scale), got tuple"),
        ((A, B, "1"), TypeError, "scale of adapters[1] must be a number or a 0-d tensor"),
        ((A, B, torch.ones(2)), ValueError, "scale of adapters[1] must be a number or a 0-d"),
        ((A, B, 10**400), ValueError, "scale of adapters[1] must be within float64's range"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("index", [[0, 1], [1, 1]], ids=str)
def test_bad_adapters_are_named(adapter, error, message, index):
    """Of the batch; one that is not in it may be what it will, and lie where it will."""
    with pytest.raises(error, match=re.escape(message)):
        mixed_lora_linear(X, W, [FITS, adapter], index)
    want = mixed_lora_linear(X, W, [FITS], [0, -1])
    assert torch.equal(mixed_lora_linear(X, W, [FITS, adapter], np.array([0, -1])), want)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": None}, TypeError, "x must be a Tensor, got NoneType"),
        ({"weight": None}, TypeError, "weight must be a Tensor, got NoneType"),
        ({"x": X[:, :7]}, ValueError, "x must be [S, ..., K] with K = 8 as in weight, got [2, 7]"),
        ({"weight": W[0]}, ValueError, "weight must be [N, K], got [8]"),
        ({"x": nn.parameter.UninitializedParameter()}, TypeError, "x must be a dense tensor, got an Uninit"),
        *(({name: NESTED}, TypeError, f"{name} must be a dense tensor, got a nested one")
          for name in ("x", "weight", "bias", "index")),
        ({"index": [0.0, 1]}, TypeError, "index must have integers, got 0.0"),
        ({"index": "00"}, TypeError, "index must have integers, got '0'"),
    ],
)  # fmt: skip
def test_bad_operands_are_named(change, error, message):
    good = {"x": X, "weight": W, "adapters": [FITS], "index": [0, 0]}
    with pytest.raises(error, match=re.escape(message)):
        mixed_lora_linear(**{**good, **change})


@pytest.mark.parametrize("sparse", SPARSE)
def test_sparse_inputs(sparse):
    """One name for all samples is a call of the parts; with several names the error says what x is."""
    made, x = layer(), torch.eye(7, dtype=torch.float64)
    for name in ("fr", BASE):
        torch.testing.assert_close(made(sparse(x), name), made(x, name))
    for call in (
        lambda x: made(x, ["fr", "de"] * 3 + [BASE]),
        lambda x: mixed_lora_linear(x, made.linear.weight, [], [-1] * 7),
    ):
        with pytest.raises(
            ValueError, match=r"x must be \[S, \.\.\., K\], .* got a torch.sparse_c"
        ):
            call(sparse(x))


def test_a_lazy_linear_is_refused():
    with pytest.raises(ValueError, match="call the LazyLinear once"):
        LinearWithAdapters(nn.LazyLinear(5))


def test_dropout():
    made = layer(dropout=0.5)
    x = torch.ones(2, 400, 7, dtype=torch.float64)
    y = made(x, ["fr", "de"])
    assert not torch.equal(y, made(x, ["fr", "de"]))
    made.eval()
    exact = made(x, ["fr", "de"])
    torch.testing.assert_close(exact, one_by_one(made, x, ["fr", "de"]))
    spread = (y - exact).std(1) / 20
    assert ((y - exact).mean(1).abs() < 5 * spread).all()
    made.train().adapters["de"].dropout = 0.1
    with pytest.raises(ValueError, match="must have one dropout"):
        made(x, ["fr", "de"])
    made(x, ["fr", BASE])


@pytest.mark.parametrize("given", ["fr", ["fr", BASE], torch.tensor([0, -1])], ids=str)
def test_an_adapter_drops_in_its_own_mode(given):
    """Not in the layer's: as where it is called as a module."""
    made = layer(dropout=0.5)
    x = torch.ones(2, 40, 7, dtype=torch.float64)
    for adapters_train in (False, True):
        made.train(not adapters_train)
        made.adapters.train(adapters_train)
        for _ in range(2):
            assert torch.equal(made(x, given), made(x, given)) != adapters_train
            made.linear.register_forward_hook(lambda *call: None)
        made.linear._forward_hooks.clear()
    made.adapters["de"].eval()
    with pytest.raises(ValueError, match=r"must have one dropout, got \[0.0, 0.5\]"):
        made(x, ["fr", "de"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_adapters_on_a_half_base(dtype):
    made = layer(nn.Linear(7, 5).to(dtype), dtype=torch.float32)
    x = torch.randn(2, 7).to(dtype)
    y = made(x, ["de", "it"])
    for i, name in enumerate(("de", "it")):
        lora = made.adapters[name]
        want = lora_linear(
            x[i : i + 1], made.linear.weight, lora.A, lora.B, lora.scale, made.linear.bias
        )
        torch.testing.assert_close(y[i : i + 1], want)


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("given", ["fr", BASE, ["fr", BASE], torch.tensor([0, -1])], ids=str)
def test_autocast_gives_the_dtype_of_linear(given, hooked):
    made = layer(nn.Linear(7, 5))
    x = torch.randn(2, 7)
    exact = made(x, given)
    if hooked:
        made.linear.register_forward_hook(lambda *call: None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = made(x, given)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, atol=0.05, rtol=0.05)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("name", ["fr", BASE])
def test_compiled_once_for_one_adapter_and_any_number_of_samples(name):
    made = layer(nn.Linear(7, 5))
    made.selected = name
    compiled = torch.compile(made, fullgraph=True, dynamic=True, backend="aot_eager")
    compiled(torch.randn(2, 7))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for count in (3, 11):
            x = torch.randn(count, 7)
            torch.testing.assert_close(compiled(x), made(x))


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
def test_compile():
    """One graph, which another batch's indices do not compile again."""
    made = layer(nn.Linear(7, 5))
    x = torch.randn(4, 3, 7, requires_grad=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(made, fullgraph=True)
        for index in (torch.tensor([0, -1, 2, 1]), torch.tensor([1, 1, 0, -1])):
            y, want = compiled(x, index), made(x, index)
            torch.testing.assert_close(y, want)
            torch.testing.assert_close(gradients(made, x, y), gradients(made, x, want))
