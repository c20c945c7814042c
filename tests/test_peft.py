"""PEFT models after `accelerate`: PEFT's own behaviour, setting by setting, and what is left to PEFT's own forward."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext
from functools import partial

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, VeloraConfig, get_peft_model
from torch import nn

from lora_kernels import bases, load_adapter, save_adapter
from lora_kernels.integrations import peft as integration
from lora_kernels.integrations.peft import FusedLinear, accelerate, restore, why_not_fused
from tests.oracle import named_gradients
from tests.test_functional import LAYOUTS
from tests.test_modules import SPARSE


class Net(nn.Module):
    """Linear layers with and without bias, an embedding, a convolution and a GPT-2 Conv1D."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.embedding = nn.Embedding(30, 16)
        self.first = nn.Linear(16, 24)
        self.second = nn.Linear(24, 16, bias=False)
        self.conv1d = Conv1D(20, 16)
        self.head = nn.Linear(20, 5)
        self.to(dtype)

    def forward(self, tokens):
        hidden = self.embedding(tokens)
        hidden = self.second(self.first(hidden).relu()) + hidden
        return self.head(self.conv1d(hidden))


TARGETS = ["first", "second", "conv1d"]


def model(dtype=torch.float32, **options):
    """A PEFT model whose adapters are not zero."""
    torch.manual_seed(7)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "init_lora_weights": False}
    settings |= options
    cast = settings.pop("autocast_adapter_dtype", True)
    made = get_peft_model(Net(dtype), LoraConfig(**settings), autocast_adapter_dtype=cast)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "lora_" in name and p.dtype.is_floating_point:
                p.copy_(torch.randn(p.shape) * 0.3)
    return made


def tokens():
    return torch.randint(30, (3, 7), generator=torch.Generator().manual_seed(1))


def run(net, context=None):
    """Logits and every gradient."""
    with context or nullcontext():
        y = net(tokens())
    y.float().square().sum().backward()
    return y.detach(), named_gradients(net)


