"""The Triton backend under `lora_linear` and the layer: every gradient against float64, choice and refusal."""

from __future__ import annotations

import functools
import itertools
import subprocess
import sys

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from lora_kernels import LinearWithLoRA, explain, lora_linear, plan, use_backend
from lora_kernels.backends import triton as backend_module
from lora_kernels.dropout import Dropout, scaled_mask
from lora_kernels.problem import Problem
from tests.interpreter import strict
from tests.interpreter.conftest import VARIANTS, on_target
from tests.oracle import assert_budget, reference

NAMES = ("x", "weight", "A", "B", "bias")


def leaves(dtype, adapter_dtype, shape=(2, 9, 44), N=38, R=6) -> dict[str, torch.Tensor]:
    K = shape[-1]
    sizes = {"x": shape, "weight": (N, K), "A": (K, R), "B": (R, N), "bias": (N,)}
    scales = {"x": 1.0, "weight": K**-0.5, "A": K**-0.5, "B": R**-0.5, "bias": 1.0}
    return {
        name: (torch.randn(size) * scales[name])
        .to(adapter_dtype if name in "AB" else dtype)
        .requires_grad_()
        for name, size in sizes.items()
    }


def gradients(call, operands, needed=NAMES) -> dict[str, torch.Tensor]:
    """y and the gradients of <y, c> for a fixed c, from fresh leaves; only `needed` require them."""
    fresh = {n: t.detach().clone().requires_grad_(n in needed) for n, t in operands.items()}
    y = call(**fresh)
    generator = torch.Generator().manual_seed(7)
    y.backward(torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype))
    return {"y": y.detach(), **{n: t.grad for n, t in fresh.items()}}


def specialisation(launch: strict.Launch) -> str:
    """What Triton would compile this launch for, as text."""
    compiled = JITFunction(launch.function.fn, **launch.function.kwargs)
    backend = make_backend(GPUTarget("cuda", 80, 32))
    bind = create_function_from_signature(compiled.signature, compiled.params, backend)
    _, specialised, options = bind(*launch.args, **launch.kwargs, debug=False)
    return f"{launch.kernel} {specialised} {options}"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
    ],
    ids=str,
)
def test_every_gradient(variant, p, dtypes, triton_products):
    triton_products(variant)
    operands = leaves(*dtypes)
    seed = torch.tensor(1234)
    mask = scaled_mask(Dropout(p, seed), 18, 44, torch.float64).view(2, 9, 44) if p else None

    def ours(x, weight, A, B, bias):
        return lora_linear(x, weight, A, B, 0.7, bias, dropout_p=p, seed=seed, backend="triton")

    def eager(x, weight, A, B, bias):
        return reference(x, weight, A, B, 0.7, bias, mask)

    with strict.recording() as launches:
        actual = gradients(ours, operands)
    assert {launch.kernel for launch in launches} >= {
        "_shrink_wgrad_kernel",
        "_wgrad_kernel",
    }
    step_by_step = gradients(eager, operands)
    exact = gradients(eager, {name: t.double() for name, t in operands.items()})
    for name, result in actual.items():
        assert_budget(result, step_by_step[name], exact[name], f"gradient of {name}")


@pytest.mark.parametrize(
    "needed",
    [c for n in (1, 2, 3) for c in itertools.combinations(("x", "A", "B"), n)],
    ids="+".join,
)
def test_only_the_needed_gradients(needed, triton_products):
    """Each subset gets the gradients that all together get, bit for bit, and the others are None."""
    triton_products("two_kernel")
    operands = leaves(torch.float32, torch.float32)

    def ours(x, weight, A, B, bias):
        return lora_linear(x, weight, A, B, 0.7, bias, backend="triton")

    together = gradients(ours, operands)
    some = gradients(ours, operands, needed)
    for name in NAMES:
        if name in needed:
            assert torch.allclose(some[name], together[name], rtol=1e-5, atol=1e-6), name
        else:
            assert some[name] is None, name


@pytest.mark.parametrize("shape", [(44,), (1, 44), (0, 44), (2, 0, 44), (2, 3, 4, 44)], ids=str)
def test_leading_shapes(shape, triton_products):
    triton_products("two_kernel")
    operands = leaves(torch.float32, torch.float32, shape)

    def ours(x, weight, A, B, bias):
        return lora_linear(x, weight, A, B, 0.7, bias, backend="triton")

    def eager(x, weight, A, B, bias):
        return reference(x, weight, A, B, 0.7, bias)

    expected = gradients(eager, operands)
    for name, result in gradients(ours, operands).items():
        assert result.shape == expected[name].shape
        assert torch.allclose(result, expected[name], rtol=1e-4, atol=1e-5), name


