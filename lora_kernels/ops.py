"""The registered operators that torch.compile, torch.export and make_fx record: one for forward, one for backward.

Each has a second form over a quantised weight, which it is given as plain tensors and integers: a traced graph saves those.
With `offsets` rows are in groups, and the operands are stacks: see `operands.Groups`.
Their kernels choose a backend when they run, so that a traced graph holds no decision about sizes. Each has a fake
kernel and every derivative: a function transform, forward mode and a derivative of a derivative get plain ATen instead.
Eager mode takes `autograd.LoRALinear` or a backend's own operator, which cost less in a call.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from lora_kernels import formulas
from lora_kernels.autograd import Call, LoRALinear, any_dual, as_dropout, gradients, transparent
from lora_kernels.backends.base import Products
from lora_kernels.backends.composite import PRODUCTS as COMPOSITE
from lora_kernels.formulas import Gradients, Needs, Saved
from lora_kernels.operands import (
    Adapter,
    Groups,
    QuantizedWeight,
    Weight,
    accumulated,
    restored,
)
from lora_kernels.plan import plan_backward, plan_call
from lora_kernels.problem import DENSE

_PACKED = "Tensor[] packed, str format, SymInt[] sizes"  # a `QuantizedWeight`
_FORWARD = (
    "(Tensor x, {weight}, Tensor A, Tensor B, Tensor? bias, Tensor alpha, float dropout_p, Tensor? seed, str backend,"
    " Tensor? offsets=None) -> (Tensor, Tensor)"
)
_BACKWARD = (
    "(Tensor dy, ScalarType adapter_dtype, bool[] needs, SymInt K, SymInt R, Tensor? x, {weight}, Tensor? A, Tensor? B,"
    " Tensor? s, Tensor alpha, float dropout_p, Tensor? seed, str backend,"
    " Tensor? offsets=None, bool own_weight=False, bool own_bias=False) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
# `torch.library.custom_op` would infer these schemas, and take about 10 microseconds more in every call.
_LIBRARY = torch.library.Library("lora_kernels", "FRAGMENT")
_LIBRARY.define("lora_linear" + _FORWARD.format(weight="Tensor weight"))
_LIBRARY.define("lora_linear_backward" + _BACKWARD.format(weight="Tensor? weight"))
_LIBRARY.define("lora_linear_quantized" + _FORWARD.format(weight=_PACKED))
_LIBRARY.define("lora_linear_quantized_backward" + _BACKWARD.format(weight=_PACKED))
# n of DoRA, which has no derivative; `packed` are a quantised weight's tensors, or the weight itself.
_LIBRARY.define(
    f"row_norms({_PACKED}, ScalarType dtype, Tensor A, Tensor B, Tensor alpha, str backend) -> Tensor"
)
lora_linear = torch.ops.lora_kernels.lora_linear.default
lora_linear_backward = torch.ops.lora_kernels.lora_linear_backward.default
lora_linear_quantized = torch.ops.lora_kernels.lora_linear_quantized.default
lora_linear_quantized_backward = torch.ops.lora_kernels.lora_linear_quantized_backward.default
row_norms = torch.ops.lora_kernels.row_norms.default


def _lora_linear(
    x: Tensor,
    weight: Weight,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None,
    alpha: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
    offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(y [M, N], s [M, R]) of `formulas.forward` for x [M, K], weight [N, K], A [K, R], B [R, N], 0-d alpha and seed."""
    call = Call(backend)
    return LoRALinear.forward(x, weight, A, B, bias, alpha, dropout_p, seed, call, offsets)


@torch.library.register_fake("lora_kernels::lora_linear")
def _lora_linear_fake(x, weight, A, B, bias, alpha, dropout_p, seed, backend, offsets=None):
    y = x.new_empty((x.shape[0], weight.shape[-2]))
    return y, x.new_empty((x.shape[0], A.shape[-1]), dtype=accumulated(x.dtype))


@torch.library.register_fake("lora_kernels::lora_linear_quantized")
def _lora_linear_quantized_fake(x, packed, format, sizes, A, B, *rest):
    return _lora_linear_fake(x, B.mT, A, B, *rest)  # the weight's rows are B's columns


def _row_norms(
    packed: list[Tensor],
    format: str,
    sizes: list[int],
    dtype: torch.dtype,
    A: Tensor,
    B: Tensor,
    alpha: Tensor,
    backend: str,
) -> Tensor:
    """n [N] of `formulas.row_norms`, by the backend of a product over the weight's rows."""
    weight = packed[0] if format == DENSE else restored(format, packed, sizes, dtype).dense()
    plan = plan_call(backend, weight, weight, A, None, False)
    return formulas.row_norms(plan.products, weight, Adapter(A, B, alpha))


@torch.library.register_fake("lora_kernels::row_norms")
def _row_norms_fake(packed, format, sizes, dtype, A, B, alpha, backend):
    return A.new_empty(B.shape[1], dtype=accumulated(dtype))


