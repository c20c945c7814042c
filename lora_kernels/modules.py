"""The layer: `LoRALayer`, `LinearWithLoRA` and `replace_linear_with_lora`, drop-in for the classes of the same names.

Names, shapes, initial values, the order of random draws and state-dict keys are those of the classes that Sebastian
Raschka's "Build a Large Language Model (From Scratch)" (appendix E) made widely known; the forward is fused.
"""

from __future__ import annotations

import math
import numbers
import re
import sys
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from lora_kernels import bases
from lora_kernels.arguments import check_dropout, shown
from lora_kernels.bases import features, has_hooks, is_linear
from lora_kernels.declined import why_declined
from lora_kernels.functional import alpha_tensor, autocast_dtype
from lora_kernels.operands import DTYPES
from lora_kernels.wrappers import CHECKPOINT, COMPILED, plain_names, wrapped_by

Kind = TypeVar("Kind")
Place = tuple[str, nn.Module, str, nn.Module]  # name, parent, key and child: `parent.key` is child

_OWN = ("weight", "bias")  # names that LinearWithLoRA takes from its Linear

SCALINGS: dict[str, Callable[[float, int], float]] = {
    "alpha": lambda alpha, rank: alpha,  # the book
    "alpha/rank": lambda alpha, rank: alpha / rank,  # Hu et al. 2021, PEFT
    "alpha/sqrt(rank)": lambda alpha, rank: alpha / math.sqrt(rank),  # rsLoRA, Kalajdzievski 2023
}


class LoRALayer(nn.Module):
    """The low-rank branch alone: `scale · (dropout(x)·A)·B`, A [in_dim, rank], B [rank, out_dim].

    A starts uniform in ±1/sqrt(rank) (`kaiming_uniform_` with a = sqrt(5) on the [in_dim, rank] tensor), B at zero, so the
    branch starts at zero. `scaling` sets `scale`: "alpha" (default), "alpha/rank" or "alpha/sqrt(rank)". `alpha`
    may be set at any time and takes effect at once, in compiled code too, which does not recompile. `dtype` and `device`
    are torch's defaults unless given. ValueError or TypeError names the argument, its value and the rule.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        rank: int,
        alpha: float,
        *,
        scaling: str = "alpha",
        dropout: float = 0.0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_lora(rank, alpha, scaling, dropout, dtype)
        self.A = nn.Parameter(torch.empty(in_dim, rank, dtype=dtype, device=device))
        self.B = nn.Parameter(torch.zeros(rank, out_dim, dtype=dtype, device=device))
        self.magnitude: nn.Parameter | None
        self.register_parameter("magnitude", None)  # [out_dim] where it belongs to a DoRA layer
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.rank = rank
        self.dropout = float(dropout)
        self._alpha, self._scaling = _number(alpha), scaling
        # Read by compiled code, where a Python number would be a constant of the graph. Not a buffer: a cast of the
        # module must not round it, and it is no part of the state.
        self.scale_tensor = self._scale_tensor()

    @property
    def alpha(self) -> float:
        """LoRA's alpha, a plain finite number."""
        return self._alpha

    @alpha.setter
    def alpha(self, value: float) -> None:
        check_alpha(value)
        self._set(_number(value), self._scaling)

    @property
    def scaling(self) -> str:
        """The name of the rule that makes `scale` of alpha and rank."""
        return self._scaling

    @scaling.setter
    def scaling(self, value: str) -> None:
        check_scaling(value)
        self._set(self._alpha, value)

    @property
    def scale(self) -> float:
        """The multiplier of the branch: alpha, as `scaling` divides it."""
        return float(SCALINGS[self._scaling](self._alpha, self.rank))

    def __setattr__(self, name: str, value: Any) -> None:
        """nn.Module would register a module or a parameter past the property."""
        if name in ("alpha", "scaling", "scale"):
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def _set(self, alpha: float, scaling: str) -> None:
        with torch.inference_mode(False), torch.no_grad():
            # As of a copy that was made in inference mode, which code that is compiled does not ask for.
            if not torch.compiler.is_compiling() and self.scale_tensor.is_inference():
                self.scale_tensor = self.scale_tensor.clone()
            self.scale_tensor.fill_(float(SCALINGS[scaling](alpha, self.rank)))
        self._alpha, self._scaling = alpha, scaling

    def _scale_tensor(self) -> Tensor:
        """`scale` where A is, in float64 beside a float64 A; on the CPU while A is on the meta device."""
        device = "cpu" if self.A.is_meta else self.A.device
        # Within a caller's inference mode nothing could set it afterwards.
        with torch.inference_mode(False):
            return alpha_tensor(self.scale, self.A.dtype, device)

    def _place_scale(self) -> None:
        made = self._scale_tensor()
        if (made.device, made.dtype) != (self.scale_tensor.device, self.scale_tensor.dtype):
            self.scale_tensor = made

    def forward(self, x: Tensor, *, dropped: bool = False) -> Tensor:
        """`scale · (dropout(x)·A)·B` [..., out_dim] in x's dtype, computed by plain PyTorch; `dropped`: x is dropout(x)."""
        v = x if dropped else F.dropout(x, self.dropout, self.training)
        if autocast_dtype(x.device.type) is None:
            v = v.to(self.A.dtype)
        return (self.run_time_scale() * (v @ self.A @ self.B)).to(x.dtype)

    def run_time_scale(self) -> float | Tensor:
        """`scale` as a number in eager mode and as a 0-d tensor in traced code."""
        return self.scale_tensor if torch.compiler.is_compiling() else self.scale

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoRALayer:
        super()._apply(fn, recurse)
        self._place_scale()
        return self

    def _load_from_state_dict(self, *args: Any, **named: Any) -> None:
        super()._load_from_state_dict(*args, **named)
        self._place_scale()  # assign=True may have brought A of another device or dtype

    def extra_repr(self) -> str:
        in_dim, rank = self.A.shape
        text = f"in_dim={in_dim}, out_dim={self.B.shape[1]}, rank={rank}, alpha={self.alpha}"
        text += "" if self.scaling == "alpha" else f", scaling={self.scaling!r}"
        return text + (f", dropout={self.dropout}" if self.dropout else "")


