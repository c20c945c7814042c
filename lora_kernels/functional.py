"""The functional form of a LoRA linear layer: the one place that casts operands and flattens x."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lora_kernels import autograd, dora, formulas, ops, plan
from lora_kernels.arguments import EAGER_TYPES, Arguments, check, number
from lora_kernels.autograd import Call, as_dropout
from lora_kernels.backends.composite import with_column_scale
from lora_kernels.dropout import Dropout, keep_mask, masked
from lora_kernels.operands import (
    Adapter,
    Weight,
    accumulated,
    adapters_as_used,
    bounds_of,
    groups_of,
    problem_of,
)
from lora_kernels.plan import Plan
from lora_kernels.problem import Problem


def lora_linear(
    x: Tensor,
    weight: Weight,
    A: Tensor,
    B: Tensor,
    alpha: float | Tensor,
    bias: Tensor | None = None,
    *,
    magnitude: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """y = x·weightᵀ + bias + alpha·(dropout(x)·A)·B, fused, with every derivative.

    x [..., K], weight [N, K] as nn.Linear stores it, A [K, R], B [R, N], bias [N] -> y [..., N]; any strides, any sizes,
    zero included. x, weight and bias share one of float32, bfloat16, float16, float64; A and B share a dtype of their own
    (float32 adapters on a half base are used as they are, others are cast to x's). y has the dtype of
    `F.linear(x, weight)`, under autocast as well. Sums run in float32 (float64 for float64) and are rounded at the end; x·A
    may be rounded to the type of half adapters as well, as PyTorch rounds it.

    alpha: the final multiplier, a real number or a 0-d tensor that needs no gradient, read when the product is computed.
    dropout_p: probability in [0, 1) of dropping an element of x on the LoRA branch only. seed: an integer or 0-d int64
    tensor that fixes the mask; drawn from torch's generator when None, so a replay under checkpointing draws it again.
    backend: "auto", or a backend's name, which then computes or raises RuntimeError.

    magnitude [N], of any of these dtypes, makes it DoRA (Liu et al., ICML 2024): y = c∘(x·weightᵀ + alpha·(x·A)·B) + bias
    with c = magnitude / n, n the norms of the rows of weight + alpha·(A·B)ᵀ. n is a constant for every derivative, that of
    a trained weight included. With dropout y = x·weightᵀ + bias - v·weightᵀ + c∘(v·weightᵀ + alpha·(v·A)·B) for
    v = dropout(x), which takes a second product with weight.

    ValueError or TypeError names the argument, its value and the rule.

    >>> x, layer = torch.randn(4, 8), torch.nn.Linear(8, 6)
    >>> A, B = torch.randn(8, 2), torch.randn(2, 6)
    >>> y = lora_linear(x, layer.weight, A, B, 0.5, layer.bias)
    >>> torch.allclose(y, layer(x) + 0.5 * (x @ A @ B), atol=1e-5)
    True
    """
    return call(Arguments(x, weight, A, B, alpha, bias, dropout_p, seed, backend, magnitude))


def call(a: Arguments) -> Tensor:
    """`lora_linear`, over groups of rows where there are offsets: checks the arguments and does what autocast asks for."""
    half = check_call(a)
    compute = apply if a.magnitude is None else _apply_dora
    if half is None:
        return compute(a)
    bias = None if a.bias is None else a.bias.to(half)
    a = a._replace(x=a.x.to(half), weight=a.weight.to(half), bias=bias)
    with torch.autocast(a.x.device.type, enabled=False):
        return compute(a)


def check_call(a: Arguments) -> torch.dtype | None:
    """TypeError or ValueError unless these are the arguments of `call`; the dtype that autocast casts x to, or None."""
    half = _autocast_to(a.x)
    check(a, autocast=half is not None)
    plan.check_name(a.backend)
    return half


def explain(
    x: Tensor | Problem,
    weight: Weight | None = None,
    A: Tensor | None = None,
    B: Tensor | None = None,
    alpha: float | Tensor = 1.0,
    bias: Tensor | None = None,
    *,
    magnitude: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
    offsets: Tensor | None = None,
) -> Plan:
    """The plan of `lora_linear` for these operands (or this Problem): its backend, and why it takes no other.

    With `offsets` it is that of `grouped_lora_linear`.
    Print it, or read `.backend`, `.rejected` (name -> reason) and `.plan`. Raises what the call itself would raise.
    """
    if isinstance(x, Problem):
        return plan.explain(x, backend)
    if weight is None or A is None or B is None:
        raise TypeError("explain needs a Problem, or x, weight, A and B")
    half = check_call(
        Arguments(x, weight, A, B, alpha, bias, dropout_p, None, backend, magnitude, offsets)
    )
    groups = groups_of(offsets, weight, bias)
    problem = problem_of(x, weight, A, bias, dropout=dropout_p > 0, dtype=half, groups=groups)
    return replace(plan.explain(problem, backend), magnitude=magnitude is not None)


def alpha_tensor(alpha: float, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """alpha as the 0-d tensor that traced code reads, as exact as sums of `dtype`."""
    sums = accumulated(dtype)
    if isinstance(alpha, float) and abs(alpha) > torch.finfo(sums).max:
        alpha = math.copysign(math.inf, alpha)  # as a product with it would be
    return torch.scalar_tensor(alpha, dtype=sums, device=device)


def _autocast_to(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast casts x to now, or None; float64 it leaves alone."""
    if not isinstance(x, Tensor):
        return None
    half = autocast_dtype("cpu" if x.is_cpu else x.device.type)  # the string takes longer
    return None if half is None or x.dtype == torch.float64 else half


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast computes in on this device type now, or None; "meta" and others have no autocast."""
    # torch 2.11 cannot trace is_autocast_available: it is not called for the devices that code is compiled for.
    known = device_type in ("cpu", "cuda") or torch.amp.is_autocast_available(device_type)
    if known and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def apply(a: Arguments) -> Tensor:
    """y of checked arguments: casts the adapters, flattens x, calls an operator or the Function."""
    x, weight, A, B, alpha, bias, dropout_p, seed, backend, _, offsets = a
    A, B = adapters_as_used(A, B, x.dtype)
    alpha = alpha if type(alpha) is float else number(alpha)
    quantised = not isinstance(weight, Tensor)  # the type check of an abstract class takes longer
    traced = is_traced(x, weight if isinstance(weight, Tensor) else None, A, B, bias)
    planned = None
    seed = seed_on(seed, x.device) if dropout_p else None
    if seed is not None and not traced and not is_differentiated_elsewhere():
        groups = groups_of(offsets, weight, bias)
        planned = plan.plan_call(backend, x, weight, A, bias, True, groups)
        if planned.backend == "eager" and planned.adjoint.backend == "eager":
            seed = keep_mask(Dropout(dropout_p, seed), math.prod(x.shape[:-1]), x.shape[-1])
    chosen = None
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or A.requires_grad)
    usual = not traced and _has_usual_derivatives(weight, A, B, alpha, bias)
    if usual and (x.is_cpu or not needs_grad):
        groups = groups_of(offsets, weight, bias)
        chosen = planned or plan.plan_call(backend, x, weight, A, bias, False, groups)
        adapter = Adapter(A, B, alpha, None if seed is None else as_dropout(dropout_p, seed))
        layer = chosen.products.layer
        if layer is not None and not chosen.dequantises and groups is None:
            return layer(x, weight, adapter, bias)
    rows = rows_of(x)
    rest = A, B, bias, alpha, dropout_p, seed
    # A Function hides packed tensors, which are no arguments of its own, and has no tangents over groups.
    if (quantised or offsets is not None) and is_differentiated_elsewhere():
        if type(offsets) is Tensor and offsets.is_cpu and not traced:
            bounds_of(offsets, x.shape[0])  # which plain ATen does not read
        y, _ = autograd.transparent(rows, weight, *rest, backend, offsets)
    elif traced:
        y, _ = _traced(rows, weight, *rest, backend, offsets)
    elif chosen is not None and not needs_grad:
        weight = chosen.readable(weight)
        y, _ = formulas.forward(chosen.products.bound(groups), rows, weight, adapter, bias)
    else:
        y, _ = autograd.apply(rows, weight, *rest, Call(backend, chosen or planned), offsets)
    return like(y, x)


def _apply_dora(a: Arguments) -> Tensor:
    """`apply` with DoRA's magnitude: in eager mode in one product, else as a scale of the columns of `apply`'s result."""
    A, B = adapters_as_used(a.A, a.B, a.x.dtype)
    a = a._replace(A=A, B=B, alpha=number(a.alpha))
    if a.dropout_p:
        return _apply_dora_dropped(a)
    x, weight, bias, magnitude = a.x, a.weight, a.bias, a.magnitude
    assert magnitude is not None
    dense = weight if isinstance(weight, Tensor) else None
    traced = is_traced(x, dense, A, B, bias, magnitude)
    if traced and not isinstance(a.alpha, Tensor):
        a = a._replace(alpha=alpha_tensor(a.alpha, x.dtype, x.device))
    if is_differentiated_elsewhere() or (traced and not torch.compiler.is_compiling()):
        how = "transparent"
    else:
        how = "operator" if traced else "eager"
    norms = dora.row_norms(weight, A, B, a.alpha, a.backend, how=how)
    c = dora.column_scale(magnitude, norms)
    if how != "eager":
        return with_column_scale(apply(a._replace(bias=None)), c, bias)
    usual = _has_usual_derivatives(weight, A, B, a.alpha, bias)
    return like(dora.dora_linear(rows_of(x), weight, A, B, bias, a.alpha, a.backend, c, usual), x)


def _apply_dora_dropped(a: Arguments) -> Tensor:
    """DoRA with dropout: the whole layer on v = dropout(x), and the base on what is left, x - v.

    y = (x - v)·Wᵀ + bias + c∘(v·Wᵀ + alpha·(v·A)·B) = x·Wᵀ + bias + (c-1)∘v·Wᵀ + c∘alpha·(v·A)·B, as PEFT has it.
    """
    x = a.x
    if a.seed is None:
        v = torch.nn.functional.dropout(x, a.dropout_p)
    else:
        dropout = Dropout(a.dropout_p, seed_on(a.seed, x.device))
        v = masked(rows_of(x), dropout).view(x.shape)
    a = a._replace(dropout_p=0.0, seed=None)
    left = apply(a._replace(x=x - v, A=a.A[:, :0], B=a.B[:0]))
    return left + _apply_dora(a._replace(x=v, bias=None))


def rows_of(x: Tensor) -> Tensor:
    """x [..., K] as a matrix."""
    return x if x.ndim == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def like(y: Tensor, x: Tensor) -> Tensor:
    """y [M, N] with the leading dimensions of x."""
    return y if x.ndim == 2 else y.reshape(*x.shape[:-1], y.shape[-1])


def is_traced(*operands: Tensor | None) -> bool:
    """Whether registered operators must be called, which compilers, modes and other kinds of tensors see."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or not EAGER_TYPES.issuperset(map(type, operands))
        or autograd.modes_are_active()
    )


