"""Adapter files: the round trip, PEFT's layout in both directions, and files that must be refused whole."""

from __future__ import annotations

import copy
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrize

from lora_kernels import (
    LinearWithLoRA,
    adapters,
    load_adapter,
    lora_state_dict,
    merge_lora,
    reference,
    replace_linear_with_lora,
    save_adapter,
)
from lora_kernels.adapter_file import CONFIG_FILE, WEIGHTS_FILE
from lora_kernels.modules import lora_layers
from tests.oracle import assert_bits
from tests.test_modules import CHECKPOINT_WRAPPER, Block, Doubled

ROOT = Path(__file__).parent.parent


def fill_adapters(model):
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora.B, std=0.3)


def block(fill=True, **options):
    torch.manual_seed(3)
    model = Block()
    replace_linear_with_lora(model, **{"rank": 4, "alpha": 2.0, **options})
    if fill:
        fill_adapters(model)
    return model


def snapshot(model):
    """(classes and settings, the tensors themselves): a state dict would hide what is merged."""
    settings = {
        name: (type(m), *(getattr(m, setting, None) for setting in ("alpha", "merged")))
        for name, m in model.named_modules()
    }
    tensors = (*model.named_parameters(), *model.named_buffers())
    return settings, {key: value.detach().clone() for key, value in tensors}


def unchanged(model, before):
    settings, state = snapshot(model)
    same = settings == before[0] and list(state) == list(before[1])
    return same and all(torch.equal(state[key], before[1][key]) for key in state)


def each_wrapped(model):
    """Activation checkpointing around a layer, around a block that has layers, and around all."""
    wrap = pytest.importorskip(CHECKPOINT_WRAPPER).checkpoint_wrapper
    for name in ("mlp.0", "mlp"):
        model.set_submodule(name, wrap(model.get_submodule(name)))
    return wrap(model)


def block_compiled(model):
    model.mlp = torch.compile(model.mlp, backend="eager")
    return model


WRAPPED = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "a compiled block": block_compiled,
    "data parallel": nn.DataParallel,
    "averaged": torch.optim.swa_utils.AveragedModel,
    "checkpointed": each_wrapped,
    "twice": lambda model: nn.DataParallel(torch.compile(each_wrapped(model), backend="eager")),
}


@pytest.fixture
def folder(tmp_path):
    return save_adapter(block(), tmp_path / "adapter")


def assert_refused(model, folder, error, rule):
    """Loading fails with these words, which are returned, and the model is as it was."""
    before = snapshot(model)
    with pytest.raises(error, match=rule) as caught:
        load_adapter(model, folder)
    assert unchanged(model, before)
    return str(caught.value)


