"""The 4-bit NF4 weight of bitsandbytes as an operand: plain tensors, read by attribute and decoded by plain PyTorch.

The format, for a matrix [N, K] of n = N·K elements in row-major order: element e is code[nibble e]·scale[e // 64], a
product in float32 that is rounded once to the dtype; an even e is the high nibble of byte e // 2. So blocks of 64 may
straddle rows, and the last may be partial. Scales are float32, or doubly quantised: scale[b] =
code2[absmax[b]]·absmax2[b // 256] + offset, product and sum rounded one after the other. The format is that of
Dettmers et al., "QLoRA: efficient finetuning of quantized LLMs", NeurIPS 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels.operands import QuantizedWeight

BLOCK, BLOCK2 = 64, 256  # elements that share a scale; scales that share one of their own


@dataclass(frozen=True, eq=False)
class NF4Weight(QuantizedWeight):
    """A frozen weight [N, K] of 4-bit codes with a scale for each 64 elements, as bitsandbytes stores it.

    `packed` has any dtype: its bytes hold two codes each. `absmax` are the blocks' scales, or, where `code2`, `absmax2`
    and `offset` are given, their 8-bit codes. `dtype` is that of `dense()`. ValueError or TypeError names the argument,
    its value and the rule.

    >>> weight = NF4Weight(torch.zeros(3, dtype=torch.uint8), torch.ones(1), torch.linspace(-1, 1, 16), N=2, K=3)
    >>> weight.dense()
    tensor([[-1., -1., -1.],
            [-1., -1., -1.]])
    """

    packed: Tensor
    absmax: Tensor
    code: Tensor
    code2: Tensor | None = None
    absmax2: Tensor | None = None
    offset: Tensor | None = None
    N: int = 0
    K: int = 0
    block: int = BLOCK
    dtype: torch.dtype = torch.float32
    transposed: bool = False

    format = "nf4"

    def __post_init__(self) -> None:
        if self.block != BLOCK:
            raise ValueError(f"block must be {BLOCK}, got {self.block}")
        elements = self.N * self.K
        blocks = -(-elements // BLOCK)
        if not isinstance(self.packed, Tensor):
            raise TypeError(f"packed must be a Tensor, got {type(self.packed).__name__}")
        got, needed = self.packed.numel() * self.packed.itemsize, (elements + 1) // 2
        if not needed <= got < needed + self.packed.itemsize:
            raise ValueError(
                f"packed must have {needed} bytes, two elements of [{self.N}, {self.K}] in each, got {got}"
            )
        doubly = self.code2 is not None
        if doubly != (self.absmax2 is not None) or doubly != (self.offset is not None):
            raise ValueError("code2, absmax2 and offset must be given together or not at all")
        _check_part("absmax", self.absmax, blocks, torch.uint8 if doubly else torch.float32)
        _check_part("code", self.code, 16, torch.float32)
        if doubly:
            _check_part("code2", self.code2, 256, torch.float32)
            _check_part("absmax2", self.absmax2, -(-blocks // BLOCK2), torch.float32)
            _check_part("offset", self.offset, 1, torch.float32)

    @classmethod
    def restored(
        cls, tensors: Sequence[Tensor], sizes: Sequence[int], dtype: torch.dtype
    ) -> NF4Weight:
        N, K, transposed = sizes
        packed, absmax, code, *second = tensors
        code2, absmax2, offset = second or (None, None, None)
        parts = packed, absmax, code, code2, absmax2, offset
        return cls(*parts, N, K, dtype=dtype, transposed=bool(transposed))

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.N, self.K, int(self.transposed)

    @property
    def shape(self) -> tuple[int, int]:
        return (self.K, self.N) if self.transposed else (self.N, self.K)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        if self.code2 is None or self.absmax2 is None or self.offset is None:
            return self.packed, self.absmax, self.code
        return self.packed, self.absmax, self.code, self.code2, self.absmax2, self.offset

    def t(self) -> NF4Weight:
        return replace(self, transposed=not self.transposed)

    def scales(self) -> Tensor:
        """The scale of each block, float32."""
        if self.code2 is None or self.absmax2 is None or self.offset is None:
            return self.absmax.flatten()
        ranges = self.absmax2.flatten().repeat_interleave(BLOCK2)[: self.absmax.numel()]
        return self.code2[self.absmax.flatten().int()] * ranges + self.offset.flatten()

    def dense(self) -> Tensor:
        elements = self.N * self.K
        pairs = torch.stack((self.code.repeat_interleave(16), self.code.repeat(16)), 1)
        packed = self.packed.contiguous().flatten().view(torch.uint8)[: (elements + 1) // 2]
        values = F.embedding(packed.int(), pairs).flatten()
        padded = F.pad(values, (0, -elements % BLOCK)) if elements % BLOCK else values
        padded = padded[: -(-elements // BLOCK) * BLOCK].view(-1, BLOCK) * self.scales()[:, None]
        weight = padded.flatten()[:elements].view(self.N, self.K).to(self.dtype)
        return weight.t() if self.transposed else weight


def _check_part(name: str, t: Any, size: int, dtype: torch.dtype) -> None:
    """TypeError or ValueError unless t is a tensor of `dtype` with `size` elements."""
    if t is None:
        raise ValueError(f"{name} must be a tensor of {size} elements, got None")
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(t).__name__}")
    if t.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {t.dtype}")
    if t.numel() != size:
        raise ValueError(f"{name} must have {size} elements, got {t.numel()}")


def from_bitsandbytes(
    weight: Any, dtype: torch.dtype | None = None, state: Any = None
) -> NF4Weight:
    """The `NF4Weight` over the tensors of a quantised bitsandbytes `Params4bit`, which is read, never changed.

    `dtype`: that of `dense()`, by default the one that the weight had before it was quantised. `state`: the quant_state
    of its Linear4bit, read where the parameter has lost its own, as after pickle. TypeError or ValueError
    for another type, fp4, another block size, a weight that is not quantised yet and one that bitsandbytes has repacked.

    >>> import bitsandbytes  # doctest: +SKIP
    >>> layer = bitsandbytes.nn.Linear4bit(64, 32, quant_type="nf4").to("cpu")  # doctest: +SKIP
    >>> from_bitsandbytes(layer.weight).dense().shape  # doctest: +SKIP
    torch.Size([32, 64])
    """
    reason = why_declined(weight, state)
    if reason is not None:
        raise (ValueError if _is_params4bit(weight) else TypeError)(f"weight {reason}")
    state = _state_of(weight, state)
    second = state.state2
    N, K = state.shape
    with torch._C.DisableTorchFunctionSubclass():
        packed = weight.view(weight.shape)  # a plain Tensor; compilers cannot trace as_subclass
    return NF4Weight(
        packed,
        state.absmax,
        state.code,
        None if second is None else second.code,
        None if second is None else second.absmax,
        None if second is None else state.offset,
        N=N,
        K=K,
        dtype=dtype or state.dtype,
    )


def why_declined(weight: Any, state: Any = None) -> str | None:
    """None if this parameter of bitsandbytes is NF4 as `NF4Weight` reads it, else the rule that it breaks."""
    if not _is_params4bit(weight) and (state is None or not isinstance(weight, Tensor)):
        kind = type(weight)
        return f"must be a Params4bit of bitsandbytes, got {kind.__module__}.{kind.__qualname__}"
    state = _state_of(weight, state)
    if state is None:
        return "must be quantised before it is used, got one without a quant_state: move its layer to its device"
    if state.quant_type != "nf4":
        return f"must have quant_type 'nf4', got {state.quant_type!r}"
    if state.blocksize != BLOCK:
        return f"must have blocksize {BLOCK}, got {state.blocksize}"
    if getattr(state, "packing_format_for_cpu", False):
        return (
            "must be packed as it was quantised, got one that bitsandbytes has repacked for inference on"
            " a CPU: taking its layer's state_dict() undoes that"
        )
    if len(state.shape) != 2:
        return f"must be a matrix, got shape {list(state.shape)}"
    if state.state2 is not None and state.state2.blocksize != BLOCK2:
        return f"must have scales in blocks of {BLOCK2}, got {state.state2.blocksize}"
    return None


def is_quantized(linear: Any) -> bool:
    """Whether a module is bitsandbytes' Linear4bit, or a subclass with the same forward; by name, lest it be imported."""
    forward = type(linear).forward
    where = getattr(forward, "__module__", ""), getattr(forward, "__qualname__", "")
    return where == ("bitsandbytes.nn.modules", "Linear4bit.forward")


