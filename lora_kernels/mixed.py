"""Several adapters in one batch: one product in which each sample has its own, and the layer that holds them by name."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from functools import reduce
from itertools import accumulate
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from lora_kernels import bases
from lora_kernels.arguments import check_operand, check_scale, check_shaped, number
from lora_kernels.bases import adapter_dtype, features, is_linear, is_quantized
from lora_kernels.functional import lora_linear
from lora_kernels.grouped import grouped_lora_linear
from lora_kernels.modules import LoRALayer, OverLinear, called_apart, is_plain
from lora_kernels.operands import DTYPES, Adapter, QuantizedWeight, Scale, Weight, accumulated
from lora_kernels.routing import sorted_by_group

BASE = "__base__"  # the name, as in PEFT, of no adapter at all
_NONE = -1  # its index
_TAKEN = nn.ModuleDict()  # whose attributes are no names of adapters


def mixed_lora_linear(
    x: Tensor,
    weight: Weight,
    adapters: Sequence[tuple[Tensor, Tensor, Scale] | Adapter],
    index: Sequence[int] | Tensor,
    bias: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
) -> Tensor:
    """y[i] = x[i]·weightᵀ + bias + scale·(dropout(x[i])·A)·B with the adapter of index[i], or without one where that is -1.

    x [S, ..., K], weight [N, K], adapters (A [K, R], B [R, N], scale) of any ranks, bias [N] -> y [S, ..., N]. `index` has S
    integers in [-1, number of adapters). In a list they are read on the host: an adapter that is not in it takes no part,
    and its gradient is None. In a tensor on x's device they are not read: every adapter takes part, one without samples
    with a zero gradient, and code that is compiled is not compiled again for another index.

    Smaller ranks are padded with zeros, and no adapter is one of zeros: an infinity in such a sample becomes NaN where
    another adapter of the batch has a larger rank.

    ValueError for an index without an adapter; in a tensor that is not on a CPU it means the base alone. TypeError or
    ValueError for an adapter of the batch that `lora_linear` would refuse.
    """
    _check_operands(x, weight)
    S, *lead, K = x.shape
    ids: Any
    if isinstance(index, Tensor):
        ids, chosen = _of_tensor(index, x, len(adapters))
        in_order = False
    else:
        ids, chosen = _of_list(index, S, len(adapters))
        in_order = ids == sorted(ids)
    parts = [_adapter(g, adapters[g], x, weight) for g in chosen if g != _NONE]
    if _NONE in chosen:
        dtype = parts[0].A.dtype if parts else x.dtype
        parts.insert(chosen.index(_NONE), _nothing(x, weight, dtype))
    if len(parts) == 1:
        A, B, scale, *_ = parts[0]
        return lora_linear(x, weight, A, B, scale, bias, dropout_p=dropout_p)
    A, B, scales = _stacked(parts, x)
    each = math.prod(lead)  # rows of a sample
    if in_order:
        counts = [ids.count(g) * each for g in range(len(parts))]
        offsets = torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=x.device)
        rows = x.reshape(S * each, K)
    else:
        routing = sorted_by_group(torch.as_tensor(ids, device=x.device), len(parts))
        rows = routing.spread(x.reshape(S, each * K)).reshape(S * each, K)
        offsets = routing.offsets * each
    y = grouped_lora_linear(rows, weight, A, B, offsets, scales, bias, dropout_p=dropout_p)
    if not in_order:
        y = routing.gather(y.reshape(S, each * y.shape[1]))
    return y.reshape(S, *lead, weight.shape[0])


def _check_operands(x: Any, weight: Any) -> None:
    """TypeError or ValueError unless x is [S, ..., K] and weight [N, K]."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a Tensor, got {type(x).__name__}")
    check_shaped(x, "x")
    if not bases.is_strided(x) or x.ndim < 2:
        got = list(x.shape) if bases.is_strided(x) else f"a {x.layout} tensor"
        raise ValueError(f"x must be [S, ..., K], a row or more for each sample, got {got}")
    if not isinstance(weight, (Tensor, QuantizedWeight)):
        raise TypeError(f"weight must be a Tensor, got {type(weight).__name__}")
    if isinstance(weight, Tensor):
        check_shaped(weight, "weight")
    if len(weight.shape) != 2:
        raise ValueError(f"weight must be [N, K], got {list(weight.shape)}")
    if x.shape[-1] != weight.shape[1]:
        K = weight.shape[1]
        raise ValueError(f"x must be [S, ..., K] with K = {K} as in weight, got {list(x.shape)}")