class TestRoundTrip:
    @pytest.mark.parametrize("scaling", ["alpha", "alpha/rank", "alpha/sqrt(rank)"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_into_a_model_with_layers(self, tmp_path, scaling, dtype):
        model = block(scaling=scaling).to(dtype)
        other = block(fill=False, scaling=scaling).to(dtype)
        load_adapter(other, save_adapter(model, tmp_path))
        x = torch.randn(6, 12, dtype=dtype)
        assert torch.equal(other(x), model(x))
        assert all(layer.lora.alpha == 2.0 for _, layer in lora_layers(other))

    def test_into_a_fresh_model(self, folder):
        torch.manual_seed(3)
        fresh = Block()
        assert load_adapter(fresh, folder) == ["head", "mlp.0", "mlp.2", "q_proj"]
        x = torch.randn(6, 12)
        torch.testing.assert_close(fresh(x), block()(x))
        assert all(layer.lora.scale == 2.0 for _, layer in lora_layers(fresh))

    def test_task_after_task_over_one_base(self, tmp_path):
        tasks = []
        for task in range(2):
            model = block()
            for _, layer in lora_layers(model):
                nn.init.normal_(layer.lora.A, std=0.1 + task)
                layer.lora.alpha = 1.0 + task
            tasks.append((save_adapter(model, tmp_path / str(task)), model))
        model, x = block(), torch.randn(6, 12)
        for path, original in (*tasks, tasks[0]):
            load_adapter(model, path)
            assert torch.equal(model(x), original(x))

    def test_different_ranks_and_alphas(self, tmp_path):
        model = Block()
        replace_linear_with_lora(model, 2, 1.0, target_modules=["q_proj"])
        replace_linear_with_lora(model, 5, 3.0, target_modules=["0", "2"], scaling="alpha/rank")
        fill_adapters(model)
        fresh = Block()
        fresh.load_state_dict(
            {k.replace(".linear", ""): v for k, v in model.state_dict().items() if "lora" not in k}
        )
        load_adapter(fresh, save_adapter(model, tmp_path))
        ranks = {name: (layer.lora.rank, layer.lora.scale) for name, layer in lora_layers(fresh)}
        assert ranks == {"q_proj": (2, 1.0), "mlp.0": (5, 0.6), "mlp.2": (5, 0.6)}
        x = torch.randn(6, 12)
        torch.testing.assert_close(fresh(x), model(x))

    def test_new_layers_have_the_mode_of_those_they_replace(self, tmp_path):
        save_adapter(block(dropout=0.5), tmp_path)
        model = Block().eval()
        model.mlp.train()
        load_adapter(model, tmp_path)
        modes = {name: layer.lora.training for name, layer in lora_layers(model)}
        assert modes == {"q_proj": False, "mlp.0": True, "mlp.2": True, "head": False}
        assert all(layer.linear.training == modes[name] for name, layer in lora_layers(model))

    @pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("side", ["lora_A", "lora_B", "lora_"])
    def test_a_fresh_model_keeps_every_bit_of_the_file(self, tmp_path, base, stored, side):
        """On a half base the adapters are float32 unless the file has the base's own dtype."""
        save_adapter(block().to(base), tmp_path)

        def one_side(tensors):
            tensors.update({k: v.to(stored) for k, v in tensors.items() if side in k})

        edit_weights(one_side)(tmp_path)
        tensors = load_file(tmp_path / WEIGHTS_FILE)
        model = Block().to(base)
        load_adapter(model, tmp_path)
        assert model.head.lora.A.dtype == (base if stored == base else torch.float32)
        for name, layer in lora_layers(model):
            for key, value in (("lora_A", layer.lora.A), ("lora_B", layer.lora.B)):
                saved = tensors[f"base_model.model.{name}.{key}.weight"]
                assert torch.equal(value.double(), saved.double().t())

    @pytest.mark.parametrize("alpha", [16, 16.01, 1 / 3, -2.5, 1e-8])
    @pytest.mark.parametrize("scaling", ["alpha", "alpha/rank", "alpha/sqrt(rank)"])
    def test_any_alpha(self, tmp_path, alpha, scaling):
        save_adapter(block(alpha=alpha, scaling=scaling, rank=3), tmp_path)
        same = block(fill=False, scaling=scaling, rank=3)
        for model in (same, Block()):
            load_adapter(model, tmp_path)
            scale = block(alpha=alpha, scaling=scaling, rank=3).head.lora.scale
            assert model.head.lora.scale == pytest.approx(scale, rel=1e-13)
            assert model.head.lora.scale_tensor.item() == pytest.approx(scale, rel=1e-7)
        assert same.head.lora.alpha == pytest.approx(alpha, rel=1e-13)

    def test_a_linear_in_two_places(self, tmp_path):
        def tied():
            torch.manual_seed(3)
            layers = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6)), nn.ReLU())
            layers[1].append(layers[0])
            return layers

        model = tied()
        replace_linear_with_lora(model, 2, 3.0)
        fill_adapters(model)
        other = tied()
        assert load_adapter(other, save_adapter(model, tmp_path)) == ["0", "1.0"]
        assert other[0] is other[1][1]
        x = torch.randn(3, 6)
        assert torch.equal(other(x), model(x))

        edit_weights(renamed("model.0.", "model.1.1."))(tmp_path)
        for again in (tied(), other):  # by its second name, into a Linear and into a layer
            for _, layer in lora_layers(again):
                nn.init.zeros_(layer.lora.B)
            assert sorted(load_adapter(again, tmp_path)) == ["1.0", "1.1"]
            assert again[0] is again[1][1] and torch.equal(again(x), model(x))

        edit_weights(renamed("model.1.1.", "model.0.", keep=True))(tmp_path)
        words = r"layers '\S+' and '\S+' must not be one module"
        assert_refused(other, tmp_path, ValueError, words)

    def test_a_layer_of_torchs_transformer_in_inference(self, tmp_path):
        """Its fast path, which reads the weights past the adapters, is left."""

        def encoder():
            torch.manual_seed(3)
            return nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)]).eval()

        model = encoder()
        replace_linear_with_lora(model, 2, 3.0, target_modules=["linear1", "linear2"])
        model.eval()
        fill_adapters(model)
        other = encoder()
        load_adapter(other, save_adapter(model, tmp_path))
        x = torch.randn(2, 3, 8)
        with torch.no_grad():
            assert torch.equal(other[0](x), model[0](x))
            assert not torch.allclose(other[0](x), encoder()[0](x))

    def test_different_dropouts(self, tmp_path):
        """PEFT has one for all layers: the commonest is saved, and the others are named."""
        model = block(dropout=0.25)
        model.q_proj.lora.dropout = 0.5  # the first
        with pytest.warns(
            UserWarning, match=r"0.25 is saved, the layers have \[0.25, 0.5\]"
        ) as caught:
            save_adapter(model, tmp_path)
        assert caught[0].filename == __file__
        fresh = Block()
        load_adapter(fresh, tmp_path)
        assert all(layer.lora.dropout == 0.25 for _, layer in lora_layers(fresh))

    def test_a_merged_model_saves_its_adapter(self, tmp_path):
        model = block()
        before = lora_state_dict(model)
        merge_lora(model)
        other = block(fill=False)
        load_adapter(other, save_adapter(model, tmp_path))
        assert_bits(lora_state_dict(other), before)

    def test_the_file_holds_the_adapter_and_nothing_else(self, folder):
        tensors = load_file(folder / WEIGHTS_FILE)
        assert len(tensors) == 8
        assert json.loads((folder / CONFIG_FILE).read_text())["fan_in_fan_out"] is False
        assert tensors["base_model.model.mlp.0.lora_A.weight"].shape == (4, 12)
        assert tensors["base_model.model.mlp.0.lora_B.weight"].shape == (20, 4)
        assert sorted(os.listdir(folder)) == [CONFIG_FILE, WEIGHTS_FILE]


