"""What the kernels do to memory: order, traffic, offsets past 2³¹, odd strides, launches."""

from __future__ import annotations

import gc
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from lora_kernels.backends import device as device_module
from lora_kernels.backends import triton as backend_module
from lora_kernels.backends.triton import (
    configs,
    decode,
    expand,
    launch,
    one_pass,
    shrink,
    shrink_wgrad,
    wgrad,
)
from lora_kernels.backends.triton import products as products_module
from lora_kernels.backends.triton.partials import sum_partials
from lora_kernels.dropout import Dropout, _philox
from lora_kernels.operands import Adapter
from lora_kernels.problem import Problem
from lora_kernels.tuning.config import TileConfig
from lora_kernels.tuning.targets import TARGETS
from tests.interpreter import strict
from tests.interpreter.conftest import VARIANTS, on_target
from tests.oracle import Case, assert_budget, made_inside
from tests.planned import Planned

ALIGNED = Case(64, 96, 128, 16, dtype=torch.bfloat16)


def every_product(products, case: Case) -> dict[str, torch.Tensor]:
    o = case.operands()
    y, s = products.shrink_expand(o.x, o.w, o.adapter, o.bias)
    q, dB = products.shrink_wgrad(o.dy, o.adapter.t(), s, o.b.dtype)
    dx = products.expand(o.dy, o.w.t(), q, o.adapter.t())
    dA = products.wgrad(o.x, q, o.a.dtype, o.dropout)
    return {"y": y, "s": s, "q": q, "dx": dx, "dA": dA, "dB": dB}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_program_order_changes_no_bit(variant, dropout, triton_products):
    products = triton_products(variant)
    case = Case(45, 50, 56, 20, dtype=torch.bfloat16, dropout=dropout)
    ascending = every_product(products, case)
    for order in ("descending", "shuffled"):
        with strict.program_order(order):
            for name, result in every_product(products, case).items():
                assert torch.equal(result, ascending[name]), f"{name} in {order} order"


@pytest.mark.parametrize("variant", VARIANTS)
def test_operands_are_left_alone_and_results_are_stored_once(variant, triton_products):
    products = triton_products(variant)
    o, untouched = ALIGNED.operands(), ALIGNED.operands()
    with strict.recording() as launches:
        y, s = products.shrink_expand(o.x, o.w, o.adapter, o.bias)
        products.shrink_wgrad(o.dy, o.adapter.t(), s, o.b.dtype)
        products.wgrad(o.x, s, o.a.dtype)
    for name in ("x", "w", "a", "b", "bias", "dy"):
        assert torch.equal(getattr(o, name), getattr(untouched, name)), name
    stored = [launch.written["y_ptr"] for launch in launches if "y_ptr" in launch.written]
    (addresses,) = stored
    assert len(set(addresses.tolist())) == len(addresses) == y.numel()
    assert not any(launch.loads["y_ptr"] for launch in launches)
    if variant in ("one_pass", "decode"):  # by the programs of one block of columns only
        assert launches[0].stores["s_ptr"] == s.numel()
    if variant == "one_launch":  # by the programs of their rows alone
        assert launches[0].stores["whole_ptr"] == launches[0].stores["s_ptr"] == s.numel()


