"""The drop-in layer against the class it replaces: numbers, names, state, hooks, replacement and its refusals."""

from __future__ import annotations

import copy
import io
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from lora_kernels import (
    LinearWithLoRA,
    LoRALayer,
    freeze_base,
    lora_parameters,
    lora_state_dict,
    merge_lora,
    reference,
    replace_linear_with_lora,
    unmerge_lora,
)
from lora_kernels.modules import is_plain, lora_layers
from tests.oracle import assert_bits, with_gradients


class Block(nn.Module):
    """Two branches, a nested container, a norm and a Linear without bias."""

    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(12, 12, bias=False)
        self.mlp = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12))
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        return self.head(self.norm(x + self.mlp(self.q_proj(x))))


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, weight):
        return 2 * weight


def reloaded(value, **options):
    """What torch.load gives of what torch.save keeps."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, **options)


def pair(rank=4, alpha=2.0):
    """The same model twice, from one seed: with the reference layer and with ours."""
    models = []
    for package in (reference, None):
        torch.manual_seed(11)
        model = Block()
        replace = reference.replace_linear_with_lora if package else replace_linear_with_lora
        replace(model, rank, alpha)
        models.append(model)
    return models


def fill(model):
    """B is zero at the start, which would hide the branch."""
    for p in lora_parameters(model):
        if not p.any():
            nn.init.normal_(p, std=0.3)
    return model


class TestDropIn:
    def test_one_seed_gives_one_model(self):
        theirs, ours = pair()
        assert list(theirs.state_dict()) == list(ours.state_dict())
        assert_bits(dict(ours.state_dict()), dict(theirs.state_dict()))

    def test_state_keys_and_their_order(self):
        layer = LinearWithLoRA(nn.Linear(6, 3), 2, 1.0)
        assert list(layer.state_dict()) == ["linear.weight", "linear.bias", "lora.A", "lora.B"]
        assert [name for name, _ in layer.named_parameters()] == list(layer.state_dict())
        bare = LinearWithLoRA(nn.Linear(6, 3, bias=False), 2, 1.0)
        assert list(bare.state_dict()) == ["linear.weight", "lora.A", "lora.B"]

    @pytest.mark.parametrize("direction", ["theirs to ours", "ours to theirs"])
    def test_states_are_exchanged_both_ways(self, direction):
        theirs, ours = pair()
        source, target = (theirs, ours) if direction == "theirs to ours" else (ours, theirs)
        for p in source.parameters():
            nn.init.normal_(p, std=0.2)
        target.load_state_dict(source.state_dict(), strict=True)
        x = torch.randn(7, 12)
        torch.testing.assert_close(target(x), source(x))

    def test_initial_values(self):
        layer = LoRALayer(768, 10, 16, 1.0)
        assert not layer.B.any() and layer.B.shape == (16, 10)
        assert 0.2499 < layer.A.abs().max() <= 0.25 and layer.A.shape == (768, 16)

    def test_the_linear_is_kept_as_the_same_object(self):
        linear = nn.Linear(6, 3)
        layer = LinearWithLoRA(linear, 2, 1.0)
        assert layer.linear is linear
        assert layer.weight is linear.weight and layer.bias is linear.bias
        assert (layer.in_features, layer.out_features) == (6, 3)

    @pytest.mark.parametrize("trainable_base", [False, True])
    def test_training_is_the_references(self, trainable_base):
        losses = []
        for model in pair(rank=16):
            if not trainable_base:
                for name, p in model.named_parameters():
                    p.requires_grad_(".lora." in name)
            optimizer = torch.optim.AdamW(
                [p for p in model.parameters() if p.requires_grad], lr=1e-2
            )
            torch.manual_seed(5)
            x, target = torch.randn(30, 12), torch.randint(5, (30,))
            losses.append([])
            for _ in range(8):
                loss = nn.functional.cross_entropy(model(x), target)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses[-1].append(loss.item())
        assert losses[1] == pytest.approx(losses[0], abs=1e-5) and losses[0][-1] < losses[0][0]

    def test_the_branch_alone_is_the_references(self):
        torch.manual_seed(2)
        ours = LoRALayer(6, 3, 2, 0.5)
        torch.manual_seed(2)
        theirs = reference.LoRALayer(6, 3, 2, 0.5)
        for layer in (ours, theirs):
            torch.nn.init.constant_(layer.B, 0.3)
        x = torch.randn(4, 6)
        torch.testing.assert_close(ours(x), theirs(x))


class TestScaling:
    @pytest.mark.parametrize(
        "alpha, scaling, scale",
        [
            *((8.0, "alpha", 8.0), (8.0, "alpha/rank", 2.0), (8.0, "alpha/sqrt(rank)", 4.0)),
            *(
                (np.float32(2), "alpha", 2.0),
                (np.int64(2), "alpha", 2.0),
                (Fraction(2), "alpha", 2.0),
            ),
        ],
        ids=repr,
    )
    def test_conventions(self, alpha, scaling, scale):
        """Any real number is an alpha."""
        layer = fill(LinearWithLoRA(nn.Linear(6, 3), 4, alpha, scaling=scaling))
        assert layer.lora.scale == scale
        x = torch.randn(5, 6)
        expected = layer.linear(x) + scale * (x @ layer.lora.A @ layer.lora.B)
        torch.testing.assert_close(layer(x), expected)

    @pytest.mark.parametrize(
        "change",
        [
            lambda layer: LoRALayer(6, 3, 2, 1.0),
            lambda layer: layer.to(torch.float64),
            copy.deepcopy,
        ],
        ids=["made", "moved", "copied"],
    )
    def test_alpha_of_a_layer_that_inference_mode_has_seen(self, change):
        with torch.inference_mode():
            layer = change(LoRALayer(6, 3, 2, 1.0))
        layer.alpha = 5.0
        assert layer.alpha == layer.scale == layer.scale_tensor == 5.0
        assert not layer.scale_tensor.is_inference()

    def test_a_scale_that_cannot_be_written_changes_nothing(self):
        layer = LoRALayer(6, 3, 2, 1.0)
        layer.scale_tensor = None
        for name, value in (("alpha", 5.0), ("scaling", "alpha/rank")):
            with pytest.raises(AttributeError):
                setattr(layer, name, value)
        assert layer.alpha == 1.0 and layer.scaling == "alpha"

    def test_alpha_takes_effect_at_once(self):
        layer = fill(LinearWithLoRA(nn.Linear(6, 3), 4, 1.0))
        x = torch.randn(5, 6)
        branch = layer(x) - layer.linear(x)
        layer.lora.alpha = -3.0
        torch.testing.assert_close(layer(x) - layer.linear(x), -3.0 * branch, atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize(
        "value, error",
        [
            (bad, TypeError)
            for bad in ("1", None, True, nn.Linear(2, 2), nn.Parameter(torch.ones(())))
        ]
        + [(bad, ValueError) for bad in (float("nan"), float("inf"), 1e39, 10**400)],
    )
    def test_a_bad_alpha_changes_nothing(self, value, error):
        layer = LoRALayer(6, 3, 2, 1.5)
        with pytest.raises(error, match="alpha must be"):
            layer.alpha = value
        assert layer.alpha == 1.5 and layer.scale_tensor == 1.5
        with pytest.raises(error, match="alpha must be"):
            LoRALayer(6, 3, 2, value)

    def test_another_scaling_takes_effect_at_once(self):
        layer = LoRALayer(6, 3, 4, 8.0)
        layer.scaling = "alpha/rank"
        assert layer.scale == layer.scale_tensor == 2.0
        with pytest.raises(ValueError, match="scaling must be one of"):
            layer.scaling = ["alpha"]
        assert layer.scale == layer.scale_tensor == 2.0


SPARSE = (torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr, torch.Tensor.to_sparse_csc)


class TestDtypesAndDevices:
    @pytest.mark.parametrize("given, dtype", [(None, torch.bfloat16), (torch.float32,) * 2])
    def test_adapters_take_the_bases_dtype_unless_told(self, given, dtype):
        layer = fill(LinearWithLoRA(nn.Linear(6, 3).bfloat16(), 2, 1.0, dtype=given))
        y = layer(torch.randn(4, 6).bfloat16())
        y.float().sum().backward()
        assert y.dtype == layer.weight.grad.dtype == torch.bfloat16
        assert layer.lora.A.dtype == layer.lora.A.grad.dtype == dtype

    def test_a_meta_base_gets_meta_adapters_and_can_be_materialised(self):
        with torch.device("meta"):
            model = Block()
        replace_linear_with_lora(model, 2, 4.0)
        assert all(p.is_meta for p in model.parameters())
        assert model(torch.randn(3, 12, device="meta")).shape == (3, 5)
        real = model.to_empty(device="cpu")
        real.load_state_dict(pair(rank=2)[1].state_dict())
        assert torch.isfinite(real(torch.randn(3, 12))).all()
        assert all(layer.lora.scale_tensor == 4.0 for _, layer in lora_layers(real))

    def test_a_meta_layer_can_be_loaded_by_assignment(self):
        """Which moves no tensor but those of the state: compiled code must read a scale that was written."""
        with torch.device("meta"):
            model = Block()
            replace_linear_with_lora(model, 2, 4.0)
        model.load_state_dict(pair(rank=2, alpha=4.0)[1].state_dict(), assign=True)
        for _, layer in lora_layers(model):
            assert layer.lora.scale_tensor.device.type == "cpu" and layer.lora.scale_tensor == 4.0
        x = torch.randn(3, 12)
        torch.testing.assert_close(torch.compile(model, backend="aot_eager")(x), model(x))

    def test_a_meta_layer_can_be_filled_parameter_by_parameter(self):
        """As `accelerate` does, which tells no module."""
        layer = LinearWithLoRA(nn.Linear(6, 3, device="meta"), 2, 4.0)
        for module, name, shape in (
            (layer, "weight", (3, 6)),
            (layer, "bias", (3,)),
            (layer.lora, "A", (6, 2)),
            (layer.lora, "B", (2, 3)),
        ):
            setattr(module, name, nn.Parameter(torch.randn(shape)))
        x = torch.randn(5, 6)
        torch.testing.assert_close(torch.compile(layer, backend="aot_eager")(x), layer(x))

    def test_float64_keeps_alpha_in_float64(self):
        layer = fill(LinearWithLoRA(nn.Linear(6, 3), 3, 0.1)).double()
        x = torch.randn(4, 6, dtype=torch.float64)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=1e-14)
        loaded = LinearWithLoRA(nn.Linear(6, 3), 3, 0.1)
        loaded.load_state_dict(layer.state_dict(), assign=True)
        assert loaded.lora.scale_tensor.item() == 0.1

    @pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
    def test_adapters_of_a_quantized_base_can_be_trained(self, dtype):
        linear = nn.Linear(6, 3).requires_grad_(False)
        linear.weight.data = linear.weight.data.to(dtype)
        layer = LinearWithLoRA(linear, 2, 1.0)
        assert layer.lora.A.dtype == layer.lora.B.dtype == torch.get_default_dtype()

    def test_a_lazy_linear_is_refused(self):
        with pytest.raises(ValueError, match="linear must have its sizes"):
            LinearWithLoRA(nn.LazyLinear(4), 2, 1.0)

    def test_nested_inputs(self):
        layer = fill(LinearWithLoRA(nn.Linear(6, 3), 2, 1.5))
        rows = [torch.randn(2, 6), torch.randn(4, 6)]
        y = layer(torch.nested.nested_tensor(rows, layout=torch.jagged))
        for actual, row in zip(y.unbind(), rows, strict=True):
            torch.testing.assert_close(actual, layer(row))

    @pytest.mark.parametrize("sparse", SPARSE)
    def test_sparse_inputs(self, sparse):
        layer = fill(LinearWithLoRA(nn.Linear(6, 3), 2, 1.5))
        x = torch.eye(6)
        torch.testing.assert_close(layer(sparse(x)), layer(x))

    def test_a_cast_while_merged_casts_what_is_kept(self):
        layer = fill(LinearWithLoRA(nn.Linear(6, 3), 2, 1.5))
        before = layer.weight.detach().bfloat16()
        merge_lora(layer)
        layer.bfloat16()
        assert {t.dtype for t in layer.state_dict().values()} == {torch.bfloat16}
        unmerge_lora(layer)
        assert torch.equal(layer.weight, before)

    def test_casting_the_model_does_not_round_the_scale(self):
        layer = LinearWithLoRA(nn.Linear(6, 3), 3, 0.1, scaling="alpha/rank").bfloat16()
        assert layer.lora.scale_tensor.dtype == torch.float32
        assert layer.lora.scale_tensor.item() == pytest.approx(0.1 / 3, rel=1e-7)


class TestCopies:
    def check(self, copied, layer):
        x = torch.randn(4, 6)
        assert torch.equal(copied(x), layer(x))
        copied.lora.alpha = 5.0
        assert layer.lora.alpha == 2.0 and layer.lora.scale_tensor == 2.0
        assert copied.lora.A.data_ptr() != layer.lora.A.data_ptr()

    @pytest.mark.parametrize("used", [False, True], ids=["fresh", "after a step"])
    def test_deepcopy_and_pickle(self, used):
        layer = fill(LinearWithLoRA(nn.Linear(6, 3), 2, 2.0, dropout=0.1)).eval()
        if used:
            layer(torch.randn(4, 6)).sum().backward()
        self.check(copy.deepcopy(layer), layer)
        self.check(pickle.loads(pickle.dumps(layer)), layer)

    def test_saving_the_state_with_weights_only(self):
        layer = fill(LinearWithLoRA(nn.Linear(6, 3), 2, 2.0))
        other = LinearWithLoRA(nn.Linear(6, 3), 2, 2.0)
        other.load_state_dict(reloaded(layer.state_dict(), weights_only=True))
        self.check(other, layer)


class TestHooks:
    """What is attached to the inner modules runs, and changes the result as it does with the reference."""

    @pytest.fixture
    def layer(self):
        return fill(LinearWithLoRA(nn.Linear(6, 3), 2, 2.0))

    @pytest.mark.parametrize("inner", ["linear", "lora"])
    def test_forward_hook(self, layer, inner):
        x = torch.randn(4, 6)
        before = layer(x)
        handle = getattr(layer, inner).register_forward_hook(lambda module, args, out: out + 1.0)
        torch.testing.assert_close(layer(x), before + 1.0)
        handle.remove()
        torch.testing.assert_close(layer(x), before)

    def test_hooks_on_the_layer_itself_keep_it_fused(self, layer):
        seen = []
        layer.register_forward_hook(lambda module, args, out: seen.append(out))
        y = layer(torch.randn(4, 6))
        assert is_plain(layer.linear, layer.lora) and seen[0] is y

    def test_parametrized_weight(self, layer):
        x = torch.randn(4, 6)
        expected = nn.functional.linear(x, 2 * layer.weight, layer.bias) + layer.lora(x)
        parametrize.register_parametrization(layer.linear, "weight", Doubled())
        torch.testing.assert_close(layer(x), expected)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    @pytest.mark.parametrize("inner", ["linear", "lora"])
    def test_autocast_gives_the_dtype_of_linear(self, layer, dtype, inner):
        getattr(layer.to(dtype), inner).register_forward_hook(lambda *call: None)
        x = torch.randn(4, 6).to(dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, want = layer(x), layer.linear(x).dtype
        assert y.dtype == want
        torch.testing.assert_close(y.double(), layer.double()(x.double()), atol=0.05, rtol=0.05)

    @pytest.mark.parametrize("hooked", [False, True])
    def test_a_parametrization_runs_once(self, layer, hooked):
        """Those of a spectral norm go on with each reading of the weight."""
        readings = []

        class Counted(nn.Module):
            def forward(self, weight):
                readings.append(1)
                return weight

        parametrize.register_parametrization(layer.linear, "weight", Counted())
        if hooked:
            layer.linear.register_forward_hook(lambda *call: None)
        readings.clear()
        layer(torch.randn(4, 6, requires_grad=True))
        assert len(readings) == 1

    def test_a_parametrization_to_a_tensor_that_computes_by_itself(self, layer):
        class Doubling(torch.Tensor):
            @classmethod
            def __torch_function__(cls, function, types, args=(), kwargs=None):
                with torch._C.DisableTorchFunctionSubclass():
                    y = function(*args, **(kwargs or {}))
                return 2 * y if function is nn.functional.linear else y

        class Own(nn.Module):
            def forward(self, weight):
                return weight.as_subclass(Doubling)

        parametrize.register_parametrization(layer.linear, "weight", Own(), unsafe=True)
        x = torch.randn(4, 6)
        torch.testing.assert_close(layer(x), layer.linear(x) + layer.lora(x))

    def test_a_subclass_with_a_forward_of_its_own(self):
        class Noisy(nn.Linear):
            def forward(self, x):
                return super().forward(x) + 7.0

        layer = LinearWithLoRA(Noisy(6, 3), 2, 1.0)
        x = torch.randn(4, 6)
        torch.testing.assert_close(layer(x), layer.linear(x))

    @pytest.mark.parametrize("inner, other", [("linear", "lora"), ("lora", "linear")])
    def test_a_replaced_forward(self, layer, inner, other):
        x = torch.randn(4, 6)
        rest = getattr(layer, other)(x)
        getattr(layer, inner).forward = lambda t: torch.full((4, 3), 7.0)
        torch.testing.assert_close(layer(x), rest + 7.0)

    @pytest.mark.parametrize(
        "kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"]
    )
    @pytest.mark.parametrize("inner", ["linear", "lora", "all"])
    def test_every_kind_of_hook_runs(self, layer, kind, inner):
        """On one inner module, or on all modules of the process."""
        seen = []
        register = {
            "all": getattr(torch.nn.modules.module, f"register_module_{kind}_hook"),
            "linear": getattr(layer.linear, f"register_{kind}_hook"),
            "lora": getattr(layer.lora, f"register_{kind}_hook"),
        }[inner]
        handle = register(lambda module, *_: seen.append(module))
        try:
            layer(torch.randn(4, 6, requires_grad=True)).sum().backward()
        finally:
            handle.remove()
        wanted = [layer.linear, layer.lora] if inner == "all" else [getattr(layer, inner)]
        assert [m for m in wanted if m in seen] == wanted
        seen.clear()
        layer(torch.randn(4, 6))
        assert not seen

    def test_dropout_follows_the_mode_of_lora(self, layer):
        """As the reference's own Dropout would: `lora` can be in another mode than the layer."""
        layer.lora.dropout = 0.5
        x = torch.randn(4, 6)
        expected = layer.linear(x) + 2.0 * (x @ layer.lora.A @ layer.lora.B)
        layer.train().lora.eval()
        torch.testing.assert_close(layer(x), expected)
        layer.eval().lora.train()
        assert not torch.allclose(layer(x), expected)


