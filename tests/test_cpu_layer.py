"""The layer as one C++ operator: the bits of the products, and everything that autograd may ask of it."""

from __future__ import annotations

import itertools
import warnings
from functools import partial

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from lora_kernels import autograd, lora_linear
from lora_kernels.autograd import Call
from lora_kernels.backends.cpu import BACKEND, PRODUCTS
from lora_kernels.samples import SAMPLES, sample
from tests.oracle import (
    AWKWARD,
    assert_bits,
    saved_inside,
    second_derivatives,
    with_gradients,
)
from tests.test_functional import NAMES, operands

if (_why_not := BACKEND.unavailable()) is not None:
    pytest.skip(f"cpu backend: {_why_not}", allow_module_level=True)

TRAINED = [(), ("x",), ("A", "B"), ("x", "A", "B")]
trained = pytest.mark.parametrize("needed", TRAINED, ids=lambda n: "+".join(n) or "none")


@pytest.fixture
def calls(monkeypatch):
    """The calls that the operator gets: what a test says of it would otherwise hold of another path."""
    seen = []

    def layer(*args):
        seen.append(args)
        return type(PRODUCTS).layer(PRODUCTS, *args)

    monkeypatch.setattr(PRODUCTS, "layer", layer)
    return seen


def frozen(needed=("x", "A", "B"), kind="dense", **options):
    """Operands of which `needed` require grad; a weight of another kind is quantised."""
    torch.manual_seed(0)
    tensors = operands(**options)
    for name, t in zip(NAMES, tensors, strict=True):
        t.requires_grad_(name in needed)
    if kind != "dense":
        tensors[1] = sample(kind, *tensors[1].shape, tensors[0].dtype)
    return tensors


def called(x, weight, A, B, bias, **options):
    return lora_linear(x, weight, A, B, 0.75, bias, **options)


def by_function(x, weight, A, B, bias, dropout_p=0.0, seed=None):
    """The same by the autograd Function in Python and the backend's products."""
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    seed = None if seed is None else torch.tensor(seed)
    y, _ = autograd.apply(rows, weight, A, B, bias, 0.75, dropout_p, seed, Call("cpu"))
    return y if x.ndim == 2 else y.reshape(*x.shape[:-1], weight.shape[0])


BOTH = called, by_function
every_weight = pytest.mark.parametrize("kind", ["dense", *SAMPLES])


@trained
@pytest.mark.parametrize("case", [c for c in AWKWARD if c.K and c.layout != "broadcast"], ids=str)
def test_bits_of_forward_and_backward_are_those_of_the_products(case, needed, calls):
    o = case.operands()
    named = zip(NAMES, (o.x, o.w.t(), o.a, o.b), strict=False)
    tensors = [*(t.detach().requires_grad_(n in needed) for n, t in named), o.bias]
    options = {"dropout_p": case.dropout, "seed": 7} if case.dropout else {}
    assert_bits(*(with_gradients(partial(f, **options), tensors, o.dy) for f in BOTH))
    assert len(calls) == 1


@every_weight
@trained
@pytest.mark.parametrize("lead", [(9,), (2, 10), (0,)], ids=str)
def test_bits_with_a_mask_over_every_kind_of_weight(kind, needed, lead, calls):
    tensors = frozen(needed, kind, lead=lead, N=70, K=64)
    functions = (partial(f, dropout_p=0.4, seed=7) for f in BOTH)
    assert_bits(*(with_gradients(f, tensors) for f in functions))
    assert len(calls) == 1


@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (2, 1, 3, 2), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_any_leading_shape_and_its_gradient(lead, transposed, calls):
    tensors = frozen(lead=lead)
    if transposed and len(lead) > 1:
        tensors[0] = tensors[0].detach().transpose(0, 1).requires_grad_()
    assert_bits(*(with_gradients(function, tensors) for function in BOTH))
    assert len(calls) == 1


