"""The operands of a LoRA linear as values: a frozen weight, dense or quantised, and the adapter that is added to it.

Nothing here belongs to a device or a backend. A new weight format is a subclass of `QuantizedWeight`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.dropout import Dropout
from lora_kernels.problem import DENSE, Problem

HALF = (torch.float16, torch.bfloat16)
DTYPES = frozenset({*HALF, torch.float32, torch.float64})  # of x, A and B
# A number, or a tensor on the operands' device or the CPU, read when the product is computed: 0-d, or [G] over groups.
Scale = float | Tensor


class QuantizedWeight(ABC):
    """A frozen weight in a packed format: a matrix of `shape` whose elements are computed from a few plain tensors.

    `format` names the format in problems and explanations. A backend that has a decoder of it lists the name in its
    `formats`; every other backend is given `dense()`. A weight has no gradient.
    """

    format: str

    def __init_subclass__(cls, **named: Any) -> None:
        super().__init_subclass__(**named)
        _FORMATS[cls.format] = cls

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix; [N, K] as nn.Linear stores it, or its transpose after `t`."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype of `dense()`: the one that x must have."""

    @property
    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """The packed tensors, in an order of the format's own: what is saved for the backward."""

    @property
    @abstractmethod
    def sizes(self) -> tuple[int, ...]:
        """Integers that with `tensors` and `dtype` say everything about the weight."""

    @classmethod
    @abstractmethod
    def restored(
        cls, tensors: Sequence[Tensor], sizes: Sequence[int], dtype: torch.dtype
    ) -> QuantizedWeight:
        """The weight that has these `tensors`, `sizes` and `dtype`."""

    @abstractmethod
    def t(self) -> QuantizedWeight:
        """The transposed matrix over the same tensors."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The matrix as a new tensor of `shape` and `dtype`."""

    @property
    def flat(self) -> tuple[list[Tensor], str, list[int]]:
        """(packed, format, sizes), as registered operators take a weight; see `restored`."""
        return list(self.tensors), self.format, list(self.sizes)

    def with_tensors(self, tensors: Sequence[Tensor]) -> QuantizedWeight:
        """The same weight over these tensors, which stand in the order of `tensors`."""
        return self.restored(tensors, self.sizes, self.dtype)

    def to(self, dtype: torch.dtype) -> QuantizedWeight:
        """The same weight with a `dense()` of another dtype, over the same tensors."""
        return self.restored(self.tensors, self.sizes, dtype)

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    @property
    def nbytes(self) -> int:
        """Bytes that the packed tensors take."""
        return sum(t.numel() * t.itemsize for t in self.tensors)


Weight = Tensor | QuantizedWeight
_FORMATS: dict[str, type[QuantizedWeight]] = {}  # by name


def restored(
    format: str, tensors: Sequence[Tensor], sizes: Sequence[int], dtype: torch.dtype
) -> QuantizedWeight:
    """The weight that a registered operator was given as flat arguments. ValueError for an unknown format."""
    if format not in _FORMATS:
        raise ValueError(f"format must be one of {tuple(_FORMATS)}, got {format!r}")
    return _FORMATS[format].restored(tensors, sizes, dtype)


def transposed(weight: Weight) -> Weight:
    """Wᵀ of one weight, of each one of a stack."""
    return weight.mT if isinstance(weight, Tensor) else weight.t()


@dataclass(frozen=True, eq=False)
class Groups:
    """Rows sorted into G groups, each with an adapter of its own: rows offsets[g] up to offsets[g + 1] are group g.

    Over groups A is [G, K, R], B [G, R, N], and the scale a number or [G]. The base's weight and bias are stacks, [G, N, K]
    and [G, N], or one for all rows. The host does not read `offsets` on a device that would wait for it.
    """

    offsets: Tensor  # int32 [G + 1], on the operands' device: 0, then never falling, T last
    own_weight: bool  # whether each group has a weight of its own
    own_bias: bool

    @property
    def count(self) -> int:
        """G."""
        return self.offsets.shape[0] - 1

    @property
    def weights(self) -> int:
        """How many weights there are: G, or one."""
        return self.count if self.own_weight else 1


def bounds_of(offsets: Tensor, rows: int) -> list[int]:
    """The offsets as numbers; ValueError unless they are 0, then never falling, `rows` last."""
    bounds = offsets.tolist()
    if bounds[0] != 0:
        raise ValueError(f"offsets must begin with 0, got {bounds[0]}")
    for g, (begin, end) in enumerate(pairwise(bounds)):
        if end < begin:
            raise ValueError(f"offsets must not fall, got {begin} before {end} at {g}")
    if bounds[-1] != rows:
        raise ValueError(f"offsets must end at T = {rows}, the rows of x, got {bounds[-1]}")
    return bounds


