"""The state that every LoRA layer of PEFT's has, whatever it wraps: which adapters are active, and what rules one out."""

from __future__ import annotations

from typing import Any

from torch.nn.modules.module import _has_any_global_hook

from lora_kernels.arguments import check_scale


def active(layer: Any) -> list[str]:
    """Names of the active adapters that this layer has."""
    return [name for name in layer.active_adapters if name in layer.lora_A]


def why_not_one_adapter(layer: Any) -> str | None:
    """None if the layer computes with exactly one adapter now, else the reason."""
    if "forward" in layer.__dict__:
        return "its forward was replaced"
    if _has_any_global_hook():
        return "hooks on all modules are registered"
    if layer.disable_adapters:
        return "its adapters are disabled"
    if layer.merged:
        return "its adapters are merged"
    names = active(layer)
    if len(names) != 1:
        return f"{len(names)} adapters are active in it, not one"
    return None


def why_not_scaling(layer: Any, name: str) -> str | None:
    """None if a product can take the scaling that this adapter has now, else the rule that it breaks."""
    scaling = layer.scaling[name]
    if type(scaling) is float:
        return None
    try:
        check_scale(scaling, "its scaling", layer.lora_A[name].weight.device)
    except (TypeError, ValueError) as error:
        return str(error)
    return None