_NO_SCRIPT = (
    "torch.fx.symbolic_trace and torch.jit.script do not run the layer's Python code; use torch.compile, torch.export or "
    "torch.jit.trace, or a torch.fx.Tracer whose is_leaf_module is true for LinearWithLoRA"
)


class OverLinear(nn.Module):
    """A layer in the place of its child `linear`, with the names that code reads of a Linear."""

    linear: Any

    @property
    def weight(self) -> Tensor:
        """The base weight as `linear` stores it: [out_features, in_features], or transposed in a Conv1D."""
        return self.linear.weight

    @property
    def bias(self) -> Tensor | None:
        """The base bias [out_features], or None."""
        return self.linear.bias

    @property
    def in_features(self) -> int:
        return features(self.linear)[0]

    @property
    def out_features(self) -> int:
        return features(self.linear)[1]

    def __setattr__(self, name: str, value: Any) -> None:
        """`weight` and `bias` are those of `linear`: who ties weights assigns to the layer."""
        if name in _OWN:
            setattr(self.linear, name, value)
        else:
            super().__setattr__(name, value)


class LinearWithLoRA(OverLinear):
    """`linear(x) + lora(x)` in one fused pass: y = x·Wᵀ + bias + scale·(dropout(x)·A)·B.

    `linear` is an nn.Linear or Transformers' Conv1D, which stores Wᵀ. It is kept as it is, the same object; `lora` is a
    `LoRALayer`, by default on `linear`'s device and in its dtype. Nothing is frozen: gradients of W and bias are computed
    when they are required. Where `linear` or `lora` carries hooks, a changed forward or a weight that is no plain tensor,
    and while hooks on all modules are registered, the two are called one after the other instead, so that what was attached
    to them still runs. `weight`, `bias`, `in_features` and `out_features` are those of `linear`.

    `dora=True` makes it DoRA (Liu et al., ICML 2024), y = c∘(x·Wᵀ + scale·(x·A)·B) + bias: c is `lora.magnitude`
    [out_features], a parameter, over the norms of the rows of W + scale·(A·B)ᵀ, and starts at 1. A row of W that is zero
    starts as NaN instead, as in PEFT. See `lora_linear`.
    """

    linear: Any  # nn.Linear or Conv1D
    lora: LoRALayer

    def __init__(
        self,
        linear: nn.Module,
        rank: int,
        alpha: float,
        *,
        scaling: str = "alpha",
        dropout: float = 0.0,
        dora: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        bases.check_base(linear)
        weight: Any = linear.weight
        self.linear = linear
        self.lora = LoRALayer(
            *features(linear),
            rank,
            alpha,
            scaling=scaling,
            dropout=dropout,
            dtype=dtype or bases.adapter_dtype(linear),
            device=device or weight.device,
        )
        if dora:
            self.lora.magnitude = _first_magnitude(linear, self.lora)
        self.train(linear.training)
        # While the layer is merged, see `merge`: the base weight as it was, or the dense one in a quantised base's place.
        self.unmerged_weight: Tensor | None = None
        self.merged_weight: Tensor | None = None
        self.register_state_dict_post_hook(_save_unmerged)
        self.register_load_state_dict_pre_hook(_refuse_merged)

    @property
    def merged(self) -> bool:
        """Whether the base weight holds the low-rank product now (`merge_lora`), so that forward is the base's.

        Over a quantised base a dense weight beside it does.
        """
        return self.unmerged_weight is not None or self.merged_weight is not None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LinearWithLoRA:
        super()._apply(fn, recurse)
        for name in ("unmerged_weight", "merged_weight"):
            kept = getattr(self, name)
            if kept is not None:
                setattr(self, name, fn(kept))
        return self

    def __prepare_scriptable__(self) -> nn.Module:
        """Raise TypeError: torch.jit.script calls this, and cannot compile this class."""
        raise TypeError(f"LinearWithLoRA cannot be scripted: {_NO_SCRIPT}")

    def forward(self, x: Tensor) -> Tensor:
        """y [..., out_features] for x [..., in_features]."""
        if type(x) is not Tensor and not isinstance(x, Tensor):
            hint = f": {_NO_SCRIPT}" if isinstance(x, torch.fx.Proxy) else ""
            raise TypeError(f"x must be a Tensor, got {type(x).__name__}{hint}")
        # A submodule as an attribute takes 1.6 us of a call of 60, from this dict 0.1 us (AMD Zen 2, 2026-11).
        inner = self._modules
        linear: Any = inner["linear"]
        lora: Any = inner["lora"]
        if self.unmerged_weight is not None:
            return linear(x)
        if self.merged_weight is not None:
            return bases.dense_linear(x, self.merged_weight, linear.bias)
        y = None
        if is_plain(linear, lora) and bases.is_strided(x) and not _has_any_global_hook():
            p = lora.dropout if lora.training else 0.0
            y = bases.lora_linear_on(
                linear,
                x,
                lora.A,
                lora.B,
                lora.run_time_scale(),
                magnitude=lora.magnitude,
                dropout_p=p,
            )
        if y is None:
            plain = lora.magnitude is None
            y = called_apart(linear, lora, x) if plain else _scaled(linear, lora, x)
        return y


def called_apart(linear: Any, lora: Any, x: Tensor) -> Tensor:
    """`linear(x) + lora(x)` in the first's dtype, which under autocast is not x's."""
    y = bases.called(linear, x)
    return (y + lora(x)).to(y.dtype)


def _first_magnitude(linear: nn.Module, lora: LoRALayer) -> nn.Parameter:
    """The norms of the base weight's rows, so that a new DoRA layer computes what its base does; none on the meta device."""
    A, B = lora.A.detach(), lora.B.detach()
    weight: Any = linear.weight
    if weight.is_meta or A.is_meta:
        return nn.Parameter(A.new_empty(B.shape[1]))
    norms = bases.row_norms_on(linear, A.to(weight.device), B.to(weight.device), lora.scale)
    return nn.Parameter(norms.to(A))


def _scaled(linear: Any, lora: LoRALayer, x: Tensor) -> Tensor:
    """DoRA where `linear` and `lora` must be called as modules: base + (c-1)∘(v·Wᵀ) + c∘lora, v = dropout(x)."""
    dropping = lora.training and lora.dropout > 0
    v = F.dropout(x, lora.dropout, dropping)
    magnitude: Any = lora.magnitude
    c = magnitude / bases.row_norms_on(linear, lora.A, lora.B, lora.run_time_scale())
    y = bases.called(linear, x)
    inner = linear(v) if dropping else y
    if linear.bias is not None:
        inner = inner - linear.bias
    return (y + (c - 1) * inner + c * lora(v, dropped=True)).to(y.dtype)


def replace_linear_with_lora(
    model: nn.Module,
    rank: int,
    alpha: float,
    *,
    scaling: str = "alpha",
    dropout: float = 0.0,
    dora: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    target_modules: str | Iterable[str] | None = None,
) -> list[str]:
    """Put a `LinearWithLoRA` in the place of every Linear below `model`, in place; returns their names in order.

    A Linear is an `nn.Linear` or Transformers' Conv1D. `target_modules`: a regular expression that must match the whole
    name, or an iterable of names or name suffixes ("q_proj" takes every "….q_proj"); ValueError if nothing matches. A layer
    that is wrapped already, by this package, by PEFT or by a module with `linear` and `lora` of its own, stays as it is. A
    module that occurs in several places is wrapped once. The projections of `nn.MultiheadAttention`, which does not call
    them as modules, are left alone with a warning, and so is a `model` that is itself a Linear and has no place to put
    the wrapper in. Bad arguments raise before anything is changed. Freeze with `freeze_base`, or before calling this.
    """
    check_model(model)
    check_lora(rank, alpha, scaling, dropout, dtype)
    places = list(linear_places(model, target_modules))
    if not places:
        if target_modules is not None:
            raise ValueError(f"target_modules must name a Linear, got {target_modules!r}: no match")
        if is_linear(model):
            warnings.warn(
                "model is itself a Linear and cannot be replaced in place: use "
                "LinearWithLoRA(model, rank, alpha)",
                stacklevel=2,
            )
    wrappers: dict[nn.Module, LinearWithLoRA] = {}
    for *_, linear in places:
        if linear not in wrappers:
            wrappers[linear] = LinearWithLoRA(
                linear,
                rank,
                alpha,
                scaling=scaling,
                dropout=dropout,
                dora=dora,
                dtype=dtype,
                device=device,
            )
    put_wrappers(model, places, wrappers)
    return [name for name, *_ in places]


def every_place(model: nn.Module) -> Iterator[Place]:
    """Every place below `model` that has a module, each holder by its first name."""
    for path, parent in model.named_modules():
        for key, child in parent._modules.items():
            if child is not None:
                yield f"{path}.{key}" if path else key, parent, key, child


def places_of(model: nn.Module, modules: Container[nn.Module]) -> list[Place]:
    """Every place below `model` of these modules."""
    return [place for place in every_place(model) if place[-1] in modules]


def put_wrappers(model: nn.Module, places: list[Place], wrappers: Mapping[Any, nn.Module]) -> None:
    """Put the layer over each place's Linear in that place; all of them, or on an exception none."""
    renamed = {f"{name}.{p}": f"{name}.linear.{p}" for name, *_ in places for p in _OWN}
    settings = _renamed_ties(model, renamed)
    for _, parent, _, _ in places:
        if isinstance(parent, nn.TransformerEncoderLayer):
            # Its inference path reads `linear1.weight` past the LoRA branch.
            settings.append((parent, "activation_relu_or_gelu", 0))
    for module in model.modules() if places else ():
        if isinstance(module, nn.TransformerEncoder):
            settings.append((module, "use_nested_tensor", False))
    _put(places, wrappers, settings)


def put_bases(model: nn.Module, bases: Mapping[Any, nn.Module]) -> None:
    """Put a Linear in every place of the layer that was over it; all of them, or on an exception none."""
    places = places_of(model, bases)
    renamed = {f"{name}.linear.{p}": f"{name}.{p}" for name, *_ in places for p in _OWN}
    _put(places, bases, _renamed_ties(model, renamed))


def _put(
    places: list[Place], instead: Mapping[Any, nn.Module], settings: list[tuple[Any, str, Any]]
) -> None:
    """Put what `instead` has for each place's child in that place, and set attributes; on an exception all is as before.

    A setting is (module, attribute, value).
    """
    before = [(module, name, getattr(module, name, None)) for module, name, _ in settings]
    done = 0
    try:
        for _, parent, key, child in places:
            setattr(parent, key, instead[child])
        for module, name, value in settings:
            done += 1
            setattr(module, name, value)
    except BaseException:
        for _, parent, key, child in places:
            parent._modules[key] = child
        for setting in reversed(before[:done]):
            with suppress(Exception):  # one that cannot be set has its old value
                setattr(*setting)
        raise


def _renamed_ties(model: nn.Module, names: dict[str, str]) -> list[tuple[nn.Module, str, Any]]:
    """The lists of tied weights of Transformers' models, which tie and save by them, with new parameter names.

    Each is (module, attribute, list).
    """
    found: list[tuple[nn.Module, str, Any]] = []
    for path, module in model.named_modules():
        prefix = path + "." if path else ""
        new = {
            old.removeprefix(prefix): name.removeprefix(prefix)
            for old, name in names.items()
            if old.startswith(prefix)
        }
        for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
            tied = getattr(module, attribute, None)
            if isinstance(tied, dict) and not new.keys().isdisjoint((*tied, *tied.values())):
                renamed = {new.get(key, key): new.get(of, of) for key, of in tied.items()}
                found.append((module, attribute, renamed))
            elif isinstance(tied, list) and not new.keys().isdisjoint(tied):
                found.append((module, attribute, [new.get(key, key) for key in tied]))
    return found


def layers_of(model: nn.Module, kind: type[Kind]) -> list[tuple[str, Kind]]:
    """(name, layer) of every module of a class in `model`, each once, `model` itself included."""
    check_model(model)
    return [(name, module) for name, module in model.named_modules() if isinstance(module, kind)]


def lora_layers(model: nn.Module) -> list[tuple[str, LinearWithLoRA]]:
    """(name, layer) of every `LinearWithLoRA` in `model`, each once, `model` itself included."""
    return layers_of(model, LinearWithLoRA)


def freeze_base(model: nn.Module) -> None:
    """Set `requires_grad` to False on every parameter that is not an adapter's, and to True on those."""
    adapters = set(lora_parameters(model))
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in adapters)


