"""The layers that an adapter can be added to: their weight as an operand, and one product with the casts of their forward.

They are nn.Linear, Conv1D of Transformers, and Linear4bit and Linear8bitLt of bitsandbytes. Neither library is imported:
a layer is found by the names of its class or forward, and read by attribute in every call, so that what moves, loads or
quantises it again is seen.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.functional import autocast_dtype, lora_linear
from lora_kernels.operands import DTYPES, QuantizedWeight
from lora_kernels.quantized import from_bitsandbytes

_BITSANDBYTES = "bitsandbytes.nn.modules"
_QUANTIZED = ("Linear4bit.forward", "Linear8bitLt.forward")
_PLAIN_TENSORS = (nn.Parameter, Tensor)
_TRACED = ("torch._subclasses.fake_tensor", "torch._subclasses.functional_tensor")
# By name, so that torch.distributed is not imported; the operators have sharding rules for it, see `distributed`.
_SHARDED = "torch.distributed.tensor"


def is_linear(module: nn.Module) -> bool:
    """Whether `module` can be the base of a `LinearWithLoRA`."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is Transformers' Conv1D, a Linear that stores W [in, out]."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def is_quantized(linear: Any) -> bool:
    """Whether a module is bitsandbytes' Linear4bit or Linear8bitLt, or a subclass with the same forward."""
    forward = type(linear).forward
    return forward.__module__ == _BITSANDBYTES and forward.__qualname__ in _QUANTIZED


def features(linear: Any) -> tuple[int, int]:
    """(in, out) of a base."""
    if is_conv1d(linear):
        return linear.weight.shape[0], linear.weight.shape[1]
    return linear.in_features, linear.out_features


def adapter_dtype(linear: Any) -> torch.dtype | None:
    """The dtype that a base gives its adapter: its weight's or its compute_dtype, or None for torch's default."""
    if is_quantized(linear):
        return getattr(linear, "compute_dtype", None)
    return linear.weight.dtype if linear.weight.dtype in DTYPES else None


def is_plain_tensor(t: Tensor) -> bool:
    """Whether t is a dense tensor, or one that stands for it while torch.export traces."""
    return type(t) in _PLAIN_TENSORS or type(t).__module__ in _TRACED


def is_plain(linear: Any) -> bool:
    """Whether calling this base does nothing but x·Wᵀ + bias, so that it may be fused."""
    if type(linear).forward is nn.Linear.forward or is_conv1d(linear):
        weight = linear.weight
        known = is_plain_tensor(weight) or type(weight).__module__ == _SHARDED
    else:
        known = is_quantized(linear)
    return known and "forward" not in linear.__dict__ and not has_hooks(linear)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling `module` runs more than its forward, hooks on all modules aside."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def why_unreadable(linear: Any) -> str | None:
    """None if products can read the weight of this quantised base now, else the rule that it breaks."""
    try:
        _quantized_weight(linear, None)
    except (TypeError, ValueError) as error:
        return str(error)
    return None


def lora_linear_on(
    linear: Any,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float | Tensor,
    shift: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
) -> Tensor | None:
    """`linear(x) + shift + scale·(dropout(x)·A)·B` in one product, for a base that `is_plain`; None where it is unreadable.

    x [..., K], A [K, R], B [R, N], shift [N]. RuntimeError where x needs a gradient that bitsandbytes would leave out.
    """
    if type(linear).forward is not nn.Linear.forward and is_quantized(linear):
        return _on_quantized(linear, x, A, B, scale, shift, dropout_p)
    weight, bias = linear.weight, linear.bias
    if shift is not None:
        shift = shift.to(weight.dtype)
        bias = shift if bias is None else bias + shift
    w = weight if isinstance(linear, nn.Linear) else weight.t()
    return lora_linear(x, w, A, B, scale, bias, dropout_p=dropout_p)


def _on_quantized(
    linear: Any,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float | Tensor,
    shift: Tensor | None,
    dropout_p: float,
) -> Tensor | None:
    """`lora_linear_on` with the casts of bitsandbytes.

    A Linear4bit computes in its compute_dtype, or x's where it has none yet, under autocast too, and y has x's dtype. A
    Linear8bitLt computes in x's dtype or autocast's, and in training on a CPU y has that one.
    """
    _check_order(linear, x)
    dtype = _compute_dtype(linear, x)
    if x.dtype not in DTYPES:
        return None
    try:
        weight = _quantized_weight(linear, dtype)
    except (TypeError, ValueError):
        return None
    bias = None if linear.bias is None else linear.bias.to(dtype)
    if shift is not None:
        bias = shift.to(dtype) if bias is None else bias + shift.to(dtype)
    eight = hasattr(linear.weight, "SCB")
    device = x.device.type
    ignored = not eight and autocast_dtype(device) is not None
    with torch.autocast(device, enabled=False) if ignored else nullcontext():
        y = lora_linear(x.to(dtype), weight, A, B, scale, bias, dropout_p=dropout_p)
    return y if eight and linear.training and x.is_cpu else y.to(x.dtype)


def _quantized_weight(linear: Any, dtype: torch.dtype | None) -> QuantizedWeight:
    """The weight of a quantised base as a product in `dtype` reads it; raises what `from_bitsandbytes` raises.

    ValueError for a Linear8bitLt of threshold > 0 too.
    """
    if not hasattr(linear.weight, "SCB"):
        return from_bitsandbytes(linear.weight, dtype, linear.quant_state)
    if linear.state.threshold > 0:
        raise ValueError(
            "threshold must be 0, without the outlier columns of LLM.int8, which depend on the"
            f" values of x, got {linear.state.threshold}"
        )
    return from_bitsandbytes(linear.weight, dtype, linear.state)


def _compute_dtype(linear: Any, x: Tensor) -> torch.dtype:
    """The dtype that such a base casts x, weight and bias to: its compute_dtype, or x's where it has none yet."""
    if getattr(linear, "compute_type_is_set", False) or x.dtype == torch.float16:
        return getattr(linear, "compute_dtype", None) or x.dtype
    return x.dtype


def _check_order(linear: Any, x: Tensor) -> None:
    """RuntimeError where bitsandbytes reordered the weight of `linear` and would leave out the gradient that x needs."""
    state = getattr(linear.weight, "quant_state", None)
    reordered = getattr(state, "packing_format_for_cpu", False)
    if reordered and torch.is_grad_enabled() and x.requires_grad:
        raise RuntimeError(
            "weight must be packed row after row where x requires grad, got"
            " packing_format_for_cpu: bitsandbytes reordered it in an eval() forward of its own and"
            " would compute no gradient of x. Call state_dict() of the Linear4bit once, which puts"
            " it back"
        )
