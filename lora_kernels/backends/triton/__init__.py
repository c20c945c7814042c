"""The backend of Triton kernels for NVIDIA and AMD GPUs. Triton itself is imported when the first product is computed."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lora_kernels.backends.base import Backend, Scale, left_is_wide
from lora_kernels.backends.device import current_target
from lora_kernels.dropout import Dropout
from lora_kernels.problem import Problem
from lora_kernels.tuning.config import TileConfig
from lora_kernels.tuning.cost import copy_of_b_pays, predict_us
from lora_kernels.tuning.select import TRITON, Choice, select
from lora_kernels.tuning.targets import Target


class TritonBackend(Backend):
    """Fused products in float32, bfloat16 and float16; `algorithm` forces two_kernel, one_pass or decode where it fits."""

    name = "triton"

    def __init__(self, algorithm: str | None = None) -> None:
        self.algorithm = algorithm

    def unavailable(self) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        return None

    def declines(self, problem: Problem) -> str | None:
        if problem.dtype == "float64":
            return "float64 is computed by ATen"
        try:
            select(problem, current_target(), "two_kernel")
        except ValueError as error:
            return str(error)
        return None

    def slower(self, problem: Problem, usable: tuple[str, ...] = ()) -> str | None:
        choice = select(problem, current_target())
        return choice.over(*TRITON) if choice.algorithm == "aten" else None

    def plan(self, problem: Problem) -> str:
        if problem.empty:
            return ""
        target = current_target()
        choice = self._choice(problem, target)
        algorithm = "two_kernel" if choice.algorithm == "aten" else choice.algorithm
        config = choice.config("expand" if algorithm == "two_kernel" else algorithm)
        return (
            f"{algorithm} ({choice.source}), {config}, {choice.told()}; "
            f"predicted for the frozen layer on {target.chip}: {predict_us('frozen', problem, target):.1f} us"
        )

    def shrink(self, x: Tensor, a: Tensor, alpha: Scale, dropout: Dropout | None = None) -> Tensor:
        M, R = x.shape[0], a.shape[1]
        if 0 in (M, R):
            return x.new_zeros((M, R), dtype=torch.float32)
        from lora_kernels.backends.triton.shrink import shrink

        config = self._narrow(x, a.dtype, R, dropout).config("shrink")
        return shrink(x, a, alpha, config, dropout)

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
        M, N, R = x.shape[0], w.shape[1], b.shape[0]
        if 0 in (M, N):
            return x.new_empty((M, N)), self.shrink(x, a, alpha, dropout_in) if s is None else s
        problem = _problem(x, a.dtype, N, R, dropout_in or dropout_out, w.stride(0) == 1)
        target = current_target(x.device)
        choice = self._choice(problem, target)
        fused = s is None and dropout_out is None and R > 0
        if fused and choice.algorithm == "decode":
            from lora_kernels.backends.triton.decode import decode

            return decode(x, w, a, b, alpha, bias, choice.config("decode"))
        if fused and choice.algorithm == "one_pass":
            from lora_kernels.backends.triton.one_pass import one_pass

            return one_pass(x, w, a, b, alpha, bias, choice.config("one_pass"), dropout_in)
        from lora_kernels.backends.triton.expand import expand

        tiles = choice.config("expand")
        if R > 0 and b.stride(0) != 1 and copy_of_b_pays(tiles, M, N, target):
            b = b.t().contiguous().t()
        # Between the two kernels the second waits by itself, where the hardware lets it start early.
        config = choice.config("shrink")
        overlap = s is None and R > 0 and target.tma and config.split == 1
        if s is None and R > 0:
            from lora_kernels.backends.triton.shrink import shrink

            s = shrink(x, a, alpha, config, dropout_in, release=overlap)
        elif s is None:
            s = x.new_empty((M, 0), dtype=torch.float32)
        return expand(x, w, s, b, bias, tiles, dropout_out, late_wait=overlap), s

    def wgrad(
        self, left: Tensor, right: Tensor, dtype: torch.dtype, dropout: Dropout | None = None
    ) -> Tensor:
        (M, C), D = left.shape, right.shape[1]
        if 0 in (M, C, D):
            return left.new_zeros((C, D), dtype=dtype)
        from lora_kernels.backends.triton.wgrad import wgrad

        wide, thin = (left, right) if left_is_wide(left, right, dropout) else (right, left)
        config = self._narrow(wide, dtype, thin.shape[1]).config("wgrad")
        return wgrad(left, right, dtype, config, dropout)

    def shrink_wgrad(
        self, dy: Tensor, b_t: Tensor, alpha: Scale, s: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        R = s.shape[1]
        if 0 in (*dy.shape, R):
            return super().shrink_wgrad(dy, b_t, alpha, s, dtype)
        choice = self._narrow(dy, b_t.dtype, R)
        if not choice.has("shrink_wgrad"):
            return super().shrink_wgrad(dy, b_t, alpha, s, dtype)
        config = choice.config("shrink_wgrad")
        if not one_reading_pays(dy.itemsize, R, config, choice.measured):
            return super().shrink_wgrad(dy, b_t, alpha, s, dtype)
        from lora_kernels.backends.triton.shrink_wgrad import shrink_wgrad

        return shrink_wgrad(dy, b_t, alpha, s, dtype, config)

    def _choice(self, problem: Problem, target: Target) -> Choice:
        try:
            return select(problem, target, self.algorithm)
        except ValueError:  # the forced algorithm cannot compute this problem: the general one can
            return select(problem, target, "two_kernel")

    def _narrow(
        self, x: Tensor, adapter_dtype: torch.dtype, R: int, dropout: Dropout | None = None
    ) -> Choice:
        """The tiles of the kernels that read x and no weight, and the times that `tune` measured of them."""
        problem = _problem(x, adapter_dtype, 0, R, dropout)
        return self._choice(problem, current_target(x.device))


def one_reading_pays(
    itemsize: int, R: int, config: TileConfig, measured: Mapping[str, float]
) -> bool:
    """Whether `shrink_wgrad` is faster than the two kernels that it replaces: as measured, else by bytes.

    A row of dy has 8·R bytes of partial results of q, float32 there and back, for each block of columns; they must be
    fewer than the second reading of dy that they save. A kernel that `tune` found wrong has no time and does not pay.
    """
    fused, shrink, outer = (
        measured.get(kernel, math.inf) for kernel in ("shrink_wgrad", "shrink", "wgrad")
    )
    if min(fused, shrink, outer) < math.inf:
        return fused < shrink + outer
    return itemsize * config.block_n > 8 * R


def _problem(
    x: Tensor,
    adapter_dtype: torch.dtype,
    N: int,
    R: int,
    dropout: Dropout | None,
    w_k_major: bool = True,
) -> Problem:
    M, K = x.shape
    return Problem(
        M=M,
        N=N,
        K=K,
        R=R,
        dtype=str(x.dtype).removeprefix("torch."),
        adapter_dtype=str(adapter_dtype).removeprefix("torch."),
        device="cuda",
        dropout=dropout is not None,
        w_k_major=w_k_major,
    )


BACKEND = TritonBackend()
