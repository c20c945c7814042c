"""The cpu backend: right on every awkward problem with each of its instruction sets, and the same bits on any threads."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from lora_kernels import plan
from lora_kernels.backends.cpu import BACKEND, PRODUCTS
from lora_kernels.dropout import Dropout, _philox, keep_mask, scaled_mask
from lora_kernels.functional import explain, lora_linear
from lora_kernels.operands import Adapter
from lora_kernels.problem import Problem
from tests.oracle import AWKWARD, Case, check_function, check_products, reference
from tests.processes import python

if (_why_not := BACKEND.unavailable()) is not None:
    pytest.skip(f"cpu backend: {_why_not}", allow_module_level=True)

OPS = torch.ops.lora_kernels_cpu
bf16, fp16 = torch.bfloat16, torch.float16

# What the awkward list is too small for: several groups of panels, several chunks of k, of rows and of the rank, the
# edges of the row-dot form, and float32 results that wait in scratch memory.
BLOCKED = [
    Case(70, 600, 1100, 9),
    Case(70, 600, 1100, 9, layout="transposed"),
    Case(30, 700, 600, 17, layout="plain"),
    Case(16, 200, 1100, 33),
    Case(17, 200, 1100, 33),
    Case(5, 40, 33, 1100),
    Case(5, 40, 33, 1100, dropout=0.4),  # the mask of a sum over several chunks of the rank
    Case(5, 40, 33, 1101, dtype=bf16),
    Case(5, 40, 33, 1101, dtype=bf16, dropout=0.4),
    Case(1101, 70, 90, 25, dtype=bf16),
    Case(137, 70, 90, 25, dtype=bf16, dropout=0.4),
    Case(550, 130, 70, 8, dtype=bf16),
    Case(40, 90, 2101, 8, dtype=bf16),
    Case(40, 90, 2101, 8, dtype=bf16, layout="plain"),
    Case(530, 70, 1030, 20, dtype=fp16),
    Case(40, 300, 1030, 20, dropout=0.4),
    Case(40, 300, 1030, 20, dtype=bf16, adapter_dtype=torch.float32, dropout=0.4),
]


@pytest.fixture(params=["avx512_bf16", "avx512", "avx2"])
def isa(request):
    """Each instruction set that this processor runs, used by the kernels within the test."""
    if not OPS.use_isa(request.param):
        pytest.skip(f"this processor does not run the {request.param} kernels")
    yield request.param
    OPS.use_isa("")


@pytest.fixture
def poisoned():
    """Fresh memory holds NaN, so that an element which is not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("case", AWKWARD + BLOCKED, ids=str)
def test_products(case, isa, poisoned):
    check_products(PRODUCTS, case)


