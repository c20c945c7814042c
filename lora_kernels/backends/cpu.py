"""The backend of the C++ extension for CPUs with AVX2 or AVX-512: see csrc/cpu."""

from __future__ import annotations

import math
import platform
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lora_kernels import env, formulas
from lora_kernels.backends.base import Backend, Candidate, Products, ProjectionProducts
from lora_kernels.backends.composite import PRODUCTS as COMPOSITE
from lora_kernels.dropout import Dropout, threshold
from lora_kernels.once import once
from lora_kernels.operands import Adapter, Groups, Weight, restored
from lora_kernels.problem import DENSE, Problem
from lora_kernels.tuning.targets import Target

_OPS = torch.ops.lora_kernels_cpu

# What an installation built here; a released wheel has one beside it for each minor version of torch, `_cpu-torch2.13.so`.
LIBRARY = Path(__file__).resolve().parent.parent / "_cpu.so"
PLATFORM = ("Linux", "x86_64")
# Multiply-adds of a forward from which projections are trained together: below, a layer's own operator is faster, whose
# backward is C++ too. Three of 768 x 768 in float32, by rows, apart over together: 64 0.91, 128 1.00, 256 1.08 (AMD Zen 3).
_TRAINED_TOGETHER = 1 << 28
_MARK = rb"lora_kernels built with torch (\d+\.\d+);"  # csrc/cpu/built_with.cpp


