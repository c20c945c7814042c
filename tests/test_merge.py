"""Merging: the same function within one rounding of W, the same bits back, and what must not be merged."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from lora_kernels import (
    LinearWithLoRA,
    load_adapter,
    merge_lora,
    replace_linear_with_lora,
    save_adapter,
    unmerge_lora,
)
from lora_kernels.modules import lora_layers
from lora_kernels.named import add_adapter, load_named_adapter, remove_adapter
from tests.oracle import assert_bits
from tests.test_adapters import block, fill_adapters, snapshot, unchanged


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_weight_is_rounded_once(dtype):
    model = block(dtype=torch.float32).to(dtype)
    before = {name: layer.weight.detach().clone() for name, layer in lora_layers(model)}
    merge_lora(model)
    for name, layer in lora_layers(model):
        delta = layer.lora.scale * layer.lora.A.double() @ layer.lora.B.double()
        exact = before[name].double() + delta.t()
        half_unit = exact.abs() * torch.finfo(dtype).eps / 2
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        summing = 8 * torch.finfo(wide).eps * (before[name].double().abs() + delta.t().abs())
        allowed = half_unit + summing + 1e-7 * (dtype == torch.float16)
        assert ((layer.weight.double() - exact).abs() <= allowed).all()


def test_merged_and_unmerged_compute_the_same():
    """With the same parameters: optimizers and tied modules hold on to them."""
    model, x = block(), torch.randn(9, 12)
    expected = model(x)
    parameter, pointer = model.head.weight, model.head.weight.data_ptr()
    assert merge_lora(model) == ["q_proj", "mlp.0", "mlp.2", "head"]
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)
    assert model.head.weight is parameter and parameter.data_ptr() == pointer
    assert unmerge_lora(model) == ["q_proj", "mlp.0", "mlp.2", "head"]
    assert torch.equal(model(x), expected)
    assert model.head.weight is parameter and parameter.data_ptr() == pointer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerging_restores_every_bit(dtype):
    """Subtracting the product again would not: a weight of 1e-9 is lost beside a delta of 1."""
    model = block().to(dtype)
    with torch.no_grad():
        model.head.linear.weight.fill_(1e-9)
    before = snapshot(model)
    for _ in range(3):
        merge_lora(model)
        assert not torch.equal(model.head.weight, before[1]["head.linear.weight"])
        unmerge_lora(model)
    assert unchanged(model, before)


def test_merging_twice_adds_once():
    model = block()
    merge_lora(model)
    weight = model.head.weight.detach().clone()
    assert merge_lora(model) == []
    assert torch.equal(model.head.weight, weight)
    unmerge_lora(model)
    assert unmerge_lora(model) == []


def test_a_merged_models_state_is_the_unmerged_ones():
    model = block()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    merge_lora(model)
    assert list(model.state_dict()) == list(before)
    assert_bits(dict(model.state_dict()), before)
    with pytest.raises(RuntimeError, match="is merged: unmerge_lora"):
        model.load_state_dict(before)


@pytest.mark.parametrize("merged", [False, True])
def test_unload_leaves_plain_linears_for_good(merged):
    """Of a model that was merged before as well."""
    model, x = block(), torch.randn(9, 12)
    expected, linear = model(x), model.head.linear
    if merged:
        merge_lora(model)
    merge_lora(model, unload=True)
    assert not list(lora_layers(model)) and model.head is linear
    assert "q_proj.weight" in model.state_dict()
    assert not any("unmerged" in key for key in linear.__dict__)
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)


def by_parameter(embedding, head):
    head.weight = embedding.weight


def by_data(embedding, head):
    head.weight.data = embedding.weight.data


def by_a_parameter_over_it(embedding, head):
    head.weight = nn.Parameter(embedding.weight)


def by_the_first_rows(embedding, head):
    embedding.weight = nn.Parameter(torch.cat([head.weight.detach(), torch.ones(3, 6)]))
    head.weight = nn.Parameter(embedding.weight[:10])


def by_the_last_row(embedding, head):
    memory = torch.randn(19, 6)
    embedding.weight, head.weight = nn.Parameter(memory[:10]), nn.Parameter(memory[9:])


def behind_a_smaller_one(embedding, head):
    memory = torch.randn(20, 6)
    embedding.weight, head.weight = nn.Parameter(memory), nn.Parameter(memory[10:])
    embedding.register_buffer("first", memory[2])


def by_a_buffer(embedding, head):
    embedding.register_buffer("last", head.weight.detach()[9, 5])


def by_one_array(embedding, head):
    array = torch.randn(10, 6).numpy()
    embedding.weight.data, head.weight.data = torch.from_numpy(array), torch.from_numpy(array)


def on_the_meta_device(embedding, head):
    embedding.weight = nn.Parameter(torch.empty(10, 6, device="meta"))
    head.weight = nn.Parameter(embedding.weight)


@pytest.mark.parametrize(
    "tie",
    [
        *(by_parameter, by_data, by_a_parameter_over_it, by_the_first_rows, by_the_last_row),
        *(behind_a_smaller_one, by_a_buffer, by_one_array, on_the_meta_device),
    ],
)
@pytest.mark.parametrize("other", ["embedding", "z"])  # its name is before the head's, or behind
def test_a_tied_weight_is_refused_and_nothing_is_merged(tie, other):
    """However its memory is shared; merging would change the other tensor too."""
    model = nn.ModuleDict({"linear": nn.Linear(6, 6), "head": nn.Linear(6, 10, bias=False)})
    model[other] = nn.Embedding(10, 6)
    tie(model[other], model["head"])
    replace_linear_with_lora(model, 2, 1.0)
    fill_adapters(model)
    before = snapshot(model)
    words = rf"head\.linear\.weight .* shared, but {other}\.\w+ has"
    with pytest.raises(ValueError, match=words):
        merge_lora(model)
    assert tie is on_the_meta_device or unchanged(model, before)
    assert not any(layer.merged for _, layer in lora_layers(model))


def test_neighbours_in_one_memory_are_merged():
    """Projections that are slices of one tensor overlap nowhere."""
    memory = torch.randn(3, 6, 6)
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in memory))
    for linear, part in zip(model, memory, strict=True):
        linear.weight.data = part
    replace_linear_with_lora(model, 2, 1.0)
    x = torch.randn(4, 6)
    expected = model(x)
    assert merge_lora(model) == ["0", "1", "2"]
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def doubled(layer):
    layer.linear.__class__ = Doubled


def observed(*_):
    return None


UNPLAIN = {
    "weight norm": lambda layer: nn.utils.parametrizations.weight_norm(layer.linear),
    "spectral norm": lambda layer: nn.utils.spectral_norm(layer.linear),
    "pruned": lambda layer: prune.l1_unstructured(layer.linear, "weight", 0.5),
    "subclass": doubled,
    "hook on linear": lambda layer: layer.linear.register_forward_hook(observed),
    "hook on lora": lambda layer: layer.lora.register_forward_pre_hook(observed),
}


@pytest.mark.parametrize("unload", [False, True])
@pytest.mark.parametrize("kind", UNPLAIN)
def test_what_is_not_plain_is_refused_and_nothing_is_merged(kind, unload):
    """A store into a computed weight would be lost; a hook would no longer see what it was attached to."""
    model = block()
    UNPLAIN[kind](model.head)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"head\.linear must be a plain Linear"):
        merge_lora(model, unload=unload)
    assert unchanged(model, before) and not any(layer.merged for _, layer in lora_layers(model))


def test_a_linear_of_two_layers_is_refused():
    """Merging both would lose one of the adapters."""
    linear = nn.Linear(6, 6)
    model = nn.Sequential(LinearWithLoRA(linear, 2, 1.0), LinearWithLoRA(linear, 2, 1.0))
    with pytest.raises(ValueError, match=r"0\.linear\.weight must not be shared"):
        merge_lora(model)
    assert not any(layer.merged for _, layer in lora_layers(model))


def test_autocast_does_not_round_the_sum():
    model, expected = block(), block()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        merge_lora(model)
    merge_lora(expected)
    assert torch.equal(model.head.weight, expected.head.weight)


def test_meta_tensors_are_merged():
    model = nn.Sequential(nn.Linear(4, 4, device="meta"))
    replace_linear_with_lora(model, 2, 1.0)
    assert merge_lora(model) == ["0"] and model[0].weight.is_meta


def test_merging_in_inference_mode():
    """The weight that is kept, which a state dict saves, can be trained."""
    model = block()
    x = torch.randn(3, 12)
    before, expected = snapshot(model), model(x)
    with torch.inference_mode():
        merge_lora(model)
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)
    assert not any(t.is_inference() for t in model.state_dict().values())
    unmerge_lora(model)
    assert unchanged(model, before)


def test_a_layer_in_two_places_is_unloaded_from_both():
    model = nn.Module()
    model.first = model.second = LinearWithLoRA(nn.Linear(4, 4), 2, 1.0)
    linear = model.first.linear
    assert merge_lora(model, unload=True) == ["first"]
    assert model.first is linear and model.second is linear


def test_a_root_that_is_a_layer_cannot_be_unloaded():
    layer = LinearWithLoRA(nn.Linear(4, 4), 2, 1.0)
    with pytest.raises(ValueError, match=r"take model\.linear"):
        merge_lora(layer, unload=True)
    assert merge_lora(layer) == [""] and layer.merged


@pytest.mark.parametrize("unload", [False, True])
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_a_failure_in_the_middle_leaves_every_layer_unmerged(monkeypatch, error, unload):
    from lora_kernels import merge

    compute, calls = merge.merged_weight, []

    def fails_at_the_third(layer):
        calls.append(layer)
        if len(calls) == 3:
            raise error
        return compute(layer)

    model = block()
    before = snapshot(model)
    monkeypatch.setattr(merge, "merged_weight", fails_at_the_third)
    with pytest.raises(error):
        merge_lora(model, unload=unload)
    assert unchanged(model, before)


def test_a_weight_that_cannot_be_written():
    """It is the last of four: the three before it are as they were."""
    model = block()
    model.head.weight = nn.Parameter(torch.randn(5, 1).expand(5, 12))
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="single memory location"):
        merge_lora(model)
    assert unchanged(model, before)


class Guarded(nn.Module):
    """Its second child cannot be set."""

    def __setattr__(self, name, value):
        if name == "second" and "second" in self._modules:
            raise AttributeError("second is fixed")
        super().__setattr__(name, value)


def test_a_place_that_cannot_be_set():
    """By wrapping or by unloading: the model is as it was."""
    model = Guarded()
    model.first, model.second = nn.Linear(6, 6), nn.Linear(6, 6)
    before = snapshot(model)
    with pytest.raises(AttributeError, match="second is fixed"):
        replace_linear_with_lora(model, 2, 1.0)
    assert unchanged(model, before)
    for key in ("first", "second"):
        model._modules[key] = LinearWithLoRA(model._modules[key], 2, 1.0)
        nn.init.normal_(model._modules[key].lora.B)
    before = snapshot(model)
    with pytest.raises(AttributeError, match="second is fixed"):
        merge_lora(model, unload=True)
    assert unchanged(model, before)


class Tied(nn.Module):
    """An encoder and a tied head, below a holder with a list of its own; `fixed`: the list here cannot be set."""

    fixed = False

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(6, 2, 6, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 1), nn.Linear(6, 6)
        self.ties = ["head.weight"]

    @property
    def _tied_weights_keys(self):
        return self.ties

    @_tied_weights_keys.setter
    def _tied_weights_keys(self, keys):
        if self.fixed:
            raise AttributeError("the list is fixed")
        self.ties = keys


TARGETS = ["linear1", "head"]
CHANGES = {
    "replace": (None, lambda net, _: replace_linear_with_lora(net, 2, 1.0, target_modules=TARGETS)),
    "load": (None, load_adapter),
    "load into a layer": ("one layer", load_adapter),
    "unload": ("layers", lambda net, _: merge_lora(net, unload=True)),
    "add": (None, lambda net, _: add_adapter(net, "fr", 2, 1.0, target_modules=TARGETS)),
    "load by name": (None, lambda net, path: load_named_adapter(net, "fr", path)),
    "remove": ("named", lambda net, _: remove_adapter(net, "de")),
}


@pytest.mark.parametrize("before, change", CHANGES.values(), ids=CHANGES)
def test_a_list_of_tied_weights_that_cannot_be_set(before, change, tmp_path):
    """By any change of layers: the model is as it was, its settings and other lists too."""
    net = nn.Module()
    net.inner, net._tied_weights_keys = Tied(), ["inner.head.weight"]
    source = copy.deepcopy(net)
    replace_linear_with_lora(source, 2, 1.0, target_modules=TARGETS)
    fill_adapters(source)
    save_adapter(source, tmp_path)
    if before == "named":
        add_adapter(net, "de", 2, 1.0, target_modules=TARGETS)
    elif before is not None:
        targets = TARGETS if before == "layers" else ["linear1"]
        replace_linear_with_lora(net, 2, 1.0, target_modules=targets)
        fill_adapters(net)
    encoder, net.inner.fixed = net.inner.encoder, True

    def settings():
        flags = encoder.use_nested_tensor, encoder.layers[0].activation_relu_or_gelu
        return net._tied_weights_keys, net.inner.ties, flags

    was, state = settings(), snapshot(net)
    with pytest.raises(AttributeError, match="the list is fixed"):
        change(net, tmp_path)
    assert settings() == was and unchanged(net, state)
    net.inner.fixed = False
    change(net, tmp_path)
    assert not unchanged(net, state)


def test_a_conv1d_is_merged_as_it_is_stored():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = nn.Sequential(conv1d(10, 6))
    replace_linear_with_lora(model, 2, 1.5)
    nn.init.normal_(model[0].lora.B)
    x = torch.randn(4, 6)
    base, expected = model[0].linear, model(x)
    before = base.weight.detach().clone()
    merge_lora(model)
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(model.state_dict()["0.linear.weight"], before)
    unmerge_lora(model)
    assert torch.equal(base.weight, before) and torch.equal(model(x), expected)
    merge_lora(model, unload=True)
    assert model[0] is base and list(model.state_dict()) == ["0.weight", "0.bias"]
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_base_that_cannot_hold_the_sum(dtype):
    linear = nn.Linear(6, 6, bias=False).requires_grad_(False)
    linear.weight.data = torch.ones(6, 6).to(dtype)
    layer = LinearWithLoRA(linear, 2, 1.0)
    with pytest.raises(ValueError, match=r"linear\.weight must be float32, .* got torch\."):
        merge_lora(layer)
    assert not layer.merged


def test_loading_is_refused_only_where_a_layer_is_merged():
    model = block()
    state = model.state_dict()
    merge_lora(model.head)
    part = {key: torch.zeros_like(value) for key, value in state.items() if "head" not in key}
    model.load_state_dict(part, strict=False)
    assert not model.q_proj.weight.any()
    with pytest.raises(RuntimeError, match=r"head is merged"):
        model.load_state_dict({"head.lora.A": state["head.lora.A"]}, strict=False)
