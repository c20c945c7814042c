"""PEFT's `target_parameters` on Transformers' experts after `accelerate`: PEFT's own results, and what is left to PEFT."""

from __future__ import annotations

import copy
import importlib
import json
import pickle
from functools import partial
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_kernels.integrations.peft import FusedParamWrapper, accelerate, restore, why_not_fused
from tests.oracle import made_inside, named_gradients, saved_inside

SIZES = {"num_experts": 5, "hidden_size": 16, "intermediate_size": 12}
FAMILIES = {  # a class for each form of the contract
    "qwen3_moe": "Qwen3MoeExperts",
    "mixtral": "MixtralExperts",
    "gpt_oss": "GptOssExperts",  # transposed, interleaved, biases, a gate of its own
    "nemotron_h": "NemotronHExperts",  # no gate
    "aria": "AriaExperts",  # transposed
    "muse_spark": "MuseSparkExperts",  # a norm behind each expert
    "openai_privacy_filter": "OpenAIPrivacyFilterExperts",  # biases, not interleaved
}


def config(implementation="batched_mm", **sizes):
    """What the experts' classes read of a configuration."""
    sizes = {**SIZES, **sizes}
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return SimpleNamespace(
        **{name: sizes["num_experts"] for name in names},
        hidden_size=sizes["hidden_size"],
        moe_hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        moe_intermediate_size=sizes["intermediate_size"],
        hidden_act="silu",
        mlp_hidden_act="relu2",
        moe_latent_size=None,
        post_norm_eps=1e-6,
        swiglu_alpha=1.702,
        swiglu_limit=7.0,
        _experts_implementation=implementation,
    )


class Block(nn.Module):
    """Experts alone, as a model that PEFT can take."""

    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def forward(self, x, index, weights):
        return self.experts(x, index, weights)


def experts_class(family):
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    return getattr(module, FAMILIES[family])


def first_of(family):
    return "up_proj" if family == "nemotron_h" else "gate_up_proj"


def block(
    family="qwen3_moe", targets=None, dtype=torch.float64, implementation="batched_mm", **options
):
    """A PEFT model of one experts module, with adapters that are not zero."""
    torch.manual_seed(3)
    sizes = {name: options.pop(name) for name in SIZES if name in options}
    experts = experts_class(family)(config(implementation, **sizes))
    for p in experts.parameters():
        nn.init.normal_(p, 0.0, 0.3)
    targets = targets or (first_of(family), "down_proj")
    settings = {"r": 3, "lora_alpha": 5, "init_lora_weights": False, **options}
    settings["target_parameters"] = [f"experts.{name}" for name in targets]
    cast = settings.pop("autocast_adapter_dtype", True)
    return get_peft_model(
        Block(experts.to(dtype)), LoraConfig(**settings), autocast_adapter_dtype=cast
    )


