"""Whole models under torch.compile, torch.export, autocast, GradScaler and checkpointing, ours and PEFT's."""

from __future__ import annotations

import copy
import io
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from lora_kernels import LinearWithLoRA, formulas, freeze_base, lora_linear
from lora_kernels.integrations.peft import FusedLinear, accelerate
from lora_kernels.reference import LinearWithLoRA as ReferenceLayer
from tests.oracle import assert_bits, named_gradients, reference, saved_inside

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Block(nn.Module):
    """Two LoRA layers around a non-linearity, with a residual."""

    def __init__(self, layer=LinearWithLoRA):
        super().__init__()
        torch.manual_seed(2)
        self.up, self.down = layer(nn.Linear(12, 20), 3, 0.5), layer(nn.Linear(20, 12), 3, 2.0)
        for wrapped in (self.up, self.down):
            nn.init.normal_(wrapped.lora.B)
            wrapped.linear.requires_grad_(False)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(x)))


def peft_block():
    torch.manual_seed(2)
    base = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12))
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["0", "2"], init_lora_weights=False)
    return get_peft_model(base, config)


def fused_peft_block():
    net = peft_block()
    accelerate(net)
    return net.base_model.model


MODELS = {"ours": Block, "peft": fused_peft_block}


def inputs(*lead):
    return torch.randn(*lead, 12, generator=torch.Generator().manual_seed(8))


def run(net, x):
    """y and every gradient by its parameter's name; x itself is frozen, as the first layer's input is."""
    y = net(x)
    y.float().square().sum().backward()
    grads = named_gradients(net)
    return y.detach(), {
        n.removeprefix("_orig_mod.").removeprefix("net."): g for n, g in grads.items()
    }


def assert_same(actual, expected):
    assert expected[1]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


class TestCompile:
    @pytest.mark.slow
    @pytest.mark.parametrize("kind", MODELS)
    def test_training_at_any_batch_size(self, kind):
        net = MODELS[kind]()
        compiled = torch.compile(net, fullgraph=True, dynamic=True)
        for lead in ((3, 5), (2, 7), (6, 4)):
            assert_same(run(compiled, inputs(*lead)), run(net, inputs(*lead)))

    @pytest.mark.slow
    def test_reduce_overhead(self):
        net = Block()
        compiled = torch.compile(net, fullgraph=True, mode="reduce-overhead")
        assert_same(run(compiled, inputs(4, 3)), run(net, inputs(4, 3)))

    def test_autocast(self):
        net = Block()

        def step(x):
            with torch.autocast("cpu", torch.bfloat16):
                return net(x)

        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        y, expected = compiled(inputs(5)), step(inputs(5))
        assert net.up(inputs(5)).dtype == torch.float32
        torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)
        y.sum().backward()
        assert net.up.lora.A.grad.dtype == torch.float32

    @pytest.mark.parametrize("kind", MODELS)
    def test_one_graph_serves_every_alpha_and_tensor_scaling(self, kind):
        net = MODELS[kind]()
        counter = CompileCounter()
        compiled = torch.compile(net, backend=counter, fullgraph=True)
        for value in (0.5, 1.0, -3.0):
            if kind == "ours":
                net.up.lora.alpha = value
            else:
                net[0].scaling["default"] = net[2].scaling["default"] = torch.tensor(value)
            torch.testing.assert_close(compiled(inputs(5)), net(inputs(5)))
        assert counter.frame_count == 1

    def test_a_number_is_as_exact_as_float64(self):
        x, w, A, B = (
            torch.randn(*s, dtype=torch.float64) for s in ((5, 8), (6, 8), (8, 2), (2, 6))
        )

        def product(x):
            return lora_linear(x, w, A, B, 0.1)

        compiled = torch.compile(product, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), product(x), rtol=0, atol=1e-14)


def _dual(f):
    def tangent(p, x):
        with forward_ad.dual_level():
            y = f(p, forward_ad.make_dual(x, torch.ones_like(x)))
            return forward_ad.unpack_dual(y).tangent

    return tangent


TRANSFORMS = {
    "grad": lambda f: grad(lambda p, x: f(p, x).square().sum()),
    "jacrev": jacrev,
    "jacfwd": jacfwd,
    "per sample": lambda f: vmap(grad(lambda p, x: f(p, x).square().sum()), in_dims=(None, 0)),
    "vmap": lambda f: vmap(f, in_dims=(None, 0)),
    "hessian": lambda f: hessian(lambda p, x: f(p, x).square().sum(), argnums=1),
    "jvp": lambda f: lambda p, x: jvp(lambda x: f(p, x), (x,), (torch.ones_like(x),)),
    "jvp of grad": lambda f: (
        lambda p, x: jvp(grad(lambda x: f(p, x).square().sum()), (x,), (torch.ones_like(x),))
    ),
    "vjp": lambda f: lambda p, x: vjp(lambda x: f(p, x), x)[1](torch.ones_like(f(p, x))),
    "dual": _dual,
}