class TestConv1D:
    """Transformers' Conv1D, a Linear that stores its weight transposed."""

    @pytest.fixture
    def layer(self):
        conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
        return fill(LinearWithLoRA(conv1d(3, 6), 2, 2.0))

    def test_output_and_every_gradient(self, layer):
        nn.init.normal_(layer.linear.bias)
        x = torch.randn(2, 5, 6, requires_grad=True)
        both = (lambda x, *_: layer(x)), (lambda x, *_: layer.linear(x) + layer.lora(x))
        torch.testing.assert_close(*(with_gradients(f, (x, *layer.parameters())) for f in both))

    def test_names_and_sizes(self, layer):
        assert list(layer.state_dict()) == ["linear.weight", "linear.bias", "lora.A", "lora.B"]
        assert (layer.in_features, layer.out_features) == (6, 3)
        assert layer.weight is layer.linear.weight and layer.weight.shape == (6, 3)

    def test_the_weight_is_not_copied(self, layer, monkeypatch):
        seen = []
        monkeypatch.setattr(
            "lora_kernels.bases.lora_linear", lambda x, weight, *_, **__: seen.append(weight)
        )
        layer(torch.randn(4, 6))
        assert seen[0].shape == (3, 6) and seen[0].data_ptr() == layer.weight.data_ptr()

    def test_hooks_run(self, layer):
        x = torch.randn(4, 6)
        before = layer(x)
        layer.linear.register_forward_hook(lambda module, args, out: out + 1.0)
        torch.testing.assert_close(layer(x), before + 1.0)

    def test_compiled(self, layer):
        x = torch.randn(4, 6)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), layer(x))

    def test_another_module_of_that_name_is_none(self):
        class Conv1D(nn.Module):
            weight = torch.ones(6, 3)

        with pytest.raises(TypeError, match=r"linear must be a torch\.nn\.Linear"):
            LinearWithLoRA(Conv1D(), 2, 1.0)


