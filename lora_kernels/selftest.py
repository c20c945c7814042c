"""A backend proves itself on the device it is to run on: a few small problems, forward and every gradient, against float64.

On a GPU this happens before a backend's first use on a new device, driver, Triton or package version; the verdict is kept
in the cache folder. A backend that fails is not used there, and `explain` says why.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lora_kernels import env, formulas
from lora_kernels.backends.base import Backend
from lora_kernels.backends.composite import BACKEND as COMPOSITE
from lora_kernels.dropout import Dropout, scaled_mask
from lora_kernels.formulas import Needs
from lora_kernels.once import once
from lora_kernels.problem import Problem

_EVERY = Needs(True, False, True, True, False)
_SIZES = ((1, 48, 64, 8), (33, 65, 47, 12), (130, 136, 264, 16), (70, 40, 24, 72))  # M, N, K, R
_DTYPES = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
)


@dataclass(frozen=True)
class Result:
    """One tensor of one problem: its largest error from float64, and the largest that was allowed."""

    problem: Problem
    tensor: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # False for NaN

    def __str__(self) -> str:
        verdict = "is within" if self.passed else "is off by more than"
        return f"{self.tensor} {verdict} {self.allowed:.1e} (error {self.error:.1e}) for {self.problem}"


def run(backend: Backend, device: torch.device | str) -> list[Result]:
    """y, dx, dA and dB of every self-test problem that `backend` does not decline, on `device`.

    Allowed is twice what eager PyTorch is off in the same types, plus two roundings of the largest number.
    """
    device = torch.device(device)
    return [result for problem in _problems(device) for result in _check(backend, problem, device)]


NOT_NOW = "its self-test cannot run while a CUDA graph is captured: call it once before"


def trusted(backend: Backend, device: torch.device) -> str | None:
    """None when `backend` passed its self-test on this device, else why it must not be used; runs it when nobody has."""
    index = device.index if device.index is not None else torch.cuda.current_device()
    try:
        return _verdict(backend, _fingerprint(backend.name, index), index)
    except _CapturingError:
        return NOT_NOW


class _CapturingError(RuntimeError):
    """There is no verdict, and now is no time for a test."""


@once
def _verdict(backend: Backend, fingerprint: str, index: int) -> str | None:
    file = (
        env.cache_dir()
        / "selftest"
        / (hashlib.sha256(fingerprint.encode()).hexdigest()[:20] + ".json")
    )
    try:
        known = json.loads(file.read_text())
        if known["fingerprint"] == fingerprint:
            return known["failure"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    if torch.cuda.is_current_stream_capturing():
        raise _CapturingError
    # What an earlier kernel broke is raised here, and is no verdict on this backend.
    torch.cuda.synchronize(index)
    failure = _failure(backend, torch.device("cuda", index))
    if failure is not None:
        env.logger().warning("the %s backend is not used on this device: %s", backend.name, failure)
    _write(file, {"fingerprint": fingerprint, "failure": failure})
    return failure


def _failure(backend: Backend, device: torch.device) -> str | None:
    """What the self-test found wrong, or None."""
    try:
        results = run(backend, device)
    except (
        Exception
    ) as error:  # whatever a kernel does on an unknown device, eager still works there
        return f"its self-test raised {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    failed = [result for result in results if not result.passed]
    if failed:
        return f"its self-test failed {len(failed)} of {len(results)} checks; {failed[0]}"
    return None if results else "it declines every problem of its self-test"


def _fingerprint(name: str, index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    try:
        package = importlib.metadata.version("lora-kernels")
    except importlib.metadata.PackageNotFoundError:
        package = "none"
    driver = getattr(torch._C, "_cuda_getDriverVersion", lambda: 0)()
    parts = (
        name,
        properties.name,
        properties.major,
        properties.minor,
        driver,
        torch.__version__,
        triton,
        package,
    )
    return "|".join(map(str, parts))


def _write(file: Path, verdict: dict[str, str | None]) -> None:
    """Keep a verdict; a cache that cannot be written costs another self-test and nothing else."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(dir=file.parent)
        with os.fdopen(handle, "w") as out:
            json.dump(verdict, out)
        os.replace(scratch, file)
    except OSError:
        env.logger().info("%s cannot be written", file)