@every_weight
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("needed", TRAINED[1:], ids="+".join)
@pytest.mark.parametrize("lead", [(9,), (3, 3)], ids=str)
def test_second_derivatives(kind, needed, dropout_p, lead, calls):
    """Of a gradient penalty: through dx, dA and dB, back to every operand."""
    tensors = frozen(needed, kind, lead=lead)
    functions = (partial(f, dropout_p=dropout_p, seed=3) for f in BOTH)
    results = [second_derivatives(f, tensors) for f in functions]
    assert len(calls) == 1
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@every_weight
@pytest.mark.parametrize("function", BOTH)
def test_a_batch_of_gradients_at_once(function, kind, calls):
    """`is_grads_batched` runs the backward under vmap."""
    tensors = frozen(kind=kind)
    wanted = [tensors[i] for i in (0, 2, 3)]
    y = function(*tensors)
    vectors = torch.randn(4, *y.shape)
    together = torch.autograd.grad(y, wanted, vectors, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(y, wanted, v, retain_graph=True) for v in vectors]
    torch.testing.assert_close(list(together), [torch.stack(t) for t in zip(*each, strict=True)])
    assert len(calls) == (function is called)


@every_weight
@trained
def test_only_what_a_needed_gradient_reads_is_saved_beside_the_adapters(kind, needed, calls):
    tensors = frozen(needed, kind, M=11, N=13, K=17, R=3)
    with saved_inside() as saved:
        called(*tensors)
    expected = [] if not needed else [(17, 3), (3, 13)]
    weight = tensors[1:2] if kind == "dense" else tensors[1].tensors
    expected += [tuple(t.shape) for t in weight] if "x" in needed else []
    expected += [(11, 17), (11, 3)] if "A" in needed else []
    assert sorted(tuple(t.shape) for t in saved) == sorted(expected) and calls


@every_weight
def test_an_operand_changed_in_place_is_noticed(kind, calls):
    tensors = frozen(kind=kind)
    y = called(*tensors)
    with torch.no_grad():
        (tensors[2] if kind == "dense" else tensors[1].tensors[1]).zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    assert calls


@every_weight
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_recomputes_the_same_mask(kind, reentrant, calls):
    tensors, dropped = frozen(kind=kind), partial(called, dropout_p=0.5)
    results = []
    for function in (dropped, partial(checkpoint, dropped, use_reentrant=reentrant)):
        torch.manual_seed(0)
        y = function(*tensors)
        y.square().sum().backward()
        results.append([tensors[i].grad for i in (0, 2, 3)])
        for i in (0, 2, 3):
            tensors[i].grad = None
    assert_bits(*results)
    assert len(calls) == 3


def test_without_gradients_no_graph_is_kept(calls):
    tensors = frozen()
    with torch.no_grad():
        assert called(*tensors).grad_fn is None
    with torch.inference_mode():
        inside = called(*(t.detach() for t in operands()))
    assert inside.is_inference()
    assert len(calls) == 2


ALONE = [
    ("weight",),
    ("bias", "A", "B"),
    ("A",),
    ("B",),
    *itertools.combinations(("x", "weight", "B"), 2),
]


@pytest.mark.parametrize("needed", ALONE, ids="+".join)
def test_other_gradients_are_the_functions(needed, calls):
    """What the operator has no derivative for never reaches it, and by itself it refuses."""
    tensors = frozen(needed)
    called(*tensors).sum().backward()
    assert [t.grad is not None for t in tensors] == [name in needed for name in NAMES]
    assert not calls
    with pytest.raises(RuntimeError, match="frozen weight and bias"):
        torch.ops.lora_kernels_cpu.lora_linear(*tensors, 1.0, 0.0, 0, 0)


@pytest.mark.parametrize("kind", SAMPLES)
def test_a_trained_bias_over_a_quantised_weight_is_the_functions(kind, calls):
    tensors = frozen(("B", "bias"), kind)
    called(*tensors).sum().backward()
    assert tensors[3].grad is not None and tensors[4].grad is not None and not calls


def test_a_frozen_network_needs_no_frozen_bias_under_no_grad(calls):
    tensors = frozen(NAMES)
    with torch.no_grad():
        called(*tensors)
    assert calls


def test_the_operator_names_a_wrong_operand():
    x, weight, A, B, bias = (t.detach() for t in operands())
    with pytest.raises(RuntimeError, match=r"w must be a \[7, 6\] tensor .* got \[7, 5\]"):
        torch.ops.lora_kernels_cpu.lora_linear(x, weight[:, 1:], A, B, bias, 1.0, 0.0, 0, 0)