def batch(dtype=torch.float64, tokens=7, slots=2, experts=5, width=16):
    """Hidden states, experts (the second last gets no token) and routing weights."""
    g = torch.Generator().manual_seed(5)
    hit = torch.tensor([e for e in range(experts) if e != experts - 2])
    index = torch.stack([hit[torch.randperm(len(hit), generator=g)[:slots]] for _ in range(tokens)] or
                        [torch.empty(slots, dtype=torch.int64)])[:tokens]  # fmt: skip
    x = torch.randn(tokens, width, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weights = torch.rand(tokens, slots, generator=g, dtype=torch.float64).to(dtype)
    return x, index, weights.requires_grad_()


def run(net, inputs, call=None):
    """y and the gradients of x, of the routing weights and of every parameter that is trained."""
    x, index, weights = (t.detach().requires_grad_(t.is_floating_point()) for t in inputs)
    y = (net if call is None else call)(x, index, weights)
    y.double().square().sum().backward()
    return {"y": y.detach(), "x": x.grad, "weights": weights.grad, **named_gradients(net)}


def in_float64(net, inputs):
    """`run` of the same values."""
    wide = [t.double() if t.is_floating_point() else t for t in inputs]
    return run(copy.deepcopy(net).double(), wide)


def assert_as_exact(got, want, exact, unit):
    """No further from float64 than twice PEFT's own distance, which rounds W + dW, and a rounding."""
    assert got.keys() == exact.keys() == want.keys()
    for name, value in exact.items():
        assert got[name].dtype == want[name].dtype
        allowed = 2 * (want[name] - value).norm() + unit * value.norm()
        assert (got[name] - value).norm() <= allowed, name


def assert_same(got, want, tolerance=1e-11):
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].dtype == value.dtype, name
        bound = tolerance * max(1.0, value.abs().max().item()) if value.numel() else 1.0
        torch.testing.assert_close(
            got[name], value, atol=bound, rtol=0.0, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("which", ["both", "first", "down", "down inside"])
def test_every_form_of_experts(family, which):
    first = first_of(family)
    targets = {
        "both": (first, "down_proj"),
        "first": (first,),
        "down": ("down_proj",),
        "down inside": ("down_proj", first),
    }[which]
    net = block(family, targets)
    want = run(net, batch())
    assert sum("lora_" in name for name in want) == 2 * len(targets)
    report = accelerate(net)
    assert len(report.fused) == len(targets) and not report.left_alone
    assert_same(run(net, batch()), want)
    assert restore(net) == report.fused
    assert not any(type(m) is FusedParamWrapper for m in net.modules())
    assert_same(run(net, batch()), want, 0.0)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_each_implementation_of_transformers(implementation):
    net = block(dtype=torch.float32, implementation=implementation)
    want = run(net, batch(torch.float32))
    accelerate(net)
    assert_same(run(net, batch(torch.float32)), want, 1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"r": 1},
        {"r": 20},
        {"rank_pattern": {"experts.down_proj": 5}},
        {"num_experts": 2},
        {"hidden_size": 12, "intermediate_size": 6},  # gate_up is square
        {"hidden_size": 12},  # down is square
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_settings(family, options):
    net = block(family, **options)
    inputs = batch(experts=options.get("num_experts", 5), width=options.get("hidden_size", 16),
                   slots=1 if "num_experts" in options else 2)  # fmt: skip
    want = run(net, inputs)
    assert not accelerate(net).left_alone
    assert_same(run(net, inputs), want)


@pytest.mark.parametrize("tokens, slots", [(0, 2), (1, 1), (1, 4), (40, 3)])
def test_batches(tokens, slots):
    net = block()
    inputs = batch(tokens=tokens, slots=slots)
    want = run(net, inputs)
    accelerate(net)
    assert_same(run(net, inputs), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("float32_adapters", [True, False])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_dtypes(family, dtype, float32_adapters):
    net = block(family, dtype=dtype, autocast_adapter_dtype=float32_adapters)
    exact, want = in_float64(net, batch(dtype)), run(net, batch(dtype))
    assert not accelerate(net).left_alone
    assert_as_exact(run(net, batch(dtype)), want, exact, torch.finfo(dtype).eps)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast(half):
    """Products in the half type, the result in x's, gradients in their parameters' types."""
    net = block(dtype=torch.float32, implementation="eager")
    exact = in_float64(net, batch(torch.float32))
    with torch.autocast("cpu", half):
        want = run(net, batch(torch.float32))
        accelerate(net)
        got = run(net, batch(torch.float32))
    assert all(t.dtype == torch.float32 for t in got.values())
    assert_as_exact(got, want, exact, torch.finfo(half).eps)


def test_x_of_another_dtype_is_left_to_peft():
    net = block(dtype=torch.bfloat16, implementation="grouped_mm", intermediate_size=16)
    x, index, weights = batch(torch.float32)
    want = net(x, index, weights)
    accelerate(net)
    assert torch.equal(net(x, index, weights), want)


def test_the_base_may_be_trained():
    """Stacks and biases that require grad get PEFT's gradients."""
    net = block("gpt_oss")
    net.requires_grad_(True)
    want = run(net, batch())
    assert any(name.endswith("gate_up_proj_bias") for name in want) and len(want) == 3 + 4 + 4
    accelerate(net)
    assert_same(run(net, batch()), want)


@pytest.mark.parametrize("trained", ["lora_A", "lora_B"])
def test_some_gradients_only(trained):
    """The first layer's x needs no gradient, and one of A and B may be frozen."""
    net = block()
    for name, p in net.named_parameters():
        p.requires_grad_(trained in name)
    x, index, weights = (t.detach() for t in batch())
    found = []
    for _ in range(2):
        net(x, index, weights).square().sum().backward()
        found.append(named_gradients(net))
        accelerate(net)
    assert len(found[0]) == 2
    assert_same(found[1], found[0])


def test_no_weight_is_built_for_any_expert():
    net = block(dtype=torch.float32, hidden_size=64, intermediate_size=48)
    x, index, weights = batch(torch.float32, width=64)
    stacks = (5 * 96 * 64, 5 * 64 * 48)
    sizes = {}
    for name in ("PEFT", "ours"):
        with made_inside() as shapes:
            y = net(x, index, weights)
            y.sum().backward()
            sizes[name] = [torch.Size(shape).numel() for shape in shapes()]
        net.zero_grad()
        accelerate(net)
    assert max(sizes["PEFT"]) >= stacks[0]
    assert max(sizes["ours"]) < min(stacks) / 2


SPLIT_BYTES = {16: 1.4, 256: 7.1}  # MiB that the split form saves, which never builds W + dW


@pytest.mark.parametrize("tokens", SPLIT_BYTES)
def test_saved_for_backward(tokens):
    """Qwen3-MoE's experts, E 32, H 512, I 256, top 4, r 8, float32; parameters are there anyway and do not count."""
    net = block(dtype=torch.float32, num_experts=32, hidden_size=512, intermediate_size=256, r=8)
    x = torch.randn(tokens, 512, requires_grad=True)
    index = torch.stack([torch.randperm(32)[:4] for _ in range(tokens)])
    weights = torch.rand(tokens, 4)
    accelerate(net)
    with saved_inside() as saved:
        y = net(x, index, weights)
    assert y.requires_grad
    own = {t.untyped_storage().data_ptr() for t in (x, *net.parameters())}
    places = {(t.untyped_storage().data_ptr(), t.storage_offset(), t.shape): t for t in saved}
    bytes_saved = sum(t.numel() * t.itemsize for (at, *_), t in places.items() if at not in own)
    assert bytes_saved / 2**20 <= 1.2 * SPLIT_BYTES[tokens]


def test_expert_parallel():
    """Indices of other processes' experts add nothing, to the result or to a gradient."""
    net = block()
    experts = net.base_model.model.experts.get_base_layer()
    experts._is_expert_parallel = True
    x, index, weights = batch()
    # As a router of a larger group of experts gives them.
    index[0], index[2, 1], index[5, 0] = 5, 5, 7
    weights = weights.detach().masked_fill(index >= 5, 0.0)
    want = run(net, (x, index, weights))
    kept = index.clone()
    accelerate(net)
    got = run(net, (x, index, weights))
    assert torch.equal(index, kept)
    assert not got["y"][0].any() and not got["x"][0].any()
    assert_same(got, want)


# Reasons.


def two_adapters(net):
    torch.manual_seed(8)
    net.add_adapter("other", net.peft_config["default"])
    net.base_model.set_adapter(["default", "other"])


def no_adapter(net):
    for layer in wrappers(net):
        layer.set_adapter("absent")


def replaced_forward(net):
    experts = net.base_model.model.experts.get_base_layer()
    experts.forward = type(experts).forward.__get__(experts)


def hook(module):
    module.register_forward_hook(lambda *_: None)


def wrappers(net):
    return [m for m in net.modules() if isinstance(m, ParamWrapper)]


STATES = {
    "several adapters": (two_adapters, "2 adapters are active"),
    "no adapter": (no_adapter, "0 adapters are active"),
    "merged": (lambda net: net.merge_adapter(), "its adapters are merged"),
    "disabled": (lambda net: net.base_model.disable_adapter_layers(), "its adapters are disabled"),
    "hook on the experts": (lambda net: hook(wrappers(net)[0].get_base_layer()), "which has hooks"),
    "replaced forward": (replaced_forward, "whose forward was replaced"),
    "a registered implementation": (
        lambda net: setattr(wrappers(net)[0].get_base_layer().config, "_experts_implementation", "sonicmoe"),
        "computed by 'sonicmoe'",
    ),
    "parametrized experts": (
        lambda net: nn.utils.parametrize.register_parametrization(
            wrappers(net)[0].get_base_layer(), "down_proj", nn.Identity()
        ),
        "which has parametrizations",
    ),
    "replaced lora_A": (
        lambda net: nn.utils.parametrizations.weight_norm(wrappers(net)[1].lora_A["default"]),
        "its lora_A is no plain Linear",
    ),
    "a scaling of one dimension": (
        lambda net: wrappers(net)[1].scaling.update(default=torch.tensor([0.5])),
        "its scaling must be a number or a 0-d tensor, got [1]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("state", STATES)
def test_what_is_left_alone_has_a_reason_and_peft_s_result(state):
    change, reason = STATES[state]
    net, plain = block(), block()
    change(net), change(plain)
    # The one needs a GPU, the other PEFT itself refuses.
    calls = state not in ("a registered implementation", "a scaling of one dimension")
    report = accelerate(net, allow_none=True)
    assert len(report.left_alone) == 2 and not report.fused
    outer, inner = report.left_alone.values()
    assert reason in outer and reason in inner, report
    if calls:
        assert_same(run(net, batch()), run(plain, batch()), 0.0)


def test_a_hook_on_the_wrapper_inside_leaves_both_alone():
    net = block()
    calls = []
    wrappers(net)[1].register_forward_hook(lambda *_: calls.append(1))
    report = accelerate(net, allow_none=True)
    outer, inner = report.left_alone.values()
    assert outer == "in the wrapper inside it, it has hooks"
    assert inner.startswith("base_model.model.experts around it is left alone")
    net(*batch())
    assert calls == [1]


def test_a_hook_on_the_outer_wrapper_runs():
    net = block()
    calls = []
    wrappers(net)[0].register_forward_hook(lambda *_: calls.append(1))
    assert not accelerate(net).left_alone
    net(*batch())
    assert calls == [1]


def test_a_global_hook_is_left_to_peft():
    net = block()
    accelerate(net)
    calls = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: calls.append(type(m)))
    try:
        assert why_not_fused(wrappers(net)[0]) == "hooks on all modules are registered"
        net(*batch())
    finally:
        handle.remove()
    assert any(issubclass(kind, experts_class("qwen3_moe")) for kind in calls)


class OwnForward(experts_class("qwen3_moe")):
    """A subclass with a forward of its own, which no decorator made."""

    def forward(self, hidden_states, top_k_index, top_k_weights):
        return 2 * super().forward(hidden_states, top_k_index, top_k_weights)


def test_an_unknown_forward_is_left_alone(monkeypatch):
    import transformers.models.qwen3_moe.modeling_qwen3_moe as module

    monkeypatch.setattr(module, "Qwen3MoeExperts", OwnForward)
    net = block()
    want = run(net, batch())
    report = accelerate(net, allow_none=True)
    assert "its experts are a OwnForward, whose forward is not that" in str(report)
    assert_same(run(net, batch()), want, 0.0)


def test_experts_of_another_interface_are_left_alone(monkeypatch):
    from transformers.integrations.moe import ExpertsInterface, use_experts_implementation

    class Experts(experts_class("qwen3_moe")):
        def forward(self, *args):
            return args[0]

    kind = use_experts_implementation(Experts, experts_interface=ExpertsInterface())
    import transformers.models.qwen3_moe.modeling_qwen3_moe as module

    monkeypatch.setattr(module, "Qwen3MoeExperts", kind)
    report = accelerate(block(), allow_none=True)
    assert "whose forward is not that of Transformers' experts" in str(report)


def test_a_parameter_of_a_linear_is_left_alone():
    net = get_peft_model(
        nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)),
        LoraConfig(
            r=2, target_modules=["0"], target_parameters=["1.weight"], init_lora_weights=False
        ),
    )
    x = torch.randn(3, 6)
    want = net(x)
    report = accelerate(net)
    assert list(report.fused) == ["base_model.model.0"]
    assert "its experts are a Linear" in report.left_alone["base_model.model.1"]
    torch.testing.assert_close(net(x), want)


@pytest.mark.parametrize(
    "options", [{"lora_dropout": 0.1}, {"lora_bias": True}, {"use_dora": True}], ids=str
)
def test_what_peft_itself_rejects_stays_rejected(options):
    with pytest.raises(ValueError, match="does not work with"):
        block(**options)


def test_adapter_names_are_peft_s_error():
    net = block()
    accelerate(net)
    with pytest.raises(ValueError, match="does not support mixed adapter batches"):
        wrappers(net)[0](*batch(), adapter_names=["default"] * 7)


# The layouts of PEFT's versions.


def as_before_0_19(net, has_attribute):
    """The same model as PEFT before 0.19 makes it: lora_A on the first dimension of the parameter, whatever it is."""
    for layer in wrappers(net):
        _, first, second = layer.get_param().shape
        E = layer.num_experts
        layer._did_swap_in_out_features = False
        layer.in_features, layer.out_features = first, second
        for parts, sizes in ((layer.lora_A, (E * 3, first)), (layer.lora_B, (second, 3 * E))):
            parts["default"].weight = nn.Parameter(0.3 * torch.randn(sizes, dtype=torch.float64))
    want = run(net, batch())
    if not has_attribute:
        for layer in wrappers(net):
            del layer._did_swap_in_out_features
    return want


@pytest.mark.parametrize("has_attribute", [True, False])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "aria"])
def test_adapters_of_peft_before_0_19(family, has_attribute):
    """The side that lora_A is on follows from PEFT's own mark, else from the shape."""
    net = block(family)
    want = as_before_0_19(net, has_attribute)
    assert not accelerate(net).left_alone
    assert_same(run(net, batch()), want)


