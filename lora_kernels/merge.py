"""Merging adapters into the base weights for inference, and taking them out again bit for bit."""

from __future__ import annotations

from collections import defaultdict
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.bases import dense_dtype, is_conv1d, is_packed, is_quantized, quantized_weight
from lora_kernels.declined import why_declined
from lora_kernels.dora import column_scale
from lora_kernels.modules import LinearWithLoRA, every_place, is_plain, lora_layers, put_bases
from lora_kernels.operands import DTYPES


def merge_lora(
    model: nn.Module, *, unload: bool = False, dequantize: bool | torch.dtype = False
) -> list[str]:
    """W ← W + (scale·A·B)ᵀ in every LoRA layer of `model`; returns the names of the layers it merged.

    In a DoRA layer W ← c∘(W + (scale·A·B)ᵀ), a factor for each row, c as `lora_linear` has it.

    The sum runs in float32 (float64 for float64), under autocast too, and is then rounded once to W's dtype: on a half
    base that rounding of W is the difference between a merged layer and the unmerged one; in float32 and float64 the
    sum itself rounds as well. The base weight as it was is kept beside it, which `unmerge_lora` puts back and which
    `state_dict` goes on saving. `unload=True` puts the merged Linear in the place of each layer instead, for good, and
    keeps nothing.

    A quantised base cannot hold the sum: ValueError, unless `dequantize` is True or a dtype. Then a dense weight of the sum
    stands beside the base, which stays as it is, and `unload=True` puts an nn.Linear with it in the layer's place. It is
    rounded to that dtype; for True, to the compute_dtype of a Linear4bit, or the dtype from before it was quantised, and
    for other bases to the dtype of the bias, or of A where there is none. A model of Transformers in which `unload=True`
    leaves nothing quantised loses its `quantization_config`, so that what `save_pretrained` writes can be loaded.

    Layers merged before stay as they are. ValueError, before anything is changed, for a weight that shares memory with
    another tensor of `model` (tied embeddings): merging would change both; for one that is no plain floating-point
    parameter (pruned, parametrized); and where `linear` or `lora` has hooks or a forward of its own, which a
    merged weight cannot stand for. An exception on the way, the lack of memory or an interrupt, leaves every weight and
    layer as it was.
    """
    layers = lora_layers(model)
    if unload and any(layer is model for _, layer in layers):
        raise ValueError(
            "model must contain the layers to unload, but it is one: take model.linear"
        )
    if not isinstance(dequantize, bool) and dequantize not in DTYPES:
        raise TypeError(
            "dequantize must be True, False, float32, bfloat16, float16 or float64, got"
            f" {dequantize!r}"
        )
    fresh = [(name, layer) for name, layer in layers if not layer.merged]
    _check_mergeable(model, fresh, dequantize is not False)
    try:
        with torch.no_grad():
            for _, layer in fresh:
                # What is kept outlives a caller's inference mode, whose tensors autograd refuses.
                with torch.inference_mode(False), torch.no_grad():
                    if is_packed(layer.linear):
                        layer.merged_weight = merged_weight(layer, dequantize).contiguous()
                        continue
                    layer.unmerged_weight = layer.linear.weight.detach().clone()
                layer.linear.weight.copy_(merged_weight(layer))
        if unload:
            _unload(model)
    except BaseException:
        for _, layer in fresh:
            # A weight that cannot be written has its old values.
            with suppress(Exception):
                _restore(layer)
            layer.unmerged_weight = layer.merged_weight = None
        raise
    if unload:
        _forget_quantization(model)
    return [name for name, _ in fresh]


def unmerge_lora(model: nn.Module) -> list[str]:
    """Put back every base weight that `merge_lora` changed, the same bits; returns the names of the layers.

    A quantised base was not changed: the dense weight beside it goes. After an exception on the way each layer is merged or
    not, as its state has it, and the call can be repeated.
    """
    merged = [(name, layer) for name, layer in lora_layers(model) if layer.merged]
    for _, layer in merged:
        _restore(layer)
        layer.unmerged_weight = layer.merged_weight = None
    return [name for name, _ in merged]


def merged_weight(layer: LinearWithLoRA, dequantize: bool | torch.dtype = True) -> Tensor:
    """W + (scale·A·B)ᵀ, times DoRA's c, laid out and rounded as the layer's base stores W, summed in float32 or better.

    Of a quantised base: as nn.Linear stores it, rounded to the dtype `dequantize`, or to the base's own for True.
    """
    linear, lora = layer.linear, layer.lora
    weight, dtype = linear.weight, linear.weight.dtype
    if is_packed(linear):
        dtype = dense_dtype(linear, lora.A) if isinstance(dequantize, bool) else dequantize
        packed: Any = quantized_weight(linear, torch.promote_types(dtype, torch.float32))
        weight = packed.dense()
    sums = torch.promote_types(torch.promote_types(weight.dtype, lora.A.dtype), torch.float32)
    device = weight.device.type
    has_autocast = torch.amp.is_autocast_available(device)  # "meta" has no autocast
    with torch.autocast(device, enabled=False) if has_autocast else nullcontext():
        delta = torch.mm(lora.A.to(sums), lora.B.to(sums)).mul_(lora.scale)  # [in, out]
    merged = (delta if is_conv1d(linear) else delta.t()).add_(weight)
    if lora.magnitude is not None:
        rows = merged.t() if is_conv1d(linear) else merged
        norms = torch.linalg.vector_norm(rows, dim=1).to(lora.A.dtype).to(sums)
        rows.mul_(column_scale(lora.magnitude.to(sums), norms)[:, None])
    return merged.to(dtype)


