"""Measures choices of algorithm and tile on a GPU, each checked against float64 first: what `tune` searches with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from lora_kernels import backends
from lora_kernels.ahead import compile_ahead
from lora_kernels.backends.base import Products, fastest
from lora_kernels.backends.composite import PRODUCTS as COMPOSITE
from lora_kernels.backends.device import current_target
from lora_kernels.backends.eager import PRODUCTS as EAGER
from lora_kernels.backends.triton.configs import ALGORITHMS, unmasked
from lora_kernels.backends.triton.products import TritonProducts
from lora_kernels.bench import contenders
from lora_kernels.bench.check import Wrong, relative_error
from lora_kernels.bench.clock import Call, Clock, clock_for, interleaved
from lora_kernels.bench.linear import Effort, first_line
from lora_kernels.bench.results import summary
from lora_kernels.dropout import Dropout
from lora_kernels.operands import Adapter, Weight
from lora_kernels.problem import DENSE, Problem
from lora_kernels.samples import sample
from lora_kernels.tuning.config import runs_beside
from lora_kernels.tuning.search import Choice
from lora_kernels.tuning.tables import lowrank

ALPHA = 0.5
Results = tuple[Tensor, ...]


class Measured(ABC):
    """What several choices compute from one set of operands."""

    def __init__(self, problem: Problem, device: str) -> None:
        self.problem = replace(problem, device=device)

    @abstractmethod
    def call(self, choice: Choice) -> Callable[[], Results]:
        """The computation by `choice`."""

    @abstractmethod
    def expected(self, algorithm: str) -> tuple[Results, Results]:
        """(results in float64, results of plain ATen) of what `algorithm` computes."""

    def wrong(self, choice: Choice) -> str | None:
        """Why `choice` must not be used, or None: it raises, or it is off by more than the plain one may be."""
        return self._compared(self.call(choice), self.expected(choice.algorithm))

    def _compared(
        self, call: Callable[[], Results], expected: tuple[Results, Results]
    ) -> str | None:
        longest = max(self.problem.M, self.problem.N, self.problem.K)
        try:
            for actual, exact, plain in zip(call(), *expected, strict=True):
                relative_error("the result", actual, exact, plain, longest)
        except Wrong as wrong:
            return str(wrong)
        except Exception as raised:  # compilers and drivers fail in any way
            return f"{type(raised).__name__}: {first_line(raised)}"
        return None

    def measure(
        self, choices: list[Choice], effort: Effort, clock: Clock | None = None
    ) -> list[float | str]:
        """Median microseconds of each choice, or why it does not count."""
        compile_ahead(map(self.call, choices), torch.device(self.problem.device))
        reasons = [self.wrong(choice) for choice in choices]
        calls: dict[str, Call] = {
            str(index): self.call(choices[index]) for index, why in enumerate(reasons) if not why
        }
        taken = {}
        if calls:
            clock = clock or clock_for(self.problem.device)
            taken = interleaved(calls, clock, seconds=effort.seconds, rounds=effort.rounds)
        return [why or summary(taken[str(index)]).median for index, why in enumerate(reasons)]


class Product(Measured):
    """y = x·w + s·b of a problem, w in the problem's layout."""

    def __init__(self, problem: Problem, device: str = "cuda") -> None:
        super().__init__(problem, device)
        layer, (x, _) = contenders.make_layer(self.problem), contenders.make_input(self.problem)
        w: Weight = layer.weight.t() if problem.w_k_major else layer.weight.t().contiguous()
        if problem.weight_format != DENSE:  # stored as [N, K] of the forward
            stored = (problem.N, problem.K) if problem.w_k_major else (problem.K, problem.N)
            w = sample(problem.weight_format, *stored, x.dtype, device)
            w = w.t() if problem.w_k_major else w
        x, self.w, a, b = x.detach(), w, layer.A.detach(), layer.B.detach()
        self.operands = x, w if isinstance(w, Tensor) else w.dense(), a, b
        exact = _y(COMPOSITE, *(t.double() for t in self.operands))
        self._expected = exact, _y(EAGER, *self.operands)

    def call(self, choice: Choice) -> Callable[[], Results]:
        products = self._products(choice)
        w, (x, _, a, b) = self.w, self.operands
        if isinstance(w, Tensor) or choice.algorithm in ALGORITHMS:
            return lambda: _y(products, x, w, a, b)
        return lambda: _y(products, x, w.dense(), a, b)  # as the plan does it, in each call

    def wrong(self, choice: Choice) -> str | None:
        reason = super().wrong(choice)
        if reason is None and choice.algorithm == "persistent":
            reason = self._backward_wrong(choice)
        return reason

    def _backward_wrong(self, choice: Choice) -> str | None:
        """Why what only a backward runs must not be used: dA and dB beside dx, and a mask of dx."""
        config, target = choice.tiles.config("persistent"), current_target()
        back = replace(self.problem, backward=True)
        masked = replace(back, dropout=True)
        dy, w, a, b = self.operands
        adapter, wide = Adapter(a, b, ALPHA), Adapter(a.double(), b.double(), ALPHA)
        reason = None
        if runs_beside(config, back, target):
            x = torch.randn_like(dy[:, :1].expand(-1, w.shape[1]))
            s = COMPOSITE.shrink(x, adapter.t())
            products = TritonProducts("persistent", back, target, choice.tiles)
            doubles = dy.double(), w.double(), wide, x.double(), s.double(), torch.float64
            exact = COMPOSITE.gradients(*doubles)
            plain = EAGER.gradients(dy, w, adapter, x, s, a.dtype)
            call = partial(products.gradients, dy, w, adapter, x, s, a.dtype)
            reason = self._compared(call, (exact, plain))
        if reason is None and unmasked(config, masked) is None:
            mask = Dropout(0.25, torch.tensor(7, device=dy.device))
            adapter, wide = (each._replace(dropout_out=mask) for each in (adapter, wide))
            q = COMPOSITE.shrink(dy, adapter)
            products = TritonProducts("persistent", masked, target, choice.tiles)
            expected = (
                (COMPOSITE.expand(dy.double(), w.double(), q.double(), wide),),
                (EAGER.expand(dy, w, q, adapter),),
            )
            reason = self._compared(lambda: (products.expand(dy, w, q, adapter),), expected)
        return reason

    def _products(self, choice: Choice) -> Products:
        """The products that `choice` asks for: Triton's with its tiles, or those of a backend without tiles."""
        if choice.algorithm in ALGORITHMS:
            return TritonProducts(choice.algorithm, self.problem, current_target(), choice.tiles)
        if choice.algorithm == "eager":
            return EAGER
        found = fastest(backends.get("cuda").candidates(self.problem, current_target()))
        assert found is not None and found.products is not None
        return found.products

    def expected(self, algorithm: str) -> tuple[Results, Results]:
        return self._expected