def same_on_any_threads(results):
    """The tensors that `results` makes are the same on one thread and on more."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = results()
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            assert all(map(torch.equal, first, results())), f"{threads} threads"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("case", BLOCKED, ids=str)
def test_any_number_of_threads_gives_the_same_bits(case):
    o = case.operands()

    def results():
        y, s = PRODUCTS.shrink_expand(o.x, o.w, o.adapter, o.bias)
        dx, q = PRODUCTS.shrink_expand(o.dy, o.w.t(), o.adapter.t())
        dA = PRODUCTS.wgrad(o.x, q, o.a.dtype, o.dropout)
        return y, s, dx, q, dA, PRODUCTS.wgrad(s, o.dy, o.b.dtype)

    same_on_any_threads(results)


def test_python_threads_do_not_disturb_one_another():
    cases = [BLOCKED[0], BLOCKED[3], BLOCKED[6], AWKWARD[5]]
    operands = [case.operands() for case in cases]

    def product(o):
        return PRODUCTS.shrink_expand(o.x, o.w, o.adapter, o.bias)[0]

    expected = [product(o) for o in operands]
    wrong = []

    def work(start):
        for i in range(12):
            which = (start + i) % len(cases)
            if not torch.equal(product(operands[which]), expected[which]):
                wrong.append(cases[which])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert not wrong


@pytest.mark.parametrize("needed", list(itertools.product((False, True), repeat=5))[1:], ids=str)
def test_every_subset_of_gradients(needed):
    """Gradients of x, weight, A, B, bias, whichever are asked for, against autograd through the plain formula."""
    K, N, R = 21, 34, 6
    shapes = ((2, 9, K), (N, K), (K, R), (R, N), (N,))
    tensors = [torch.randn(s).requires_grad_(n) for s, n in zip(shapes, needed, strict=True)]
    ours, plain = (lambda *t, f=f: f(*t[:4], 0.5, t[4]) for f in (lora_linear, reference))
    with plan.use_backend("cpu"):
        check_function(ours, plain, tensors)


@pytest.mark.parametrize("cols", [1, 3, 4, 5, 63, 64, 130, 1030])
@pytest.mark.parametrize("p, seed", [(0.3, 7), (0.9, -1), (1e-9, 2**62 + 3)])
def test_dropout_mask_is_bit_for_bit_the_shared_one(isa, cols, p, seed):
    dropout = Dropout(p, torch.tensor(seed))
    for rows in (3, 20):  # row dots and panels
        expected = scaled_mask(dropout, rows, cols, torch.float32)
        ones = torch.ones(rows, cols)
        assert torch.equal(
            PRODUCTS.shrink(ones, Adapter(torch.eye(cols), None, 1.0, dropout)), expected
        )
        masked = PRODUCTS.expand(
            torch.ones(rows, 2),
            torch.zeros(2, cols),
            torch.ones(rows, 1),
            Adapter(None, torch.ones(1, cols), 1.0, dropout_out=dropout),
        )
        assert torch.equal(masked, expected)
        gathered = PRODUCTS.wgrad(ones, torch.eye(rows), torch.float32, dropout)
        assert torch.equal(gathered, expected.t())
    assert keep_mask(dropout, 20, cols).sum() < 20 * cols or p < 0.1 or cols < 3


def test_a_word_that_is_the_threshold_is_kept(isa):
    """p such that the first element's word is round(p·2³²) exactly: the mask keeps words that are not below it."""
    seed, one = torch.tensor(99), torch.ones(1, 1)
    word = _philox(seed, torch.zeros(1, dtype=torch.int64))[0, 0].item()
    for limit, kept in ((word, True), (word + 1, False)):
        s = PRODUCTS.shrink(one, Adapter(one, one, 1.0, Dropout(limit / 2**32, seed)))
        assert (s.item() > 0) == kept


def test_results_are_rounded_to_bfloat16_as_torch_rounds(isa):
    """Ties go to even, and a NaN stays one, whatever its bits are."""
    bits = [0x3F808000, 0x3F818000, 0x7FFFFFFF, 0x7F800001, 0x7F7FFFFF]
    signed = torch.tensor(bits, dtype=torch.int64).to(torch.int32)
    s = signed.view(torch.float32).reshape(-1, 1)
    for rows in (s, s.repeat(4, 1)):  # row dots and panels
        x, w = torch.zeros(rows.shape[0], 2).to(bf16), torch.zeros(2, 9).to(bf16)
        y = PRODUCTS.expand(x, w, rows, Adapter(None, torch.ones(1, 9).to(bf16), 1.0))
        expected = rows.to(bf16).expand(-1, 9)
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y.nan_to_num(), expected.nan_to_num())


def test_earlier_results_do_not_come_back(isa):
    """The kernels keep memory from one product to the next: neither a NaN nor a sum of the last one may be read."""
    nothing = Adapter(torch.zeros(700, 1), torch.zeros(1, 130), 1.0)
    for M in (1, 3, 20):
        for w in (torch.full((130, 700), 1.0).t(), torch.full((700, 130), 1.0)):
            PRODUCTS.shrink_expand(torch.full((M, 700), float("nan")), w, nothing)
            for K in (33, 1, 0):
                layout = w[:K] if w.stride(1) == 1 else w[:K].t().contiguous().t()
                adapter = nothing._replace(A=torch.zeros(K, 1))
                y, _ = PRODUCTS.shrink_expand(torch.ones(M, K), layout, adapter)
                assert torch.equal(y, torch.full((M, 130), float(K)))