def assert_same(fused, plain, dtype=torch.float32):
    atol, rtol = (2e-5, 1e-4) if dtype == torch.float32 else (0.15, 0.05)
    torch.testing.assert_close(fused[0], plain[0], atol=atol, rtol=rtol)
    assert fused[1].keys() == plain[1].keys() and fused[1]
    for name, gradient in fused[1].items():
        assert gradient.dtype == plain[1][name].dtype
        if dtype == torch.float32:
            # Where large terms cancel, what is left has their rounding: eight units of the largest.
            rounding = max(atol, 1e-6 * plain[1][name].abs().max().item())
            torch.testing.assert_close(gradient, plain[1][name], atol=rounding, rtol=1e-4)
        else:
            difference = (gradient - plain[1][name]).float().norm() / plain[1][name].float().norm()
            assert difference < 0.05, name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"lora_bias": True},
        {"rank_pattern": {"first": 7}, "alpha_pattern": {"second": 1}},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"modules_to_save": ["head"]},
        {"fan_in_fan_out": True, "target_modules": ["conv1d"]},
        {"init_lora_weights": "gaussian"},
        {"target_modules": "all-linear"},
    ],
    ids=str,
)
def test_settings(options):
    net = model(**options)
    plain = run(net)
    report = accelerate(net)
    assert report.fused and not report.left_alone
    assert_same(run(net), plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("float32_adapters", [True, False])
def test_half_bases(dtype, float32_adapters):
    net = model(dtype, autocast_adapter_dtype=float32_adapters)
    assert (
        net.base_model.model.first.lora_A["default"].weight.dtype == torch.float32
    ) == float32_adapters
    plain = run(net)
    assert not accelerate(net).left_alone
    assert_same(run(net), plain, dtype)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast(half):
    net = model()
    plain = run(net, torch.autocast("cpu", half))
    accelerate(net)
    fused = run(net, torch.autocast("cpu", half))
    assert fused[0].dtype == plain[0].dtype
    assert_same(fused, plain, half)


def test_dropout_is_fused_and_unbiased():
    net = model(lora_dropout=0.5)
    accelerate(net)
    layer = net.base_model.model.first
    assert why_not_fused(layer) is None
    x = torch.randn(1, 16)
    mean = torch.stack([layer(x) for _ in range(2000)]).mean(0)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    torch.testing.assert_close(layer(x), PEFT_FORWARD(layer, x), atol=1e-5, rtol=1e-4)
    branch = (layer(x) - layer.base_layer(x)).abs().max()
    assert (mean - layer(x)).abs().max() < 0.25 * branch + 0.05


PEFT_FORWARD = peft.tuners.lora.Linear.forward
PARTS = ("base_layer", "lora_A", "lora_B", "lora_dropout")


def part_of(layer, name):
    """One of PARTS of a layer; PEFT has the others by the adapter's name."""
    part = getattr(layer, name)
    return part if name == "base_layer" else part["default"]


def other_adapter(net, **options):
    """Adds a second adapter, the same to each net."""
    torch.manual_seed(4)
    options = {"r": 3, "target_modules": TARGETS, "init_lora_weights": False, **options}
    net.add_adapter("other", LoraConfig(**options))


def left_to_peft(monkeypatch, net, *args, **kwargs):
    """The result, having made sure that no fused product ran."""

    def forbidden(*args, **kwargs):
        raise AssertionError("the fused product ran")

    with monkeypatch.context() as patch:
        patch.setattr(bases, "lora_linear", forbidden)
        patch.setattr(integration, "mixed_lora_linear", forbidden)
        return net(*args, **kwargs)


class TestState:
    """What PEFT does to a layer after it was accelerated."""

    @pytest.fixture
    def pair(self):
        net = model()
        fused = copy.deepcopy(net)
        accelerate(fused)
        return fused, net

    def same(self, fused, plain):
        torch.testing.assert_close(fused(tokens()), plain(tokens()), atol=2e-5, rtol=1e-4)

    def each(self, pair, change):
        for net in pair:
            change(net)
        self.same(*pair)

    def test_disable_adapter(self, pair, monkeypatch):
        fused, plain = pair
        with fused.disable_adapter(), plain.disable_adapter():
            assert torch.equal(left_to_peft(monkeypatch, fused, tokens()), plain(tokens()))
        self.same(fused, plain)

    def test_merge_and_unmerge(self, pair, monkeypatch):
        fused, plain = pair
        before = fused(tokens())
        fused.merge_adapter()
        merged = left_to_peft(monkeypatch, fused, tokens())
        torch.testing.assert_close(merged, before, atol=2e-5, rtol=1e-4)
        fused.unmerge_adapter()
        self.same(fused, plain)

    def test_merge_and_unload(self, pair):
        fused, plain = pair
        merged = fused.merge_and_unload()
        assert not any(isinstance(m, FusedLinear) for m in merged.modules())
        self.same(merged, plain)

    def test_unload(self, pair):
        assert torch.equal(pair[0].unload()(tokens()), pair[1].unload()(tokens()))

    def test_scale_layer(self, pair):
        def change(net):
            for m in net.modules():
                if hasattr(m, "scale_layer"):
                    m.scale_layer(0.25)

        self.each(pair, change)

    def test_set_scale_and_a_tensor_scale(self, pair):
        self.each(pair, lambda net: net.base_model.model.first.set_scale("default", 3))
        tensor = torch.tensor(0.5)
        self.each(pair, lambda net: net.base_model.model.first.scaling.update(default=tensor))

    def test_adapters_added_later_and_switched(self, pair):
        self.each(pair, partial(other_adapter, lora_alpha=9))
        for name in ("other", "default", "other"):
            self.each(pair, lambda net, name=name: net.set_adapter(name))
        assert not accelerate(pair[0]).left_alone
        self.each(pair, lambda net: net.delete_adapter("default"))

    def test_several_active_adapters(self, pair, monkeypatch):
        fused, plain = pair
        for net in pair:
            other_adapter(net)
            net.base_model.set_adapter(["default", "other"])
        assert torch.equal(left_to_peft(monkeypatch, fused, tokens()), plain(tokens()))
        report = accelerate(fused, allow_none=True)
        assert set(report.left_alone.values()) == {"2 adapters are active in it, not one"}

    def test_batches_of_mixed_adapters(self, pair, monkeypatch):
        fused, plain = pair
        for net in pair:
            other_adapter(net, target_modules=["first"])
            net.eval()
        names = ["default", "other", "__base__"]
        want = plain(tokens(), adapter_names=names)
        torch.testing.assert_close(fused(tokens(), adapter_names=names), want, atol=2e-5, rtol=1e-4)
        with monkeypatch.context() as patch:
            patch.delattr(peft.tuners.lora.LoraLayer, "_mixed_batch_forward")  # PEFT's own
            for each in (names, names[::-1], ["__base__"] * 3, ["default"] * 3):
                fused(tokens(), adapter_names=each)
        fused.base_model.model.first.base_layer.register_forward_hook(lambda *_: None)
        first = fused.base_model.model.first
        assert integration._mixed_forward(first, torch.randn(3, 16), names) is None
        torch.testing.assert_close(fused(tokens(), adapter_names=names), want, atol=2e-5, rtol=1e-4)
        with pytest.raises(ValueError, match="in training mode"):
            fused.train()(tokens(), adapter_names=names)

    def test_weighted_adapters(self, pair):
        def change(net):
            other_adapter(net, r=4)
            net.add_weighted_adapter(
                ["default", "other"], [0.5, 0.7], "both", combination_type="linear"
            )
            net.set_adapter("both")

        self.each(pair, change)

    def test_saving_and_loading(self, pair, tmp_path):
        fused, plain = pair
        fused.save_pretrained(tmp_path / "fused")
        plain.save_pretrained(tmp_path / "plain")
        files = [tmp_path / kind / "adapter_model.safetensors" for kind in ("fused", "plain")]
        assert files[0].read_bytes() == files[1].read_bytes()
        torch.manual_seed(7)
        loaded = PeftModel.from_pretrained(Net(), tmp_path / "plain", low_cpu_mem_usage=True)
        assert not accelerate(loaded).left_alone
        self.same(loaded, plain)
        fused.load_adapter(tmp_path / "plain", "again")
        fused.set_adapter("again")
        self.same(fused, plain)

    @pytest.mark.parametrize("targets", [["first", "second"], TARGETS, ["conv1d"]], ids=len)
    def test_our_own_modules_read_the_file(self, tmp_path, targets):
        net = model(target_modules=targets)
        accelerate(net)
        net.save_pretrained(tmp_path)
        torch.manual_seed(7)
        ours = Net()
        load_adapter(ours, tmp_path)
        self.same(ours, net)
        save_adapter(ours, tmp_path / "ours")
        torch.manual_seed(7)
        self.same(PeftModel.from_pretrained(Net(), tmp_path / "ours"), net)

    def test_copies(self, pair):
        fused, plain = pair
        for copied in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
            assert isinstance(copied.base_model.model.first, FusedLinear)
            self.same(copied, plain)
        assert list(fused.state_dict()) == list(plain.state_dict())

    def test_gradient_checkpointing(self, pair):
        from torch.utils.checkpoint import checkpoint

        results = []
        for net in pair:
            net.zero_grad()
            hidden = torch.randn(3, 16, generator=torch.Generator().manual_seed(2))
            first = net.base_model.model.first
            checkpoint(first, hidden, use_reentrant=False).square().sum().backward()
            results.append(first.lora_A["default"].weight.grad)
        torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)


