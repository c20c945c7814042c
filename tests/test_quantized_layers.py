"""LoRA over quantised layers: against float64 of the weight as its own library dequantises it, and against its forward."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_kernels import (
    LinearWithLoRA,
    bases,
    freeze_base,
    load_adapter,
    lora_linear,
    lora_parameters,
    merge_lora,
    replace_linear_with_lora,
    save_adapter,
    unmerge_lora,
)
from lora_kernels.mixed import LinearWithAdapters
from lora_kernels.modules import lora_layers
from lora_kernels.quantized import FP8Weight, from_bitsandbytes
from tests.oracle import (
    assert_bits,
    check_function,
    named_gradients,
    reference,
    saved_inside,
    second_derivatives,
    with_gradients,
)
from tests.test_modules import reloaded

bnb = pytest.importorskip("bitsandbytes")

K, N, R = 128, 64, 4  # whole blocks: where bitsandbytes is right on every CPU


def linear4bit(bias=True, width=K, **options):
    torch.manual_seed(5)
    options = {"quant_type": "nf4", **options}
    return bnb.nn.Linear4bit(width, N, bias=bias, **options).to("cpu").requires_grad_(False)


def linear8bit(bias=True, threshold=0.0):
    torch.manual_seed(5)
    options = {"has_fp16_weights": False, "threshold": threshold}
    return bnb.nn.Linear8bitLt(K, N, bias=bias, **options).to("cpu").requires_grad_(False)


def fp8_linear(bias=True, block=(128, 128), width=K, rows=N, **options):
    module = pytest.importorskip("transformers.integrations.finegrained_fp8")
    linear = module.FP8Linear(width, rows, block, has_bias=bias, **options)
    torch.manual_seed(5)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(rows, width))
        linear.weight_scale_inv.copy_(0.5 + torch.rand(linear.weight_scale_inv.shape))
        if bias:
            linear.bias.normal_()
    return linear.requires_grad_(False)


BASES = {
    "nf4": linear4bit,
    "nf4-plain": lambda **o: linear4bit(compress_statistics=False, **o),
    "nf4-bf16-storage": lambda **o: linear4bit(quant_storage=torch.bfloat16, **o),
    "int8": linear8bit,
    "fp8": fp8_linear,
}


def dense(linear):
    """W in float64 as the layer's own library makes it of its codes."""
    if isinstance(linear, bnb.nn.Linear4bit):
        weight = linear.weight
        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state).double()
    if isinstance(linear, bnb.nn.Linear8bitLt):
        scales = linear.weight.SCB if linear.weight.SCB is not None else linear.state.SCB
        return linear.weight.data.double() * (scales.float() * (1 / 127.0)).double()[:, None]
    from transformers.integrations import finegrained_fp8

    parts = linear.weight.data, linear.weight_scale_inv.data, linear.block_size
    return finegrained_fp8._dequantize_fp8_weight(*parts, torch.float64)


def layer_of(linear, **options):
    """A layer over it whose adapter is not zero."""
    torch.manual_seed(6)
    layer = LinearWithLoRA(linear, R, 0.5, **options)
    nn.init.normal_(layer.lora.B)
    return layer


def given(dtype=torch.float32, width=K):
    torch.manual_seed(7)
    return torch.randn(3, 5, width).to(dtype).requires_grad_(), torch.randn(3, 5, N).to(dtype)


def step(layer, x, dy=None, call=None):
    """y and the gradients of x and of what the layer trains."""
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    return with_gradients(lambda x, *_: (layer if call is None else call)(x), leaves, dy)


