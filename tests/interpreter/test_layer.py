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
from lora_kernels.tuning.targets import TARGETS
from tests.interpreter import strict
from tests.interpreter.conftest import VARIANTS, on_target
from tests.oracle import AWKWARD, assert_gradients, check_products, gradients, reference
from tests.planned import Planned

NAMES = ("x", "weight", "A", "B", "bias")


def operands(dtype=torch.float32, adapter_dtype=torch.float32, shape=(2, 9, 44), N=38, R=6):
    """x, weight, A, B and bias by name, and dy."""
    K = shape[-1]
    sizes = {"x": shape, "weight": (N, K), "A": (K, R), "B": (R, N), "bias": (N,)}
    scales = {"x": 1.0, "weight": K**-0.5, "A": K**-0.5, "B": R**-0.5, "bias": 1.0}
    made = {
        name: (torch.randn(size) * scales[name]).to(adapter_dtype if name in "AB" else dtype)
        for name, size in sizes.items()
    }
    return made, torch.randn(*shape[:-1], N).to(dtype)


ours = functools.partial(lora_linear, alpha=0.7, backend="triton")
plain = functools.partial(reference, alpha=0.7)


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
    given, dy = operands(*dtypes)
    seed = torch.tensor(1234)
    mask = scaled_mask(Dropout(p, seed), 18, 44, torch.float64).view(2, 9, 44) if p else None
    with strict.recording() as launches:
        actual = gradients(functools.partial(ours, dropout_p=p, seed=seed), given, dy)
    kernels = {launch.kernel for launch in launches}
    assert kernels >= {"_shrink_wgrad_kernel", "_wgrad_kernel"}
    assert_gradients(actual, functools.partial(plain, mask=mask), given, dy)


@pytest.mark.parametrize("shape", [(2, 9, 44), (130, 44), (0, 44)], ids=str)
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.float32),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
    ],
    ids=str,
)
def test_a_masked_tail_before_the_librarys_product(dtypes, shape, monkeypatch):
    """`tail_first` without groups: its launches have no term of x·w."""
    on_target(monkeypatch, "sm_90", "tail_first")
    given, dy = operands(*dtypes, shape=shape, R=21)
    mask = scaled_mask(Dropout(0.3, torch.tensor(7)), dy.numel() // 38, 44, torch.float64)
    with strict.recording() as launches:
        actual = gradients(functools.partial(ours, dropout_p=0.3, seed=7), given, dy)
    tails = [each.arguments["K"] for each in launches if each.kernel == "_expand_kernel"]
    assert tails == ([0, 0] if dy.numel() else [])
    assert_gradients(actual, functools.partial(plain, mask=mask.view(shape)), given, dy)


@pytest.mark.parametrize("case", [case for case in AWKWARD if case.dropout], ids=str)
def test_its_products(case, monkeypatch):
    on_target(monkeypatch, "sm_90", "tail_first")
    check_products(Planned(backend_module.BACKEND, TARGETS["sm_90"], "tail_first"), case)


@pytest.mark.parametrize(
    "needed",
    [c for n in (1, 2, 3) for c in itertools.combinations(("x", "A", "B"), n)],
    ids="+".join,
)
def test_only_the_needed_gradients(needed, triton_products):
    """Each subset gets the gradients that all together get."""
    triton_products("two_kernel")
    given, dy = operands()
    together = gradients(ours, given, dy)
    for name, some in gradients(ours, given, dy, needed=needed).items():
        assert torch.allclose(some, together[name], rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("shape", [(44,), (1, 44), (0, 44), (2, 0, 44), (2, 3, 4, 44)], ids=str)
def test_leading_shapes(shape, triton_products):
    triton_products("two_kernel")
    given, dy = operands(shape=shape)
    expected = gradients(plain, given, dy)
    for name, result in gradients(ours, given, dy).items():
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
    given, dy = operands()
    values = {**given, "dy": dy}
    values[which] = LAZY[kind](values[which])
    written = {
        n: torch.zeros(t.shape) if t._is_zerotensor() else t.clone() for n, t in values.items()
    }
    actual, expected = (
        gradients(call, each, each.pop("dy"), needed=("x", "A", "B"))
        for call, each in ((ours, values), (plain, written))
    )
    for name, result in actual.items():
        assert torch.allclose(result, expected[name], rtol=1e-4, atol=1e-4), name


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
        call = functools.partial(lora_linear, alpha=alpha, backend="triton", dropout_p=0.5)
        with strict.recording() as launches:
            gradients(call, *operands(shape=(M, 44)))
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
