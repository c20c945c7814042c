"""Sibling layers that read one x, computed in one call: `fuse_projections`, undone by `unfuse_projections`.

The siblings stay where they are, with the class `FusedProjection`, and their parent gets two hooks around its forward.
Within one forward of the parent the first sibling that is called computes `lora_projections` of all. The others are given
their results when they are called with the same x. So nothing is kept from one forward to the next, and a sibling that is
called on its own computes for itself. A thread has results of its own.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from lora_kernels.arguments import TENSORS
from lora_kernels.bases import features, has_hooks, is_quantized, is_strided
from lora_kernels.functional import autocast_dtype, is_differentiated_elsewhere, is_traced
from lora_kernels.modules import LinearWithLoRA, LoRALayer, check_model, is_plain
from lora_kernels.projections import Projection, lora_projections, together

_MOST_REFUSED = 256
_thread = threading.local()  # .rounds: of the parents whose forward is running, the innermost last


class FusedProjection(LinearWithLoRA):
    """A `LinearWithLoRA` that its siblings compute together with, see `fuse_projections`; alone it computes the same."""

    def forward(self, x: Tensor) -> Tensor:
        """y [..., out_features] for x [..., in_features]."""
        if not torch.compiler.is_compiling():
            for round in reversed(getattr(_thread, "rounds", ())):
                if self in round.siblings:
                    y = round.take(self, x)
                    if y is not None:
                        return y
                    break
        return LinearWithLoRA.forward(self, x)


class Group:
    """The names of a module's children that compute together, as the two hooks around the forward of that module."""

    def __init__(self, names: tuple[str, ...], parent: nn.Module) -> None:
        self.names = names
        self.refused: set[tuple] = set()  # kinds of x for which the plan computes each for itself
        self.handles = (
            parent.register_forward_pre_hook(self.begin),
            parent.register_forward_hook(self.end, always_call=True),
        )

    def begin(self, parent: nn.Module, _: Any) -> None:
        """Let the siblings exchange results from now on."""
        if torch.compiler.is_compiling():
            return
        if not hasattr(_thread, "rounds"):
            _thread.rounds = []
        rounds, frame = _thread.rounds, sys._getframe(1)
        for place, round in enumerate(rounds):
            # A forward that was interrupted has left it: torch calls no hook after a KeyboardInterrupt.
            if round.group is self and round.parent is parent and not _runs(round.frame, frame):
                for stale in reversed(rounds[place:]):
                    stale.drop()
                del rounds[place:]
                break
        rounds.append(_Round(self, parent, frame))

    def end(self, parent: nn.Module, _: Any, output: Any) -> None:
        """Drop what was not taken; it is called after an exception as well, with None as output."""
        rounds = getattr(_thread, "rounds", None)
        if torch.compiler.is_compiling() or not rounds:
            return
        if rounds[-1].group is self and rounds[-1].parent is parent:
            rounds.pop().drop(warns=output is not None)


