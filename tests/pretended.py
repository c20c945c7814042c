"""CPU tensors on a GPU that is not there: the package's two seams that a test replaces, its target and its devices."""

from __future__ import annotations

import pytest

from lora_kernels import plan
from lora_kernels.backends import triton as backend_module
from lora_kernels.tuning.targets import TARGETS


def on_target(patch: pytest.MonkeyPatch, target: str, algorithm: str | None = None) -> None:
    """CPU tensors are on that GPU, where `tune` has timed `algorithm` as the fastest."""
    patch.setattr(plan, "_target", lambda device: TARGETS[target])
    patch.setattr(backend_module.TritonBackend, "devices", ("cpu",))
    if algorithm is not None:
        slower = backend_module._slower
        patch.setattr(backend_module, "predict_us", lambda name, *_: name != algorithm)
        patch.setattr(
            backend_module, "_slower", lambda n, p, _, config: slower(n, p, n == algorithm, config)
        )
    plan.forget()