class CpuProducts(Products):
    """Products by the extension's own kernels: float32, bfloat16 and float16, float32 adapters on a half base."""

    scales_columns = True

    def shrink(self, x: Tensor, adapter: Adapter) -> Tensor:
        mask = _mask(adapter.dropout_in)
        return _OPS.shrink(x, adapter.A, float(adapter.scale), *mask)

    def expand(
        self, x: Tensor, w: Weight, s: Tensor, adapter: Adapter, bias: Tensor | None = None
    ) -> Tensor:
        mask = _mask(adapter.dropout_out)
        if isinstance(w, Tensor):
            return _OPS.expand(x, w, s, adapter.B, bias, *mask)
        return _OPS.expand_quantized(x, *w.flat, s, adapter.B, bias, *mask)

    def wgrad(
        self, left: Tensor, right: Tensor, dtype: torch.dtype, dropout: Dropout | None = None
    ) -> Tensor:
        return _OPS.wgrad(left, right, dtype, *_mask(dropout))

    def shrink_expand_scaled(
        self,
        x: Tensor,
        w: Weight,
        adapter: Adapter,
        bias: Tensor | None = None,
        *,
        keeps_z: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        s = self.shrink(x, adapter)
        rest = s, adapter.B, adapter.column_scale, bias, keeps_z
        if isinstance(w, Tensor):
            y, z = _OPS.expand_scaled(x, w, *rest)
        else:
            y, z = _OPS.expand_scaled_quantized(x, *w.flat, *rest)
        return y, s, z if keeps_z else None

    def scaled_gradient(
        self, dy: Tensor, c: Tensor, z: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        dz, dc = _OPS.scaled_gradient(dy, c, z)
        return dz, None if z is None else dc

    def row_norms(self, w: Tensor, adapter: Adapter) -> Tensor:
        return _OPS.row_norms(w, adapter.A, adapter.B, float(adapter.scale))

    def grouped(self, groups: Groups) -> Products:
        return GroupedCpuProducts(groups)

    def together(
        self, each: Sequence[tuple[Problem, Products]], trains: bool
    ) -> ProjectionProducts | None:
        # A layer's own operator has a backward in C++, which few products together do not make up for.
        work = sum(problem.flops for problem, _ in each) // 2
        return None if trains and work < _TRAINED_TOGETHER else PROJECTIONS

    def layer(  # type: ignore[override]
        self, x: Tensor, weight: Weight, adapter: Adapter, bias: Tensor | None
    ) -> Tensor:
        """y [..., N]: forward and backward are one call each, which is what a small layer's time depends on."""
        A, B, scale, dropout, _, c = adapter
        p, limit, seed = 0.0, 0, 0
        if dropout is not None:
            p, (limit, seed, _) = dropout.p, _mask(dropout)
        rest = A, B, bias, scale, p, limit, seed, c
        if isinstance(weight, Tensor):
            return _OPS.lora_linear.default(x, weight, *rest)
        return _OPS.lora_linear_quantized.default(x, *weight.flat, *rest)


class GroupedCpuProducts(Products):
    """`CpuProducts` over groups of rows: the threads share the tasks of all groups, whose offsets the operators read."""

    def __init__(self, groups: Groups) -> None:
        self.groups = groups

    def shrink(self, x: Tensor, adapter: Adapter) -> Tensor:
        scale = adapter.scale
        scales = scale.flatten().tolist() if isinstance(scale, Tensor) else [float(scale)]
        mask = _mask(adapter.dropout_in)
        return _OPS.grouped_shrink(x, adapter.A, self.groups.offsets, scales, *mask)

    def expand(
        self, x: Tensor, w: Weight, s: Tensor, adapter: Adapter, bias: Tensor | None = None
    ) -> Tensor:
        rest = s, adapter.B, bias, self.groups.offsets, *_mask(adapter.dropout_out)
        if isinstance(w, Tensor):
            return _OPS.grouped_expand(x, w, *rest)
        return _OPS.grouped_expand_quantized(x, *w.flat, *rest)

    def wgrad(
        self, left: Tensor, right: Tensor, dtype: torch.dtype, dropout: Dropout | None = None
    ) -> Tensor:
        return _OPS.grouped_wgrad(left, right, self.groups.offsets, dtype, *_mask(dropout))

    def weight_grad(self, dy: Tensor, x: Tensor) -> Tensor:
        if not self.groups.own_weight:
            return super().weight_grad(dy, x)
        return _OPS.grouped_weight_grad(dy, x, self.groups.offsets)

    def bias_grad(self, dy: Tensor) -> Tensor:
        return COMPOSITE.grouped(self.groups).bias_grad(dy)


class CpuProjectionProducts(ProjectionProducts):
    """`CpuProducts` of several projections: one parallel region for all of them, dx summed in float32."""

    def shrink(self, xs: Sequence[Tensor], adapters: Sequence[Adapter]) -> Tensor:
        A, scales = [each.A for each in adapters], [float(each.scale) for each in adapters]
        return _OPS.projections_shrink(xs, A, scales, *_masks([a.dropout_in for a in adapters]))

    def expand(
        self,
        x: Tensor,
        ws: Sequence[Tensor],
        s: Tensor,
        adapters: Sequence[Adapter],
        biases: Sequence[Tensor | None],
    ) -> list[Tensor]:
        return _OPS.projections_expand(x, ws, s, [each.B for each in adapters], biases)

    def expand_sum(
        self, xs: Sequence[Tensor], ws: Sequence[Tensor], s: Tensor, adapters: Sequence[Adapter]
    ) -> Tensor:
        masks = _masks([each.dropout_out for each in adapters])
        return _OPS.projections_sum(xs, ws, s, [each.B for each in adapters], *masks)

    def wgrad(
        self,
        lefts: Sequence[Tensor],
        rights: Sequence[Tensor],
        dtype: torch.dtype,
        dropouts: Sequence[Dropout | None] | None = None,
    ) -> list[Tensor]:
        return _OPS.projections_wgrad(lefts, rights, dtype, *_masks(dropouts or ()))


class CpuBackend(Backend):
    """The extension's kernels, on processors with AVX2 and FMA."""

    name = "cpu"
    groups = True
    devices = ("cpu",)
    formats = (DENSE, "nf4", "int8", "fp8")

    def unavailable(self) -> str | None:
        return _load()

    def candidates(self, problem: Problem, target: Target | None) -> list[Candidate]:
        if problem.dtype == "float64":
            return [Candidate("cpu", refusal="its kernels have no float64")]
        # Measured on AMD Zen 4, 2026-11: nowhere slower than the eager backend by more than 5 % (480 cases, M 1 to 2048, R 8
        # to 64, float32 and bfloat16); 2 to 32 times as fast in float16, and in bfloat16 with ATen held to AVX2. Processors
        # with AMX multiply halves several times faster than that.
        slower = None
        if problem.dtype in ("bfloat16", "float16") and _has_amx():
            slower = (
                f"ATen multiplies {problem.dtype} by AMX on this processor, these kernels do not"
            )
        return [Candidate("cpu", PRODUCTS, slower=slower, how=_how(problem))]


def _how(problem: Problem) -> str:
    isa = _OPS.isa()
    halves = problem.dtype == "bfloat16" and isa == "avx512_bf16"
    arithmetic = f"{isa} kernels" + ("" if problem.itemsize == 4 or halves else " in float32")
    if problem.weights > 1:
        return f"{arithmetic}, each group in the form for its number of rows"
    dense = problem.weight_format == DENSE
    most_rows = 4 if halves else 16
    if not dense and most_rows >= problem.M and _in_groups(problem):
        where = "where they lie"
        if problem.weight_format == "fp8":  # a Problem does not have the blocks
            where += " if blocks have a multiple of 64 columns"
        return f"{arithmetic}, codes of the {problem.weight_format} weight multiplied {where}"
    decoded = "" if dense else f", decoded from {problem.weight_format} strip by strip"
    if problem.w_k_major and problem.M <= 16:
        return f"{arithmetic}, dot products with the rows of W{decoded}"
    if dense and not problem.w_k_major and problem.M <= 4:
        return f"{arithmetic}, sums of the rows of W"
    return f"{arithmetic}, packed panels of W{decoded}"


def _in_groups(problem: Problem) -> bool:
    """Whether the rows of a packed weight, as it is stored, are whole groups of codes."""
    return (problem.K if problem.w_k_major else problem.N) % 64 == 0


def _differentiable_backward(
    dy: Tensor,  # [..., N]
    x: Tensor | None,  # [..., K]
    weight: Tensor | None,
    A: Tensor,
    B: Tensor,
    c: Tensor | None,
    alpha: float,
    p: float,
    seed: int,
    needed: list[bool],
) -> tuple[Tensor, ...]:
    """(dx, dA, dB, dc) of `CpuProducts.layer` that can be differentiated themselves; empty where they are not needed.

    x and weight are None where no gradient reads them.
    """
    dropout = Dropout(p, torch.tensor(seed)) if p else None
    (K, _), N = A.shape, B.shape[1]
    dy_rows = dy.reshape(math.prod(dy.shape[:-1]), N)
    rows = None if x is None else x.reshape(dy_rows.shape[0], K)
    adapter = Adapter(A, B, alpha, dropout)
    s = None if rows is None else COMPOSITE.shrink(rows, adapter)
    needs = formulas.Needs(needed[0], False, needed[1], needed[2], False)
    saved = formulas.Saved(rows, weight, A, B, s)
    dc = None
    if c is None:
        dx, _, dA, dB, _ = formulas.backward(COMPOSITE, dy_rows, saved, needs, adapter, A.dtype)
    else:
        z = None
        if needed[3]:
            assert rows is not None and weight is not None
            z = COMPOSITE.shrink_expand(rows, weight.t(), adapter)[0]
        scaled = adapter._replace(column_scale=c)
        dx, _, dA, dB, _, dc = formulas.scaled_backward(
            COMPOSITE, dy_rows, z, saved, needs, scaled, A.dtype
        )
    dx = None if dx is None else dx.reshape(*dy.shape[:-1], K)
    return tuple(dy.new_empty(0) if grad is None else grad for grad in (dx, dA, dB, dc))


def _dense(packed: list[Tensor], format: str, sizes: list[int], dtype: torch.dtype) -> Tensor:
    return restored(format, packed, sizes, dtype).dense()


# Operators that the extension calls: what plain ATen computes for derivatives of derivatives.
_IN_PYTHON: dict[str, Callable[..., object]] = {
    "differentiable_backward": _differentiable_backward,
    "dense": _dense,
}


def _has_amx() -> bool:
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())


@once
def _load() -> str | None:
    """Load the extension; the reason why it cannot be used here, logged once, or None."""
    here = (platform.system(), platform.machine())
    if here != PLATFORM:  # nothing that the user of such a machine could change
        return f"its extension is for {' '.join(PLATFORM)}, and this is {' '.join(here)}"
    try:
        library, reason = _library()
        if library is not None:
            torch.ops.load_library(str(library))
            isa = _OPS.isa()
            for name, function in _IN_PYTHON.items():
                operator, key = f"lora_kernels_cpu::{name}", "CompositeImplicitAutograd"
                # A second kernel is an error or a warning, by the version of torch.
                if not torch._C._dispatch_has_kernel_for_dispatch_key(operator, key):
                    torch.library.impl(operator, key, function)
            reason = None if isa else "this processor has no AVX2 and FMA"
    except (OSError, RuntimeError, AttributeError) as error:
        reason = f"its extension does not load ({error.__cause__ or error}); build it again"
    if reason is not None:
        env.logger().warning("The cpu backend is off, plain ATen computes: %s.", reason)
    return reason


def _library() -> tuple[Path | None, str | None]:
    """(the library for this torch, None), or (None, why there is none): another torch's may end the process as it loads."""
    here = ".".join(torch.__version__.split(".")[:2])
    present = [path for path in (LIBRARY, *LIBRARY.parent.glob("_cpu-torch*.so")) if path.exists()]
    versions = [built_with(path) for path in present]
    for path, version in zip(present, versions, strict=True):
        if version in (None, here):
            return path, None
    if not present:
        return None, (
            "its extension is not built (install with a C++ compiler, or see LORA_KERNELS_BUILD)"
        )
    return None, (
        f"its extension was built with torch {', '.join(sorted(map(str, versions)))}, and this is torch {here}; "
        "build it beside this torch (docs/installing.md)"
    )


def built_with(library: Path) -> str | None:
    """The minor version of torch, "2.13", that the file of a library names; None where it names none."""
    found = re.search(_MARK, library.read_bytes())
    return found and found[1].decode()


def _mask(dropout: Dropout | None) -> tuple[int, int, float]:
    """(threshold, seed, factor of what is kept) as the operators take a mask; threshold 0 keeps everything."""
    if dropout is None:
        return 0, 0, 1.0
    return threshold(dropout.p), int(dropout.seed), 1.0 / (1.0 - dropout.p)


def _masks(dropouts: Sequence[Dropout | None]) -> tuple[list[int], list[int], list[float]]:
    """`_mask` of each projection as three lists; empty ones keep everything."""
    if not any(dropouts):
        return [], [], []
    thresholds, seeds, factors = zip(*map(_mask, dropouts), strict=True)
    return list(thresholds), list(seeds), list(factors)


PRODUCTS = CpuProducts()
PROJECTIONS = CpuProjectionProducts()
BACKEND = CpuBackend()
