"""Launches every configuration that selection can return for a GPU: to compile it alone, or on CPU tensors to execute it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lora_kernels.backends.triton.configs import untried
from lora_kernels.backends.triton.decode import decode
from lora_kernels.backends.triton.dequantise import dequantise
from lora_kernels.backends.triton.expand import Shrink, expand
from lora_kernels.backends.triton.launch import rank_operand
from lora_kernels.backends.triton.one_pass import one_pass
from lora_kernels.backends.triton.scale import scaled_gradient
from lora_kernels.backends.triton.shrink import shrink, shrink_squares
from lora_kernels.backends.triton.shrink_wgrad import scaled_shrink_wgrad, shrink_wgrad
from lora_kernels.backends.triton.wgrad import wgrad
from lora_kernels.dropout import Dropout
from lora_kernels.problem import DENSE, Problem
from lora_kernels.samples import sample
from lora_kernels.tuning.config import TAIL_PARTS, WGRAD_BESIDE, TileConfig, tail_in_parts
from lora_kernels.tuning.targets import Target

if untried() is None:
    from lora_kernels.backends.triton.persistent import persistent


@dataclass(frozen=True)
class Shapes:
    """Meta tensors of a problem, or zeros; `forward` says which way the weights and adapters lie in memory.

    `peft_b`: b lies as PEFT stores it, of a forward along the rank, of dx along N. `scaled`: with DoRA's column scale, and
    z. `float32_s`: s and q are float32 also where x and the adapter are bfloat16.
    """

    problem: Problem
    forward: bool
    peft_b: bool = False
    scaled: bool = False
    float32_s: bool = False
    device: str = "meta"

    def _empty(
        self, rows: int, cols: int, dtype: str, transposed: bool = False, count: int = 0
    ) -> Tensor:
        shape = (cols, rows) if transposed else (rows, cols)
        stack = (count,) if count else ()
        made = torch.zeros((*stack, *shape), dtype=getattr(torch, dtype), device=self.device)
        return made.mT if transposed else made

    def _fetched(self, rows: int, ranks: int) -> Tensor:
        """As `shrink` or `parts` store it."""
        return rank_operand(rows, ranks, torch.bfloat16, torch.device(self.device)).zero_()

    def _tail(self, target: Target) -> Tensor | None:
        """What a product reads of s or q: as one that `shrink` stores beside; None where that is float32."""
        p = self.problem
        if p.dtype == p.adapter_dtype == "bfloat16":
            return self._fetched(p.M, p.R)
        if tail_in_parts(p) and target.name in ("sm_90", "sm_100"):  # the persistent one
            return self._fetched(p.M, TAIL_PARTS * p.R)
        return None

    def launch(self, config: TileConfig, target: Target) -> None:
        """One launch of `config`'s kernel."""
        p = self.problem
        base, adapter = p.dtype, p.adapter_dtype
        x = self._empty(p.M, p.K, base)
        weights = p.groups if p.weights > 1 else 0
        w = self._empty(p.K, p.N, base, self.forward, weights)
        a = self._empty(p.K, p.R, adapter, not self.forward, p.groups)
        b = self._empty(p.R, p.N, adapter, self.peft_b == self.forward, p.groups)
        s = self._empty(p.M, p.R, "float32")
        halves = base == adapter == "bfloat16" and not self.float32_s
        rounded = self._fetched(p.M, p.R) if halves else s
        dy = self._empty(p.M, p.N, base)
        bias = self._empty(max(weights, 1), p.N, base) if self.forward else None
        bias = bias[0] if bias is not None and not weights else bias
        offsets = self._empty(1, p.groups + 1, "int32")[0] if p.groups else None
        dtype = getattr(torch, adapter)
        seed = torch.zeros((), dtype=torch.int64, device=self.device)
        mask = Dropout(0.1, seed) if p.dropout else None
        column, z = (self._empty(1, p.N, "float32")[0], dy) if self.scaled else (None, None)
        own: dict[str, Any] = {"c": column, "z": z}
        if config.kernel == "shrink" and self.scaled:
            shrink_squares(x, a, config)
        elif config.kernel == "shrink":
            tail = None if offsets is not None else self._tail(target)
            shrink(x, a, 0.5, config, mask, offsets=offsets, release=target.tma, rounded=tail)
        elif config.kernel == "expand":
            own |= {"offsets": offsets, "late_wait": target.tma and self.forward}  # dx never waits
            expand(x, w, rounded, b, bias, config, mask, **own)
        elif config.kernel == "one_launch":
            first = Shrink(a, 0.5, s, mask)
            expand(x, w, rounded, b, bias, config, **own, first=first)
        elif config.kernel == "persistent":
            if tail_in_parts(p):
                made = self._fetched(p.N, TAIL_PARTS * p.R)
                b = made.t() if b.stride(1) != 1 else made.new_empty((TAIL_PARTS * p.R, p.N))
            tail = self._tail(target)
            own = {"late_wait": True, "release": not config.ctas, "dropout": mask}
            persistent(x, w, tail, b, bias, config, target.multiprocessors, **own)
        elif config.kernel == "persistent_one_launch":
            first = Shrink(a, 0.5, s, None)
            persistent(x, w, rounded, b, bias, config, target.multiprocessors, first=first)
        elif config.kernel == "one_pass":
            one_pass(x, w, a, b, 0.5, bias, config, mask, **own)
        elif config.kernel == "decode":
            if p.weight_format != DENSE:
                w = sample(p.weight_format, p.N, p.K, x.dtype, self.device).t()
            decode(x, w, a, b, 0.5, bias, config, **own)
        elif config.kernel == "dequantise":
            dequantise(sample(p.weight_format, p.N, p.K, x.dtype, self.device), w.t(), config)
        elif config.kernel == "wgrad" and self.scaled:
            scaled_gradient(dy, column, z, config)
        elif config.kernel == "wgrad":
            alone = WGRAD_BESIDE.get(target.name) != replace(config, split=1)
            own = {"offsets": offsets, "beside": not alone and not p.groups}
            wgrad(*((x, rounded) if self.forward else (s, dy)), dtype, config, mask, **own)
        elif self.scaled:
            scaled_shrink_wgrad(dy, b.t(), 0.5, s, dtype, config, column, z)
        else:
            shrink_wgrad(dy, b.t(), 0.5, s, dtype, config)