class TestCompiledTransforms:
    """torch.func within compiled code, in one graph, as the plain formula allows."""

    def layer(self, dtype=torch.float32):
        layer = LinearWithLoRA(nn.Linear(6, 5), 2, 0.75).to(dtype)
        nn.init.normal_(layer.lora.B)
        return layer, {name: p.detach() for name, p in layer.named_parameters()}

    def check(self, transform, **options):
        layer, parameters = self.layer()
        x = torch.randn(4, 6)

        def plain(p, x):
            return reference(
                x, p["linear.weight"], p["lora.A"], p["lora.B"], 0.75, p["linear.bias"]
            )

        def ours(p, x):
            return functional_call(layer, p, (x,))

        compiled = torch.compile(transform(ours), fullgraph=True, **options)
        torch.testing.assert_close(
            compiled(parameters, x), transform(plain)(parameters, x), rtol=1e-4, atol=1e-4
        )

    @pytest.mark.parametrize("name", TRANSFORMS)
    def test_values(self, name):
        self.check(TRANSFORMS[name], backend="aot_eager")

    @pytest.mark.slow
    @pytest.mark.parametrize("backend", ["eager", "inductor"])
    @pytest.mark.parametrize("name", ["per sample", "jvp"])
    def test_values_of_other_compilers(self, name, backend):
        self.check(TRANSFORMS[name], backend=backend)

    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    def test_a_transform_of_compiled_code(self, backend):
        layer, _ = self.layer()
        x, tangent = torch.randn(4, 6), torch.randn(4, 6)
        compiled = torch.compile(layer, backend=backend)
        actual = jvp(compiled, (x,), (tangent,))
        expected = jvp(lambda x: layer.linear(x) + layer.lora(x), (x,), (tangent,))
        torch.testing.assert_close(actual, expected)


class TestExport:
    @pytest.mark.parametrize("strict", [True, False])
    @pytest.mark.parametrize("kind", MODELS)
    def test_a_dynamic_batch(self, kind, strict):
        net = MODELS[kind]().eval()
        batch = torch.export.Dim("batch", min=1)
        program = torch.export.export(
            net, (inputs(3, 5),), dynamic_shapes=({0: batch},), strict=strict
        )
        targets = [n.target for n in program.graph.nodes if n.op == "call_function"]
        assert targets.count(torch.ops.lora_kernels.lora_linear.default) == 2
        for size in (1, 2, 9):
            torch.testing.assert_close(program.module()(inputs(size, 5)), net(inputs(size, 5)))

    def test_a_saved_program(self):
        net = Block().eval()
        file = io.BytesIO()
        torch.export.save(torch.export.export(net, (inputs(3),)), file)
        file.seek(0)
        loaded = torch.export.load(file).module()
        torch.testing.assert_close(loaded(inputs(3)), net(inputs(3)))


class TestMixedPrecision:
    @pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
    def test_autocast_is_that_of_the_reference_layer(self, half):
        results = []
        for layer in (LinearWithLoRA, ReferenceLayer):
            with torch.autocast("cpu", half):
                results.append(run(Block(layer), inputs(6, 4)))
        (y, grads), (expected, expected_grads) = results
        assert y.dtype == expected.dtype
        assert (y - expected).norm() < 0.02 * expected.norm()
        assert grads.keys() == expected_grads.keys()
        for name, gradient in expected_grads.items():
            assert grads[name].dtype == torch.float32
            assert (grads[name] - gradient).norm() < 0.02 * gradient.norm(), name

    def test_a_float16_training_loop_with_a_gradient_scaler(self):
        """An overflow skips its step and halves the scale; otherwise the loss follows the reference layer's."""
        losses = []
        for layer in (LinearWithLoRA, ReferenceLayer):
            net = Block(layer)
            trained = [p for p in net.parameters() if p.requires_grad]
            optimizer = torch.optim.SGD(trained, lr=1e-3)
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
            followed = []
            for step in range(6):
                x = inputs(6, 4)
                with torch.autocast("cpu", torch.float16):
                    loss = net(x).float().square().mean()
                if step == 2:
                    loss = loss * float("inf")
                before = net.up.lora.A.detach().clone()
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                assert torch.equal(net.up.lora.A, before) == (step == 2)
                followed.append(loss.item())
            assert scaler.get_scale() == 2.0**9
            assert followed[5] < followed[0]
            losses.append(followed)
        torch.testing.assert_close(*map(torch.tensor, losses), rtol=0.01, atol=0.0)


