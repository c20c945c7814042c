"""The layers that an adapter can be added to: their weight as an operand, and one product with the casts of their forward.

They are nn.Linear, Conv1D of Transformers, and as quantised ones Linear4bit and Linear8bitLt of bitsandbytes and FP8Linear
of Transformers. None of these libraries is imported: a layer is found by the names of its classes, and read by attribute in
every call, so that what moves, loads or quantises it again is seen.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_kernels import dora
from lora_kernels.arguments import TENSORS
from lora_kernels.declined import why_declined
from lora_kernels.functional import autocast_dtype, lora_linear
from lora_kernels.operands import DTYPES, QuantizedWeight, Weight, adapters_as_used
from lora_kernels.quantized import NotFrozen, from_bitsandbytes, from_fp8_linear

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


class _Quantized(NamedTuple):
    """A kind of quantised base: how its weight is read for a product in a dtype, and the casts of its forward."""

    weight: Callable[[Any, torch.dtype | None], Weight]
    in_compute_dtype: bool  # it computes in its compute_dtype, others in x's dtype
    under_autocast: bool  # autocast casts x and the weight, else it changes nothing


def _weight_of_4bit(linear: Any, dtype: torch.dtype | None) -> QuantizedWeight:
    weight = from_bitsandbytes(linear.weight, dtype, linear.quant_state)
    if weight.shape != (linear.out_features, linear.in_features):
        raise ValueError(
            "weight.quant_state.shape must be [out_features, in_features] ="
            f" {[linear.out_features, linear.in_features]}, got {list(weight.shape)}"
        )
    return weight


def _weight_of_8bit(linear: Any, dtype: torch.dtype | None) -> QuantizedWeight:
    return from_bitsandbytes(linear.weight, dtype, linear.state)


def _weight_of_fp8(linear: Any, dtype: torch.dtype | None) -> Weight:
    """Or the tensor that it is where Transformers has dequantised the layer."""
    plain: Tensor = linear.weight
    return plain if plain.dtype in DTYPES else from_fp8_linear(linear, dtype)


# By the module and the name of the class that has their forward: a subclass with the same forward is found as well.
_BITSANDBYTES, _FP8 = "bitsandbytes.nn.modules", "transformers.integrations.finegrained_fp8"
_QUANTIZED = {
    (_BITSANDBYTES, "Linear4bit"): _Quantized(_weight_of_4bit, True, False),
    (_BITSANDBYTES, "Linear8bitLt"): _Quantized(_weight_of_8bit, False, True),
    (_FP8, "FP8Linear"): _Quantized(_weight_of_fp8, False, False),
}


def _quantized(linear: Any) -> _Quantized | None:
    """The kind of a quantised base; None for every other module."""
    if type(linear).forward is nn.Linear.forward:
        return None
    for cls in type(linear).__mro__:
        if "forward" in cls.__dict__:  # compilers cannot trace the forward's own module and name
            return _QUANTIZED.get((cls.__module__, cls.__name__))
    return None


def is_quantized(linear: Any) -> bool:
    """Whether a module is one of the quantised layers that products read, or a subclass with the same forward."""
    return _quantized(linear) is not None


def is_packed(linear: Any) -> bool:
    """Whether the weight of a base is quantised now; an FP8Linear that Transformers has dequantised is not."""
    return is_quantized(linear) and isinstance(quantized_weight(linear), QuantizedWeight)


def quantized_weight(linear: Any, dtype: torch.dtype | None = None) -> Weight:
    """The weight [N, K] of a quantised base as products over an x of `dtype` read it, over the same memory.

    By default a Linear4bit's has the dtype that it had before it was quantised, the others' float32. ValueError or TypeError
    names what cannot be read, and why.
    """
    kind = _quantized(linear)
    if kind is None:
        raise TypeError(f"linear must be a quantised layer, got a {type(linear).__name__}")
    return kind.weight(linear, dtype)


def check_base(linear: Any) -> None:
    """TypeError or ValueError unless `linear` can be the base of an adapter, now or once it is quantised."""
    reason = why_declined(linear)
    if reason is not None:
        raise ValueError(f"linear must have a weight that products can read, but {reason}")
    if not is_linear(linear):
        raise TypeError(
            f"linear must be a torch.nn.Linear or Transformers' Conv1D, got {type(linear).__name__}"
        )
    check_sizes(linear)
    if is_quantized(linear):
        # bitsandbytes quantises it when it is moved to a device, and `freeze_base` comes after this.
        with suppress(TypeError, NotFrozen):
            quantized_weight(linear)


def check_sizes(linear: Any) -> None:
    """ValueError for a LazyLinear that has not been called."""
    if isinstance(linear.weight, nn.parameter.UninitializedParameter):
        raise ValueError("linear must have its sizes: call the LazyLinear once before wrapping it")


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
    return type(t) in TENSORS or type(t).__module__ in _TRACED


def is_strided(x: Tensor) -> bool:
    """Whether a product can read x: neither nested nor sparse, in any of the sparse layouts."""
    return x.layout == torch.strided and not x.is_nested


def is_operand(weight: Tensor) -> bool:
    """Whether products take a dense base's weight: a plain tensor, or a sharded one."""
    return is_plain_tensor(weight) or is_sharded(weight)


