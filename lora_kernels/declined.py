"""Quantised layers and tensors that no product reads, and why: found by the names of their classes, imported by nobody."""

from __future__ import annotations

from typing import Any

_ZERO_POINTS = "they are packed in groups with zero points, and no product here decodes that"
_CODEBOOKS = "they are indices into codebooks of vectors, and no product here decodes that"
_OWN_PRODUCTS = "they compute by operators of their own, and no product here decodes them"
_NO_DECODER = "no product here decodes that format"

# Where a class is defined: the weights that it holds, and why they are not read.
_KINDS = {
    "gptqmodel": ("GPTQ or AWQ", _ZERO_POINTS),
    "auto_gptq": ("GPTQ", _ZERO_POINTS),
    "awq": ("AWQ", _ZERO_POINTS),
    "hqq": ("HQQ", _ZERO_POINTS),
    "torchao": ("torchao", _OWN_PRODUCTS),
    "optimum.quanto": ("Quanto", _OWN_PRODUCTS),
    "quanto": ("Quanto", _OWN_PRODUCTS),
    "compressed_tensors": ("compressed-tensors", _OWN_PRODUCTS),
    "aqlm": ("AQLM", _CODEBOOKS),
    "vptq": ("VPTQ", _CODEBOOKS),
    "spqr_quant": ("SpQR", _NO_DECODER),
    "eetq": ("EETQ", _NO_DECODER),
    "transformers.integrations.bitnet": ("BitNet", _NO_DECODER),
    "transformers.integrations.eetq": ("EETQ", _NO_DECODER),
    "transformers.integrations.fbgemm_fp8": ("FBGEMM fp8", "it quantises x, row by row, as well"),
    "transformers.integrations.higgs": ("HIGGS", _CODEBOOKS),
    "transformers.integrations.mxfp4": ("MXFP4", _NO_DECODER),
    "transformers.integrations.finegrained_fp8.FP8GroupedLinear": (
        "block-diagonal fp8",
        "it is several products, one for each group of x's columns",
    ),
}


def why_declined(thing: Any) -> str | None:
    """Why this layer or tensor cannot be the base of an adapter, by its class or its weight's; None for all others."""
    weight = getattr(thing, "_parameters", {}).get("weight")
    for found in (thing, weight):
        for cls in type(found).__mro__:
            parts = f"{cls.__module__}.{cls.__qualname__}".split(".")
            for count in range(1, len(parts) + 1):
                kind = _KINDS.get(".".join(parts[:count]))
                if kind is not None:
                    return f"a {type(found).__name__} has {kind[0]} weights: {kind[1]}"
    return None