def lora_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """A, B and DoRA's magnitude of every LoRA layer in `model`, in the model's order: what an optimizer should get.

    Where A or B is parametrized, the parameters that it is computed from.
    """
    parameters = (p for _, layer in layers_of(model, LoRALayer) for p in layer.parameters())
    return iter(dict.fromkeys(parameters))


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The entries of `model.state_dict()` that belong to adapters: "<layer>.lora.A", "<layer>.lora.B", "….lora.magnitude".

    Where A or B is parametrized, the entries of what it is computed from.
    """
    check_model(model)
    names = plain_names(model, {CHECKPOINT})  # which alone names its state without its own part
    owners = tuple(
        f"{names[name]}." if names[name] else ""
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, LoRALayer)
    )
    return {key: value for key, value in model.state_dict().items() if key.startswith(owners)}


def check_model(model: nn.Module) -> None:
    """TypeError unless it is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def check_lora(
    rank: int, alpha: float, scaling: str, dropout: float, dtype: torch.dtype | None = None
) -> None:
    """TypeError or ValueError unless these can make a LoRA layer."""
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"rank must be an integer, got {type(rank).__name__}")
    if rank <= 0:
        raise ValueError(f"rank must be positive, got {rank}")
    check_alpha(alpha)
    check_scaling(scaling)
    check_dropout("dropout", dropout)
    if dtype is not None and dtype not in DTYPES:
        raise TypeError(f"dtype must be float32, bfloat16, float16 or float64, got {dtype!r}")