def is_sharded(t: Tensor) -> bool:
    """Whether t is a DTensor, of which this process may have a part."""
    return type(t).__module__ == _SHARDED


def is_plain(linear: Any) -> bool:
    """Whether calling this base does nothing but x·Wᵀ + bias, so that it may be fused if its weight `is_operand`."""
    if type(linear).forward is nn.Linear.forward or is_conv1d(linear):
        # A parametrization computes the weight anew in each reading: what reads it for a product looks at it then.
        weight = linear._parameters.get("weight")
        if weight is None:
            computed = linear._modules.get("parametrizations")
            weight = None if computed is not None and "weight" in computed else linear.weight
        known = weight is None or type(weight) is nn.Parameter or is_operand(weight)
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
    """None if a product can compute what this quantised base computes now, else the rule that it breaks."""
    try:
        quantized_weight(linear)
    except (TypeError, ValueError) as error:
        return str(error)
    return _why_outliers(linear)


def lora_linear_on(
    linear: Any,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float | Tensor,
    shift: Tensor | None = None,
    *,
    magnitude: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor | None:
    """`linear(x) + shift + scale·(dropout(x)·A)·B` in one product, for a base that `is_plain`.

    x [..., K], A [K, R], B [R, N], shift and magnitude [N]; DoRA with a magnitude, see `lora_linear`. None where only the
    base's own forward can compute it now: with a weight that a parametrization makes and that is no `is_operand`, on
    LLM.int8's outliers, and without gradients on a weight that bitsandbytes reordered. RuntimeError where x needs a
    gradient that bitsandbytes would leave out, ValueError or TypeError for a quantised weight that cannot be read. y has
    x's dtype; that of a Linear8bitLt which trains on a CPU has the one that autocast computes in, as its own.
    """
    options: Any = {"magnitude": magnitude, "dropout_p": dropout_p}
    kind = _quantized(linear)
    if kind is None:
        weight, bias = linear.weight, linear.bias
        if type(weight) is not nn.Parameter and not is_operand(weight):
            return None
        dtype = weight.dtype
        weight = weight if isinstance(linear, nn.Linear) else weight.t()
    else:
        check_order(linear, x)
        if x.dtype not in DTYPES or is_reordered(linear) or _why_outliers(linear) is not None:
            return None
        dtype = _compute_dtype(linear, x) if kind.in_compute_dtype else x.dtype
        weight = kind.weight(linear, dtype)
        bias = None if linear.bias is None else linear.bias.to(dtype)
    if shift is not None:
        shift = shift.to(dtype)
        bias = shift if bias is None else bias + shift
    if kind is None:
        return lora_linear(x, weight, A, B, scale, bias, **options)
    device = x.device.type
    ignored = not kind.under_autocast and autocast_dtype(device) is not None
    with torch.autocast(device, enabled=False) if ignored else nullcontext():
        y = lora_linear(x.to(dtype), weight, A, B, scale, bias, **options)
    return y if kind.under_autocast and linear.training and x.is_cpu else y.to(x.dtype)


def row_norms_on(linear: Any, A: Tensor, B: Tensor, scale: float | Tensor) -> Tensor:
    """The row norms of W + scale·(A·B)ᵀ of a base, in A's dtype and without a derivative: DoRA's n, and its first magnitude.

    ValueError where the weight cannot be read.
    """
    weight: Weight = quantized_weight(linear) if is_packed(linear) else linear.weight
    weight = weight.t() if is_conv1d(linear) else weight
    if weight.dtype not in DTYPES:
        raise ValueError(f"linear must have a floating-point weight for DoRA, got {weight.dtype}")
    plain = not isinstance(weight, Tensor) or is_plain_tensor(weight)
    A, B = adapters_as_used(A, B, weight.dtype)
    how = "eager" if plain and not torch.compiler.is_compiling() else "transparent"
    # n² is a difference: what half precision leaves of it may be 0.
    device = A.device.type
    casts = autocast_dtype(device) is not None
    with torch.autocast(device, enabled=False) if casts else nullcontext():
        return dora.row_norms(weight, A, B, scale, "auto", how=how).to(A.dtype)


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x·weightᵀ + bias in weight's dtype; y has x's."""
    bias = None if bias is None else bias.to(weight.dtype)
    return F.linear(x.to(weight.dtype), weight, bias).to(x.dtype)


def dense_dtype(linear: Any, A: Tensor) -> torch.dtype:
    """The dtype of the dense weight that takes a quantised base's place, under the adapter of A.

    A Linear4bit's compute_dtype, or the dtype from before it was quantised; of other bases that of the bias, or of A.
    """
    if hasattr(linear, "compute_dtype"):
        return linear.compute_dtype or quantized_weight(linear).dtype
    return A.dtype if linear.bias is None else linear.bias.dtype


def _compute_dtype(linear: Any, x: Tensor) -> torch.dtype:
    """The dtype that a Linear4bit casts x, weight and bias to: its compute_dtype, or x's where it has none yet."""
    if linear.compute_type_is_set or x.dtype == torch.float16:
        return linear.compute_dtype or x.dtype
    return x.dtype


def _why_outliers(linear: Any) -> str | None:
    """Why this base must compute LLM.int8's outlier columns by itself now; None where it has none."""
    threshold = getattr(getattr(linear, "state", None), "threshold", 0.0)
    trains_on_cpu = linear.training and linear.weight.device.type in ("cpu", "xpu")
    if threshold == 0.0 or trains_on_cpu:  # where bitsandbytes multiplies by the whole W as well
        return None
    return (
        "threshold must be 0 where LLM.int8 computes apart the columns of x with an outlier, which"
        f" depend on the values of x, got {threshold}"
    )


def is_reordered(linear: Any) -> bool:
    """Whether bitsandbytes has reordered the weight of this Linear4bit in an eval() forward of its own on a CPU."""
    if not is_quantized(linear):
        return False
    state = getattr(linear.weight, "quant_state", None)
    return bool(getattr(state, "packing_format_for_cpu", False))


def called(linear: Any, x: Tensor) -> Tensor:
    """`linear(x)` by the base's own forward; RuntimeError where that would leave out the gradient that x needs."""
    check_order(linear, x)
    return linear(x)


def check_order(linear: Any, x: Tensor) -> None:
    """RuntimeError where bitsandbytes reordered the weight of `linear` and would leave out the gradient that x needs."""
    if torch.is_grad_enabled() and x.requires_grad and is_reordered(linear):
        raise RuntimeError(
            "weight must be packed row after row where x requires grad, got"
            " packing_format_for_cpu: bitsandbytes reordered it in an eval() forward of its own and"
            " would compute no gradient of x. Call state_dict() of the Linear4bit once, which puts"
            " it back"
        )