class _Round:
    """One forward of a parent: the results that its siblings have not yet taken, and what they depend on."""

    def __init__(self, group: Group, parent: nn.Module, frame: Any) -> None:
        self.group, self.parent = group, parent
        self.frame = frame  # that calls the parent's forward
        self.context = _context()
        self.siblings: list[Any] = [parent._modules.get(name) for name in group.names]
        self.results: dict[nn.Module, tuple[Tensor, tuple]] = {}
        self.x: Tensor | None = None
        # Whose tensors stay alive, so that their addresses are theirs.
        self.parts: list[Projection] = []
        self.apart = False  # whether each sibling computes for itself until the forward ends

    def take(self, layer: Any, x: Tensor) -> Tensor | None:
        """The layer's result for x, or None where it must compute for itself."""
        if self.apart:
            return None
        y = None
        # In another context, as within a checkpoint, what is saved for its backward must be computed within it.
        if _context() == self.context:
            if not self.results:
                y = self._compute(layer, x)
            elif x is self.x and self.results.get(layer, (None, None))[1] == _state(layer, x):
                y, _ = self.results.pop(layer)
        if y is None:
            self.drop(warns=True)
            self.apart = True
        elif not self.results:
            self.drop()
        return y

    def _compute(self, layer: Any, x: Tensor) -> Tensor | None:
        """The layer's result for x, with those of its siblings kept for them; None where each computes for itself."""
        if type(x) not in TENSORS or x.is_inference() or not is_strided(x):
            return None
        kind = x.shape, x.dtype, x.device, torch.is_grad_enabled(), x.requires_grad
        refused = self.group.refused
        if kind in refused:
            return None
        if _has_any_global_hook() or is_traced() or is_differentiated_elsewhere():
            return None
        parts: Any = [_projection(sibling) for sibling in self.siblings]
        if None in parts:
            return None
        if autocast_dtype(x.device.type) is not None:
            ys: Any = lora_projections(x, parts)
        elif not _fit(x, parts):
            return None
        else:
            ys = together(x, parts)
        if ys is None:
            if len(refused) >= _MOST_REFUSED:
                refused.clear()
            refused.add(kind)
            return None
        self.parts, self.x = parts, x
        for sibling, y in zip(self.siblings, ys, strict=True):
            if sibling is layer:
                own = y
            else:
                self.results[sibling] = y, _state(sibling, x)
        return own

    def drop(self, warns: bool = False) -> None:
        """Let go of everything that is held; `warns` where a result was computed and not taken."""
        if warns and self.results:
            warnings.warn(
                f"{', '.join(self.group.names)} of {type(self.parent).__name__} were computed together, but not all of"
                " them were called with that x: use unfuse_projections(model), or fuse layers that read one x",
                stacklevel=2,
            )
        self.results, self.parts, self.x = {}, [], None


def _context() -> tuple:
    """What decides how a result is differentiated, beside its operands; a checkpoint has hooks of its own."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), hooks


def _runs(frame: Any, innermost: Any) -> bool:
    """Whether a frame is `innermost`, or waits for it."""
    while innermost is not None and innermost is not frame:
        innermost = innermost.f_back
    return innermost is not None


def _projection(layer: Any) -> Projection | None:
    """The operands of a sibling that computes the plain formula now, else None."""
    if not isinstance(layer, FusedProjection) or _why_not(layer) is not None or layer.merged:
        return None
    inner: Any = layer._modules
    linear, lora = inner["linear"], inner["lora"]
    (weight, bias), (A, B) = _parameters(linear, lora)
    for t in (weight, A, B, bias):
        if t is not None and (type(t) not in TENSORS or t.is_inference()):
            return None
    if not isinstance(linear, nn.Linear):
        weight = weight.t()
    return Projection(weight, A, B, lora.scale, bias, lora.dropout if lora.training else 0.0)


def _fit(x: Tensor, parts: list[Projection]) -> bool:
    """Whether x and these are the operands of a call without autocast; where not, the layer's own forward says why."""
    K = x.shape[-1] if x.ndim else -1
    return all(
        weight.dtype is x.dtype
        and weight.device == x.device == A.device
        and weight.shape == (B.shape[1], K)
        and A.shape == (K, B.shape[0])
        and A.dtype is B.dtype
        and (bias is None or bias.dtype is x.dtype)
        for weight, A, B, _, bias, *_ in parts
    )


def _parameters(linear: Any, lora: Any) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """(weight, bias) and (A, B), without the search of an attribute: it takes 0.5 us each."""
    own, low = linear._parameters, lora._parameters
    return (own["weight"], own["bias"]), (low["A"], low["B"])


def _state(layer: Any, x: Tensor) -> tuple:
    """What the layer's result for x depends on: equal states at two times mean equal results."""
    linear, lora = layer._modules["linear"], layer._modules["lora"]
    (weight, bias), (A, B) = _parameters(linear, lora)
    return (
        *(x._version, x.requires_grad, x.grad_fn),
        autocast_dtype(x.device.type),
        layer.merged,
        *(lora.alpha, lora.scaling, lora.dropout, lora.training),
        *(weight.data_ptr(), weight._version, weight.requires_grad),
        *(A.data_ptr(), A._version, A.requires_grad),
        *(B.data_ptr(), B._version, B.requires_grad),
        *(() if bias is None else (bias.data_ptr(), bias._version, bias.requires_grad)),
    )


