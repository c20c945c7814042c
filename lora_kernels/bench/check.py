"""Correctness before speed: a contender's result and gradients against float64, within what the plain formula is off."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lora_kernels.bench import contenders
from lora_kernels.bench.contenders import Built
from lora_kernels.problem import Problem

NAMES = ("y", "dx", "dA", "dB")
FACTOR, ROUNDINGS = 2.0, 4.0


class Wrong(AssertionError):
    """A contender that is off by more than the budget."""


class Oracle:
    """Random operands of a problem, and their y, dx, dA and dB in float64 and by the plain formula in their own dtypes."""

    def __init__(self, problem: Problem) -> None:
        self.layer, (self.x, self.dy) = (
            contenders.make_layer(problem),
            contenders.make_input(problem),
        )
        wide = contenders.build("reference", self.layer.double())
        self.exact = _results(wide, self.x.detach().double().requires_grad_(), self.dy.double())
        self.plain = _results(contenders.build("reference", self.layer), self.x, self.dy)

    def check(self, name: str, built: Built) -> float:
        """The largest error relative to the largest value, for a contender with adapters.

        `Wrong` where y or a gradient is off by more than `relative_error` allows, or is not a number.
        """
        found = _results(built, self.x, self.dy)
        longest = max(*self.x.shape, *self.dy.shape)
        return max(
            relative_error(
                f"{name}: {what}", found[what], self.exact[what], self.plain[what], longest
            )
            for what in NAMES
        )


def relative_error(what: str, found: Tensor, exact: Tensor, plain: Tensor, longest: int) -> float:
    """The largest error of `found` from float64, relative to the largest value. `Wrong` where it is too large or NaN.

    Allowed are twice what the plain formula is off, four roundings of the result, and what sums of `longest` terms, in
    float32, may be off by their order: a random walk over the roundings of the accumulator.
    """
    if found.shape != exact.shape:
        raise Wrong(f"{what} is {list(found.shape)}, not {list(exact.shape)}")
    largest = exact.abs().max().item() if exact.numel() else 0.0
    accumulator = torch.promote_types(found.dtype, torch.float32)
    walk = 2 * math.sqrt(longest) * torch.finfo(accumulator).eps
    roundings = ROUNDINGS * torch.finfo(found.dtype).eps + walk
    error, allowed = _distance(found, exact), FACTOR * _distance(plain, exact) + roundings * largest
    if not error <= allowed:  # so that NaN is wrong
        raise Wrong(f"{what} is off by {error:.1e}, allowed {allowed:.1e}")
    return error / max(largest, 1e-30)


def _distance(t: Tensor, exact: Tensor) -> float:
    return (t.double() - exact).abs().max().item() if exact.numel() else 0.0


def _results(built: Built, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    y = built.function(x)
    dx, dA, dB = torch.autograd.grad(y, (x, *built.trained), dy)
    if built.transposed:
        dA, dB = dA.t(), dB.t()
    return {"y": y.detach(), "dx": dx, "dA": dA, "dB": dB}
