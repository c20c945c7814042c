"""The functional form of a LoRA linear layer: the one place that checks operands, casts them and flattens x."""

from __future__ import annotations

import math
import numbers
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lora_kernels import autograd, dora, formulas, ops, plan
from lora_kernels.autograd import ALPHA_IS_NO_PARAMETER, Call, as_dropout
from lora_kernels.backends.composite import with_column_scale
from lora_kernels.declined import why_declined
from lora_kernels.dropout import Dropout, scaled_mask
from lora_kernels.operands import (
    DTYPES,
    Adapter,
    QuantizedWeight,
    Weight,
    accumulated,
    adapters_as_used,
    bounds_of,
    groups_of,
    problem_of,
)
from lora_kernels.plan import Plan
from lora_kernels.problem import Problem

# Other types (fake and distributed tensors) intercept operators, so they must see a registered one.
_EAGER_TYPES = frozenset({Tensor, torch.nn.Parameter, type(None)})


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
    `F.linear(x, weight)`, under autocast as well. Sums run in float32 (float64 for float64) and are rounded at the end.

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
    return call(x, weight, A, B, alpha, bias, dropout_p, seed, backend, magnitude=magnitude)


def call(
    x: Tensor,
    weight: Weight,
    A: Tensor,
    B: Tensor,
    alpha: float | Tensor,
    bias: Tensor | None,
    dropout_p: float,
    seed: int | Tensor | None,
    backend: str,
    offsets: Tensor | None = None,
    magnitude: Tensor | None = None,
) -> Tensor:
    """`lora_linear`, over groups of rows where there are offsets: checks the operands and does what autocast asks for."""
    half = check_call(x, weight, A, B, alpha, bias, dropout_p, seed, backend, offsets, magnitude)
    compute: Any = apply if magnitude is None else _apply_dora
    last = offsets if magnitude is None else magnitude
    if half is not None:
        x = x.to(half)
        weight = weight.to(half)
        bias = None if bias is None else bias.to(half)
        with torch.autocast(x.device.type, enabled=False):
            return compute(x, weight, A, B, alpha, bias, dropout_p, seed, backend, last)
    return compute(x, weight, A, B, alpha, bias, dropout_p, seed, backend, last)


def check_call(
    x: Tensor,
    weight: Weight,
    A: Tensor,
    B: Tensor,
    alpha: float | Tensor,
    bias: Tensor | None,
    dropout_p: float,
    seed: int | Tensor | None,
    backend: str,
    offsets: Tensor | None = None,
    magnitude: Tensor | None = None,
) -> torch.dtype | None:
    """TypeError or ValueError unless these are the arguments of `call`; the dtype that autocast casts x to, or None."""
    half = _autocast_to(x)
    check_operands(
        x, weight, A, B, alpha, bias, magnitude, autocast=half is not None, offsets=offsets
    )
    check_dropout("dropout_p", dropout_p)
    _check_seed(seed)
    plan.check_name(backend)
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
    half = _autocast_to(x)
    check_operands(
        x, weight, A, B, alpha, bias, magnitude, autocast=half is not None, offsets=offsets
    )
    check_dropout("dropout_p", dropout_p)
    groups = groups_of(offsets, weight, bias)
    problem = problem_of(x, weight, A, bias, dropout=dropout_p > 0, dtype=half, groups=groups)
    return replace(plan.explain(problem, backend), magnitude=magnitude is not None)


