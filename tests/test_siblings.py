"""Layers that read one x, fused: the same results, keys and objects; never a result for another x, time or state."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import threading
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import transformers
from llms_from_scratch.ch04 import GPTModel
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_kernels import (
    LinearWithLoRA,
    fuse_projections,
    lora_parameters,
    merge_lora,
    plan,
    replace_linear_with_lora,
    siblings,
    unfuse_projections,
    unmerge_lora,
)
from lora_kernels.backends import cpu
from tests.test_modules import reloaded

GROUP = ("q", "k", "v")


@pytest.fixture(autouse=True)
def _together(trained_together):
    """What cannot be computed together is no test of it."""
    if (reason := cpu.BACKEND.unavailable()) is not None:
        pytest.skip(reason)
    yield
    assert not getattr(siblings._thread, "rounds", [])


class Attention(nn.Module):
    """q, k and v of one x, or of another one where `other` is given."""

    def __init__(self, K=8, widths=(6, 4, 4)):
        super().__init__()
        for name, N in zip(GROUP, widths, strict=True):
            setattr(self, name, nn.Linear(K, N))

    def between(self, x):
        """What a test lets happen after q was called."""

    def forward(self, x, other=None):
        q = self.q(x)
        self.between(x)
        other = x if other is None else other
        return q, self.k(other), self.v(other)


def made(fused=True, dropout=0.0, **options):
    """(an Attention whose adapters are not zero, its twin whose layers compute for themselves)."""
    torch.manual_seed(2)
    model = Attention(**options)
    replace_linear_with_lora(model, rank=3, alpha=1.5, dropout=dropout)
    for p in lora_parameters(model):
        nn.init.normal_(p)
    twin = copy.deepcopy(model)
    if fused:
        fuse_projections(model, [GROUP])
    return model, twin


@pytest.fixture
def calls(monkeypatch):
    """How many projections each call of the products computed together."""
    counts = []
    inner = siblings.together

    def counted(x, parts, *rest):
        counts.append(len(parts))
        ys = inner(x, parts, *rest)
        if ys is None:
            counts[-1] = 0
        return ys

    monkeypatch.setattr(siblings, "together", counted)
    return counts


X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


def same(got, right):
    torch.testing.assert_close(list(got), list(right), atol=1e-5, rtol=1e-5)


def trained(model, call=None):
    """The results of a call, from one seed, and the gradients of x and of all parameters that have one."""
    torch.manual_seed(9)
    x = X.clone().requires_grad_()
    ys = (model if call is None else call)(x)
    ys = [ys] if isinstance(ys, torch.Tensor) else list(ys)
    sum(y.square().sum() for y in ys).backward()
    return [*ys, x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_results_gradients_and_draws_are_those_of_the_layers(dropout, calls):
    model, twin = made(dropout=dropout)
    same(trained(model), trained(twin))
    with torch.no_grad():
        same(model.eval()(X), twin.eval()(X))
    assert calls == [3, 3]


def test_objects_keys_and_parameters_stay():
    model, twin = made(fused=False)
    before = dict(model.named_modules()), list(model.state_dict()), list(model.parameters())
    assert fuse_projections(model, [GROUP]) == [GROUP]
    assert fuse_projections(model, [GROUP]) == [GROUP]  # again: nothing
    after = dict(model.named_modules()), list(model.state_dict()), list(model.parameters())
    assert before[0] == after[0] and before[1] == after[1]
    assert all(p is q for p, q in zip(before[2], after[2], strict=True))
    assert all(isinstance(layer, LinearWithLoRA) for layer in model.children())
    assert len(model._forward_hooks) == len(model._forward_pre_hooks) == 1
    assert unfuse_projections(model) == [GROUP]
    assert unfuse_projections(model) == []
    assert all(type(layer) is LinearWithLoRA for layer in model.children())
    assert not (
        model._forward_hooks or model._forward_pre_hooks or model._forward_hooks_always_called
    )
    same(model(X), twin(X))


def test_a_sibling_alone_computes_for_itself(calls):
    model, twin = made()
    q = model.q(X)
    with torch.no_grad():
        model.k.lora.B.zero_()
    torch.testing.assert_close(model.k(X), twin.k.linear(X))
    torch.testing.assert_close(q, twin.q(X))
    assert calls == []


CHANGES = {
    "x in place": lambda model, x: x.add_(1),
    "x.data": lambda model, x: x.mul_(2),
    "B in place": lambda model, x: model.k.lora.B.mul_(3),
    "B of another memory": lambda model, x: setattr(model.k.lora.B, "data", model.k.lora.B * 2),
    "A replaced": lambda model, x: setattr(model.k.lora, "A", nn.Parameter(model.k.lora.A * 2)),
    "weight in place": lambda model, x: model.k.linear.weight.mul_(2),
    "bias in place": lambda model, x: model.k.linear.bias.add_(2),
    "alpha": lambda model, x: setattr(model.k.lora, "alpha", 7.0),
    "merged": lambda model, x: (merge_lora(model), model.k.lora.B.data.zero_()),
    "training": lambda model, x: model.eval(),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.filterwarnings("ignore:q, k, v of Attention")
def test_no_result_outlives_what_it_depends_on(name):
    """Something changes after the first sibling was called, before the others are."""
    model, twin = made(dropout=0.5 if name == "training" else 0.0)

    def change(x, each):
        with torch.no_grad():
            CHANGES[name](each, x)

    results = []
    for each in (model, twin):
        each.between = lambda x, each=each: change(x, each)
        torch.manual_seed(1)
        with torch.no_grad():
            results.append(each(X.clone()))
    same(results[0][1:2], results[1][1:2])
    assert torch.isfinite(results[0][1]).all()


def test_another_x_is_computed_for_itself_with_a_warning(calls):
    model, twin = made()
    with pytest.warns(UserWarning, match="q, k, v of Attention were computed together, but"):
        got = model(X, X * 2)
    same(got, twin(X, X * 2))
    with pytest.warns(UserWarning):
        got = model(X, X.clone())  # equal values are no proof
    same(got, twin(X, X))
    assert calls == [3, 3]


def test_two_rounds_in_one_forward(calls):
    model, twin = made()
    for each in (model, twin):
        each.forward = lambda x, each=each: [
            layer(part) for part in (x, x + 1) for layer in (each.q, each.k, each.v)
        ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(model(X), twin(X))
    assert calls == [3, 3]


def test_nothing_is_held_after_the_forward():
    """Neither x nor a result, also where a sibling was not called or the forward raised."""
    model, _ = made()
    kept = []

    def forward(x):
        kept.append(weakref.ref(x))
        model.q(x)
        if len(kept) == 2:
            raise KeyError("in the middle")
        return x.sum()

    model.forward = forward
    with pytest.warns(UserWarning):
        model(X.clone())
    with pytest.raises(KeyError):
        model(X.clone())
    gc.collect()
    assert [ref() for ref in kept] == [None, None]


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved tensors", "reentrant"])
def test_gradient_checkpointing(reentrant, calls):
    both = made(dropout=0.5)
    same(*(trained(m, partial(checkpoint, m, use_reentrant=reentrant)) for m in both))
    assert calls == [3, 3]


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        partial(reloaded, weights_only=False),
    ],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_a_copy_is_fused_and_on_its_own(copied, calls):
    model, _ = made()
    other = copied(model)
    same(other(X), model(X))
    with torch.no_grad():
        model.k.lora.B.zero_()
    assert not torch.equal(other(X)[1], model(X)[1])
    assert calls == [3] * 4
    assert unfuse_projections(other) == [GROUP] and type(other.q) is LinearWithLoRA
    model(X)
    assert calls == [3] * 5


def test_threads_have_results_of_their_own():
    model, twin = made()
    barrier = threading.Barrier(2, timeout=30)
    model.between = lambda x: barrier.wait()
    xs = [X, X * 3]
    with ThreadPoolExecutor(2) as pool:
        for x, got in zip(xs, pool.map(model, xs), strict=True):
            same(got, twin(x))


@pytest.mark.parametrize("part", ["", ".linear", ".lora"])
def test_hooks_run(part, calls):
    """Hooks that come later make every sibling compute for itself; without them the group computes together again."""
    model, twin = made()
    seen = []
    module = model.get_submodule("k" + part)
    handle = module.register_forward_hook(lambda *_: seen.append(1))
    same(model(X), twin(X))
    assert seen == [1] and calls == []
    handle.remove()
    model(X)
    assert calls == [3]


def test_a_hook_on_the_parent_and_on_all_modules_runs(calls):
    model, twin = made()
    seen = []
    handle = model.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    same(model(X), twin(X * 2))
    assert calls == [3]
    handle.remove()
    handle = nn.modules.module.register_module_forward_hook(
        lambda m, *_: seen.append(type(m).__name__)
    )
    try:
        same(model(X), twin(X))
    finally:
        handle.remove()
    assert seen.count("LoRALayer") == 6 and calls == [3]


def test_merged_layers_and_inference_mode_compute_for_themselves(calls):
    model, twin = made()
    merge_lora(model)
    same(model(X), twin(X))
    unmerge_lora(model)
    with torch.inference_mode():
        same(model(X * 1), twin(X * 1))
    assert calls == []


def test_compiled_without_a_graph_break():
    model, twin = made()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    same(trained(model, compiled), trained(twin))


def pair_of(model, groups):
    """(a model with adapters that are not zero, fused, its twin that is not, the labels of what was fused)."""
    replace_linear_with_lora(model, rank=2, alpha=4.0)
    for p in lora_parameters(model):
        nn.init.normal_(p, std=0.1)
    twin = copy.deepcopy(model)
    return model, twin, fuse_projections(model, groups)


def loss_and_gradients(model, loss):
    return [loss, *torch.autograd.grad(loss, list(lora_parameters(model)))]


def test_the_books_model():
    config = {"vocab_size": 50, "context_length": 8, "emb_dim": 16, "n_heads": 2, "n_layers": 2,
              "drop_rate": 0.0, "qkv_bias": False}  # fmt: skip
    names = "W_query", "W_key", "W_value"
    *both, labels = pair_of(GPTModel(config), [names])
    assert labels[1] == tuple(f"trf_blocks.1.att.{n}" for n in names)
    tokens = torch.randint(50, (2, 8))
    same(*(loss_and_gradients(m, m(tokens).square().mean()) for m in both))


def test_llama_with_transformers_checkpointing(calls):
    config = transformers.LlamaConfig(vocab_size=64, hidden_size=32, num_attention_heads=4,
        num_key_value_heads=2, num_hidden_layers=2, intermediate_size=48)  # fmt: skip
    groups = [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]
    *both, labels = pair_of(transformers.LlamaForCausalLM(config), groups)
    assert len(labels) == 4
    both[0].gradient_checkpointing_enable()
    tokens = torch.randint(64, (2, 9))
    same(*(loss_and_gradients(m, m.train()(input_ids=tokens, labels=tokens).loss) for m in both))
    assert calls == [3, 2] * 4
    with torch.no_grad():
        options = {"max_new_tokens": 4, "do_sample": False}
        assert torch.equal(*(m.eval().generate(tokens, **options) for m in both))


def rewrap(name, in_features=8, **options):
    def change(model):
        options_of = {"rank": 2, "alpha": 1.0, **options}
        setattr(model, name, LinearWithLoRA(nn.Linear(in_features, 4), **options_of))

    return change


@pytest.mark.parametrize(
    ("change", "groups", "error", "message"),
    [
        (lambda m: None, [("q", "x")], ValueError, "groups must name children of one module"),
        (lambda m: None, [], ValueError, "at least one group"),
        (lambda m: None, ["q"], TypeError, "groups must be tuples of names"),
        (lambda m: None, [("q",)], ValueError, "two or more different names"),
        (lambda m: None, [("q", "k"), ("k", "v")], ValueError, "groups must not share a layer"),
        (lambda m: setattr(m, "k", m.k.linear), [GROUP], TypeError, "k must be a LinearWithLoRA, got Linear"),
        (rewrap("k", dora=True), [GROUP], ValueError, "k must be a layer that can be fused, but it has DoRA"),
        (lambda m: m.v.register_forward_hook(print), [GROUP], ValueError, "v must be .* it has hooks"),
        (lambda m: m.v.lora.register_forward_hook(print), [GROUP], ValueError, "v must be .* hooks"),
        (rewrap("v", in_features=9), [GROUP], ValueError, "v must have the in_features of q, 8, got 9"),
        (lambda m: m.k.double(), [GROUP], ValueError, "k must have the dtype of q, torch.float32, got torch.float64"),
        (lambda m: m.k.lora.bfloat16(), [GROUP], ValueError, "k must have the adapter's dtype of q"),
        (lambda m: m.k.to("meta"), [GROUP], ValueError, "k must have the device of q, cpu, got meta"),
        (lambda m: setattr(m, "k", m.q), [GROUP], ValueError, "must be different layers"),
        (lambda m: fuse_projections(m, [("q", "k")]), [GROUP], ValueError, "q must be in one group"),
    ],
)  # fmt: skip
def test_what_does_not_qualify_is_named_and_nothing_changes(change, groups, error, message):
    model, _ = made(fused=False)
    change(model)
    before = [type(m) for m in model.modules()], len(model._forward_hooks)
    with pytest.raises(error, match=message):
        fuse_projections(model, groups)
    assert ([type(m) for m in model.modules()], len(model._forward_hooks)) == before


def test_bad_input_is_the_layers_own_error():
    model, twin = made()
    for x in (torch.randn(2, 7), torch.randn(2, 8).double()):
        errors = []
        for each in (model, twin):
            with pytest.raises((ValueError, TypeError)) as error:
                each(x)
            errors.append(str(error.value))
        assert errors[0] == errors[1]


class Gated(nn.Module):
    """silu(gate(x)) * up(x), `call` around a part of it."""

    def __init__(self, call, dropout=0.0):
        super().__init__()
        self.gate, self.up, self.call = nn.Linear(8, 8), nn.Linear(8, 8), call
        replace_linear_with_lora(self, rank=3, alpha=1.5, dropout=dropout)
        for p in lora_parameters(self):
            nn.init.normal_(p)

    def part(self, x):
        return torch.tanh(self.up(x))

    def whole(self, x):
        return nn.functional.silu(nn.functional.dropout(self.gate(x), 0.1)) * self.up(x)

    def forward(self, x):
        return self.call(self, x)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "call, dropout",
    [
        (lambda m, x, how: torch.sigmoid(m.gate(x)) * checkpoint(m.part, x, use_reentrant=how), 0.0),
        (lambda m, x, how: checkpoint(m.whole, x, use_reentrant=how), 0.5),
        (lambda m, x, how: checkpoint(m.gate, x, use_reentrant=how) * checkpoint(m.up, x, use_reentrant=how), 0.5),
    ],
    ids=["one sibling", "the forward", "each sibling"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*were computed together")
def test_checkpoints_within_the_forward(call, dropout, reentrant):
    """What is recomputed is what was computed: with the same masks, and saved in the same places."""
    torch.manual_seed(0)
    model = Gated(lambda m, x: call(m, x, reentrant), dropout=dropout)
    twin = copy.deepcopy(model)
    fuse_projections(model, [("gate", "up")])
    same(trained(model), trained(twin))


def test_a_checkpoint_around_the_parent_draws_the_seeds_in_one_order(monkeypatch, calls):
    """With gradients the work is too little to be computed together, without it is not: dropout must not tell them apart."""
    monkeypatch.setattr(cpu, "_TRAINED_TOGETHER", 1 << 40)
    plan.forget()
    torch.manual_seed(0)
    model = Gated(Gated.whole, dropout=0.5)
    fuse_projections(model, [("gate", "up")])
    plain = trained(model)
    model.zero_grad()
    same(trained(model, partial(checkpoint, model, use_reentrant=True)), plain)


def test_an_interrupted_forward_leaves_nothing_behind(calls):
    """torch calls no hook after a KeyboardInterrupt; the next forward drops what is left."""
    model, twin = made()

    def stopped(x):
        raise KeyboardInterrupt

    model.between = stopped
    with pytest.raises(KeyboardInterrupt):
        model(X)
    del model.between
    same(model(X), twin(X))
    assert calls == [3, 3] and not siblings._thread.rounds


def test_a_forward_within_itself_keeps_its_own_results():
    model, twin = made()
    for each in (model, twin):
        each.between = lambda x, m=each: x.ndim == 3 and m(x[0])
    same(model(X), twin(X))


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_parametrized_base_is_computed_by_itself(when):
    model, twin = made(fused=when == "after")
    for each in (model, twin):
        nn.utils.parametrize.register_parametrization(each.k.linear, "weight", nn.Tanh())
    if when == "before":
        with pytest.raises(ValueError, match=r"k must be .* parametrized"):
            fuse_projections(model, [GROUP])
    same(model(X), twin(X))


@pytest.mark.filterwarnings("ignore:.*were computed together")
@pytest.mark.parametrize("mode", [torch.no_grad, partial(torch.autocast, "cpu", torch.bfloat16)])
def test_no_result_of_another_mode(mode):
    """A mode that begins between two siblings."""
    found = []
    for each in made():
        with contextlib.ExitStack() as modes:
            each.between = lambda x, modes=modes: modes.enter_context(mode())
            found.append(each(X))
        assert [y.requires_grad for y in found[-1]] == [True, *[mode is not torch.no_grad] * 2]
    same(*found)


@pytest.mark.filterwarnings("ignore:.*were computed together")
def test_an_x_that_requires_grad_from_then_on():
    found = []
    for each in made():
        x = X.clone()
        each.between = lambda x: x.requires_grad_()
        ys = each(x)
        sum(y.sum() for y in ys).backward()
        found.append([*ys, x.grad])
    same(*found)


def test_the_last_of_a_group_warns_too():
    pair, _ = made(fused=False)
    del pair.v
    pair.forward = lambda x: pair.q(x)[..., :4] + pair.k(x + 1)
    fuse_projections(pair, [("q", "k")])
    with pytest.warns(UserWarning, match="q, k of Attention were computed together"):
        pair(X)


def test_one_odd_call_does_not_end_the_fusing(calls):
    model, _ = made()
    torch.func.vmap(model)(X)
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        model(X)
    model(X)
    assert calls == [3]


def test_a_sibling_without_a_derivative_has_none():
    model, _ = made()
    for p in (*model.parameters(),):
        p.requires_grad_(False)
    model.q.lora.A.requires_grad_()
    q, k, v = model(X)
    assert q.requires_grad and not k.requires_grad and not v.requires_grad
    q.sum().backward()


def test_a_module_that_is_never_called_is_refused():
    model = nn.ModuleDict({"q": nn.Linear(8, 8), "k": nn.Linear(8, 8)})
    replace_linear_with_lora(model, rank=2, alpha=1.0)
    with pytest.raises(ValueError, match=r"0\.q, 0\.k are in a ModuleDict, which has no forward"):
        fuse_projections(nn.Sequential(model), [("q", "k")])


def test_adapters_of_two_dtypes_are_the_layers_own_error():
    model, twin = made()
    for each in (model, twin):
        each.k.lora.B.data = each.k.lora.B.data.bfloat16()
        with pytest.raises(TypeError, match="B must have A's dtype"):
            each(X)
