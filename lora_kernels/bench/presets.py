"""Named sets of problems: the projections of well-known models, sweeps, and what fits a laptop's ten minutes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lora_kernels.bench.contenders import FORCED
from lora_kernels.bench.linear import MODES, Case
from lora_kernels.problem import Problem


@dataclass(frozen=True)
class Model:
    """Projections as (name, K, N), the usual rank, and how many rows of x a benchmark takes: on a CPU, on a GPU."""

    projections: tuple[tuple[str, int, int], ...]
    rank: int
    tokens: tuple[int, int]


MODELS = {
    "minilm": Model((("q", 384, 384), ("up", 384, 1536), ("down", 1536, 384)), 8, (512, 4096)),
    "gpt2": Model(
        (("qkv", 768, 2304), ("proj", 768, 768), ("up", 768, 3072), ("down", 3072, 768)),
        16,
        (512, 8192),
    ),
    "llama-3-8b": Model(
        (("q", 4096, 4096), ("k", 4096, 1024), ("up", 4096, 14336), ("down", 14336, 4096)),
        16,
        (128, 8192),
    ),
    "llama-3-70b": Model(
        (("q", 8192, 8192), ("k", 8192, 1024), ("up", 8192, 28672), ("down", 28672, 8192)),
        16,
        (16, 4096),
    ),
    "qwen2.5-7b": Model(
        (("q", 3584, 3584), ("k", 3584, 512), ("up", 3584, 18944), ("down", 18944, 3584)),
        16,
        (128, 8192),
    ),
}
DTYPES = {"cpu": ("float32",), "cuda": ("bfloat16",)}  # of a model, where none are given
PRESETS = (*MODELS, "laptop", "grid", "gpu", "nf4", "quick")
ALL = ("frozen", "loop", "reference", "compiled", "addmm", "peft", *FORCED, "ours")
GRID_NAMES = ("frozen", "reference", "addmm", "ours")
NF4_NAMES = ("frozen", "reference", "dense", "peft", "ours")
GRID_ROWS = (1, 16, 128, 512, 2048)
GRID_RANKS = (8, 16, 64)
GROWTH = {
    "cpu": (
        (512, 1024, 1024, 16),
        {"M": (16, 64, 256, 1024, 2048), "K": (256, 512, 2048, 4096), "N": (256, 512, 2048, 4096)},
    ),
    "cuda": (
        (4096, 4096, 4096, 16),
        {
            "M": (16, 64, 256, 1024, 2048, 8192),
            "K": (512, 1024, 2048, 8192, 14336),
            "N": (512, 1024, 2048, 8192, 14336),
        },
    ),
}
RANKS = (4, 8, 32, 64, 128, 256)


def cases(preset: str, device: str, dtypes: tuple[str, ...] = ()) -> list[Case]:
    """The linear and growth cases of a preset; `dtypes` replaces its own. ValueError for an unknown name."""
    if preset in MODELS:
        types = dtypes or DTYPES[device]
        return [case for dtype in types for case in model_cases(preset, device, dtype)]
    if preset == "quick":
        return shape_cases([(64, 96, 160, 4)], device, dtypes or ("float32",), ())
    if preset == "laptop":
        return _laptop(device, dtypes)
    if preset == "grid":
        return _grid(device, dtypes or ("float32", "bfloat16"))
    if preset == "nf4":
        return _nf4(device, dtypes or ("float32", "bfloat16"))
    if preset == "gpu":
        return _gpu(dtypes or ("bfloat16",))
    raise ValueError(f"preset must be one of {PRESETS}, got {preset!r}")


def names(preset: str | None) -> tuple[str, ...]:
    """The contenders of a preset, or of given shapes for None."""
    return {"grid": GRID_NAMES, "nf4": NF4_NAMES}.get(preset or "", ALL)


def model_cases(model: str, device: str, dtype: str, modes: tuple[str, ...] = ()) -> list[Case]:
    """Forward and step of each projection of a model."""
    found = MODELS[model]
    tokens = found.tokens[device == "cuda"]
    return [
        Case(f"{model} {name}", _problem(tokens, K, N, found.rank, device, dtype), mode)
        for name, K, N in found.projections
        for mode in modes or MODES
    ]


def shape_cases(
    shapes: list[tuple[int, int, int, int]],
    device: str,
    dtypes: tuple[str, ...],
    modes: tuple[str, ...],
    adapter_dtype: str | None = None,
) -> list[Case]:
    """Cases of given (M, K, N, R)."""
    return [
        Case(f"{M}x{K}x{N}", _problem(M, K, N, R, device, dtype, adapter_dtype), mode)
        for M, K, N, R in shapes
        for dtype in dtypes
        for mode in modes or MODES
    ]


def growth_cases(device: str, dtype: str) -> list[Case]:
    """Steps around one problem, one of M, K, N, R growing at a time; the problem itself belongs to each sweep."""
    centre, sweeps = GROWTH[device]
    M, K, N, R = centre
    base = _problem(M, K, N, R, device, dtype)
    made = [Case("centre", base, suite="growth")]
    for letter, values in {**sweeps, "R": RANKS}.items():
        made += [
            Case(letter, replace(base, **{letter: value}), suite="growth")  # type: ignore[arg-type]
            for value in values
        ]
    return made


def decode_cases(device: str, dtype: str, rows: tuple[int, ...]) -> list[Case]:
    """Forward of few rows, as in generation."""
    return [
        Case(
            f"decode {M} row{'s' * (M > 1)}", _problem(M, 4096, 4096, 16, device, dtype), "forward"
        )
        for M in rows
    ]


def _laptop(device: str, dtypes: tuple[str, ...]) -> list[Case]:
    made = []
    for dtype in dtypes or ("float32",):
        made += model_cases("minilm", device, dtype)
        made += model_cases("gpt2", device, dtype)
        made += shape_cases([(1024, 2048, 2048, 16), (128, 4096, 4096, 16)], device, (dtype,), ())
        made += decode_cases(device, dtype, (1, 16))
        made += growth_cases(device, dtype)
    if not dtypes:
        made += model_cases("minilm", device, "bfloat16", ("step",))
        made += shape_cases([(512, 768, 3072, 16)], device, ("bfloat16",), ())
    return made


def _grid(device: str, dtypes: tuple[str, ...]) -> list[Case]:
    """Every row count and rank through the layers of MiniLM, GPT-2, a 1B and a 7B model; 2048 rows not through the last."""
    layers = [(384, 384), (384, 1536), (1536, 384), (768, 768), (768, 3072), (3072, 768)]
    layers += [(2048, 2048), (4096, 4096)]
    sizes = [
        (M, K, N, R)
        for K, N in layers
        for M in GRID_ROWS
        for R in GRID_RANKS
        if M * K * N < 1 << 34
    ]
    return shape_cases(sizes, device, dtypes, ())


def _nf4(device: str, dtypes: tuple[str, ...]) -> list[Case]:
    """Layers of GPT-2 and of a 7B model over NF4 weights: many rows, few rows, and one."""
    sizes = [(512, 768, 3072, 16), *((M, 4096, 4096, 16) for M in (512, 16, 1))]
    return [
        replace(case, label=f"nf4 {case.label}", problem=replace(case.problem, weight_format="nf4"))
        for case in shape_cases(sizes, device, dtypes, ())
    ]


def _gpu(dtypes: tuple[str, ...]) -> list[Case]:
    made = []
    for dtype in dtypes:
        for model in ("minilm", "gpt2", "llama-3-8b", "llama-3-70b", "qwen2.5-7b"):
            made += model_cases(model, "cuda", dtype)
        decode = decode_cases("cuda", dtype, (1, 4, 16, 64))
        made += [
            replace(case, cold=cold, graph=not cold) for case in decode for cold in (False, True)
        ]
        for case in model_cases("llama-3-8b", "cuda", dtype, ("forward",)):
            made += [replace(case, cold=True), replace(case, graph=True)]
        made += growth_cases("cuda", dtype)
    return made


def _problem(
    M: int, K: int, N: int, R: int, device: str, dtype: str, adapter_dtype: str | None = None
) -> Problem:
    return Problem(M, N, K, R, dtype, adapter_dtype or dtype, device, bias=True)
