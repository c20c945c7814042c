"""The arguments of one call as a value, and the rules that they obey: every error names argument, value and rule."""

from __future__ import annotations

import numbers
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from lora_kernels.autograd import ALPHA_IS_NO_PARAMETER
from lora_kernels.declined import why_declined
from lora_kernels.operands import DTYPES, QuantizedWeight, Weight

# Other types (fake and distributed tensors) intercept operators, so they must see a registered one.
TENSORS = frozenset({Tensor, torch.nn.Parameter})
EAGER_TYPES = TENSORS | {type(None)}


class Arguments(NamedTuple):
    """What `lora_linear` was called with; `grouped_lora_linear` where there are offsets, its scale as alpha."""

    x: Tensor
    weight: Weight
    A: Tensor
    B: Tensor
    alpha: float | Tensor
    bias: Tensor | None = None
    dropout_p: float = 0.0
    seed: int | Tensor | None = None
    backend: str = "auto"
    magnitude: Tensor | None = None
    offsets: Tensor | None = None


def check(a: Arguments, *, autocast: bool) -> None:
    """TypeError or ValueError unless these are the arguments of one LoRA linear.

    `autocast`: x, weight and bias will be cast to one dtype.
    """
    try:
        _check_operands(a, autocast)
    except RuntimeError:
        # A nested tensor has no shape. To ask each operand whether it is one would take 0.2 us of a call of 18.
        _check_each(a, a.x.device)
        raise
    # The usual arguments, of which there is nothing to check, cost no call.
    if type(a.alpha) is not float:
        stacked = a.offsets is not None
        check_scale(a.alpha, "scale" if stacked else "alpha", a.x.device, stacked)
    if type(a.dropout_p) is not float or a.dropout_p != 0.0:
        check_dropout("dropout_p", a.dropout_p)
    if a.seed is not None:
        _check_seed(a.seed)


def _check_operands(a: Arguments, autocast: bool) -> None:
    x, weight, A, B, _, bias, _, _, _, magnitude, offsets = a
    device = x.device if isinstance(x, Tensor) else None
    given = (x, weight, A, B) if bias is None else (x, weight, A, B, bias)
    for t in given if magnitude is None else (*given, magnitude):
        if type(t) not in TENSORS or t.dtype not in DTYPES or t.device != device:
            _check_each(a, device)  # most calls have nothing to name
            break
    if not isinstance(weight, Tensor):
        _check_packed(weight, device)
    if offsets is not None:
        _check_grouped(a, offsets)
    elif len(weight.shape) != 2:
        raise ValueError(f"weight must be [N, K], 2-D, got {_shape(weight)}")
    else:
        N, K = weight.shape
        x_shape, A_shape = x.shape, A.shape
        if not x_shape or x_shape[-1] != K:
            raise ValueError(f"x must be [..., K] with K = {K} as in weight, got {_shape(x)}")
        if len(A_shape) != 2 or A_shape[0] != K:
            raise ValueError(f"A must be [K, R] with K = {K} as in weight, got {_shape(A)}")
        R = A_shape[1]
        if B.shape != (R, N):
            raise ValueError(f"B must be [R, N] = [{R}, {N}], got {_shape(B)}")
        if bias is not None and bias.shape != (N,):
            raise ValueError(f"bias must be [N] = [{N}], got {_shape(bias)}")
        if magnitude is not None and magnitude.shape != (N,):
            raise ValueError(f"magnitude must be [N] = [{N}], got {_shape(magnitude)}")
    if A.dtype != B.dtype:
        raise TypeError(f"B must have A's dtype, {A.dtype}, got {B.dtype}")
    if autocast:
        return
    dtype = x.dtype
    if weight.dtype != dtype:
        raise TypeError(f"weight must have x's dtype, {dtype}, got {weight.dtype}")
    if bias is not None and bias.dtype != dtype:
        raise TypeError(f"bias must have x's dtype, {dtype}, got {bias.dtype}")


def _check_each(a: Arguments, device: torch.device | None) -> None:
    """TypeError or ValueError for the first operand that is none, has no dtype of `DTYPES` or lies on another device."""
    weight = a.weight
    usual = type(weight) in EAGER_TYPES or isinstance(weight, QuantizedWeight)
    if not usual and not torch.compiler.is_compiling():  # compilers cannot trace a search by name
        _check_kind(weight)
    for name in ("x", "weight", "A", "B", "bias", "magnitude"):
        t = getattr(a, name)
        if t is None and name in ("bias", "magnitude"):
            continue
        check_operand(t, name, device, packed=name == "weight")


def check_operand(t: Any, name: str, device: torch.device | None, *, packed: bool = False) -> None:
    """TypeError or ValueError unless t is a tensor, or where `packed` a quantised weight, of `DTYPES` and on this device."""
    if not isinstance(t, Tensor) and not (packed and isinstance(t, QuantizedWeight)):
        raise TypeError(f"{name} must be a Tensor, got {type(t).__name__}")
    if isinstance(t, Tensor):
        check_shaped(t, name)
    if t.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {t.dtype}")
    if t.device != device:
        raise ValueError(f"{name} must be on x's device, {device}, got {t.device}")