def _restore(layer: LinearWithLoRA) -> None:
    """Copy the weight that is kept, if one is, back into the base."""
    if layer.unmerged_weight is not None:
        with torch.no_grad():
            layer.linear.weight.copy_(layer.unmerged_weight)


def _unloaded(layer: LinearWithLoRA) -> nn.Module:
    """What stands in the place of a merged layer for good: its base, or a dense Linear instead of a quantised one."""
    base, weight = layer.linear, layer.merged_weight
    if weight is None:
        return base
    N, K = weight.shape
    dense = nn.Linear(K, N, bias=base.bias is not None, device="meta").train(base.training)
    dense.weight = nn.Parameter(weight, requires_grad=False)
    if base.bias is not None:
        bias = base.bias
        same = bias.dtype == weight.dtype
        with torch.inference_mode(False):
            dense.bias = bias if same else nn.Parameter(bias.to(weight.dtype), bias.requires_grad)
    return dense


def _unload(model: nn.Module) -> None:
    """Put the merged base of every LoRA layer in the layer's places."""
    put_bases(model, {layer: _unloaded(layer) for _, layer in lora_layers(model)})


def _forget_quantization(model: nn.Module) -> None:
    """Take the marks of a quantised model from one of Transformers that has nothing quantised, as its dequantize() does."""
    for module in model.modules():
        own: Any = module
        if "hf_quantizer" in vars(own) and not _holds_quantized(own):
            of_config = own.config, ("quantization_config", "_pre_quantization_dtype")
            of_model = own, ("quantization_method", "_weight_conversions", "hf_quantizer")
            for holder, names in (of_config, of_model):
                for name in names:
                    if name in getattr(holder, "__dict__", ()):
                        delattr(holder, name)
            own.is_quantized = False


def _holds_quantized(model: nn.Module) -> bool:
    """Whether a layer in `model` is of a quantised kind, or a parameter of no dtype that is computed in."""
    return any(is_quantized(m) or why_declined(m) is not None for m in model.modules()) or any(
        p.dtype not in DTYPES for p in model.parameters()
    )


def _check_mergeable(
    model: nn.Module, layers: list[tuple[str, LinearWithLoRA]], dequantizes: bool
) -> None:
    """ValueError unless the weight of each of these layers of `model` is its own and all that its forward reads."""
    shared = _shared_memory(model)
    for name, layer in layers:
        what = f"{name}.linear" if name else "linear"
        linear, weight = layer.linear, layer.linear._parameters.get("weight")
        if weight is None or not is_plain(linear, layer.lora):
            raise ValueError(
                f"{what} must be a plain Linear to merge into, beside a plain lora, but it is "
                "hooked, pruned, parametrized or has a forward of its own"
            )
        if is_packed(linear):
            if not dequantizes:
                raise ValueError(
                    f"{what} must not be quantised to merge into: the sum would be quantised again."
                    " merge_lora(model, dequantize=True) makes dense weights"
                )
            quantized_weight(linear)  # raises where it cannot be read
            continue
        if other := shared.get(f"{what}.weight"):
            raise ValueError(
                f"{what}.weight must not be shared, but {other} has the same memory or a part of it"
            )
        if weight.dtype not in DTYPES:
            raise ValueError(
                f"{what}.weight must be float32, bfloat16, float16 or float64 to merge into, got {weight.dtype}"
            )


def _shared_memory(model: nn.Module) -> dict[str, str]:
    """For each parameter or buffer of `model` whose memory another one overlaps, the name of such another.

    A module that is held in several places counts in each of them, by its holder's first name.
    """
    spans: dict[object, list[tuple[int, int, str]]] = defaultdict(list)
    children = [(f"{name}.", child) for name, _, _, child in every_place(model)]
    for prefix, module in [("", model), *children]:
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                space, start, end = _span(tensor)
                spans[space].append((start, end, prefix + key))
    shared: dict[str, str] = {}
    for in_one_space in spans.values():
        reach, holder = -1, ""  # the furthest end so far, and whose it is
        for start, end, name in sorted(in_one_space):
            if start < reach:
                shared[name] = holder
                shared.setdefault(holder, name)
            if end > reach:
                reach, holder = end, name
    return shared


def _span(tensor: Tensor) -> tuple[object, int, int]:
    """(address space, first byte, byte after the last) of a tensor."""
    try:
        start, storage = tensor.data_ptr(), tensor.untyped_storage()
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        last = sum((int(n) - 1) * int(step) for n, step in steps)
        size = (last + 1) * tensor.element_size() if tensor.numel() else 0
    except RuntimeError:  # a kind without strides or memory is itself alone
        return id(tensor), 0, 1
    if start == 0:  # no memory here (meta and distributed tensors): offsets in the storage
        start = int(tensor.storage_offset()) * tensor.element_size()
        return storage._cdata, start, start + size
    return tensor.device, start, start + size
