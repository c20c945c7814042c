"""Torch's modules around another one, whose part of a name no file has; found by the names of their classes."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from torch import nn

CHECKPOINT, COMPILED = "_checkpoint_wrapped_module", "_orig_mod"

# By the module and the name of the class, the name of the child that it wraps.
_WRAPPERS = {
    ("torch._dynamo.eval_frame", "OptimizedModule"): COMPILED,
    ("torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "ActivationWrapper"): CHECKPOINT,
    ("torch.nn.parallel.data_parallel", "DataParallel"): "module",
    ("torch.nn.parallel.distributed", "DistributedDataParallel"): "module",
    ("torch.optim.swa_utils", "AveragedModel"): "module",
}  # fmt: skip
_KEYS = frozenset(_WRAPPERS.values())


def wrapped_by(module: nn.Module) -> str | None:
    """The name of the child that this module is a wrapper of; None for every other module, and with a second child."""
    for cls in type(module).__mro__:
        key = _WRAPPERS.get((cls.__module__, cls.__name__))
        if key is not None:
            return key if module._modules.keys() == {key} else None
    return None


def plain_names(model: nn.Module, keys: Container[str] = _KEYS) -> dict[str, str]:
    """For the name of every module in `model` the one that it has without the wrappers whose child has one of these keys."""
    plain: dict[str, str] = {}
    hidden: set[str] = set()  # the names of the wrapped
    for name, module in model.named_modules(remove_duplicate=False):
        parent, _, key = name.rpartition(".")
        above = plain.get(parent, parent)
        plain[name] = above if name in hidden else f"{above}.{key}" if above else key
        wrapped: Any = wrapped_by(module)
        if wrapped is not None and wrapped in keys:
            hidden.add(f"{name}.{wrapped}" if name else wrapped)
    return plain


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """The modules in `model` by their names, and by those that they have without wrappers."""
    modules = dict(model.named_modules(remove_duplicate=False))
    # A wrapper comes before what it wraps, whose plain name it shares.
    return modules | {plain: modules[name] for name, plain in plain_names(model).items()}
