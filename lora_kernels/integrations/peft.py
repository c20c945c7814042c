"""Fused forward and backward for the LoRA layers of a PEFT model: one call, undone by another.

A `peft.tuners.lora.Linear` gets the class `FusedLinear`, its subclass, and stays the same object with the same parameters,
so that adapters are switched, merged, saved and added as before; PEFT's `Linear4bit` and `Linear8bitLt` over bitsandbytes'
layers get `FusedLinear4bit` and `FusedLinear8bitLt`, which exist where bitsandbytes does. Whatever a call needs that the
fused product does not compute is left to PEFT's own forward, call by call.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from lora_kernels import bases
from lora_kernels.bases import has_hooks, is_conv1d, is_plain_tensor, is_quantized, is_strided
from lora_kernels.declined import why_declined
from lora_kernels.functional import autocast_dtype
from lora_kernels.integrations import experts
from lora_kernels.integrations.state import active, why_not_one_adapter, why_not_scaling
from lora_kernels.mixed import mixed_lora_linear
from lora_kernels.modules import layers_of
from lora_kernels.operands import DTYPES, Adapter


class Fused:
    """What a LoRA layer of PEFT's becomes: its forward is one fused product, y = x·Wᵀ + bias + scaling·(dropout(x)·A)·B.

    With DoRA it is y = c∘(x·Wᵀ + scaling·(x·A)·B) + bias, and with `adapter_names` in inference each sample has its adapter.
    Parameters and state are read inside forward. A call with several adapters, another variant, hooks on the inner layers
    or on all modules, merged or disabled adapters, or a nested or sparse x takes PEFT's own forward.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """y [..., out] for x [..., in]; arguments are those of PEFT's forward."""
        layer: Any = self
        y, given = None, {key for key, value in kwargs.items() if value is not None}
        dense = is_strided(x)
        if dense and not given:
            product = experts.forward if isinstance(layer, ParamWrapper) else _forward
            y = product(layer, x, *args)
        elif dense and given == {"adapter_names"} and not args and not layer.training:
            y = _mixed_forward(layer, x, kwargs["adapter_names"])
        return super().forward(x, *args, **kwargs) if y is None else y  # type: ignore[misc]

    def _get_name(self) -> str:
        return type(self).__name__.removeprefix("Fused")


class FusedLinear(Fused, PeftLinear):
    """PEFT's LoRA Linear with the fused forward."""


class FusedParamWrapper(Fused, ParamWrapper):
    """PEFT's wrapper of a parameter, around the experts of Transformers' models, with the fused forward of `experts`."""


# PEFT finds the wrapper that a further adapter is added to by the name of its class.
FusedParamWrapper.__name__ = ParamWrapper.__name__


def _forward(layer: Any, x: Tensor, *args: Any) -> Tensor | None:
    """The fused product of a Linear of PEFT's, or None where its own forward must run."""
    if args:
        return None
    base = layer.base_layer
    if is_quantized(base):
        bases.check_order(base, x)
    if why_not_fused(layer) is not None:
        return None
    if not is_quantized(base) and not _same_dtype(x, base.weight):
        return None
    name = active(layer)[0]
    scaling = layer.scaling[name]
    lora_A, lora_B = layer.lora_A[name], layer.lora_B[name]
    return bases.lora_linear_on(
        base,
        x,
        lora_A.weight.t(),
        lora_B.weight.t(),
        scaling,
        None if lora_B.bias is None else scaling * lora_B.bias,
        magnitude=layer.lora_magnitude_vector[name].weight if name in layer.lora_variant else None,
        dropout_p=_dropout_p(layer, name),
    )


def _dropout_p(layer: Any, name: str) -> float:
    """The chance of its Dropout, whose mode may be another one than the layer's."""
    dropout = layer.lora_dropout[name]
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def _mixed_forward(layer: Any, x: Tensor, names: Any) -> Tensor | None:
    """One product in which each sample has the adapter of its name, or None where PEFT's own forward must run."""
    base = layer.base_layer
    used = [name for name in dict.fromkeys(names) if name in layer.lora_A]
    if (
        isinstance(layer, ParamWrapper)
        or len(names) != len(x)
        or _has_any_global_hook()
        or layer.disable_adapters
        or layer.merged
        or is_quantized(base)
        or _why_not_base(base) is not None
        or not layer.lora_variant.keys().isdisjoint(used)
        or any(
            _why_not_adapter(layer, name) or layer.lora_B[name].bias is not None for name in used
        )
        or any(_dropout_p(layer, name) for name in used)
        or not _same_dtype(x, base.weight)
    ):
        return None
    adapters = [
        Adapter(layer.lora_A[name].weight.t(), layer.lora_B[name].weight.t(), layer.scaling[name])
        for name in used
    ]
    index = [used.index(name) if name in used else -1 for name in names]
    weight = base.weight if isinstance(base, nn.Linear) else base.weight.t()
    return mixed_lora_linear(x, weight, adapters, index, base.bias)