@pytest.mark.parametrize("dropout", [None, Dropout(0.5, torch.tensor(3))], ids=["", "mask"])
def test_nor_does_what_an_odd_last_element_is_paired_with(dropout, isa):
    """bfloat16 is multiplied in pairs: of rows of x and dy, of terms and of ranks."""

    def ones(*sizes, like=1.0):
        return torch.full(sizes, like, dtype=bf16)

    for count, value in ((128, float("nan")), (9, 1.0)):
        rows = PRODUCTS.wgrad(ones(count, 64, like=value), torch.ones(count, 4), bf16, dropout)
        wide = ones(20, count, like=value)
        s = PRODUCTS.shrink(wide, Adapter(ones(count, 4), ones(4, 64), 1.0, dropout))
        tail = Adapter(ones(16, count), ones(count, 64), 1.0, None, dropout)
        y = PRODUCTS.expand(ones(20, 16), ones(16, 64), torch.full((20, count), value), tail)
    for result in (rows, s, y):
        assert result.isfinite().all()
    if dropout is None:
        assert (rows == 9).all() and (s == 9).all() and (y == 25).all()


def test_rows_two_gigabytes_apart():
    far = torch.empty(2**31 + 16, dtype=bf16).as_strided((3, 16), (2**30, 1))
    far.copy_(torch.randn(3, 16))
    w, s, b = torch.randn(16, 24).to(bf16), torch.randn(3, 4), torch.randn(4, 24).to(bf16)
    adapter = Adapter(w[:, :4], b, 1.0)
    near = PRODUCTS.expand(far.contiguous(), w, s, adapter)
    assert torch.equal(PRODUCTS.expand(far, w, s, adapter), near)
    assert torch.equal(
        PRODUCTS.wgrad(far, s, torch.float32),
        PRODUCTS.wgrad(far.contiguous(), s, torch.float32),
    )


@pytest.mark.parametrize("dtype", [torch.float32, bf16], ids=str)
def test_forward_and_backward_allocate_results_only(dtype):
    M, K, N, R = 1024, 512, 384, 8
    x, weight = torch.randn(M, K, dtype=dtype), torch.randn(N, K, dtype=dtype)
    A, B = torch.randn(K, R, dtype=dtype), torch.randn(R, N, dtype=dtype)
    dy = torch.randn(M, N, dtype=dtype)
    for t in (x, A, B):
        t.requires_grad_()
    with torch.profiler.profile(
        profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]
    ) as profile:
        lora_linear(x, weight, A, B, 0.5, backend="cpu").backward(dy)
    allocated = sum(max(e.self_cpu_memory_usage, 0) for e in profile.key_averages())
    item = dtype.itemsize
    results = item * (M * N + M * K + K * R + R * N) + 4 * 2 * M * R  # y, dx, dA, dB; s and q
    slack = 4 * 2 * (M + 1024 + 64) * R  # the low-rank operand of dA and dB as float32 tiles
    assert 0.9 * results < allocated <= results + slack
    assert slack < item * M * min(N, K) / 4  # nothing as large as x or y hides in it


_WITHOUT_MEMORY = """
import resource, torch
from pathlib import Path
from lora_kernels.backends.cpu import BACKEND, PRODUCTS
assert BACKEND.unavailable() is None  # which loads it
torch.set_num_threads(1)
tall = torch.ones(1, 64).expand(200_000, 64)
PRODUCTS.wgrad(tall[:5], tall[:5], torch.float32)
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + (30 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    PRODUCTS.wgrad(tall, tall, torch.float32)
except RuntimeError as error:
    print(error)
"""


