"""What a backend offers: candidates, each with the products of which a LoRA linear is made (see `formulas`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_kernels.dropout import Dropout
from lora_kernels.operands import Adapter, Groups, Scale, Weight
from lora_kernels.problem import DENSE, Problem
from lora_kernels.tuning.targets import Target


class Products(ABC):
    """Products on 2-D operands of any strides. Sizes may be zero. Results are new, contiguous tensors, fully written.

    x and w share one dtype; A and B share one dtype: x's, or float32 when x is bfloat16 or float16. Accumulation is at
    least float32; the low-rank results s and q are float32 (float64 for float64 operands), but for the q of a fused
    `shrink_wgrad`: it may be in x's dtype, where A and B are too, with rows further apart. Equal input gives equal bits.
    """

    scales_columns = False  # whether `shrink_expand_scaled` is one product
    reads_memory = False  # whether `formulas` must give it each operand `in_memory`
    # (x [..., K], weight [N, K], adapter, bias) -> y with derivatives, where the layer is one operator: for a frozen
    # weight and bias, A and B both trained or both not, a number as scale; dropout or a column scale, not both.
    layer: Callable[[Tensor, Weight, Adapter, Tensor | None], Tensor] | None = None

    @abstractmethod
    def shrink(self, x: Tensor, adapter: Adapter) -> Tensor:
        """s = scale·(mask_in∘x)·A: x [M, K] -> s [M, R] float32."""

    @abstractmethod
    def expand(
        self, x: Tensor, w: Weight, s: Tensor, adapter: Adapter, bias: Tensor | None = None
    ) -> Tensor:
        """y = x·w + bias + mask_out∘(s·B): x [M, K], w [K, N], s [M, R] float32, bias [N] -> y [M, N] in x's dtype."""

    @abstractmethod
    def wgrad(
        self, left: Tensor, right: Tensor, dtype: torch.dtype, dropout: Dropout | None = None
    ) -> Tensor:
        """(mask∘left)ᵀ·right: left [M, C], right [M, D] -> [C, D] in `dtype`; one of C, D is a rank.

        The operand of that rank is float32, or q of a fused `shrink_wgrad`; the other one has the base's dtype. `dropout`
        masks left. Sums run in an order that the plan and sizes alone decide.
        """

    def shrink_expand(
        self, x: Tensor, w: Weight, adapter: Adapter, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(y, s) of `shrink` and `expand`, in one launch where the products have one."""
        s = self.shrink(x, adapter)
        return self.expand(x, w, s, adapter, bias), s

    def shrink_wgrad(
        self, dy: Tensor, adapter: Adapter, s: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """(q, dB) = (scale·dy·A, sᵀ·dy), from one reading of dy where the products have that.

        dy [M, N], s [M, R]; `adapter` is the transposed one, A [N, R] -> q [M, R], dB [R, N] in `dtype`.
        """
        return self.shrink(dy, adapter), self.wgrad(s, dy, dtype)

    def gradients(
        self, dy: Tensor, w: Weight, adapter: Adapter, x: Tensor, s: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dx, dA, dB) where all three are needed, dA and dB in `dtype`; beside each other where the products have that.

        dy [M, N], w [N, K], x [M, K], s [M, R]; `adapter` is the transposed one.
        """
        q, dB = self.shrink_wgrad(dy, adapter, s, dtype)
        dx = self.expand(dy, w, q, adapter)
        return dx, self.wgrad(x, q, dtype, adapter.dropout_out), dB

    def scaled(self, s: Tensor, scale: Scale) -> Tensor:
        """scale·s: s [M, R]."""
        return scale * s

    def weight_grad(self, dy: Tensor, x: Tensor) -> Tensor:
        """dW = dyᵀ·x of a trained base: dy [M, N], x [M, K] -> [N, K]."""
        return dy.t() @ x

    def bias_grad(self, dy: Tensor) -> Tensor:
        """dbias, the sum of dy's rows: dy [M, N] -> [N]."""
        return dy.sum(0)

    def bound(self, groups: Groups | None) -> Products:
        """The products for a call's rows: `grouped`, or these where there are no groups."""
        return self if groups is None else self.grouped(groups)

    def grouped(self, groups: Groups) -> Products:
        """The same products, each group of rows by its own operands: see `Groups` for their shapes.

        w is [G, K, N], or [K, N] for all; bias [G, N] or [N]. Gradients are stacks over the groups, of zeros for one
        without rows: `wgrad` gives [G, C, D], `weight_grad` and `bias_grad` likewise unless the base is shared. A NaN or an
        infinity stays in its group. Offsets that break their rule raise ValueError or RuntimeError on a CPU; elsewhere
        results are unspecified, but nothing outside of the operands is read or written.
        """
        raise NotImplementedError(f"{type(self).__name__} has no products over groups")

    def together(
        self, each: Sequence[tuple[Problem, Products]], trains: bool
    ) -> ProjectionProducts | None:
        """The products of projections that read one x, from `each` one's own; None where these are faster apart.

        `trains`: the problems are followed by a backward, or are one.
        """
        return None

    def shrink_expand_scaled(
        self,
        x: Tensor,
        w: Weight,
        adapter: Adapter,
        bias: Tensor | None = None,
        *,
        keeps_z: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(y, s, z) with z = x·w + s·B and y = c∘z + bias, c the adapter's column scale; no z unless it is kept.

        In one launch where the products have one; here the scale is a pass of its own over z.
        """
        z, s = self.shrink_expand(x, w, adapter, None)
        y = torch.empty_like(z) if keeps_z else z
        scale_columns(z, adapter.column_scale, bias, out=y)  # type: ignore[arg-type]
        return y, s, z if keeps_z else None

    def scaled_gradient(
        self, dy: Tensor, c: Tensor, z: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """(dz, dc) = (c∘dy, the sums of dy∘z over rows) of y = c∘z: dy and z [M, N], c [N]; no dc without z.

        dc has c's dtype and is summed in it, in an order that sizes alone decide.
        """
        dz = torch.empty_like(dy, memory_format=torch.contiguous_format)
        scale_columns(dy, c, None, out=dz)
        if z is None:
            return dz, None
        dc = torch.zeros_like(c)
        for rows in row_blocks(dy):
            dc += (dy[rows].to(c.dtype) * z[rows]).sum(0)
        return dz, dc

    def scaled_shrink_wgrad(
        self,
        dy: Tensor,
        c: Tensor,
        z: Tensor | None,
        adapter: Adapter,
        s: Tensor,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """(q, dB, dz, dc) of y = c∘(x·w + s·B): q = scale·dy·(c∘A), dB = c∘(sᵀ·dy), and `scaled_gradient`.

        As `shrink_wgrad` takes them, from one reading of dy where the products have that. dy itself is read for q and dB, so
        that no rounding of dz is in them.
        """
        dz, dc = self.scaled_gradient(dy, c, z)
        scaled = adapter._replace(A=(adapter.A * c[:, None]).to(adapter.A.dtype))
        q, dB = self.shrink_wgrad(dy, scaled, s, dtype)
        return q, (dB * c).to(dtype), dz, dc

    def row_norms(self, w: Tensor, adapter: Adapter) -> Tensor:
        """n [N] = the row norms of w + scale·(A·B)ᵀ, without that matrix: float32, or float64 for float64 operands.

        n² = ‖w‖² + Σ_R u∘(2·w·A + u·AᵀA), u = scale·Bᵀ [N, R]: w [N, K] is read once, and every other sum has the size of
        the rank. A sum below zero, where the two parts cancel, counts as zero.
        """
        lowrank, squares = self.shrink_squares(w, adapter.A)
        A, u = adapter.A.to(lowrank.dtype), adapter.scale * adapter.B.t().to(lowrank.dtype)
        tail = torch.addmm(2.0 * lowrank, u, A.t() @ A).mul(u).sum(1)
        return (squares + tail).clamp(min=0.0).sqrt()

    def shrink_squares(self, w: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        """(w·A, the sums of w² over columns), from one reading of w where the products have that.

        w [N, K], A [K, R] -> [N, R] and [N], float32 (float64 for float64): what `row_norms` is made of.
        """
        lowrank = self.shrink(w, Adapter(A, A.t(), 1.0))
        squares = w.new_empty(w.shape[0], dtype=lowrank.dtype)
        for rows in row_blocks(w):
            norms = torch.linalg.vector_norm(w[rows].to(lowrank.dtype), dim=1)
            torch.square(norms, out=squares[rows])
        return lowrank, squares


class ProjectionProducts(ABC):
    """Products of several projections of one x. Lists have an element for each of them, operands are those of `Products`.

    s and q are one tensor [M, ΣR]: the projections' columns beside each other.
    """

    @abstractmethod
    def shrink(self, xs: Sequence[Tensor], adapters: Sequence[Adapter]) -> Tensor:
        """scale·(mask_in∘x)·A of each -> [M, ΣR] float32; xs is one x for all, or one each."""

    @abstractmethod
    def expand(
        self,
        x: Tensor,
        ws: Sequence[Tensor],
        s: Tensor,
        adapters: Sequence[Adapter],
        biases: Sequence[Tensor | None],
    ) -> list[Tensor]:
        """x·w + bias + s·B of each: x [M, K], s [M, ΣR] -> y [M, N] each."""

    @abstractmethod
    def expand_sum(
        self, xs: Sequence[Tensor], ws: Sequence[Tensor], s: Tensor, adapters: Sequence[Adapter]
    ) -> Tensor:
        """The sum over projections of x·w + mask_out∘(s·B) [M, N], rounded once."""

    @abstractmethod
    def wgrad(
        self,
        lefts: Sequence[Tensor],
        rights: Sequence[Tensor],
        dtype: torch.dtype,
        dropouts: Sequence[Dropout | None] | None = None,
    ) -> list[Tensor]:
        """(mask∘left)ᵀ·right of each; lefts is one for all, or one each."""


@dataclass(frozen=True)
class Candidate:
    """One way to compute a problem, or the reason why it is not one.

    `name`: the algorithm. `refusal`: why it cannot compute the problem. `slower`: why another is expected to be faster,
    it counts only where no backend is named. `measured_us`, `predicted_us`: the time of the product, where it is known.
    `how`: in a few words for `explain`. `predicted_range`: the least and the most that the predicted time may be, where an
    assumption of the model is a range.
    """

    name: str
    products: Products | None = None
    refusal: str | None = None
    slower: str | None = None
    measured_us: float | None = None
    predicted_us: float | None = None
    how: str = ""
    predicted_range: tuple[float, float] | None = None


class Backend(ABC):
    """A family of kernels: where it runs, which weights it reads, and its candidates for a problem."""

    name: str
    devices: tuple[str, ...] = ()  # device types; empty for all
    formats: tuple[str, ...] = (DENSE,)  # of weights that its products read; see QuantizedWeight
    groups: bool = False  # whether its products have `grouped`
    needs_target: bool = False  # whether its kernels are made for the GPUs of tuning/targets.py

    @abstractmethod
    def unavailable(self) -> str | None:
        """Why this backend cannot run on this machine at all, or None."""

    @abstractmethod
    def candidates(self, problem: Problem, target: Target | None) -> list[Candidate]:
        """Every algorithm of this backend for `problem`, at least one; `target` is the GPU's, None on other devices."""


def fastest(candidates: Iterable[Candidate]) -> Candidate | None:
    """The one to take: the least measured time, else the least predicted one; None where all refuse.

    Where some times are measured, algorithms without a measured time do not count: `tune` leaves out what was wrong.
    A candidate that has no time at all goes before all others, unless it has a reason in `slower`.
    """
    able = [c for c in candidates if c.refusal is None]
    measured = any(c.measured_us is not None for c in able)

    def cost(candidate: Candidate) -> tuple[bool, float]:
        us = candidate.measured_us if measured else candidate.predicted_us
        unknown = candidate.measured_us is candidate.predicted_us is None
        return candidate.slower is not None, 0.0 if unknown else float("inf") if us is None else us

    return min(able, key=cost, default=None)


# A block stays in L2 on a CPU; on a GPU launches count, not caches.
_BLOCK_BYTES = {"cpu": 1 << 20}


def row_blocks(t: Tensor) -> Iterator[slice]:
    """Slices of t's rows: as many rows as a cache holds in float32."""
    rows, cols = t.shape
    size = max(16, _BLOCK_BYTES.get(t.device.type, 1 << 28) // (4 * max(cols, 1)))
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def scale_columns(z: Tensor, c: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = c∘z + bias, computed in c's dtype and rounded once: z [M, N], c and bias [N]; out may be z."""
    bias = None if bias is None else bias.to(c.dtype)
    for rows in row_blocks(z):
        block = z[rows].to(c.dtype)
        to = out[rows] if out.dtype == c.dtype else block
        if bias is None:
            torch.mul(block, c, out=to)
        else:
            torch.addcmul(bias, block, c, out=to)
        if out.dtype != c.dtype:
            out[rows] = to


def left_is_wide(left: Tensor, right: Tensor, dropout: Dropout | None = None) -> bool:
    """Whether `wgrad`'s left has the base's width, else right has: it is masked, alone no float32, or the wider one."""
    low_left, low_right = left.dtype == torch.float32, right.dtype == torch.float32
    if low_left == low_right:
        return dropout is not None or left.shape[1] >= right.shape[1]
    return dropout is not None or low_right
