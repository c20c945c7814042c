"""Saving a model's adapters and loading them again; `adapter_file` has the layout."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels import adapter_file
from lora_kernels.adapter_file import Adapter
from lora_kernels.modules import (
    LinearWithLoRA,
    LoRALayer,
    Place,
    check_model,
    features,
    fits_float32,
    has_lora,
    is_linear,
    lora_layers,
    put_wrappers,
)


def save_adapter(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write the adapters of `model` into the folder `path` and return it; PEFT's `PeftModel.from_pretrained` reads it.

    The files are written beside their places and moved there when both are complete, one save after the other, so that an
    interrupted call leaves a folder that loads as it was or is recognised as mixed. The layout has one dropout for all
    layers: where theirs differ, the commonest is saved, with a warning. ValueError, with nothing written, when the model
    has no LoRA layer, is itself one and so has no name for it, or has one that the layout cannot hold.
    """
    layers = dict(lora_layers(model))
    if not layers:
        raise ValueError("model must contain a LinearWithLoRA to save, but it has none")
    if "" in layers:
        raise ValueError(
            "model must contain named layers to save, but it is itself one: put it in a module"
        )
    folder = _folder(path)
    adapter_file.write(folder, layers)
    return folder


def load_adapter(model: nn.Module, path: str | os.PathLike[str]) -> list[str]:
    """Load the folder `path`, written by `save_adapter` or by PEFT, into `model`; returns the layers' names.

    A and B are copied into the `LinearWithLoRA` that each name belongs to, whose alpha is set so that the scale is the
    file's; an `nn.Linear` or Transformers' Conv1D of that name is wrapped first, in all its places, and keeps its mode. So
    a fresh model gets the adapter's layers, and a model that has them already changes task. FileNotFoundError when a file
    is missing; ValueError for a damaged file and for one that does not fit the model: a layer too many or too few, another
    rank or shape, a layer without values (on the meta device) or with a parametrized A or B, DoRA for plain LoRA or the
    other way round, a variant of LoRA (trained biases, saved modules, a base that is changed first, as by PiSSA) that these
    layers do not compute. After any exception the model is as it was.
    """
    check_model(model)
    adapters = adapter_file.read(_folder(path))
    modules = dict(model.named_modules(remove_duplicate=False))
    parents = parents_of(model)
    names: dict[nn.Module, str] = {}
    for name, adapter in adapters.items():
        module = modules.get(name)
        if module is None:
            raise ValueError(
                f"the file's layer {name!r} must be a Linear of the model, which has no module"
            )
        _check_fits(name, module, parents[module], adapter)
        if (first := names.setdefault(module, name)) != name:
            raise ValueError(f"the file's layers {first!r} and {name!r} must not be one module")
    missing = sorted(name for name, layer in lora_layers(model) if layer not in names)
    if missing:
        raise ValueError(f"{path} must hold every LoRA layer of the model, but lacks {missing}")

    wrappers = {m: _wrapper(m, adapters[n]) for m, n in names.items() if is_linear(m)}
    layers: dict[str, Any] = {n: wrappers.get(m, m).lora for m, n in names.items()}
    alphas = {name: _alpha(name, lora, adapters[name].scale) for name, lora in layers.items()}
    before: list[tuple[Any, ...]] = [
        (
            layer.lora,
            *map(_copied, (layer.lora.A, layer.lora.B, layer.lora.magnitude)),
            layer.lora.alpha,
        )
        for _, layer in lora_layers(model)
    ]
    try:
        for name, adapter in adapters.items():
            _fill(layers[name], adapter.A, adapter.B, adapter.magnitude, alphas[name])
        put_wrappers(model, _places(model, wrappers))
    except BaseException:
        for old in before:
            # A layer that cannot be written has its old values.
            with suppress(Exception):
                _fill(*old)
        raise
    return list(adapters)


def _folder(path: str | os.PathLike[str]) -> Path:
    try:
        return Path(path)
    except TypeError:
        raise TypeError(
            f"path must be a string or os.PathLike, got {type(path).__name__}"
        ) from None


