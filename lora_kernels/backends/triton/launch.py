"""What every launcher needs from the host: the launch itself, precisions, block sizes and the kernel's view of scalars."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.backends.triton import relaunch
from lora_kernels.dropout import Dropout, threshold
from lora_kernels.operands import HALF, Scale
from lora_kernels.tuning.config import TileConfig

# Of a thread of a product in tensor memory: half of a multiprocessor's, for what runs beside it. Its warps that store get
# what those that copy and multiply leave.
TMEM_REGISTERS = 128


def launch(
    kernel: Any,
    programs: int,
    config: TileConfig,
    device: torch.device,
    *args: Any,
    dependent: bool = False,
    contract: bool = True,
    **named: Any,
) -> None:
    """Run `programs` instances of `kernel` on `device`. All kernels of this package are launched here.

    `dependent`: the kernel may start before the one launched just before it has finished, and waits for it by itself.
    `contract`: a product and the sum that it goes into may be rounded once. `named`: the kernel's constants.
    """
    if dependent:
        named["launch_pdl"] = True
    if config.ctas:
        named["maxnreg"] = TMEM_REGISTERS
    if config.ctas > 1:
        named["num_ctas"] = config.ctas
    named["num_warps"] = config.num_warps
    named["num_stages"] = config.num_stages
    named["enable_fp_fusion"] = contract
    if device.type != "cuda":
        kernel[(programs,)](*args, **named)
    elif device.index == torch.cuda.current_device():
        # To enter it again takes two calls of the driver.
        relaunch.run(kernel, programs, device.index, args, named)
    else:
        with torch.cuda.device(device):
            relaunch.run(kernel, programs, device.index, args, named)


class Mask(NamedTuple):
    """A dropout as kernels take it: arguments that are never read where there is none."""

    seed_ptr: Tensor | None
    threshold: int  # the bits of a uint32 in an int32, so that the argument's type never changes
    keep_scale: float

    @classmethod
    def of(cls, dropout: Dropout | None) -> Mask:
        if dropout is None:
            return _NO_MASK
        limit = threshold(dropout.p)
        return cls(
            dropout.seed, limit - 2**32 if limit >= 2**31 else limit, 1.0 / (1.0 - dropout.p)
        )


_NO_MASK = Mask(None, 0, 1.0)


class Rows(NamedTuple):
    """The rows of a launch as kernels take them: all as one, or sorted into groups, which the host does not look at.

    A group of no rows takes no block, so `blocks` is the most that M rows in these groups can take.
    """

    blocks: int
    offsets: Tensor | None
    groups: int

    @classmethod
    def of(cls, M: int, block_m: int, offsets: Tensor | None) -> Rows:
        if offsets is None:
            return cls(cdiv(M, block_m), None, 0)
        groups = offsets.shape[0] - 1
        most = min(groups, M)  # that have a row
        return cls(most + (M - most) // block_m, offsets.contiguous(), groups)


def group_block(offsets: Tensor | None) -> int:
    """How many groups a kernel looks at together: a power of two, so that few numbers of groups compile anew."""
    if offsets is None:
        return 1
    return min(max(32, 1 << (offsets.shape[0] - 2).bit_length()), 1024)


def strides(operand: Tensor, dims: int = 2) -> tuple[int, ...]:
    """The strides of an operand of `dims` dimensions, the first to the next group's operand: zero where all share one."""
    return (*((0,) if operand.ndim == dims else ()), *operand.stride())


def scale_argument(alpha: Scale) -> tuple[float | Tensor, bool]:
    """(alpha as a kernel argument, whether it is a pointer): a tensor on a GPU is read there, without a synchronisation.

    So is one of each group's alphas.
    """
    if isinstance(alpha, Tensor) and (alpha.is_cuda or alpha.ndim):
        return alpha, True
    return float(alpha), False


def cdiv(a: int, b: int) -> int:
    """ceil(a / b)."""
    return -(-a // b)


def rank_operand(M: int, R: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An unwritten [M, R] for s in a half type, whose rows tensor copies can fetch."""
    return torch.empty((M, cdiv(R, 16) * 16), dtype=dtype, device=device)[:, :R]


def needs_int64(*operands: Tensor | None) -> bool:
    """Whether some element lies 2³¹ or more elements behind its matrix's first, so that a 32-bit offset would wrap.

    To a matrix of a stack kernels go by a 64-bit offset.
    """
    for t in operands:
        # Asked in every launch. A contiguous operand, as an empty one is, ends `numel` behind its start: no sum is needed.
        if t is None or (t.is_contiguous() and t.numel() <= 2**31):
            continue
        *_, rows, columns = 1, *t.shape
        *_, down, along = 0, *t.stride()
        if (rows - 1) * down + (columns - 1) * along >= 2**31:
            return True
    return False


def base_precision(dtype: torch.dtype) -> str:
    """`input_precision` of a product of two operands in `dtype`: float32 is exact unless the user allowed TF32."""
    if dtype in HALF or torch.version.hip or not _allows_tf32():
        return "ieee"
    return "tf32"


def mixed_precision(wide: torch.dtype, result: torch.dtype) -> str:
    """`input_precision` of a float32 operand times one that was `wide`, for a `result` rounded to that type.

    A bfloat16 or float16 number is a TF32 number, so only the float32 operand is rounded: to 11 bits, finer than a half
    result, or for a float32 result to 22 bits in three passes. AMD's matrix units take float32 as it is.
    """
    if wide not in HALF:
        return base_precision(wide)
    if torch.version.hip:
        return "ieee"
    return "tf32" if result in HALF else "tf32x3"


def rank_tail(x: torch.dtype, b: torch.dtype, tma: bool, masked: bool = False) -> str:
    """How a product whose x has this type multiplies s by b, as `tiles.rank_product` names it.

    "rounded" to bfloat16, where both operands have that type: one more step of the sum, with an s as eager rounds it.
    "split" beside a half x: s and b each as two bfloat16 numbers, which have float32's range and 16 bits together. TF32 has
    11: too few for a float32 b. For a float16 b they suffice, but where matrix instructions read shared memory (`tma`) it
    would have to be sorted there first; and beside a mask of the result two parts have no registers where they do not.
    A float32 x has its own `input_precision`.
    """
    if x == b == torch.bfloat16:
        return "rounded"
    if x in HALF and (tma or (b not in HALF and not masked)):
        return "split"
    return mixed_precision(x, x)


def lowrank_form(wide: torch.dtype, result: torch.dtype) -> str:
    """How the sums over rows of a wide operand times s or q take the latter, as `tiles.lowrank_product` names it.

    "rounded" to bfloat16, as eager rounds it, where both types are; "parts", three bfloat16 numbers which hold all of a
    float32's bits, for a float32 result beside a bfloat16 operand. Others have an `input_precision`.
    """
    if wide == torch.bfloat16 and result in (torch.bfloat16, torch.float32):
        return "rounded" if result == torch.bfloat16 else "parts"
    return mixed_precision(wide, result)


def shrink_form(x: torch.dtype, a: torch.dtype) -> str:
    """How `shrink` takes a of x·a, whose result stays float32: "parts" as in `lowrank_form`, or an `input_precision`."""
    return "parts" if (x, a) == (torch.bfloat16, torch.float32) else shrink_precision(x, a)


def shrink_precision(x: torch.dtype, a: torch.dtype) -> str:
    """`input_precision` of x·a, whose result stays float32."""
    return base_precision(x) if a == x else mixed_precision(x, a)


def _allows_tf32() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"
