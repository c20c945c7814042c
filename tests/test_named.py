"""Named adapters of a model: added, selected, trained, removed, saved and loaded; PEFT reads and computes the same."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from lora_kernels import load_adapter, save_adapter
from lora_kernels.mixed import BASE, LinearWithAdapters
from lora_kernels.named import (
    add_adapter,
    load_named_adapter,
    named_layers,
    remove_adapter,
    save_named_adapter,
    select_adapters,
)
from tests.test_adapters import snapshot, unchanged


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.second(self.first(x).relu()))


def model():
    torch.manual_seed(4)
    net = Net()
    add_adapter(net, "fr", 2, 0.5, target_modules=["first", "second"])
    add_adapter(net, "de", 3, 2.0, scaling="alpha/rank", target_modules=["second", "head"])
    for _, layer in named_layers(net):
        for lora in layer.adapters.values():
            nn.init.normal_(lora.B)
    return net


X = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0))


def outputs(net, names):
    select_adapters(net, names)
    return net(X)


def test_a_batch_is_its_samples_one_by_one():
    net = model()
    assert [layer.names for _, layer in named_layers(net)] == [("fr",), ("fr", "de"), ("de",)]
    names = ["de", BASE, "fr", "de"]
    mixed = outputs(net, names)
    for i, name in enumerate(names):
        torch.testing.assert_close(mixed[i], outputs(net, name)[i])
    torch.manual_seed(4)
    torch.testing.assert_close(mixed[1], Net()(X)[1])


def test_removing_the_last_adapter_gives_the_model_back():
    net = model()
    before = outputs(net, "de")
    assert remove_adapter(net, "fr") == ["first", "second"]
    assert type(net.first) is nn.Linear and net.second.names == ("de",)
    torch.testing.assert_close(outputs(net, "de"), before)
    remove_adapter(net, "de")
    torch.manual_seed(4)
    bare = Net()
    assert net.state_dict().keys() == bare.state_dict().keys()
    assert torch.equal(net(X), bare(X))
    with pytest.raises(ValueError, match="name must be an adapter of the model, got 'de'"):
        remove_adapter(net, "de")


def test_files_are_those_of_one_adapter(tmp_path):
    """An adapter leaves and comes back by name, alone in a model of ours, and in PEFT."""
    net = model()
    want = {name: outputs(net, name) for name in ("fr", "de")}
    for name in want:
        save_named_adapter(net, name, tmp_path / name)
    torch.manual_seed(4)
    fresh = Net()
    assert set(load_named_adapter(fresh, "other", tmp_path / "de")) == {"second", "head"}
    assert set(load_named_adapter(fresh, "fr", tmp_path / "fr")) == {"first", "second"}
    torch.testing.assert_close(outputs(fresh, "other"), want["de"])
    torch.testing.assert_close(outputs(fresh, ["fr"] * 4), want["fr"])
    torch.manual_seed(4)
    single = Net()
    load_adapter(single, tmp_path / "de")
    torch.testing.assert_close(single(X), want["de"])
    torch.manual_seed(4)
    theirs = PeftModel.from_pretrained(Net(), tmp_path / "fr").eval()
    torch.testing.assert_close(theirs(X), want["fr"])


def test_files_of_a_wrapped_model(tmp_path):
    """The names in them are those without torch's wrappers, and found within them."""
    net = model()
    want = outputs(net, "de")
    save_named_adapter(nn.DataParallel(net), "de", tmp_path)
    torch.manual_seed(4)
    fresh = Net()
    assert set(load_named_adapter(nn.DataParallel(fresh), "other", tmp_path)) == {"second", "head"}
    torch.testing.assert_close(outputs(fresh, "other"), want)
    fresh = Net()
    fresh.head = torch.compile(fresh.head)
    with pytest.raises(ValueError, match="head must have its adapter before it is compiled"):
        load_named_adapter(fresh, "de", tmp_path)
    with pytest.raises(ValueError, match="must contain named layers to save"):
        save_named_adapter(nn.DataParallel(net.head), "de", tmp_path)