def test_memory_for_tiles_that_there_is_not_is_pytorchs_error():
    """By which a training loop knows that its batch is too large."""
    printed = python("-c", _WITHOUT_MEMORY).stdout
    assert "DefaultCPUAllocator: can't allocate memory" in printed


def test_what_it_cannot_do_is_said():
    double = Problem(8, 8, 8, 2, "float64", "float64")
    assert "float64" in explain(double).rejected["cpu"]
    with pytest.raises(RuntimeError, match="float64"):
        plan.explain(double, "cpu")
    x = torch.randn(2, 8, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="asked for"):
        lora_linear(x, x.new_ones(4, 8), x.new_ones(8, 2), x.new_ones(2, 4), 1.0, backend="cpu")


@pytest.mark.parametrize(
    "problem, words",
    [
        (Problem(1, 64, 64, 4, "float32", "float32"), "dot products"),
        (Problem(17, 64, 64, 4, "float32", "float32"), "packed panels"),
        (Problem(4, 64, 64, 4, "float32", "float32", w_k_major=False), "sums of the rows"),
        (Problem(64, 64, 64, 4, "float16", "float16"), "in float32"),
    ],
)
def test_explain_tells_the_plan(isa, problem, words):
    how = plan.explain(problem, "cpu").plan
    assert words in how and isa in how
    assert "in float32" not in how or problem.dtype == "float16"


def test_halves_are_left_to_aten_where_it_has_amx(monkeypatch):
    halves = Problem(64, 64, 64, 4, "bfloat16", "bfloat16")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert "AMX" in plan.explain(halves).rejected["cpu"]
    assert plan.explain(halves, "cpu").backend == "cpu"
    assert plan.explain(Problem(64, 64, 64, 4, "float32", "float32")).backend == "cpu"
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert plan.explain(halves).backend == "cpu"


@pytest.mark.parametrize(
    "call",
    [
        lambda x: OPS.shrink(x, x, 1.0, 0, 0, 1.0),
        lambda x: OPS.shrink(x.double(), x.double().t(), 1.0, 0, 0, 1.0),
        lambda x: OPS.expand(x, x.t(), x, x, None, 0, 0, 1.0),
        lambda x: OPS.expand(x, x.t(), x.bfloat16(), x, None, 0, 0, 1.0),
        lambda x: OPS.wgrad(x, x[:2], torch.float32, 0, 0, 1.0),
        lambda x: OPS.shrink(x, x.t(), 1.0, 2**32, 0, 1.0),
    ],
)
def test_operators_refuse_operands_that_do_not_fit(call):
    with pytest.raises(RuntimeError, match=r"must|take"):
        call(torch.ones(3, 5))


_WITHOUT_LIBRARY = """
import sys, torch
from pathlib import Path
import lora_kernels.backends.cpu as cpu
from lora_kernels.functional import explain, lora_linear
from lora_kernels.operands import Adapter
cpu.LIBRARY = Path(sys.argv[1])
x, weight, A, B = torch.randn(4, 8), torch.randn(6, 8), torch.randn(8, 2), torch.randn(2, 6)
for _ in range(3):
    y = lora_linear(x, weight, A, B, 0.5)
assert torch.allclose(y, x @ weight.t() + 0.5 * (x @ A @ B), atol=1e-5)
print(explain(x, weight, A, B).rejected["cpu"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("broken, word", [(False, "not built"), (True, "does not load")])
def test_without_its_library_eager_computes_and_says_so_once(tmp_path, broken, word):
    library = tmp_path / "_cpu.so"
    if broken:
        library.write_bytes(b"\x7fELF no library at all")
    run = subprocess.run(
        [sys.executable, "-c", _WITHOUT_LIBRARY, str(library)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert word in run.stdout
    assert run.stderr.count("The cpu backend is off") == 1, run.stderr


_TOGETHER = """
import sys, threading, time, torch
from lora_kernels.functional import explain, lora_linear
load, loads = torch.ops.load_library, []
def slow(path):
    loads.append(path)
    time.sleep(0.1)  # as long as it takes the others to ask as well
    load(path)
