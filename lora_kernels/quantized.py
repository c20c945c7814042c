"""Quantised weights as operands: bitsandbytes' NF4, with scales of float32 or of 8 bits, int8 rows, and blocks of fp8.

bitsandbytes is never imported: the attributes of its parameters are read, in every call, so that what it moves, loads or
quantises again is seen. The forward and the backward use one dense weight, rounded once to the dtype that the product runs
in. bitsandbytes' own backward of NF4 rounds to the dtype of the unquantised weight in between.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels.operands import DTYPES, QuantizedWeight

BLOCK = 64  # elements of W that share a scale
BLOCK2 = 256  # scales that share one, where the scales are quantised too


class NotFrozen(ValueError):
    """A gradient is asked of a quantised weight, which has none."""


class _Stored:
    """A weight over a matrix that is stored row after row; `t` is a flag, and nothing is moved."""

    transposed: bool

    @property
    def _stored(self) -> tuple[int, int]:
        """Rows and columns of the matrix that is stored."""
        return tuple(self.codes.shape)  # type: ignore[attr-defined]

    @property
    def shape(self) -> tuple[int, int]:
        N, K = self._stored
        return (K, N) if self.transposed else (N, K)

    def t(self) -> Any:
        # A copy, since making it anew would check every tensor again.
        other = copy.copy(self)
        object.__setattr__(other, "transposed", not self.transposed)
        return other

    def _turned(self, stored: Tensor) -> Tensor:
        """The matrix that is stored as `shape` has it."""
        return stored.t() if self.transposed else stored


@dataclass(frozen=True, eq=False)
class NF4Weight(_Stored, QuantizedWeight):
    """A matrix W [N, K] of 4-bit codes, row after row, in the layout of bitsandbytes.

    Element e of the flattened W has its code in byte e // 2 of `packed`, an even e in the high four bits. W is
    `code[code of e]` times the scale of block e // `block`, a float32 product that is rounded to `dtype`. The scales are
    `absmax` in float32; or, with `code2`, `absmax2` and `offset`, block i's is `code2[absmax[i]]` times
    `absmax2[i // 256]`, rounded to float32, plus `offset`. Blocks may straddle rows; the last one may be a part of one. See
    Dettmers et al., "QLoRA: efficient finetuning of quantized LLMs", NeurIPS 2023, for the codes.

    TypeError or ValueError names the argument, its value and the rule.

    >>> weight = NF4Weight(torch.zeros(3, dtype=torch.uint8), torch.ones(1), torch.linspace(-1, 1, 16), N=2, K=3)
    >>> weight.dense()
    tensor([[-1., -1., -1.],
            [-1., -1., -1.]])
    """

    packed: Tensor  # uint8 [ceil(N·K / 2)]
    absmax: Tensor  # [ceil(N·K / block)] float32, or uint8 beside code2
    code: Tensor  # [16] float32
    code2: Tensor | None = None  # [256] float32
    absmax2: Tensor | None = None  # [ceil(absmax / 256)] float32
    offset: Tensor | None = None  # one float32
    N: int = 0
    K: int = 0
    block: int = BLOCK
    dtype: torch.dtype = torch.float32
    transposed: bool = False

    format = "nf4"

    def __post_init__(self) -> None:
        _check_dtype(self.dtype)
        if self.block != BLOCK:
            raise ValueError(f"block must be {BLOCK}, got {self.block}")
        elements = self.N * self.K
        blocks = -(-elements // BLOCK)
        double = self.code2 is not None
        if double != (self.absmax2 is not None) or double != (self.offset is not None):
            raise ValueError("code2, absmax2 and offset must be given together or not at all")
        what = f"for a weight [{self.N}, {self.K}]"
        _check("packed", self.packed, torch.uint8, (elements + 1) // 2, what)
        _check("absmax", self.absmax, torch.uint8 if double else torch.float32, blocks, what)
        _check("code", self.code, torch.float32, 16, what)
        if double:
            _check("code2", self.code2, torch.float32, 256, what)
            _check("absmax2", self.absmax2, torch.float32, -(-blocks // BLOCK2), what)
            _check("offset", self.offset, torch.float32, 1, what)

    @property
    def _stored(self) -> tuple[int, int]:
        return self.N, self.K

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        if self.code2 is None or self.absmax2 is None or self.offset is None:
            return self.packed, self.absmax, self.code
        return self.packed, self.absmax, self.code, self.code2, self.absmax2, self.offset

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.N, self.K, int(self.transposed)

    @classmethod
    def restored(
        cls, tensors: Sequence[Tensor], sizes: Sequence[int], dtype: torch.dtype
    ) -> NF4Weight:
        N, K, transposed = sizes
        packed, absmax, code, *second = tensors
        code2, absmax2, offset = second or (None, None, None)
        more = {"dtype": dtype, "transposed": bool(transposed)}
        return cls(packed, absmax, code, code2, absmax2, offset, N, K, **more)  # type: ignore[arg-type]

    def scales(self) -> Tensor:
        """The scale of each block, float32."""
        if self.code2 is None or self.absmax2 is None or self.offset is None:
            return self.absmax
        each = self.absmax2.repeat_interleave(BLOCK2)[: self.absmax.numel()]
        return self.code2[self.absmax.int()] * each + self.offset

    def dense(self) -> Tensor:
        # Both elements of a byte are looked up at once.
        pairs = torch.stack((self.code.repeat_interleave(16), self.code.repeat(16)), 1)
        values = F.embedding(self.packed.int(), pairs).flatten()
        elements, scales = self.N * self.K, self.scales()
        missing = scales.numel() * self.block - values.numel()
        if missing:  # of the last block
            values = F.pad(values, (0, missing))
        scaled = values.view(-1, self.block).mul_(scales[:, None])
        weight = scaled.to(self.dtype).view(-1)[:elements].view(self.N, self.K)
        return self._turned(weight)


@dataclass(frozen=True, eq=False)
class Int8Weight(_Stored, QuantizedWeight):
    """A matrix W [N, K] of int8 codes with a float32 scale for each row: W = codes · (absmax / 127), rounded to `dtype`."""

    codes: Tensor  # int8 [N, K]
    absmax: Tensor  # [N] float32
    dtype: torch.dtype = torch.float32
    transposed: bool = False

    format = "int8"

    def __post_init__(self) -> None:
        _check_dtype(self.dtype)
        codes = self.codes
        if codes.ndim != 2:
            raise ValueError(f"codes must be [N, K], got {list(codes.shape)}")
        what = f"for codes {list(codes.shape)}"
        _check("codes", codes, torch.int8, codes.numel(), what)
        _check("absmax", self.absmax, torch.float32, codes.shape[0], what)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.codes, self.absmax

    @property
    def sizes(self) -> tuple[int, ...]:
        return (int(self.transposed),)

    @classmethod
    def restored(
        cls, tensors: Sequence[Tensor], sizes: Sequence[int], dtype: torch.dtype
    ) -> Int8Weight:
        codes, absmax = tensors
        return cls(codes, absmax, dtype, bool(sizes[0]))

    def dense(self) -> Tensor:
        # Multiplied by the reciprocal, as bitsandbytes does: the same bits.
        weight = (self.codes.float() * (self.absmax * (1.0 / 127.0))[:, None]).to(self.dtype)
        return self._turned(weight)


@dataclass(frozen=True, eq=False)
class FP8Weight(_Stored, QuantizedWeight):
    """A matrix W [N, K] of float8_e4m3fn codes, a float32 scale for each block of rows and columns.

    W[n, k] = codes[n, k] · scales[n // block[0], k // block[1]], a float32 product that is rounded to `dtype`; the last
    block of a row or column may be a part of one. One scale for all of W is a block of [N, K].
    """

    codes: Tensor  # float8_e4m3fn [N, K]
    scales: Tensor  # float32 [ceil(N / block[0]), ceil(K / block[1])]
    block: tuple[int, int]
    dtype: torch.dtype = torch.float32
    transposed: bool = False

    format = "fp8"

    def __post_init__(self) -> None:
        _check_dtype(self.dtype)
        codes = self.codes
        if codes.ndim != 2:
            raise ValueError(f"codes must be [N, K], got {list(codes.shape)}")
        if min(self.block) < 1:
            raise ValueError(f"block must be two positive sizes, got {list(self.block)}")
        what = f"for codes {list(codes.shape)} in blocks of {list(self.block)}"
        _check("codes", codes, torch.float8_e4m3fn, codes.numel(), what)
        _check("scales", self.scales, torch.float32, math.prod(self._blocks), what)
        if self.scales.shape != self._blocks:
            raise ValueError(
                f"scales must be {list(self._blocks)} {what}, got {list(self.scales.shape)}"
            )

    @property
    def _blocks(self) -> tuple[int, int]:
        """How many blocks W has along rows and columns."""
        N, K = self.codes.shape
        return -(-N // self.block[0]), -(-K // self.block[1])

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.codes, self.scales

    @property
    def sizes(self) -> tuple[int, ...]:
        return *self.block, int(self.transposed)

    @classmethod
    def restored(
        cls, tensors: Sequence[Tensor], sizes: Sequence[int], dtype: torch.dtype
    ) -> FP8Weight:
        codes, scales = tensors
        rows, columns, transposed = sizes
        return cls(codes, scales, (rows, columns), dtype, bool(transposed))

    def dense(self) -> Tensor:
        N, K = self.codes.shape
        rows, columns = self.block
        scales = self.scales.repeat_interleave(rows, 0)[:N]  # [N, blocks]
        full, values = K // columns, self.codes.float()
        # Along columns by a view: repeated, the scales would be a second matrix of W's size.
        whole = values[:, : full * columns].unflatten(1, (full, columns))
        whole.mul_(scales[:, :full, None])
        values[:, full * columns :].mul_(scales[:, full:])
        return self._turned(values.to(self.dtype))


def from_fp8_linear(linear: Any, dtype: torch.dtype | None = None) -> QuantizedWeight:
    """The FP8Weight of Transformers' FP8Linear, over the same memory; no copy is made of its codes.

    `dtype`: of x; float32 by default. ValueError or TypeError names what cannot be read, and why.
    """
    weight, scales = linear.weight, linear.weight_scale_inv
    _check_frozen(weight)
    if linear.block_size is None:
        block, scales = tuple(weight.shape), scales.view(1, 1)
    else:
        block = tuple(linear.block_size)
    with torch._C.DisableTorchFunctionSubclass():
        codes = weight.view(weight.dtype)  # a plain Tensor
    # Scales that are powers of two may be stored as their exponents, in a byte; float32 holds each of them.
    return FP8Weight(codes, scales.detach().float(), block, dtype or torch.float32)  # type: ignore[arg-type]


def from_bitsandbytes(
    weight: Any, dtype: torch.dtype | None = None, state: Any = None
) -> QuantizedWeight:
    """The NF4Weight of a `Params4bit`, or the Int8Weight of an `Int8Params`, over the same memory; no copy is made.

    `state`: the quant_state of a Linear4bit, or the state of a Linear8bitLt, read where the parameter itself has lost it.
    `dtype`: of x; by default a 4-bit weight has the dtype that it had before it was quantised, an 8-bit one float32.
    ValueError names what cannot be read, and why; TypeError for a tensor that bitsandbytes did not quantise.
    """
    if hasattr(weight, "SCB") or hasattr(state, "SCB"):
        return _int8(weight, state, dtype or torch.float32)
    quantised = getattr(weight, "quant_state", None)
    if quantised is None:
        quantised = state
    _check_kind(weight if quantised is None else quantised)
    if quantised is None:
        raise TypeError(
            "weight must be a parameter that bitsandbytes has quantised (a Linear4bit is quantised"
            f" when it is moved to a device), got a {type(weight).__name__} without quant_state"
        )
    if getattr(quantised, "packing_format_for_cpu", False):
        raise ValueError(
            "weight must be packed row after row, got packing_format_for_cpu: bitsandbytes"
            " reordered it in an eval() forward of its own. The state_dict() of the Linear4bit"
            " puts it back"
        )
    _check_frozen(weight)
    if len(quantised.shape) != 2:
        raise ValueError(f"weight.quant_state.shape must be [N, K], got {list(quantised.shape)}")
    N, K = quantised.shape
    second = quantised.state2
    if second is not None and second.blocksize != BLOCK2:
        raise ValueError(
            f"weight.quant_state.state2.blocksize must be {BLOCK2}, got {second.blocksize}"
        )
    with torch._C.DisableTorchFunctionSubclass():
        # A plain Tensor; compilers cannot trace as_subclass.
        packed = weight.view(torch.uint8).view(-1)
    code2 = absmax2 = offset = None
    if second is not None:
        code2, absmax2, offset = second.code, second.absmax, quantised.offset
    absmax, code, dtype = quantised.absmax, quantised.code, dtype or quantised.dtype
    return NF4Weight(packed, absmax, code, code2, absmax2, offset, N, K, BLOCK, dtype)


def _int8(weight: Any, state: Any, dtype: torch.dtype) -> Int8Weight:
    """The Int8Weight of an Int8Params; after a first forward its scales are in the layer's state."""
    if getattr(weight, "has_fp16_weights", False):
        raise ValueError(
            "weight must have has_fp16_weights=False: it is not quantised but has values of"
            f" {weight.dtype}, which bitsandbytes quantises in each forward, got True"
        )
    scales = getattr(weight, "SCB", None)
    if scales is None:
        scales = getattr(state, "SCB", None)
    if scales is None or weight.dtype != torch.int8:
        raise TypeError(
            "weight must be quantised, int8 with a tensor SCB (a Linear8bitLt is quantised when it"
            f" is moved to a device), got {weight.dtype} and SCB"
            f" {None if scales is None else 'a tensor'}"
        )
    _check_frozen(weight)
    # An operator's result is a plain tensor, which a Parameter's subclass is not.
    return Int8Weight(weight.view(torch.int8), scales, dtype)


def _check_kind(planned: Any) -> None:
    """ValueError unless this is NF4 in blocks of 64: a quant_state, or a parameter that is quantised later."""
    kind, block = getattr(planned, "quant_type", "nf4"), getattr(planned, "blocksize", BLOCK)
    if kind != "nf4":
        raise ValueError(f"weight must have quant_type 'nf4', got {kind!r}: it has no decoder")
    if block != BLOCK:
        raise ValueError(f"weight must have blocksize {BLOCK}, got {block}: it has no decoder")


def _check_frozen(weight: Any) -> None:
    """NotFrozen where a gradient is asked of a quantised parameter; one of an integer dtype cannot require it."""
    if weight.requires_grad:
        raise NotFrozen(
            "weight must not require grad: a quantised weight has no gradient, got one that does;"
            " freeze_base(model) freezes every weight that is not an adapter's"
        )


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise TypeError(f"dtype must be float32, bfloat16, float16 or float64, got {dtype}")


def _check(name: str, t: Any, dtype: torch.dtype, numel: int, what: str) -> None:
    """TypeError or ValueError unless t is a tensor of this dtype and number of elements."""
    if t is None:
        raise ValueError(f"{name} must be a tensor {what}, got None")
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(t).__name__}")
    if t.dtype != dtype:
        raise TypeError(f"{name} must be {dtype} {what}, got {t.dtype}")
    if t.numel() != numel:
        raise ValueError(f"{name} must have {numel} elements {what}, got {t.numel()}")
