"""What is right: the plain formula in any dtype and in float64, the error budget, and the problems every backend must solve.

Budget: a result may be off from float64 by at most twice what eager PyTorch is off in the same dtype, plus two roundings.
NaN and infinities must stand where eager's stand, except that a kernel may be finite where eager overflowed in between.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_kernels.backends.base import Products
from lora_kernels.dropout import Dropout, scaled_mask
from lora_kernels.operands import Adapter


def reference(x, weight, A, B, alpha, bias=None, mask=None) -> Tensor:
    """y = F.linear(x, weight, bias) + alpha·((mask∘x)·A·B), naively, in the operands' own dtypes: weight [N, K]."""
    lora_input = x if mask is None else x * mask.to(x.dtype)
    return (F.linear(x, weight, bias) + alpha * (lora_input.to(A.dtype) @ A @ B)).to(x.dtype)


def assert_budget(
    actual: Tensor, eager: Tensor, exact: Tensor, what: str = "result", terms: int = 0
) -> None:
    """`actual` is within the error budget that `eager` (same computation, same dtype) and `exact` (float64) define.

    On a GPU the vendor's library divides a float32 sum among threads, and is off by less the more there are: to the budget
    comes a random walk of the roundings of a sum of so many `terms`.
    """
    assert actual.shape == exact.shape, (
        f"{what}: shape {tuple(actual.shape)}, not {tuple(exact.shape)}"
    )
    assert actual.dtype == eager.dtype, f"{what}: dtype {actual.dtype}, not {eager.dtype}"
    ours, theirs = actual.double(), eager.double()
    for name, test in (("NaN", torch.isnan), ("infinity", torch.isinf)):
        wrong = test(ours) & ~test(theirs) & ~test(exact)
        missing = test(exact) & ~test(ours)
        assert not wrong.any(), f"{what}: {name} at {_where(wrong)} where eager has none"
        assert not missing.any(), f"{what}: no {name} at {_where(missing)}"
    finite = torch.isfinite(exact) & torch.isfinite(ours) & torch.isfinite(theirs)
    if not finite.any():
        return
    eps = torch.finfo(actual.dtype).eps
    error = torch.where(finite, (ours - exact).abs(), 0.0)
    eager_error = torch.where(finite, (theirs - exact).abs(), 0.0).max()
    roundings = (
        32 if actual.dtype == torch.float64 else 2
    )  # float64 has no more exact oracle than itself
    magnitude = torch.where(finite, exact, 0.0).abs()
    allowed = 2 * eager_error + roundings * eps * magnitude.clamp(min=1.0)
    if actual.is_cuda and actual.dtype == torch.float32:
        allowed += 2 * math.sqrt(terms) * torch.finfo(torch.float32).eps * magnitude.max()
    over = error > allowed
    assert not over.any(), (
        f"{what}: off by {error[over].max():.3e} at {_where(over)}; eager is off by {eager_error:.3e}, "
        f"allowed {allowed[over].min():.3e}"
    )


def _where(mask: Tensor) -> list[int]:
    return mask.nonzero()[0].tolist()


def assert_bits(actual, expected) -> None:
    """The same tensors in the same dtypes, nested alike in lists or dicts; None where None is expected, NaN where NaN."""
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=0.0, equal_nan=True)


def with_gradients(function: Callable, tensors: Iterable[Tensor | None], dy=None) -> list[Tensor]:
    """y = function(*tensors) and the gradient of each that requires one: of <y, dy>, without dy of y's squares."""
    tensors = list(tensors)
    y = function(*tensors)
    wanted = [t for t in tensors if isinstance(t, Tensor) and t.requires_grad]
    loss, dy = (y.square().sum(), None) if dy is None else (y, dy.to(y.dtype))
    return [y, *(torch.autograd.grad(loss, wanted, dy) if wanted else ())]


def second_derivatives(function: Callable, tensors: Iterable[Tensor | None]) -> list[Tensor]:
    """Of a penalty on the gradient of y's squares: its gradient for each tensor that requires one."""
    tensors = list(tensors)
    wanted = [t for t in tensors if isinstance(t, Tensor) and t.requires_grad]
    loss = function(*tensors).square().sum()
    first = torch.autograd.grad(loss, wanted, create_graph=True)
    return list(torch.autograd.grad(sum(g.square().sum() for g in first), wanted))