LAZY = {  # tensors that differ from their memory
    "negated": lambda t: torch._neg_view(-t),
    "zero": lambda t: torch._efficientzerotensor(t.shape),
}


@pytest.mark.parametrize("which", (*NAMES, "dy"))
@pytest.mark.parametrize("kind", LAZY)
def test_lazy_operands_are_what_they_stand_for(kind, which, triton_products):
    """As an operand, in the forward and saved for the backward, and as the incoming gradient."""
    triton_products("two_kernel")
    values = {name: t.detach() for name, t in leaves(torch.float32, torch.float32).items()}
    values["dy"] = torch.randn(2, 9, 38)
    values[which] = LAZY[kind](values[which])
    written = {
        n: torch.zeros(t.shape) if t._is_zerotensor() else t.clone() for n, t in values.items()
    }

    def results(call, given):
        tensors = [given[name] for name in NAMES]
        for name, t in zip(NAMES, tensors, strict=True):
            t.requires_grad_(name in ("A", "B") or name == "x")
        y = call(*tensors[:4], 0.7, tensors[4])
        trained = [given[name] for name in ("x", "A", "B")]
        return [y, *torch.autograd.grad(y, trained, given["dy"])]

    ours = results(functools.partial(lora_linear, backend="triton"), values)
    for actual, expected in zip(ours, results(reference, written), strict=True):
        assert torch.allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_the_layer_with_use_backend(triton_products):
    triton_products("two_kernel")
    layer = LinearWithLoRA(torch.nn.Linear(40, 24), 4, 2.0)
    torch.nn.init.normal_(layer.lora.B)
    x = torch.randn(3, 5, 40)
    with use_backend("eager"):
        expected = layer(x)
    with use_backend("triton"), strict.recording() as launches:
        y = layer(x)
        y.sum().backward()  # an expanded gradient, strides 0
    assert launches and torch.allclose(y, expected, rtol=1e-4, atol=1e-5)
    ours = {name: p.grad.clone() for name, p in layer.named_parameters()}
    layer.zero_grad()
    with use_backend("eager"):
        layer(x).sum().backward()
    for name, p in layer.named_parameters():
        assert torch.allclose(ours[name], p.grad, rtol=1e-4, atol=1e-4), name


def test_alpha_and_length_compile_nothing_new(triton_products):
    """Triton compiles a kernel for its constants, and for which integers are 1 or divisible by 16: not for M's value."""
    triton_products("two_kernel")
    seen = set()
    for M, alpha in ((48, 1.0), (49, 0.5), (64, -2.0), (33, 16.0)):
        operands = leaves(torch.float32, torch.float32, (M, 44))
        with strict.recording() as launches:
            gradients(
                lambda x, weight, A, B, bias, alpha=alpha: lora_linear(
                    x, weight, A, B, alpha, bias, backend="triton", dropout_p=0.5
                ),
                operands,
            )
        seen.add(tuple(map(specialisation, launches)))
    assert len(seen) == 1


def test_explain_and_refusals(monkeypatch):
    on_target(monkeypatch, "sm_90")
    problem = Problem(4096, 4096, 4096, 16, "bfloat16", "bfloat16", device="cpu")
    explanation = explain(problem, backend="triton")
    assert explanation.backend == "triton" and "predicted" in explanation.plan
    wide = Problem(8, 8, 8, 4, "float64", "float64", device="cpu")
    with pytest.raises(RuntimeError, match="float64 is computed by ATen"):
        explain(wide, backend="triton")
    assert explain(wide).backend == "eager"
    plan.forget()

    def too_old(device):
        return "architecture must be sm_80 or newer, got 'sm_75'"

    monkeypatch.setattr(plan, "_target", too_old)
    with pytest.raises(RuntimeError, match="sm_80 or newer"):
        explain(problem, backend="triton")
    plan.forget()


def test_without_triton(monkeypatch):
    monkeypatch.setattr(backend_module.importlib.util, "find_spec", lambda name: None)
    assert backend_module.BACKEND.unavailable() == "triton is not installed"


def test_importing_the_backend_imports_no_triton():
    code = "import lora_kernels.backends.triton, sys; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