def check_alpha(alpha: float) -> None:
    """TypeError unless alpha is a real number, ValueError unless it is finite in float32."""
    if isinstance(alpha, bool) or not isinstance(alpha, numbers.Real):
        raise TypeError(f"alpha must be a real number, got {type(alpha).__name__}")
    if not fits_float32(alpha):
        raise ValueError(f"alpha must be finite in float32, got {shown(alpha)}")


def fits_float32(value: float) -> bool:
    """Whether a real number is finite in float32."""
    return bool(abs(value) <= torch.finfo(torch.float32).max)


def check_scaling(scaling: str) -> None:
    """ValueError unless `scaling` is the name of a rule."""
    if not isinstance(scaling, str) or scaling not in SCALINGS:
        raise ValueError(f"scaling must be one of {tuple(SCALINGS)}, got {scaling!r}")


def _number(alpha: float) -> float:
    """A Python number: numpy's and others' kinds are no constants for compilers."""
    return alpha if type(alpha) in (int, float) else float(alpha)


def is_plain(linear: nn.Module, lora: LoRALayer) -> bool:
    """Whether calling `linear` and `lora` would do nothing but the formula, so that it may be fused."""
    return (
        bases.is_plain(linear)
        and type(lora).forward is LoRALayer.forward
        and "forward" not in lora.__dict__
        and not has_hooks(lora)
    )


