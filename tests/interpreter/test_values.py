"""Values that need care: the dropout mask bit for bit, infinities beside padded ranks, alpha in memory, any shape."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_kernels.backends import triton as backend_module
from lora_kernels.backends.base import fastest
from lora_kernels.backends.triton import configs, decode, one_pass, partials, parts, shrink
from lora_kernels.backends.triton.expand import describable
from lora_kernels.dropout import Dropout, _philox, keep_mask
from lora_kernels.operands import Adapter
from lora_kernels.problem import Problem
from lora_kernels.tuning.config import TileConfig
from lora_kernels.tuning.targets import TARGETS
from tests.interpreter.conftest import VARIANTS, on_target, small_tiles
from tests.interpreter.test_products import check_directions
from tests.oracle import Case, assert_budget, check_products
from tests.planned import Planned

SEEDS = [0, 0x1234_5678_9ABC_DEF0, -1, 2**63 - 1]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("p", [0.3, 1e-9, 0.999])
@pytest.mark.parametrize("cols", [64, 41])
def test_dropout_mask_bit_for_bit(seed, p, cols, triton_products):
    """Operands of ones and unit matrices make each of the four masked products its mask."""
    dropout = Dropout(p, torch.tensor(seed))
    rows = 37
    expected = keep_mask(dropout, rows, cols)
    ones, unit = torch.ones(rows, cols), torch.eye(cols)
    two_kernel = triton_products("two_kernel")
    s = two_kernel.shrink(ones, Adapter(unit, unit, 1.0, dropout))
    none = torch.zeros(rows, 1), torch.zeros(1, cols), torch.ones(rows, 1)
    output = Adapter(torch.zeros(1, 1), torch.ones(1, cols), 1.0, dropout_out=dropout)
    tail = two_kernel.expand(*none, output)
    reduced = two_kernel.wgrad(ones, torch.eye(rows), torch.float32, dropout).t()
    adapter = Adapter(unit, torch.ones(cols, 4), 1.0, dropout)
    _, s_one = triton_products("one_pass").shrink_expand(ones, torch.ones(cols, 4), adapter)
    for result in (s, tail, reduced, s_one):
        assert torch.equal(result != 0, expected)
        assert torch.allclose(result[expected], torch.tensor(1 / (1 - p)))


def test_a_word_that_is_the_threshold_is_kept(triton_products):
    """p such that the first element's word is round(p·2³²) exactly: the mask keeps words that are not below it."""
    seed = torch.tensor(99)
    word = _philox(seed, torch.zeros(1, dtype=torch.int64))[0, 0].item()
    products, one = triton_products("two_kernel"), torch.ones(1, 1)
    for limit, kept in ((word, True), (word + 1, False)):
        s = products.shrink(one, Adapter(one, one, 1.0, Dropout(limit / 2**32, seed)))
        assert (s.item() > 0) == kept


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "dtype, adapter_dtype",
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float16),
    ],
)
def test_infinity_stays_an_infinity_beside_padded_ranks(
    variant, dtype, adapter_dtype, triton_products
):
    """R = 5 of a block of 16: an infinite x times a padded rank's zeros is NaN, which y must not see.

    Nor does it see what an infinite s times the small part of b is, where that is multiplied apart.
    """
    products = triton_products(variant)
    types = dtype, dtype, adapter_dtype, adapter_dtype
    x, w, a, b = (
        torch.rand(size).to(own) + 0.5
        for size, own in zip(((9, 40), (40, 24), (40, 5), (5, 24)), types, strict=True)
    )
    x[3, 7] = float("inf")
    y, s = products.shrink_expand(x, w, Adapter(a, b, 0.5))
    assert y[3].isinf().all() and s[3].isinf().all()
    others = torch.arange(9) != 3
    assert y[others].isfinite().all() and s[others].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("M, N, R", [(1, 8, 1), (70, 24, 13), (37, 136, 64), (9, 40, 130)])
