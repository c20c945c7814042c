"""One training step of a bfloat16 or float16 layer by one algorithm on one target, executed and compared with float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from lora_kernels import lora_linear, plan, use_backend
from lora_kernels.backends import triton as backend_module
from lora_kernels.dropout import Dropout, scaled_mask
from lora_kernels.tuning.targets import TARGETS
from tests.oracle import assert_budget, reference
from tests.ptx.launch import Executed, emulate


@dataclass(frozen=True)
class Steps:
    """The launches of the forward, and of forward and backward."""

    forward: list[str]
    kernels: list[str]
    executed: list[Executed]


def take(patch: pytest.MonkeyPatch, target: str, algorithm: str) -> None:
    """CPU tensors are on that GPU, where `tune` has timed `algorithm` as the fastest."""
    slower = backend_module._slower
    patch.setattr(plan, "_target", lambda device: TARGETS[target])
    patch.setattr(backend_module.TritonBackend, "devices", ("cpu",))
    patch.setattr(backend_module, "predict_us", lambda name, *_: name != algorithm)
    timed = lambda name, p, _, config: slower(name, p, name == algorithm, config)  # noqa: E731
    patch.setattr(backend_module, "_slower", timed)


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
    leaves = [
        (torch.randn(shape, dtype=torch.float64) / shape[-1] ** 0.5)
        .to(adapter_dtype if name in ("A", "B") else dtype)
        .requires_grad_()
        for name, shape in shapes.items()
    ]
    dy = torch.randn(rows, 88).to(dtype)
    mask = None
    if dropout:
        mask = scaled_mask(Dropout(dropout, torch.tensor(5)), rows, 72, torch.float64)
    plan.forget()
    with pytest.MonkeyPatch.context() as patch:
        take(patch, target, algorithm)
        with emulate(target, schedule) as executed, use_backend("triton"):
            y = lora_linear(*leaves[:4], 0.75, leaves[4], dropout_p=dropout, seed=5)
            forward = _names(executed)
            actual = [y, *torch.autograd.grad(y, leaves, dy)]
    plan.forget()

    def plain(to: torch.dtype | None) -> list[torch.Tensor]:
        cast = [t.detach().to(to or t.dtype).requires_grad_() for t in leaves]
        out = reference(*cast[:4], 0.75, cast[4], mask=mask)
        return [out, *torch.autograd.grad(out, cast, dy.to(to or dtype))]

    names = ("y", *shapes)
    for name, *triple in zip(names, actual, plain(None), plain(torch.float64), strict=True):
        assert_budget(*triple, what=f"{name} by {algorithm} on {target}, schedule {schedule}")
    return Steps(forward, _names(executed), executed)


def _names(executed: list[Executed]) -> list[str]:
    return [launch.name.strip("_").removesuffix("_kernel") for launch in executed]