@pytest.mark.parametrize("version, fused", [("0.18.1", True), ("0.22.0", False)])
def test_a_square_parameter_without_the_mark(version, fused, monkeypatch):
    """PEFT before 0.19 has one layout; of a version that has two and no mark, nothing can be concluded."""
    net = block(targets=("gate_up_proj",), hidden_size=12, intermediate_size=6)
    inputs = batch(width=12)
    (layer,) = wrappers(net)
    layer._did_swap_in_out_features = False
    want = run(net, inputs)
    del layer._did_swap_in_out_features
    monkeypatch.setattr(peft, "__version__", version)
    reason = why_not_fused(layer)
    if fused:
        accelerate(net)
        assert_same(run(net, inputs), want)
    else:
        words = "does not say which side of its parameter, [5, 12, 12], lora_A is on"
        assert reason == f"PEFT {version} {words}"


def test_an_adapter_of_other_shapes_is_left_alone():
    net = block()
    wrappers(net)[0].lora_A["default"].weight = nn.Parameter(
        torch.randn(15, 11, dtype=torch.float64)
    )
    assert "do not fit its parameter, [5, 16, 12]" in str(accelerate(net, allow_none=True))


# Other machinery.


def test_checkpointing():
    net = block()
    want = run(net, batch())
    accelerate(net)

    assert_same(run(net, batch(), partial(checkpoint, net, use_reentrant=False)), want)