@pytest.mark.parametrize("asked", [s for n in (1, 2) for s in itertools.combinations((0, 2, 3), n)])
@pytest.mark.parametrize("create_graph", [False, True])
def test_some_of_the_gradients(asked, create_graph, calls):
    """`autograd.grad` and `backward(inputs=...)` ask for fewer than require one."""
    results = []
    for function in (called, by_function):
        tensors = frozen()
        inputs = [tensors[i] for i in asked]
        loss = function(*tensors).square().sum()
        results.append(torch.autograd.grad(loss, inputs, create_graph=create_graph))
        function(*tensors).square().sum().backward(inputs=inputs)
        assert [t.grad is not None for t in tensors] == [i in asked for i in range(5)]
        results[-1] += tuple(t.grad for t in inputs)
    assert len(calls) == 2
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("lead", [(), (9,), (2, 3)], ids=str)
def test_the_result_may_be_changed_in_place(lead, calls):
    def changed(function, *tensors):
        y = function(*tensors)
        y += 1.0
        y[..., :2].mul_(3.0)
        return torch.nn.functional.relu_(y)

    tensors = frozen(lead=lead)
    assert_bits(*(with_gradients(partial(changed, function), tensors) for function in BOTH))
    assert len(calls) == 1


def negated(t):
    """t as the imaginary part of a conjugate: a view with a bit that says minus."""
    made = torch.view_as_complex(torch.stack([t, -t], -1)).conj().imag
    assert made.is_neg()
    return made


def zero(t):
    """Zeros without memory, as the backward of `torch.sgn` makes them."""
    return torch._efficientzerotensor(t.shape)


LAZY = {"negated": negated, "zero": zero, "negated zero": lambda t: zero(t)._neg_view()}
lazy = pytest.mark.parametrize("kind", LAZY.values(), ids=LAZY)


def in_memory(t):
    return torch.zeros(t.shape).copy_(t)


@lazy
@pytest.mark.parametrize("which", NAMES)
@trained
def test_a_lazy_operand_is_what_it_stands_for(kind, which, needed, calls):
    results = []
    for make in (lambda t: t, in_memory):
        tensors = frozen(needed)
        i = NAMES.index(which)
        tensors[i] = make(kind(tensors[i].detach())).requires_grad_(which in needed)
        results.append(with_gradients(called, tensors))
    assert len(calls) == 2
    assert_bits(*results)


def sparse(t):
    return t.to_sparse()


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("lead", [(9,), (3, 3)], ids=str)
@pytest.mark.parametrize("kind", [*LAZY.values(), sparse], ids=[*LAZY, "sparse"])
def test_a_gradient_that_has_no_plain_memory(kind, lead, create_graph, function):
    if kind is sparse and function is by_function and len(lead) > 1:
        pytest.skip("torch itself cannot reshape it")
    tensors = frozen(lead=lead)
    wanted = [tensors[i] for i in (0, 2, 3)]
    y = function(*tensors)
    dy = kind(torch.randn(y.shape))
    exact = dy.to_dense() if kind is sparse else in_memory(dy)
    mine, theirs = (
        torch.autograd.grad(y, wanted, g, retain_graph=True, create_graph=create_graph)
        for g in (dy, exact)
    )
    assert all(map(torch.equal, mine, theirs))


@pytest.mark.parametrize(
    "loss",
    [
        lambda y, sparse: torch.sgn(y),
        lambda y, sparse: torch.gather(y, 1, torch.tensor([[0], [3]]), sparse_grad=sparse) * 2.0,
        lambda y, sparse: torch.nn.functional.embedding(torch.tensor([3, 0]), y, sparse=sparse),
    ],
    ids=["sgn", "gather", "embedding"],
)
def test_gradients_as_torch_makes_them(loss):
    """Of `sgn`, zeros without memory; of a gather and an embedding that were told so, sparse ones."""
    results = []
    for sparse in (True, False):
        tensors = frozen()
        y = called(*tensors)
        loss(y if sparse else y * 1.0, sparse).sum().backward()
        results.append([tensors[i].grad for i in (0, 2, 3)])
    assert_bits(*results)


def freed(t):
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


def cut_short(t, offset=0):
    """t in a storage that lacks its last element, behind `offset` others."""
    copy = torch.cat([t.new_zeros(offset), t.flatten()])[offset:].view(t.shape)
    copy.untyped_storage().resize_(4 * (offset + t.numel()) - 4)
    return copy


