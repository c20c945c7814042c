"""Merging adapters into the base weights for inference, and taking them out again bit for bit."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from lora_kernels.modules import LinearWithLoRA, is_plain, lora_layers


def merge_lora(model: nn.Module, *, unload: bool = False) -> list[str]:
    """W ← W + (scale·A·B)ᵀ in every LoRA layer of `model`; returns the names of the layers it merged.

    The sum runs in float32 (float64 for float64), under autocast too, and is then rounded once to W's dtype: on a half
    base that rounding of W is the difference between a merged layer and the unmerged one; in float32 and float64 the
    sum itself rounds as well. The base weight as it was is kept beside it, which `unmerge_lora` puts back and which
    `state_dict` goes on saving. `unload=True` puts the merged Linear in the place of each layer instead, for good, and
    keeps nothing.

    Layers merged before stay as they are. ValueError, before anything is changed, for a weight that another module shares
    (tied embeddings): merging would change both; for one that is no plain floating-point parameter (quantized, pruned,
    parametrized); and where `linear` or `lora` has hooks or a forward of its own, which a merged weight cannot stand for.
    """
    layers = [(name, layer) for name, layer in lora_layers(model)]
    if unload and any(layer is model for _, layer in layers):
        raise ValueError(
            "model must contain the layers to unload, but it is one: take model.linear"
        )
    fresh = [(name, layer) for name, layer in layers if not layer.merged]
    _check_mergeable(model, fresh)
    with torch.no_grad():
        sums = [merged_weight(layer) for _, layer in fresh]  # all computed before any is stored
        for (_, layer), merged in zip(fresh, sums, strict=True):
            layer.unmerged_weight = layer.linear.weight.detach().clone()
            layer.linear.weight.copy_(merged)
    if unload:
        for parent in list(model.modules()):
            for key, child in list(parent._modules.items()):
                if isinstance(child, LinearWithLoRA):
                    setattr(parent, key, child.linear)
    return [name for name, _ in fresh]


def unmerge_lora(model: nn.Module) -> list[str]:
    """Put back every base weight that `merge_lora` changed, the same bits; returns the names of the layers."""
    merged = [(name, layer) for name, layer in lora_layers(model) if layer.merged]
    with torch.no_grad():
        for _, layer in merged:
            if layer.unmerged_weight is not None:
                layer.linear.weight.copy_(layer.unmerged_weight)
                layer.unmerged_weight = None
    return [name for name, _ in merged]


def _check_mergeable(model: nn.Module, layers: list[tuple[str, LinearWithLoRA]]) -> None:
    """ValueError unless the weight of each of these layers of `model` is its own and all that its forward reads."""
    held = [child for parent in model.modules() for child in parent._modules.values()]
    owners = Counter(
        id(parameter)
        for module in (model, *filter(None, held))
        for parameter in module._parameters.values()
        if parameter is not None
    )
    for name, layer in layers:
        linear, weight = layer.linear, layer.linear._parameters.get("weight")
        if weight is None or not is_plain(linear, layer.lora, weight):
            raise ValueError(
                f"{name}.linear must be a plain Linear to merge into, beside a plain lora, but it is "
                "hooked, pruned, parametrized, quantized or has a forward of its own"
            )
        if owners[id(weight)] > 1:
            raise ValueError(
                f"{name}.linear.weight must not be shared, but another module holds it"
            )
        if not weight.is_floating_point():
            raise ValueError(f"{name}.linear.weight must be floating point to merge into")


def merged_weight(layer: LinearWithLoRA) -> Tensor:
    """W + (scale·A·B)ᵀ [out_features, in_features] in W's dtype, summed in float32 or better."""
    weight, lora = layer.linear.weight, layer.lora
    wide = torch.promote_types(torch.promote_types(weight.dtype, lora.A.dtype), torch.float32)
    device = weight.device.type
    has_autocast = torch.amp.is_autocast_available(device)  # "meta" knows no autocast
    with torch.autocast(device, enabled=False) if has_autocast else nullcontext():
        delta = torch.mm(lora.A.to(wide), lora.B.to(wide)).mul_(lora.scale)
    return delta.t().add_(weight).to(weight.dtype)
