"""Small Triton kernels for the emulator's tests, and `Compiled`: one of them ready to run, as it is or damaged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.compiled.recorder import GPU_TARGETS, compile_call
from tests.ptx.launch import Launch, prepare_triton

BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R = 64, 32, 32, 16


@triton.jit
def product_kernel(
    x, w, s, b, y, M, N, K, R, stride_x, stride_w,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    TMA: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """y = x·w + s·b, the second product after the loop; with WAIT s is waited for."""
    row0, col0 = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    rows, cols = row0 + tl.arange(0, BLOCK_M), col0 + tl.arange(0, BLOCK_N)
    ks, ranks = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    in_m, in_n = rows < M, cols < N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        if TMA:
            x_tile, w_tile = x.load([row0, k]), w.load([k, col0])
        else:
            in_k = ks < K - k
            x_ptrs = x + rows[:, None] * stride_x + (k + ks)[None, :]
            w_ptrs = w + (k + ks)[:, None] * stride_w + cols[None, :]
            x_tile = tl.load(x_ptrs, mask=in_m[:, None] & in_k[None, :], other=0.0)
            w_tile = tl.load(w_ptrs, mask=in_k[:, None] & in_n[None, :], other=0.0)
        acc = tl.dot(x_tile, w_tile, acc)
    if WAIT:
        tl.extra.cuda.gdc_wait()
    in_r = ranks < R
    s_ptrs = s + rows[:, None] * R + ranks[None, :]
    s_tile = tl.load(s_ptrs, mask=in_m[:, None] & in_r[None, :], other=0.0)
    b_tile = tl.load(
        b + ranks[:, None] * N + cols[None, :], mask=in_r[:, None] & in_n[None, :], other=0.0
    )
    acc = tl.dot(s_tile, b_tile, acc)
    tl.store(y + rows[:, None] * N + cols[None, :], acc, mask=in_m[:, None] & in_n[None, :])


@triton.jit
def double_kernel(source, out, n, BLOCK: tl.constexpr, MASKED: tl.constexpr, RELEASE: tl.constexpr):
    """out = 2·source; with RELEASE a dependent kernel may start at once."""
    if RELEASE:
        tl.extra.cuda.gdc_launch_dependents()
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if MASKED:
        tl.store(out + at, 2 * tl.load(source + at, mask=at < n, other=0.0), mask=at < n)
    else:
        tl.store(out + at, 2 * tl.load(source + at))


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel with its grid and arguments; `ptx` may differ from what was compiled."""

    kernel: Any
    grid: tuple[int, ...]
    bound: dict[str, Any]
    ptx: str

    def prepare(self) -> Launch:
        return prepare_triton(self.kernel, self.grid, self.bound, self.ptx)

    def run(self, schedule: int | None = None) -> Launch:
        launch = self.prepare()
        launch.run(schedule)
        return launch

    def instructions(self, needle: str) -> list[int]:
        """Numbers of the lines with an instruction that contains `needle`."""
        return [i for i, line in enumerate(self.ptx.splitlines()) if needle in line]

    def edited(self, number: int, change: Callable[[str], str]) -> Compiled:
        """With one line changed."""
        lines = self.ptx.splitlines()
        lines[number] = change(lines[number])
        return replace(self, ptx="\n".join(lines))

    def without(self, *numbers: int) -> Compiled:
        """With these lines' instructions deleted."""
        lines = ["" if i in numbers else line for i, line in enumerate(self.ptx.splitlines())]
        return replace(self, ptx="\n".join(lines))


def compiled(
    kernel: Any, target: str, grid: tuple[int, ...], *args: Any, **options: Any
) -> Compiled:
    binary, bound = compile_call(kernel, GPU_TARGETS[target], args, options)
    return Compiled(binary, grid, bound, binary.asm["ptx"])


@dataclass(frozen=True)
class Product:
    """y = x·w + s·b in bfloat16, sizes ragged, y float32 and NaN until stored."""

    x: Tensor
    w: Tensor
    s: Tensor
    b: Tensor
    y: Tensor

    @classmethod
    def of(cls, M: int = 72, N: int = 48, K: int = 112, R: int = 13) -> Product:
        shapes = ((M, K), (K, N), (M, R), (R, N))
        return cls(*(torch.randn(shape).bfloat16() for shape in shapes), torch.empty(M, N))

    @property
    def error(self) -> float:
        """The largest difference to float64, or infinity where something is not a number."""
        exact = self.x.double() @ self.w.double() + self.s.double() @ self.b.double()
        return float((self.y.double() - exact).abs().nan_to_num(torch.inf).max())

    @property
    def grid(self) -> tuple[int, int]:
        return triton.cdiv(len(self.y), BLOCK_M), triton.cdiv(self.y.shape[1], BLOCK_N)

    def compile(
        self, target: str, *, tma: bool = False, wait: bool = False, stages: int = 3
    ) -> Compiled:
        self.y.fill_(torch.nan)
        x = TensorDescriptor.from_tensor(self.x, [BLOCK_M, BLOCK_K]) if tma else self.x
        w = TensorDescriptor.from_tensor(self.w, [BLOCK_K, BLOCK_N]) if tma else self.w
        sizes = *self.y.shape, self.x.shape[1], self.s.shape[1], self.x.stride(0), self.w.stride(0)
        return compiled(
            product_kernel, target, self.grid, x, w, self.s, self.b, self.y, *sizes,
            BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, BLOCK_R=BLOCK_R, TMA=tma, WAIT=wait,
            num_warps=4, num_stages=stages,
        )  # fmt: skip