class TestWrapped:
    """Models in torch's wrappers, whose names are in no file."""

    @pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
    def test_files_are_those_of_the_model_itself(self, folder, tmp_path, wrap):
        model, x = block(), torch.randn(6, 12)
        names = [name for name, _ in lora_layers(model)]
        other = save_adapter(wrap(model), tmp_path / "other")
        assert (other / CONFIG_FILE).read_text() == (folder / CONFIG_FILE).read_text()
        tensors = load_file(folder / WEIGHTS_FILE)
        torch.testing.assert_close(load_file(other / WEIGHTS_FILE), tensors, rtol=0, atol=0)
        torch.manual_seed(3)
        for fresh in (Block(), block(fill=False)):
            wrapped = wrap(fresh)
            assert sorted(load_adapter(wrapped, folder)) == sorted(names)
            torch.testing.assert_close(wrapped(x), block()(x))

    def test_a_name_that_no_wrapper_gave_stays(self, tmp_path):
        parts = {"module": nn.Linear(4, 4), "_orig_mod": nn.Linear(4, 4)}
        model = nn.ModuleDict({"module": nn.ModuleDict(parts)})
        names = replace_linear_with_lora(model, 2, 1.0)
        assert set(load_adapter(model, save_adapter(model, tmp_path))) == set(names)
        assert names == ["module.module", "module._orig_mod"]

    def test_a_file_with_the_names_of_a_wrapped_model(self, tmp_path):
        """As they were once written."""
        model = nn.ModuleDict({"_orig_mod": block()})
        wrapped = torch.compile(Block(), backend="eager")
        names = [name for name, _ in lora_layers(model)]
        assert sorted(load_adapter(wrapped, save_adapter(model, tmp_path))) == sorted(names)

    def test_a_linear_that_is_compiled_by_itself(self, folder):
        """It is called past its place; its layer of ours may be compiled."""
        model = Block()
        model.q_proj = torch.compile(model.q_proj, backend="eager")
        assert_refused(
            model, folder, ValueError, "q_proj must have its adapter before it is compiled"
        )
        model = block(fill=False)
        model.q_proj = torch.compile(model.q_proj, backend="eager")
        load_adapter(model, folder)
        x = torch.randn(6, 12)
        torch.testing.assert_close(model(x), block()(x))

    def test_the_layer_itself(self, tmp_path):
        for wrap in (nn.DataParallel, torch.compile):
            with pytest.raises(ValueError, match="must contain named layers to save"):
                save_adapter(wrap(LinearWithLoRA(nn.Linear(4, 4), 2, 1.0)), tmp_path / "none")
        assert not (tmp_path / "none").exists()


class TestPeft:
    @pytest.mark.parametrize("rslora", [False, True])
    def test_peft_reads_ours(self, tmp_path, rslora):
        model = block(scaling="alpha/sqrt(rank)" if rslora else "alpha", alpha=2.5)
        save_adapter(model, tmp_path)
        torch.manual_seed(3)
        theirs = peft.PeftModel.from_pretrained(Block(), tmp_path)
        x = torch.randn(6, 12)
        torch.testing.assert_close(theirs(x), model(x))

    @pytest.mark.parametrize("rslora", [False, True])
    def test_we_read_pefts(self, tmp_path, rslora):
        torch.manual_seed(3)
        config = peft.LoraConfig(
            r=4,
            lora_alpha=6,
            use_rslora=rslora,
            target_modules=["q_proj", "0", "2"],
            init_lora_weights=False,
            rank_pattern={"mlp.2": 3},
            alpha_pattern={"mlp.2": 9},
        )
        theirs = peft.get_peft_model(Block(), config)
        theirs.save_pretrained(tmp_path)
        torch.manual_seed(3)
        ours = Block()
        load_adapter(ours, tmp_path)
        x = torch.randn(6, 12)
        torch.testing.assert_close(ours(x), theirs(x))
        assert dict(lora_layers(ours))["mlp.2"].lora.rank == 3

    def test_there_and_back_is_the_same_bits(self, tmp_path):
        model = block(scaling="alpha/rank")
        save_adapter(model, tmp_path / "a")
        torch.manual_seed(3)
        peft.PeftModel.from_pretrained(Block(), tmp_path / "a").save_pretrained(tmp_path / "b")
        other = block(fill=False, scaling="alpha/rank")
        load_adapter(other, tmp_path / "b")
        assert_bits(lora_state_dict(other), lora_state_dict(model))


