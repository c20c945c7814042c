"""PEFT's LoRA layers over bitsandbytes' and Transformers' quantised layers, accelerated, against the same without."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn

from lora_kernels import bases
from lora_kernels.integrations.peft import accelerate, restore, why_not_fused
from tests.oracle import check_function, reference
from tests.test_quantized_layers import K, bnb, foreign, fp8_linear, linear4bit, linear8bit

KINDS = {
    "nf4": (lambda: linear4bit(), 4),
    "nf4-f32": (lambda: linear4bit(compute_dtype=torch.float32), 4),
    "nf4-bf16": (lambda: linear4bit(compute_dtype=torch.bfloat16), 4),
    "int8": (lambda: linear8bit(), 8),
}


def peft_over(linear, bits):
    """PEFT's model of a quantised layer and a ReLU."""
    net = nn.Sequential(linear, nn.ReLU())
    setattr(net, f"is_loaded_in_{bits}bit", True)
    torch.manual_seed(4)
    options = {"r": 4, "lora_alpha": 6, "init_lora_weights": False}
    return get_peft_model(net, LoraConfig(target_modules=["0"], **options))


def model(kind="nf4"):
    make, bits = KINDS[kind]
    return peft_over(make(), bits)


def rows(dtype=torch.float32):
    return torch.randn(3, 4, K, generator=torch.Generator().manual_seed(1)).to(dtype)


def run(net, x):
    """y and the gradients of x and of what is trained."""
    x = x.clone().requires_grad_()
    trained = [p for p in net.parameters() if p.requires_grad]
    y = net(x)
    return y.detach(), *torch.autograd.grad(y.float().square().sum(), (x, *trained))


@pytest.fixture
def pair(request):
    """A model, accelerated and as PEFT made it."""
    plain = model(getattr(request, "param", "nf4"))
    fused = copy.deepcopy(plain)
    assert len(accelerate(fused).fused) == 1
    return fused, plain


@pytest.mark.parametrize("mode", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_values_gradients_and_dtypes(kind, dtype, mode):
    plain = model(kind)
    fused = copy.deepcopy(plain)
    assert len(accelerate(fused).fused) == 1
    with torch.autocast("cpu", mode) if mode else nullcontext():
        ours, theirs = (run(net, rows(dtype)) for net in (fused, plain))
    # In half precision PEFT rounds both branches and their sum, the fused product rounds once.
    half = mode or dtype == torch.bfloat16 or kind == "nf4-bf16"
    for mine, right in zip(ours, theirs, strict=True):
        assert mine.dtype == right.dtype
        difference = (mine.double() - right.double()).norm() / right.double().norm()
        assert difference < (0.03 if half else 1e-5), difference


@pytest.mark.parametrize("pair", ["nf4", "int8"], indirect=True)
class TestState:
    """What PEFT does to such a layer after it was accelerated is what it does without."""

    def same(self, pair, exactly, **arguments):
        fused, plain = (net(rows(), **arguments) for net in pair)
        assert torch.equal(fused, plain) if exactly else torch.allclose(fused, plain, atol=1e-4)

    def other(self, pair):
        for net in pair:
            torch.manual_seed(9)
            more = LoraConfig(r=3, target_modules=["0"], init_lora_weights=False)
            net.add_adapter("other", more)

    def test_disable_and_enable(self, pair):
        fused, plain = pair
        with fused.disable_adapter(), plain.disable_adapter():
            self.same(pair, exactly=True)
        self.same(pair, exactly=False)

    def test_several_adapters(self, pair):
        self.other(pair)
        for net in pair:
            net.set_adapter("other")
        self.same(pair, exactly=False)
        assert not accelerate(pair[0]).left_alone
        for net in pair:
            net.base_model.set_adapter(["default", "other"])
        self.same(pair, exactly=True)

    def test_adapters_by_name(self, pair):
        self.other(pair)
        for net in pair:
            net.eval()
        with torch.no_grad():
            self.same(pair, exactly=True, adapter_names=["default", "other", "__base__"])

    def test_unload(self, pair):
        fused, plain = (net.unload() for net in pair)
        assert type(fused[0]) is type(plain[0]) is not nn.Linear
        self.same((fused, plain), exactly=True)

    @pytest.mark.filterwarnings("ignore:Merge lora module")
    def test_merge_and_unload(self, pair):
        self.same([net.merge_and_unload() for net in pair], exactly=True)

    @pytest.mark.filterwarnings("ignore:Merge lora module", "ignore:Unmerge lora module")
    def test_merge_and_unmerge(self, pair):
        for net in pair:
            net.merge_adapter()
        self.same(pair, exactly=True)
        for net in pair:
            net.unmerge_adapter()
        self.same(pair, exactly=False)

    def test_restore_copy_and_pickle(self, pair):
        fused, plain = pair
        before = fused(rows())
        layer = fused.base_model.model[0]
        assert type(layer).__name__.startswith("FusedLinear") and "Fused" not in repr(layer)
        for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert type(copied) is type(layer)
            assert torch.equal(copied(rows()).relu(), before)
        assert restore(fused) == ["base_model.model.0"]
        assert type(layer) is type(plain.base_model.model[0])
        self.same(pair, exactly=True)

    def test_compiled(self, pair):
        torch._dynamo.reset()
        calls = []

        def compiler(graph, _):
            calls.extend(n for n in graph.graph.nodes if "lora_linear_quantized" in str(n.target))
            return graph

        fused = pair[0].base_model.model
        compiled = torch.compile(fused, backend=compiler, fullgraph=True)
        torch.testing.assert_close(run(compiled, rows()), run(fused, rows()))
        assert len(calls) == 1


def test_a_whole_model_prepared_for_training():
    """Transformers' Llama, quantised as Transformers does it, its norms in float32, checkpointed."""
    transformers = pytest.importorskip("transformers")
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=4)
    base = transformers.LlamaForCausalLM(config).bfloat16()
    state = {k: v.clone() for k, v in base.state_dict().items()}
    quantised = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    # On the meta device first, as from_pretrained does.
    base = replace_with_bnb_linear(base, ["lm_head"], quantization_config=quantised)
    for name, module in base.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            values = state[f"{name}.weight"]
            options = {"quant_type": "nf4", "requires_grad": False, "module": module}
            module.weight = bnb.nn.Params4bit(values, **options).to("cpu")
    base.is_loaded_in_4bit = True
    plain = get_peft_model(
        prepare_model_for_kbit_training(base),
        LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
    )
    fused = copy.deepcopy(plain)
    assert len(accelerate(fused).fused) == 14
    tokens = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(6))
    found = []
    for net in (fused, plain):
        net.train()
        loss = net(input_ids=tokens, labels=tokens).loss
        loss.backward()
        grads = {name: p.grad for name, p in net.named_parameters() if p.requires_grad}
        assert len(grads) == 28
        found.append((loss.detach(), grads))
    (loss, ours), (expected, theirs) = found
    assert loss.dtype == expected.dtype and (loss - expected).abs() < 0.02 * expected
    for name, gradient in ours.items():
        assert gradient.dtype == theirs[name].dtype
        assert (gradient - theirs[name]).norm() < 0.1 * theirs[name].norm(), name