def test_files_of_peft_are_loaded(tmp_path):
    torch.manual_seed(4)
    theirs = get_peft_model(
        Net(), LoraConfig(r=3, target_modules=["first", "head"], init_lora_weights=False)
    )
    theirs.save_pretrained(tmp_path)
    torch.manual_seed(4)
    net = Net()
    load_named_adapter(net, "fr", tmp_path)
    torch.testing.assert_close(outputs(net, "fr"), theirs(X))


def test_a_step_trains_the_adapters_of_the_batch():
    net = model()
    trained = [p for n, p in net.named_parameters() if "adapters" in n]
    optimizer = torch.optim.AdamW(trained, lr=0.1, weight_decay=0.1)
    before = copy.deepcopy(net.state_dict())
    outputs(net, ["fr", BASE, "fr", BASE]).square().sum().backward()
    optimizer.step()
    changed = {
        key.split(".")[2] for key, t in net.state_dict().items() if not torch.equal(t, before[key])
    }
    assert changed == {"fr"}


def test_bad_requests_change_nothing(tmp_path):
    net = model()
    save_named_adapter(net, "fr", tmp_path / "fr")
    names, before = ["fr", "de"], snapshot(net)
    narrow = nn.ModuleDict({"first": nn.Linear(8, 11), "second": nn.Linear(12, 8)})
    with pytest.raises(ValueError, match=r"'first' must have A \[8, 2\] and B \[2, 11\]"):
        load_named_adapter(narrow, "fr", tmp_path / "fr")
    assert type(narrow["first"]) is nn.Linear
    with torch.device("meta"):
        empty = Net()
    with pytest.raises(ValueError, match="'first' must have values before loading, but is on the"):
        load_named_adapter(empty, "fr", tmp_path / "fr")
    assert type(empty.first) is nn.Linear
    for call, message in (
        (lambda: add_adapter(net, "fr", 2, 1.0), "name must be new, got 'fr'"),
        (lambda: add_adapter(net, "a.b", 2, 1.0), "name must be a string without dots"),
        (lambda: add_adapter(net, "it", 2, 1.0, target_modules=["nothing"]), "must name a Linear"),
        (lambda: load_named_adapter(net, "de", tmp_path / "fr"), "name must be new, got 'de'"),
        (lambda: load_named_adapter(net, BASE, tmp_path / "fr"), "name must be a string"),
        (lambda: save_named_adapter(net, "it", tmp_path / "it"), "must be an adapter of the model"),
        (lambda: select_adapters(net, ["fr", "it"]), r"must be of .*got \['it'\]"),
        (
            lambda: select_adapters(net, torch.tensor([0, 1])),
            "where the layers of the model have different",
        ),
        (lambda: select_adapters(Net(), names), "must contain a LinearWithAdapters"),
        (lambda: net(X), "adapters must be given, or selected"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert unchanged(net, before)


def test_an_adapter_on_adapted_layers_is_no_second_wrapper():
    net = model()
    add_adapter(net, "it", 1, 1.0)
    assert all("it" in layer.names for _, layer in named_layers(net))
    assert not any(isinstance(layer.linear, LinearWithAdapters) for _, layer in named_layers(net))
    with pytest.raises(ValueError, match="LinearWithLoRA"):
        save_adapter(net, "nowhere")


def test_dora_is_refused_and_not_dropped(tmp_path):
    base = Net()
    config = LoraConfig(r=2, target_modules=["first"], use_dora=True, init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(tmp_path)
    net = Net()
    with pytest.raises(ValueError, match="'first' must be plain LoRA, got DoRA"):
        load_named_adapter(net, "fr", tmp_path)
    assert type(net.first) is nn.Linear


def test_a_float32_adapter_stays_float32_on_a_half_base(tmp_path):
    net = Net()
    add_adapter(net, "fr", 2, 1.0)
    save_named_adapter(net, "fr", tmp_path)
    half = Net().bfloat16()
    load_named_adapter(half, "fr", tmp_path)
    assert torch.equal(half.first.adapters["fr"].A, net.first.adapters["fr"].A)


def test_models_that_read_the_linear_of_a_layer(tmp_path):
    """By its weight, past it, and through a tied one."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    t5, tokens = T5ForConditionalGeneration(config).eval(), torch.randint(20, (2, 5))
    before = t5(input_ids=tokens, labels=tokens).loss
    add_adapter(t5, "fr", 2, 1.0)
    select_adapters(t5, "fr")
    torch.testing.assert_close(t5(input_ids=tokens, labels=tokens).loss, before)

    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), 1).eval()
    with pytest.warns(UserWarning, match="out_proj is left alone") as warned:
        add_adapter(encoder, "fr", 2, 1.0)
    assert warned[0].filename == __file__
    for _, layer in named_layers(encoder):
        nn.init.normal_(layer.adapters["fr"].B)
    with torch.no_grad():
        select_adapters(encoder, "fr")
        adapted = encoder(X)
        select_adapters(encoder, BASE)
        assert not torch.allclose(adapted, encoder(X))

    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=8))
    add_adapter(gpt, "fr", 2, 1.0)
    gpt.save_pretrained(tmp_path / "with")
    remove_adapter(gpt, "fr")
    gpt.save_pretrained(tmp_path / "without")
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "without")
    assert torch.equal(again.lm_head.weight, gpt.transformer.wte.weight)


def test_a_layer_that_is_not_called_is_refused(tmp_path):
    attention = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)})
    plain = nn.ModuleDict({"attn": nn.ModuleDict({"out_proj": nn.Linear(8, 8)})})
    add_adapter(plain, "fr", 2, 1.0)
    save_named_adapter(plain, "fr", tmp_path)
    with pytest.raises(ValueError, match="must be called as a module, but MultiheadAttention"):
        load_named_adapter(attention, "fr", tmp_path)


@pytest.mark.parametrize("name", ["type", "keys", "forward", "training"])
def test_names_that_torch_has_taken(name, tmp_path):
    net = model()
    with pytest.raises(
        ValueError, match=f"must not be an attribute of nn.ModuleDict, got '{name}'"
    ):
        add_adapter(net, name, 2, 1.0)
    save_named_adapter(net, "fr", tmp_path)
    with pytest.raises(ValueError, match="must not be an attribute"):
        load_named_adapter(net, name, tmp_path)


def test_an_interrupt_leaves_no_layer_with_half_of_an_adapter(tmp_path, monkeypatch):
    net = model()
    save_named_adapter(net, "fr", tmp_path)
    before, made = snapshot(net), []
    add = LinearWithAdapters.add_adapter

    def interrupted(layer, *args, **options):
        if made:
            raise KeyboardInterrupt
        made.append(layer)
        return add(layer, *args, **options)

    monkeypatch.setattr(LinearWithAdapters, "add_adapter", interrupted)
    for change in (
        lambda: add_adapter(net, "new", 2, 1.0),
        lambda: load_named_adapter(net, "new", tmp_path),
    ):
        made.clear()
        with pytest.raises(KeyboardInterrupt):
            change()
        assert made and unchanged(net, before)


def test_names_from_an_iterator_and_odd_arguments():
    net = model()
    select_adapters(net, (name for name in ["de", BASE, "fr", "de"]))
    torch.testing.assert_close(net(X), outputs(model(), ["de", BASE, "fr", "de"]))
    with pytest.raises(
        TypeError, match="adapters must be a name, names, a Tensor or None, got int"
    ):
        select_adapters(net, 3)
    with pytest.raises(ValueError, match=r"x must be \[S, ..., K\].*got \[8\]"):
        net.first(torch.randn(8), torch.zeros(8, dtype=torch.long))


def test_the_last_adapter_of_a_layer_that_is_compiled_by_itself_stays():
    net = nn.Sequential(nn.Linear(6, 4))
    add_adapter(net, "fr", rank=2, alpha=1.0)
    select_adapters(net, "fr")
    net[0] = torch.compile(net[0], backend="eager")
    x = torch.randn(3, 6)
    before = net(x)
    with pytest.raises(ValueError, match="must keep an adapter while it is compiled by itself"):
        remove_adapter(net, "fr")
    assert torch.equal(net(x), before)
