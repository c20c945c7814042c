"""The choice of a backend: for a problem on a device, who computes it, and one reason for each that does not.

Auto takes the first backend of the device's list that is available, can compute the problem and does not expect another
one to be faster. An explicit name never falls back: it computes or raises. The choice is made from numbers, when the product
runs; nothing here looks at a device before a tensor on it arrives.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_kernels import env
from lora_kernels.backends.base import Backend
from lora_kernels.formulas import Saved
from lora_kernels.problem import Problem

BACKENDS = ("eager", "cpu", "cuda", "triton")
_PREFERENCE = {"cpu": ("cpu", "eager"), "cuda": ("cuda", "triton", "eager")}
_requested: tuple[str, bool] | None = None  # (name, strict) of the innermost use_backend


@dataclass(frozen=True)
class Explanation:
    """Who computes `problem`, with one reason for each backend that does not, and what the chosen one will do."""

    problem: Problem
    backend: str
    rejected: dict[str, str]
    plan: str = ""

    def __str__(self) -> str:
        chosen = f"{self.backend}: chosen" + (f", {self.plan}" if self.plan else "")
        return "\n".join(
            [str(self.problem), chosen, *(f"{name}: {why}" for name, why in self.rejected.items())]
        )


@contextmanager
def use_backend(name: str, *, strict: bool = False) -> Iterator[None]:
    """Within the block every call that says backend="auto" uses `name`, in every thread of the process.

    `strict` with name "auto" raises RuntimeError where auto would fall back to eager because no faster backend can
    compute the problem. ValueError for an unknown name. Enter it outside of compiled functions.
    """
    global _requested
    check_name(name)
    before, _requested = _requested, (name, strict)
    try:
        yield
    finally:
        _requested = before


def check_name(name: str, argument: str = "backend") -> None:
    """ValueError unless `name` is "auto" or a backend's name."""
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{argument} must be one of {('auto', *BACKENDS)}, got {name!r}")


def get(name: str) -> Backend:
    """The backend called `name`; its module is imported on first use."""
    return importlib.import_module(f"lora_kernels.backends.{name}").BACKEND


def resolve(
    name: str,
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None,
    dropout: bool,
) -> Backend:
    """The backend for a forward call on x [..., K]; RuntimeError where an explicit or strict choice cannot compute it."""
    (N, K), R = weight.shape, A.shape[1]
    return _remembered(
        *_asked(name),
        x.device,
        torch.get_num_threads(),
        x.numel() // K if K else math.prod(x.shape[:-1]),
        N,
        K,
        R,
        x.dtype,
        A.dtype,
        bias is not None,
        dropout,
        weight.stride(1) == 1,
        False,
    )


def resolve_backward(
    name: str, dy: Tensor, saved: Saved, adapter_dtype: torch.dtype, dropout: bool
) -> Backend:
    """The backend for the backward of a call; sizes that no saved tensor tells do not matter to it and count as one."""
    skinny = saved.s if saved.s is not None else (saved.B.t() if saved.B is not None else None)
    wide = saved.weight if saved.weight is not None else saved.x
    return _remembered(
        *_asked(name),
        dy.device,
        torch.get_num_threads(),
        dy.shape[0],
        wide.shape[1] if wide is not None else 1,
        dy.shape[1],
        skinny.shape[1] if skinny is not None else 1,
        dy.dtype,
        adapter_dtype,
        False,
        dropout,
        saved.weight is None or saved.weight.stride(0) == 1,
        True,
    )


def explain(problem: Problem, backend: str = "auto") -> Explanation:
    """Who would compute `problem`, and why not the others: one reason each. ValueError for an unknown name."""
    check_name(backend)
    name, strict = _asked(backend)
    try:
        device = torch.device(problem.device)
    except RuntimeError:
        raise ValueError(f"device must be a torch device type, got {problem.device!r}") from None
    return _choose(name, strict, problem, device)