class TestTheLayer:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("kind", BASES)
    def test_values_and_gradients(self, kind, bias, dtype):
        linear = BASES[kind](bias=bias)
        layer, (x, dy) = layer_of(linear, dtype=dtype), given(dtype)
        weight = dense(linear).to(dtype)  # both round it, before anything else

        def plain(x, A, B):
            bias = None if linear.bias is None else linear.bias.to(x.dtype)
            return reference(x, weight.to(x.dtype), A, B, 0.5, bias)

        check_function(lambda x, *_: layer(x), plain, (x, *layer.lora.parameters()), dy)

    @pytest.mark.parametrize("mode", [None, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("compute", [None, torch.float32, torch.bfloat16], ids=str)
    def test_casts_are_those_of_linear4bit(self, compute, dtype, mode):
        """y has x's dtype, computed in compute_dtype; under autocast as well, where bitsandbytes rounds on a CPU."""
        layer, (x, _) = layer_of(linear4bit(compute_dtype=compute)), given(dtype)
        layer.lora.B.data.zero_()
        with torch.autocast("cpu", mode) if mode else nullcontext():
            ours = layer(x)
            theirs = copy.deepcopy(layer.linear)(x)
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
        if compute == dtype == torch.float32 and mode is None:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        assert layer.linear.compute_type_is_set == (compute is not None)  # nothing of it is set
        if compute == torch.float32:
            x = x.detach().float()
            with torch.autocast("cpu", torch.bfloat16):
                under = layer(x)  # autocast would have it computed in bfloat16
            assert torch.equal(under, layer(x))

    @pytest.mark.parametrize("threshold", [0.0, 6.0])
    @pytest.mark.parametrize("mode", [None, torch.bfloat16], ids=str)
    def test_casts_are_those_of_linear8bit(self, mode, threshold):
        layer, (x, _) = layer_of(linear8bit(threshold=threshold)), given()
        layer.lora.B.data.zero_()
        for training in (True, False):
            layer.train(training)
            with torch.autocast("cpu", mode) if mode else nullcontext():
                ours = layer(x)
                theirs = copy.deepcopy(layer.linear)(x)
            assert ours.dtype == theirs.dtype
            # Without training bitsandbytes rounds x to 8 bits as well.
            torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)
            if training and mode is None:
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)

    def test_int8_before_and_after_bitsandbytes_own_forward(self):
        layer, (x, _) = layer_of(linear8bit()), given()
        before = layer(x)
        assert layer.linear.weight.SCB is not None
        layer.linear(x)
        assert layer.linear.weight.SCB is None  # it is in the layer's state now
        assert torch.equal(layer(x), before)

    def test_outliers_are_left_to_bitsandbytes(self):
        """Where it computes them: not while training on a CPU."""
        layer, (x, _) = layer_of(linear8bit(threshold=1.0)), given()
        assert bases.why_unreadable(layer.linear) is None
        layer.eval()
        assert "threshold must be 0 where" in bases.why_unreadable(layer.linear)
        assert torch.equal(layer(x), layer.linear(x) + layer.lora(x))

    @pytest.mark.parametrize(
        "block, width, rows", [((128, 128), 200, 130), ((64, 32), 72, 65), (None, 96, 40)]
    )
    def test_blocks_of_fp8_that_are_not_whole(self, block, width, rows):
        linear = fp8_linear(block=block, width=width, rows=rows)
        exact = dense(linear)
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            weight = bases.quantized_weight(linear, dtype)
            rounded = exact.float().to(dtype)  # the product of code and scale is a float32
            assert weight.shape == (rows, width) and torch.equal(weight.dense(), rounded)
            assert torch.equal(weight.t().dense(), rounded.t())

    def test_fp8_scales_that_are_powers_of_two(self):
        linear = fp8_linear(scale_fmt="ue8m0", width=256)
        assert linear.weight_scale_inv.dtype == torch.float8_e8m0fnu
        assert torch.equal(bases.quantized_weight(linear).dense().double(), dense(linear))

    def test_an_fp8_layer_that_was_dequantised(self):
        linear = fp8_linear()
        weight = dense(linear).float()
        linear.weight = nn.Parameter(weight)
        layer, (x, _) = layer_of(linear), given()
        torch.testing.assert_close(layer(x), linear(x) + layer.lora(x))
        torch.autograd.grad(layer(x).sum(), linear.weight)

    def test_the_transposed_parameter_and_a_lost_state(self):
        linear = linear4bit()
        state, plain = linear.weight.quant_state, linear.weight.data
        for weight in (linear.weight.t(), plain, plain.t()):
            found = from_bitsandbytes(weight, state=state)
            assert torch.equal(found.dense().double(), dense(linear))

    def test_the_sizes_are_those_of_the_layer(self):
        linear = linear4bit()
        linear.weight.quant_state.shape = torch.Size([K, N])
        words = r"quant_state.shape must be .* = \[64, 128\], got \[128"
        with pytest.raises(ValueError, match=words):
            layer_of(linear)


