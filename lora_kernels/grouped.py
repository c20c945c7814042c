"""The functional form over groups of rows: experts with a weight each, or several adapters over one weight."""

from __future__ import annotations

from torch import Tensor

from lora_kernels import functional
from lora_kernels.arguments import Arguments
from lora_kernels.operands import Weight


def grouped_lora_linear(
    x: Tensor,
    weight: Weight,
    A: Tensor,
    B: Tensor,
    offsets: Tensor,
    scale: float | Tensor,
    bias: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """y[g] = x[g]·weight[g]ᵀ + bias[g] + scale[g]·(dropout(x[g])·A[g])·B[g] for each group g of rows, with every derivative.

    x [T, K] with its rows sorted by group: group g has rows offsets[g] up to offsets[g + 1]. offsets int32 [G + 1] on x's
    device: 0 first, then never falling, T last. weight [G, N, K], or [N, K] for all groups (a quantised one too);
    A [G, K, R], B [G, R, N]; bias [G, N] or [N] -> y [T, N]. Any strides, any sizes, G >= 1; a group may have no rows.
    Dtypes, sums, autocast, `dropout_p`, `seed` and `backend` are those of `lora_linear`; the mask is one of all of x.

    scale: a real number, or a tensor [G] that needs no gradient. Gradients have the shapes of their operands; those of a
    group without rows are zero. A NaN or an infinity stays in its group.

    ValueError or TypeError names the argument, its value and the rule. The values of offsets are checked on a CPU only: on
    another device the host never reads them, and where they break the rule the results are unspecified; nothing outside
    of the operands is read or written.

    >>> x, weight = torch.randn(6, 8), torch.randn(3, 4, 8)
    >>> A, B = torch.randn(3, 8, 2), torch.randn(3, 2, 4)
    >>> offsets = torch.tensor([0, 2, 2, 6], dtype=torch.int32)  # group 1 has no rows
    >>> y = grouped_lora_linear(x, weight, A, B, offsets, 0.5)
    >>> torch.allclose(y[2:], x[2:] @ weight[2].T + 0.5 * (x[2:] @ A[2] @ B[2]), atol=1e-5)
    True
    """
    rest = bias, dropout_p, seed, backend, None, offsets
    return functional.call(Arguments(x, weight, A, B, scale, *rest))