def check_operands(
    x: Tensor,
    weight: Weight,
    A: Tensor,
    B: Tensor,
    alpha: float | Tensor,
    bias: Tensor | None,
    magnitude: Tensor | None = None,
    *,
    autocast: bool,
    offsets: Tensor | None = None,
) -> None:
    """TypeError or ValueError unless these are the operands of one LoRA linear; it names argument, value and rule.

    `autocast`: x, weight and bias will be cast to one dtype. With `offsets` they are those of `grouped_lora_linear`.
    """
    device = x.device if isinstance(x, Tensor) else None
    usual = type(weight) in _EAGER_TYPES or isinstance(weight, QuantizedWeight)
    if not usual and not torch.compiler.is_compiling():  # compilers cannot trace a search by name
        _check_kind(weight)
    operands = ("x", x), ("weight", weight), ("A", A), ("B", B), ("bias", bias)
    for name, t in (*operands, ("magnitude", magnitude)):
        if t is None and name in ("bias", "magnitude"):
            continue
        if not isinstance(t, Tensor) and not (name == "weight" and isinstance(t, QuantizedWeight)):
            raise TypeError(f"{name} must be a Tensor, got {type(t).__name__}")
        if t.dtype not in DTYPES:
            raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {t.dtype}")
        if t.device != device:
            raise ValueError(f"{name} must be on x's device, {device}, got {t.device}")
    if x.is_nested:
        raise TypeError("x must be a dense tensor, got a nested one: give its values or pad it")
    if not isinstance(weight, Tensor):
        _check_packed(weight, device)
    if offsets is not None:
        _check_grouped(x, weight, A, B, alpha, bias, offsets)
    elif len(weight.shape) != 2:
        raise ValueError(f"weight must be [N, K], 2-D, got {_shape(weight)}")
    else:
        N, K = weight.shape
        if x.ndim < 1 or x.shape[-1] != K:
            raise ValueError(f"x must be [..., K] with K = {K} as in weight, got {_shape(x)}")
        if A.ndim != 2 or A.shape[0] != K:
            raise ValueError(f"A must be [K, R] with K = {K} as in weight, got {_shape(A)}")
        R = A.shape[1]
        if B.shape != (R, N):
            raise ValueError(f"B must be [R, N] = [{R}, {N}], got {_shape(B)}")
        if bias is not None and bias.shape != (N,):
            raise ValueError(f"bias must be [N] = [{N}], got {_shape(bias)}")
        if magnitude is not None and magnitude.shape != (N,):
            raise ValueError(f"magnitude must be [N] = [{N}], got {_shape(magnitude)}")
    if A.dtype != B.dtype:
        raise TypeError(f"B must have A's dtype, {A.dtype}, got {B.dtype}")
    if not autocast:
        for name, t in (("weight", weight), ("bias", bias)):
            if t is not None and t.dtype != x.dtype:
                raise TypeError(f"{name} must have x's dtype, {x.dtype}, got {t.dtype}")
    name, rule = ("alpha", "0-d") if offsets is None else ("scale", "[G]")
    if isinstance(alpha, Tensor):
        if alpha.ndim != 0 and offsets is None:
            raise ValueError(f"alpha must be a number or a 0-d tensor, got {_shape(alpha)}")
        if alpha.requires_grad:
            raise ValueError(ALPHA_IS_NO_PARAMETER.replace("alpha", name))
        if alpha.dtype == torch.bool or alpha.dtype.is_complex:
            raise TypeError(f"{name} must be real, got a tensor of {alpha.dtype}")
    elif isinstance(alpha, bool) or not isinstance(
        alpha, (int, float, torch.SymFloat, torch.SymInt, numbers.Real)
    ):
        raise TypeError(f"{name} must be a number or a {rule} tensor, got {type(alpha).__name__}")
    else:
        as_number(alpha)


def _check_grouped(
    x: Tensor,
    weight: Weight,
    A: Tensor,
    B: Tensor,
    scale: float | Tensor,
    bias: Tensor | None,
    offsets: Tensor,
) -> None:
    """TypeError or ValueError unless the shapes are those of `grouped_lora_linear`. The values of offsets are not read."""
    if not isinstance(offsets, Tensor):
        raise TypeError(f"offsets must be a Tensor, got {type(offsets).__name__}")
    if offsets.dtype != torch.int32:
        raise TypeError(f"offsets must be int32, got {offsets.dtype}")
    if offsets.device != x.device:
        raise ValueError(f"offsets must be on x's device, {x.device}, got {offsets.device}")
    if offsets.ndim != 1 or offsets.shape[0] < 2:
        raise ValueError(f"offsets must be [G + 1] for G >= 1 groups, got {_shape(offsets)}")
    G = offsets.shape[0] - 1
    shape = weight.shape
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[0] != G):
        raise ValueError(f"weight must be [G, N, K] with G = {G} or [N, K], got {_shape(weight)}")
    N, K = shape[-2:]
    if x.ndim != 2 or x.shape[1] != K:
        raise ValueError(f"x must be [T, K] with K = {K} as in weight, got {_shape(x)}")
    if A.ndim != 3 or A.shape[:2] != (G, K):
        raise ValueError(f"A must be [G, K, R] with G, K = {G}, {K}, got {_shape(A)}")
    R = A.shape[2]
    if B.shape != (G, R, N):
        raise ValueError(f"B must be [G, R, N] = [{G}, {R}, {N}], got {_shape(B)}")
    if bias is not None and bias.shape not in ((N,), (G, N)):
        raise ValueError(f"bias must be [G, N] = [{G}, {N}] or [N], got {_shape(bias)}")
    if isinstance(scale, Tensor) and scale.shape not in ((), (G,)):
        raise ValueError(f"scale must be a number or [G] = [{G}], got {_shape(scale)}")
    if isinstance(scale, Tensor) and scale.ndim == 1 and scale.device != x.device:
        raise ValueError(f"scale must be on x's device, {x.device}, got {scale.device}")


def as_number(alpha: Any) -> Any:
    """alpha as a Python float, whatever kind of real number it is; ValueError where it is past float64."""
    if isinstance(alpha, (float, Tensor, torch.SymFloat, torch.SymInt)):
        return alpha
    try:
        return float(alpha)
    except OverflowError:
        raise ValueError(
            f"alpha must be within float64's range, up to 1.8e308, got {shown(alpha)}"
        ) from None