@pytest.mark.parametrize("variant", ["two_kernel", "tma"])
def test_traffic_of_two_kernels_is_that_of_their_tiles(variant, triton_products):
    """x is read once for s and once a block of columns; w once a block of rows; s is the only intermediate.

    It is stored in float32 for the backward, and in x's type for the product.
    """
    products = triton_products(variant, shrink={"split": 1, "rank_chunk": 16})
    o = ALIGNED.operands()
    M, N, K, R = ALIGNED.M, ALIGNED.N, ALIGNED.K, ALIGNED.R
    with strict.recording() as launches:
        products.shrink_expand(o.x, o.w, o.adapter, o.bias)
    first, second = launches
    assert first.kernel == "_shrink_kernel" and second.kernel == "_expand_kernel"
    assert dict(first.loads) == {"x_ptr": M * K, "a_ptr": M // 32 * K * R}
    assert dict(first.stores) == {"out_ptr": M * R, "rounded_ptr": M * R}
    assert dict(second.loads) == {
        "x": N // 32 * M * K,
        "w": M // 32 * K * N,
        "s_ptr": N // 32 * M * R,
        "b_ptr": M // 32 * R * N,
        "bias_ptr": M // 32 * N,
    }
    assert dict(second.stores) == {"y_ptr": M * N}
    described = isinstance(second.arguments["x"], TensorDescriptor)
    assert described == (variant == "tma")


def test_dy_is_read_once_only_where_that_moves_less(monkeypatch):
    """Counted, not predicted: with the shipped tiles the fused form moves less than two readings of dy, or is not taken."""
    for R, fused in ((16, True), (64, False)):
        o = Case(512, 512, 16, R, dtype=torch.bfloat16).operands()
        s = torch.randn(512, R)
        problem = Problem(512, 0, 512, R, "bfloat16", "bfloat16", device="cuda")
        config = configs.tiles_for(problem, TARGETS["sm_90"]).config("shrink_wgrad")
        assert products_module.one_reading_pays(2, R, config, {}) == fused
        on_target(monkeypatch, "sm_90")
        monkeypatch.setattr(products_module, "one_reading_pays", lambda *args: True)
        products = Planned(backend_module.BACKEND, TARGETS["sm_90"])
        with strict.recording() as launches:
            products.shrink_wgrad(o.dy, o.adapter.t(), s, o.b.dtype)
        monkeypatch.undo()
        parts = 4 * (launches[0].stores["q_ptr"] + launches[1].loads["partials_ptr"])
        assert (parts < o.dy.numel() * o.dy.itemsize) == fused


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_memory_outlives_a_call(variant, triton_products):
    """Kept memory may be a CUDA graph's, which others use again."""
    products = triton_products(variant, decode={"split": 4})
    with made_inside() as alive:
        results = every_product(products, ALIGNED)
        assert alive()
        del results
    strict.state.launch = None  # it holds the arguments of the last launch
    gc.collect()
    assert alive() == []


@pytest.mark.parametrize(("last", "wide"), [(2**31 - 1, False), (2**31, True)])
@pytest.mark.parametrize(
    "shape_and_strides",
    [
        lambda last: ((2, 1), (last, 1)),
        lambda last: ((1, 2), (1, last)),
        lambda last: ((2,), (last,)),
        lambda last: ((1, last + 1), (last + 1, 1)),  # contiguous
        lambda last: ((last + 1, 3), (1, 0)),  # expanded
        lambda last: ((2**20, 3, 2), (2**40, last // 2, last - 2 * (last // 2))),  # a stack
    ],
    ids=["rows", "columns", "vector", "contiguous", "expanded", "stack"],
)
def test_32_bits_hold_offsets_below_two_to_the_31(shape_and_strides, last, wide):
    t = torch.empty(1, device="meta").as_strided(*shape_and_strides(last))
    assert launch.needs_int64(None, torch.empty(3), t) == wide
    assert not launch.needs_int64(t[:0] if t.ndim == 1 else t[..., :0])


@contextmanager
def reserved():
    """New memory is reserved and not touched."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.utils.deterministic.fill_uninitialized_memory = True


def apart(rows: int, cols: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """A tensor whose rows lie 2³⁰ elements apart: memory that is reserved and, but for the rows, never touched."""
    with reserved():
        buffer = torch.empty((rows - 1) * 2**30 + cols, dtype=dtype)
    view = buffer.as_strided((rows, cols), (2**30, 1))
    return view.copy_(torch.randn(rows, cols))


CONFIG = TileConfig("any", 16, 16, 16, 4, 2)
WIDE_CALLS = {
    "shrink": lambda x, w, t: shrink.shrink(x, w, 0.5, CONFIG),
    "expand": lambda x, w, t, bias=None: expand.expand(x, w, t.float(), w[:1, :], bias, CONFIG),
    "one_pass": lambda x, w, t, bias=None: one_pass.one_pass(x, w, w, w, 0.5, bias, CONFIG)[0],
    "decode": lambda x, w, t, bias=None: decode.decode(x, w, w, w, 0.5, bias, CONFIG)[0],
    "wgrad": lambda x, w, t: wgrad.wgrad(x, t.float(), torch.float16, CONFIG),
    "shrink_wgrad": lambda x, w, t: shrink_wgrad.shrink_wgrad(
        x, w, 0.5, t.float(), torch.float16, CONFIG
    )[1],
}


@pytest.mark.parametrize("kernel", WIDE_CALLS)
def test_offsets_past_32_bits(kernel, monkeypatch):
    """Rows 2³⁰ elements apart, the fourth past 2³¹: right with 64-bit offsets, an error without."""
    call = WIDE_CALLS[kernel]
    t = torch.randn(4, 1).half()
    if kernel in ("wgrad", "shrink_wgrad"):  # M runs along the distant rows
        x, w = apart(4, 4), torch.randn(4, 1).half()
        near = x.contiguous(), w
    else:  # so does K, as the rows of w
        x, w = torch.randn(4, 4).half(), apart(4, 4)
        near = x, w.contiguous()
    result = call(x, w, t)
    assert torch.equal(result, call(*near, t))
    module = globals()[kernel]
    monkeypatch.setattr(module, "needs_int64", lambda *operands: False)
    with pytest.raises(Exception, match="does not have"):
        call(x, w, t)


@pytest.mark.parametrize("kernel", ["expand", "one_pass", "decode"])
def test_a_bias_past_32_bits(kernel, monkeypatch):
    call, bias = WIDE_CALLS[kernel], apart(4, 1)[:, 0]
    given = torch.randn(4, 4).half(), torch.randn(4, 4).half(), torch.randn(4, 1).half()
    assert torch.equal(call(*given, bias), call(*given, bias.contiguous()))
    monkeypatch.setattr(globals()[kernel], "needs_int64", lambda *operands: False)
    with pytest.raises(Exception, match="does not have"):
        call(*given, bias)


FAR = 2**25 + 64  # columns: the last of 64 rows ends past 2³¹


@pytest.mark.parametrize("kernel", ["expand", "one_pass", "decode"])
def test_a_result_past_32_bits(kernel):
    """y has more than 2³¹ elements, its operands have few: their columns are one column again and again."""
    x, w, a, b = (torch.randn(size).half() for size in ((64, 16), (16, 1), (16, 16), (16, 1)))
    s, bias = torch.randn(64, 16), torch.randn(1).half()
    config = replace(CONFIG, block_m=64 if kernel == "decode" else 16)

    def call(N):
        wide = w.expand(16, N), b.expand(16, N), bias.expand(N)
        if kernel == "expand":
            return expand.expand(x, wide[0], s, *wide[1:], config)
        module = globals()[kernel]
        return getattr(module, kernel)(x, wide[0], a, *wide[1:2], 0.5, wide[2], config)[0]

    with reserved(), strict.programs(**{f"_{kernel}_kernel": [-1]}), strict.recording() as launches:
        y = call(FAR)
    assert launches[0].arguments["INT64"]
    assert torch.equal(y[-16:, -16:], call(16)[-16:])


def test_an_s_past_32_bits():
    """s has more than 2³¹ elements, y and its operands have few."""
    M, x, w = 2**27 + 16, torch.randn(1, 16).half(), torch.randn(16, 1).half()
    with reserved(), strict.programs(_expand_kernel=[-1]), strict.recording() as launches:
        s = torch.empty(M, 16)
        s[-16:] = torch.randn(16, 16)
        y = expand.expand(x.expand(M, 16), w, s, w, None, CONFIG)
    assert launches[0].arguments["INT64"]
    near = expand.expand(x.expand(16, 16), w, s[-16:], w, None, CONFIG)
    assert torch.equal(y[-16:], near)


def test_decodes_partial_results_past_32_bits():
    N = FAR // 2
    x, w, a, b = (torch.randn(size).half() for size in ((64, 48), (48, 1), (48, 16), (16, 1)))
    config = replace(CONFIG, block_m=64, split=3)

    def call(N):
        return decode.decode(x, w.expand(48, N), a, b.expand(16, N), 0.5, None, config)[0]

    with reserved(), strict.programs(_decode_kernel=[-3, -2, -1]):
        y = call(N)
    assert torch.equal(y[:, -16:], call(16))


@pytest.mark.parametrize("split", [1, 2])
def test_shrinks_result_past_32_bits(split):
    """[split, M, 16] has more than 2³¹ elements."""
    M, config = 2**27 // split + 16, replace(CONFIG, split=split)
    x, a = torch.randn(1, 16 * split).half(), torch.randn(16 * split, 16).half()
    last = {"_shrink_kernel": range(-split, 0), "_sum_partials_kernel": [-1]}
    with reserved(), strict.programs(**last):
        s = shrink.shrink(x.expand(M, -1), a, 0.5, config)
    assert torch.equal(s[-16:], shrink.shrink(x.expand(16, -1), a, 0.5, config))


@pytest.mark.parametrize("split", [1, 3])
def test_wgrads_result_past_32_bits(split):
    """[split, C, 16] has more than 2³¹ elements."""
    C, config = (2**27 if split == 1 else 2**26) + 16, replace(CONFIG, split=split)
    x, q = torch.randn(16 * split, 1).half(), torch.randn(16 * split, 16)
    last = {"_wgrad_kernel": range(-split, 0), "_sum_partials_kernel": [-1]}
    with reserved(), strict.programs(**last):
        out = wgrad.wgrad(x.expand(-1, C), q, torch.float16, config)
    near = wgrad.wgrad(x.expand(-1, 16), q, torch.float16, config)
    assert torch.equal(out[-16:], near)


@pytest.mark.parametrize(("R", "N", "split"), [(64, 34_100_000, 1), (16, 2**26 + 16, 3)])
def test_shrink_wgrads_partial_results_past_32_bits(R, N, split, monkeypatch):
    """q [blocks of columns, M, R] and dB [split, R, N], both of more than 2³¹ elements."""
    monkeypatch.setattr(shrink_wgrad, "sum_partials", lambda partials, *rest: partials)
    M, config = 16 * split, replace(CONFIG, split=split, rank_chunk=R)
    dy, b_t, s = torch.randn(M, 1).half(), torch.randn(1, R).half(), torch.randn(M, R)

    def call(N):
        wide = dy.expand(M, N), b_t.expand(N, R)
        return shrink_wgrad.shrink_wgrad(*wide, 0.5, s, torch.float16, config)[:2]

    with reserved(), strict.programs(_shrink_wgrad_kernel=range(-split, 0)):
        q, dB = call(N)
    assert q.numel() > 2**31 and dB.numel() > 2**31
    near_q, near_dB = call(16)
    assert torch.equal(q[-1], near_q[-1]) and torch.equal(dB[..., -16:], near_dB)


def test_sums_past_32_bits():
    with reserved(), strict.programs(_sum_partials_kernel=[-1]):
        partials, out = torch.empty(1, 2**31 + 8), torch.empty(2**31 + 8, dtype=torch.float16)
        partials[:, -8:] = torch.arange(8.0)
        sum_partials(partials, out, CONFIG, 0.5)
    assert torch.equal(out[-8:], torch.arange(8).half() / 2)


@pytest.mark.parametrize("rows", [2**29, 2**30], ids=["past 31 bits", "past 32 bits"])
def test_the_mask_of_elements_past_32_bits(rows):
    """Row M - 1 of x of ones times powers of two is that row's mask; Philox counts four elements at a time."""
    M, dropout = rows + 16, Dropout(0.5, torch.tensor(7))
    powers = 2.0 ** torch.arange(16)
    with reserved(), strict.programs(_shrink_kernel=[-1]):
        s = shrink.shrink(torch.ones(1, 16).expand(M, 16), powers[:, None], 0.5, CONFIG, dropout)
    words = _philox(dropout.seed, torch.arange(4 * (M - 16), 4 * M)).view(16, 16)
    assert torch.equal(s[-16:, 0].double(), (words >= 2**31).double() @ powers.double())


@pytest.mark.parametrize(("offset", "gap"), [(0, 0), (1, 0), (4, 0), (0, 4), (8, 8)])
def test_descriptors_only_where_the_hardware_takes_them(offset, gap, triton_products):
    """A base or a row that is not a multiple of 16 bytes: the pointer form, with the same result."""
    products = triton_products("tma")
    o = ALIGNED.operands()
    (M, K), row = o.x.shape, o.x.shape[1] + gap
    x = torch.zeros(M * row + offset, dtype=o.x.dtype)[offset:].view(M, row)[:, :K].copy_(o.x)
    with strict.recording() as launches:
        y, _ = products.shrink_expand(x, o.w, o.adapter, o.bias)
    described = isinstance(launches[-1].arguments["x"], TensorDescriptor)
    assert described == (offset % 8 == 0 and gap % 8 == 0)
    assert torch.equal(y, products.shrink_expand(o.x, o.w, o.adapter, o.bias)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["linear", "plain"])
def test_descriptors_at_edges(dtype, layout, triton_products):
    """Blocks that stick out on every side; w by rows of k and by rows of n."""
    products = triton_products("tma")
    case = Case(37, 72, 40, 20, dtype=dtype, layout=layout)
    o = case.operands()
    with strict.recording() as launches:
        y, _ = products.shrink_expand(o.x, o.w, o.adapter, o.bias)
    assert isinstance(launches[-1].arguments["w"], TensorDescriptor)
    assert_budget(y, o.results(None)["y"], o.results(torch.float64)["y"])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("sizes", [(0, 8, 8, 4), (5, 0, 8, 4)], ids=str)
def test_nothing_to_compute_launches_nothing(variant, sizes, triton_products, monkeypatch):
    products = triton_products(variant)
    M, N, K, R = sizes
    adapter = Adapter(torch.ones(K, R), torch.ones(R, N), 0.5)
    with strict.recording() as launches:
        y, s = products.shrink_expand(torch.ones(M, K), torch.ones(K, N), adapter)
    assert y.shape == (M, N) and s.shape == (M, R)
    assert not any(launch.stores["y_ptr"] for launch in launches)
    assert M or not launches
    with strict.recording() as launches:
        products.shrink(torch.ones(0, K), adapter)
        products.shrink(torch.ones(5, K), adapter._replace(A=torch.ones(K, 0)))
        for left, right in (((0, 4), (0, 3)), ((5, 0), (5, 3)), ((5, 4), (5, 0))):
            products.wgrad(torch.ones(left), torch.ones(right), torch.float32)
    assert launches == []


def test_sums_over_nothing_are_zero(triton_products):
    products = triton_products("two_kernel")
    assert torch.equal(
        products.wgrad(torch.ones(0, 4), torch.ones(0, 3), torch.float32), torch.zeros(4, 3)
    )
    adjoint = Adapter(torch.ones(4, 3), torch.ones(3, 4), 1.0)
    q, dB = products.shrink_wgrad(torch.ones(0, 4), adjoint, torch.ones(0, 3), torch.float32)
    assert q.shape == (0, 3) and torch.equal(dB, torch.zeros(3, 4))


def test_grids_are_one_dimensional(triton_products):
    """The second and third axis end at 65535, the first at 2³¹ - 1."""
    with strict.recording() as launches:
        every_product(triton_products("two_kernel"), Case(70, 70, 70, 40))
    assert launches and all(len(launch.grid) == 1 for launch in launches)


def test_every_launch_names_its_device_and_its_rounding(monkeypatch):
    entered, given = [], {}

    class Kernel:
        pre_run_hooks = ()
        debug = None

        def __getitem__(self, grid):
            return lambda *args, **options: self.run(*args, grid=grid, warmup=False, **options)

        def run(self, *args, warmup, **options):
            given.update(options, args=args)

    monkeypatch.setattr(
        torch.cuda, "device", lambda device: entered.append(device) or nullcontext()
    )
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    device = torch.device("cuda", 1)
    launch.launch(Kernel(), 7, CONFIG, device, 1, 2, dependent=True, FLAG=3)
    assert entered == [device]
    assert given["grid"] == (7,) and given["args"] == (1, 2) and given["FLAG"] == 3
    assert given["launch_pdl"] is True and given["enable_fp_fusion"] is True
    assert (given["num_warps"], given["num_stages"]) == (CONFIG.num_warps, CONFIG.num_stages)
    for other in (torch.device("cpu"), torch.device("cuda", 0)):  # the current one is not entered
        given.clear()
        launch.launch(Kernel(), 7, CONFIG, other)
        assert given["grid"] == (7,) and "launch_pdl" not in given and entered == [device]


def test_target_is_that_of_the_operands_device(monkeypatch):
    def properties(index):
        own = {"name": f"a chip of {8 + index}.0", "multi_processor_count": 100 + index}
        return SimpleNamespace(major=8 + index, minor=0, **own)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    device_module._target.cache_clear()
    try:
        here = device_module.current_target()
        there = device_module.current_target(torch.device("cuda", 1))
    finally:
        device_module._target.cache_clear()
    assert (here.name, here.multiprocessors) == ("sm_80", 100)
    assert (there.name, there.multiprocessors) == ("sm_90", 101)