def test_a_rank_tail_in_parts(M, N, R, dtype):
    """Their product is s·b to 16 bits, and what of it is infinite, whatever lies beside; tensor copies can fetch both."""
    config = TileConfig("shrink", 16, 1, 16, 4, 2)
    s, whole = torch.randn(M, 2 * R)[:, ::2], torch.randn(R, N).to(dtype)
    for b in (whole, whole.t().contiguous().t(), torch.randn(R, 2 * N).to(dtype)[:, ::2]):
        left, right = parts.parts(s, b, config)
        assert left.shape == (M, 3 * R) and right.shape == (3 * R, N)
        assert left.dtype == right.dtype == torch.bfloat16
        assert describable(left) and (describable(right) or describable(right.t()))
        exact, bound = s.double() @ b.double(), s.double().abs() @ b.double().abs()
        assert ((left.double() @ right.double() - exact).abs() <= 2.0**-15 * bound).all()
        assert torch.equal(parts.parts(None, b, config)[1], right)
    s[0, 0], b[-1, 2] = torch.inf, torch.inf if dtype == torch.float32 else 1.0
    left, right = (t.float() for t in parts.parts(s, b, config))
    assert torch.equal((left @ right).isnan(), (s @ b.float()).isnan())


def _float32_products(products, wide, lowrank):
    """(name, result, left, right) of every low-rank product of a bfloat16 [M, C] and a float32 one, [M, R] or [C, R]."""
    M, C = wide.shape
    s, b_t = lowrank[:M], lowrank[:C]
    adapter = Adapter(b_t, b_t.t(), 1.0)
    q, dB = products.shrink_wgrad(wide, adapter, s, torch.float32)
    yield "s", products.shrink(wide, adapter), wide, b_t
    yield "dA", products.wgrad(wide, s, torch.float32), wide.t(), s
    yield "dB", products.wgrad(s, wide, torch.float32), s.t(), wide
    yield "q, dB beside it", q, wide, b_t
    yield "dB, q beside it", dB, s.t(), wide


def test_a_float32_operand_beside_bfloat16_keeps_its_bits(triton_products):
    """Its three parts are the whole number: a product with ones gives it back, and a long sum is as exact as eager's."""
    lowrank = torch.randn(150, 12)
    products = triton_products("two_kernel")
    for name, result, left, right in _float32_products(
        products, torch.eye(41).bfloat16(), lowrank[:41]
    ):
        expected = right if right.dtype == torch.float32 else left
        assert torch.equal(result, expected), name
    for name, result, left, right in _float32_products(
        products, torch.randn(150, 140).bfloat16(), lowrank
    ):
        assert_budget(result, left.float() @ right.float(), left.double() @ right.double(), name)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("where", ["wide", "lowrank"])
@pytest.mark.parametrize("exact", [False, True])
def test_what_is_not_finite_is_where_eager_has_it(value, where, exact, triton_products):
    """Also where the smaller parts of a number are zero, as in those that bfloat16 holds."""
    wide, lowrank = torch.randn(41, 37).bfloat16(), torch.randn(41, 12)
    lowrank = lowrank.bfloat16().float() if exact else lowrank
    (wide if where == "wide" else lowrank)[5, 3] = value
    for name, result, left, right in _float32_products(
        triton_products("two_kernel"), wide, lowrank
    ):
        eager = left.float() @ right.float()
        assert not eager.isfinite().all() and eager.isfinite().any(), name
        for test in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(test(result), test(eager)), f"{test.__name__} of {name}"


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_nan_in_x_reaches_its_row_only(variant, triton_products):
    x, w, a, b = torch.ones(9, 40), torch.ones(40, 24), torch.ones(40, 5), torch.ones(5, 24)
    x[8, 39] = float("nan")
    y, s = triton_products(variant).shrink_expand(x, w, Adapter(a, b, 0.5))
    assert y[8].isnan().all() and s[8].isnan().all()
    assert y[:8].isfinite().all() and s[:8].isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_s_beyond_float16_does_not_overflow(variant, triton_products):
    """x·A passes float16's 65504; s is float32, so y is right where step-by-step float16 has infinities."""
    products = triton_products(variant)
    x, a = torch.full((3, 64), 64.0).half(), torch.full((64, 4), 64.0).half()
    b = torch.full((4, 32), 2.0**-12).half()
    adapter = Adapter(a, b, 2.0**-10)
    y, s = products.shrink_expand(x, torch.zeros(64, 32).half(), adapter)
    assert torch.equal(s, torch.full((3, 4), 256.0))
    assert torch.equal(y, torch.full((3, 32), 0.25).half())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("variant", ["two_kernel", "tma", "one_pass", "decode"])