class TestGradients:
    @pytest.mark.parametrize("kind", BASES)
    def test_packed_tensors_are_saved_and_never_w(self, kind):
        linear = BASES[kind]()
        layer, (x, _) = layer_of(linear), given()
        with saved_inside() as kept:
            layer(x)
        wide = [t for t in kept if t.is_floating_point() and t.itemsize > 1 and t.numel() >= N * K]
        assert not wide
        packed = bases.quantized_weight(linear).tensors[0]
        assert any(t.data_ptr() == packed.data_ptr() for t in kept)

    def test_second_derivatives_and_transforms(self):
        layer = layer_of(linear4bit()).double()
        weight, bias = dense(layer.linear), layer.linear.bias

        def ours(x, A, B):
            return torch.func.functional_call(layer, {"lora.A": A, "lora.B": B}, (x,))

        def plain(x, A, B):
            return reference(x, weight, A, B, 0.5, bias)

        x = torch.randn(2, K, dtype=torch.float64, requires_grad=True)
        args = x, layer.lora.A, layer.lora.B
        for transform in (
            lambda f: second_derivatives(f, args),
            lambda f: torch.func.jvp(f, args, tuple(map(torch.ones_like, args))),
            lambda f: torch.func.vmap(f, (0, None, None))(*args),
            lambda f: torch.func.jacrev(f, (0, 1, 2))(*args),
            lambda f: torch.func.jacfwd(f, 1)(*args),
        ):
            torch.testing.assert_close(transform(ours), transform(plain))

    @pytest.mark.parametrize("kind", ["nf4-bf16-storage", "fp8"])
    def test_none_for_the_base(self, kind):
        linear = BASES[kind]()
        linear.weight.requires_grad_()
        layer, (x, _) = layer_of(linear), given()
        with pytest.raises(ValueError, match=r"weight must not require grad: .* freeze_base"):
            layer(x)
        freeze_base(layer)
        layer(x).sum().backward()
        assert x.grad is not None and linear.weight.grad is None

    def test_a_bias_may_be_trained(self):
        linear = linear4bit()
        linear.bias.requires_grad_()
        layer, (x, dy) = layer_of(linear), given()
        (found,) = torch.autograd.grad(layer(x), linear.bias, dy)
        torch.testing.assert_close(found, dy.sum((0, 1)))

    def test_training_after_evaluation(self):
        """bitsandbytes reorders the weight in an eval() forward on some CPUs, and then computes no gradient of x."""
        linear = linear4bit()
        linear.support_avx512bf16_for_cpu = True
        layer, (x, dy) = layer_of(linear), given()
        before = step(layer, x, dy)
        layer.eval()
        with torch.no_grad():
            assert torch.equal(layer(x), before[0])
        assert not bases.is_reordered(linear)
        assert_bits(step(layer.train(), x, dy), before)

    @pytest.mark.parametrize("adapters", ["fr", ["fr", "__base__", "de"], "__base__"], ids=str)
    @pytest.mark.parametrize("kind", BASES, ids=BASES)
    def test_named_adapters_read_the_packed_weight(self, kind, adapters):
        """A base with several adapters is no call of bitsandbytes, whose eval() forward may leave out the gradient of x."""
        linear = BASES[kind]()
        layer = LinearWithAdapters(linear)
        for name in ("fr", "de"):
            nn.init.normal_(layer.add_adapter(name, R, 0.5).B)
        freeze_base(layer)
        layer.eval()
        with torch.no_grad():
            layer(given()[0], adapters)
        assert not bases.is_reordered(linear)
        x = torch.randn(3, K, requires_grad=True)
        layer.train()(x, adapters).sum().backward()
        names = [adapters] * 3 if isinstance(adapters, str) else adapters
        exact = torch.ones(3, N).double() @ dense(linear).double()
        for i, name in enumerate(names):
            if name != "__base__":
                lora = layer.adapters[name]
                exact[i] += 0.5 * (lora.A @ lora.B).double().sum(1)
        torch.testing.assert_close(x.grad.double(), exact, rtol=1e-3, atol=1e-3)

    def test_named_adapters_over_what_no_product_reads(self):
        """Where a single adapter is declined, several call the base as the module that it is."""
        linear = linear4bit(quant_type="fp4")
        layer = LinearWithAdapters(linear)
        lora = layer.add_adapter("fr", R, 0.5)
        nn.init.normal_(lora.B)
        x = torch.randn(2, K)
        base = linear(x)
        torch.testing.assert_close(layer(x, "__base__"), base)
        torch.testing.assert_close(layer(x, "fr"), base + lora(x))
        torch.testing.assert_close(layer(x, ["__base__", "fr"])[1], (base + lora(x))[1])

    def test_a_reordered_weight_below_a_hook(self):
        linear = linear4bit()
        layer, (x, _) = layer_of(linear), given()
        linear.register_forward_hook(lambda *call: None)
        reorder = bnb.functional._convert_weight_packed_for_cpu
        linear.weight.data, linear.weight.quant_state = reorder(
            linear.weight.data, linear.weight.quant_state
        )
        with pytest.raises(RuntimeError, match="would compute no gradient of x"):
            layer(x)

    def test_a_reordered_weight(self):
        linear = linear4bit()
        layer, (x, _) = layer_of(linear), given()
        reorder = bnb.functional._convert_weight_packed_for_cpu
        linear.weight.data, linear.weight.quant_state = reorder(
            linear.weight.data, linear.weight.quant_state
        )
        words = r"would compute no gradient of x. Call state_dict\(\)"
        with pytest.raises(RuntimeError, match=words):
            layer(x)
        with pytest.raises(ValueError, match="packed row after row, got packing_format_for_cpu"):
            layer_of(linear)
        linear.state_dict()
        layer(x).sum().backward()
        exact = torch.ones(3, 5, N).double() @ (
            dense(linear) + 0.5 * (layer.lora.A @ layer.lora.B).t()
        )
        torch.testing.assert_close(x.grad.double(), exact, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_checkpointing(self, reentrant):
        layer, found = layer_of(linear4bit(), dropout=0.3), []
        for call in (layer, partial(checkpoint, layer, use_reentrant=reentrant)):
            x, dy = given()
            torch.manual_seed(1)
            call(x).backward(dy)
            found.append([x.grad, named_gradients(layer)])
        assert_bits(*found)


class TestCompiled:
    @pytest.mark.parametrize("kind", ["nf4", "int8", "fp8"])
    def test_one_graph_for_every_alpha(self, kind):
        torch._dynamo.reset()
        layer, (x, dy) = layer_of(BASES[kind]()), given()
        graphs, calls = [], []

        def compiler(graph, _):
            graphs.append(graph)
            calls.extend(n for n in graph.graph.nodes if "lora_linear_quantized" in str(n.target))
            return graph

        compiled = torch.compile(layer, backend=compiler, fullgraph=True)
        for alpha in (0.5, 2.0):
            layer.lora.alpha = alpha
            torch.testing.assert_close(step(layer, x, dy, compiled), step(layer, x, dy))
        assert len(graphs) == 1 and len(calls) == 1

    @pytest.mark.parametrize("strict", [True, False])
    @pytest.mark.parametrize("kind", ["nf4", "int8", "fp8"])
    def test_exported(self, kind, strict):
        layer, (x, _) = layer_of(BASES[kind]()), given()
        if (kind, strict) == ("int8", False):  # tracing replaces the parameter that has the scales
            with pytest.raises(TypeError, match="weight must be quantised, int8 with a tensor SCB"):
                torch.export.export(layer, (x,), strict=False)
            return
        program = torch.export.export(layer, (x,), strict=strict)
        assert "lora_linear_quantized" in str(program.graph)
        torch.testing.assert_close(program.module()(x), layer(x))


class TestKeeping:
    @pytest.mark.parametrize("kind", BASES)
    def test_copies(self, kind):
        layer, (x, _) = layer_of(BASES[kind]()), given()
        expected = layer(x)
        copies = [copy.deepcopy(layer), reloaded(layer, weights_only=False)]
        if kind != "fp8":  # torch pickles no tensor of it
            copies.append(pickle.loads(pickle.dumps(layer)))
        for copied in copies:
            assert torch.equal(copied(x), expected)
            assert copied.linear.weight.data_ptr() != layer.linear.weight.data_ptr()

    @pytest.mark.parametrize("kind", ["nf4", "nf4-plain", "int8", "fp8"])
    def test_a_state_dict_is_that_of_the_base(self, kind):
        linear, (x, _) = BASES[kind](), given()
        layer = layer_of(linear)
        theirs = linear.state_dict()
        ours = layer.state_dict()
        assert list(ours) == [f"linear.{key}" for key in theirs] + ["lora.A", "lora.B"]
        fresh = BASES[kind]()
        with torch.no_grad():
            fresh.bias.zero_()
        if "nf4" not in kind:  # bitsandbytes' Linear4bit itself reads no quant_state into a layer
            own = {k.removeprefix("linear."): v for k, v in ours.items() if "lora" not in k}
            fresh.load_state_dict(own)
            assert torch.equal(dense(fresh), dense(linear))
            other = layer_of(BASES[kind]())
            other.load_state_dict(ours)
            assert torch.equal(other(x), layer(x))

    def test_an_nf4_state_dict_makes_the_parameter_again(self):
        """As Transformers loads it."""
        linear, (x, _) = linear4bit(), given()
        layer = layer_of(linear)
        state = layer.state_dict()
        parts = {k.removeprefix("linear.weight."): v for k, v in state.items() if "weight." in k}
        loaded = bnb.nn.Params4bit.from_prequantized(state["linear.weight"], parts, device="cpu")
        other = layer_of(linear4bit())
        other.linear.weight = loaded
        assert torch.equal(other(x), layer(x))

    def test_adapters_are_saved_alone(self, tmp_path):
        net = nn.Sequential(linear4bit())
        replace_linear_with_lora(net, R, 2.0)
        nn.init.normal_(net[0].lora.B)
        x, _ = given()
        save_adapter(net, tmp_path)
        assert (tmp_path / "adapter_model.safetensors").stat().st_size < 8 * R * (K + N)
        other = nn.Sequential(linear4bit())
        load_adapter(other, tmp_path)
        assert torch.equal(other(x), net(x))

    def test_it_is_trained(self):
        net = nn.Sequential(linear4bit(), nn.ReLU(), nn.Linear(N, 1))
        assert replace_linear_with_lora(net, R, 2.0) == ["0", "2"]
        freeze_base(net)
        before = {k: v.clone() for k, v in net.state_dict().items() if "lora" not in k}
        optimizer = torch.optim.AdamW(lora_parameters(net), lr=1e-2)
        x, _ = given()
        losses = []
        for _ in range(20):
            loss = (net(x) - 1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.1 * losses[0]
        assert all(torch.equal(net.state_dict()[key], value) for key, value in before.items())


class TestMerging:
    @pytest.fixture(params=["nf4", "int8", "fp8"])
    def net(self, request):
        net = nn.Sequential(BASES[request.param]())
        replace_linear_with_lora(net, R, 0.5)
        nn.init.normal_(net[0].lora.B)
        return net

    def exact(self, layer):
        return dense(layer.linear) + layer.lora.scale * (layer.lora.A @ layer.lora.B).double().t()

    def test_only_when_asked(self, net):
        x, _ = given()
        before = net(x)
        with pytest.raises(ValueError, match=r"0.linear must not be quantised .* dequantize=True"):
            merge_lora(net)
        with pytest.raises(TypeError, match=r"dequantize must be True, False, float32, .* got 1"):
            merge_lora(net, dequantize=1)
        assert not net[0].merged and torch.equal(net(x), before)

    @pytest.mark.parametrize("dtype", [True, torch.bfloat16, torch.float64], ids=str)
    def test_a_dense_weight_beside_the_base(self, net, dtype):
        x, _ = given()
        before, state = net(x), {k: v.clone() for k, v in net.state_dict().items()}
        assert merge_lora(net, dequantize=dtype) == ["0"] and net[0].merged
        layer = net[0]
        wanted = torch.float32 if dtype is True else dtype
        assert layer.merged_weight.dtype == wanted
        # One rounding of the exact sum, give or take the last bit of a float32 sum.
        error = (layer.merged_weight.double() - self.exact(layer)).abs()
        assert (error <= torch.finfo(wanted).eps * self.exact(layer).abs() + 2e-7).all()
        assert net(x).dtype == x.dtype
        merged = nn.functional.linear(x.to(wanted), layer.merged_weight, layer.bias.to(wanted))
        assert torch.equal(net(x), merged.to(x.dtype))
        now = net.state_dict()
        assert now.keys() == state.keys() and all(torch.equal(now[k], state[k]) for k in state)
        assert merge_lora(net, dequantize=True) == []  # what is merged stays as it is
        with pytest.raises(RuntimeError, match="0 is merged: unmerge_lora"):
            net.load_state_dict(state)
        assert torch.equal(copy.deepcopy(net)(x), net(x))
        assert unmerge_lora(net) == ["0"] and torch.equal(net(x), before)

    def test_a_dense_linear_for_good(self, net):
        x, _ = given()
        before, bias = net(x), net[0].bias
        merge_lora(net, dequantize=True, unload=True)
        assert type(net[0]) is nn.Linear and not net[0].weight.requires_grad
        assert net[0].bias is bias
        torch.testing.assert_close(net(x), before, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("unload", [False, True])
    def test_merging_in_inference_mode(self, net, unload):
        """What it makes takes part in training."""
        net[0].bias.data = net[0].bias.data.double()
        with torch.inference_mode():
            merge_lora(net, dequantize=torch.float32, unload=unload)
        made = [net[0].weight, net[0].bias] if unload else [net[0].merged_weight]
        assert not any(t.is_inference() for t in made)
        x = given()[0].detach().requires_grad_()
        net(x).sum().backward()
        assert x.grad is not None

    def test_the_default_dtype(self):
        for compute, stored, wanted in (
            (torch.bfloat16, torch.float32, torch.bfloat16),
            (None, torch.float16, torch.float16),
        ):
            made = bnb.nn.Linear4bit(K, N, quant_type="nf4", compute_dtype=compute)
            layer = layer_of(made.to(stored).to("cpu"), dtype=torch.float32)
            merge_lora(layer, dequantize=True)
            assert layer.merged_weight.dtype == wanted

    def test_what_transformers_saves_afterwards(self, tmp_path):
        """A dense model once nothing quantised is left in it; before that what it was."""
        transformers = pytest.importorskip("transformers")
        sizes = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 64}
        config = transformers.LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "first")
        read = partial(transformers.LlamaForCausalLM.from_pretrained, dtype=torch.float32)
        nf4 = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
        net = read(tmp_path / "first", quantization_config=nf4, device_map="cpu").eval()
        tokens = torch.arange(6)[None]
        for targets in (["q_proj"], None):
            assert net.is_quantized and net.config.quantization_config
            names = replace_linear_with_lora(net, 4, 8.0, target_modules=targets)
            for _, layer in lora_layers(net):
                nn.init.normal_(layer.lora.B, std=0.1)
            assert merge_lora(net, dequantize=True) == names
            merge_lora(net, unload=True)
        assert not net.is_quantized and not hasattr(net.config, "quantization_config")
        net.save_pretrained(tmp_path / "second")
        again = read(tmp_path / "second").eval()
        assert torch.equal(again(tokens).logits, net(tokens).logits)

    def test_nothing_half_done(self, net, monkeypatch):
        net.append(LinearWithLoRA(nn.Linear(N, 8), 2, 1.0))
        monkeypatch.setattr("lora_kernels.merge._unload", lambda model: 1 / 0)
        x, _ = given()
        before = net(x)
        with pytest.raises(ZeroDivisionError):
            merge_lora(net, dequantize=True, unload=True)
        assert not net[0].merged and not net[1].merged and torch.equal(net(x), before)


def foreign(module, name="QuantLinear", base=nn.Module):
    """An object of a class that says that it comes from another library."""
    return type(name, (base,), {"__module__": module})


FOREIGN = {
    "gptqmodel.nn_modules.qlinear.torch": "GPTQ or AWQ weights: .* zero points",
    "auto_gptq.nn_modules.qlinear.qlinear_cuda": "GPTQ weights: .* zero points",
    "awq.modules.linear.gemm": "AWQ weights: .* zero points",
    "hqq.core.quantize": "HQQ weights: .* zero points",
    "aqlm.inference": "AQLM weights: .* codebooks",
}


class TestDeclined:
    @pytest.mark.parametrize("module", FOREIGN)
    def test_layers_of_other_libraries(self, module):
        made = foreign(module)()
        reason = f"must have .* but a QuantLinear has {FOREIGN[module]}"
        with pytest.raises(ValueError, match=f"linear {reason}"):
            LinearWithLoRA(made, R, 1.0)
        net = nn.Sequential(nn.Linear(4, 4), made)
        with pytest.raises(ValueError, match=f"1 {reason}"):
            replace_linear_with_lora(net, R, 1.0)
        assert type(net[0]) is nn.Linear and net[1] is made
        assert replace_linear_with_lora(net, R, 1.0, target_modules=["0"]) == ["0"]

    def test_tensors_of_torchao(self):
        kind = foreign("torchao.quantization.quantize_.workflows", "Int4Tensor", torch.Tensor)
        weight = torch.randn(N, K).as_subclass(kind)
        linear = nn.Linear(K, N)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        assert type(linear.weight) is kind
        reason = "an? Int4Tensor has torchao weights: they compute by operators of their own"
        with pytest.raises(ValueError, match=f"linear must have .* {reason}"):
            LinearWithLoRA(linear, R, 1.0)
        with pytest.raises(TypeError, match=f"weight must be a dense tensor .* {reason}"):
            lora_linear(torch.randn(2, K), weight, torch.randn(K, R), torch.randn(R, N), 1.0)

    def test_parameters_of_bitsandbytes_are_read_first(self):
        A, B = torch.randn(K, R), torch.randn(R, N)
        for linear in (linear4bit(), linear4bit(quant_storage=torch.float32), linear8bit()):
            with pytest.raises(TypeError, match=r"give lora_kernels.quantized.from_bitsandbytes"):
                lora_linear(torch.randn(2, K), linear.weight, A, B, 1.0)

    def test_kinds_of_bitsandbytes(self):
        fp4 = "weight must have quant_type 'nf4', got 'fp4'"
        wide = linear4bit()
        wide.weight.quant_state.blocksize = 128
        for linear, message in (
            (linear4bit(quant_type="fp4"), fp4),
            (bnb.nn.Linear4bit(K, N, quant_type="fp4"), fp4),  # before it is quantised as well
            (wide, "weight must have blocksize 64, got 128"),
            (bnb.nn.Linear8bitLt(K, N), "weight must have has_fp16_weights=False"),
        ):
            with pytest.raises(ValueError, match=message):
                LinearWithLoRA(linear, R, 1.0)
            net = nn.Sequential(nn.Linear(4, 4), linear)
            with pytest.raises(ValueError, match=message):
                replace_linear_with_lora(net, R, 1.0)
            assert type(net[0]) is nn.Linear

    def test_fp8_of_other_kinds(self):
        module = pytest.importorskip("transformers.integrations.finegrained_fp8")
        grouped = module.FP8GroupedLinear(K, N, 2, (128, 128))
        with pytest.raises(ValueError, match="FP8GroupedLinear has block-diagonal fp8 weights"):
            LinearWithLoRA(grouped, R, 1.0)
        linear = fp8_linear()
        linear.weight = nn.Parameter(torch.zeros(N, K // 2, dtype=torch.int8), requires_grad=False)
        with pytest.raises(TypeError, match=r"codes must be torch.float8_e4m3fn .* got torch.int8"):
            layer_of(linear)(torch.randn(2, K))
        codes = torch.zeros(N, K, dtype=torch.float8_e4m3fn)
        with pytest.raises(ValueError, match=r"scales must have 2 elements .* got 1"):
            FP8Weight(codes, torch.ones(1), (64, 64))
        with pytest.raises(ValueError, match=r"scales must be \[2, 1\] .* got \[1, 2\]"):
            FP8Weight(codes, torch.ones(1, 2), (N // 2, K))
        with pytest.raises(ValueError, match=r"block must be two positive sizes, got \[0, 64\]"):
            FP8Weight(codes, torch.ones(1), (0, 64))

    def test_a_layer_that_is_quantised_later(self):
        layer = layer_of(bnb.nn.Linear4bit(K, N, quant_type="nf4"))
        x, _ = given()
        with pytest.raises(TypeError, match="is quantised when it is moved to a device"):
            layer(x)
        layer.to("cpu")
        torch.testing.assert_close(layer(x), layer.linear(x) + layer.lora(x), rtol=1e-4, atol=1e-4)


class TestStorage:
    """What bitsandbytes allocates: whole items of quant_storage; on a CPU it refuses what does not fill them."""

    @pytest.mark.parametrize(
        "storage",
        [torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64],
        ids=str,
    )
    def test_every_storage(self, storage):
        for rows, width in ((4, 64), (3, 80), (8, 6)):
            made = bnb.nn.Linear4bit(width, rows, quant_type="nf4", quant_storage=storage).to("cpu")
            assert made.weight.dtype == storage
            weight = bases.quantized_weight(made)
            assert weight.packed.dtype == torch.uint8 and weight.packed.numel() == rows * width // 2
            as_bytes = bnb.nn.Linear4bit(width, rows, quant_type="nf4")
            as_bytes.weight = bnb.nn.Params4bit(
                made.weight.data.view(torch.uint8).clone(),
                quant_state=made.weight.quant_state,
                bnb_quantized=True,
            )
            assert torch.equal(bases.quantized_weight(as_bytes).dense(), weight.dense())

    def test_an_item_that_is_not_full(self):
        """On a GPU bitsandbytes rounds the length down, and writes past the end of it: refused."""
        with pytest.raises(RuntimeError):
            bnb.nn.Linear4bit(5, 5, quant_type="nf4", quant_storage=torch.float32).to("cpu")
        linear = linear4bit(width=5)
        short = linear.weight.data.view(-1)[: N * 5 // 2 - 2]
        linear.weight = bnb.nn.Params4bit(
            short, quant_state=linear.weight.quant_state, bnb_quantized=True
        )
        with pytest.raises(
            ValueError, match=r"packed must have 160 elements .* \[64, 5\], got 158"
        ):
            layer_of(linear)


AVX512 = "AVX512" in torch.backends.cpu.get_cpu_capability()
REORDERS = bool(bnb.functional.has_avx512bf16())


class TestDefectsOfBitsandbytes:
    """The reason why the oracle of these tests is the format's formula: where bitsandbytes itself is wrong."""

    @pytest.mark.skipif(not AVX512, reason="its product is wrong on CPUs with AVX-512 only")
    @pytest.mark.xfail(
        strict=True, reason="bitsandbytes 0.50.2 reads blocks that straddle rows wrongly"
    )
    def test_a_width_of_16_but_not_of_64(self):
        linear, (x, _) = linear4bit(width=96), given(width=96)
        theirs = linear(x)
        exact = x.double() @ bases.quantized_weight(linear).dense().double().t() + linear.bias
        torch.testing.assert_close(theirs.double(), exact, rtol=1e-3, atol=1e-3)

    @pytest.mark.skipif(not REORDERS, reason="it reorders weights on CPUs with AVX-512-BF16 only")
    @pytest.mark.xfail(strict=True, reason="bitsandbytes 0.50.2 loses dx after an eval() forward")
    def test_training_after_its_own_evaluation(self):
        linear, (x, _) = linear4bit(compute_dtype=torch.bfloat16), given(torch.bfloat16)
        with torch.no_grad():
            linear.eval()(x.detach())
        y = linear.train()(x)
        assert y.requires_grad
