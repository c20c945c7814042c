"""The registered operators that torch.compile, torch.export and make_fx see: one for forward, one for backward.

Their kernels choose a backend when they run, so that a traced graph holds no decision about sizes. Each has a fake
kernel and every derivative: a function transform, forward mode and a derivative of a derivative get plain ATen instead.
Eager mode takes `autograd.LoRALinear` or a backend's own operator, which cost less in a call.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from lora_kernels import dispatch, formulas
from lora_kernels.autograd import (
    LoRALinear,
    any_dual,
    as_dropout,
    gradients,
    transparent,
    transparent_gradients,
)
from lora_kernels.formulas import Gradients, Needs, Saved

# `torch.library.custom_op` would infer these schemas, and take about 10 microseconds more in every call.
torch.library.define(
    "lora_kernels::lora_linear",
    "(Tensor x, Tensor weight, Tensor A, Tensor B, Tensor? bias, Tensor alpha, float dropout_p, Tensor? seed, str backend)"
    " -> (Tensor, Tensor)",
)
torch.library.define(
    "lora_kernels::lora_linear_backward",
    "(Tensor dy, ScalarType adapter_dtype, bool[] needs, Tensor? x, Tensor? weight, Tensor? A, Tensor? B, Tensor? s,"
    " Tensor alpha, float dropout_p, Tensor? seed, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
lora_linear = torch.ops.lora_kernels.lora_linear.default
lora_linear_backward = torch.ops.lora_kernels.lora_linear_backward.default


def _lora_linear(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None,
    alpha: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(y [M, N], s [M, R]) of `formulas.forward` for x [M, K], weight [N, K], A [K, R], B [R, N], 0-d alpha and seed."""
    dropout = as_dropout(dropout_p, seed)
    chosen = dispatch.resolve(backend, x, weight, A, B, bias, dropout is not None)
    return formulas.forward(chosen, x, weight, A, B, bias, alpha, dropout)


torch.library.impl("lora_kernels::lora_linear", "CompositeExplicitAutograd", _lora_linear)


@torch.library.register_fake("lora_kernels::lora_linear")
def _lora_linear_fake(x, weight, A, B, bias, alpha, dropout_p, seed, backend):
    y = x.new_empty((x.shape[0], weight.shape[0]))
    return y, x.new_empty((x.shape[0], A.shape[1]), dtype=formulas.accumulated(x.dtype))


def _lora_linear_backward(
    dy: Tensor,
    adapter_dtype: torch.dtype,
    needs: list[bool],
    x: Tensor | None,
    weight: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    s: Tensor | None,
    alpha: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dW, dA, dB, dbias) of `formulas.backward`, an empty tensor for each that is not needed.

    DTensor takes the mesh of the first argument, and remembers a sharding by a call's tensors and by every argument from the
    first integer, such as a dtype, on. So they come first: calls with other operands left out are told apart.
    """
    saved = Saved(x, weight, A, B, s)
    dropout = as_dropout(dropout_p, seed)
    chosen = dispatch.resolve_backward(backend, dy, saved, adapter_dtype, dropout is not None)
    return _filled(
        dy, formulas.backward(chosen, dy, saved, Needs(*needs), alpha, dropout, adapter_dtype)
    )


def _transparent_backward(
    dy: Tensor,
    adapter_dtype: torch.dtype,
    needs: list[bool],
    x: Tensor | None,
    weight: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    s: Tensor | None,
    alpha: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`_lora_linear_backward` by plain ATen, which autograd and transforms see through."""
    saved, dropout = Saved(x, weight, A, B, s), as_dropout(dropout_p, seed)
    return _filled(
        dy, transparent_gradients(dy, saved, Needs(*needs), alpha, dropout, adapter_dtype)
    )