SCALINGS = {
    "trained": (
        lambda: nn.Parameter(torch.tensor(0.7)),
        "not require grad: it is a run-time value, no parameter",
    ),
    "one for each output": (
        lambda: torch.linspace(0, 1, 24),
        "be a number or a 0-d tensor, got [24]",
    ),
    "a vector of one": (lambda: torch.tensor([0.5]), "be a number or a 0-d tensor, got [1]"),
    "a bool": (lambda: True, "be a number or a 0-d tensor, got bool"),
}


class TestLeftAlone:
    def test_for_the_moment(self, monkeypatch):
        """A layer left alone because of its adapters' state is fused as soon as that allows."""
        net = model(lora_dropout=0.0)
        layer = net.base_model.model.first
        net.merge_adapter()
        assert "its adapters are merged" in str(accelerate(net, allow_none=True))
        net.unmerge_adapter()
        assert why_not_fused(layer) is None
        with pytest.raises(AssertionError, match="the fused product ran"):
            left_to_peft(monkeypatch, net, tokens())

    @pytest.mark.parametrize(
        "options, part",
        [
            ({"velora_config": VeloraConfig()}, "variant, VeloraLinearVariant"),
            ({"target_modules": ["embedding"]}, "lora.Embedding"),
        ],
    )
    def test_what_is_no_plain_linear(self, options, part):
        net = model(**options)
        plain = run(net)
        with pytest.raises(ValueError, match="model must contain a LoRA layer that can be fused"):
            accelerate(net)
        report = accelerate(net, allow_none=True)
        assert report.left_alone and all(part in why for why in report.left_alone.values())
        after = run(net)
        assert torch.equal(after[0], plain[0])

    @pytest.fixture
    def layer(self):
        """One layer of an accelerated model."""
        net = model()
        accelerate(net)
        return net.base_model.model.first

    @pytest.mark.parametrize(
        "kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"]
    )
    @pytest.mark.parametrize("part", PARTS[:3])
    def test_every_kind_of_hook(self, layer, part, kind):
        """On the inner layer, then on all modules of the process."""
        inner = part_of(layer, part)
        registers = (
            getattr(inner, f"register_{kind}_hook"),
            getattr(torch.nn.modules.module, f"register_module_{kind}_hook"),
        )
        for register in registers:
            seen = []
            handle = register(lambda m, *_, seen=seen: seen.append(m))
            try:
                layer(torch.randn(3, 16, requires_grad=True)).sum().backward()
            finally:
                handle.remove()
            assert inner in seen
        assert why_not_fused(layer) is None

    def test_hooks_on_all_modules_are_a_reason_of_the_moment(self):
        net = model()
        handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
        try:
            report = accelerate(net, allow_none=True)
        finally:
            handle.remove()
        assert set(report.left_alone.values()) == {"hooks on all modules are registered"}
        assert not accelerate(net).left_alone

    def test_dropout_follows_its_own_mode(self, monkeypatch):
        """PEFT's Dropout is a module and may be in another mode than the layer."""
        net = model(lora_dropout=0.5)
        accelerate(net)
        layer, x = net.base_model.model.first, torch.randn(3, 16)
        layer.eval()
        expected = layer(x)
        layer.train().lora_dropout["default"].eval()
        torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-4)
        layer.eval().lora_dropout["default"].train()
        assert not torch.allclose(layer(x), expected)
        y = left_to_peft(monkeypatch, layer, x, adapter_names=["default"] * 3)
        assert not torch.allclose(y, expected)

    def test_an_int8_base(self, layer):
        layer.base_layer.weight = nn.Parameter(torch.ones(24, 16).to(torch.int8), False)
        assert why_not_fused(layer) == (
            "its base weight is a Parameter of torch.int8, no plain floating-point tensor"
        )

    @pytest.mark.parametrize("part", PARTS[:3])
    def test_a_replaced_forward(self, layer, part, monkeypatch):
        x = torch.randn(3, 16)
        part_of(layer, part).forward = lambda t: torch.zeros(3, 4 if part == "lora_A" else 24)
        assert why_not_fused(layer) == f"the forward of its {part} was replaced"
        assert torch.equal(left_to_peft(monkeypatch, layer, x), PEFT_FORWARD(layer, x))

    @pytest.mark.parametrize("part", PARTS)
    def test_hooks(self, layer, part, monkeypatch):
        x = torch.randn(3, 16)
        before = layer(x)
        handle = part_of(layer, part).register_forward_hook(lambda module, args, out: out + 1.0)
        assert why_not_fused(layer) == f"its {part} has hooks"
        assert not torch.allclose(left_to_peft(monkeypatch, layer, x), before)
        handle.remove()
        assert torch.equal(layer(x), before)

    def test_parametrizations(self, layer, monkeypatch):
        torch.nn.utils.parametrizations.weight_norm(layer.base_layer, "weight")
        assert why_not_fused(layer) == (
            "its base layer is a torch.nn.utils.parametrize.ParametrizedLinear, "
            "a subclass of nn.Linear"
        )
        x = torch.randn(3, 16)
        assert torch.equal(left_to_peft(monkeypatch, layer, x), PEFT_FORWARD(layer, x))

    def test_a_quantised_base(self):
        class Linear(nn.Linear):
            pass

        net = model()
        net.base_model.model.first.base_layer.__class__ = Linear
        report = accelerate(net)
        assert report.left_alone == {
            "base_model.model.first": f"its base layer is a {__name__}.{Linear.__qualname__}, "
            "a subclass of nn.Linear"
        }
        assert "2 of 3 LoRA layers fused" in str(report)

    @pytest.mark.parametrize("use_dora", [False, True])
    def test_a_bias_of_lora_A(self, use_dora, monkeypatch):
        """PEFT makes none, and adds one that it is given."""
        net = model(use_dora=use_dora).eval()
        net.base_model.model.first.lora_A["default"].bias = nn.Parameter(torch.ones(4))
        plain = copy.deepcopy(net)
        report = accelerate(net)
        assert report.left_alone == {"base_model.model.first": "its lora_A has a bias"}
        assert_same(run(net), run(plain))  # with the gradient of the bias
        if not use_dora:  # in which PEFT has no batches of mixed adapters
            x, names = torch.randn(3, 16), ["default", "__base__", "default"]
            want = plain.base_model.model.first(x, adapter_names=names)
            first = net.base_model.model.first
            assert torch.equal(left_to_peft(monkeypatch, first, x, adapter_names=names), want)

    def test_nested_and_sparse_inputs(self, layer, monkeypatch):
        x, layer = torch.eye(16), layer.eval()
        for sparse in SPARSE:
            torch.testing.assert_close(left_to_peft(monkeypatch, layer, sparse(x)), layer(x))
        nested = torch.nested.nested_tensor([x[:3], x[3:]], layout=torch.jagged)
        y = left_to_peft(monkeypatch, layer, nested)
        torch.testing.assert_close(y.values(), layer(x))
        names = ["default"] * 16
        with pytest.raises(RuntimeError):  # PEFT's own
            left_to_peft(monkeypatch, layer, x.to_sparse_csr(), adapter_names=names)

    @pytest.mark.parametrize("scaling", SCALINGS)
    def test_a_scaling_that_is_no_number(self, layer, scaling, monkeypatch):
        """One that may come and go at any time."""
        make, rule = SCALINGS[scaling]
        layer.eval()
        x, names = torch.randn(3, 16), ["default", "__base__", "default"]
        before, layer.scaling["default"] = layer.scaling["default"], make()
        assert why_not_fused(layer) == f"its scaling must {rule}"
        y = left_to_peft(monkeypatch, layer, x)
        assert torch.equal(y, PEFT_FORWARD(layer, x))
        mixed = left_to_peft(monkeypatch, layer, x, adapter_names=names)
        torch.testing.assert_close(mixed[::2], y[::2])
        if scaling == "trained":
            y.sum().backward()
            assert layer.scaling["default"].grad
        layer.scaling["default"] = before
        assert why_not_fused(layer) is None

    def test_a_dtype_that_peft_refuses_is_refused_by_peft(self):
        net = model(torch.bfloat16)
        accelerate(net)
        with pytest.raises(RuntimeError, match="dtype"):
            net.base_model.model.first(torch.randn(3, 16))

    def test_no_lora_at_all(self):
        with pytest.raises(ValueError, match="must contain LoRA layers of PEFT, but it has none"):
            accelerate(nn.Linear(3, 3))
        assert accelerate(nn.Linear(3, 3), allow_none=True).layers == {}

    @pytest.mark.parametrize("wrong", [None, "model", [nn.Linear(3, 3)]])
    def test_what_is_no_module(self, wrong):
        for call in (accelerate, restore):
            with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got"):
                call(wrong)
        assert "not a LoRA layer of PEFT" in why_not_fused(wrong)
        assert why_not_fused(nn.Linear(3, 3)) == "it is a Linear, not a LoRA layer of PEFT"