class Named(nn.ModuleDict):
    """One Linear for each path, whose names are parts of each other or no regular expressions; the sum of all."""

    PATHS = ("proj", "a.proj", "b.proj", "0", "1.0", "10", "a+b", "c(d", "line\nbreak")

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        for path in self.PATHS:
            parent, _, key = path.rpartition(".")
            if parent and parent not in self:
                self[parent] = nn.ModuleDict()
            (self[parent] if parent else self)[key] = nn.Linear(6, 6)

    def forward(self, x):
        return sum(self.get_submodule(path)(x) for path in self.PATHS)


class TestNames:
    @pytest.mark.parametrize("other", Named.PATHS)
    def test_one_layer_that_differs(self, tmp_path, other):
        """Its rank and alpha stay its own, for us and for PEFT."""
        model = Named()
        replace_linear_with_lora(model, 2, 3.0, target_modules=re.escape(other))
        replace_linear_with_lora(model, 4, 8.0)
        fill_adapters(model)
        save_adapter(model, tmp_path)
        ours = Named()
        load_adapter(ours, tmp_path)
        scales = {name: (layer.lora.rank, layer.lora.scale) for name, layer in lora_layers(ours)}
        assert scales == {path: (2, 3.0) if path == other else (4, 8.0) for path in Named.PATHS}
        theirs = peft.PeftModel.from_pretrained(Named(), tmp_path)
        x = torch.randn(3, 6)
        torch.testing.assert_close(ours(x), model(x))
        torch.testing.assert_close(theirs(x), model(x))

    @pytest.mark.parametrize("only", Named.PATHS)
    def test_one_layer_that_has_an_adapter(self, tmp_path, only):
        """PEFT makes no layer for another whose name ends alike."""
        model = Named()
        replace_linear_with_lora(model, 2, 3.0, target_modules=re.escape(only))
        save_adapter(model, tmp_path)
        theirs = peft.PeftModel.from_pretrained(Named(), tmp_path)
        wrapped = [name for name, module in theirs.named_modules() if hasattr(module, "lora_A")]
        assert wrapped == [f"base_model.model.{only}"]

    @pytest.mark.parametrize(
        "patterns, wanted",
        [
            ({"proj": 1}, {"proj": 1, "a.proj": 1, "b.proj": 1}),
            ({"a.proj": 1, "proj": 2}, {"proj": 2, "a.proj": 1, "b.proj": 2}),
            ({"^proj": 1}, {"proj": 1}),
            ({"[ab].proj": 1, "a+b": 2}, {"a.proj": 1, "b.proj": 1, "a+b": 2}),
            ({"0|proj": 1, "1.0": 2}, {p: 1 for p in Named.PATHS if p[-1] in "0j" and p != "10"}),
            ({"1": 1}, {}),
            ({"pro": 1, "roj": 2, "0": 3}, {"0": 3, "1.0": 3}),
        ],
    )
    def test_patterns_as_peft_reads_them(self, tmp_path, patterns, wanted):
        """Plain names, which older files have, match the ends of others; a name that is none of its own matches too."""
        config = peft.LoraConfig(
            r=4, lora_alpha=4, target_modules=list(Named.PATHS), alpha_pattern=patterns
        )
        theirs = peft.get_peft_model(Named(), config)
        theirs.save_pretrained(tmp_path)
        ours = Named()
        load_adapter(ours, tmp_path)
        for name, layer in lora_layers(ours):
            assert layer.lora.alpha == wanted.get(name, 4)
            their_layer = theirs.get_submodule(f"base_model.model.{name}")
            assert layer.lora.scale == their_layer.scaling["default"]


def edit_config(**changes):
    def edit(folder):
        file = folder / CONFIG_FILE
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return edit