class TestReplace:
    def test_names_in_order(self):
        model = Block()
        assert replace_linear_with_lora(model, 2, 1.0) == ["q_proj", "mlp.0", "mlp.2", "head"]
        assert isinstance(model.mlp[2], LinearWithLoRA) and isinstance(model.norm, nn.LayerNorm)

    def test_a_second_call_wraps_nothing_twice(self):
        model = Block()
        replace_linear_with_lora(model, 2, 1.0)
        keys = list(model.state_dict())
        assert replace_linear_with_lora(model, 2, 1.0) == []
        assert list(model.state_dict()) == keys
        assert replace_linear_with_lora(model.head, 2, 1.0) == []

    def test_layers_of_peft_are_wrapped_already(self):
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "head"])
        model = peft.get_peft_model(Block(), config)
        names = replace_linear_with_lora(model, 2, 1.0)
        assert [name.rpartition("model.")[2] for name in names] == ["mlp.0", "mlp.2"]

    def test_a_model_that_the_books_own_classes_wrapped_stays_as_it_is(self):
        model = Block()
        reference.replace_linear_with_lora(model.mlp, 2, 1.0)
        keys = list(model.mlp.state_dict())
        assert replace_linear_with_lora(model, 2, 1.0) == ["q_proj", "head"]
        assert list(model.mlp.state_dict()) == keys
        assert replace_linear_with_lora(model.mlp[0], 2, 1.0) == []

    def test_a_wrapper_is_in_the_mode_of_its_linear(self):
        """Dropout in a model that was set to eval before would make its outputs random."""
        model = Block().eval()
        model.head.train()
        replace_linear_with_lora(model, 2, 1.0, dropout=0.5)
        modes = {name: layer.lora.training for name, layer in lora_layers(model)}
        assert modes == {"q_proj": False, "mlp.0": False, "mlp.2": False, "head": True}
        assert not model.q_proj.training and model.head.training

    def test_weights_are_tied_by_assignment(self):
        """As Hugging Face models do with their output layer."""
        layer, embedding = LinearWithLoRA(nn.Linear(6, 9), 2, 1.0), nn.Embedding(9, 6)
        layer.weight = embedding.weight
        layer.bias = None
        assert layer.linear.weight is embedding.weight and layer.linear.bias is None
        assert sorted(name for name, _ in layer.named_parameters()) == [
            "linear.weight", "lora.A", "lora.B",
        ]  # fmt: skip

    @pytest.mark.parametrize(
        "target, names",
        [
            (["q_proj", "head"], ["q_proj", "head"]),
            (["mlp.0"], ["mlp.0"]),
            (["0"], ["mlp.0"]),
            (["lp.0"], None),
            (["mlp"], None),
            ([r"proj"], None),
            (r"mlp\.\d", ["mlp.0", "mlp.2"]),
            (r".*", ["q_proj", "mlp.0", "mlp.2", "head"]),
        ],
    )
    def test_targets(self, target, names):
        model = Block()
        if names is None:
            with pytest.raises(ValueError, match="target_modules must name a Linear"):
                replace_linear_with_lora(model, 2, 1.0, target_modules=target)
            assert not list(lora_layers(model))
        else:
            assert replace_linear_with_lora(model, 2, 1.0, target_modules=target) == names

    def test_a_shared_module_is_wrapped_once(self):
        model = nn.Module()
        model.first = model.second = nn.Linear(4, 4)
        model.inner = nn.ModuleDict({"third": model.first})
        assert replace_linear_with_lora(model, 2, 1.0) == ["first", "second", "inner.third"]
        assert model.first is model.second is model.inner["third"]
        assert len(list(lora_parameters(model))) == 2

    def test_tied_parameters_stay_tied(self):
        embedding, head = nn.Embedding(10, 6), nn.Linear(6, 10, bias=False)
        head.weight = embedding.weight
        model = nn.Sequential(embedding, head)
        replace_linear_with_lora(model, 2, 1.0)
        assert model[1].linear.weight is embedding.weight

    def test_multihead_attention_keeps_its_projection(self):
        model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "out": nn.Linear(8, 8)})
        with pytest.warns(UserWarning, match="attention.out_proj is left alone"):
            assert replace_linear_with_lora(model, 2, 1.0) == ["out"]
        x = torch.randn(3, 1, 8)
        assert torch.isfinite(model["attention"](x, x, x)[0]).all()

    @pytest.mark.parametrize("padded", [0, 2])
    @pytest.mark.parametrize(
        "wrapped", [["linear1", "linear2"], ["layers.1.linear1"], ["layers.1.linear2"]]
    )
    def test_the_encoders_inference_paths_do_not_bypass_the_branch(self, wrapped, padded):
        """They read linear1.weight. The nested one, which padding leads to, starts at the encoder and asks layer 0 alone."""
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        encoder = nn.TransformerEncoder(layer, 2)
        replace_linear_with_lora(encoder, 2, 1.0, target_modules=wrapped)
        fill(encoder)
        x, padding = torch.randn(2, 5, 8), torch.zeros(2, 5, dtype=torch.bool)
        padding[1, 5 - padded :] = True
        options = {"src_key_padding_mask": padding} if padded else {}
        trained = encoder.train()(x, **options)[~padding]
        with torch.no_grad():
            evaluated = encoder.eval()(x, **options)[~padding]
        torch.testing.assert_close(evaluated, trained, atol=1e-5, rtol=1e-4)
        assert not encoder.use_nested_tensor

    def test_a_linear_that_is_compiled_by_itself(self):
        """It is called past its place: nothing would be adapted."""
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model[1] = torch.compile(model[1])
        with pytest.raises(
            ValueError, match=r"1\._orig_mod must have its adapter before it is comp"
        ):
            replace_linear_with_lora(model, 2, 1.0)
        assert not lora_layers(model)
        assert replace_linear_with_lora(torch.compile(model), 2, 1.0, target_modules=["0"])

    def test_a_root_that_is_a_linear_says_so(self):
        linear = nn.Linear(4, 4)
        with pytest.warns(UserWarning, match="itself a Linear"):
            assert replace_linear_with_lora(linear, 2, 1.0) == []

    @pytest.mark.parametrize(
        "change, error, message",
        [
            ({"rank": 0}, ValueError, "rank must be positive, got 0"),
            ({"rank": -2}, ValueError, "rank must be positive, got -2"),
            ({"rank": 2.0}, TypeError, "rank must be an integer, got float"),
            ({"alpha": "2"}, TypeError, "alpha must be a real number, got str"),
            ({"scaling": "alpha/2"}, ValueError, "scaling must be one of"),
            ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1.0"),
            ({"dropout": float("nan")}, ValueError, r"dropout must be in \[0, 1\)"),
            ({"target_modules": ["nothing"]}, ValueError, "no match"),
            ({"target_modules": "("}, ValueError, "target_modules must be a regular expression"),
            ({"target_modules": [3]}, TypeError, "target_modules must be strings"),
            ({"target_modules": 3}, TypeError, "target_modules must be a string or strings, got"),
            ({"dtype": torch.float8_e4m3fn}, TypeError, "dtype must be float32, bfloat16"),
            ({"dtype": torch.int32}, TypeError, "dtype must be float32, bfloat16"),
        ],
    )
    def test_bad_arguments_leave_the_model_as_it_was(self, change, error, message):
        model = Block()
        before = dict(model.named_modules())
        with pytest.raises(error, match=message):
            replace_linear_with_lora(model, **{"rank": 2, "alpha": 1.0, **change})
        assert dict(model.named_modules()) == before

    def test_only_a_linear_can_be_wrapped(self):
        with pytest.raises(
            TypeError, match=r"linear must be a torch\.nn\.Linear or .*, got Conv1d"
        ):
            LinearWithLoRA(nn.Conv1d(3, 3, 1), 2, 1.0)