def fuse_projections(model: nn.Module, groups: Iterable[Iterable[str]]) -> list[tuple[str, ...]]:
    """Compute sibling layers that read one x in one call, in place; returns the names of each group's layers.

    A group is the names of children of one module, as ("q_proj", "k_proj", "v_proj") or ("W_query", "W_key", "W_value");
    each module of the model that has all of them is one more group of layers. They are `LinearWithLoRA`, of any ranks,
    scales, dropout and widths. Within one forward of that module the first of them that is called computes
    `lora_projections` of all. The others are given their results where they are called with the same tensor, unchanged.

    Objects, parameters, state-dict keys and what is computed stay the same. Calls where that does not hold are computed
    layer by layer: a sibling called outside of the module's forward or with another x (with a warning where results were
    not used), merged layers, hooks on a sibling, a checkpoint around some of them, `torch.inference_mode` (its tensors have
    no version), compiled code. Edits that torch does not count, those of `.data`, are not seen between two siblings.

    The siblings share one backward. So what backpropagates through one of them alone, and through another later, needs
    `retain_graph`, and hooks on the adapter of a sibling that is not in the loss run, with no gradient.

    ValueError or TypeError names the module, with the model as it was, for a group that no module has, and for a layer
    that is no `LinearWithLoRA`, is in another group, has hooks, DoRA or a quantised weight, or reads another width, device
    or dtype than its siblings, or whose module has no forward, as an `nn.ModuleDict`. A group that is fused stays so.

    >>> from lora_kernels import replace_linear_with_lora
    >>> class Gated(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.gate, self.up = nn.Linear(8, 16), nn.Linear(8, 16)
    ...
    ...     def forward(self, x):
    ...         return torch.sigmoid(self.gate(x)) * self.up(x)
    >>> model = Gated()
    >>> _ = replace_linear_with_lora(model, rank=2, alpha=1.0)
    >>> fuse_projections(model, [("gate", "up")])
    [('gate', 'up')]
    """
    check_model(model)
    made: list[tuple[nn.Module, tuple[str, ...]]] = []
    labels: list[tuple[str, ...]] = []
    owner: dict[Any, tuple[str, ...]] = {}  # of each layer its group
    for names in _names_of(groups):
        places = [
            (path, module)
            for path, module in model.named_modules()
            if all(name in module._modules for name in names)
        ]
        if not places:
            raise ValueError(f"groups must name children of one module of the model, got {names}")
        for path, parent in places:
            label = tuple(f"{path}.{name}" if path else name for name in names)
            if getattr(parent.forward, "__func__", None) is nn.Module.forward:
                raise ValueError(
                    f"groups must name children of a module that is called, but {', '.join(label)} are in"
                    f" a {type(parent).__name__}, which has no forward"
                )
            layers = [parent._modules[name] for name in names]
            known = names in (group.names for group in _groups_of(parent))
            _check_siblings(label, layers, known)
            for layer in layers:
                if layer in owner and owner[layer] != label:
                    raise ValueError(f"groups must not share a layer, got {owner[layer]}, {label}")
                owner[layer] = label
            labels.append(label)
            if not known:
                made.append((parent, names))
    for parent, names in made:
        for name in names:
            parent._modules[name].__class__ = FusedProjection  # type: ignore[assignment, union-attr]
        Group(names, parent)
    return labels