class LowRank(Measured):
    """The kernels that read x and no weight, each alone: s = alpha·x·a; dA = xᵀ·q; and both from one reading of x."""

    def __init__(self, problem: Problem, device: str = "cuda") -> None:
        super().__init__(lowrank(problem), device)
        layer, (x, _) = contenders.make_layer(self.problem), contenders.make_input(self.problem)
        s = torch.randn(problem.M, problem.R, generator=torch.Generator().manual_seed(2))
        self.operands = x.detach(), layer.A.detach(), s.to(device)

    def call(self, choice: Choice) -> Callable[[], Results]:
        x, a, s = self.operands
        (config,) = choice.tiles.configs
        if choice.algorithm == "shrink":
            from lora_kernels.backends.triton.shrink import shrink

            return lambda: (shrink(x, a, ALPHA, config),)
        if choice.algorithm == "wgrad":
            from lora_kernels.backends.triton.wgrad import wgrad

            return lambda: (wgrad(x, s, a.dtype, config),)
        from lora_kernels.backends.triton.shrink_wgrad import shrink_wgrad

        # In the backward it is Bᵀ that it reads, and B lies as [R, N].
        b_t = a.t().contiguous().t()
        return lambda: shrink_wgrad(x, b_t, ALPHA, s, a.dtype, config)[:2]

    def expected(self, algorithm: str) -> tuple[Results, Results]:
        wide = tuple(t.double() for t in self.operands)
        return _lowrank(COMPOSITE, algorithm, *wide), _lowrank(EAGER, algorithm, *self.operands)


def _y(products: Products, x: Tensor, w: Weight, a: Tensor, b: Tensor) -> Results:
    return (products.shrink_expand(x, w, Adapter(a, b, ALPHA))[0],)


def _lowrank(products: Products, kernel: str, x: Tensor, a: Tensor, s: Tensor) -> Results:
    if kernel == "wgrad":
        return (products.wgrad(x, s, a.dtype),)
    adapter = Adapter(a, a.t(), ALPHA)
    if kernel == "shrink":
        return (products.shrink(x, adapter),)
    return products.shrink_wgrad(x, adapter, s, a.dtype)
