"""Launches every configuration that selection can return for a GPU: on shapes alone, to compile it, or on values."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lora_kernels.backends.triton.configs import untried
from lora_kernels.backends.triton.decode import decode
from lora_kernels.backends.triton.dequantise import dequantise
from lora_kernels.backends.triton.expand import Shrink, expand
from lora_kernels.backends.triton.launch import rank_operand, rank_tail
from lora_kernels.backends.triton.one_pass import one_pass
from lora_kernels.backends.triton.parts import parts
from lora_kernels.backends.triton.scale import scaled_gradient
from lora_kernels.backends.triton.shrink import shrink, shrink_squares
from lora_kernels.backends.triton.shrink_wgrad import shrink_wgrad
from lora_kernels.backends.triton.wgrad import wgrad
from lora_kernels.dropout import Dropout
from lora_kernels.problem import DENSE, Problem
from lora_kernels.samples import sample
from lora_kernels.tuning.config import TAIL_PARTS, WGRAD_BESIDE, TileConfig, tail_in_parts
from lora_kernels.tuning.targets import Target
from tests.oracle import Operands

if untried() is None:
    from lora_kernels.backends.triton.persistent import fetchable, persistent


def tail(s: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """s and b as a persistent product of an x of `dtype` copies them."""
    if rank_tail(dtype, b.dtype, tma=True) == "split":
        return parts(s.float(), b, TileConfig("shrink", 64, 1, 64, 4, 3))
    return rank_operand(*s.shape, dtype, s.device).copy_(s), fetchable(b)


@dataclass(frozen=True)
class Shapes:
    """Meta tensors of a problem, or zeros; `forward` says which way the weights and adapters lie in memory.

    `peft_b`: a and b lie as PEFT stores them, b of a forward along the rank, of dx along N. `scaled`: with DoRA's column
    scale, and z. `float32_s`: s and q are float32 also where x and the adapter are bfloat16. With `values` they are those,
    of a forward or of dx, as they lie there; for these the results are right.
    """

    problem: Problem
    forward: bool
    peft_b: bool = False
    scaled: bool = False
    float32_s: bool = False
    device: str = "meta"
    values: Operands | None = None

    def _empty(
        self, rows: int, cols: int, dtype: str, transposed: bool = False, count: int = 0
    ) -> Tensor:
        shape = (cols, rows) if transposed else (rows, cols)
        stack = (count,) if count else ()
        made = torch.zeros((*stack, *shape), dtype=getattr(torch, dtype), device=self.device)
        return made.mT if transposed else made

    def _offsets(self) -> Tensor:
        """No row, one row, all others, and then no more."""
        rows = [0, 0, 1, *[self.problem.M] * (self.problem.groups - 2)]
        return torch.tensor(rows, dtype=torch.int32).to(self.device)

    def _fetched(self, rows: int, ranks: int) -> Tensor:
        """As `shrink` or `parts` store it."""
        device = self.device if self.values is None else self.values.x.device
        return rank_operand(rows, ranks, torch.bfloat16, torch.device(device)).zero_()

    def _tail(self, target: Target) -> Tensor | None:
        """What `shrink` stores s or q in, beside, for a product to read; None where that reads float32."""
        p = self.problem
        if p.dtype == p.adapter_dtype == "bfloat16":
            return self._fetched(p.M, p.R)
        if tail_in_parts(p) and target.name in ("sm_90", "sm_100"):  # the persistent one
            return self._fetched(p.M, TAIL_PARTS * p.R)
        return None

    def _in_parts(self, s: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """s and b as the persistent product reads them."""
        p = self.problem
        if self.values is not None or not tail_in_parts(p):
            return tail(s, b, getattr(torch, p.dtype))
        made = self._fetched(p.N, TAIL_PARTS * p.R)
        by_rank = made.t() if b.stride(1) != 1 else made.new_empty((TAIL_PARTS * p.R, p.N))
        return self._fetched(p.M, TAIL_PARTS * p.R), by_rank

    def launch(self, config: TileConfig, target: Target) -> dict[str, Tensor]:
        """One launch of `config`'s kernel; its results by the names that `Operands.results` has for them.

        "rounded": s or q as it is stored beside, in bfloat16.
        """
        p = self.problem
        base, adapter = p.dtype, p.adapter_dtype
        dtype = getattr(torch, adapter)
        weights = p.groups if p.weights > 1 else 0
        if (o := self.values) is not None:
            found = o.results(None)
            s, q = found["s"].float(), found["q"].float()
            dy, mask, alpha = o.dy, o.dropout, o.case.alpha
            x, w, a, b, bias = o.x, o.w, o.a, o.b, o.bias
            if not self.forward:
                x, w, a, b, bias, s, q = dy, w.t(), b.t(), a.t(), None, q, s
        else:
            x = self._empty(p.M, p.K, base)
            w = self._empty(p.K, p.N, base, self.forward, weights)
            a = self._empty(p.K, p.R, adapter, self.peft_b == self.forward, p.groups)
            b = self._empty(p.R, p.N, adapter, self.peft_b == self.forward, p.groups)
            q = s = self._empty(p.M, p.R, "float32")
            dy = self._empty(p.M, p.N, base)
            bias = self._empty(max(weights, 1), p.N, base) if self.forward else None
            bias = bias[0] if bias is not None and not weights else bias
            seed = torch.zeros((), dtype=torch.int64, device=self.device)
            mask, alpha = Dropout(0.1, seed) if p.dropout else None, 0.5
        if not self.forward and config.kernel not in ("expand", "persistent"):
            mask = None  # q, dB and a dx with q have none
        halves = base == adapter == "bfloat16" and not self.float32_s
        rounded = self._fetched(p.M, p.R).copy_(s) if halves else s
        offsets = self._offsets() if p.groups else None
        column, z = (self._empty(1, p.N, "float32")[0], dy) if self.scaled else (None, None)
        own: dict[str, Any] = {"c": column, "z": z}
        product, lowrank = ("y", "s") if self.forward else ("dx", "q")
        if config.kernel == "shrink" and self.scaled:
            shrink_squares(x, a, config)
        elif config.kernel == "shrink":
            stored = None if offsets is not None else self._tail(target)
            own = {"offsets": offsets, "release": target.tma, "rounded": stored}
            beside = {"rounded": stored} if halves and stored is not None else {}
            return {lowrank: shrink(x, a, alpha, config, mask, **own), **beside}
        elif config.kernel == "expand":
            own |= {"offsets": offsets, "late_wait": target.tma and self.forward}  # dx never waits
            return {product: expand(x, w, rounded, b, bias, config, mask, **own)}
        elif config.kernel == "one_launch":
            first = Shrink(a, alpha, torch.full_like(s, torch.nan), mask)
            rounded = rounded.fill_(torch.nan)  # nothing that it reads is written before
            y = expand(x, w, rounded, b, bias, config, **own, first=first)
            return {product: y, lowrank: first.whole, "rounded": rounded}
        elif config.kernel == "persistent":
            programs = target.multiprocessors if o is None else 2 * max(1, config.ctas)
            own = {"late_wait": True, "release": not config.ctas, "dropout": mask}
            s, b = self._in_parts(s, b)
            return {product: persistent(x, w, s, b, bias, config, programs, **own)}
        elif config.kernel == "persistent_one_launch":
            programs = target.multiprocessors if o is None else 2
            first = Shrink(fetchable(a.t()).t(), alpha, torch.full_like(s, torch.nan), None)
            rounded = rounded.fill_(torch.nan)
            y = persistent(x, w, rounded, fetchable(b), bias, config, programs, first=first)
            return {product: y, lowrank: first.whole, "rounded": rounded}
        elif config.kernel == "one_pass":
            found = one_pass(x, w, a, b, alpha, bias, config, mask, **own)
            return dict(zip((product, lowrank), found, strict=True))
        elif config.kernel == "decode":
            if p.weight_format != DENSE:
                w = sample(p.weight_format, p.N, p.K, x.dtype, x.device).t()
            found = decode(x, w, a, b, alpha, bias, config, **own)
            return dict(zip((product, lowrank), found, strict=True))
        elif config.kernel == "dequantise":
            packed = sample(p.weight_format, p.N, p.K, x.dtype, x.device)
            out = torch.full_like(w.t(), torch.nan)
            dequantise(packed, out, config)
            return {"w": out.t()}
        elif config.kernel == "wgrad" and self.scaled:
            scaled_gradient(dy, column, z, config)
        elif config.kernel == "wgrad":
            alone = WGRAD_BESIDE.get(target.name) != replace(config, split=1)
            own = {"offsets": offsets, "beside": not alone and not p.groups}
            stored = self._fetched(p.M, p.R).copy_(q) if halves else q
            of = (x, stored) if self.forward else (q, dy)
            return {"dA" if self.forward else "dB": wgrad(*of, dtype, config, mask, **own)}
        else:
            q, dB, *_ = shrink_wgrad(dy, b.t(), alpha, s, dtype, config, column, z)
            return {} if self.scaled else {"q": q, "dB": dB}
        return {}