def test_copies_and_pickles():
    net = block()
    accelerate(net)
    want = run(net, batch())
    for again in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert all(type(layer) is FusedParamWrapper for layer in wrappers(again))
        assert_same(run(again, batch()), want, 0.0)
    assert "lora.ParamWrapper" in repr(net) and "Fused" not in repr(net)


def test_same_input_same_bits():
    net = block(dtype=torch.float32)
    accelerate(net)
    assert_same(run(net, batch(torch.float32)), run(net, batch(torch.float32)), 0.0)


def test_nan_and_inf_stay_with_their_token():
    net = block()
    accelerate(net)
    x, index, weights = batch()
    x = x.detach()
    x[2, 3], x[4, 0] = float("nan"), float("inf")
    finite = torch.isfinite(net(x, index, weights)).all(1)
    assert finite.tolist() == [True, True, False, True, False, True, True]


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_compile(family):
    """One graph, forward and backward, that another routing does not compile again."""
    net = block(family, dtype=torch.float32)
    accelerate(net)
    want = run(net, batch(torch.float32))
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(net, fullgraph=True)
        got = run(net, batch(torch.float32), compiled)
        x, index, weights = batch(torch.float32)
        other = net(x, index.flip(0), weights)
        torch.testing.assert_close(compiled(x, index.flip(0), weights), other)
    assert_same(got, want, 1e-5)