def check_function(
    ours: Callable, plain: Callable, tensors: Iterable[Tensor | None], dy: Tensor | None = None
) -> None:
    """y and every gradient of `ours` are within the budget of `plain`, which is also computed in float64."""
    tensors = list(tensors)
    wide = [
        t if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in tensors
    ]
    if dy is None:
        dy = torch.randn_like(ours(*tensors))
    actual, eager = (with_gradients(function, tensors, dy) for function in (ours, plain))
    exact = with_gradients(plain, wide, dy)
    places = [i for i, t in enumerate(tensors) if t is not None and t.requires_grad]
    for name, *triple in zip(
        ("y", *(f"gradient of operand {i}" for i in places)), actual, eager, exact, strict=True
    ):
        assert_budget(*triple, what=name)


def named_gradients(net: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of the gradient of each parameter that has one, which is cleared."""
    found = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    return found


@contextmanager
def saved_inside() -> Iterator[list[Tensor]]:
    """A list of the tensors that the forward passes inside save for their backward."""
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        yield saved


@dataclass(frozen=True)
class Case:
    """One awkward problem: sizes, dtypes and layouts. `operands()` builds the same tensors every time."""

    M: int
    N: int
    K: int
    R: int
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype | None = None
    bias: bool = True
    dropout: float = 0.0
    alpha: float = 0.75
    layout: str = "linear"  # see _strided
    device: str = field(default="cpu", compare=False)

    def __str__(self) -> str:
        dtypes = str(self.dtype).removeprefix("torch.")
        if self.adapter_dtype is not None:
            dtypes += "+" + str(self.adapter_dtype).removeprefix("torch.")
        extras = ("-bias" if self.bias else "") + (f"-p{self.dropout}" if self.dropout else "")
        return f"{self.M}x{self.N}x{self.K}r{self.R}-{dtypes}-{self.layout}{extras}"

    @property
    def longest(self) -> int:
        """The terms of the longest sum of all products."""
        return max(self.M, self.N, self.K, self.R)

    def operands(self) -> Operands:
        """x [M, K], w [K, N], a [K, R], b [R, N], bias [N] or None, dy [M, N], seed: standard normal, scaled to O(1)."""
        generator = torch.Generator().manual_seed(
            1000003 * self.M + 10007 * self.N + 101 * self.K + self.R
        )

        def normal(rows: int, cols: int, dtype: torch.dtype, scale: float) -> Tensor:
            values = torch.randn(rows, cols, generator=generator, dtype=torch.float64) * scale
            return values.to(dtype).to(self.device)

        adapter_dtype = self.adapter_dtype or self.dtype
        x = normal(self.M, self.K, self.dtype, 1.0)
        w = normal(self.K, self.N, self.dtype, max(self.K, 1) ** -0.5)
        a = normal(self.K, self.R, adapter_dtype, max(self.K, 1) ** -0.5)
        b = normal(self.R, self.N, adapter_dtype, max(self.R, 1) ** -0.5)
        bias = normal(1, self.N, self.dtype, 1.0)[0] if self.bias else None
        if bias is not None and self.layout == "sliced":
            bias = _sliced(bias[None])[0]
        dy = normal(self.M, self.N, self.dtype, 1.0)
        return Operands(
            *_strided(self.layout, x, w, a, b), bias, _strided_grad(self.layout, dy), self
        )


@dataclass(frozen=True)
class Operands:
    """The tensors of a case and what must come out of them."""

    x: Tensor
    w: Tensor
    a: Tensor
    b: Tensor
    bias: Tensor | None
    dy: Tensor
    case: Case

    @property
    def adapter(self) -> Adapter:
        return Adapter(self.a, self.b, self.case.alpha, self.dropout)

    @property
    def dropout(self) -> Dropout | None:
        if not self.case.dropout:
            return None
        return Dropout(self.case.dropout, torch.tensor(0x1234_5678_9ABC, device=self.x.device))

    def results(self, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """y, s and every gradient, step by step: in float64 for `dtype` float64, else as eager rounds them (None).

        Gradients are of <y, dy>: dx = dy·wᵀ + mask∘(q·aᵀ), dA = (mask∘x)ᵀ·q, dB = sᵀ·dy, q = alpha·dy·bᵀ.
        """

        def cast(t: Tensor | None) -> Tensor | None:
            return t if t is None or dtype is None else t.to(dtype)

        x, w, a, b, bias, dy = map(cast, (self.x, self.w, self.a, self.b, self.bias, self.dy))
        base, adapter, alpha = x.dtype, a.dtype, self.case.alpha
        mask = 1.0
        if (dropout := self.dropout) is not None:
            mask = scaled_mask(dropout, self.case.M, self.case.K, base)
        xm, dya = (x * mask).to(adapter), dy.to(adapter)
        xa, q = xm @ a, alpha * (dya @ b.t())
        y = x @ w + (alpha * (xa @ b)).to(base)
        return {
            "y": y if bias is None else y + bias,
            "s": alpha * xa,
            "q": q,
            "dx": dy @ w.t() + (mask * (q @ a.t())).to(base),
            "dA": xm.t() @ q,
            "dB": (alpha * xa).t() @ dya,
        }


def check_products(products: Products, case: Case, adjoint: Products | None = None) -> None:
    """Every product on `case`, forward and (by `adjoint`) backward, is within budget; equal calls give equal bits."""
    back = adjoint or products
    o = case.operands()
    eager, exact = o.results(None), o.results(torch.float64)
    lowrank = torch.float64 if case.dtype == torch.float64 else torch.float32

    def check(name: str, actual: Tensor, dtype: torch.dtype) -> None:
        assert actual.is_contiguous(), f"{name} is not contiguous"
        expected = eager[name].to(dtype)
        assert_budget(actual, expected, exact[name], f"{name} of {case}", case.longest)

    y, s = products.shrink_expand(o.x, o.w, o.adapter, o.bias)
    check("y", y, case.dtype)
    check("s", s, lowrank)
    y2, s2 = products.shrink_expand(o.x, o.w, o.adapter, o.bias)
    assert torch.equal(y.nan_to_num(), y2.nan_to_num()) and torch.equal(
        s.nan_to_num(), s2.nan_to_num()
    )
    check("s", products.shrink(o.x, o.adapter), lowrank)
    check("y", products.expand(o.x, o.w, s, o.adapter, o.bias), case.dtype)

    q, dB = back.shrink_wgrad(o.dy, o.adapter.t(), s, o.b.dtype)
    rounded = q.dtype == case.dtype == o.b.dtype  # what a fused one may give
    check("q", q.contiguous(), case.dtype if rounded else lowrank)
    check("dB", dB, o.b.dtype)
    check("dx", back.expand(o.dy, o.w.t(), q, o.adapter.t()), case.dtype)
    scale = torch.tensor(case.alpha, dtype=torch.float64)
    dx, q2 = back.shrink_expand(o.dy, o.w.t(), o.adapter.t()._replace(scale=scale))
    check("dx", dx, case.dtype)
    check("q", q2, lowrank)
    check("dA", back.wgrad(o.x, q, o.a.dtype, o.dropout), o.a.dtype)
    check("dB", back.wgrad(s, o.dy, o.b.dtype), o.b.dtype)


def check_gradients(products: Products, case: Case) -> None:
    """dx, dA and dB of `gradients`, which may compute them beside each other, are within budget."""
    o = case.operands()
    eager, exact = o.results(None), o.results(torch.float64)
    given = o.dy, o.w.t(), o.adapter.t(), o.x, products.shrink(o.x, o.adapter), o.a.dtype
    for name, actual in zip(("dx", "dA", "dB"), products.gradients(*given), strict=True):
        what = f"{name} of {case}, beside the others"
        assert_budget(actual, eager[name], exact[name], what, case.longest)


def gradients(
    function: Callable[..., Tensor],
    operands: dict[str, Tensor],
    dy: Tensor,
    dtype: torch.dtype | None = None,
    needed: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """y of `function(**operands)` and the `needed` gradients of <y, dy>, by name; in `dtype`, else in the operands' own."""
    leaves = {
        name: t.detach().to(dtype or t.dtype).requires_grad_(needed is None or name in needed)
        for name, t in operands.items()
    }
    wanted = [name for name, leaf in leaves.items() if leaf.requires_grad]
    found = with_gradients(
        lambda *tensors: function(**dict(zip(leaves, tensors, strict=True))), leaves.values(), dy
    )
    return dict(zip(("y", *wanted), found, strict=True))


def assert_gradients(
    actual: dict[str, Tensor],
    plain: Callable[..., Tensor],
    operands: dict[str, Tensor],
    dy: Tensor,
    what: str = "",
) -> None:
    """`actual`, of `gradients`, is within the budget that `plain`, in the operands' dtypes and in float64, defines."""
    eager, exact = (gradients(plain, operands, dy, to, actual) for to in (None, torch.float64))
    longest = max(size for t in operands.values() for size in (1, *t.shape))
    for name, value in actual.items():
        assert_budget(value, eager[name], exact[name], f"{name} {what}", longest)


@contextmanager
def made_inside() -> Iterator[Callable[[], list[tuple[int, ...]]]]:
    """Gives a function that lists the shapes of the tensors made inside and still held by somebody."""
    made: list[weakref.ref[Tensor]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            made.extend(weakref.ref(t) for t in tree_leaves(result) if isinstance(t, Tensor))
            return result

    with Watch():
        yield lambda: [tuple(t.shape) for ref in made if (t := ref()) is not None]


def _sliced(t: Tensor) -> Tensor:
    """Strides (2·cols + 2, 2), offset 1, NaN in between."""
    rows, cols = t.shape
    buffer = torch.full((rows, cols + 1, 2), float("nan"), dtype=t.dtype, device=t.device)
    return buffer[:, :cols, 1].copy_(t)


def _strided(layout: str, x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    """The same values in another memory layout. w is [K, N]; "linear" keeps w, a, b as nn.Linear and the book store them."""

    def transposed(t: Tensor) -> Tensor:
        return t.t().contiguous().t()

    if layout == "linear":
        return x, transposed(w), a, b
    if layout == "plain":
        return x, w, a, b
    if layout == "peft":
        return x, transposed(w), transposed(a), transposed(b)
    if layout == "transposed":
        return tuple(map(transposed, (x, w, a, b)))
    if layout == "sliced":
        return tuple(map(_sliced, (x, w, a, b)))
    if layout == "broadcast":  # every row of x is the first, stride 0
        return x[:1].expand(x.shape) if x.shape[0] else x, transposed(w), a, b
    raise ValueError(f"layout must be a name _strided knows, got {layout!r}")


def _strided_grad(layout: str, dy: Tensor) -> Tensor:
    """dy as autograd may hand it over: contiguous, transposed, or expanded from one number (strides 0, 0)."""
    if layout == "transposed":
        return dy.t().contiguous().t()
    if layout == "broadcast" and dy.numel():
        return dy[:1, :1].expand(dy.shape)
    return dy


_SIZES = [  # (M, N, K, R): prime, one, block edges, rank above either side, nothing at all
    (1, 1, 1, 1),
    (1, 48, 64, 8),
    (3, 17, 5, 2),
    (7, 12, 2, 16),
    (16, 64, 32, 16),
    (31, 37, 41, 5),
    (33, 65, 47, 12),
    (64, 64, 64, 64),
    (65, 31, 97, 24),
    (2, 100, 99, 33),
    (13, 24, 40, 100),
    (0, 8, 8, 4),
    (5, 0, 8, 4),
    (5, 8, 0, 4),
    (5, 8, 8, 0),
]

_MIXED = Case(33, 65, 47, 12, dtype=torch.bfloat16, adapter_dtype=torch.float32)

AWKWARD: list[Case] = (
    [Case(*sizes) for sizes in _SIZES]
    + [Case(*sizes, dtype=torch.bfloat16) for sizes in _SIZES[:11]]
    + [Case(*sizes, dtype=torch.float16, bias=False) for sizes in _SIZES[1:9]]
    + [replace(_MIXED, dtype=d) for d in (torch.bfloat16, torch.float16)]
    + [
        Case(31, 37, 41, 5, dtype=d, layout=layout, bias=layout != "plain")
        for d in (torch.float32, torch.bfloat16)
        for layout in ("plain", "peft", "transposed", "sliced", "broadcast")
    ]
    + [Case(31, 37, 42, 5, dtype=d, dropout=0.3) for d in (torch.float32, torch.bfloat16)]
    + [
        Case(33, 17, 5, 12, dropout=0.3),  # the masked operand is the narrower one
        Case(9, 80, 112, 4, dtype=torch.bfloat16),  # multiples of 16 and of no larger tile
    ]
    + [replace(_MIXED, dropout=0.5, layout="peft")]
    # An infinite alpha is left out: s = alpha·xA is infinite of either sign, and sums of those are NaN where eager,
    # which scales last, has infinities.
    + [Case(16, 24, 32, 4, alpha=value) for value in (0.0, -2.5, 1e-30, float("nan"))]
)

FLOAT64: list[Case] = [replace(case, dtype=torch.float64) for case in AWKWARD[:15]]