def check_shaped(t: Tensor, name: str, rule: str = "a dense tensor") -> None:
    """TypeError for a tensor without a shape: a nested one, or a parameter that has no values yet."""
    if t.is_nested:
        raise TypeError(f"{name} must be {rule}, got a nested one: give its values or pad it")
    if isinstance(t, (UninitializedParameter, UninitializedBuffer)):
        raise TypeError(
            f"{name} must be {rule}, got an {type(t).__name__}, which has no values yet"
        )


def check_scale(alpha: Any, name: str, device: torch.device, stacked: bool = False) -> None:
    """TypeError or ValueError unless it is a real number, or a tensor that needs no gradient: 0-d, or [G] where `stacked`.

    A tensor of one number may lie on the CPU, which every device reads it from.
    """
    rule = f"a number or a {'[G]' if stacked else '0-d'} tensor"
    if isinstance(alpha, Tensor):
        check_shaped(alpha, name, rule)
        if alpha.device != device and not (alpha.is_cpu and alpha.ndim == 0):
            raise ValueError(f"{name} must be on x's device, {device}, got {alpha.device}")
        if alpha.ndim != 0 and not stacked:
            raise ValueError(f"{name} must be a number or a 0-d tensor, got {_shape(alpha)}")
        if alpha.requires_grad:
            raise ValueError(ALPHA_IS_NO_PARAMETER.replace("alpha", name))
        if alpha.dtype == torch.bool or alpha.dtype.is_complex:
            raise TypeError(f"{name} must be real, got a tensor of {alpha.dtype}")
    elif isinstance(alpha, bool) or not isinstance(
        alpha, (int, float, torch.SymFloat, torch.SymInt, numbers.Real)
    ):
        raise TypeError(f"{name} must be {rule}, got {type(alpha).__name__}")
    else:
        number(alpha, name)


def _check_grouped(a: Arguments, offsets: Any) -> None:
    """TypeError or ValueError unless the shapes are those of `grouped_lora_linear`. The values of offsets are not read."""
    x, weight, A, B, scale, bias = a.x, a.weight, a.A, a.B, a.alpha, a.bias
    if not isinstance(offsets, Tensor):
        raise TypeError(f"offsets must be a Tensor, got {type(offsets).__name__}")
    check_shaped(offsets, "offsets")
    if offsets.dtype != torch.int32:
        raise TypeError(f"offsets must be int32, got {offsets.dtype}")
    if offsets.device != x.device:
        raise ValueError(f"offsets must be on x's device, {x.device}, got {offsets.device}")
    if offsets.ndim != 1 or offsets.shape[0] < 2:
        raise ValueError(f"offsets must be [G + 1] for G >= 1 groups, got {_shape(offsets)}")
    if a.magnitude is not None:
        raise ValueError("magnitude must be None over groups: DoRA has no form with offsets")
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
    if isinstance(scale, Tensor):
        check_shaped(scale, "scale", "a number or a [G] tensor")
        if scale.shape not in ((), (G,)):
            raise ValueError(f"scale must be a number or [G] = [{G}], got {_shape(scale)}")


def number(alpha: Any, name: str = "alpha") -> Any:
    """alpha as a Python float, whatever kind of real number it is; ValueError, by `name`, where it is past float64."""
    if isinstance(alpha, (float, Tensor, torch.SymFloat, torch.SymInt)):
        return alpha
    try:
        return float(alpha)
    except OverflowError:
        raise ValueError(
            f"{name} must be within float64's range, up to 1.8e308, got {shown(alpha)}"
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


def check_dropout(name: str, p: float) -> None:
    """ValueError unless 0 <= p < 1, TypeError unless it is a number."""
    if isinstance(p, bool) or not isinstance(p, (int, float)):
        raise TypeError(f"{name} must be a number in [0, 1), got {type(p).__name__}")
    if not 0.0 <= p < 1.0:
        raise ValueError(f"{name} must be in [0, 1), got {p}")


def _check_seed(seed: int | Tensor) -> None:
    """TypeError or ValueError unless it is an int64 or a 0-d int64 tensor."""
    if isinstance(seed, Tensor):
        check_shaped(seed, "seed", "an integer or a 0-d int64 tensor")
        if seed.ndim != 0 or seed.dtype != torch.int64:
            raise ValueError(f"seed must be 0-d int64, got {_shape(seed)} {seed.dtype}")
    elif isinstance(seed, bool) or not isinstance(seed, (int, torch.SymInt)):
        raise TypeError(f"seed must be an integer or a 0-d int64 tensor, got {type(seed).__name__}")
    elif not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must be in [-2^63, 2^63), got {seed}")


def _shape(t: Weight) -> list[int]:
    return list(t.shape)