def _traced(
    x: Tensor,
    weight: Weight,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None,
    alpha: float | Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    """(y, s) by the registered operators."""
    if not torch.compiler.is_compiling():
        ops.count_flops()
    if not isinstance(alpha, Tensor):
        alpha = alpha_tensor(alpha, x.dtype, x.device)
    adapter = A, B, bias, alpha, *rest
    # The operator, when it runs, cannot see compiled code's dual level.
    if forward_ad._current_level >= 0:
        return autograd.transparent(x, weight, *adapter)
    if isinstance(weight, Tensor):
        return ops.lora_linear(x, weight, *adapter)
    return ops.lora_linear_quantized(x, *weight.flat, *adapter)


def is_differentiated_elsewhere() -> bool:
    """Whether a function transform or forward mode is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _has_usual_derivatives(
    weight: Weight, A: Tensor, B: Tensor, alpha: float | Tensor, bias: Tensor | None
) -> bool:
    """Whether no derivative but a backward can follow, of A and B both or neither, over a frozen base."""
    return not (
        isinstance(alpha, Tensor)
        or (
            torch.is_grad_enabled()
            and (
                (isinstance(weight, Tensor) and weight.requires_grad)
                or A.requires_grad != B.requires_grad
                or (bias is not None and bias.requires_grad)
            )
        )
        or is_differentiated_elsewhere()
    )


def seed_on(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """A 0-d int64 tensor on `device`: as given, or drawn from that device's torch generator."""
    if seed is None:
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        return seed.to(device)
    return torch.full((), seed, dtype=torch.int64, device=device)
