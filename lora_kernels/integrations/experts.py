"""Fused forward for PEFT's `target_parameters` on the experts of Transformers' models: W + dW is built for no expert.

PEFT puts a `ParamWrapper` around the experts for each parameter, one inside the other, and each forward adds scaling·B·A
to the whole stack of weights. Here the outermost wrapper, the only one that is called, runs the experts itself: rows sorted
by expert, one product with its low-rank part for all experts, the experts' own activation, and the same on the way down.
"""

from __future__ import annotations

import inspect
from typing import Any

import peft
import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from lora_kernels.bases import has_hooks, is_plain_tensor
from lora_kernels.functional import autocast_dtype
from lora_kernels.grouped import grouped_lora_linear
from lora_kernels.integrations.state import active, why_not_one_adapter, why_not_scaling
from lora_kernels.operands import DTYPES, Adapter
from lora_kernels.routing import Routing, sorted_by_group

_DOWN = "down_proj"
# Implementations of Transformers that compute what `run` computes; a name that a user or a GPU library registered stays.
_IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm", None)


def forward(wrapper: Any, x: Tensor, *args: Any) -> Tensor | None:
    """y [T, H] for x [T, H], expert indices [T, k] and routing weights [T, k], or None where PEFT's own forward must run."""
    if len(args) != 2 or why_not_fused(wrapper) is not None:
        return None
    wrappers, experts = _nest(wrapper)
    if x.dtype != getattr(experts, _DOWN).dtype and autocast_dtype(x.device.type) is None:
        return None
    adapters = {each.parameter_name: _adapter(each, experts) for each in wrappers}
    return run(experts, adapters, x, *args)


def run(
    experts: Any, adapters: dict[str, Adapter], x: Tensor, index: Tensor, weights: Tensor
) -> Tensor:
    """y [T, H] of Transformers' experts for tokens x [T, H], each sent to experts index [T, k] with weights [T, k].

    `adapters`: over groups, by the name of the parameter that each is added to. Under expert parallelism an index of
    `num_experts` or more belongs to another process and adds nothing: the last expert computes such rows, with weight zero.
    """
    if experts._is_expert_parallel:
        weights = weights.masked_fill(index >= experts.num_experts, 0.0)
        index = index.clamp(max=experts.num_experts - 1)
    routing = sorted_by_group(index, experts.num_experts)
    first = _first(experts)
    hidden = _product(experts, first, adapters.get(first), routing.spread(x), routing)
    hidden = experts._apply_gate(hidden) if experts.has_gate else experts.act_fn(hidden)
    y = _product(experts, _DOWN, adapters.get(_DOWN), hidden, routing)
    if experts.has_post_expert_norm:
        y = experts.post_expert_norm(y)
    return routing.gather(y, weights).to(x.dtype)


def _product(
    experts: Any, name: str, adapter: Adapter | None, rows: Tensor, routing: Routing
) -> Tensor:
    """rows [S, K] times one of the experts' stacks, adapter and bias included: [S, N]."""
    weight = getattr(experts, name)
    if experts.is_transposed:  # stored as [E, in, out], others as [E, out, in]
        weight = weight.transpose(1, 2)
    bias = getattr(experts, f"{name}_bias") if experts.has_bias else None
    if adapter is None:
        G, N, K = weight.shape
        adapter = Adapter(rows.new_empty(G, K, 0), rows.new_empty(G, 0, N), 1.0)
    return grouped_lora_linear(
        rows, weight, adapter.A, adapter.B, routing.offsets, adapter.scale, bias
    )


def _first(experts: Any) -> str:
    """The name of the parameter that reads x."""
    return "gate_up_proj" if experts.has_gate else "up_proj"


def _adapter(wrapper: Any, experts: Any) -> Adapter:
    """The active adapter of a wrapper, over groups, as views of its parameters.

    PEFT's lora_A is [E·r, a] with r fastest, its lora_B [b, r·E] with E fastest, for a parameter [E, a, b] or [E, b, a].
    Where a is the side of the product's output, as in PEFT before 0.19.1, A and B change places.
    """
    (name,) = active(wrapper)
    weight_A, weight_B = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight
    E = wrapper.num_experts
    first = weight_A.reshape(E, -1, weight_A.shape[1])  # [E, r, a]
    second = weight_B.reshape(weight_B.shape[0], -1, E).permute(2, 0, 1)  # [E, b, r]
    if _dimension_of_A(wrapper) == (0 if experts.is_transposed else 1):
        return Adapter(first.transpose(1, 2), second.transpose(1, 2), wrapper.scaling[name])
    return Adapter(second, first, wrapper.scaling[name])


def _dimension_of_A(wrapper: Any) -> int | None:
    """Which of a parameter's dimensions [E, 0, 1] lora_A is on, by PEFT's own formula; None where that is unknown."""
    swapped = getattr(wrapper, "_did_swap_in_out_features", None)
    if swapped is not None:
        return int(swapped)
    if tuple(map(int, peft.__version__.split(".")[:2])) < (0, 19):
        return 0
    _, *sides = wrapper.get_param().shape
    width = next(iter(wrapper.lora_A.values())).weight.shape[1]
    return None if sides[0] == sides[1] or width not in sides else sides.index(width)


