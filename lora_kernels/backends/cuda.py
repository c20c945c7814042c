"""The backend of CUDA C++ kernels: batches of at most 32 rows, where launches and one reading of W are all that counts."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import torch
from torch import Tensor

from lora_kernels.backends.base import Backend, Scale, left_is_wide
from lora_kernels.backends.device import current_target
from lora_kernels.dropout import Dropout
from lora_kernels.once import once
from lora_kernels.problem import Problem
from lora_kernels.tuning.config import (
    CUDA_DECODE_COLUMNS,
    CUDA_DECODE_ROWS,
    cuda_decode_blocks,
    cuda_decode_fuses,
)
from lora_kernels.tuning.cost import predict_us
from lora_kernels.tuning.select import TRITON, select

LIBRARY = Path(__file__).resolve().parent.parent / "_cuda.so"
WARPS = 4
_HALF = (torch.float16, torch.bfloat16)
_arrived: dict[
    tuple[int, int], Tensor
] = {}  # by (device, stream): counters that every launch leaves at zero


class CudaBackend(Backend):
    """Streams W once with 16-byte loads; float32 products are exact, half ones use tensor cores. Forward and backward."""

    name = "cuda"

    def unavailable(self) -> str | None:
        if torch.version.cuda is None:
            return "this PyTorch was built without CUDA"
        if not LIBRARY.exists():
            return "its extension is not built (install where nvcc is, or see LORA_KERNELS_BUILD)"
        return _load()

    def declines(self, problem: Problem) -> str | None:
        if problem.M > CUDA_DECODE_ROWS:
            return f"it takes at most {CUDA_DECODE_ROWS} rows, got {problem.M}"
        if problem.dtype == "float64":
            return "float64 is computed by ATen"
        if problem.dropout:
            return "it has no dropout"
        if problem.adapter_dtype not in (problem.dtype, "float32"):
            return f"{problem.adapter_dtype} adapters need a base of their own type"
        try:
            current_target()
        except ValueError as error:
            return str(error)
        return None

    def slower(self, problem: Problem, usable: tuple[str, ...] = ()) -> str | None:
        others = (*TRITON, "aten") if "triton" in usable else ("aten",)
        choice = select(problem, current_target(), among=("cuda_decode", *others))
        return None if choice.algorithm == "cuda_decode" else choice.over("cuda_decode")

    def plan(self, problem: Problem) -> str:
        target = current_target()
        choice = select(problem, target, among=("cuda_decode", *TRITON, "aten"))
        return (
            f"one pass over W, {choice.told()}; "
            f"predicted for the frozen layer on {target.chip}: {predict_us('frozen', problem, target):.1f} us"
        )

    def shrink(self, x: Tensor, a: Tensor, alpha: Scale, dropout: Dropout | None = None) -> Tensor:
        s = x.new_empty((x.shape[0], a.shape[1]), dtype=torch.float32)
        if s.numel():
            _decode(x, a, a, a, alpha, None, s, s, fused_rank=0, skinny=True)
        return s

    def expand(
        self,
        x: Tensor,
        w: Tensor,
        a: Tensor,
        b: Tensor,
        alpha: Scale,
        bias: Tensor | None = None,
        *,
        s: Tensor | None = None,
        dropout_in: Dropout | None = None,
        dropout_out: Dropout | None = None,
    ) -> tuple[Tensor, Tensor]:
        (M, _K), N, R = x.shape, w.shape[1], b.shape[0]
        y = x.new_empty((M, N))
        fuses = (
            s is None
            and R > 0
            and cuda_decode_fuses(R, a.dtype == x.dtype in _HALF, _k_major(w))
            and y.numel() > 0
        )
        if s is None and not fuses:
            s = self.shrink(x, a, alpha)
        results = x.new_empty((M, R), dtype=torch.float32) if s is None else s.contiguous()
        if y.numel():
            bias = None if bias is None else bias.contiguous()
            _decode(x, w, a, b, alpha, bias, y, results, fused_rank=R if fuses else 0, skinny=False)
        return y, results if s is None else s

    def wgrad(
        self, left: Tensor, right: Tensor, dtype: torch.dtype, dropout: Dropout | None = None
    ) -> Tensor:
        out = left.new_zeros((left.shape[1], right.shape[1]), dtype=dtype)
        if out.numel() and left.shape[0]:
            wide_first = left_is_wide(left, right)
            if wide_first:
                right = right.contiguous()
            else:
                left = left.contiguous()
            torch.ops.lora_kernels_cuda.wgrad(left, right, out, wide_first)
        return out


def _decode(
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    alpha: Scale,
    bias: Tensor | None,
    y: Tensor,
    s: Tensor,
    *,
    fused_rank: int,
    skinny: bool,
) -> None:
    """One launch: the operator's own arguments, with columns and K divided among blocks."""
    x = x if x.stride(1) == 1 else x.contiguous()
    w, a = _with_unit_stride(w), _with_unit_stride(a)
    multiprocessors = _multiprocessors(x.device.index or 0)
    rows, ranks = rows_per_tile(w.dtype), -(-fused_rank // 16) * 16
    tiles = math.ceil(w.shape[1] / rows)
    blocks = cuda_decode_blocks(tiles, multiprocessors) if fused_rank else tiles
    splits, chunk = split_of(blocks, x.shape[1], w.dtype, multiprocessors)
    parts = tiles * splits * x.shape[0] * (rows + ranks) if splits > 1 else 0
    at_run_time = alpha if isinstance(alpha, Tensor) and alpha.is_cuda else None
    torch.ops.lora_kernels_cuda.decode(
        x,
        w,
        a,
        b,
        bias,
        y,
        s,
        x.new_empty(parts, dtype=torch.float32),
        _counters(x.device, tiles if splits > 1 else 1),
        None if at_run_time is None else at_run_time.float(),
        0.0 if at_run_time is not None else float(alpha),
        fused_rank,
        blocks,
        splits,
        chunk,
        skinny,
    )


def rows_per_tile(dtype: torch.dtype) -> int:
    """Columns of w that one block takes."""
    return 32 if dtype == torch.float32 else CUDA_DECODE_COLUMNS


def split_of(blocks: int, K: int, dtype: torch.dtype, multiprocessors: int) -> tuple[int, int]:
    """(splits, chunk): parts of K such that there are about two blocks for each multiprocessor, each of a few steps."""
    step = 16 if dtype == torch.float32 else 32
    wanted = max(1, min(2 * multiprocessors // blocks, K // (2 * WARPS * step), 64))
    chunk = max(step, math.ceil(math.ceil(K / wanted) / step) * step)
    return max(1, math.ceil(K / chunk)), chunk


def _k_major(w: Tensor) -> bool:
    return w.stride(0) == 1 or w.shape[0] == 1


def _with_unit_stride(t: Tensor) -> Tensor:
    return t if 1 in t.stride() or 1 in t.shape else t.contiguous()


def _counters(device: torch.device, tiles: int) -> Tensor:
    """Zeroed int32 counters of this device and stream, made once; within a graph's capture they belong to the graph."""
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(tiles, dtype=torch.int32, device=device)
    key = (device.index or 0, torch.cuda.current_stream(device).cuda_stream)
    known = _arrived.get(key)
    if known is None or known.numel() < tiles:
        known = _arrived[key] = torch.zeros(max(1024, tiles), dtype=torch.int32, device=device)
    return known


@once
def _load() -> str | None:
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"its extension does not load: {error}"
    return None


@functools.lru_cache(maxsize=64)
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


BACKEND = CudaBackend()