def _filled(dy: Tensor, grads: Gradients) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients as an operator returns them, which knows no None."""
    dx, dW, dA, dB, dbias = (dy.new_empty(0) if grad is None else grad for grad in grads)
    return dx, dW, dA, dB, dbias


torch.library.impl(
    "lora_kernels::lora_linear_backward", "CompositeExplicitAutograd", _lora_linear_backward
)


@torch.library.register_fake("lora_kernels::lora_linear_backward")
def _lora_linear_backward_fake(
    dy, adapter_dtype, needs, x, weight, A, B, s, alpha, dropout_p, seed, backend
):
    needed = Needs(*needs)
    M, N = dy.shape
    return (
        dy.new_empty((M, weight.shape[1]) if needed.x else 0),
        dy.new_empty((N, x.shape[1]) if needed.weight else 0),
        dy.new_empty((x.shape[1], B.shape[0]), dtype=adapter_dtype)
        if needed.A
        else dy.new_empty(0),
        dy.new_empty((s.shape[1], N), dtype=adapter_dtype) if needed.B else dy.new_empty(0),
        dy.new_empty(N if needed.bias else 0),
    )


class _Registered(LoRALinear):
    """`LoRALinear` whose products are the registered operators below autograd; a last argument is their dispatch keys."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return _below_autograd(lora_linear, args[-1], args[:-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        LoRALinear.setup_context(ctx, inputs[:-1], output)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, ds: Tensor | None) -> tuple[Tensor | None, ...]:
        return (*gradients(ctx, dy, ds, _fused), None, None, None, None, None)


def _fused(ctx: Any, dy: Tensor, kept: Saved, alpha: Tensor, seed: Tensor | None) -> Gradients:
    grads = lora_linear_backward(
        dy, ctx.adapter_dtype, list(ctx.needs), *kept, alpha, ctx.dropout_p, seed, ctx.backend
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
    return _below_autograd(lora_linear, keys, args)


def _lora_linear_backward_autograd(keys: Any, *args: Any) -> tuple[Tensor, ...]:
    if _must_be_transparent(args) or (
        torch.is_grad_enabled() and torch._C._any_requires_grad(*args)
    ):
        return _transparent_backward(*args)
    return _below_autograd(lora_linear_backward, keys, args)


def _must_be_transparent(args: tuple) -> bool:
    """Whether a function transform or forward mode is at work, which an autograd.Function in an operator cannot serve."""
    return torch._C._are_functorch_transforms_active() or any_dual(
        *(t for t in args if isinstance(t, Tensor))
    )


_LIBRARY = torch.library.Library("lora_kernels", "FRAGMENT")
_LIBRARY.impl("lora_linear", _lora_linear_autograd, "Autograd", with_keyset=True)
_LIBRARY.impl("lora_linear_backward", _lora_linear_backward_autograd, "Autograd", with_keyset=True)
_LIBRARY.impl("lora_linear", transparent, "FuncTorchBatched")
_LIBRARY.impl("lora_linear_backward", _transparent_backward, "FuncTorchBatched")


def _forward_flops(x_shape, weight_shape, A_shape, *_: Any, **__: Any) -> int:
    """What FlopCounterMode counts: x·Wᵀ, and the products of the low-rank branch."""
    (M, K), N, R = x_shape, weight_shape[0], A_shape[1]
    return 2 * M * N * K + 2 * M * R * (K + N)


def _backward_flops(
    dy_shape, _, needs, x_shape, weight_shape, A_shape, B_shape, s_shape, *__: Any, **___: Any
) -> int:
    """The same of the gradients that are needed, dy·W and q·Aᵀ of dx, q, dA, dB and dW."""
    needed, (M, N) = Needs(*needs), dy_shape
    K = x_shape[1] if x_shape is not None else weight_shape[1] if weight_shape is not None else 0
    R = B_shape[0] if B_shape is not None else s_shape[1] if s_shape is not None else 0
    wide = needed.x + needed.weight
    lowrank = R * (K * (needed.x + needed.A) + N * ((needed.x or needed.A) + needed.B))
    return 2 * M * N * K * wide + 2 * M * lowrank


def count_flops() -> None:
    """Give FlopCounterMode the formulas, and those of its kind that are active: to import it would import Triton."""
    counting = sys.modules.get("torch.utils.flop_counter")
    if counting is None:
        return
    packets = lora_linear.overloadpacket, lora_linear_backward.overloadpacket
    if packets[0] not in counting.flop_registry:
        for packet, formula in zip(packets, (_forward_flops, _backward_flops), strict=True):
            counting.register_flop_formula(packet)(formula)
    for mode in _get_current_dispatch_mode_stack():
        counter = getattr(mode, "counter", mode)
        if isinstance(counter, counting.FlopCounterMode):
            for packet in packets:  # it took a copy of the registry when it was made
                counter.flop_registry.setdefault(packet, counting.flop_registry[packet])