class TestCheckpointing:
    """The block's forward again in backward: gradients are the same, and a policy may keep our product's result."""

    @pytest.mark.parametrize("kind", MODELS)
    @pytest.mark.parametrize("reentrant", [True, False])
    def test_gradients(self, kind, reentrant):
        net = MODELS[kind]()
        plain = run(net, inputs(6))
        x = inputs(6).requires_grad_(reentrant)
        assert_bits(run(_Checkpointed(net, use_reentrant=reentrant), x), plain)

    @pytest.mark.parametrize(
        "policy, products",
        [(CheckpointPolicy.MUST_SAVE, 2), (CheckpointPolicy.MUST_RECOMPUTE, 4)],
    )
    def test_selective_in_compiled_code(self, policy, products, monkeypatch):
        def decide(ctx, op, *args, **kwargs):
            ours = op == torch.ops.lora_kernels.lora_linear.default
            return policy if ours else CheckpointPolicy.MUST_RECOMPUTE

        count = []
        forward = formulas.forward
        monkeypatch.setattr(formulas, "forward", lambda *args: count.append(1) or forward(*args))
        net = Block()
        expected = run(net, inputs(6))
        context = partial(create_selective_checkpoint_contexts, decide)
        wrapped = _Checkpointed(net, use_reentrant=False, context_fn=context)
        compiled = torch.compile(wrapped, fullgraph=True, backend="aot_eager_decomp_partition")
        run(compiled, inputs(6))
        count.clear()
        found = run(compiled, inputs(6))
        assert len(count) == products
        assert_same(found, expected)

    @pytest.mark.parametrize(
        "policy", [CheckpointPolicy.MUST_SAVE, CheckpointPolicy.MUST_RECOMPUTE]
    )
    def test_selective_in_eager_mode(self, policy):
        net = Block()
        expected = run(net, inputs(6))
        context = partial(create_selective_checkpoint_contexts, lambda *args, **kwargs: policy)
        assert_same(
            run(_Checkpointed(net, use_reentrant=False, context_fn=context), inputs(6)), expected
        )


class _Checkpointed(nn.Module):
    def __init__(self, net, **options):
        super().__init__()
        self.net, self.options = net, options

    def forward(self, x):
        return checkpoint(self.net, x, **self.options)


class TestSavedMemory:
    """What forward keeps for backward, parameters aside: x and, in float32, the [M, rank] product s."""

    def saved_bytes(self, layer, x):
        with saved_inside() as saved:
            y = layer(x)
        assert y.requires_grad
        kept, own = (
            {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
            for tensors in (saved, layer.parameters())
        )
        return sum(size for pointer, size in kept.items() if pointer not in own)

    @pytest.mark.parametrize("dropout", [0.0, 0.25])
    def test_a_peft_layer_with_float32_adapters_on_a_bfloat16_base(self, dropout):
        M, K, N, rank = 64, 48, 40, 4
        base = nn.Sequential(nn.Linear(K, N)).bfloat16()
        config = LoraConfig(
            r=rank, target_modules=["0"], lora_dropout=dropout, init_lora_weights=False
        )
        net = get_peft_model(base, config)
        plain = copy.deepcopy(net)
        assert accelerate(net).fused
        x = torch.randn(M, K, dtype=torch.bfloat16)
        fused_layer, plain_layer = (n.base_model.model[0] for n in (net, plain))
        assert isinstance(fused_layer, FusedLinear)
        assert fused_layer.lora_A["default"].weight.dtype == torch.float32
        seed = 8 if dropout else 0
        allowed = 2 * M * K + 4 * M * rank + seed
        assert self.saved_bytes(fused_layer, x.clone()) <= allowed
        assert self.saved_bytes(plain_layer, x.clone()) > allowed  # PEFT keeps a float32 copy of x

    def test_what_is_trained_decides(self):
        layer = LinearWithLoRA(nn.Linear(48, 40), 4, 1.0)
        freeze_base(layer)
        assert self.saved_bytes(layer, torch.randn(64, 48)) == 4 * 64 * (48 + 4)
        layer.lora.A.requires_grad_(False)
        assert self.saved_bytes(layer, torch.randn(64, 48)) == 4 * 64 * 4


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_the_operator_is_what_traces_hold():
    """One for each layer, so that a graph pass can find it."""
    net, x = Block().eval(), inputs(3, 5)
    jit, fx = torch.jit.trace(net, (x,)), make_fx(net)(x)
    assert str(jit.inlined_graph).count("lora_kernels::lora_linear") == 2
    assert fx.code.count("lora_kernels.lora_linear") == 2
    for traced in (jit, fx):
        torch.testing.assert_close(traced(x), net(x))
