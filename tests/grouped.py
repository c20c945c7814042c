"""Problems over groups of rows, and what must come out of them: a loop over the groups, in any dtype and in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from lora_kernels import grouped_lora_linear
from lora_kernels.dropout import Dropout, scaled_mask
from tests.oracle import assert_budget, reference

NAMES = ("x", "weight", "A", "B", "bias")
EVERY = (True,) * 5
SEED = 0x1234_5678_9ABC


def loop(tensors: Sequence[Tensor | None], offsets: Sequence[int], scale, mask=None) -> Tensor:
    """The definition, one group after another: of x, weight, A, B and bias, with a number or a tensor as scale."""
    x, weight, A, B, bias = tensors
    scales = torch.as_tensor(scale).expand(A.shape[0]).tolist()
    parts = [
        reference(
            x[begin:end],
            weight[g] if weight.ndim == 3 else weight,
            A[g],
            B[g],
            scales[g],
            bias if bias is None or bias.ndim == 1 else bias[g],
            None if mask is None else mask[begin:end],
        )
        for g, (begin, end) in enumerate(pairwise(offsets))
    ]
    return torch.cat(parts)


@dataclass(frozen=True)
class Grouped:
    """One problem: rows `offsets[g]` up to `offsets[g + 1]` of x are group g's."""

    offsets: Sequence[int]
    K: int
    N: int
    R: int
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype | None = None
    shared: bool = False  # one weight for all groups
    bias: bool = True
    own_bias: bool | None = None  # None: as the weight
    dropout: float = 0.0
    layout: str = "linear"
    device: str = "cpu"

    def __str__(self) -> str:
        types = "+".join(str(t)[6:] for t in (self.dtype, self.adapter_dtype) if t is not None)
        offsets = "-".join(map(str, self.offsets[:7]))
        words = [
            types,
            self.layout,
            "shared" * self.shared,
            f"p{self.dropout}" * bool(self.dropout),
        ]
        words += (
            ["no bias"]
            if not self.bias
            else [f"own_bias={self.own_bias}"] * (self.own_bias is not None)
        )
        return f"{offsets}: {self.K}x{self.N}r{self.R} {' '.join(filter(None, words))}"

    @property
    def T(self) -> int:
        return self.offsets[-1]

    def operands(self) -> tuple[Tensor | None, ...]:
        """x [T, K], weight [G, N, K] or [N, K], A [G, K, R], B [G, R, N], bias [G, N] or [N], scale [G], dy [T, N]."""
        generator = torch.Generator().manual_seed(self.T + 101 * self.K + 10007 * self.N + self.R)
        G, adapter = len(self.offsets) - 1, self.adapter_dtype or self.dtype
        own_bias = not self.shared if self.own_bias is None else self.own_bias

        def normal(*shape: int, dtype: torch.dtype = self.dtype, over: int = 1) -> Tensor:
            values = torch.randn(shape, generator=generator, dtype=torch.float64)
            return self._laid_out((values / max(over, 1) ** 0.5).to(dtype)).to(self.device)

        x, dy = normal(self.T, self.K), normal(self.T, self.N)
        weight = normal(*(() if self.shared else (G,)), self.N, self.K, over=self.K)
        A = normal(G, self.K, self.R, dtype=adapter, over=self.K)
        B = normal(G, self.R, self.N, dtype=adapter, over=self.R)
        bias = normal(*((G,) if own_bias else ()), self.N) if self.bias else None
        scale = torch.rand(G, generator=generator).to(self.device) + 0.5
        return x, weight, A, B, bias, scale, dy

    def results(self, backend: str, needed: Sequence[bool] = EVERY) -> dict[str, Tensor]:
        """y and the gradients of <y, dy> that are needed, by `grouped_lora_linear`."""
        *tensors, scale, dy = self.operands()
        leaves = _leaves(tensors, needed)
        x, weight, A, B, bias = leaves
        offsets = torch.tensor(self.offsets, dtype=torch.int32, device=self.device)
        options = {"dropout_p": self.dropout, "seed": SEED, "backend": backend}
        y = grouped_lora_linear(x, weight, A, B, offsets, scale, bias, **options)
        return _with_gradients(y, leaves, dy)

    def expected(
        self, dtype: torch.dtype | None, needed: Sequence[bool] = EVERY
    ) -> dict[str, Tensor]:
        """The same by a loop over the groups, in float64 for `dtype` float64, else as eager rounds it (None)."""
        *tensors, scale, dy = (
            t if t is None or dtype is None else t.to(dtype) for t in self.operands()
        )
        leaves = _leaves(tensors, needed)
        mask = None
        if self.dropout:
            dropout = Dropout(self.dropout, torch.tensor(SEED, device=self.device))
            mask = scaled_mask(dropout, self.T, self.K, leaves[0].dtype)
        return _with_gradients(loop(leaves, self.offsets, scale, mask), leaves, dy)

    def check(self, backend: str, needed: Sequence[bool] = EVERY) -> None:
        """`backend` is within budget."""
        self.compare(self.results(backend, needed), needed)

    def compare(self, actual: dict[str, Tensor], needed: Sequence[bool] = EVERY) -> None:
        """`actual`, of `results`, is within budget."""
        eager, exact = self.expected(None, needed), self.expected(torch.float64, needed)
        assert actual.keys() == exact.keys()
        for name, value in actual.items():
            assert_budget(value, eager[name], exact[name], f"{name} of {self}")

    def _laid_out(self, t: Tensor) -> Tensor:
        if self.layout == "transposed" and t.ndim > 1:
            return t.mT.contiguous().mT
        if self.layout == "sliced":
            return torch.stack((torch.full_like(t, torch.nan), t), -1)[..., 1]
        return t


def _leaves(tensors: Sequence[Tensor | None], needed: Sequence[bool]) -> list[Tensor | None]:
    pairs = zip(tensors, needed, strict=True)
    return [t if t is None else t.detach().requires_grad_(need) for t, need in pairs]


def _with_gradients(y: Tensor, leaves: Sequence[Tensor | None], dy: Tensor) -> dict[str, Tensor]:
    named = {n: t for n, t in zip(NAMES, leaves, strict=True) if t is not None and t.requires_grad}
    grads = torch.autograd.grad(y, list(named.values()), dy, allow_unused=True) if named else ()
    zeros = (
        torch.zeros_like(t) if g is None else g for g, t in zip(grads, named.values(), strict=True)
    )
    return {"y": y.detach(), **dict(zip(named, zeros, strict=True))}
