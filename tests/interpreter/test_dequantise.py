"""Quantised weights decoded by kernels: the bits of their own dense copy, their traffic, and the memory that is shared."""

from __future__ import annotations

import gc
import math
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from lora_kernels import explain, lora_linear, selftest
from lora_kernels.backends.triton import BACKEND, dequantise, scratch
from lora_kernels.operands import Adapter
from lora_kernels.quantized import FP8Weight, NF4Weight
from lora_kernels.samples import SAMPLES, sample
from lora_kernels.tuning.config import TileConfig
from lora_kernels.tuning.targets import TARGETS
from tests.interpreter import strict
from tests.interpreter.test_memory import reserved
from tests.oracle import (
    Case,
    assert_budget,
    assert_gradients,
    gradients,
    made_inside,
    reference,
)

CONFIG = TileConfig("dequantise", 1, 16, 64, 4, 1)
# One element; odd sizes; blocks that straddle rows; a last block that is a part of one; whole blocks, and so many that
# their scales have two scales of their own.
SIZES = [(1, 1), (1, 300), (300, 1), (3, 5), (7, 96), (64, 64), (70, 65), (40, 512)]
HALVES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _nothing_kept():
    scratch._kept.clear()
    yield
    scratch._kept.clear()


def plain_nf4(N, K, dtype):
    """One whose scales are float32 and not quantised."""
    w = sample("nf4", N, K, dtype)
    return NF4Weight(w.packed, w.scales(), w.code, N=N, K=K, dtype=dtype)


def fp8(N, K, dtype, block, codes=256):
    """So many codes in turn, of all 256 those of NaN and of subnormal values too; no two scales are equal."""
    blocks = -(-N // block[0]), -(-K // block[1])
    values = torch.arange(N * K).remainder(codes).to(torch.uint8).view(torch.float8_e4m3fn)
    scales = torch.arange(1.0, math.prod(blocks) + 1).div(7 * codes * K).view(blocks)
    return FP8Weight(values.view(N, K), scales, block, dtype)


def decoded_formats(launches):
    """The formats of the weights that these launches wrote dense copies of, in order."""
    decoders = (launch for launch in launches if launch.kernel.startswith("_dequantise_"))
    return [launch.arguments.get("FORMAT", "nf4") for launch in decoders]


def written(weight):
    stored = weight.t() if weight.transposed else weight
    out = torch.full(stored.shape, torch.nan, dtype=weight.dtype)
    dequantise.dequantise(weight, out, CONFIG)
    return out.t() if weight.transposed else out


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_bits_are_those_of_the_weights_own_copy(size, dtype):
    for weight in (plain_nf4(*size, dtype), *(sample(name, *size, dtype) for name in SAMPLES)):
        for each in (weight, weight.t()):
            assert torch.equal(written(each), each.dense())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    "size, block", [((40, 70), (16, 32)), ((33, 60), (5, 7)), ((9, 300), (9, 300))], ids=str
)
def test_every_code_of_fp8_in_any_blocks(size, block, dtype):
    weight = fp8(*size, dtype, block)
    found, dense = written(weight), weight.dense()
    assert torch.equal(found.isnan(), dense.isnan()) and dense.isnan().any()
    assert torch.equal(found.nan_to_num(), dense.nan_to_num())


def test_parts_that_lie_apart():
    """Packed tensors of any strides: every second element of one with twice as many."""
    for name in SAMPLES:
        weight = sample(name, 20, 70, torch.bfloat16)
        apart = [torch.stack([t, t], t.ndim)[..., 0] for t in weight.tensors]
        assert torch.equal(written(weight.with_tensors(apart)), weight.dense())


def test_infinite_and_missing_values_stay():
    weight = plain_nf4(4, 64, torch.float16)
    absmax = weight.absmax.clone()
    absmax[1], absmax[2], absmax[3] = torch.inf, torch.nan, 1e6  # too large for a float16
    weight = replace(weight, absmax=absmax)
    assert torch.equal(written(weight).nan_to_num(1, 2, 3), weight.dense().nan_to_num(1, 2, 3))