@functools.cache
def fused_class(kind: type) -> type:
    """The class that takes the place of a LoRA layer's class of PEFT's, `kind`, with the fused forward."""
    if kind in _NAMED:
        return _NAMED[kind]
    name = f"Fused{kind.__name__}"
    doc = f"PEFT's LoRA {kind.__name__} with the fused forward."
    return type(name, (Fused, kind), {"__module__": __name__, "__doc__": doc})


def __getattr__(name: str) -> Any:
    """The classes over bitsandbytes' layers, by which pickle finds them."""
    if name in _QUANTIZED:
        return fused_class(getattr(import_module(_QUANTIZED_MODULE), name.removeprefix("Fused")))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_NAMED: dict[type, type] = {PeftLinear: FusedLinear, ParamWrapper: FusedParamWrapper}
_QUANTIZED = ("FusedLinear4bit", "FusedLinear8bitLt")
_QUANTIZED_MODULE = "peft.tuners.lora.bnb"  # it imports bitsandbytes


def _can_be_fused(kind: type) -> bool:
    """Whether objects of this class can get the fused forward."""
    named = f"Fused{kind.__name__}" in _QUANTIZED and kind.__module__ == _QUANTIZED_MODULE
    return kind in _NAMED or named


@dataclass(frozen=True)
class Report:
    """What `accelerate` did: for each LoRA layer by name, None where it is fused now, else why it was left alone."""

    layers: dict[str, str | None]

    @property
    def fused(self) -> list[str]:
        """Names of the layers that are fused."""
        return [name for name, reason in self.layers.items() if reason is None]

    @property
    def left_alone(self) -> dict[str, str]:
        """Reasons by name of the layers that are not."""
        return {name: reason for name, reason in self.layers.items() if reason is not None}

    def __str__(self) -> str:
        """A head line, then one line for each layer."""
        width = max(map(len, self.layers), default=0)
        rows = (f"{name:{width}}  {why or 'fused'}" for name, why in self.layers.items())
        return "\n".join([f"{len(self.fused)} of {len(self.layers)} LoRA layers fused", *rows])


def accelerate(model: nn.Module, *, allow_none: bool = False) -> Report:
    """Fuse the LoRA layers of a PEFT model, in place; returns for each layer that it is fused, or why it is left to PEFT.

    A reason holds for the moment: a layer left alone because of its adapters' state (merged, disabled, several active, a
    variant) is fused as soon as that state allows. A second call changes nothing but layers that are new. ValueError, with
    the model as it was, when no layer is fused now, unless `allow_none`.

    >>> from peft import LoraConfig, get_peft_model
    >>> base = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    >>> model = get_peft_model(base, LoraConfig(r=2, target_modules=["0", "2"]))
    >>> print(accelerate(model))
    2 of 2 LoRA layers fused
    base_model.model.0  fused
    base_model.model.2  fused
    """
    found: list[tuple[str, Any]] = layers_of(model, LoraLayer)
    report = Report(_reasons(found))
    if not report.fused and not allow_none:
        if not found:
            raise ValueError("model must contain LoRA layers of PEFT, but it has none")
        raise ValueError(f"model must contain a LoRA layer that can be fused, but: {report}")
    for _, module in found:
        if _can_be_fused(type(module)):
            kind: Any = type(module)
            module.__class__ = fused_class(kind)
    return report


def _reasons(found: list[tuple[str, Any]]) -> dict[str, str | None]:
    """`why_not_fused` by name; a wrapper of a parameter that has another around it goes with that one."""
    reasons: dict[str, str | None] = {}
    inside: dict[nn.Module, tuple[str, str | None]] = {}
    for name, layer in found:  # an outer wrapper comes before the one inside it
        outer, reason = inside.get(layer, ("", None))
        reasons[name] = (
            f"{outer} around it is left alone: {reason}" if reason else why_not_fused(layer)
        )
        if isinstance(layer, ParamWrapper):
            inside[layer.base_layer] = (outer or name, reason or reasons[name])
    return reasons


def restore(model: nn.Module) -> list[str]:
    """Give every fused layer PEFT's own class back; returns their names. ValueError if another class was built on ours."""
    fused: list[tuple[str, Any]] = layers_of(model, Fused)
    for name, module in fused:
        if Fused not in type(module).__bases__:
            raise ValueError(
                f"model must be restored before it is sharded: {name} is a {type(module).__name__}"
            )
    for _, module in fused:
        module.__class__ = type(module).__bases__[1]
    return [name for name, _ in fused]