# Whole models.

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 2, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
TOKENS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(6))
MODELS = {
    "qwen3_moe": lambda: transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(**SMALL, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24,
                                    decoder_sparse_step=1)
    ),
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SMALL, num_local_experts=6, num_experts_per_tok=2, intermediate_size=24)
    ),
    "gpt_oss": lambda: transformers.GptOssForCausalLM(
        transformers.GptOssConfig(**SMALL, num_local_experts=6, num_experts_per_tok=2, intermediate_size=24,
                                  layer_types=["full_attention", "sliding_attention"])
    ),
}  # fmt: skip
PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def language_model(family, **options):
    torch.manual_seed(11)
    net = get_peft_model(
        MODELS[family](),
        LoraConfig(
            r=4, target_modules=["q_proj", "v_proj"], target_parameters=PARAMETERS, **options
        ),
    )
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "lora_" in name:
                p.normal_(0.0, 0.2)
    return net


def train(net, steps=3):
    """Losses, and the adapter after a few steps of AdamW."""
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = net(input_ids=TOKENS, labels=TOKENS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), peft.get_peft_model_state_dict(net)


@pytest.mark.parametrize("family", MODELS)
def test_models_train_generate_and_save_as_before(family, tmp_path):
    net = language_model(family)
    plain = copy.deepcopy(net)
    report = accelerate(net)
    assert len(report.fused) == 2 * (2 + 2) and not report.left_alone
    if family != "qwen3_moe":
        net.enable_input_require_grads()
        net.gradient_checkpointing_enable()
    losses, adapter = train(net)
    wanted, reference = train(plain)
    torch.testing.assert_close(losses, wanted, atol=1e-5, rtol=1e-5)
    assert adapter.keys() == reference.keys()
    for key, value in reference.items():
        torch.testing.assert_close(adapter[key], value, atol=2e-4, rtol=1e-3)

    net.eval(), plain.eval()
    net.gradient_checkpointing_disable()
    settings = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(net.generate(TOKENS, **settings), plain.generate(TOKENS, **settings))

    net.save_pretrained(tmp_path / "ours")
    plain.save_pretrained(tmp_path / "theirs")
    ours, theirs = (
        json.loads((tmp_path / who / "adapter_config.json").read_text())
        for who in ("ours", "theirs")
    )
    for config in (ours, theirs):  # PEFT writes a set, in the order of a process's hashes
        config["target_modules"] = sorted(config["target_modules"])
    assert ours == theirs
    torch.manual_seed(11)
    loaded = PeftModel.from_pretrained(MODELS[family](), tmp_path / "ours").eval()
    torch.testing.assert_close(loaded(TOKENS).logits, net(TOKENS).logits, atol=1e-4, rtol=1e-4)


def test_adapters_are_switched_disabled_and_merged():
    """A reason holds for the moment: what PEFT computes then, and fused products again afterwards."""
    net = language_model("qwen3_moe").eval()
    plain = copy.deepcopy(net)
    accelerate(net)
    for each in (net, plain):
        torch.manual_seed(1)
        each.add_adapter("other", each.peft_config["default"])
        for name, p in each.named_parameters():
            if "other" in name:
                nn.init.normal_(p, 0.0, 0.3)

    def same():
        torch.testing.assert_close(net(TOKENS).logits, plain(TOKENS).logits, atol=1e-4, rtol=1e-4)

    for name in ("other", "default"):
        net.set_adapter(name), plain.set_adapter(name)
        assert why_not_fused(wrappers(net)[0]) is None
        same()
    with net.disable_adapter(), plain.disable_adapter():
        same()
    net.merge_adapter(), plain.merge_adapter()
    assert why_not_fused(wrappers(net)[0]) == "its adapters are merged"
    same()
    net.unmerge_adapter(), plain.unmerge_adapter()
    same()
    merged = net.merge_and_unload()
    assert not wrappers(merged)
    torch.testing.assert_close(merged(TOKENS).logits, plain(TOKENS).logits, atol=1e-3, rtol=1e-3)