class Wrapper(torch.Tensor):
    """A tensor of a subclass that has no memory and answers every operator."""

    @staticmethod
    def __new__(cls, t):
        return torch.Tensor._make_wrapper_subclass(cls, t.shape, dtype=t.dtype, device=t.device)

    def __init__(self, t):
        self.t = t

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = torch.utils._pytree.tree_map_only(cls, lambda w: w.t, (args, kwargs or {}))
        return func(*args, **kwargs)


UNREADABLE = {
    "sparse": sparse,
    "mkldnn": torch.Tensor.to_mkldnn,
    "functional": torch._to_functional_tensor,
    "wrapper": Wrapper,
    "freed": freed,
    "cut short": cut_short,
    "cut short behind an offset": lambda t: cut_short(t, offset=3),
}


@pytest.mark.parametrize("which", NAMES)
@pytest.mark.parametrize("needed", [(), ("A", "B")], ids=["none", "A+B"])
@pytest.mark.parametrize("kind", UNREADABLE.values(), ids=UNREADABLE)
def test_an_operand_that_cannot_be_read_is_refused_by_name(kind, needed, which):
    tensors = frozen(needed)
    i = NAMES.index(which)
    tensors[i] = kind(tensors[i].detach())
    if which in needed:
        tensors[5 - i].requires_grad_(False)  # of A and B both or none are trained
    arguments = (*tensors, 0.75, 0.0, 0, 0)
    rule = (
        rf"\b({which}|{which[0].lower()}) must (be a dense|have memory)|out of bounds for storage"
    )
    with pytest.raises(RuntimeError, match=rule):
        torch.ops.lora_kernels_cpu.lora_linear(*arguments)


@pytest.mark.parametrize("which", NAMES)
def test_a_subclass_in_any_place_is_asked(which):
    """Its operators are called; memory it has none."""
    tensors = frozen(())
    expected = called(*tensors)
    i = NAMES.index(which)
    tensors[i] = Wrapper(tensors[i])
    assert torch.equal(called(*tensors), expected)


def test_a_nested_tensor_is_refused_by_name():
    x, *others = frozen(())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nested = torch.nested.nested_tensor(list(x.unsqueeze(1)))
    with pytest.raises(TypeError, match="x must be a dense tensor, got a nested one"):
        called(nested, *others)


@pytest.mark.parametrize("kind", [zero, negated, Wrapper])
def test_saved_tensors_come_back_as_hooks_give_them(kind):
    """A hook may give another kind of tensor; what it stands for counts."""
    results = []
    for unpack in (kind, lambda t: in_memory(kind(t)) if kind is not Wrapper else t):
        tensors = frozen()
        with saved_tensors_hooks(lambda t: t.detach(), unpack):
            y = called(*tensors)
            y.backward(torch.ones_like(y))
        results.append([tensors[i].grad for i in (0, 2, 3)])
    torch.testing.assert_close(*results)


def test_gradients_of_checkpointed_layers_by_autograd_grad(calls):
    """The recomputation runs within a backward that asks for some gradients only; it must save what forward saved."""
    first, second = frozen(("A", "B"), N=6), frozen(("A", "B"), N=6)

    def run(x):
        return called(called(x, *first[1:]), *second[1:])

    ys = run(first[0]), checkpoint(run, first[0], use_reentrant=False)
    wanted = [*first[2:4], *second[2:4]]
    assert_bits(*(torch.autograd.grad(y.square().sum(), wanted) for y in ys))
    assert calls


@pytest.mark.parametrize("sizes", [{"K": 0}, {"N": 0}, {"R": 0}, {"M": 0}], ids=str)
def test_second_derivatives_of_an_empty_extent(sizes, calls):
    tensors = frozen(**sizes)
    torch.testing.assert_close(*(second_derivatives(function, tensors) for function in BOTH))
    assert len(calls) == 1


@pytest.mark.parametrize(
    "tensors, sizes", [([], [0]), ([torch.zeros(7, 6, dtype=torch.int8)], [])], ids=["no", "sizes"]
)
def test_a_quantised_weight_of_nothing_is_refused(tensors, sizes):
    x, _, A, B, bias = (t.detach() for t in operands())
    rest = A, B, bias, 1.0, 0.0, 0, 0
    with pytest.raises(RuntimeError, match="must have tensors and sizes"):
        torch.ops.lora_kernels_cpu.lora_linear_quantized(x, tensors, "int8", sizes, *rest)