def _lora_linear_backward(
    dy: Tensor,
    adapter_dtype: torch.dtype,
    needs: list[bool],
    K: int,
    R: int,
    x: Tensor | None,
    weight: Weight | None,
    A: Tensor | None,
    B: Tensor | None,
    s: Tensor | None,
    alpha: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
    offsets: Tensor | None = None,
    own_weight: bool = False,
    own_bias: bool = False,
    *,
    products: Products | None = None,
) -> tuple[Tensor, ...]:
    """(dx, dW, dA, dB, dbias) of `formulas.backward`, an empty tensor for each that is not needed: it cannot return None.

    DTensor takes the mesh of the first argument, and remembers a sharding by a call's tensors and by every argument from the
    first integer, such as a dtype, on. So they come first: calls that leave out other operands differ. K and R are
    the forward's sizes, which no saved tensor has where few gradients are needed. `products`: those of a plan by default.
    """
    groups = None if offsets is None else Groups(offsets, own_weight, own_bias)
    if products is None:
        wide = weight if weight is not None else x  # under DTensor a shard, of which K is the whole
        N = K if wide is None else wide.shape[-1]
        dropout = seed is not None
        plan = plan_backward(backend, dy, weight, N, R, adapter_dtype, dropout, groups)
        weight, products = plan.readable(weight), plan.products
    adapter = Adapter(A, B, alpha, as_dropout(dropout_p, seed))  # type: ignore[arg-type]
    rest = Saved(x, weight, A, B, s), Needs(*needs), adapter, adapter_dtype
    grads = formulas.backward(products.bound(groups), dy, *rest)
    return tuple(dy.new_empty(0) if grad is None else grad for grad in grads)


# By plain ATen, which autograd and transforms can differentiate.
_transparent_backward = partial(_lora_linear_backward, products=COMPOSITE)


def _over_packed(function: Callable[..., Any], place: int) -> Callable[..., Any]:
    """`function` over the weight that three arguments from `place` on describe, or None where they have no tensors of it."""

    def restoring(*args: Any) -> Any:
        packed, format, sizes = args[place : place + 3]
        weight = restored(format, packed, sizes, args[0].dtype) if packed else None
        return function(*args[:place], weight, *args[place + 3 :])

    return restoring


@torch.library.register_fake("lora_kernels::lora_linear_backward")
def _lora_linear_backward_fake(
    dy, adapter_dtype, needs, K, R, x, weight, A, B, s, alpha, dropout_p, seed, backend,
    offsets=None, own_weight=False, own_bias=False,
):  # fmt: skip
    needed = Needs(*needs)
    M, N = dy.shape
    G = () if offsets is None else (offsets.shape[0] - 1,)
    own = G if own_weight else ()
    return (
        dy.new_empty((M, weight.shape[-1]) if needed.x else 0),
        dy.new_empty((*own, N, x.shape[1]) if needed.weight else 0),
        dy.new_empty((*G, x.shape[1], B.shape[-2]) if needed.A else 0, dtype=adapter_dtype),
        dy.new_empty((*G, s.shape[1], N) if needed.B else 0, dtype=adapter_dtype),
        dy.new_empty((*(G if own_bias else ()), N) if needed.bias else 0),
    )


@torch.library.register_fake("lora_kernels::lora_linear_quantized_backward")
def _lora_linear_quantized_backward_fake(
    dy, adapter_dtype, needs, K, R, x, packed, format, sizes, *rest
):
    weight = dy.new_empty(0, K)  # of which dx has the columns
    return _lora_linear_backward_fake(dy, adapter_dtype, needs, K, R, x, weight, *rest)