def _asked(name: str) -> tuple[str, bool]:
    """What a call's backend argument means now: the call's own word, else use_backend's, else the environment's."""
    if name != "auto":
        return name, False
    if _requested is not None and _requested != ("auto", False):
        return _requested
    name = env.backend()
    check_name(name, "LORA_KERNELS_BACKEND")
    return name, False


def _remembered(*facts: Any) -> Backend:
    try:
        return _backend(*facts)
    except _ForNow as choice:
        return choice.backend


class _ForNow(Exception):
    """A choice that is not to be remembered: a backend could not be tested yet."""

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend.name)
        self.backend = backend


@functools.lru_cache(maxsize=4096)
def _backend(
    name: str,
    strict: bool,
    device: torch.device,
    threads: int,
    M: int,
    N: int,
    K: int,
    R: int,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    bias: bool,
    dropout: bool,
    w_k_major: bool,
    backward: bool,
) -> Backend:
    """The backend of a call, remembered by plain facts: making a Problem takes longer than a small product.

    `threads` is part of the key because rules may depend on it.
    """
    problem = Problem(
        M,
        N,
        K,
        R,
        _name(dtype),
        _name(adapter_dtype),
        device.type,
        bias,
        dropout,
        w_k_major,
        backward,
    )
    explanation = _choose(name, strict, problem, device)
    if device.type == "cuda":
        from lora_kernels.selftest import NOT_NOW

        if NOT_NOW in explanation.rejected.values():
            raise _ForNow(get(explanation.backend))
    return get(explanation.backend)


def _choose(name: str, strict: bool, problem: Problem, device: torch.device) -> Explanation:
    """The choice and its reasons, made on the operands' own device."""
    indexed = device.type == "cuda" and device.index is not None
    with torch.cuda.device(device) if indexed else nullcontext():
        return _chosen(name, strict, problem, device)


def _chosen(name: str, strict: bool, problem: Problem, device: torch.device) -> Explanation:
    preference = _PREFERENCE.get(device.type, ("eager",))
    rejected = {
        other: f"runs on {'cpu' if other == 'cpu' else 'cuda'} tensors only, not on {device.type}"
        for other in BACKENDS
        if other not in preference
    }
    if name != "auto":
        reason = rejected.get(name) or _impossible(get(name), problem, device)
        if reason is not None:
            raise RuntimeError(
                f"backend {name!r} was asked for and cannot compute {problem}: {reason}"
            )
        others = {other: f"{name} was asked for" for other in BACKENDS if other != name}
        return Explanation(problem, name, others, get(name).plan(problem))
    refused = {}  # those that cannot, as opposed to those that could and expect to be slower
    for candidate in preference:
        reason = _impossible(get(candidate), problem, device)
        if reason is not None:
            refused[candidate] = reason
    usable = tuple(candidate for candidate in preference if candidate not in refused)
    if strict and refused and usable == ("eager",):
        told = (f"{other} cannot compute {problem}: {why}" for other, why in refused.items())
        raise RuntimeError(f"strict: {'; '.join(told)}")
    slower = {}
    for candidate in usable:
        reason = get(candidate).slower(problem, usable)
        if reason is None:
            break
        slower[candidate] = reason
    rejected |= {other: f"{candidate} comes first" for other in usable if other != candidate}
    rejected |= refused | slower
    return Explanation(problem, candidate, rejected, get(candidate).plan(problem))


def _impossible(backend: Backend, problem: Problem, device: torch.device) -> str | None:
    """Why `backend` cannot or must not compute `problem`: machine, problem, or a failed self-test on a GPU."""
    reason = backend.unavailable() or backend.declines(problem)
    if reason is None and device.type == "cuda" and backend.name != "eager":
        from lora_kernels import selftest  # imports backends' oracle, needed on a GPU only

        reason = selftest.trusted(backend, device)
    return reason


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