def _adapter(place: int, given: Any, x: Tensor, weight: Weight) -> Adapter:
    """adapters[place]; TypeError or ValueError unless it is A [K, R], B [R, N] of one dtype on x's device, and a scale."""
    if not isinstance(given, Adapter):
        if not (isinstance(given, (tuple, list)) and len(given) == 3):
            got = type(given).__name__
            raise TypeError(f"adapters[{place}] must be (A, B, scale), got {got}")
        given = Adapter(*given)
    A, B, scale, *_ = given
    N, K = weight.shape
    fits = isinstance(A, Tensor) and isinstance(B, Tensor)
    fits = fits and A.dtype == B.dtype and A.dtype in DTYPES and A.device == B.device == x.device
    if not (fits and A.ndim == B.ndim == 2 and A.shape == (K, B.shape[0]) and B.shape[1] == N):
        _refuse(f"adapters[{place}]", A, B, K, N, x.device)
    if type(scale) is not float:
        check_scale(scale, f"scale of adapters[{place}]", x.device)
    return given


def _refuse(name: str, A: Any, B: Any, K: int, N: int, device: torch.device) -> NoReturn:
    """Raise the TypeError or ValueError for an adapter of this name that does not fit."""
    for which, t in (("A", A), ("B", B)):
        check_operand(t, f"{which} of {name}", device)
    if B.dtype != A.dtype:
        raise TypeError(f"B of {name} must have A's dtype, {A.dtype}, got {B.dtype}")
    if A.ndim != 2 or A.shape[0] != K:
        raise ValueError(f"A of {name} must be [K, R] with K = {K}, got {list(A.shape)}")
    raise ValueError(f"B of {name} must be [R, N] = [{A.shape[1]}, {N}], got {list(B.shape)}")


def _of_list(index: Sequence[int], S: int, count: int) -> tuple[list[int], list[int]]:
    """(each sample's place in the second list, the adapters of the batch in the order in which they come)."""
    if len(index) != S:
        raise ValueError(
            f"index must have an integer for each of x's {S} samples, got {len(index)}"
        )
    for g in index:
        if not isinstance(g, numbers.Integral):
            raise TypeError(f"index must have integers, got {g!r}")
        if not _NONE <= g < count:
            raise ValueError(f"index must be in [-1, {count}) for {count} adapters, got {g}")
    chosen = list(dict.fromkeys(index)) or [_NONE]
    place = {g: i for i, g in enumerate(chosen)}
    return [place[g] for g in index], chosen


def _of_tensor(index: Tensor, x: Tensor, count: int) -> tuple[Tensor, list[int]]:
    """`_of_list` of a tensor: all adapters in their order, and last none."""
    check_shaped(index, "index")
    if index.dtype not in (torch.int32, torch.int64) or index.shape != x.shape[:1]:
        raise ValueError(
            f"index must be int64 or int32 [{x.shape[0]}], got {index.dtype} {list(index.shape)}"
        )
    if index.device != x.device:
        raise ValueError(f"index must be on x's device, {x.device}, got {index.device}")
    outside = (index < 0) | (index >= count)
    if (
        index.is_cpu
        and not torch.compiler.is_compiling()
        and bool(((index < _NONE) | (index >= count)).any())
    ):
        raise ValueError(
            f"index must be in [-1, {count}) for {count} adapters, got {index.tolist()}"
        )
    return torch.where(outside, count, index), [*range(count), _NONE]


def _nothing(x: Tensor, weight: Weight, dtype: torch.dtype) -> Adapter:
    """An adapter of rank 0."""
    N, K = weight.shape
    return Adapter(x.new_empty(K, 0, dtype=dtype), x.new_empty(0, N, dtype=dtype), 0.0)