class TestLeftAlone:
    def test_a_reordered_weight_is_an_error_in_training(self, pair):
        """PEFT alone would train on, without the gradient of x."""
        fused, _ = pair
        base = fused.base_model.model[0].base_layer
        base.weight.quant_state.packing_format_for_cpu = True
        reasons = accelerate(fused, allow_none=True).left_alone.values()
        assert "packing_format_for_cpu: bitsandbytes reordered it" in str(reasons)
        with pytest.raises(RuntimeError, match="would compute no gradient of x"):
            fused(rows().requires_grad_())

    def test_other_kinds(self):
        net = peft_over(linear4bit(quant_type="fp4"), 4)
        with pytest.raises(ValueError, match=r"Linear4bit, cannot be read: .* 'nf4', got 'fp4'"):
            accelerate(net)

    def test_outliers(self):
        fused = peft_over(linear8bit(threshold=6.0), 8)
        plain = copy.deepcopy(fused)
        # bitsandbytes leaves them out in training on a CPU.
        assert len(accelerate(fused).fused) == 1
        for each in (fused, plain):
            each.eval()
        assert "threshold must be 0 where" in str(accelerate(fused, allow_none=True).left_alone)
        assert torch.equal(fused(rows()), plain(rows()))

    def test_a_layer_of_another_library(self):
        net = model()
        layer = net.base_model.model[0]
        layer._modules["base_layer"] = foreign("gptqmodel.nn_modules.qlinear.torch")()
        assert "its base layer cannot be read: a QuantLinear has GPTQ" in why_not_fused(layer)


def test_a_plain_lora_linear_over_fp8():
    """Whose own forward cannot run on a CPU: against the formula."""
    base = fp8_linear()
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    net = get_peft_model(nn.Sequential(base), config)
    assert len(accelerate(net).fused) == 1
    layer = net.base_model.model[0]
    A, B = (m["default"].weight for m in (layer.lora_A, layer.lora_B))
    weight, scale = bases.quantized_weight(base).dense(), layer.scaling["default"]

    def plain(x, A, B):
        return reference(x, weight.to(x.dtype), A.t(), B.t(), scale, base.bias.to(x.dtype))

    check_function(lambda x, *_: net(x), plain, (rows().requires_grad_(), A, B))
