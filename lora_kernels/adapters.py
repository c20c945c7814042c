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
from lora_kernels.bases import features, is_conv1d, is_linear, is_sharded
from lora_kernels.modules import (
    LinearWithLoRA,
    LoRALayer,
    check_called,
    check_model,
    every_place,
    fits_float32,
    has_lora,
    lora_layers,
    places_of,
    put_wrappers,
)
from lora_kernels.operands import HALF
from lora_kernels.wrappers import modules_of, plain_names


def save_adapter(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write the adapters of `model` into the folder `path` and return it; PEFT's `PeftModel.from_pretrained` reads it.

    The files are written beside their places and moved there when both are complete, one save after the other, so that an
    interrupted call leaves a folder that loads as it was or is recognised as mixed. The names in it are those without
    torch's wrappers: torch.compile, checkpoint_wrapper, DataParallel, DDP, AveragedModel. The layout has one dropout for all
    layers: where theirs differ, the commonest is saved, with a warning.

    What FSDP2 or tensor parallelism sharded is gathered: every rank must call this, and each writes the same files, one
    after the other where they share the folder. ValueError, with nothing written, when the model has no LoRA layer, is
    itself one and so has no name for it, or has one that the layout cannot hold.
    """
    found = lora_layers(model)
    names = plain_names(model)
    layers = {names[name]: layer for name, layer in found}
    if not layers:
        raise ValueError("model must contain a LinearWithLoRA to save, but it has none")
    transposed = any(is_conv1d(layer.linear) for layer in layers.values())
    return adapter_file.write(path, {n: layer.lora for n, layer in layers.items()}, transposed)


def load_adapter(model: nn.Module, path: str | os.PathLike[str]) -> list[str]:
    """Load the folder `path`, written by `save_adapter` or by PEFT, into `model`; returns the layers' names.

    A and B are copied into the `LinearWithLoRA` that each name belongs to, whose alpha is set so that the scale is the
    file's; an `nn.Linear` or Transformers' Conv1D of that name is wrapped first, in all its places, and keeps its mode. So
    a fresh model gets the adapter's layers, and a model that has them already changes task. Where FSDP2 or tensor
    parallelism sharded them, each rank that calls this reads the folder and copies its own part.

    FileNotFoundError when a file is missing; ValueError for a damaged file and for one that does not fit the model: a layer
    too many or too few, another rank or shape, a Linear that is compiled by itself, a layer without values (on the meta
    device) or with a parametrized A or B, DoRA for plain LoRA or the other way round, a variant of LoRA (trained biases,
    saved modules, a base that is changed first, as by PiSSA) that these layers do not compute. After any exception the
    model is as it was.
    """
    check_model(model)
    adapters = adapter_file.read(path)
    modules, plain, parents = modules_of(model), plain_names(model), parents_of(model)
    names: dict[nn.Module, str] = {}
    for name, adapter in adapters.items():
        module: Any = modules.get(name)
        if isinstance(module, LinearWithLoRA):
            check_linear(name, module.linear, parents[module], adapter, module.lora.rank)
            _check_layer(name, module, adapter)
        else:
            check_linear(name, module, parents[module], adapter, adapter.A.shape[1])
            check_values(name, module)
            for parent in parents[module]:
                check_called(name, parent)
        if (first := names.setdefault(module, name)) != name:
            raise ValueError(f"the file's layers {first!r} and {name!r} must not be one module")
    missing = sorted(plain[name] for name, layer in lora_layers(model) if layer not in names)
    if missing:
        raise ValueError(f"{path} must hold every LoRA layer of the model, but lacks {missing}")

    wrappers = {
        m: LinearWithLoRA(m, dora=adapters[n].magnitude is not None, **options_of(m, adapters[n]))
        for m, n in names.items()
        if is_linear(m)
    }
    layers: dict[str, Any] = {n: wrappers.get(m, m).lora for m, n in names.items()}
    alphas = {name: alpha_of(name, lora, adapters[name].scale) for name, lora in layers.items()}
    _reshard(model)
    loras = [layer.lora for _, layer in lora_layers(model)]
    before: list[tuple[Any, ...]] = [
        (lora, *map(_copied, (lora.A, lora.B, lora.magnitude)), lora.alpha) for lora in loras
    ]
    try:
        for name, adapter in adapters.items():
            fill(layers[name], adapter.A, adapter.B, adapter.magnitude, alphas[name])
        put_wrappers(model, places_of(model, wrappers), wrappers)
    except BaseException:
        for old in before:
            # A layer that cannot be written has its old values.
            with suppress(Exception):
                fill(*old)
        raise
    return list(adapters)


def _check_layer(name: str, layer: LinearWithLoRA, adapter: Adapter) -> None:
    """ValueError unless the adapter of this name can be copied into the layer's."""
    if layer.merged:
        raise ValueError(f"layer {name!r} must not be merged: unmerge_lora(model) before loading")
    if (layer.lora.magnitude is None) != (adapter.magnitude is None):
        kinds = ("plain LoRA", "DoRA") if adapter.magnitude is None else ("DoRA", "plain LoRA")
        raise ValueError(
            f"the file's layer {name!r} must be {kinds[1]} as the model's, got {kinds[0]}"
        )
    for key in ("A", "B") if adapter.magnitude is None else ("A", "B", "magnitude"):
        if layer.lora._parameters.get(key) is None:
            raise ValueError(
                f"layer {name!r} must have a plain parameter {key} to load into, but it is parametrized or pruned"
            )
    check_values(name, layer.lora)


def check_values(name: str, module: nn.Module) -> None:
    """ValueError where the module, of a layer of this name, is on the meta device."""
    if any(t is not None and t.is_meta for t in module._parameters.values()):
        raise ValueError(
            f"layer {name!r} must have values before loading, but is on the meta device: see to_empty"
        )


def parents_of(model: nn.Module) -> defaultdict[Any, list[nn.Module]]:
    """The modules of `model` that each of them is a child of."""
    parents = defaultdict(list)
    for _, parent, _, child in every_place(model):
        parents[child].append(parent)
    return parents


def check_linear(
    name: str, linear: Any, parents: Iterable[nn.Module], adapter: Adapter, rank: int
) -> None:
    """ValueError unless a file's layer of this name can be over `linear`, whose place is in `parents`, with this rank."""
    if not is_linear(linear):
        found = "no module" if linear is None else f"a {type(linear).__name__}"
        raise ValueError(
            f"the file's layer {name!r} must be a Linear of the model, which has {found}"
        )
    ins, outs = features(linear)
    wanted = [[ins, rank], [rank, outs]]
    got = [list(adapter.A.shape), list(adapter.B.shape)]
    if got != wanted:
        raise ValueError(
            f"the file's layer {name!r} must have A {wanted[0]} and B {wanted[1]}, "
            f"got {got[0]} and {got[1]}"
        )
    for parent in parents:
        if isinstance(parent, nn.MultiheadAttention) or has_lora(parent):
            raise ValueError(
                f"the file's layer {name!r} must be called as a module, but {type(parent).__name__} "
                "reads its weight or has an adapter of its own"
            )


def options_of(linear: Any, adapter: Adapter) -> dict[str, Any]:
    """What a layer over `linear` for this adapter is made with; `alpha_of` has its alpha.

    Its dtype is float32 on a half base unless the file has the base's dtype, else that of the base.
    """
    stored, base = torch.promote_types(adapter.A.dtype, adapter.B.dtype), linear.weight.dtype
    return {
        "rank": adapter.A.shape[1],
        "alpha": 1.0,
        "scaling": "alpha/sqrt(rank)" if adapter.rslora else "alpha/rank",
        "dropout": adapter.dropout,
        "dtype": torch.float32 if base in HALF and stored != base else None,
    }


def _copied(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach().clone()


def alpha_of(name: str, lora: LoRALayer, scale: float) -> float:
    """The alpha with which the layer of this name has the scale of the file's."""
    alpha = adapter_file.alpha_for(scale, lora.scaling, lora.rank)
    if not fits_float32(alpha):
        raise ValueError(
            f"the file's layer {name!r} must have an alpha within float32 where the model's scale "
            f"is {lora.scaling}, got {alpha}"
        )
    return alpha


def fill(lora: LoRALayer, A: Tensor, B: Tensor, magnitude: Tensor | None, alpha: float) -> None:
    """Copy these values into a layer."""
    with torch.no_grad():
        for key, values in (("A", A), ("B", B), ("magnitude", magnitude)):
            if values is not None:
                into = getattr(lora, key)
                into.copy_(_as_sharded(values, into))
    lora.alpha = alpha


def _as_sharded(values: Tensor, like: Any) -> Tensor:
    """These values as a DTensor with the mesh and the placements of `like`, where that is one."""
    if not is_sharded(like) or is_sharded(values):
        return values
    from torch.distributed.tensor import distribute_tensor

    # Each rank has read all values and takes its part: where one of them cannot, none waits for it.
    return distribute_tensor(values, like.device_mesh, like.placements, src_data_rank=None)


def _reshard(model: nn.Module) -> None:
    """Let FSDP2 drop the whole parameters that it still has of a forward: what is written to them goes with them."""
    for module in model.modules():
        if any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__):
            module.reshard()  # type: ignore[operator]