def test_restore_is_exact():
    net = model()
    before = run(net)
    classes = {name: type(m) for name, m in net.named_modules()}
    attributes = {name: set(m.__dict__) for name, m in net.named_modules()}
    text = repr(net)
    accelerate(net)
    accelerate(net)
    assert repr(net) == text
    assert restore(net) == [f"base_model.model.{name}" for name in TARGETS]
    assert {name: type(m) for name, m in net.named_modules()} == classes
    assert {name: set(m.__dict__) for name, m in net.named_modules()} == attributes
    after = run(net)
    assert torch.equal(after[0], before[0])
    assert restore(net) == []


def test_pefts_classes_are_untouched():
    assert peft.tuners.lora.Linear.forward is PEFT_FORWARD
    assert "FusedLinear" not in dir(peft.tuners.lora)


def test_weights_are_not_copied(monkeypatch):
    """PEFT's storage, transposed by strides alone, is what the product reads."""
    net = model()
    accelerate(net)
    seen = []
    original = bases.lora_linear
    monkeypatch.setattr(
        bases, "lora_linear", lambda *args, **kw: seen.append(args) or original(*args, **kw)
    )
    net(tokens())
    layer = net.base_model.model.first
    assert seen[0][1] is layer.base_layer.weight
    assert seen[0][2].data_ptr() == layer.lora_A["default"].weight.data_ptr()
    assert seen[0][3].data_ptr() == layer.lora_B["default"].weight.data_ptr()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_of_the_input(layout):
    net = model()
    accelerate(net)
    layer = net.base_model.model.first
    x = LAYOUTS[layout](torch.randn(5, 16))
    torch.testing.assert_close(layer(x), PEFT_FORWARD(layer, x), atol=1e-5, rtol=1e-4)