def shown(number: Any) -> str:
    """A real number in a few characters, for an error: an integer may have thousands of digits."""
    try:
        return f"{float(number):.6g}"
    except OverflowError:
        bits = number.numerator.bit_length() - number.denominator.bit_length()
        return f"about {'-' if number < 0 else ''}2^{bits}"


def _check_kind(weight: Any) -> None:
    """TypeError for a tensor of a quantised kind that products cannot read as it is; it says why."""
    reason = why_declined(weight)
    if reason is not None:
        raise TypeError(f"weight must be a dense tensor or a QuantizedWeight, but {reason}")
    if hasattr(weight, "quant_state") or hasattr(weight, "SCB"):
        raise TypeError(
            f"weight must be a dense tensor or a QuantizedWeight, got a {type(weight).__name__}: give"
            " lora_kernels.quantized.from_bitsandbytes(weight)"
        )


def _check_packed(weight: QuantizedWeight, device: torch.device | None) -> None:
    """ValueError unless every packed tensor is on x's device and none requires grad."""
    for t in weight.tensors:
        if t.device != device:
            raise ValueError(f"weight must be on x's device, {device}, got {t.device} in part")
        dual = forward_ad._current_level >= 0 and forward_ad.unpack_dual(t).tangent is not None
        if t.requires_grad or dual:
            raise ValueError(
                f"weight must not require grad: a quantised weight has no gradient, got a packed"
                f" {weight.format} tensor that requires one"
            )