def base_weight(linear: Any, dtype: torch.dtype | None = None) -> NF4Weight:
    """The weight of a Linear4bit as a product in `dtype` reads it; raises what `from_bitsandbytes` raises."""
    return from_bitsandbytes(linear.weight, dtype, linear.quant_state)


def why_unreadable(linear: Any) -> str | None:
    """None if a product can read the weight of this Linear4bit, else why not."""
    return why_declined(linear.weight, linear.quant_state)


def compute_dtype(linear: Any, x: Tensor) -> torch.dtype:
    """The dtype that a Linear4bit casts x, weight and bias to: its compute_dtype, or x's where it has none yet."""
    if linear.compute_type_is_set or x.dtype not in (torch.float32, torch.bfloat16):
        return linear.compute_dtype or x.dtype
    return x.dtype


def is_repacked(linear: Any) -> bool:
    """Whether bitsandbytes repacked a Linear4bit for inference on a CPU, after which it computes no gradient of x."""
    state = _state_of(linear.weight, linear.quant_state)
    return bool(getattr(state, "packing_format_for_cpu", False))


def _state_of(weight: Any, state: Any) -> Any:
    """The quant_state of a parameter, or that of its module where it has none."""
    own = getattr(weight, "quant_state", None)
    return state if own is None else own


def _is_params4bit(weight: Any) -> bool:
    """Whether it is bitsandbytes' 4-bit parameter; by name, lest bitsandbytes be imported."""
    kind = type(weight)
    return kind.__name__ == "Params4bit" and kind.__module__.split(".")[0] == "bitsandbytes"
