"""A backend's products for the operands of each call, for tests that hold operands and no plan."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels.backends.base import Backend, Products, fastest, left_is_wide
from lora_kernels.dropout import Dropout
from lora_kernels.operands import Adapter, Weight, layout_of, name_of
from lora_kernels.problem import DENSE, Problem
from lora_kernels.tuning.targets import Target


class Planned(Products):
    """The products of `algorithm` where it can compute the call, else of the backend's fastest candidate."""

    def __init__(self, backend: Backend, target: Target, algorithm: str | None = None) -> None:
        self.backend, self.target, self.algorithm = backend, target, algorithm

    def shrink(self, x: Tensor, adapter: Adapter) -> Tensor:
        return self._of(x, adapter.A.dtype, adapter.A.shape[1], adapter).shrink(x, adapter)

    def expand(self, x, w, s, adapter, bias=None):
        return self._of(x, adapter.B.dtype, s.shape[1], adapter, w).expand(x, w, s, adapter, bias)

    def wgrad(self, left, right, dtype, dropout: Dropout | None = None):
        wide, lowrank = (left, right) if left_is_wide(left, right, dropout) else (right, left)
        return self._of(wide, dtype, lowrank.shape[1]).wgrad(left, right, dtype, dropout)

    def shrink_expand(self, x, w, adapter, bias=None):
        products = self._of(x, adapter.A.dtype, adapter.A.shape[1], adapter, w)
        return products.shrink_expand(x, w, adapter, bias)

    def shrink_wgrad(self, dy, adapter, s, dtype):
        return self._of(dy, dtype, s.shape[1]).shrink_wgrad(dy, adapter, s, dtype)

    def gradients(self, dy, w, adapter, x, s, dtype):
        products = self._of(dy, adapter.A.dtype, s.shape[1], adapter, w, backward=True)
        return products.gradients(dy, w, adapter, x, s, dtype)

    def _of(
        self,
        x: Tensor,
        adapter_dtype: torch.dtype,
        R: int,
        adapter: Adapter | None = None,
        w: Weight | None = None,
        backward: bool = False,
    ) -> Products:
        masks = () if adapter is None else (adapter.dropout_in, adapter.dropout_out)
        w_k_major, weight_format = True, DENSE
        if w is not None:
            w_k_major, weight_format = layout_of(w.t())
            w_k_major = getattr(w, "transposed", w_k_major)  # a packed weight lies as [N, K]
        problem = Problem(
            M=x.shape[0],
            N=0 if w is None else w.shape[1],
            K=x.shape[1],
            R=R,
            dtype=name_of(x.dtype),
            adapter_dtype=name_of(adapter_dtype),
            device="cuda",
            dropout=any(mask is not None for mask in masks),
            w_k_major=w_k_major,
            weight_format=weight_format,
            backward=backward,
        )
        able = [c for c in self.backend.candidates(problem, self.target) if c.refusal is None]
        named = [c for c in able if c.name == self.algorithm]
        chosen = fastest(named or able)
        assert chosen is not None and chosen.products is not None, problem
        return chosen.products
