"""The backend of Triton kernels for NVIDIA and AMD GPUs. Triton itself is imported when the first product is computed."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

from lora_kernels.backends.base import Backend, Candidate
from lora_kernels.backends.triton import configs
from lora_kernels.backends.triton.configs import MAIN_KERNEL
from lora_kernels.backends.triton.products import TritonProducts
from lora_kernels.problem import DENSE, PACKED_BYTES, Problem
from lora_kernels.tuning import tables
from lora_kernels.tuning.config import PERSISTENT, TileConfig, Tiles
from lora_kernels.tuning.cost import predict_range, predict_us
from lora_kernels.tuning.targets import Target


class TritonBackend(Backend):
    """Kernels in float32, bfloat16 and float16 on GPUs with matrix units that Triton uses."""

    name = "triton"
    devices = ("cuda",)
    formats = (DENSE, *PACKED_BYTES)
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
        entry = tables.lookup(problem, target)
        measured = {} if entry is None else entry.times
        proven = set(measured)
        if problem.dropout:  # `tune` times no masks, but it computes this product's with one
            plain = tables.lookup(replace(problem, dropout=False), target)
            proven |= {"persistent"} & (plain.times.keys() if plain else set())
        if problem.weight_format not in self.formats:  # the products get a dense copy
            problem = replace(problem, weight_format=DENSE)
        tiles = configs.tiles_for(problem, target)
        same = tables.bucketed(problem)
        made = []
        for name in configs.algorithms(problem):
            reason = configs.untried(name, target.name) if name in PERSISTENT else None
            if reason or not tiles.has(MAIN_KERNEL[name]):
                refusal = reason or configs.refusal(name, same, target)
                made.append(Candidate(name, refusal=refusal))
                continue
            config = configs.main_tile(name, problem, tiles)
            made.append(
                Candidate(
                    name,
                    TritonProducts(name, problem, target, tiles),
                    slower=_slower(name, problem, name in proven, config),
                    measured_us=measured.get(name),
                    predicted_us=predict_us(name, same, target, config),
                    predicted_range=predict_range(name, same, target, config),
                    how=_decoding(name, problem, tiles) + str(config),
                )
            )
        return made


def _slower(algorithm: str, problem: Problem, proven: bool, config: TileConfig) -> str | None:
    """Why `algorithm` is not to be taken for `problem` by itself, or None."""
    if algorithm not in ("two_kernel", "tail_first", "persistent") and problem.backward:
        return "in a backward q comes with dB from one reading of dy"
    if algorithm == "persistent" and problem.backward and problem.dropout:
        reason = configs.unmasked(config, problem)
        if reason is not None:
            return reason
    if algorithm in PERSISTENT and not proven:
        return "it is taken where `tune` has timed it: Gluon is experimental"
    if algorithm == "one_launch" and not proven:
        return "it is taken where `tune` has timed it: its programs wait for each other"
    return None


def _decoding(algorithm: str, problem: Problem, tiles: Tiles) -> str:
    """How `algorithm` reads a quantised weight, in words; "" for a dense one."""
    if problem.weight_format == DENSE:
        return ""
    where = "in the loop" if algorithm == "decode" else f"by {tiles.config('dequantise')}"
    return f"the {problem.weight_format} weight decoded {where}, "


BACKEND = TritonBackend()
