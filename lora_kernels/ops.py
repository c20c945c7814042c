"""The registered operators that torch.compile, torch.export and make_fx record: one for forward, one for backward.

Their kernels choose a backend when they run, so that a traced graph holds no decision about sizes. Each has a fake
kernel and every derivative: a function transform, forward mode and a derivative of a derivative get plain ATen instead.
Eager mode takes `autograd.LoRALinear` or a backend's own operator, which cost less in a call.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from lora_kernels import formulas
from lora_kernels.autograd import LoRALinear, any_dual, as_dropout, gradients, transparent
from lora_kernels.backends.base import Products
from lora_kernels.backends.composite import PRODUCTS as COMPOSITE
from lora_kernels.formulas import Gradients, Needs, Saved
from lora_kernels.operands import Adapter, accumulated
from lora_kernels.plan import plan_backward, plan_call

# `torch.library.custom_op` would infer these schemas, and take about 10 microseconds more in every call.
torch.library.define(
    "lora_kernels::lora_linear",
    "(Tensor x, Tensor weight, Tensor A, Tensor B, Tensor? bias, Tensor alpha, float dropout_p, Tensor? seed, str backend)"
    " -> (Tensor, Tensor)",
)
torch.library.define(
    "lora_kernels::lora_linear_backward",
    "(Tensor dy, ScalarType adapter_dtype, bool[] needs, SymInt K, SymInt R, Tensor? x, Tensor? weight, Tensor? A,"
    " Tensor? B, Tensor? s, Tensor alpha, float dropout_p, Tensor? seed, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
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
    products = plan_call(backend, x, weight, A, bias, dropout is not None).products
    return formulas.forward(products, x, weight, Adapter(A, B, alpha, dropout), bias)


torch.library.impl("lora_kernels::lora_linear", "CompositeExplicitAutograd", _lora_linear)


@torch.library.register_fake("lora_kernels::lora_linear")
def _lora_linear_fake(x, weight, A, B, bias, alpha, dropout_p, seed, backend):
    y = x.new_empty((x.shape[0], weight.shape[0]))
    return y, x.new_empty((x.shape[0], A.shape[1]), dtype=accumulated(x.dtype))


def _lora_linear_backward(
    dy: Tensor,
    adapter_dtype: torch.dtype,
    needs: list[bool],
    K: int,
    R: int,
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
    first integer, such as a dtype, on. So they come first: calls that leave out other operands differ. K and R are
    the forward's sizes, which no saved tensor has where few gradients are needed.
    """
    wide = weight if weight is not None else x  # under DTensor a shard, of which K is the whole
    N = K if wide is None else wide.shape[1]
    w_k_major = weight is not None and weight.stride(1) != 1
    dropout = seed is not None
    plan = plan_backward(backend, dy, N, R, adapter_dtype, dropout, w_k_major)
    saved = Saved(x, weight, A, B, s)
    return _gradients(plan.products, dy, adapter_dtype, needs, saved, alpha, dropout_p, seed)


def _transparent_backward(
    dy, adapter_dtype, needs, K, R, x, weight, A, B, s, alpha, dropout_p, seed, backend
):
    """`_lora_linear_backward` by plain ATen, which autograd and transforms can differentiate."""
    saved = Saved(x, weight, A, B, s)
    return _gradients(COMPOSITE, dy, adapter_dtype, needs, saved, alpha, dropout_p, seed)


def _gradients(
    products: Products,
    dy: Tensor,
    adapter_dtype: torch.dtype,
    needs: list[bool],
    saved: Saved,
    alpha: Tensor,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients as an operator returns them: it cannot return None, and gives empty tensors."""
    adapter = Adapter(saved.A, saved.B, alpha, as_dropout(dropout_p, seed))  # type: ignore[arg-type]
    grads = formulas.backward(products, dy, saved, Needs(*needs), adapter, adapter_dtype)
    dx, dW, dA, dB, dbias = (dy.new_empty(0) if grad is None else grad for grad in grads)
    return dx, dW, dA, dB, dbias


torch.library.impl(
    "lora_kernels::lora_linear_backward", "CompositeExplicitAutograd", _lora_linear_backward
)


@torch.library.register_fake("lora_kernels::lora_linear_backward")
def _lora_linear_backward_fake(
    dy, adapter_dtype, needs, K, R, x, weight, A, B, s, alpha, dropout_p, seed, backend
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


def _fused(ctx: Any, dy: Tensor, kept: Saved, adapter: Adapter) -> Gradients:
    grads = lora_linear_backward(
        dy,
        ctx.adapter_dtype,
        list(ctx.needs),
        ctx.K,
        ctx.R,
        *kept,
        adapter.scale,
        ctx.dropout_p,
        None if adapter.dropout_in is None else adapter.dropout_in.seed,
        ctx.call,  # the name of the backend, which the operator asks for when it runs
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
    """Whether a function transform or forward mode is active, which an autograd.Function in an operator cannot serve."""
    return torch._C._are_functorch_transforms_active() or (
        forward_ad._current_level >= 0 and any_dual(*(t for t in args if isinstance(t, Tensor)))
    )


_LIBRARY = torch.library.Library("lora_kernels", "FRAGMENT")
_LIBRARY.impl("lora_linear", _lora_linear_autograd, "Autograd", with_keyset=True)
_LIBRARY.impl("lora_linear_backward", _lora_linear_backward_autograd, "Autograd", with_keyset=True)
_LIBRARY.impl("lora_linear", transparent, "FuncTorchBatched")
_LIBRARY.impl("lora_linear_backward", _transparent_backward, "FuncTorchBatched")


def _forward_flops(x_shape, weight_shape, A_shape, *_: Any, **__: Any) -> int:
    """FLOPs of the forward for FlopCounterMode: x·Wᵀ, and the products of the low-rank branch."""
    (M, K), N, R = x_shape, weight_shape[0], A_shape[1]
    return 2 * M * N * K + 2 * M * R * (K + N)


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
    packets = lora_linear.overloadpacket, lora_linear_backward.overloadpacket
    if packets[0] not in counting.flop_registry:
        for packet, formula in zip(packets, (_forward_flops, _backward_flops), strict=True):
            counting.register_flop_formula(packet)(formula)
    for mode in _get_current_dispatch_mode_stack():
        counter = getattr(mode, "counter", mode)
        if isinstance(counter, counting.FlopCounterMode):
            for packet in packets:  # it took a copy of the registry when it was made
                counter.flop_registry.setdefault(packet, counting.flop_registry[packet])
