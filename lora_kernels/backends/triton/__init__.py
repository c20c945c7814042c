"""The backend of Triton kernels for NVIDIA and AMD GPUs. Triton itself is imported when the first product is computed."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from lora_kernels.backends.base import Backend, Scale
from lora_kernels.dropout import Dropout
from lora_kernels.problem import Problem
from lora_kernels.tuning.config import TileConfig
from lora_kernels.tuning.cost import predict_us
from lora_kernels.tuning.select import Choice, select
from lora_kernels.tuning.targets import Target, target_of


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

    def slower(self, problem: Problem) -> str | None:
        target = current_target()
        choice = select(problem, target)
        if choice.algorithm != "aten":
            return None
        if choice.source == "tuned":
            return "ATen was faster when this device was tuned"
        ours = predict_us("two_kernel", problem, target, choice.config("lowrank_matmul"))
        theirs = predict_us("aten", problem, target)
        return f"expanding first and accumulating with ATen is predicted faster: {theirs:.1f} us, not {ours:.1f} us"

    def plan(self, problem: Problem) -> str:
        if problem.empty:
            return ""
        target = current_target()
        choice = self._choice(problem, target)
        algorithm = "two_kernel" if choice.algorithm == "aten" else choice.algorithm
        config = choice.config("lowrank_matmul" if algorithm == "two_kernel" else algorithm)
        return (
            f"{algorithm} ({choice.source}), {config}, predicted {predict_us(algorithm, problem, target, config):.1f} us "
            f"against {predict_us('frozen', problem, target):.1f} us of the frozen layer on {target.chip}"
        )

    def shrink(self, x: Tensor, a: Tensor, alpha: Scale, dropout: Dropout | None = None) -> Tensor:
        (M, K), R = x.shape, a.shape[1]
        if 0 in (M, R):
            return x.new_zeros((M, R), dtype=torch.float32)
        from lora_kernels.backends.triton.shrink import shrink

        return shrink(x, a, alpha, self._config("shrink", x, a, M, 1, K, R, dropout), dropout)

    def lowrank_matmul(
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
        (M, K), N, R = x.shape, w.shape[1], b.shape[0]
        if 0 in (M, N):
            return x.new_empty((M, N)), self.shrink(x, a, alpha, dropout_in) if s is None else s
        problem = _problem(x, a, M, N, K, R, dropout_in or dropout_out, w.stride(0) == 1)
        target = current_target(x.device)
        choice = self._choice(problem, target)
        fused = s is None and dropout_out is None and R > 0
        if fused and choice.algorithm == "decode":
            from lora_kernels.backends.triton.decode import decode

            return decode(x, w, a, b, alpha, bias, choice.config("decode"))
        if fused and choice.algorithm == "one_pass":
            from lora_kernels.backends.triton.one_pass import one_pass

            return one_pass(x, w, a, b, alpha, bias, choice.config("one_pass"), dropout_in)
        from lora_kernels.backends.triton.lowrank_matmul import lowrank_matmul

        # Between the two kernels the second waits by itself, where the hardware lets it start early.
        config = choice.config("shrink")
        overlap = s is None and R > 0 and target.tma and config.split == 1
        if s is None and R > 0:
            from lora_kernels.backends.triton.shrink import shrink

            s = shrink(x, a, alpha, config, dropout_in, release=overlap)
        elif s is None:
            s = x.new_empty((M, 0), dtype=torch.float32)
        config = choice.config("lowrank_matmul")
        return lowrank_matmul(x, w, s, b, bias, config, dropout_out, late_wait=overlap), s

    def reduce_outer(
        self, left: Tensor, right: Tensor, dtype: torch.dtype, dropout: Dropout | None = None
    ) -> Tensor:
        (M, C), D = left.shape, right.shape[1]
        if 0 in (M, C, D):
            return left.new_zeros((C, D), dtype=dtype)
        from lora_kernels.backends.triton.reduce_outer import reduce_outer

        wide, thin = (left, right) if right.dtype == torch.float32 else (right, left)
        config = self._config("reduce_outer", wide, thin, M, 1, max(C, D), min(C, D), dropout)
        return reduce_outer(left, right, dtype, config, dropout)

    def shrink_outer(
        self, dy: Tensor, b_t: Tensor, alpha: Scale, s: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        (M, N), R = dy.shape, s.shape[1]
        problem = _problem(dy, b_t, M, N, 1, R, None)
        choice = select(problem, current_target(dy.device), "two_kernel")
        if problem.empty or not choice.has("shrink_outer"):
            return super().shrink_outer(dy, b_t, alpha, s, dtype)
        config = choice.config("shrink_outer")
        if not one_reading_pays(problem, config):
            return super().shrink_outer(dy, b_t, alpha, s, dtype)
        from lora_kernels.backends.triton.shrink_outer import shrink_outer

        return shrink_outer(dy, b_t, alpha, s, dtype, config)

    def _choice(self, problem: Problem, target: Target) -> Choice:
        try:
            return select(problem, target, self.algorithm)
        except ValueError:  # the forced algorithm cannot compute this problem: the general one can
            return select(problem, target, "two_kernel")

    def _config(
        self,
        kernel: str,
        x: Tensor,
        a: Tensor,
        M: int,
        N: int,
        K: int,
        R: int,
        dropout: Dropout | None,
    ) -> TileConfig:
        problem = _problem(x, a, M, N, K, R, dropout)
        return select(problem, current_target(x.device), "two_kernel").config(kernel)


def one_reading_pays(problem: Problem, config: TileConfig) -> bool:
    """Whether writing and reading q's partial results moves fewer bytes than the second reading of dy that it saves.

    A row of dy has 8·R bytes of partial results, float32 there and back, for each block of columns.
    """
    return problem.itemsize * config.block_n > 8 * problem.R


def current_target(device: torch.device | None = None) -> Target:
    """The target of `device`, or of the current one; ValueError for one that these kernels do not support."""
    index = None if device is None else device.index
    return target_of(_architecture(torch.cuda.current_device() if index is None else index))


@functools.lru_cache(maxsize=64)
def _architecture(device: int) -> str:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def _problem(
    x: Tensor,
    a: Tensor,
    M: int,
    N: int,
    K: int,
    R: int,
    dropout: Dropout | None,
    w_k_major: bool = True,
) -> Problem:
    return Problem(
        M=M,
        N=N,
        K=K,
        R=R,
        dtype=str(x.dtype).removeprefix("torch."),
        adapter_dtype=str(a.dtype).removeprefix("torch."),
        device="cuda",
        dropout=dropout is not None,
        w_k_major=w_k_major,
    )


BACKEND = TritonBackend()