def _problems(device: torch.device) -> Iterator[Problem]:
    for dtype, adapter_dtype in _DTYPES:
        for i, (M, N, K, R) in enumerate(_SIZES):
            yield Problem(
                M=M,
                N=N,
                K=K,
                R=R,
                dtype=str(dtype).removeprefix("torch."),
                adapter_dtype=str(adapter_dtype).removeprefix("torch."),
                device=device.type,
                bias=i % 2 == 0,
                dropout=i == 2,
            )


def _check(backend: Backend, problem: Problem, device: torch.device) -> Iterator[Result]:
    if backend.declines(problem) is not None:
        return
    dtype, adapter_dtype = getattr(torch, problem.dtype), getattr(torch, problem.adapter_dtype)
    generator = torch.Generator().manual_seed(problem.M)

    def normal(rows: int, cols: int, scale: int, to: torch.dtype) -> Tensor:
        values = torch.randn(rows, cols, generator=generator, dtype=torch.float64)
        return (values / max(scale, 1) ** 0.5).to(to).to(device)

    M, N, K, R = problem.M, problem.N, problem.K, problem.R
    x, weight = normal(M, K, 1, dtype), normal(N, K, K, dtype)
    A, B = normal(K, R, K, adapter_dtype), normal(R, N, R, adapter_dtype)
    bias = normal(1, N, 1, dtype)[0] if problem.bias else None
    dy = normal(M, N, 1, dtype)
    dropout = Dropout(0.25, torch.tensor(2024, device=device)) if problem.dropout else None
    operands = (x, weight, A, B, bias, dy)
    actual = _products(backend, operands, dropout)
    exact = _products(COMPOSITE, tuple(t if t is None else t.double() for t in operands), dropout)
    eager = _naive(operands, dropout)
    for name, value in exact.items():
        eps = torch.finfo(eager[name].dtype).eps
        allowed = 2 * _distance(eager[name], value) + 2 * eps * max(1.0, value.abs().max().item())
        yield Result(problem, name, _distance(actual[name], value), allowed)


def _products(
    backend: Backend, operands: tuple[Tensor | None, ...], dropout: Dropout | None
) -> dict[str, Tensor]:
    x, weight, A, B, bias, dy = operands
    assert (
        x is not None and weight is not None and A is not None and B is not None and dy is not None
    )
    y, s = formulas.forward(backend, x, weight, A, B, bias, 0.75, dropout)
    saved = formulas.keep(_EVERY, x, weight, A, B, s)
    dx, _, dA, dB, _ = formulas.backward(backend, dy, saved, _EVERY, 0.75, dropout, A.dtype)
    assert dx is not None and dA is not None and dB is not None
    return {"y": y, "dx": dx, "dA": dA, "dB": dB}


def _naive(operands: tuple[Tensor | None, ...], dropout: Dropout | None) -> dict[str, Tensor]:
    """The same by autograd on one PyTorch operation after the other, in the operands' own types."""
    x, weight, A, B = (t.detach().requires_grad_() for t in operands[:4] if t is not None)
    bias, dy = operands[4:]
    mask = 1.0 if dropout is None else scaled_mask(dropout, x.shape[0], x.shape[1], x.dtype)
    y = torch.nn.functional.linear(x, weight, bias)
    y = y + (0.75 * ((x * mask).to(A.dtype) @ A @ B)).to(y.dtype)
    dx, dA, dB = torch.autograd.grad(y, (x, A, B), dy)
    return {"y": y.detach(), "dx": dx, "dA": dA, "dB": dB}


def _distance(t: Tensor, exact: Tensor) -> float:
    return (t.double() - exact).abs().max().item()
