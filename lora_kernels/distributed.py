"""Tensor parallelism: how the registered operators act on DTensors, and the two ways to shard a `LinearWithLoRA`.

DDP and FSDP2 need nothing from here: they hand plain tensors to the layer. A sharded layer computes, on each rank,

             x      W [N, K]  A [K, R]  B [R, N]  bias     y      s      gradients that are summed over ranks
    data     rows   whole     whole     whole     whole    rows   rows   dW, dA, dB, dbias
    column   whole  rows      whole     columns   shard    columns whole dx, dA
    row      columns columns  rows      whole     1/ranks  summed summed dB

so the products are those of one device on smaller operands.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.experimental import register_sharding
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from lora_kernels.bases import is_conv1d
from lora_kernels.modules import LinearWithLoRA
from lora_kernels.once import once

_WHOLE, _SUM = Replicate(), Partial()
_ROWS, _COLUMNS = Shard(0), Shard(1)
# Placements of (y, s) and of (x, W, A, B, bias), then of (dx, dW, dA, dB, dbias) and of dy, by name of the style.
_STYLES: dict[str, tuple[tuple, tuple, tuple, Placement]] = {
    "whole": ((_WHOLE,) * 2, (_WHOLE,) * 5, (_WHOLE,) * 5, _WHOLE),
    "data": ((_ROWS,) * 2, (_ROWS, *(_WHOLE,) * 4), (_ROWS, *(_SUM,) * 4), _ROWS),
    "column": (
        (_COLUMNS, _WHOLE),
        (_WHOLE, _ROWS, _WHOLE, _COLUMNS, _ROWS),
        (_SUM, _ROWS, _SUM, _COLUMNS, _ROWS),
        _COLUMNS,
    ),
    # A whole bias is divided by the number of ranks, as nn.Linear's is, so that the sum adds it once.
    "row": (
        (_SUM, _SUM),
        (_COLUMNS, _COLUMNS, _ROWS, _WHOLE, _SUM),
        (_COLUMNS, _COLUMNS, _ROWS, _SUM, _WHOLE),
        _WHOLE,
    ),
}


class ColwiseLoRA(ColwiseParallel):
    """`ColwiseParallel` for a `LinearWithLoRA`: the output features are sharded; options are those of ColwiseParallel.

    >>> from torch.distributed.tensor.parallel import parallelize_module
    >>> plan = {"up": ColwiseLoRA(), "down": RowwiseLoRA()}  # parallelize_module(model, mesh, plan)
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return _shard(self, module, device_mesh, "column", Replicate())


class RowwiseLoRA(RowwiseParallel):
    """`RowwiseParallel` for a `LinearWithLoRA`: the input features are sharded; options are those of RowwiseParallel."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return _shard(self, module, device_mesh, "row", Shard(-1))


@once
def register() -> None:
    """Register with DTensor how the operators act on shards; `ColwiseLoRA` and `RowwiseLoRA` call it."""
    operators = torch.ops.lora_kernels
    register_sharding(operators.lora_linear.default)(_forward_sharding)
    register_sharding(operators.lora_linear_backward.default)(_backward_sharding)


def _forward_sharding(x, weight, A, B, bias, alpha, dropout_p, seed, backend):
    def inputs(operands: tuple) -> list:
        *given, of_bias = operands
        of_seed = None if seed is None else _WHOLE
        return [*given, None if bias is None else of_bias, _WHOLE, None, of_seed, None]

    return [(list(out), inputs(operands)) for out, operands, _, _ in _STYLES.values()]


def _backward_sharding(
    dy, adapter_dtype, needs, K, R, x, weight, A, B, s, alpha, dropout_p, seed, backend
):
    def rule(out: tuple, operands: tuple, grads: tuple, of_dy: Placement) -> tuple[list, list]:
        saved = zip((x, weight, A, B, s), (*operands[:4], out[1]), strict=True)
        placed = [None if tensor is None else placement for tensor, placement in saved]
        outputs = [g if need else _WHOLE for g, need in zip(grads, needs, strict=True)]
        of_seed = None if seed is None else _WHOLE
        return outputs, [of_dy, None, None, None, None, *placed, _WHOLE, None, of_seed, None]

    return [rule(*style) for style in _STYLES.values()]


def _shard(
    style: Any, module: nn.Module, mesh: DeviceMesh, name: str, of_input: Placement
) -> nn.Module:
    """Shard `module`'s parameters by `name`, and convert its input and output as PyTorch's `style` does."""
    if not isinstance(module, LinearWithLoRA):
        raise TypeError(f"module must be a LinearWithLoRA, got {type(module).__name__}")
    if module.merged:
        raise ValueError("module must not be merged: unmerge_lora(model) before sharding it")
    if module.lora.magnitude is not None:
        raise ValueError("module must not be DoRA: its row norms are not sums over shards")
    if is_conv1d(module.linear):
        raise TypeError("module must be a LinearWithLoRA over an nn.Linear, got one over a Conv1D")
    register()
    style.desired_input_layouts = (of_input,)
    _, (_, *placements), _, _ = _STYLES[name]

    def partition(_: str, layer: nn.Module, mesh: DeviceMesh) -> None:
        if layer is not module:
            return
        linear, lora = module.linear, module.lora
        owners = (linear, "weight"), (lora, "A"), (lora, "B"), (linear, "bias")
        made = []
        for (owner, key), placement in zip(owners, placements, strict=True):
            parameter = getattr(owner, key)
            if parameter is not None:
                kept = Replicate() if isinstance(placement, Partial) else placement
                made.append((owner, key, _distributed(parameter, mesh, kept, style)))
        for owner, key, sharded in made:  # all or, where one cannot be made, none
            owner.register_parameter(key, sharded)

    return distribute_module(
        module,
        mesh,
        partition,
        partial(style._prepare_input_fn, style.input_layouts, style.desired_input_layouts),
        partial(style._prepare_output_fn, style.output_layouts, style.use_local_output),
    )


def _distributed(
    parameter: nn.Parameter, mesh: DeviceMesh, placement: Placement, style: Any
) -> nn.Parameter:
    whole = parameter.detach()
    sharded = distribute_tensor(whole, mesh, [placement], src_data_rank=style.src_data_rank)
    made = nn.Parameter(sharded, requires_grad=parameter.requires_grad)
    if made.requires_grad and isinstance(placement, Replicate):
        made.register_hook(_summed)
    return made


def _summed(gradient: Tensor) -> Tensor:
    """The gradient of a whole parameter, added up over ranks before it is accumulated."""
    return gradient.redistribute(placements=[_WHOLE] * gradient.device_mesh.ndim)  # type: ignore[attr-defined]
