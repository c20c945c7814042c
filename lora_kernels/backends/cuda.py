"""The backend of CUDA C++ kernels: batches of at most 32 rows, where launches and one reading of W are all that counts."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import torch
from torch import Tensor

from lora_kernels.backends.base import Backend, Candidate, Products, left_is_wide
from lora_kernels.dropout import Dropout
from lora_kernels.once import once
from lora_kernels.operands import HALF, Adapter, Scale, Weight
from lora_kernels.problem import Problem
from lora_kernels.tuning.config import (
    CUDA_DECODE_COLUMNS,
    CUDA_DECODE_ROWS,
    cuda_decode_blocks,
    cuda_decode_fuses,
)
from lora_kernels.tuning.tables import times_of
from lora_kernels.tuning.targets import Target

LIBRARY = Path(__file__).resolve().parent.parent / "_cuda.so"
WARPS = 4
# An H200 took 32 to 36 us for what Triton's decode took 13 for, before loads of a step stood side by side.
_UNTIMED = "it is taken where `tune` has timed it: it took longer than predicted on the first GPU"


class CudaProducts(Products):
    """Products that read W once with 16-byte loads: exact in float32, on tensor cores in half types."""

    reads_memory = True

    def shrink(self, x: Tensor, adapter: Adapter) -> Tensor:
        a = adapter.A
        s = x.new_empty((x.shape[0], a.shape[1]), dtype=torch.float32)
        if s.numel():
            _decode(x, a, a, a, adapter.scale, None, s, s, fused_rank=0, lowrank=True)
        return s

    def expand(
        self, x: Tensor, w: Weight, s: Tensor, adapter: Adapter, bias: Tensor | None = None
    ) -> Tensor:
        return self._product(x, w, s.contiguous(), adapter, bias, fused_rank=0)

    def shrink_expand(
        self, x: Tensor, w: Weight, adapter: Adapter, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        assert isinstance(w, Tensor)
        R = adapter.A.shape[1]
        one_half_type = adapter.A.dtype == x.dtype in HALF
        if not (R and x.shape[0] and w.shape[1]) or not cuda_decode_fuses(
            R, one_half_type, _k_major(w)
        ):
            return super().shrink_expand(x, w, adapter, bias)
        s = x.new_empty((x.shape[0], R), dtype=torch.float32)
        return self._product(x, w, s, adapter, bias, fused_rank=R), s

    def _product(
        self,
        x: Tensor,
        w: Weight,
        s: Tensor,
        adapter: Adapter,
        bias: Tensor | None,
        fused_rank: int,
    ) -> Tensor:
        """y [M, N]; with `fused_rank` s is computed in the same launch, else read."""
        assert isinstance(w, Tensor)
        y = x.new_empty((x.shape[0], w.shape[1]))
        if y.numel():
            bias = None if bias is None else bias.contiguous()
            A, B, scale = adapter.A, adapter.B, adapter.scale
            _decode(x, w, A, B, scale, bias, y, s, fused_rank=fused_rank, lowrank=False)
        return y

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


class CudaBackend(Backend):
    """The extension's kernels, for few rows."""

    name = "cuda"
    devices = ("cuda",)
    needs_target = True

    def unavailable(self) -> str | None:
        if torch.version.cuda is None:
            return "this PyTorch was built without CUDA"
        if not LIBRARY.exists():
            return "its extension is not built (install where nvcc is, or see LORA_KERNELS_BUILD)"
        return _load()

    def candidates(self, problem: Problem, target: Target | None) -> list[Candidate]:
        assert target is not None
        refusal = _refusal(problem, target)
        if refusal is not None:
            return [Candidate("cuda_decode", refusal=refusal)]
        times = measured_us, _ = times_of("cuda_decode", problem, target)
        slower = _UNTIMED if measured_us is None else None
        return [Candidate("cuda_decode", PRODUCTS, None, slower, *times, "one pass over W")]


def _refusal(problem: Problem, target: Target) -> str | None:
    if not target.name.startswith("sm_"):
        return f"it is for NVIDIA GPUs, not for {target.name}"
    if problem.M > CUDA_DECODE_ROWS:
        return f"it takes at most {CUDA_DECODE_ROWS} rows, got {problem.M}"
    if problem.dtype == "float64":
        return "float64 is computed by ATen"
    if problem.dropout:
        return "it has no dropout"
    if problem.adapter_dtype not in (problem.dtype, "float32"):
        return f"{problem.adapter_dtype} adapters need a base of their own type"
    return None


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
    lowrank: bool,
) -> None:
    """Launch the kernel once, with columns and K divided among blocks."""
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
        # Each call has its own: kept ones would be a CUDA graph's memory, or be counted in by two calls at once.
        (x.new_zeros if splits > 1 else x.new_empty)(tiles, dtype=torch.int32),
        None if at_run_time is None else at_run_time.float(),
        0.0 if at_run_time is not None else float(alpha),
        fused_rank,
        blocks,
        splits,
        chunk,
        lowrank,
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


PRODUCTS = CudaProducts()
BACKEND = CudaBackend()
