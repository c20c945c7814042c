"""Measures choices of algorithm and tile on a GPU, each checked against float64 first: what `tune` searches with."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lora_kernels import dispatch
from lora_kernels.backends.base import Backend
from lora_kernels.backends.composite import BACKEND as COMPOSITE
from lora_kernels.bench import contenders
from lora_kernels.bench.clock import Call, Clock, clock_for, interleaved
from lora_kernels.bench.linear import Effort
from lora_kernels.bench.statistics import summary
from lora_kernels.problem import Problem
from lora_kernels.tuning.select import Choice
from lora_kernels.tuning.targets import Target

ALPHA = 0.5


class Product:
    """y = x·w + s·b of a problem, w in the problem's layout, by any choice."""

    def __init__(self, problem: Problem, device: str = "cuda") -> None:
        self.problem = replace(problem, device=device)
        layer, (x, _) = contenders.make_layer(self.problem), contenders.make_input(self.problem)
        w = layer.weight.t() if problem.w_k_major else layer.weight.t().contiguous()
        self.operands = tuple(t.detach() for t in (x, w, layer.A, layer.B))
        self.exact = self._y(COMPOSITE, tuple(t.double() for t in self.operands))
        error = self._error(self._y(dispatch.get("eager"), self.operands))
        eps = torch.finfo(self.operands[0].dtype).eps
        self.allowed = 2 * error + 4 * eps * self.exact.abs().max().item()

    def call(self, choice: Choice) -> Call:
        """The product by `choice`; ATen's for "aten"."""
        backend = dispatch.get("eager") if choice.algorithm == "aten" else _fixed(choice)
        return lambda: self._y(backend, self.operands)

    def wrong(self, call: Call) -> str | None:
        """Why this product must not be used, or None: it raises, or it is off by more than the plain one may be."""
        try:
            error = self._error(call())  # type: ignore[arg-type]
        except Exception as raised:  # compilers and drivers fail in any way
            text = str(raised).strip()
            return f"{type(raised).__name__}: {text.splitlines()[0] if text else ''}"
        if not error <= self.allowed:
            return f"off by {error:.1e}, allowed {self.allowed:.1e}"
        return None

    def measure(
        self, choices: list[Choice], effort: Effort, clock: Clock | None = None
    ) -> list[float | str]:
        """Median microseconds of each choice, or why it does not count."""
        calls: dict[str, Call] = {}
        told: dict[int, str] = {}
        for index, choice in enumerate(choices):
            call = self.call(choice)
            reason = self.wrong(call)
            if reason is None:
                calls[str(index)] = call
            else:
                told[index] = reason
        taken = {}
        if calls:
            clock = clock or clock_for(self.operands[0].device.type)
            taken = interleaved(calls, clock, seconds=effort.seconds, rounds=effort.rounds)
        return [
            told[index] if index in told else summary(taken[str(index)]).median
            for index in range(len(choices))
        ]

    def _y(self, backend: Backend, operands: tuple[Tensor, ...]) -> Tensor:
        x, w, a, b = operands
        return backend.lowrank_matmul(x, w, a, b, ALPHA)[0]

    def _error(self, y: Tensor) -> float:
        return (y.double() - self.exact).abs().max().item()


def _fixed(choice: Choice) -> Backend:
    """The Triton backend, made to take `choice` for every product."""
    from lora_kernels.backends.triton import TritonBackend

    class Fixed(TritonBackend):
        def _choice(self, problem: Problem, target: Target) -> Choice:
            return choice

    return Fixed()