def why_not_fused(module: nn.Module) -> str | None:
    """None if this LoRA layer of PEFT's computes the plain formula with one adapter now, else the reason."""
    if not isinstance(module, LoraLayer):
        return f"it is a {type(module).__name__}, not a LoRA layer of PEFT"
    # fully_shard makes a subclass for each layer that it is given, and that is still ours.
    if not _can_be_fused(type(module)) and type(module).forward is not Fused.forward:
        kind = f"it is a lora.{type(module).__name__}, not a lora.Linear"
        return _declined(module.base_layer) or kind
    if isinstance(module, ParamWrapper):
        return experts.why_not_fused(module)
    return _why_not_linear(module)


def _why_not_base(base: Any) -> str | None:
    if is_quantized(base):
        reason = bases.why_unreadable(base)
        if reason is not None:
            return f"its base layer, {type(base).__name__}, cannot be read: {reason}"
    elif type(base) is not nn.Linear and not is_conv1d(base):
        kind = type(base)
        what = "a subclass of" if isinstance(base, nn.Linear) else "not"
        name = f"{kind.__module__}.{kind.__qualname__}"
        return _declined(base) or f"its base layer is a {name}, {what} nn.Linear"
    return None


def _declined(base: nn.Module) -> str | None:
    """Why nothing reads this base, None for bases that are read. None in compiled code too, which reports nothing."""
    reason = None if torch.compiler.is_compiling() else why_declined(base)
    return None if reason is None else f"its base layer cannot be read: {reason}"


def _why_not_linear(module: Any) -> str | None:
    reason = _why_not_base(module.base_layer) or why_not_one_adapter(module)
    if reason is not None:
        return reason
    (name,) = active(module)
    reason = _why_not_variant(module, name) if name in module.lora_variant else None
    return reason or _why_not_adapter(module, name)


def _why_not_variant(module: Any, name: str) -> str | None:
    """None if the variant of this adapter is DoRA, with nothing added to it, else the reason."""
    variant = module.lora_variant[name]
    kind = variant if isinstance(variant, type) else type(variant)
    if kind is not DoraLinearVariant:
        return f"its adapter {name!r} is a variant, {kind.__name__}"
    layer = module.lora_magnitude_vector[name]
    if type(layer) is not DoraLinearLayer or has_hooks(layer) or "forward" in layer.__dict__:
        return "its lora_magnitude_vector has hooks or a forward of its own"
    magnitude, A = layer.weight, module.lora_A[name].weight
    if not is_plain_tensor(magnitude) or magnitude.dtype not in DTYPES:
        return f"its magnitude is a {type(magnitude).__name__} of {magnitude.dtype}, no plain floating-point tensor"
    if magnitude.device != A.device:
        return f"its magnitude is on {magnitude.device}, its lora_A on {A.device}"
    if module.lora_B[name].bias is not None:
        return "it has DoRA and a lora_bias"
    return None


def _why_not_adapter(module: Any, name: str) -> str | None:
    base, dropout = module.base_layer, module.lora_dropout[name]
    lora_A, lora_B = module.lora_A[name], module.lora_B[name]
    inner = {"base_layer": base, "lora_A": lora_A, "lora_B": lora_B, "lora_dropout": dropout}
    for part, layer in inner.items():
        if has_hooks(layer):
            return f"its {part} has hooks"
        if "forward" in layer.__dict__:
            return f"the forward of its {part} was replaced"
    if type(lora_A) is not nn.Linear or type(lora_B) is not nn.Linear:
        return "its lora_A or lora_B is no plain Linear (parametrized or replaced)"
    if lora_A.bias is not None:
        return "its lora_A has a bias"
    if type(dropout) not in (nn.Dropout, nn.Identity) or getattr(dropout, "p", 0.0) >= 1.0:
        return "its dropout is no plain Dropout with p < 1"
    packs = is_quantized(base)  # whose forward casts a bias
    weights = {"lora_A": lora_A.weight, "lora_B": lora_B.weight}
    for part, weight in (weights if packs else {"base weight": base.weight, **weights}).items():
        if not is_plain_tensor(weight) or weight.dtype not in DTYPES:
            kind = f"a {type(weight).__name__} of {weight.dtype}"
            return _declined(base) or f"its {part} is {kind}, no plain floating-point tensor"
    if lora_A.weight.dtype != lora_B.weight.dtype:
        return "its lora_A and lora_B have different dtypes"
    if lora_B.bias is not None and not packs and lora_B.bias.dtype != base.weight.dtype:
        return f"its lora_bias is {lora_B.bias.dtype} on a base of {base.weight.dtype}"
    return why_not_scaling(module, name)


def _same_dtype(x: Tensor, weight: Tensor) -> bool:
    return x.dtype == weight.dtype or autocast_dtype(x.device.type) is not None