CHECKPOINT_WRAPPER = "torch.distributed.algorithms._checkpoint.checkpoint_wrapper"


class TestManagement:
    def test_freeze_base(self):
        model = Block()
        replace_linear_with_lora(model, 2, 1.0)
        freeze_base(model)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trained == set(lora_state_dict(model)) and len(trained) == 8
        model(torch.randn(4, 12)).sum().backward()
        assert all((p.grad is not None) == p.requires_grad for p in model.parameters())

    def test_a_parametrized_adapter(self):
        """What A is computed from is the adapter's: trained, and part of its state."""
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))
        replace_linear_with_lora(model, 2, 1.0)
        parametrize.register_parametrization(model[0].lora, "A", Doubled())
        original = model[0].lora.parametrizations.A.original
        assert [id(p) for p in lora_parameters(model)] == [
            id(p) for p in (model[0].lora.B, original, model[1].lora.A, model[1].lora.B)
        ]
        freeze_base(model)
        assert original.requires_grad and not model[0].linear.weight.requires_grad
        keys = ["0.lora.B", "0.lora.parametrizations.A.original", "1.lora.A", "1.lora.B"]
        assert list(lora_state_dict(model)) == keys
        fill(model)(torch.randn(4, 6)).sum().backward()
        assert original.grad.any()

    def test_an_adapter_in_two_layers_is_trained_once(self):
        model = nn.Sequential(*(LinearWithLoRA(nn.Linear(4, 4), 2, 1.0) for _ in range(2)))
        model[1].lora.A = model[0].lora.A
        parameters = list(lora_parameters(model))
        assert len(parameters) == len({id(p) for p in parameters}) == 3

    @pytest.mark.parametrize("model", [None, "model", nn.Linear])
    @pytest.mark.parametrize(
        "call",
        [
            lambda model: replace_linear_with_lora(model, 2, 1.0),
            lambda model: list(lora_layers(model)),
            lambda model: list(lora_parameters(model)),
            freeze_base,
            lora_state_dict,
            merge_lora,
            unmerge_lora,
        ],
    )
    def test_what_is_no_module(self, call, model):
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got"):
            call(model)

    def test_lora_state_dict_is_the_adapters_part(self):
        model = pair()[1]
        state = lora_state_dict(model)
        assert list(state)[:2] == ["q_proj.lora.A", "q_proj.lora.B"] and len(state) == 8
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())
        model.load_state_dict(state, strict=False)

    def test_a_layer_whose_name_starts_another(self):
        """Layer 1 is no part of layer 10."""
        model = nn.ModuleDict({"1": LoRALayer(4, 4, 2, 1.0), "10": nn.Linear(4, 4)})
        assert list(lora_state_dict(model)) == ["1.A", "1.B"]
        assert list(lora_state_dict(model["1"])) == ["A", "B"]

    def test_the_state_under_activation_checkpointing(self):
        """Its wrapper is in the names of modules and not in those of the state."""
        model = nn.Sequential(pair()[1], LinearWithLoRA(nn.Linear(6, 3), 2, 1.0))
        names = list(lora_state_dict(model))
        wrap = pytest.importorskip(CHECKPOINT_WRAPPER).checkpoint_wrapper
        for name in ("0.mlp.0", "0.mlp", "1.lora", "0"):
            model.set_submodule(name, wrap(model.get_submodule(name)))
        state = lora_state_dict(nn.ModuleDict({"model": model}))
        assert list(state) == [f"model.{name}" for name in names] and len(names) == 10
        assert list(lora_state_dict(wrap(LoRALayer(4, 4, 2, 1.0)))) == ["A", "B"]
        compiled = torch.compile(model, backend="eager")
        assert lora_state_dict(compiled).keys() <= compiled.state_dict().keys()
        assert len(lora_state_dict(compiled)) == 10

    def test_repr_names_the_sizes(self):
        text = repr(LinearWithLoRA(nn.Linear(6, 3), 2, 1.0, scaling="alpha/rank", dropout=0.1))
        assert all(word in text for word in ("rank=2", "alpha/rank", "dropout=0.1", "in_dim=6"))


