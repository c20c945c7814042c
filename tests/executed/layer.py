"""One training step of a bfloat16 or float16 layer by one algorithm on one target, executed and compared with float64."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch

from lora_kernels import lora_linear, plan, use_backend
from lora_kernels.dropout import Dropout, scaled_mask
from tests.oracle import assert_gradients, gradients, reference
from tests.pretended import on_target
from tests.ptx.launch import Executed, emulate

EXECUTED = ("sm_80", "sm_90", "sm_100", "sm_120")  # whose code the emulator runs


@dataclass(frozen=True)
class Steps:
    """The launches of the forward, and of forward and backward."""

    forward: list[str]
    kernels: list[str]
    executed: list[Executed]


@contextmanager
def emulated(target: str, algorithm: str, schedule: int | None = None) -> Iterator[list[Executed]]:
    """Within the block the layer takes `algorithm` on CPU tensors, as on that GPU; its launches are executed."""
    with pytest.MonkeyPatch.context() as patch:
        on_target(patch, target, algorithm)
        with emulate(target, schedule) as executed, use_backend("triton"):
            yield executed
    plan.forget()


def train(
    target: str,
    algorithm: str,
    schedule: int | None,
    *,
    rows: int = 70,
    dtype: torch.dtype = torch.bfloat16,
    adapter_dtype: torch.dtype = torch.bfloat16,
    dropout: float = 0.0,
) -> Steps:
    """What a forward and a backward launched; y and every gradient are within the error budget."""
    torch.manual_seed(3)
    shapes = {"x": (rows, 72), "weight": (88, 72), "A": (72, 12), "B": (12, 88), "bias": (88,)}
    operands = {
        name: (torch.randn(shape, dtype=torch.float64) / shape[-1] ** 0.5).to(
            adapter_dtype if name in ("A", "B") else dtype
        )
        for name, shape in shapes.items()
    }
    dy = torch.randn(rows, 88).to(dtype)
    mask = None
    if dropout:
        mask = scaled_mask(Dropout(dropout, torch.tensor(5)), rows, 72, torch.float64)
    forward: list[str] = []

    def ours(**given):
        y = lora_linear(**given, alpha=0.75, dropout_p=dropout, seed=5)
        forward.extend(launch.name for launch in executed)
        return y

    with emulated(target, algorithm, schedule) as executed:
        actual = gradients(ours, operands, dy)
    what = f"by {algorithm} on {target}, schedule {schedule}"
    plain = functools.partial(reference, alpha=0.75, mask=mask)
    assert_gradients(actual, plain, operands, dy, what)
    return Steps(forward, [launch.name for launch in executed], executed)