def _stacked(parts: list[Adapter], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A [G, K, R], B [G, R, N] and scales [G]: zeros beyond an adapter's own rank, whose gradients are dropped."""
    R = max(part.A.shape[1] for part in parts)
    dtype = reduce(torch.promote_types, (part.A.dtype for part in parts))

    def padded(t: Tensor, *room: int) -> Tensor:
        return F.pad(t.to(dtype), room) if room[-1] else t.to(dtype)

    A = torch.stack([padded(part.A, 0, R - part.A.shape[1]) for part in parts])
    B = torch.stack([padded(part.B, 0, 0, 0, R - part.B.shape[0]) for part in parts])
    dtype_of_sums, scales = accumulated(x.dtype), [part.scale for part in parts]
    if any(isinstance(scale, Tensor) for scale in scales):
        made = [torch.as_tensor(scale, dtype=dtype_of_sums, device=x.device) for scale in scales]
        return A, B, torch.stack(made)
    return A, B, torch.tensor(list(map(number, scales)), dtype=dtype_of_sums, device=x.device)


class LinearWithAdapters(OverLinear):
    """A Linear with several adapters by name, of which each sample of a batch has one or none, in one product.

    `linear` is an nn.Linear or Transformers' Conv1D and stays the same object; `adapters` holds a `LoRALayer` for each name.
    Nothing is frozen.

    >>> layer = LinearWithAdapters(nn.Linear(8, 6))
    >>> _ = layer.add_adapter("fr", rank=2, alpha=1.0), layer.add_adapter("de", rank=4, alpha=0.5)
    >>> layer(torch.randn(3, 8), ["de", "__base__", "fr"]).shape
    torch.Size([3, 6])
    """

    adapters: nn.ModuleDict

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        if not is_linear(linear):
            raise TypeError(
                f"linear must be a torch.nn.Linear or Transformers' Conv1D, got {type(linear).__name__}"
            )
        bases.check_sizes(linear)
        self.linear = linear
        self.adapters = nn.ModuleDict()
        self.selected: str | Sequence[str] | Tensor | None = None
        self.train(linear.training)

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters' names in the order in which they were added: an index is a place here."""
        return tuple(self.adapters)

    def add_adapter(
        self,
        name: str,
        rank: int,
        alpha: float,
        *,
        scaling: str = "alpha",
        dropout: float = 0.0,
        dtype: torch.dtype | None = None,
    ) -> LoRALayer:
        """A new `LoRALayer`, by default in `linear`'s dtype; ValueError for a name that is taken, empty or has a dot."""
        check_name(name)
        if name in self.adapters:
            raise ValueError(f"name must be new, got {name!r}, which the layer has")
        lora = LoRALayer(
            *features(self.linear),
            rank,
            alpha,
            scaling=scaling,
            dropout=dropout,
            dtype=dtype or adapter_dtype(self.linear),
            device=self.linear.weight.device,
        )
        self.adapters[name] = lora.train(self.training)
        return lora

    def remove_adapter(self, name: str) -> None:
        """Drop an adapter; the places of those behind it fall by one. ValueError for a name that the layer lacks."""
        self._check_name(name)
        del self.adapters[name]

    def forward(self, x: Tensor, adapters: str | Sequence[str] | Tensor | None = None) -> Tensor:
        """y [S, ..., out] for x [S, ..., in]; `adapters`: a name for each sample or one for all, or places in `names`.

        Names and places are the list and the tensor of `mixed_lora_linear`, "__base__" and -1 the base alone; by default
        those in the attribute `selected`. The adapters of a batch must have one dropout, where one in eval mode has none.
        ValueError for a name or a place that there is not, and where nothing is given or selected.
        """
        adapters = self.selected if adapters is None else adapters
        if not x.ndim:
            raise ValueError(f"x must be [S, ..., in], got {list(x.shape)}")
        if adapters is None:
            raise ValueError("adapters must be given, or selected by select_adapters(model, names)")
        if isinstance(adapters, str):
            return self._one(x, adapters)
        index: Any = adapters
        if not isinstance(adapters, Tensor):
            wanted = list(adapters)
            if len(wanted) != x.size(0):
                raise ValueError(
                    f"adapters must have a name for each of x's {x.size(0)} samples, got {len(wanted)}"
                )
            places = {name: place for place, name in enumerate(self.names)} | {BASE: _NONE}
            for name in wanted:
                if name not in places:
                    self._check_name(name)
            index = [places[name] for name in wanted]
        layers: list[Any] = list(self.adapters.values())
        linear = self.linear
        fused = bases.is_plain(linear) and not is_quantized(linear) and not _has_any_global_hook()
        if not (fused and all(is_plain(linear, lora) for lora in layers)):
            return self._apart(x, index)
        weight = linear.weight
        if not bases.is_operand(weight):
            return self._apart(x, index)
        parts = [Adapter(lora.A, lora.B, lora.run_time_scale()) for lora in layers]
        weight = weight if isinstance(linear, nn.Linear) else weight.t()
        return mixed_lora_linear(
            x, weight, parts, index, linear.bias, dropout_p=self._dropout(index)
        )

    def _one(self, x: Tensor, name: str) -> Tensor:
        """One adapter, or none, for all samples: compiled code takes any number of them."""
        if x.ndim < 2:
            raise ValueError(
                f"x must be [S, ..., in], a row or more for each sample, got {list(x.shape)}"
            )
        if name == BASE:
            return self._base(x)
        self._check_name(name)
        linear: Any = self.linear
        lora: Any = self.adapters[name]
        y = None
        if is_plain(linear, lora) and self._reads_weight(x):
            scale, chance = lora.run_time_scale(), lora.dropout if lora.training else 0.0
            y = bases.lora_linear_on(linear, x, lora.A, lora.B, scale, dropout_p=chance)
        return called_apart(linear, lora, x) if y is None else y

    def _base(self, x: Tensor) -> Tensor:
        """What `linear` computes; of a quantised one from its packed weight, as beside an adapter."""
        linear: Any = self.linear
        y = None
        if bases.is_plain(linear) and x.dtype in DTYPES and self._reads_weight(x):
            K, N = features(linear)
            y = bases.lora_linear_on(linear, x, x.new_empty(K, 0), x.new_empty(0, N), 0.0)
        return bases.called(linear, x) if y is None else y

    def _reads_weight(self, x: Tensor) -> bool:
        """Whether a product may read `linear`'s weight in place of a call of the module, for which there may be reasons."""
        if not bases.is_strided(x) or _has_any_global_hook():
            return False
        return not is_quantized(self.linear) or bases.why_unreadable(self.linear) is None

    def _check_name(self, name: str) -> None:
        if name not in self.adapters:
            raise ValueError(f"name must be one of {self.names}, got {name!r}")

    def _dropout(self, index: Any) -> float:
        layers: list[Any] = list(self.adapters.values())
        if not isinstance(index, Tensor):
            layers = [layers[place] for place in set(index) - {_NONE}]
        chances = {lora.dropout if lora.training else 0.0 for lora in layers}
        if len(chances) > 1:
            raise ValueError(f"adapters of one batch must have one dropout, got {sorted(chances)}")
        return chances.pop() if chances else 0.0

    def _apart(self, x: Tensor, index: Any) -> Tensor:
        """The same, each adapter called as the module that it is, with zeros in samples that are not its own."""
        count = len(self.names)
        if isinstance(index, Tensor):
            ids, chosen = _of_tensor(index, x, count)
        else:
            places, chosen = _of_list(index, x.shape[0], count)
            ids = torch.as_tensor(places, device=x.device)
        y = self._base(x)
        layers = list(self.adapters.values())
        ids = ids.reshape(-1, *[1] * (x.ndim - 1))
        for place, g in enumerate(chosen):
            if g != _NONE:
                own = ids == place  # of other samples neither what is not finite nor a gradient
                y = (y + torch.where(own, layers[g](torch.where(own, x, 0)), 0)).to(y.dtype)
        return y


def check_name(name: str) -> None:
    """ValueError unless an adapter can have this name."""
    if not isinstance(name, str) or not name or "." in name or name == BASE:
        raise ValueError(f"name must be a string without dots other than {BASE!r}, got {name!r}")
    if hasattr(_TAKEN, name):
        raise ValueError(f"name must not be an attribute of nn.ModuleDict, got {name!r}")