@pytest.mark.parametrize("size", [(40, 128), (7, 91)], ids=str)
def test_traffic(size):
    """Half a byte an element and its scales are read, and each element is written once."""
    weight = sample("nf4", *size, torch.bfloat16)
    with strict.recording() as launches:
        written(weight)
    (launch,) = launches
    N, K = size
    blocks = -(-N * K // 64)
    assert launch.loads["packed_ptr"] == -(-N * K // 2)
    assert launch.loads["absmax_ptr"] == launch.loads["absmax2_ptr"] == blocks
    assert dict(launch.stores) == {"w_ptr": N * K}
    assert len(set(launch.written["w_ptr"].tolist())) == N * K


def test_elements_past_two_to_the_31():
    """The last program of W [2^15 + 1, 2^16 + 64]: its scales, codes and results lie where 64-bit offsets find them."""
    N, K = 2**15 + 1, 2**16 + 64
    near = sample("nf4", 64, 64, torch.bfloat16)
    blocks = N * K // 64
    with reserved():
        packed = torch.empty(N * K // 2, dtype=torch.uint8)
        absmax = torch.empty(blocks, dtype=torch.uint8)
        absmax2 = torch.empty(-(-blocks // 256))
        out = torch.empty(N, K, dtype=torch.bfloat16)
    packed[-512:], absmax[-16:], absmax2[-2:] = near.packed[-512:], near.absmax[-16:], 0.125
    weight = replace(near, packed=packed, absmax=absmax, absmax2=absmax2, N=N, K=K)
    near = replace(near, absmax2=torch.tensor([0.125]))
    programs = {"_dequantise_nf4_kernel": [-2, -1]}
    with strict.programs(**programs), strict.recording() as launches:
        dequantise.dequantise(weight, out, CONFIG)
    assert launches[0].arguments["INT64"]
    assert torch.equal(out.view(-1)[-1024:], near.dense().view(-1)[-1024:])


@pytest.mark.parametrize("elements, wide", [(2**31 - 1024, False), (2**31 - 960, True)])
def test_32_bits_hold_masked_lanes_too(elements, wide, monkeypatch):
    given = {}
    monkeypatch.setattr(dequantise, "launch", lambda *args, **options: given.update(options))
    out = torch.empty(1, elements, dtype=torch.bfloat16, device="meta")
    dequantise.dequantise(sample("nf4", 1, 64, torch.bfloat16), out, CONFIG)
    assert given["INT64"] == wide and given["contract"] is False


class TestTheSharedMemory:
    CPU = torch.device("cpu")

    def lent(self, rows, cols=1, dtype=torch.uint8):
        return scratch.lent(rows, cols, dtype, self.CPU)

    def test_it_is_the_same_for_every_layer_and_grows(self):
        with self.lent(10, 12, torch.float32) as first:
            first.fill_(1)
            at = first.data_ptr()
        with self.lent(5, 48, torch.bfloat16) as other:
            assert other.data_ptr() == at and other.shape == (5, 48) and other.is_contiguous()
        with self.lent(10, 12, torch.float64) as larger:
            assert larger.untyped_storage().nbytes() == 960
        assert scratch._kept[self.CPU][1].nbytes == 960 and len(scratch._kept) == 1

    def test_it_is_lent_to_one_call_at_a_time(self):
        with self.lent(64):
            pass
        with self.lent(64) as one, self.lent(64) as two:
            assert one.data_ptr() != two.data_ptr()

    def test_of_two_the_larger_is_kept(self):
        outer = self.lent(128)
        outer.__enter__()
        with self.lent(64):
            pass
        outer.__exit__(None, None, None)
        with self.lent(128), self.lent(32):
            pass
        assert scratch._kept[self.CPU][1].nbytes == 128

    def test_it_is_given_back_after_an_error(self):
        with pytest.raises(ZeroDivisionError), self.lent(64) as buffer:
            at = buffer.data_ptr()
            raise ZeroDivisionError
        assert scratch._kept[self.CPU][1].data_ptr() == at

    @pytest.fixture
    def gpu(self, monkeypatch):
        """A device whose memory is the CPU's; with its current stream, whether it captures, and the pool of new memory."""

        class Device:
            type, stream, capturing, pool = "cuda", 1, False, (0, 0)
            snapshots, current = 0, False

        def snapshot():
            Device.snapshots += 1
            if Device.pool is None:
                raise RuntimeError("no snapshot")
            everywhere = {"device": None, "address": 0, "total_size": 2**63}
            return [{**everywhere, "segment_pool_id": Device.pool}]

        class Stream:
            def __init__(self, device):
                self.cuda_stream = Device.stream

        @contextmanager
        def made_current(device):
            device.current = True
            yield
            device.current = False

        def capturing():
            """Of the current device's stream: another device is the current one."""
            return Device.current and Device.capturing

        made = torch.empty
        monkeypatch.setattr(torch.cuda, "device", made_current)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", capturing)
        monkeypatch.setattr(torch.cuda, "current_stream", Stream)
        monkeypatch.setattr(torch.cuda, "memory_snapshot", snapshot)
        monkeypatch.setattr(
            torch, "empty", lambda *size, device=None, **rest: _OnGpu.of(made(*size, **rest))
        )
        return Device

    def address(self, gpu, rows=64):
        with scratch.lent(rows, 1, torch.uint8, gpu) as buffer:
            return buffer.data_ptr()

    def test_a_stream_has_its_own(self, gpu):
        first = self.address(gpu)
        (kept,) = scratch._kept.values()
        gpu.stream = 2
        assert self.address(gpu) != first  # `kept` still holds the first
        (other,) = scratch._kept.values()
        assert other[0] == 2 and other[1] is not kept[1] and gpu.snapshots == 2

    def test_within_a_capture_it_is_the_captures(self, gpu):
        before = self.address(gpu)
        gpu.capturing = True
        with scratch.lent(64, 1, torch.uint8, gpu) as buffer:
            assert buffer.data_ptr() != before
        gpu.capturing = False
        assert self.address(gpu) == before and gpu.snapshots == 1

    @pytest.mark.parametrize("pool", [(0, 3), None])
    def test_a_graphs_memory_is_not_kept(self, gpu, pool):
        """A graph that is warming up, or an allocator that cannot say whose memory it is."""
        gpu.pool = pool
        self.address(gpu)
        assert not scratch._kept

    def test_what_a_graph_does_not_own_may_be_used_while_it_warms_up(self, gpu):
        before = self.address(gpu)
        gpu.pool = (0, 3)
        assert self.address(gpu, 32) == before
        self.address(gpu, 128)
        assert not scratch._kept


class _OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU."""

    @staticmethod
    def of(t):
        return t.as_subclass(_OnGpu)

    @property
    def device(self):
        return type("device", (), {"type": "cuda", "index": None})


@pytest.mark.parametrize(
    "variant, name, case",
    [
        ("two_kernel", "nf4", Case(9, 17, 21, 5, dtype=torch.float16, adapter_dtype=torch.float32)),
        ("tma", "nf4", Case(20, 40, 64, 8, dtype=torch.bfloat16)),
        ("tma", "int8", Case(20, 40, 64, 8, dtype=torch.bfloat16)),
        ("one_pass", "int8", Case(9, 1, 70, 3)),
        ("two_kernel", "nf4", Case(9, 70, 1, 3, dropout=0.3)),
    ],
    ids=str,
)
def test_products_over_a_quantised_weight(variant, name, case, triton_products):
    """Bit for bit those over its dense copy; and no memory of its size but the shared one outlives a call."""
    products = triton_products(variant)
    o = case.operands()
    weight = sample(name, case.N, case.K, case.dtype)
    for w, x, adapter, bias in (
        (weight.t(), o.x, o.adapter, o.bias),
        (weight, o.dy, o.adapter.t(), None),
    ):
        dense = products.shrink_expand(x, w.dense(), adapter, bias)
        again = products.expand(x, w.dense(), dense[1], adapter, bias)
        with made_inside() as alive, strict.recording() as launches:
            found = products.shrink_expand(x, w, adapter, bias)
            y = products.expand(x, w, dense[1], adapter, bias)
        assert decoded_formats(launches) == [name, name]
        assert all(map(torch.equal, (*found, y), (*dense, again)))
        del found, y, launches
        strict.state.launch = None
        gc.collect()
        assert [shape for shape in alive() if len(shape) == 2] == []


@pytest.mark.parametrize("sizes", [(0, 8, 8, 4), (5, 0, 8, 4), (5, 8, 0, 4), (5, 8, 8, 0)], ids=str)
def test_sizes_of_zero(sizes, triton_products):
    M, N, K, R = sizes
    case = Case(M, N, K, R)
    o = case.operands()
    weight = sample("nf4", N, K, torch.float32)
    y, s = triton_products("two_kernel").shrink_expand(o.x, weight.t(), o.adapter, o.bias)
    exact = o.x @ weight.dense().t() + o.bias + 0.75 * (o.x @ o.a) @ o.b
    assert_budget(y, exact, exact.double())
    assert s.shape == (M, R)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layers_gradients(dtype, triton_products):
    """Through `lora_linear`: y, dx, dA and dB; and nothing as large as W is saved."""
    triton_products("two_kernel")
    torch.manual_seed(2)
    weight = sample("nf4", 48, 72, dtype)
    shapes = {"x": (2, 9, 72), "A": (72, 6), "B": (6, 48)}
    given = {n: (torch.randn(size) / size[-1] ** 0.5).to(dtype) for n, size in shapes.items()}
    dy, kept = torch.randn(2, 9, 48).to(dtype), []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)

    def ours(**given):
        with hooks:
            return lora_linear(**given, weight=weight, alpha=0.7, backend="triton")

    def plain(x, A, B):
        return reference(x, weight.dense().to(x.dtype), A, B, 0.7)

    with strict.recording() as launches:
        actual = gradients(ours, given, dy)
    assert kept and not any(t.numel() == weight.shape[0] * weight.shape[1] for t in kept)
    # In the forward, and for dx.
    assert [launch.kernel for launch in launches].count("_dequantise_nf4_kernel") == 2
    assert_gradients(actual, plain, given, dy)


def test_explain_says_so(triton_products):
    triton_products("two_kernel")
    weight = sample("nf4", 48, 72, torch.bfloat16)
    x, A, B = (torch.randn(size).bfloat16() for size in ((90, 72), (72, 6), (6, 48)))
    told = explain(x, weight, A, B, 0.5, backend="triton")
    assert not told.dequantises and "dense copy" not in str(told)
    assert "the nf4 weight decoded by dequantise 1x64x64" in str(told)


def test_a_decoder_runs_before_the_kernels_that_overlap(triton_products):
    """The product starts beside the kernel launched just before it, which must be the one that makes s."""
    products = triton_products("tma")
    weight = sample("nf4", 48, 64, torch.bfloat16)
    x, A, B = (torch.randn(size).bfloat16() for size in ((90, 64), (64, 16), (16, 48)))
    with strict.recording() as launches:
        products.shrink_expand(x, weight.t(), Adapter(A, B, 0.5))
    kernels = [launch.kernel for launch in launches]
    assert kernels == ["_dequantise_nf4_kernel", "_shrink_kernel", "_expand_kernel"]
    assert launches[-1].kwargs["launch_pdl"]


class TestDecode:
    """Few rows: the same kernel as for a dense weight, which decodes w in its loop."""

    @pytest.mark.parametrize(
        "name, case",
        [
            ("nf4", Case(5, 40, 192, 6, dtype=torch.bfloat16)),
            ("plain", Case(17, 33, 64, 5, dtype=torch.float16, adapter_dtype=torch.float32)),
            ("nf4", Case(1, 1, 128, 1)),
            ("int8", Case(9, 37, 75, 6, dtype=torch.bfloat16)),
            ("fp8", Case(9, 37, 75, 6, dtype=torch.bfloat16)),
            ("odd blocks", Case(3, 37, 75, 6)),
        ],
        ids=str,
    )
    def test_the_bits_are_those_over_the_dense_copy(self, name, case, triton_products):
        products = triton_products("decode")
        o = case.operands()
        makers = {
            "plain": plain_nf4,
            "fp8": lambda *size: fp8(*size, (16, 32), 120),
            "odd blocks": lambda *size: fp8(*size, (5, 7), 120),
        }
        size = case.N, case.K, case.dtype
        weight = makers[name](*size) if name in makers else sample(name, *size)
        dense = products.shrink_expand(o.x, weight.t().dense(), o.adapter, o.bias)
        with strict.recording() as launches:
            found = products.shrink_expand(o.x, weight.t(), o.adapter, o.bias)
        assert [launch.kernel for launch in launches] == ["_decode_kernel"]
        assert all(map(torch.equal, found, dense))
        exact = o.x.double() @ weight.dense().double().t() + o.results(torch.float64)["y"]
        exact -= o.x.double() @ o.w.double()
        eager = o.x @ weight.dense().t() + (o.results(None)["y"] - o.x @ o.w)
        assert_budget(found[0], eager, exact)

    def test_a_quarter_of_the_bytes(self, triton_products):
        """Eight codes in each word; a scale for each block; x and a as for a dense weight."""
        products = triton_products("decode")
        o = Case(16, 64, 256, 16, dtype=torch.bfloat16).operands()
        with strict.recording() as launches:
            products.shrink_expand(o.x, sample("nf4", 64, 256, torch.bfloat16).t(), o.adapter)
            products.shrink_expand(o.x, o.w, o.adapter)
        packed, dense = launches
        assert 4 * packed.loads["w_ptr"] * 4 == 2 * dense.loads["w_ptr"]
        # The tests' tile has 32 terms of the sum: it reads a block's scale twice.
        assert packed.loads["absmax_ptr"] == packed.loads["absmax2_ptr"] == 2 * 64 * 256 // 64
        for name in ("x_ptr", "a_ptr", "b_ptr"):
            assert packed.loads[name] == dense.loads[name]
        assert packed.stores == dense.stores

    def test_codes_that_begin_within_a_word(self, triton_products):
        products = triton_products("decode")
        weight = sample("nf4", 40, 64, torch.bfloat16)
        buffer = torch.empty(weight.packed.numel() + 1, dtype=torch.uint8)
        apart = replace(weight, packed=buffer[1:].copy_(weight.packed))
        o = Case(5, 40, 64, 6, dtype=torch.bfloat16).operands()
        y, _ = products.shrink_expand(o.x, apart.t(), o.adapter)
        assert torch.equal(y, products.shrink_expand(o.x, weight.t(), o.adapter)[0])

    def test_what_it_does_not_decode_is_decoded_before(self, triton_products):
        """Rows that are no whole blocks, and dx."""
        products = triton_products("decode")
        for K, forward in ((70, True), (64, False)):
            o = Case(5, 40, K, 6).operands()
            weight = sample("nf4", 40, K, torch.float32)
            x, w, adapter = o.x, weight.t(), o.adapter
            if not forward:
                x, w, adapter = o.dy, weight, o.adapter.t()
            with strict.recording() as launches:
                found = products.shrink_expand(x, w, adapter)
            assert launches[0].kernel == "_dequantise_nf4_kernel"
            torch.testing.assert_close(found, products.shrink_expand(x, w.dense(), adapter))


def test_the_self_test_covers_every_format(monkeypatch):
    """Both ways to read each: in the loop of the kernel for few rows, and decoded before."""

    class OnSm80:
        formats, groups = BACKEND.formats, False

        @staticmethod
        def candidates(problem, target):
            found = BACKEND.candidates(problem, TARGETS["sm_80"])
            few = problem.M < 16 and not problem.backward
            return [c for c in found if c.name == ("decode" if few else "two_kernel")]

    monkeypatch.setattr(selftest, "_SIZES", ())
    monkeypatch.setattr(selftest, "_DTYPES", (("bfloat16", "float32"),))
    with strict.recording() as launches:
        results = selftest.run(OnSm80, "cpu")
    assert results and all(result.passed for result in results)
    tested = {(r.problem.weight_format, r.problem.M, r.tensor) for r in results}
    assert len(tested) == len(SAMPLES) * 2 * 4
    assert "_decode_kernel" in {launch.kernel for launch in launches}
    assert set(decoded_formats(launches)) == set(SAMPLES)
    monkeypatch.setattr(dequantise, "dequantise", lambda weight, out, config: out.zero_())
    broken = [r for r in selftest.run(OnSm80, "cpu") if not r.passed]
    assert {r.tensor for r in broken if r.problem.M > 16} == {"y", "dx"}
