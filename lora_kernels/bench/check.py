"""Correctness before speed: a contender's result and gradients against float64, within what the plain formula is off."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lora_kernels.bench import contenders
from lora_kernels.bench.contenders import Built, Layer

NAMES = ("y", "dx", "dA", "dB")
FACTOR, ROUNDINGS = 2.0, 4.0


class Wrong(AssertionError):
    """A contender that is off by more than the budget."""


class Oracle:
    """y, dx, dA and dB of a layer on an input, in float64 and by the plain formula in the layer's own dtypes."""

    def __init__(self, layer: Layer, x: Tensor, dy: Tensor) -> None:
        self.x, self.dy = x, dy
        wide = Layer(*(None if t is None else _wide(t) for t in layer_tensors(layer)), layer.alpha)  # type: ignore
        self.exact = _results(_plain(wide), _wide(x), dy.double())
        self.plain = _results(_plain(layer), x, dy)
        self.error = _errors(self.plain, self.exact)

    def _roundings(self, dtype: torch.dtype) -> float:
        """Relative: a sum's order is free, so its error is a random walk over the roundings of its accumulator."""
        accumulator = torch.promote_types(dtype, torch.float32)
        steps = math.sqrt(max(*self.x.shape, *self.dy.shape))
        return ROUNDINGS * torch.finfo(dtype).eps + 2 * steps * torch.finfo(accumulator).eps

    def check(self, name: str, built: Built) -> float:
        """The largest error relative to the largest value, for a contender with adapters.

        `Wrong` where y or a gradient is off by more than twice what the plain formula is off, plus four roundings of the
        result and what sums of the longest side's length, in float32, may be off by their order.
        """
        found = _results(built, self.x, self.dy)
        worst = 0.0
        for what, error in _errors(found, self.exact).items():
            largest = max(self.exact[what].abs().max().item(), 1e-30)
            allowed = FACTOR * self.error[what] + self._roundings(found[what].dtype) * largest
            if not error <= allowed:
                raise Wrong(f"{name}: {what} is off by {error:.2e}, allowed {allowed:.2e}")
            worst = max(worst, error / largest)
        return worst


def layer_tensors(layer: Layer) -> tuple[Tensor | None, ...]:
    return layer.weight, layer.bias, layer.A, layer.B


def _wide(t: Tensor) -> Tensor:
    return t.detach().double().requires_grad_(t.requires_grad)


def _plain(layer: Layer) -> Built:
    return contenders.build("reference", layer)


def _results(built: Built, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    y = built.function(x)
    dx, dA, dB = torch.autograd.grad(y, (x, *built.trained), dy)
    if built.transposed:
        dA, dB = dA.t(), dB.t()
    return {"y": y.detach(), "dx": dx, "dA": dA, "dB": dB}


def _errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    errors = {}
    for name in NAMES:
        if found[name].shape != exact[name].shape:
            raise Wrong(f"{name} is {list(found[name].shape)}, not {list(exact[name].shape)}")
        difference = (found[name].double() - exact[name]).abs()
        errors[name] = difference.max().item() if difference.numel() else 0.0
    return errors
