"""The sizes of one LoRA linear: what it computes, in FLOPs and bytes.

A problem is y = x·W + alpha·(x·A)·B with x [M, K], W [K, N], A [K, R], B [R, N]. It holds numbers and names only, so
that choosing a backend, predicting a time and explaining a choice need neither torch nor a device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
DENSE = "dense"  # the format of a weight that is a plain tensor
# Bytes of an element in formats that GPU kernels read. Of nf4 with float32 scales; doubly quantised ones make it 0.52.
PACKED_BYTES = {"nf4": 0.5 + 4 / 64, "int8": 1.0, "fp8": 1.0}


@dataclass(frozen=True)
class Problem:
    """Sizes and types of one call, forward or (see `adjoint`) backward.

    `dtype` is that of x, W, bias and y; `adapter_dtype` that of A and B. `device` is a torch device type: "cpu", "cuda".
    `w_k_major`: consecutive k are adjacent in memory: true in forward (nn.Linear stores [N, K]). `backward`: x is
    dy, y is dx, and dA and dB are computed beside them. `weight_format`: "dense", or the name of a quantised format.
    `groups`: the rows are sorted into so many groups with an adapter each; 0: one adapter, no groups. `weights`: one that
    all rows share, or one a group.
    ValueError or TypeError names the field, its value and the rule.
    """

    M: int
    N: int
    K: int
    R: int
    dtype: str
    adapter_dtype: str
    device: str = "cpu"
    bias: bool = False
    dropout: bool = False
    w_k_major: bool = True
    backward: bool = False
    weight_format: str = DENSE
    groups: int = 0
    weights: int = 1

    def __post_init__(self) -> None:
        for name in ("M", "N", "K", "R", "groups", "weights"):
            size = getattr(self, name)
            if isinstance(size, bool) or not isinstance(size, int):
                raise TypeError(f"{name} must be an integer, got {type(size).__name__}")
            if not 0 <= size < 2**63:
                raise ValueError(f"{name} must be in [0, 2^63), got {size}")
        for name in ("dtype", "adapter_dtype"):
            if getattr(self, name) not in ITEMSIZE:
                raise ValueError(
                    f"{name} must be one of {tuple(ITEMSIZE)}, got {getattr(self, name)!r}"
                )
        if self.weights not in (1, self.groups):
            raise ValueError(
                f"weights must be 1, or groups, {self.groups}, got {self.weights}: one for all, or one a group"
            )
        if not isinstance(self.device, str) or not self.device.isidentifier():
            raise ValueError(
                f"device must be a torch device type such as 'cpu', got {self.device!r}"
            )

    @property
    def itemsize(self) -> int:
        """Bytes an element of x, W and y takes."""
        return ITEMSIZE[self.dtype]

    @property
    def flops(self) -> int:
        """Floating-point operations of the frozen product, 2·M·N·K."""
        return 2 * self.M * self.N * self.K

    @property
    def lowrank_flops(self) -> int:
        """Operations that LoRA adds: 2·M·R·(K + N)."""
        return 2 * self.M * self.R * (self.K + self.N)

    @property
    def with_rows(self) -> int:
        """How many groups have rows where these are spread evenly; 1 without groups."""
        return min(self.groups, self.M) if self.groups else 1

    @property
    def frozen_bytes(self) -> int:
        """Bytes the frozen layer must move once: x, each W (and bias) that has rows, and y."""
        weights = min(self.weights, self.with_rows)
        operands = self.K * self.N + (self.N if self.bias else 0)
        return (self.M * self.K + weights * operands + self.M * self.N) * self.itemsize

    @property
    def packed_bytes(self) -> float:
        """Bytes of W as it is stored: fewer than its share of `frozen_bytes` where it is quantised."""
        return self.N * self.K * PACKED_BYTES.get(self.weight_format, self.itemsize)

    @property
    def lowrank_bytes(self) -> int:
        """Bytes LoRA adds when it is fused: each A, B that has rows once, and s (float32) written and read once."""
        adapters = self.with_rows * (self.K + self.N) * self.R
        return adapters * ITEMSIZE[self.adapter_dtype] + 2 * self.M * self.R * 4

    @property
    def empty(self) -> bool:
        """True when there is nothing to multiply: some extent is zero."""
        return 0 in (self.M, self.N, self.K, self.R)

    def adjoint(self) -> Problem:
        """The problem of dx = dy·Wᵀ + q·Aᵀ: the same computation with K and N exchanged, no bias."""
        return replace(
            self,
            N=self.K,
            K=self.N,
            bias=False,
            w_k_major=not self.w_k_major,
            backward=not self.backward,
        )

    def __str__(self) -> str:
        adapters = "" if self.adapter_dtype == self.dtype else f", {self.adapter_dtype} adapters"
        weight = "" if self.weight_format == DENSE else f", {self.weight_format} weight"
        sizes = f"M={self.M} N={self.N} K={self.K} R={self.R}"
        groups = f", {self.groups} groups" if self.groups else ""
        groups += " of one weight" if self.groups > self.weights else ""
        return f"{sizes} {self.dtype}{adapters}{weight}{groups} on {self.device}"