class TestTracersOfPythonCode:
    """torch.fx.symbolic_trace and torch.jit.script say what to use instead; a tracer may take the layer as a leaf."""

    net = staticmethod(lambda: nn.Sequential(LinearWithLoRA(nn.Linear(6, 5), 2, 1.0), nn.ReLU()))

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    @pytest.mark.parametrize("pick", [lambda net: net, lambda net: net[0]], ids=["net", "layer"])
    def test_they_are_refused_by_name(self, pick):
        with pytest.raises(TypeError, match=r"got Proxy: torch\.fx\.symbolic_trace.*torch\.export"):
            torch.fx.symbolic_trace(pick(self.net()))
        with pytest.raises(TypeError, match=r"cannot be scripted: .*torch\.jit\.trace"):
            torch.jit.script(pick(self.net()))

    def test_a_tracer_with_the_layer_as_a_leaf(self):
        class Tracer(torch.fx.Tracer):
            def is_leaf_module(self, module, name):
                return isinstance(module, LinearWithLoRA) or super().is_leaf_module(module, name)

        net = self.net()
        nn.init.normal_(net[0].lora.B)
        traced = torch.fx.GraphModule(net, Tracer().trace(net))
        x = torch.randn(3, 6)
        torch.testing.assert_close(traced(x), net(x))
        net[0].lora.alpha = 3.0
        torch.testing.assert_close(traced(x), net(x))


def test_alpha_may_be_set_in_compiled_code(fresh_dynamo):
    layer = LinearWithLoRA(nn.Linear(6, 4), rank=2, alpha=1.0)
    nn.init.normal_(layer.lora.B)
    x = torch.randn(3, 6)

    @torch.compile(backend="eager", fullgraph=True)
    def doubled(x):
        layer.lora.alpha = 2.0
        return layer(x)

    y = doubled(x)
    assert layer.lora.alpha == 2.0
    torch.testing.assert_close(y, layer(x))