def why_not_fused(wrapper: ParamWrapper) -> str | None:
    """None if this wrapper and those inside it add one plain adapter a parameter to known experts now, else the reason."""
    wrappers, experts = _nest(wrapper)
    reason = _why_not_experts(experts)
    if reason is not None:
        return f"its experts are a {type(experts).__name__}, {reason}"
    for depth, each in enumerate(wrappers):
        reason = _why_not_wrapper(each, experts, called=depth == 0)
        if reason is not None:
            return reason if depth == 0 else f"in the wrapper inside it, {reason}"
    if len({each.parameter_name for each in wrappers}) < len(wrappers):
        return "two wrappers are around one parameter"
    return None


def _why_not_experts(experts: Any) -> str | None:
    if not _follows_contract(type(experts)):
        return "whose forward is not that of Transformers' experts"
    if experts.config._experts_implementation not in _IMPLEMENTATIONS:
        return f"computed by {experts.config._experts_implementation!r}"
    if "forward" in experts.__dict__:
        return "whose forward was replaced"
    if has_hooks(experts):
        return "which has hooks"
    if nn.utils.parametrize.is_parametrized(experts):
        return "which has parametrizations"
    first = _first(experts)
    for name in (first, _DOWN):
        weight = getattr(experts, name)
        if not is_plain_tensor(weight) or weight.dtype not in DTYPES:
            return f"whose {name} is a {type(weight).__name__} of {weight.dtype}, no plain floating-point tensor"
        if weight.ndim != 3:
            return f"whose {name} has {weight.ndim} dimensions, not 3"
    if getattr(experts, first).dtype != getattr(experts, _DOWN).dtype:
        return "whose parameters have different dtypes"
    return None


@torch.compiler.assume_constant_result
def _follows_contract(kind: type) -> bool:
    """Whether a class's forward is the one that Transformers' `use_experts_implementation` gives."""
    from transformers.integrations import moe

    forward: Any = kind.forward  # type: ignore[attr-defined]
    if getattr(forward, "__globals__", None) is not vars(moe):
        return False
    used = inspect.getclosurevars(forward).nonlocals
    return used.get("experts_interface") is moe.ALL_EXPERTS_FUNCTIONS


def _why_not_wrapper(wrapper: Any, experts: Any, *, called: bool) -> str | None:
    if not called and has_hooks(wrapper):
        return "it has hooks"
    if wrapper.parameter_name not in (_first(experts), _DOWN):
        return f"its parameter is {wrapper.parameter_name}, no weight of the experts' products"
    reason = why_not_one_adapter(wrapper)
    if reason is not None:
        return reason
    (name,) = active(wrapper)
    if name in wrapper.lora_variant:
        return f"its adapter {name!r} is a variant"
    return _why_not_adapter(wrapper, wrapper.lora_A[name], wrapper.lora_B[name], name)


def _why_not_adapter(wrapper: Any, lora_A: Any, lora_B: Any, name: str) -> str | None:
    for part, layer in (("lora_A", lora_A), ("lora_B", lora_B)):
        if type(layer) is not nn.Linear or "forward" in layer.__dict__:
            return f"its {part} is no plain Linear (parametrized or replaced)"
        if layer.bias is not None:
            return f"its {part} has a bias"
        if not is_plain_tensor(layer.weight) or layer.weight.dtype not in DTYPES:
            return f"its {part} is a {type(layer.weight).__name__} of {layer.weight.dtype}, no plain floating-point tensor"
    if type(wrapper.lora_dropout[name]) is not nn.Identity:
        return "it has dropout, which cannot be had of W + dW"
    if lora_A.weight.dtype != lora_B.weight.dtype:
        return "its lora_A and lora_B have different dtypes"
    E, *sides = wrapper.get_param().shape
    if E == 1:
        return "its parameter holds one expert"
    side = _dimension_of_A(wrapper)
    if side is None:
        return f"PEFT {peft.__version__} does not say which side of its parameter, {[E, *sides]}, lora_A is on"
    rank = lora_A.weight.shape[0] // E
    got = [*lora_A.weight.shape, *lora_B.weight.shape]
    if got != [E * rank, sides[side], sides[1 - side], rank * E]:
        return f"its lora_A and lora_B, {got[:2]} and {got[2:]}, do not fit its parameter, {[E, *sides]}"
    return why_not_scaling(wrapper, name)


def _nest(wrapper: Any) -> tuple[list[Any], Any]:
    """(this wrapper and those inside it, the experts)."""
    wrappers = []
    while isinstance(wrapper, ParamWrapper):
        wrappers.append(wrapper)
        wrapper = wrapper.base_layer
    return wrappers, wrapper