def alpha_tensor(alpha: float, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """alpha as the 0-d tensor that traced code reads, as exact as sums of `dtype`."""
    wide = accumulated(dtype)
    if isinstance(alpha, float) and abs(alpha) > torch.finfo(wide).max:
        alpha = math.copysign(math.inf, alpha)  # as a product with it would be
    return torch.scalar_tensor(alpha, dtype=wide, device=device)


def check_dropout(name: str, p: float) -> None:
    """ValueError unless 0 <= p < 1, TypeError unless it is a number."""
    if isinstance(p, bool) or not isinstance(p, (int, float)):
        raise TypeError(f"{name} must be a number in [0, 1), got {type(p).__name__}")
    if not 0.0 <= p < 1.0:
        raise ValueError(f"{name} must be in [0, 1), got {p}")


def _check_seed(seed: int | Tensor | None) -> None:
    """TypeError or ValueError unless it is None, an int64 or a 0-d int64 tensor."""
    if isinstance(seed, Tensor):
        if seed.ndim != 0 or seed.dtype != torch.int64:
            raise ValueError(f"seed must be 0-d int64, got {_shape(seed)} {seed.dtype}")
    elif seed is not None:
        if isinstance(seed, bool) or not isinstance(seed, (int, torch.SymInt)):
            raise TypeError(
                f"seed must be an integer or a 0-d int64 tensor, got {type(seed).__name__}"
            )
        if not -(2**63) <= seed < 2**63:
            raise ValueError(f"seed must be in [-2^63, 2^63), got {seed}")


def _autocast_to(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast casts x to now, or None; float64 it leaves alone."""
    if not isinstance(x, Tensor) or x.dtype == torch.float64:
        return None
    return autocast_dtype(x.device.type)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast computes in on this device type now, or None; "meta" and others have no autocast."""
    # torch 2.11 cannot trace is_autocast_available: it is not called for the devices that code is compiled for.
    known = device_type in ("cpu", "cuda") or torch.amp.is_autocast_available(device_type)
    if known and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def apply(
    x: Tensor,
    weight: Weight,
    A: Tensor,
    B: Tensor,
    alpha: float | Tensor,
    bias: Tensor | None,
    dropout_p: float,
    seed: int | Tensor | None,
    backend: str,
    offsets: Tensor | None = None,
) -> Tensor:
    """y of checked operands: casts the adapters, flattens x, calls an operator or the Function."""
    A, B = adapters_as_used(A, B, x.dtype)
    if type(alpha) is not float:
        alpha = as_number(alpha)
    seed = seed_on(seed, x.device) if dropout_p else None
    quantised = not isinstance(weight, Tensor)  # the type check of an abstract class takes longer
    traced = is_traced(x, weight if isinstance(weight, Tensor) else None, A, B, bias)
    chosen = None
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or A.requires_grad)
    usual = not traced and _has_usual_derivatives(weight, A, B, alpha, bias)
    if usual and (x.is_cpu or not needs_grad):
        groups = groups_of(offsets, weight, bias)
        chosen = plan.plan_call(backend, x, weight, A, bias, seed is not None, groups)
        adapter = Adapter(A, B, alpha, None if seed is None else as_dropout(dropout_p, seed))
        layer = chosen.products.layer
        if layer is not None and isinstance(weight, Tensor) and groups is None:
            return layer(x, weight, adapter, bias)
    lead = x.shape[:-1]
    rows = x if x.ndim == 2 else x.reshape(math.prod(lead), x.shape[-1])
    rest = A, B, bias, alpha, dropout_p, seed, backend
    # A Function hides packed tensors, which are no arguments of its own, and has no tangents over groups.
    if (quantised or offsets is not None) and is_differentiated_elsewhere():
        if type(offsets) is Tensor and offsets.is_cpu and not traced:
            bounds_of(offsets, x.shape[0])  # which plain ATen does not read
        y, _ = autograd.transparent(rows, weight, *rest, offsets)
    elif traced:
        y, _ = _traced(rows, weight, *rest, offsets)
    elif chosen is not None and not needs_grad:
        weight = chosen.readable(weight)
        y, _ = formulas.forward(chosen.products.bound(groups), rows, weight, adapter, bias)
    else:
        call = Call(backend, chosen)
        y, _ = autograd.apply(rows, weight, A, B, bias, alpha, dropout_p, seed, call, offsets)
    return y if x.ndim == 2 else y.reshape(*lead, weight.shape[-2])


def _apply_dora(
    x: Tensor,
    weight: Weight,
    A: Tensor,
    B: Tensor,
    alpha: float | Tensor,
    bias: Tensor | None,
    dropout_p: float,
    seed: int | Tensor | None,
    backend: str,
    magnitude: Tensor,
) -> Tensor:
    """`apply` with DoRA's magnitude: in eager mode in one product, else as a scale of the columns of `apply`'s result."""
    A, B = adapters_as_used(A, B, x.dtype)
    alpha = as_number(alpha)
    if dropout_p:
        rest = A, B, alpha, bias, magnitude, dropout_p, seed, backend
        return _apply_dropped(x, weight, *rest)
    dense = weight if isinstance(weight, Tensor) else None
    traced = is_traced(x, dense, A, B, bias, magnitude)
    elsewhere = is_differentiated_elsewhere()
    if traced and not isinstance(alpha, Tensor):
        alpha = alpha_tensor(alpha, x.dtype, x.device)
    how = "operator" if torch.compiler.is_compiling() else "transparent"
    how = "transparent" if elsewhere else how if traced else "eager"
    c = dora.column_scale(magnitude, dora.row_norms(weight, A, B, alpha, backend, how=how))
    if how != "eager":
        z = apply(x, weight, A, B, alpha, None, 0.0, None, backend)
        return with_column_scale(z, c, bias)
    lead = x.shape[:-1]
    rows = x if x.ndim == 2 else x.reshape(math.prod(lead), x.shape[-1])
    y = dora.dora_linear(rows, weight, A, B, bias, alpha, backend, c)
    return y if x.ndim == 2 else y.reshape(*lead, weight.shape[0])


def _apply_dropped(
    x: Tensor,
    weight: Weight,
    A: Tensor,
    B: Tensor,
    alpha: float | Tensor,
    bias: Tensor | None,
    magnitude: Tensor,
    dropout_p: float,
    seed: int | Tensor | None,
    backend: str,
) -> Tensor:
    """DoRA with dropout: the whole layer on v = dropout(x), and the base on what is left, x - v.

    y = (x - v)·Wᵀ + bias + c∘(v·Wᵀ + alpha·(v·A)·B) = x·Wᵀ + bias + (c-1)∘v·Wᵀ + c∘alpha·(v·A)·B, as PEFT has it.
    """
    if seed is None:
        v = torch.nn.functional.dropout(x, dropout_p)
    else:
        rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        dropout = Dropout(dropout_p, seed_on(seed, x.device))
        v = (rows * scaled_mask(dropout, rows.shape[0], rows.shape[1], x.dtype)).view(x.shape)
    adapted = _apply_dora(v, weight, A, B, alpha, None, 0.0, None, backend, magnitude)
    left = apply(x - v, weight, A[:, :0], B[:0], alpha, bias, 0.0, None, backend)
    return left + adapted


def is_traced(*operands: Tensor | None) -> bool:
    """Whether registered operators must be called, which compilers, modes and other kinds of tensors see."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or not _EAGER_TYPES.issuperset(map(type, operands))
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
    if (
        forward_ad._current_level >= 0
    ):  # the operator, when it runs, cannot see compiled code's dual level
        return autograd.transparent(x, weight, *adapter)
    if isinstance(weight, Tensor):
        return ops.lora_linear(x, weight, *adapter)
    packed = list(weight.tensors), weight.format, list(weight.sizes)
    return ops.lora_linear_quantized(x, *packed, *adapter)


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


def _shape(t: Weight) -> list[int]:
    return list(t.shape)