torch.ops.load_library = slow
THREADS = 4
x, weight, A, B = torch.randn(4, 8), torch.randn(6, 8), torch.randn(8, 2), torch.randn(2, 6)
expected, wrong, start = x @ weight.t() + 0.5 * (x @ A @ B), [], threading.Barrier(THREADS)
def work():
    start.wait()
    a, b = A.clone().requires_grad_(), B.clone().requires_grad_()
    y = lora_linear(x, weight, a, b, 0.5)
    (first,) = torch.autograd.grad(y.square().sum(), a, create_graph=True)
    first.square().sum().backward()
    if not torch.allclose(y, expected, atol=1e-5) or a.grad is None:
        wrong.append(y)
threads = [threading.Thread(target=work) for _ in range(THREADS)]
for t in threads:
    t.start()
for t in threads:
    t.join()
assert not wrong and len(loads) == 1, (wrong, loads)
import lora_kernels.backends.cpu as cpu
cpu._load.cache_clear()  # what is registered already is left as it is
assert explain(x, weight, A, B).backend == "cpu" and cpu._load() is None
"""


@pytest.mark.slow
def test_threads_that_make_their_first_call_together():
    """One of them loads and registers, the others wait; afterwards the backend is there, for all of them."""
    run = subprocess.run([sys.executable, "-c", _TOGETHER], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == run.stderr == ""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_calls_within_a_parallel_region(tmp_path):
    """A call there has one thread to itself; beside others of its kind it computes what it computes alone."""
    from torch.utils import cpp_extension

    cpp_extension.load(
        "parallel_region",
        [str(Path(__file__).with_name("parallel_region.cpp"))],
        extra_cflags=["-fopenmp", "-w"],
        build_directory=str(tmp_path),
        is_python_module=False,
    )
    torch.manual_seed(0)
    weight, A, B = torch.randn(130, 90), torch.randn(90, 8), torch.randn(8, 130)
    before = torch.get_num_threads()
    for rows in (4, 200):
        xs = [torch.randn(rows, 90) for _ in range(7)]
        alone = [lora_linear(x, weight, A, B, 0.5) for x in xs]
        try:
            torch.set_num_threads(2)
            together = torch.ops.lora_kernels_tests.within_region(xs, weight, A, B)
        finally:
            torch.set_num_threads(before)
        assert all(map(torch.equal, alone, together))


POSITIVE = {"x": "MK", "weight": "NK", "A": "KR", "B": "RN"}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sizes, dora", [((4, 512, 32768), False), ((256, 256, 64), True)], ids=str)
def test_long_sums_of_one_sign(sizes, dora, seed, isa):
    """dx of few rows adds up w's rows, the gradient of DoRA's magnitude those of dy∘y: a chain of all would lose digits."""
    torch.manual_seed(seed)
    size = dict(zip("MKNR", (*sizes, 4), strict=True))
    made = {name: torch.rand([size[axis] for axis in axes]) for name, axes in POSITIVE.items()}
    for name in ("weight", "A"):
        made[name] /= size["K"] ** 0.5
    m = torch.rand(size["N"]) + 0.5 if dora else None

    def ours(x, weight, A, B, m):
        return lora_linear(x, weight, A, B, 0.5, magnitude=m, backend="cpu")

    def plain(x, weight, A, B, m):
        y = x @ weight.t() + 0.5 * (x @ A @ B)
        if m is None:
            return y
        return y * (m / torch.linalg.vector_norm(weight + 0.5 * (A @ B).t(), dim=1).detach())

    for t in (made["x"], m):
        if t is not None:
            t.requires_grad_()
    check_function(ours, plain, (*made.values(), m), torch.rand(size["M"], size["N"]))
