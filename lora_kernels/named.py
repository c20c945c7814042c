"""The named adapters of a model: added, removed, selected for a batch, saved and loaded by name."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels import adapter_file
from lora_kernels.adapters import alpha_of, check_linear, check_values, fill, options_of, parents_of
from lora_kernels.bases import is_conv1d
from lora_kernels.mixed import BASE, LinearWithAdapters, check_name
from lora_kernels.modules import (
    Place,
    check_called,
    check_lora,
    check_model,
    layers_of,
    linear_places,
    places_of,
    put_bases,
    put_wrappers,
)
from lora_kernels.wrappers import COMPILED, modules_of, plain_names, wrapped_by


def named_layers(model: nn.Module) -> list[tuple[str, LinearWithAdapters]]:
    """(name, layer) of every `LinearWithAdapters` in `model`."""
    return layers_of(model, LinearWithAdapters)


def add_adapter(
    model: nn.Module,
    name: str,
    rank: int,
    alpha: float,
    *,
    scaling: str = "alpha",
    dropout: float = 0.0,
    dtype: torch.dtype | None = None,
    target_modules: str | Iterable[str] | None = None,
) -> list[str]:
    """Add an adapter to the Linears below `model`, each of which becomes a `LinearWithAdapters`; returns their names.

    `target_modules` and the rest are as in `replace_linear_with_lora`. ValueError, with the model as it was, for a name
    that is taken and where nothing matches.
    """
    check_model(model)
    check_name(name)
    check_lora(rank, alpha, scaling, dropout, dtype)
    places = list(linear_places(model, target_modules, LinearWithAdapters))
    if not places:
        raise ValueError(f"target_modules must name a Linear below model, got {target_modules!r}")
    for label, _, _, child in places:
        if isinstance(child, LinearWithAdapters) and name in child.adapters:
            raise ValueError(f"name must be new, got {name!r}, which {label} has")
    layers = _layers_for(places)
    with _in_all_or_none(name, layers.values()):
        for layer in layers.values():
            layer.add_adapter(name, rank, alpha, scaling=scaling, dropout=dropout, dtype=dtype)
        put_wrappers(model, places, layers)
    return [label for label, *_ in places]


def _layers_for(places: list[Place]) -> dict[nn.Module, LinearWithAdapters]:
    """For each child the layer that takes its place, itself where it is one."""
    return {
        child: child if isinstance(child, LinearWithAdapters) else LinearWithAdapters(child)
        for _, _, _, child in places
    }


@contextmanager
def _in_all_or_none(name: str, layers: Iterable[LinearWithAdapters]) -> Iterator[None]:
    """Takes a new adapter out of all `layers` where the block raises, also by an interrupt or for want of memory."""
    try:
        yield
    except BaseException:
        for layer in layers:
            if name in layer.adapters:
                del layer.adapters[name]
        raise


def remove_adapter(model: nn.Module, name: str) -> list[str]:
    """Drop an adapter everywhere; a Linear that has none left takes its place again. Returns the layers' names.

    ValueError for a name that no layer has, and for a layer that is compiled by itself and would have no adapter left. Where
    a Linear cannot take its place, the model is as it was.
    """
    having = {layer: label for label, layer in named_layers(model) if name in layer.adapters}
    if not having:
        raise ValueError(f"name must be an adapter of the model, got {name!r}")
    emptied = {layer: layer.linear for layer in having if layer.names == (name,)}
    for label, parent, *_ in places_of(model, emptied):
        if wrapped_by(parent) == COMPILED:
            raise ValueError(
                f"{label} must keep an adapter while it is compiled by itself: torch.compile keeps calling it"
            )
    put_bases(model, emptied)
    for layer in having:
        layer.remove_adapter(name)
        layer.selected = None
    return list(having.values())


def select_adapters(model: nn.Module, adapters: str | Sequence[str] | Tensor | None) -> None:
    """Set what every layer of `model` computes until the next call: a name for each sample, one for all, or indices.

    A name that a layer lacks is the base alone there. A tensor of indices counts the names of a layer, which must be the
    same in all of them. Under checkpointing the backward computes the forward again: select the next batch's after it.
    ValueError for a name that no layer has.
    """
    layers = [layer for _, layer in named_layers(model)]
    if not layers:
        raise ValueError("model must contain a LinearWithAdapters, but it has none")
    if adapters is None or isinstance(adapters, Tensor):
        if adapters is not None and len({layer.names for layer in layers}) > 1:
            raise ValueError(
                "adapters must be names where the layers of the model have different ones"
            )
        for layer in layers:
            layer.selected = adapters
        return
    if not isinstance(adapters, Iterable):
        raise TypeError(
            f"adapters must be a name, names, a Tensor or None, got {type(adapters).__name__}"
        )
    names = [adapters] if isinstance(adapters, str) else list(adapters)
    known = {name for layer in layers for name in layer.names} | {BASE}
    if unknown := set(names) - known:
        raise ValueError(f"adapters must be of {sorted(known)}, got {sorted(unknown)}")
    for layer in layers:
        present = [name if name in layer.adapters else BASE for name in names]
        layer.selected = present[0] if isinstance(adapters, str) else present


def save_named_adapter(model: nn.Module, name: str, path: str | os.PathLike[str]) -> Path:
    """Write one adapter of `model` into the folder `path`, in PEFT's layout as `save_adapter` does, and return it."""
    found = named_layers(model)
    plain = plain_names(model)
    layers = {plain[label]: layer for label, layer in found if name in layer.adapters}
    if not layers:
        raise ValueError(f"name must be an adapter of the model, got {name!r}")
    adapters: dict[str, Any] = {label: layer.adapters[name] for label, layer in layers.items()}
    transposed = any(is_conv1d(layer.linear) for layer in layers.values())
    return adapter_file.write(path, adapters, transposed)


def load_named_adapter(model: nn.Module, name: str, path: str | os.PathLike[str]) -> list[str]:
    """Add the adapter in the folder `path`, PEFT's or of `save_adapter`, by this name; returns its layers.

    ValueError for a file that `load_adapter` refuses or that does not fit, for DoRA, which these layers do not compute, and
    for a name that is taken: then the model is as it was.
    """
    check_model(model)
    check_name(name)
    read = adapter_file.read(path)
    modules, parents = modules_of(model), parents_of(model)
    for label, adapter in read.items():
        module = modules.get(label)
        linear: Any = module.linear if isinstance(module, LinearWithAdapters) else module
        check_linear(label, linear, parents[module], adapter, adapter.A.shape[1])
        check_values(label, linear)
        for parent in parents[module] if linear is module else ():
            check_called(label, parent)
        if isinstance(module, LinearWithAdapters) and name in module.adapters:
            raise ValueError(f"name must be new, got {name!r}, which {label} has")
        if adapter.magnitude is not None:
            raise ValueError(
                f"the file's layer {label!r} must be plain LoRA, got DoRA, which LinearWithAdapters does not compute"
            )
    places = places_of(model, {modules[label] for label in read})
    layers = _layers_for(places)
    with _in_all_or_none(name, layers.values()):
        for label, adapter in read.items():
            layer = layers[modules[label]]
            lora = layer.add_adapter(name, **options_of(layer.linear, adapter))
            fill(lora, adapter.A, adapter.B, None, alpha_of(label, lora, adapter.scale))
        put_wrappers(model, places, layers)
    return list(read)