def edit_weights(change, **metadata):
    def edit(folder):
        tensors = load_file(folder / WEIGHTS_FILE)
        change(tensors)
        save_file({key: t.clone() for key, t in tensors.items()}, folder / WEIGHTS_FILE, metadata)

    return edit


def renamed(old, new, keep=False):
    """A change of weights: the tensors with `old` in their keys have `new` there, too or instead."""

    def change(tensors):
        for key in [key for key in tensors if old in key]:
            tensors[key.replace(old, new)] = tensors[key] if keep else tensors.pop(key)

    return change


def truncate(folder):
    data = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(data[: len(data) // 2])


KEY = "base_model.model.mlp.0.lora_A.weight"


@pytest.mark.parametrize(
    "message, error, damage",
    [
        ("must exist", FileNotFoundError, lambda folder: (folder / CONFIG_FILE).unlink()),
        (f"{WEIGHTS_FILE} must exist", FileNotFoundError, lambda folder: (folder / WEIGHTS_FILE).unlink()),
        ("must be JSON", ValueError, lambda folder: (folder / CONFIG_FILE).write_text("{")),
        ('"peft_type": "LORA"', ValueError, edit_config(peft_type="IA3")),
        ("must be a safetensors file", ValueError, truncate),
        ("must come from one save", ValueError, edit_config(lora_alpha=1234)),
        ("every tensor must be a LoRA A or B", ValueError,
         edit_weights(lambda t: t.update({"base_model.model.head.weight": torch.ones(2)}))),
        ("must have both A and B", ValueError, edit_weights(lambda t: t.pop(KEY))),
        ("must have rank 4 as its configuration says", ValueError,
         edit_weights(lambda t: t.update({KEY: torch.ones(3, 12)}))),
        ("must be a Linear of the model, which has no module", ValueError,
         edit_weights(renamed("mlp.0", "mlp.7", keep=True))),
        ("must be a Linear of the model, which has a LayerNorm", ValueError,
         edit_weights(renamed("mlp.0", "norm", keep=True))),
        ("must hold every LoRA layer of the model", ValueError,
         edit_weights(lambda t: [t.pop(k) for k in list(t) if "mlp.0" in k])),
        ("must have A [12, 4] and B [4, 20], got [13, 4]", ValueError,
         edit_weights(lambda t: t.update({KEY: torch.ones(4, 13)}))),
    ],
)  # fmt: skip
def test_a_damaged_or_foreign_file_changes_nothing(folder, message, error, damage):
    damage(folder)
    assert_refused(block(), folder, error, re.escape(message))


def no_rank(value):
    return edit_config(r=value), CONFIG_FILE, "r must be a positive integer"


def a_tensor(tensor):
    damage = edit_weights(lambda t: t.update({KEY: tensor}))
    return damage, WEIGHTS_FILE, f"must be a matrix of one of .* of {tensor.dtype}"


BAD_VALUES = [
    *map(no_rank, (2.7, 4.0, 0, -4, True, None, "x", [4])),
    *(
        (edit_config(lora_alpha=value), CONFIG_FILE, "lora_alpha must be a number within float32")
        for value in (None, "x", True, float("nan"), float("inf"), 10**400, 1e39)
    ),
    *(
        (edit_config(lora_dropout=value), CONFIG_FILE, r"lora_dropout must be a number in \[0, 1\)")
        for value in (None, "x", False, 1.0, -0.1, float("nan"))
    ),
    *(
        (edit_config(**{field: value}), CONFIG_FILE, f"{field} must be true or false")
        for field in ("use_rslora", "use_dora")
        for value in ("false", 0, None)
    ),
    (edit_config(rank_pattern=[4]), CONFIG_FILE, r"rank_pattern must be an object, got \[4\]"),
    (edit_config(alpha_pattern="x"), CONFIG_FILE, "alpha_pattern must be an object, got 'x'"),
    (edit_config(rank_pattern={"c(d": 4}), CONFIG_FILE, "must have regular expressions as keys"),
    (edit_config(rank_pattern={"a{9999999999}": 4}), CONFIG_FILE, "regular expressions as keys"),
    (edit_config(rank_pattern={"no": 2.5}), CONFIG_FILE, r"\['no'\] must be a positive integer"),
    *(
        (
            edit_config(**{field: {pattern: 4}}),
            CONFIG_FILE,
            f"{field} must have patterns .* 50000 ways",
        )
        for field in ("rank_pattern", "alpha_pattern")
        for pattern in (
            *("(a+)+$", "(?:a*)*", "(a|b|ab){2,}c", "(?x:( a + ) +)", "((((a)))+)", "(.|.)" * 30),
            *(".*" * 4, "a?" * 30 + "b", r"\d+\d+\d+\d+", "[^!]{1,}" * 4, "[]]+[^]]+[\\]]+.+"),
        )
    ),
    (edit_config(alpha_pattern={"head": None}), CONFIG_FILE, r"\['head'\] must be a number"),
    *map(
        a_tensor,
        (
            *(torch.ones(4, 12).to(t) for t in (torch.int64, torch.bool, torch.complex64)),
            torch.ones(4, 12).to(torch.float8_e4m3fn),
            *(torch.ones(shape) for shape in ((), (12,), (4, 12, 1))),
        ),
    ),
    (
        edit_weights(lambda t: t.update({KEY.removeprefix("base_model.model."): t[KEY]})),
        WEIGHTS_FILE,
        "layer 'mlp.0' must be there once",
    ),
    (edit_weights(lambda t: None, adapter_config="{"), WEIGHTS_FILE, "configuration must be JSON"),
    *(
        (lambda folder, text=text: (folder / CONFIG_FILE).write_bytes(text), CONFIG_FILE, "be JSON")
        for text in (b"", b"\xff\xfe{", b"[" * 100_000)
    ),
]


@pytest.mark.parametrize("damage, file, rule", BAD_VALUES)
def test_a_value_that_cannot_be(folder, damage, file, rule):
    edit_weights(lambda t: None)(folder)  # without the copy of the configuration
    damage(folder)
    assert file in assert_refused(Block(), folder, ValueError, rule)


def save_pefts(folder, changes=(), **options):
    """An adapter that PEFT saved, with changes of its configuration; the model that it is of."""
    options = {"r": 4, "target_modules": ["head"], "init_lora_weights": False, **options}
    theirs = peft.get_peft_model(Block(), peft.LoraConfig(**options))
    theirs.save_pretrained(folder)
    edit_config(**dict(changes))(folder)
    return theirs


def test_absent_fields_are_pefts_defaults(tmp_path):
    theirs = save_pefts(tmp_path)
    file = tmp_path / CONFIG_FILE
    config = json.loads(file.read_text())
    file.write_text(json.dumps({key: config[key] for key in ("peft_type", "r")}))
    ours = Block()
    load_adapter(ours, tmp_path)
    assert ours.head.lora.scale == theirs.base_model.model.head.scaling["default"]


@pytest.mark.parametrize("value", [True, False])
def test_how_the_base_stores_its_weight_is_seen_and_not_read(tmp_path, value):
    """PEFT asks the layer too, and only warns where the file says otherwise."""
    save_pefts(tmp_path, {"fan_in_fan_out": value})
    base = Block()
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    load_adapter(base, tmp_path)
    x = torch.randn(6, 12)
    torch.testing.assert_close(base(x), theirs(x))


@pytest.mark.parametrize("field, value", [("lora_bias", True), ("bias", "all")])
def test_variants_that_these_layers_do_not_compute(tmp_path, field, value):
    save_pefts(tmp_path, **{field: value})
    assert_refused(Block(), tmp_path, ValueError, field)


@pytest.mark.parametrize(
    "field, value",
    [
        ("alora_invocation_tokens", [1, 2]),
        ("layer_replication", [[0, 1], [0, 1]]),
        ("use_bdlora", {"nblocks": 2}),
        ("arrow_config", {"top_k": 1}),
        ("kasa_config", {"beta": 0.1}),
        ("monteclora_config", {"use_entropy": True}),
    ],
)
def test_variants_that_only_the_configuration_tells(tmp_path, field, value):
    """The tensors alone would load, and compute something else."""
    save_pefts(tmp_path, {field: value})
    assert_refused(Block(), tmp_path, ValueError, field)


@pytest.mark.parametrize(
    "init",
    [
        *(True, False, None, "gaussian", "orthogonal", "eva", "mica", "lora_ga"),
        *("pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq", "another"),
    ],
)
def test_initial_values_that_change_the_base(tmp_path, init):
    """What PEFT itself refuses or loads into a changed base is refused; the others give PEFT's result."""
    save_pefts(tmp_path, {"init_lora_weights": init})
    base = Block()
    ours, theirs = copy.deepcopy(base), copy.deepcopy(base)
    if init in ("mica", "lora_ga") and not hasattr(LoraLayer, f"{init}_init"):
        pytest.skip(f"PEFT {peft.__version__} has no {init}")
    try:
        theirs = peft.PeftModel.from_pretrained(theirs, tmp_path)
        plain = torch.equal(theirs.base_model.model.head.base_layer.weight, base.head.weight)
    except (ValueError, ImportError):
        plain = False
    if not plain:
        with pytest.raises(ValueError, match="init_lora_weights must be one of"):
            load_adapter(ours, tmp_path)
        return
    load_adapter(ours, tmp_path)
    x = torch.randn(6, 12)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize(
    "pattern",
    [
        *(r"mlp\.\d", r"mlp\.(0|2)", ".*mlp.*", r"(.*\.)?mlp\.[02]{1}", r"mlp\.[(+*)|02]"),
        *(
            r"(?:mlp)\.[^]1]",
            r"mlp\.0)|(mlp\.2",
            "|".join([*(f"x{n}" for n in range(1, 2000)), r"^mlp\.[0-9]+$"]),
        ),
    ],
)
def test_patterns_that_are_read(tmp_path, pattern):
    """Those of everyday are far within the limit, and mean what they mean to PEFT."""
    save_pefts(tmp_path, target_modules=["q_proj", "0", "2"], rank_pattern={pattern: 3})
    ours = Block()
    load_adapter(ours, tmp_path)
    ranks = {name: layer.lora.rank for name, layer in lora_layers(ours)}
    assert ranks == {"q_proj": 4, "mlp.0": 3, "mlp.2": 3}


@pytest.mark.parametrize("into", ["layers", "linears"])
def test_a_model_without_values(folder, into):
    """On the meta device there is nothing to copy into."""
    with torch.device("meta"):
        model = block(fill=False) if into == "layers" else Block()
    before = snapshot(model)[0]
    with pytest.raises(ValueError, match=r"layer 'head' must have values .* on the meta device"):
        load_adapter(model, folder)
    assert snapshot(model)[0] == before


def test_saving_a_model_without_values(tmp_path):
    with torch.device("meta"):
        model = block(fill=False)
    with pytest.raises(ValueError, match="layer 'q_proj' must have values to save"):
        save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_parametrized_adapter_is_saved_as_it_computes_and_not_loaded_into(folder, tmp_path):
    model = block()
    parametrize.register_parametrization(model.mlp[2].lora, "B", Doubled())
    assert_refused(model, folder, ValueError, r"'mlp\.2' must have a plain parameter B")
    fresh = block(fill=False)
    load_adapter(fresh, save_adapter(model, tmp_path))
    assert torch.equal(fresh.mlp[2].lora.B, model.mlp[2].lora.B)


def test_an_alpha_past_float32_in_the_models_scaling(tmp_path):
    """The file's alpha is 3e38 and its rank 4, scaled by the root; the model divides by the rank."""
    save_adapter(block(alpha=3e38, scaling="alpha/sqrt(rank)"), tmp_path)
    words = "layer 'head' must have an alpha within float32 where"
    assert_refused(block(alpha=7.0, scaling="alpha/rank"), tmp_path, ValueError, words)


def test_an_alpha_past_float32_in_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"layer 'q_proj' must have an alpha within float32"):
        save_adapter(block(alpha=3e38, scaling="alpha"), tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("wrapped", [[], ["q_proj"], [".*"]], ids=len)
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_a_load_that_fails_in_the_middle(folder, monkeypatch, error, wrapped):
    """Of four layers the third cannot be filled, be it the model's own or one to be put in."""
    torch.manual_seed(8)
    model = Block()
    for target in wrapped:
        replace_linear_with_lora(model, 4, 5.0, target_modules=target)
    fill_adapters(model)
    fill, calls = adapters.fill, []

    def fails_at_the_third(lora, A, B, *rest):
        calls.append(lora)
        if len(calls) == 3:
            fill(lora, A, torch.zeros_like(B), None, 1.0)
            raise error
        fill(lora, A, B, *rest)

    monkeypatch.setattr(adapters, "fill", fails_at_the_third)
    assert_refused(model, folder, error, None)


def test_a_layer_that_cannot_be_written(folder):
    """Its A is one row expanded; the layers before it are as they were, in values and in alpha."""
    model = block(alpha=5.0)
    model.q_proj.lora.A = nn.Parameter(torch.randn(1, 4).expand(12, 4))  # the file's last layer
    assert_refused(model, folder, RuntimeError, "single memory location")


@pytest.mark.parametrize("name", ["mlp.0.linear", "mlp.0"])
def test_the_books_own_wrapper_is_not_loaded_into(folder, name):
    model = block(fill=False)
    model.mlp[0] = reference.LinearWithLoRA(nn.Linear(12, 20), 4, 1.0)
    edit_weights(renamed("mlp.0", name))(folder)
    words = f"layer '{name}' must be (a Linear|called as a module)"
    assert_refused(model, folder, ValueError, words)


@pytest.mark.parametrize("call", [load_adapter, save_adapter])
def test_wrong_arguments(call, folder):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got NoneType"):
        call(None, folder)
    with pytest.raises(TypeError, match=r"path must be a string or os\.PathLike, got NoneType"):
        call(block(), None)


def test_layers_that_share_an_adapter_are_saved(tmp_path):
    model = nn.Sequential(*(LinearWithLoRA(nn.Linear(4, 4), 1, 1.0) for _ in range(2)))
    model[1].lora = model[0].lora
    nn.init.normal_(model[0].lora.B)
    fresh = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    load_adapter(fresh, save_adapter(model, tmp_path))
    assert torch.equal(fresh[0].lora.B, model[0].lora.B)
    assert torch.equal(fresh[1].lora.B, model[0].lora.B)


def test_a_layer_of_another_rank(folder):
    assert_refused(block(rank=3), folder, ValueError, r"must have A \[12, 3\]")


def test_a_layer_that_is_never_called(folder):
    """nn.MultiheadAttention reads out_proj's weight: an adapter there would do nothing."""
    model = block(fill=False)
    model.attention = nn.MultiheadAttention(12, 2)
    edit_weights(renamed("q_proj", "attention.out_proj", keep=True))(folder)
    words = "must be called as a module, but MultiheadAttention"
    assert_refused(model, folder, ValueError, words)


def test_a_merged_model_is_refused(folder):
    model = block()
    merge_lora(model)
    assert_refused(model, folder, ValueError, "must not be merged")


def test_saving_without_layers():
    with pytest.raises(ValueError, match="must contain a LinearWithLoRA"):
        save_adapter(Block(), "never")
    assert not os.path.exists("never")


def test_an_interrupted_save_leaves_the_old_adapter(folder, monkeypatch):
    """The weights cannot be written: the folder is as before and holds no scraps."""
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}

    def full_disk(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr("lora_kernels.adapter_file.save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_adapter(block(alpha=9.0), folder)
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == before


def test_a_save_that_stops_between_its_two_files_is_noticed(folder, monkeypatch):
    replace = os.replace

    def stop_at_the_config(source, target):
        if str(target).endswith(CONFIG_FILE):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", stop_at_the_config)
    with pytest.raises(KeyboardInterrupt):
        save_adapter(block(alpha=9.0), folder)
    monkeypatch.undo()
    assert_refused(block(), folder, ValueError, "must come from one save")


def test_two_saves_at_once(tmp_path, monkeypatch):
    """The second starts when the first has put one of its files in place, and waits."""
    replace, others = os.replace, []

    def start_another(source, target):
        replace(source, target)
        if not others:
            others.append(threading.Thread(target=save_adapter, args=(block(alpha=9.0), tmp_path)))
            others[0].start()
            others[0].join(timeout=1.0)
            assert others[0].is_alive()

    monkeypatch.setattr(os, "replace", start_another)
    save_adapter(block(alpha=5.0), tmp_path)
    others[0].join()
    model = block(alpha=2.0)
    load_adapter(model, tmp_path)
    assert model.head.lora.alpha == 9.0
    assert sorted(os.listdir(tmp_path)) == [CONFIG_FILE, WEIGHTS_FILE]


@pytest.mark.slow
def test_a_killed_save(folder):
    """It loads as before, and the next save removes what was left behind."""
    code = """
import os, pathlib, signal, sys
from lora_kernels import adapter_file, modules
from tests.test_modules import Block
model = Block()
modules.replace_linear_with_lora(model, 4, 2.0)
def killed(tensors, file, metadata):
    open(file, "wb").write(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
adapter_file.save_file = killed
layers = {name: layer.lora for name, layer in modules.lora_layers(model)}
adapter_file.write(pathlib.Path(sys.argv[1]), layers, fan_in_fan_out=False)
"""
    done = subprocess.run([sys.executable, "-c", code, str(folder)], cwd=ROOT, timeout=120)
    assert done.returncode == -signal.SIGKILL and len(os.listdir(folder)) == 3
    load_adapter(block(), folder)
    save_adapter(block(), folder)
    assert sorted(os.listdir(folder)) == [CONFIG_FILE, WEIGHTS_FILE]


def test_a_folder_that_cannot_be_locked(folder, monkeypatch):
    """A save works, and leaves alone what may be another save's."""

    def refuse(*_):
        raise OSError("no locks available")

    monkeypatch.setattr("lora_kernels.adapter_file.fcntl.flock", refuse)
    (folder / ".saving-other").mkdir()
    save_adapter(block(alpha=9.0), folder)
    assert sorted(os.listdir(folder)) == [".saving-other", CONFIG_FILE, WEIGHTS_FILE]
    model = block()
    load_adapter(model, folder)
    assert model.head.lora.alpha == 9.0


def test_a_root_that_is_a_layer(tmp_path):
    """It has no name to be filed under, which must be said and not saved as nothing."""
    with pytest.raises(ValueError, match="model must contain"):
        save_adapter(LinearWithLoRA(nn.Linear(4, 4), 2, 1.0), tmp_path / "root")
    assert not (tmp_path / "root").exists()