def _name_filter(target_modules: str | Iterable[str] | None) -> Callable[[str], bool]:
    if target_modules is None:
        return lambda name: True
    if isinstance(target_modules, str):
        try:
            pattern = re.compile(target_modules)
        except re.error as error:
            raise ValueError(
                f"target_modules must be a regular expression, got {target_modules!r}: {error}"
            ) from None
        return lambda name: pattern.fullmatch(name) is not None
    if not isinstance(target_modules, Iterable):
        raise TypeError(
            f"target_modules must be a string or strings, got {type(target_modules).__name__}"
        )
    suffixes = tuple(target_modules)
    if not all(isinstance(suffix, str) for suffix in suffixes):
        raise TypeError(f"target_modules must be strings, got {suffixes!r}")
    return lambda name: any(name == end or name.endswith("." + end) for end in suffixes)


def linear_places(
    model: nn.Module,
    target_modules: str | Iterable[str] | None,
    taken: type[nn.Module] | None = None,
) -> Iterator[Place]:
    """Each place of a Linear to replace, depth first in the order of `named_children`, and of a layer that is a `taken`."""
    wanted = _name_filter(target_modules)
    seen: set[nn.Module] = {model}

    def visit(parent: nn.Module, prefix: str) -> Iterator[Place]:
        for key, child in parent._modules.items():
            name = prefix + key
            if taken is not None and isinstance(child, taken) and wanted(name):
                yield name, parent, key, child
            if child is None or has_lora(child):
                continue
            reason = why_declined(child)
            if reason is not None and wanted(name):
                raise ValueError(f"{name} must have a weight that products can read, but {reason}")
            if is_linear(child):
                if isinstance(parent, nn.MultiheadAttention):
                    if wanted(name):
                        warnings.warn(
                            f"{name} is left alone: nn.MultiheadAttention reads its weight "
                            "and never calls it",
                            stacklevel=_outside(),
                        )
                elif wanted(name):
                    check_called(name, parent)
                    yield name, parent, key, child
            elif child not in seen:
                seen.add(child)
                yield from visit(child, name + ".")

    return iter(()) if has_lora(model) else visit(model, "")


