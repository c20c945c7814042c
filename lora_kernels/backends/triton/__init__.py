"""The backend of Triton kernels for NVIDIA and AMD GPUs. Triton itself is imported when the first product is computed."""

from __future__ import annotations

import importlib.util

from lora_kernels.backends.base import Backend, Candidate
from lora_kernels.backends.triton import configs
from lora_kernels.backends.triton.configs import MAIN_KERNEL
from lora_kernels.backends.triton.products import TritonProducts
from lora_kernels.problem import Problem
from lora_kernels.tuning import tables
from lora_kernels.tuning.cost import predict_us
from lora_kernels.tuning.targets import Target


class TritonBackend(Backend):
    """Kernels in float32, bfloat16 and float16 on GPUs with matrix units that Triton uses."""

    name = "triton"
    devices = ("cuda",)
    groups = True
    needs_target = True

    def unavailable(self) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        return None

    def candidates(self, problem: Problem, target: Target | None) -> list[Candidate]:
        """One candidate for each algorithm, with its tiles and its time, measured by `tune` or predicted."""
        assert target is not None
        if problem.dtype == "float64":
            return [Candidate("two_kernel", refusal="float64 is computed by ATen")]
        tiles = configs.tiles_for(problem, target)
        entry = tables.lookup(problem, target)
        measured = {} if entry is None else entry.times
        same = tables.bucketed(problem)
        made = []
        for name in configs.algorithms(problem):
            if not tiles.has(MAIN_KERNEL[name]):
                made.append(Candidate(name, refusal=configs.refusal(name, same, target)))
                continue
            config = tiles.config(MAIN_KERNEL[name])
            beside = problem.backward and name in ("one_pass", "decode")
            made.append(
                Candidate(
                    name,
                    TritonProducts(name, problem, target, tiles),
                    slower="in a backward q comes with dB from one reading of dy"
                    if beside
                    else None,
                    measured_us=measured.get(name),
                    predicted_us=predict_us(name, same, target, config),
                    how=str(config),
                )
            )
        return made


BACKEND = TritonBackend()