class _Registered(LoRALinear):
    """`LoRALinear` whose products are the registered operators below autograd; a last argument is their dispatch keys."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        x, weight, *rest, keys = args
        if isinstance(weight, Tensor):
            return _below_autograd(lora_linear, keys, args[:-1])
        return _below_autograd(lora_linear_quantized, keys, (x, *weight.flat, *rest))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        LoRALinear.setup_context(ctx, inputs[:-1], output)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, ds: Tensor | None) -> tuple[Tensor | None, ...]:
        return (*gradients(ctx, dy, ds, _fused), *(None,) * 6)


def _fused(ctx: Any, dy: Tensor, kept: Saved, adapter: Adapter, groups: Groups | None) -> Gradients:
    backward: Any = lora_linear_backward
    weight: tuple = (kept.weight,)
    if ctx.weight is not None:
        backward = lora_linear_quantized_backward
        packed = list(kept.weight.tensors) if isinstance(kept.weight, QuantizedWeight) else []
        weight = packed, ctx.weight.format, ctx.weight.sizes
    grads = backward(
        dy,
        ctx.adapter_dtype,
        list(ctx.needs),
        ctx.K,
        ctx.R,
        kept.x,
        *weight,
        kept.A,
        kept.B,
        kept.s,
        adapter.scale,
        ctx.dropout_p,
        None if adapter.dropout_in is None else adapter.dropout_in.seed,
        ctx.call,  # the name of the backend, which the operator asks for when it runs
        *(() if groups is None else (groups.offsets, groups.own_weight, groups.own_bias)),
    )
    return tuple(g if need else None for g, need in zip(grads, ctx.needs, strict=True))  # type: ignore[return-value]


def _below_autograd(op: Any, keys: Any, args: tuple) -> Any:
    if torch._C._len_torch_dispatch_stack():
        count_flops()
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keys & torch._C._after_autograd_keyset, *args)


def _lora_linear_autograd(keys: Any, *args: Any) -> tuple[Tensor, Tensor]:
    if _must_be_transparent(args):
        return transparent(*args)
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
        return _Registered.apply(*args, keys)
    # What `forward` does, without a call: compiled code comes here in each product.
    if isinstance(args[1], Tensor):
        return _below_autograd(lora_linear, keys, args)
    return _Registered.forward(*args, keys)


def _lora_linear_quantized_autograd(
    keys: Any, x: Tensor, packed: list[Tensor], format: str, sizes: list[int], *rest: Any
) -> tuple[Tensor, Tensor]:
    weight = restored(format, packed, sizes, x.dtype)
    if torch._C._any_requires_grad(*packed) or any_dual(*packed):
        raise ValueError(f"packed must not require grad: a weight of {format} has no gradient")
    return _lora_linear_autograd(keys, x, weight, *rest)


def _backward_autograd(
    op: Any, composite: Callable[..., Any], keys: Any, *args: Any
) -> tuple[Tensor, ...]:
    if _must_be_transparent(args) or (
        torch.is_grad_enabled() and torch._C._any_requires_grad(*args)
    ):
        return composite(*args)
    return _below_autograd(op, keys, args)


def _must_be_transparent(args: tuple) -> bool:
    """Whether a function transform or forward mode is active, which an autograd.Function in an operator cannot serve."""
    return torch._C._are_functorch_transforms_active() or any_dual(*args)


def _register(
    op: Any,
    kernel: Callable[..., Any],
    composite: Callable[..., Any],
    differentiable: Callable[..., Any] | None = None,
) -> None:
    """An operator's kernels: below autograd, for vmap, and for autograd, by default that of a backward."""
    differentiable = differentiable or partial(_backward_autograd, op, composite)
    _LIBRARY.impl(op, kernel, "CompositeExplicitAutograd")
    _LIBRARY.impl(op, composite, "FuncTorchBatched")
    _LIBRARY.impl(op, differentiable, "Autograd", with_keyset=True)


_LIBRARY.impl(row_norms, _row_norms, "CompositeExplicitAutograd")
_register(lora_linear, _lora_linear, transparent, _lora_linear_autograd)
_register(
    lora_linear_quantized,
    _over_packed(_lora_linear, 1),
    _over_packed(transparent, 1),
    _lora_linear_quantized_autograd,
)
_register(lora_linear_backward, _lora_linear_backward, _transparent_backward)
_register(
    lora_linear_quantized_backward,
    _over_packed(_lora_linear_backward, 6),
    _over_packed(_transparent_backward, 6),
)


def _forward_flops(x_shape, weight_shape, A_shape, *_: Any, **__: Any) -> int:
    """FLOPs of the forward for FlopCounterMode: x·Wᵀ, and the products of the low-rank branch."""
    (M, K), N, R = x_shape, weight_shape[-2], A_shape[-1]
    return 2 * M * N * K + 2 * M * R * (K + N)


def _quantized_flops(
    x_shape: Any, _: Any, __: Any, ___: Any, A_shape: Any, B_shape: Any, *____: Any, **_____: Any
) -> int:
    return _forward_flops(x_shape, (B_shape[-1], 0), A_shape)


def _backward_flops(
    dy_shape: Any, _: Any, needs: list[bool], K: int, R: int, *__: Any, **___: Any
) -> int:
    """FLOPs of the gradients that are needed: dy·W and q·Aᵀ of dx, q, dA, dB and dW."""
    needed, (M, N) = Needs(*needs), dy_shape
    wide = needed.x + needed.weight
    lowrank = R * (K * (needed.x + needed.A) + N * ((needed.x or needed.A) + needed.B))
    return 2 * M * N * K * wide + 2 * M * lowrank


def count_flops() -> None:
    """Give FlopCounterMode the formulas, and those of its kind that are active: to import it would import Triton."""
    counting = sys.modules.get("torch.utils.flop_counter")
    if counting is None:
        return
    formulas_of = {
        lora_linear.overloadpacket: _forward_flops,
        lora_linear_backward.overloadpacket: _backward_flops,
        lora_linear_quantized.overloadpacket: _quantized_flops,
        lora_linear_quantized_backward.overloadpacket: _backward_flops,
    }
    if lora_linear.overloadpacket not in counting.flop_registry:
        for packet, formula in formulas_of.items():
            counting.register_flop_formula(packet)(formula)
    for mode in _get_current_dispatch_mode_stack():
        counter = getattr(mode, "counter", mode)
        if isinstance(counter, counting.FlopCounterMode):
            for packet in formulas_of:  # it took a copy of the registry when it was made
                counter.flop_registry.setdefault(packet, counting.flop_registry[packet])