def _check_fits(name: str, module: nn.Module, parents: list[nn.Module], adapter: Adapter) -> None:
    """ValueError unless `module` can take the adapter of this name."""
    layer = module if isinstance(module, LinearWithLoRA) else None
    linear = module if layer is None else layer.linear
    if not is_linear(linear):
        raise ValueError(
            f"the file's layer {name!r} must be a Linear of the model, which has a {type(linear).__name__}"
        )
    check_called(name, parents)
    if layer is not None and layer.merged:
        raise ValueError(f"layer {name!r} must not be merged: unmerge_lora(model) before loading")
    if layer is not None and (layer.lora.magnitude is None) != (adapter.magnitude is None):
        kinds = ("plain LoRA", "DoRA") if adapter.magnitude is None else ("DoRA", "plain LoRA")
        raise ValueError(
            f"the file's layer {name!r} must be {kinds[1]} as the model's, got {kinds[0]}"
        )
    owned = linear._parameters if layer is None else layer.lora._parameters
    parts = ("A", "B") if adapter.magnitude is None else ("A", "B", "magnitude")
    for key in () if layer is None else parts:
        if owned.get(key) is None:
            raise ValueError(
                f"layer {name!r} must have a plain parameter {key} to load into, but it is parametrized or pruned"
            )
    if any(t is not None and t.is_meta for t in owned.values()):
        raise ValueError(
            f"layer {name!r} must have values before loading, but is on the meta device: see to_empty"
        )
    ins, outs = features(linear)
    rank = adapter.A.shape[1] if layer is None else layer.lora.rank
    wanted = [[ins, rank], [rank, outs]]
    got = [list(adapter.A.shape), list(adapter.B.shape)]
    if got != wanted:
        raise ValueError(
            f"the file's layer {name!r} must have A {wanted[0]} and B {wanted[1]}, "
            f"got {got[0]} and {got[1]}"
        )


def parents_of(model: nn.Module) -> defaultdict[Any, list[nn.Module]]:
    """The modules of `model` that each of them is a child of."""
    parents = defaultdict(list)
    for parent in model.modules():
        for child in parent.children():
            parents[child].append(parent)
    return parents


def check_called(name: str, parents: Iterable[nn.Module]) -> None:
    """ValueError where one of its parents does not call the module that a file's layer belongs to."""
    for parent in parents:
        if isinstance(parent, nn.MultiheadAttention) or has_lora(parent):
            raise ValueError(
                f"the file's layer {name!r} must be called as a module, but {type(parent).__name__} "
                "reads its weight or has an adapter of its own"
            )


def dtype_over(linear: nn.Module, adapter: Adapter) -> torch.dtype | None:
    """That of a layer for this adapter: float32 on a half base unless the file has the base's dtype; None: the base's."""
    stored, base = torch.promote_types(adapter.A.dtype, adapter.B.dtype), linear.weight.dtype
    narrows = base in (torch.float16, torch.bfloat16) and stored != base
    return torch.float32 if narrows else None


def _copied(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach().clone()


def _wrapper(linear: nn.Module, adapter: Adapter) -> LinearWithLoRA:
    """A layer over `linear` for this adapter."""
    return LinearWithLoRA(
        linear,
        adapter.A.shape[1],
        1.0,
        scaling="alpha/sqrt(rank)" if adapter.rslora else "alpha/rank",
        dropout=adapter.dropout,
        dora=adapter.magnitude is not None,
        dtype=dtype_over(linear, adapter),
    )


def _alpha(name: str, lora: LoRALayer, scale: float) -> float:
    alpha = adapter_file.alpha_for(scale, lora.scaling, lora.rank)
    if not fits_float32(alpha):
        raise ValueError(
            f"the file's layer {name!r} must have an alpha within float32 where the model's scale "
            f"is {lora.scaling}, got {alpha}"
        )
    return alpha


def _fill(lora: LoRALayer, A: Tensor, B: Tensor, magnitude: Tensor | None, alpha: float) -> None:
    with torch.no_grad():
        lora.A.copy_(A)
        lora.B.copy_(B)
        if magnitude is not None:
            lora.magnitude.copy_(magnitude)  # type: ignore[union-attr]
    lora.alpha = alpha


def _places(model: nn.Module, wrappers: dict[nn.Module, LinearWithLoRA]) -> list[Place]:
    """Every place of every Linear that has a wrapper."""
    return [
        (f"{path}.{key}" if path else key, parent, key, wrappers[child])
        for path, parent in model.named_modules()
        for key, child in parent._modules.items()
        if child in wrappers
    ]
