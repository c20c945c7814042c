"""The Triton kernels of one algorithm as products, each with its tile. Triton is imported when the first one is launched."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from lora_kernels.backends.base import Products, left_is_wide
from lora_kernels.backends.composite import GroupedCompositeProducts
from lora_kernels.backends.triton.configs import lowrank_tiles, main_tile, unmasked
from lora_kernels.backends.triton.launch import rank_operand, rank_tail
from lora_kernels.dropout import Dropout
from lora_kernels.operands import Adapter, Groups, QuantizedWeight, Scale, Weight
from lora_kernels.problem import Problem
from lora_kernels.tuning.config import (
    WGRAD_BESIDE,
    TileConfig,
    Tiles,
    one_launch_ranks,
    one_reading_moves_less,
    runs_beside,
    shrink_beside,
)
from lora_kernels.tuning.targets import Target


class TritonProducts(Products):
    """Fused products in float32, bfloat16 and float16 for one problem on one target.

    `algorithm` is "two_kernel", "one_launch", "persistent", "persistent_one_launch", "one_pass" or "decode"; `tiles` has
    a tile for each kernel that it launches. With dropout it may be "tail_first" too.
    Over groups it is "two_kernel" or "tail_first", and each kernel is one launch, which reads the offsets on the device.
    """

    reads_memory = True
    scales_columns = True
    groups: Groups | None = None

    def __init__(self, algorithm: str, problem: Problem, target: Target, tiles: Tiles) -> None:
        self.algorithm, self.problem, self.target, self.tiles = algorithm, problem, target, tiles
        self._by_width: dict[tuple[int, bool], Tiles] = {}
        self._of_one_reading: dict[tuple[int, int], TileConfig | None] = {}

    def grouped(self, groups: Groups) -> Products:
        bound = copy.copy(self)
        bound.groups = groups
        return bound

    def shrink(self, x: Tensor, adapter: Adapter) -> Tensor:
        if 0 in (x.shape[0], adapter.A.shape[-1]):
            return x.new_zeros((x.shape[0], adapter.A.shape[-1]), dtype=torch.float32)
        config = self._lowrank(x.shape[1], adapter.dropout_in is not None).config("shrink")
        return self._shrink(x, adapter, config)

    def expand(
        self, x: Tensor, w: Weight, s: Tensor, adapter: Adapter, bias: Tensor | None = None
    ) -> Tensor:
        return self._expand(x, w, s, adapter, bias, None)

    def shrink_expand(
        self, x: Tensor, w: Weight, adapter: Adapter, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self._shrink_expand(x, w, adapter, bias, None)

    def shrink_expand_scaled(
        self, x: Tensor, w: Weight, adapter: Adapter, bias: Tensor | None = None, *, keeps_z: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        z = x.new_empty((x.shape[0], w.shape[-1])) if keeps_z else None
        y, s = self._shrink_expand(x, w, adapter, bias, z)
        return y, s, z

    def _shrink_expand(
        self, x: Tensor, w: Weight, adapter: Adapter, bias: Tensor | None, z: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(y, s), with the adapter's column scale where it has one; z gets what y is before that and bias, if given."""
        A, B, scale, dropout_in, dropout_out, c = adapter
        if 0 in (x.shape[0], w.shape[-1], A.shape[-1]):
            s = self.shrink(x, adapter)
            return self._expand(x, w, s, adapter, bias, z), s
        if self.algorithm == "decode" and dropout_in is dropout_out is None:
            from lora_kernels.backends.triton.decode import decode

            return decode(x, w, A, B, scale, bias, self.tiles.config("decode"), c=c, z=z)
        if not isinstance(w, Tensor):
            with self._decoded(w) as dense:
                return self._shrink_expand(x, dense, adapter, bias, z)
        if self.algorithm == "one_pass" and dropout_out is None:
            from lora_kernels.backends.triton.one_pass import one_pass

            config = self.tiles.config("one_pass")
            return one_pass(x, w, A, B, scale, bias, config, dropout_in, c=c, z=z)
        if self._one_launch_takes(x, w, adapter):
            return self._one_launch(x, w, adapter, bias, z)
        # Between the two kernels the second waits by itself, where the hardware lets it start early.
        config = self.tiles.config("shrink")
        overlap = self.target.tma and config.split == 1
        if self._persistent_takes(x, w, adapter, bias):
            if self._runs_beside:
                config, overlap = self._shrink_beside(A.shape[-1]), True
            _, b = self._tail(x, None, B)  # what is made of B is launched before, not between
            rounded = rank_operand(x.shape[0], b.shape[0], b.dtype, x.device)
            s = self._shrink(x, adapter, config, release=overlap, rounded=rounded)
            how: dict[str, Any] = {"late_wait": overlap, "dropout": dropout_out}
            return self._persistent(x, w, rounded, b, bias, **how), s
        if not x.dtype == B.dtype == torch.bfloat16:
            s = self._shrink(x, adapter, config, release=overlap)
            return self._expand(x, w, s, adapter, bias, z, late_wait=overlap), s
        rounded = rank_operand(x.shape[0], A.shape[-1], x.dtype, x.device)
        s = self._shrink(x, adapter, config, release=overlap, rounded=rounded)
        return self._expand(x, w, rounded, adapter, bias, z, late_wait=overlap), s

    def wgrad(
        self, left: Tensor, right: Tensor, dtype: torch.dtype, dropout: Dropout | None = None
    ) -> Tensor:
        (M, C), D = left.shape, right.shape[1]
        if 0 in (M, C, D):
            stack = () if self.groups is None else (self.groups.count,)
            return left.new_zeros((*stack, C, D), dtype=dtype)
        from lora_kernels.backends.triton.wgrad import wgrad

        wide = left if left_is_wide(left, right, dropout) else right
        config = self._lowrank(wide.shape[1]).config("wgrad")
        return wgrad(left, right, dtype, config, dropout, offsets=self._offsets)

    def shrink_wgrad(
        self, dy: Tensor, adapter: Adapter, s: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        config = self._one_reading(dy, s)
        if config is None:
            if not dy.dtype == adapter.A.dtype == torch.bfloat16 or 0 in (*dy.shape, s.shape[1]):
                return super().shrink_wgrad(dy, adapter, s, dtype)
            rounded = rank_operand(dy.shape[0], s.shape[1], dy.dtype, dy.device)
            config = self._lowrank(dy.shape[1], adapter.dropout_in is not None).config("shrink")
            self._shrink(dy, adapter, config, rounded=rounded)
            return rounded, self.wgrad(s, dy, dtype)
        from lora_kernels.backends.triton.shrink_wgrad import shrink_wgrad

        return shrink_wgrad(dy, adapter.A, adapter.scale, s, dtype, config)[:2]

    def gradients(
        self, dy: Tensor, w: Weight, adapter: Adapter, x: Tensor, s: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        empty = 0 in (*dy.shape, x.shape[1], s.shape[1])
        dense = w if isinstance(w, Tensor) and not empty else None
        takes = dense is not None and self._persistent_takes(dy, dense, adapter, None)
        if dense is None or not takes or not self._runs_beside:
            return super().gradients(dy, w, adapter, x, s, dtype)
        from lora_kernels.backends.triton.wgrad import wgrad

        # Four launches run beside each other. What one of them reads or writes is held until the last is launched: its
        # memory must not be given to another.
        (M, R), (_, b) = s.shape, self._tail(dy, None, adapter.B)
        s = rank_operand(M, R, dy.dtype, dy.device).copy_(s)
        rounded = rank_operand(M, R, dy.dtype, dy.device)
        config = self._shrink_beside(R)
        q = self._shrink(dy, adapter, config, release=True, rounded=rounded)
        dx = self._persistent(dy, dense, rounded, b, None, late_wait=True, release=True)
        tile = WGRAD_BESIDE[self.target.name]
        dB = wgrad(s, dy, dtype, tile, beside=True)
        dA = wgrad(x, rounded, dtype, tile, beside=True)
        del q
        return dx, dA, dB

    def scaled_shrink_wgrad(
        self,
        dy: Tensor,
        c: Tensor,
        z: Tensor | None,
        adapter: Adapter,
        s: Tensor,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        config = self._one_reading(dy, s)
        if config is None:
            return super().scaled_shrink_wgrad(dy, c, z, adapter, s, dtype)
        from lora_kernels.backends.triton.shrink_wgrad import shrink_wgrad

        scaled = shrink_wgrad(dy, adapter.A, adapter.scale, s, dtype, config, c, z)
        return cast(tuple[Tensor, Tensor, Tensor, Tensor | None], scaled)

    def _one_reading(self, dy: Tensor, s: Tensor) -> TileConfig | None:
        """The tile of the kernel that reads dy once for q and dB; None where it does not pay or cannot."""
        width, R = key = dy.shape[1], s.shape[1]
        if 0 in (*dy.shape, R):
            return None
        if key not in self._of_one_reading:
            tiles = self._lowrank(width)
            config = tiles.config("shrink_wgrad") if tiles.has("shrink_wgrad") else None
            if config and not one_reading_pays(dy.itemsize, R, config, tiles.measured):
                config = None
            self._of_one_reading[key] = config
        return self._of_one_reading[key]

    def scaled_gradient(
        self, dy: Tensor, c: Tensor, z: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if dy.numel() == 0:
            return super().scaled_gradient(dy, c, z)
        from lora_kernels.backends.triton.scale import scaled_gradient

        # It has the grid of wgrad: blocks of columns, parts of the rows.
        return scaled_gradient(dy, c, z, self._lowrank(dy.shape[1]).config("wgrad"))

    def shrink_squares(self, w: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        if 0 in (w.shape[0], A.shape[1]):
            return super().shrink_squares(w, A)
        from lora_kernels.backends.triton.shrink import shrink_squares

        return shrink_squares(w, A, self._lowrank(w.shape[1]).config("shrink"))

    def scaled(self, s: Tensor, scale: Scale) -> Tensor:
        if self.groups is None:
            return super().scaled(s, scale)
        return GroupedCompositeProducts(self.groups).scaled(s, scale)

    def weight_grad(self, dy: Tensor, x: Tensor) -> Tensor:
        if self.groups is None or not self.groups.own_weight:
            return super().weight_grad(dy, x)
        return self.wgrad(dy, x, x.dtype)

    def bias_grad(self, dy: Tensor) -> Tensor:
        if self.groups is None or not self.groups.own_bias:
            return super().bias_grad(dy)
        ones = dy.new_ones((1, 1), dtype=torch.float32).expand(dy.shape[0], 1)
        return self.wgrad(ones, dy, dy.dtype)[:, 0]

    @property
    def _offsets(self) -> Tensor | None:
        return None if self.groups is None else self.groups.offsets

    def _shrink(self, x: Tensor, adapter: Adapter, config: TileConfig, **own: Any) -> Tensor:
        from lora_kernels.backends.triton.shrink import shrink

        own["offsets"] = self._offsets
        return shrink(x, adapter.A, adapter.scale, config, adapter.dropout_in, **own)

    def _expand(
        self,
        x: Tensor,
        w: Weight,
        s: Tensor,
        adapter: Adapter,
        bias: Tensor | None,
        z: Tensor | None,
        late_wait: bool = False,
    ) -> Tensor:
        """y; s is float32, or in x's type."""
        if 0 in (x.shape[0], w.shape[-1]):
            return x.new_empty((x.shape[0], w.shape[-1]))
        if not isinstance(w, Tensor):
            with self._decoded(w) as dense:
                return self._expand(x, dense, s, adapter, bias, z)
        if s.shape[1] and self._persistent_takes(x, w, adapter, bias):
            tail, b = self._tail(x, s, adapter.B)
            # Parts of s and B are made by one launch, just before.
            early = b.shape[0] > s.shape[1]
            how: dict[str, Any] = {"late_wait": early, "dropout": adapter.dropout_out}
            return self._persistent(x, w, cast(Tensor, tail), b, bias, **how)
        from lora_kernels.backends.triton.expand import expand

        b, config = adapter.B, self.tiles.config("expand")
        own: dict[str, Any] = {"offsets": self._offsets, "late_wait": late_wait}
        if self.algorithm == "tail_first":
            # As eager does it: s·b + bias, then the vendor's product of all rows accumulated onto it.
            config = main_tile(self.algorithm, self.problem, self.tiles)
            y = expand(x[:, :0], w[:0], s, b, bias, config, adapter.dropout_out, **own)
            return y.addmm_(x, w)
        own |= {"c": adapter.column_scale, "z": z}
        return expand(x, w, s, b, bias, config, adapter.dropout_out, **own)

    def _one_launch_takes(self, x: Tensor, w: Tensor, adapter: Adapter) -> bool:
        """Whether a call is computed by the launch that computes s too: operands of one type, no mask of results.

        The persistent one has neither a mask of x nor a scale of results, and copies take its x and w.
        """
        if not self.algorithm.endswith("one_launch") or adapter.dropout_out is not None:
            return False
        masked = adapter.dropout_in is not None
        fits = adapter.A.shape[1] <= one_launch_ranks(masked)
        if not (fits and x.dtype == adapter.A.dtype == adapter.B.dtype == torch.bfloat16):
            return False
        if self.algorithm == "one_launch":
            return True
        from lora_kernels.backends.triton.persistent import applies

        return not masked and adapter.column_scale is None and applies(x, w)

    def _one_launch(
        self, x: Tensor, w: Tensor, adapter: Adapter, bias: Tensor | None, z: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(y, s) by the launch that computes both."""
        from lora_kernels.backends.triton.expand import Shrink, expand

        A, B, scale, dropout_in, _, c = adapter
        s = x.new_empty((x.shape[0], A.shape[1]), dtype=torch.float32)
        rounded = rank_operand(x.shape[0], A.shape[1], x.dtype, x.device)
        config = self.tiles.config(self.algorithm)
        if self.algorithm == "one_launch":
            first = Shrink(A, scale, s, dropout_in)
            return expand(x, w, rounded, B, bias, config, c=c, z=z, first=first), s
        from lora_kernels.backends.triton.persistent import fetchable, persistent

        first = Shrink(fetchable(A.t()).t(), scale, s, None)
        b, programs = fetchable(B), self.target.multiprocessors
        return persistent(x, w, rounded, b, bias, config, programs, first=first), s

    def _persistent_takes(
        self, x: Tensor, w: Tensor, adapter: Adapter, bias: Tensor | None
    ) -> bool:
        """Whether a call is the persistent product's: no scale of results, a mask that it has, x and w that copies take."""
        if self.algorithm != "persistent" or adapter.column_scale is not None:
            return False
        if adapter.dropout_out is not None:
            reason = unmasked(self.tiles.config("persistent"), self.problem)
            if bias is not None or reason is not None:
                return False
        from lora_kernels.backends.triton.persistent import applies

        return applies(x, w)

    @property
    def _runs_beside(self) -> bool:
        """Whether low-rank kernels run beside this persistent product."""
        return runs_beside(self.tiles.config("persistent"), self.problem, self.target)

    def _shrink_beside(self, R: int) -> TileConfig:
        """The tile of shrink where it runs beside this persistent product."""
        return cast(TileConfig, shrink_beside(R, self.target))

    def _tail(self, x: Tensor, s: Tensor | None, B: Tensor) -> tuple[Tensor | None, Tensor]:
        """s, where it is given, and B as the persistent product copies them: in x's type, or in parts, released."""
        if rank_tail(x.dtype, B.dtype, tma=True) == "split":
            from lora_kernels.backends.triton.parts import parts

            return parts(s, B, self.tiles.config("shrink"), release=s is not None)
        from lora_kernels.backends.triton.persistent import fetchable

        if s is not None and s.dtype != x.dtype:
            s = rank_operand(s.shape[0], s.shape[1], x.dtype, x.device).copy_(s)
        return s, fetchable(B)

    def _persistent(
        self, x: Tensor, w: Tensor, s: Tensor, b: Tensor, bias: Tensor | None, **own: Any
    ) -> Tensor:
        """The persistent product; s and b come from `_tail`."""
        from lora_kernels.backends.triton.persistent import persistent

        config = self.tiles.config("persistent")
        return persistent(x, w, s, b, bias, config, self.target.multiprocessors, **own)

    def _decoded(self, w: QuantizedWeight) -> AbstractContextManager[Tensor]:
        """w as a dense tensor, for the products that are launched while it is entered."""
        from lora_kernels.backends.triton.dequantise import decoded

        return decoded(w, self.tiles.config("dequantise"))

    def _lowrank(self, width: int, dropout: bool = False) -> Tiles:
        """The tiles of the kernels that read an operand [M, width] and no weight."""
        key = width, dropout
        if key not in self._by_width:
            problem = replace(self.problem, K=width, dropout=dropout)
            self._by_width[key] = lowrank_tiles(problem, self.target)
        return self._by_width[key]


def one_reading_pays(
    itemsize: int, R: int, config: TileConfig, measured: Mapping[str, float]
) -> bool:
    """Whether `shrink_wgrad` is faster than the two kernels that it replaces: as measured, else by bytes.

    A kernel that `tune` found wrong has no time and does not pay.
    """
    fused, shrink, outer = (
        measured.get(kernel, math.inf) for kernel in ("shrink_wgrad", "shrink", "wgrad")
    )
    if min(fused, shrink, outer) < math.inf:
        return fused < shrink + outer
    return one_reading_moves_less(itemsize, R, config.block_n)
