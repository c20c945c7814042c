"""Quantised weights with random codes: what the self-test computes with, and what `tune` and `bench` time."""

from __future__ import annotations

import torch

from lora_kernels.operands import QuantizedWeight
from lora_kernels.quantized import BLOCK, BLOCK2, FP8Weight, Int8Weight, NF4Weight


def sample(
    format: str, N: int, K: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> QuantizedWeight:
    """A weight [N, K] of a format of `SAMPLES`, of variance about 1 / K; the same for equal arguments."""
    generator = torch.Generator().manual_seed(1000003 * N + K)
    weight = SAMPLES[format](N, K, generator).to(dtype)
    return weight.with_tensors([t.to(device) for t in weight.tensors])


def _nf4(N: int, K: int, generator: torch.Generator) -> NF4Weight:
    """Doubly quantised."""
    blocks = -(-N * K // BLOCK)

    def codes(count: int) -> torch.Tensor:
        return torch.randint(256, (count,), generator=generator, dtype=torch.uint8)

    def near(value: float, count: int) -> torch.Tensor:
        return value * (0.75 + 0.5 * torch.rand(count, generator=generator))

    largest = 2 / max(K, 1) ** 0.5
    return NF4Weight(
        codes(-(-N * K // 2)),
        codes(blocks),
        nf4_codes(),
        torch.linspace(-1, 1, 256),
        near(largest / 2, -(-blocks // BLOCK2)),
        near(largest, 1),
        N=N,
        K=K,
    )


def nf4_codes() -> torch.Tensor:
    """The 16 values of NF4: quantiles of a normal distribution on each side of zero, the largest scaled to 1.

    Dettmers et al., "QLoRA: efficient finetuning of quantized LLMs", NeurIPS 2023, section 3.
    """
    # As if the first and last quantile were half a step from the distribution's ends.
    edge = 0.9677083

    def side(count: int) -> torch.Tensor:
        steps = torch.linspace(edge, 0.5, count + 1, dtype=torch.float64)
        return torch.special.ndtri(steps[:-1])

    values = torch.cat([-side(7), torch.zeros(1, dtype=torch.float64), side(8).flip(0)])
    return (values / values.max()).float()


def _int8(N: int, K: int, generator: torch.Generator) -> Int8Weight:
    codes = torch.randint(-127, 128, (N, K), generator=generator, dtype=torch.int8)
    absmax = (1 + torch.rand(N, generator=generator)) / max(K, 1) ** 0.5
    return Int8Weight(codes, absmax)


def _fp8(N: int, K: int, generator: torch.Generator) -> FP8Weight:
    """In blocks of 128 x 128."""
    codes = torch.randn(N, K, generator=generator).clamp(-4, 4).mul(64).to(torch.float8_e4m3fn)
    blocks = -(-N // 128), -(-K // 128)
    scales = (1 + torch.rand(blocks, generator=generator)) / (96 * max(K, 1) ** 0.5)
    return FP8Weight(codes, scales, (128, 128))


SAMPLES = {"nf4": _nf4, "int8": _int8, "fp8": _fp8}