def test_alpha_in_memory(variant, dtype, triton_products, monkeypatch):
    """On a GPU a 0-d alpha is read by the kernel; here the launchers are told that a CPU tensor is one."""
    products = triton_products(variant)
    o = Case(20, 33, 70, 5).operands()
    as_number = products.shrink_expand(o.x, o.w, o.adapter, o.bias)
    for module in (shrink, one_pass, decode, partials):
        monkeypatch.setattr(module, "scale_argument", lambda a: (a, isinstance(a, torch.Tensor)))
    adapter = o.adapter._replace(scale=torch.tensor(0.75, dtype=dtype))
    in_memory = products.shrink_expand(o.x, o.w, adapter, o.bias)
    for expected, result in zip(as_number, in_memory, strict=True):
        assert torch.equal(expected, result)


def test_decode_leaves_to_two_kernels_what_it_cannot_do(triton_products):
    products = triton_products("decode")
    for case in (Case(65, 24, 40, 4), Case(9, 24, 40, 65), Case(9, 24, 40, 4, dropout=0.5)):
        check_directions(products, case)


_SHIPPED = [
    Case(150, 136, 200, 16, dtype=torch.bfloat16),
    Case(20, 264, 136, 72, dtype=torch.float16, adapter_dtype=torch.float32),
    Case(40, 70, 90, 8, dtype=torch.float32, dropout=0.1),
]


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("case", _SHIPPED, ids=str)
def test_tiles_that_select_picks(case, target, monkeypatch):
    on_target(monkeypatch, target)
    check_products(Planned(backend_module.BACKEND, TARGETS[target]), case)


@pytest.mark.parametrize("algorithm", ["two_kernel", "one_pass", "decode"])
def test_forced_algorithms_with_the_tiles_that_select_picks(algorithm, monkeypatch):
    on_target(monkeypatch, "sm_90")
    products = Planned(backend_module.BACKEND, TARGETS["sm_90"], algorithm)
    check_directions(products, Case(40, 136, 264, 16, dtype=torch.bfloat16))


_DTYPES = st.sampled_from(
    [
        (torch.float32, None),
        (torch.float16, None),
        (torch.bfloat16, None),
        (torch.bfloat16, torch.float32),
    ]
)


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(
    sizes=st.tuples(st.integers(1, 70), st.integers(1, 70), st.integers(1, 90), st.integers(1, 40)),
    dtypes=_DTYPES,
    variant=st.sampled_from(sorted(VARIANTS)),
    dropout=st.sampled_from([0.0, 0.0, 0.4]),
    layout=st.sampled_from(["linear", "plain", "peft", "transposed", "sliced", "broadcast"]),
)
def test_any_problem(sizes, dtypes, variant, dropout, layout):
    algorithm, target, changes = VARIANTS[variant]
    with pytest.MonkeyPatch.context() as patch:
        on_target(patch, target)
        patch.setattr(configs, "tiles_for", small_tiles(changes))
        check_products(
            Planned(backend_module.BACKEND, TARGETS[target], algorithm),
            Case(*sizes, *dtypes, dropout=dropout, layout=layout),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", TARGETS)
def test_the_smallest_problem_on_every_target(target, dtype, monkeypatch):
    """Each target computes it in bfloat16; what it refuses in float32 it says beforehand."""
    on_target(monkeypatch, target)
    name = str(dtype).removeprefix("torch.")
    problem = Problem(1, 1, 1, 1, name, name, device="cuda")
    if fastest(backend_module.BACKEND.candidates(problem, TARGETS[target])) is not None:
        products = Planned(backend_module.BACKEND, TARGETS[target])
        check_directions(products, Case(1, 1, 1, 1, dtype=dtype))
    else:
        assert dtype == torch.float32 and target == "gfx1100"