def unfuse_projections(model: nn.Module) -> list[tuple[str, ...]]:
    """Undo `fuse_projections`, in place; returns the names of the layers of each group.

    ValueError, with the model as it was, where another class was built on a fused layer's, as sharding does.
    """
    check_model(model)
    every: list[tuple[str, Any]] = list(model.named_modules())
    fused = [(name, module) for name, module in every if isinstance(module, FusedProjection)]
    for name, module in fused:
        if type(module) is not FusedProjection:
            raise ValueError(
                f"model must be unfused before it is sharded: {name} is a {type(module).__name__}"
            )
    labels = []
    for path, parent in every:
        for group in _groups_of(parent):
            labels.append(tuple(f"{path}.{name}" if path else name for name in group.names))
            for handle in group.handles:
                handle.remove()
    for _, module in fused:
        module.__class__ = LinearWithLoRA  # type: ignore[assignment]
    return labels


def _groups_of(parent: nn.Module) -> list[Group]:
    hooks = parent._forward_pre_hooks.values()
    owners = (getattr(hook, "__self__", None) for hook in hooks)
    return [owner for owner in owners if isinstance(owner, Group)]


def _names_of(groups: Iterable[Iterable[str]]) -> list[tuple[str, ...]]:
    """The groups as tuples; TypeError or ValueError unless each has at least two different names."""
    if isinstance(groups, str) or any(isinstance(group, str) for group in groups):
        raise TypeError(f"groups must be tuples of names, got {groups!r}")
    made = [tuple(group) for group in groups]
    for names in made:
        if not all(isinstance(name, str) for name in names):
            raise TypeError(f"groups must be tuples of names, got {names!r}")
        if len(set(names)) < max(len(names), 2):
            raise ValueError(f"groups must have two or more different names, got {names}")
    if not made:
        raise ValueError("groups must name at least one group, got none")
    return list(dict.fromkeys(made))


def _check_siblings(labels: tuple[str, ...], layers: list[Any], known: bool) -> None:
    """ValueError or TypeError unless these layers can compute together; it names the first that cannot."""
    for label, layer in zip(labels, layers, strict=True):
        if type(layer) is FusedProjection and not known:
            raise ValueError(f"{label} must be in one group, but it is in another: unfuse it first")
        if not isinstance(layer, LinearWithLoRA):
            raise TypeError(f"{label} must be a LinearWithLoRA, got {type(layer).__name__}")
        reason = _why_not(layer)
        if reason is not None:
            raise ValueError(f"{label} must be a layer that can be fused, but {reason}")
    if len(set(layers)) < len(layers):
        raise ValueError(f"{', '.join(labels)} must be different layers")
    for what, of in _SHARED.items():
        first = of(layers[0])
        for label, layer in zip(labels, layers, strict=True):
            if of(layer) != first:
                raise ValueError(
                    f"{label} must have the {what} of {labels[0]}, {first}, got {of(layer)}"
                )


_SHARED: dict[str, Any] = {
    "in_features": lambda layer: features(layer.linear)[0],
    "device": lambda layer: layer.linear.weight.device,
    "dtype": lambda layer: layer.linear.weight.dtype,
    "adapter's device": lambda layer: layer.lora.A.device,
    "adapter's dtype": lambda layer: layer.lora.A.dtype,
}


def _why_not(layer: Any) -> str | None:
    """None if calling this layer does nothing but the plain formula, else why not."""
    linear, lora = layer._modules["linear"], layer._modules["lora"]
    if type(layer) not in (LinearWithLoRA, FusedProjection) or "forward" in layer.__dict__:
        return f"it has a forward of its own, a {type(layer).__name__}"
    if has_hooks(layer):
        return "it has hooks"
    if layer._compiled_call_impl is not None:
        return "it is compiled by itself"
    if is_quantized(linear):
        return f"its base is quantised, a {type(linear).__name__}"
    in_lora = {"A", "B"} <= lora._parameters.keys()
    named = in_lora and {"weight", "bias"} <= linear._parameters.keys()
    if type(lora) is not LoRALayer or not is_plain(linear, lora) or not named:
        return "its linear or lora has hooks or a forward of its own, or is parametrized or sharded"
    if lora._parameters["magnitude"] is not None:
        return "it has DoRA"
    return None