def groups_of(offsets: Tensor | None, weight: Weight, bias: Tensor | None) -> Groups | None:
    """The `Groups` of a call's operands, or None where it has no offsets."""
    if offsets is None:
        return None
    return Groups(offsets, len(weight.shape) == 3, bias is not None and bias.ndim == 2)


class Adapter(NamedTuple):
    """The low-rank branch scale·(mask∘x)·A·B of one layer, or of each group: see `Groups`.

    `dropout_in` masks the branch's input [M, K], `dropout_out` its output [M, N]: an adapter has the first, its transpose
    the second. `column_scale`: the result without its bias is multiplied by it; None without DoRA.
    """

    A: Tensor  # [K, R]
    B: Tensor  # [R, N]
    scale: Scale
    dropout_in: Dropout | None = None
    dropout_out: Dropout | None = None
    column_scale: Tensor | None = None  # [N], in the dtype of sums

    def t(self) -> Adapter:
        """The adapter of dx = dz·Wᵀ + mask∘(scale·dz·Bᵀ·Aᵀ). An A or B that was not saved stays None.

        dz is the gradient of the result before its column scale: that is no part of the transpose.
        """
        A = None if self.A is None else self.A.mT
        B = None if self.B is None else self.B.mT
        return Adapter(B, A, self.scale, self.dropout_out, self.dropout_in)  # type: ignore[arg-type]


def in_memory(operand: Any) -> Any:
    """The operand, or each of a tuple, as kernels may read it: a lazily negated or zero tensor is written out; others stay.

    torch keeps the sign of such a negated tensor, or all of a zero one, beside its memory.
    """
    if isinstance(operand, tuple):
        return operand._make(map(in_memory, operand))  # type: ignore[attr-defined]  # all are named
    if not isinstance(operand, Tensor):
        return operand
    if operand._is_zerotensor():
        return torch.zeros(operand.shape, dtype=operand.dtype, device=operand.device)
    return operand.resolve_neg()


def lies_in_memory(*operands: Any) -> bool:
    """Whether `in_memory` leaves each of these, and each of a tuple, as it is.

    To ask first takes a third of the time of calling it: nearly every operand is as its memory has it.
    """
    for each in operands:
        if isinstance(each, Tensor):
            if each.is_neg() or each._is_zerotensor():
                return False
        elif isinstance(each, tuple) and not lies_in_memory(*each):
            return False
    return True


def accumulated(dtype: torch.dtype) -> torch.dtype:
    """The type that sums of `dtype` run in, and that s and alpha have: float32, or float64 for itself."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def adapters_as_used(A: Tensor, B: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A and B as products over an x of `dtype` read them: float32 ones stay so beside a half x, others get x's dtype."""
    if A.dtype == dtype or (A.dtype == torch.float32 and dtype in HALF):
        return A, B
    return A.to(dtype), B.to(dtype)


def problem_of(
    x: Tensor,
    weight: Weight,
    A: Tensor,
    bias: Tensor | None,
    *,
    dropout: bool,
    dtype: torch.dtype | None = None,
    groups: Groups | None = None,
) -> Problem:
    """The `Problem` of a call on x [..., K], weight [N, K] and A [K, R]; `dtype`: what autocast makes of x and weight."""
    dtype = dtype or x.dtype
    N, K = weight.shape[-2:]
    w_k_major, weight_format = layout_of(weight)
    return Problem(
        M=math.prod(x.shape[:-1]),
        N=N,
        K=K,
        R=A.shape[-1],
        dtype=name_of(dtype),
        adapter_dtype=name_of(A.dtype if A.dtype == torch.float32 and dtype in HALF else dtype),
        device=x.device.type,
        bias=bias is not None,
        dropout=dropout,
        w_k_major=w_k_major,
        weight_format=weight_format,
        groups=0 if groups is None else groups.count,
        weights=1 if groups is None else groups.weights,
    )


def layout_of(weight: Weight) -> tuple[bool, str]:
    """(whether consecutive k of weight [N, K] are adjacent in memory, its format): how a Problem describes a weight."""
    if isinstance(weight, Tensor):
        return weight.stride(-1) == 1, DENSE
    return True, weight.format


def name_of(dtype: torch.dtype) -> str:
    """The name by which a Problem calls a dtype: "float32"."""
    return str(dtype).removeprefix("torch.")
