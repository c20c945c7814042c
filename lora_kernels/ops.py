"""The registered operators that torch.compile, torch.export and make_fx see: one for forward, one for backward.

Their kernels choose a backend when they run, so that a traced graph holds no decision about sizes. Each has a fake
kernel, and the forward has autograd. Eager mode takes `autograd.LoRALinear` or a backend's own operator: a registered
formula would give silent zeros to forward-mode AD and no second derivatives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_kernels import formulas
from lora_kernels.autograd import as_dropout
from lora_kernels.formulas import Needs, Saved
from lora_kernels.operands import Adapter, accumulated, name_of
from lora_kernels.plan import plan_backward, plan_call
from lora_kernels.problem import Problem

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
    first integer, such as a dtype, on. So they come first: calls with other operands left out are told apart. K and R are
    the forward's sizes, which no saved tensor has where few gradients are needed.
    """
    saved = Saved(x, weight, A, B, s)
    dropout = as_dropout(dropout_p, seed)
    wide = weight if weight is not None else x  # under DTensor a shard, of which K is the whole
    problem = Problem(
        M=dy.shape[0],
        N=K if wide is None else wide.shape[1],
        K=dy.shape[1],
        R=R,
        dtype=name_of(dy.dtype),
        adapter_dtype=name_of(adapter_dtype),
        device=dy.device.type,
        dropout=dropout is not None,
        w_k_major=weight is not None and weight.stride(1) != 1,
        backward=True,
    )
    products = plan_backward(backend, problem, dy.device).products
    adapter = Adapter(A, B, alpha, dropout)  # type: ignore[arg-type]
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


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, weight, A, B, _, alpha, ctx.dropout_p, seed, ctx.backend = inputs
    ctx.needs = Needs(*ctx.needs_input_grad[:5])
    ctx.adapter_dtype, (ctx.K, ctx.R) = A.dtype, A.shape
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*formulas.keep(ctx.needs, x, weight, A, B, output[1]), alpha, seed)


def _backward(ctx: Any, dy: Tensor, ds: Tensor | None) -> tuple[Tensor | None, ...]:
    *saved, alpha, seed = ctx.saved_tensors
    grads = lora_linear_backward(
        dy,
        ctx.adapter_dtype,
        list(ctx.needs),
        ctx.K,
        ctx.R,
        *saved,
        alpha,
        ctx.dropout_p,
        seed,
        ctx.backend,
    )
    needed = (g if need else None for g, need in zip(grads, ctx.needs, strict=True))
    return (*needed, None, None, None, None)


torch.library.register_autograd(
    "lora_kernels::lora_linear", _backward, setup_context=_setup_context
)