def check_called(name: str, parent: nn.Module) -> None:
    """ValueError where a layer in the place of the Linear of this name would not be called."""
    if wrapped_by(parent) == COMPILED:
        raise ValueError(
            f"{name} must have its adapter before it is compiled by itself: torch.compile keeps calling the Linear"
        )


def _outside() -> int:
    """The `stacklevel` at which a warning points out of this package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals["__name__"].startswith(f"{__package__}."):
        level, frame = level + 1, frame.f_back
    return level


def has_lora(module: nn.Module) -> bool:
    """Whether `module` is a Linear with an adapter: ours, PEFT's (by name, not imported) or made as the book does."""
    lora = module._modules.get("lora")
    return (
        isinstance(module, LinearWithLoRA)
        or any(cls.__name__ == "BaseTunerLayer" for cls in type(module).__mro__)
        or ("linear" in module._modules and hasattr(lora, "A") and hasattr(lora, "B"))
        or {"linear", "adapters"} <= module._modules.keys()
    )


def _save_unmerged(
    module: LinearWithLoRA, state: dict[str, Any], prefix: str, metadata: dict[str, Any]
) -> None:
    """Put the base weight as it was into a merged layer's state dict, so that a saved base never contains an adapter."""
    key = prefix + "linear.weight"
    if module.unmerged_weight is not None and key in state:
        state[key] = module.unmerged_weight


def _refuse_merged(module: LinearWithLoRA, state: dict[str, Any], prefix: str, *_: Any) -> None:
    if module.merged and any(key.startswith(prefix) for key in state):
        raise RuntimeError(
            f"{prefix[:-1] or 'layer'} is merged: unmerge_lora(model) before loading"
        )
