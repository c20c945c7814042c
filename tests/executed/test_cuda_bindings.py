"""The CUDA extension's host code: what it refuses, and where, how and on which stream it launches."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess

import pytest
import torch

from tests.executed.cuda_operators import EmulatedOperators
from tests.oracle import assert_budget, reference
from tests.ptx.parser import PtxError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc"),
]
M, K, N, R = 3, 40, 70, 5
HALF = torch.bfloat16


@pytest.fixture
def operators(library):
    made = EmulatedOperators(library)
    yield made
    for name in ("tensor_device", "current_device"):
        made.variable(name).value = 0


def decode_arguments(**changes):
    """Valid arguments of `decode`: two tiles of columns, two slices of K, x·a in the same pass."""
    arguments = {
        "x": torch.randn(M, K).to(HALF),
        "w": torch.randn(N, K).to(HALF).t(),
        "a": torch.randn(R, K).to(HALF).t(),
        "b": torch.randn(R, N).to(HALF),
        "bias": torch.randn(N).to(HALF),
        "y": torch.full((M, N), torch.nan).to(HALF),
        "s": torch.full((M, R), torch.nan),
        "partials": torch.full((2 * 2 * M * (64 + 16),), torch.nan),
        "arrived": torch.zeros(2, dtype=torch.int32),
        "alpha_at": None, "alpha": 0.5, "fused_rank": R, "blocks": 2, "splits": 2, "chunk": 32,
        "lowrank": False,
    }  # fmt: skip
    return arguments | changes


def outer_arguments(**changes):
    arguments = {
        "left": torch.randn(M, K).to(HALF),
        "right": torch.randn(M, R),
        "out": torch.full((K, R), torch.nan).to(HALF),
        "left_is_wide": True,
    }
    return arguments | changes


def check_decoded(arguments, alpha):
    """y and s are within budget of float64."""
    x, w, a, b, bias = (arguments[name] for name in ("x", "w", "a", "b", "bias"))
    exact = reference(x.double(), w.t().double(), a.double(), b.double(), alpha, bias.double())
    assert_budget(arguments["y"], reference(x, w.t(), a, b, alpha, bias), exact, "y")
    assert_budget(arguments["s"], (alpha * (x @ a)).float(), alpha * (x.double() @ a.double()), "s")


def rows_apart(*shape, dtype=HALF):
    """A matrix without a unit stride."""
    return torch.zeros(shape[0], 2 * shape[1], dtype=dtype)[:, ::2]


ANY = ("x", "w", "a", "b", "y", "s")
FLOAT_OR_HALF = "must be float32, float16 or bfloat16"


def meta(t):
    return t.to("meta")


DECODE_RULES = [
    *((name, meta, "must be on a CUDA device") for name in (*ANY, "bias", "partials", "arrived")),
    ("alpha_at", torch.ones(1, device="meta"), "must be on a CUDA device"),
    *((name, lambda t: t[None], "must have 2 dimensions") for name in ANY),
    ("x", torch.Tensor.double, FLOAT_OR_HALF),
    ("x", torch.zeros(33, K, dtype=HALF), "must have 1 to 32 rows"),
    ("x", torch.zeros(0, K, dtype=HALF), "must have 1 to 32 rows"),
    ("x", rows_apart(M, K), "must have a unit stride"),
    ("x", torch.zeros(K, M, dtype=HALF).t(), "must have adjacent elements in a row"),
    ("w", torch.Tensor.double, FLOAT_OR_HALF),
    ("w", torch.Tensor.half, "must have x's type or float32"),
    ("w", torch.zeros(N, K + 1, dtype=HALF).t(), "must be [K, N]"),
    ("w", rows_apart(K, N), "must have a unit stride"),
    ("w", torch.Tensor.contiguous, "must be half, with adjacent elements in a column"),
    ("a", torch.zeros(R, K + 1, dtype=HALF).t(), "must be [K, R] in x's type"),
    ("a", torch.zeros(R + 1, K, dtype=HALF).t(), "must be [K, R] in x's type"),
    ("a", torch.Tensor.float, "must be [K, R] in x's type"),
    ("a", rows_apart(K, R), "must have a unit stride"),
    ("b", torch.zeros(R, N + 1, dtype=HALF), "must be [R, N]"),
    ("b", torch.Tensor.half, "must have x's type or float32"),
    ("bias", torch.zeros(N + 1, dtype=HALF), "must be [N], contiguous, in x's type"),
    ("bias", torch.zeros(2 * N, dtype=HALF)[::2], "must be [N], contiguous, in x's type"),
    ("bias", torch.zeros(N, 1, dtype=HALF), "must be [N], contiguous, in x's type"),
    ("bias", torch.tensor(0.0, dtype=HALF), "must be [N], contiguous, in x's type"),
    ("bias", torch.Tensor.float, "must be [N], contiguous, in x's type"),
    ("y", torch.zeros(M + 1, N, dtype=HALF), "must be [M, N], contiguous"),
    ("y", torch.zeros(M, N + 1, dtype=HALF), "must be [M, N], contiguous"),
    ("y", torch.zeros(N, M, dtype=HALF).t(), "must be [M, N], contiguous"),
    ("y", torch.Tensor.half, "must have x's type or float32"),
    ("s", torch.zeros(M + 1, R), "must be [M, R]"),
    ("s", torch.zeros(M, R + 1), "must be [M, R]"),
    ("s", torch.zeros(R, M).t(), "must be contiguous"),
    ("s", torch.Tensor.bfloat16, "must be float32"),
    ("partials", torch.Tensor.double, "must be float32"),
    ("partials", lambda t: t.repeat(2)[::2], "must be contiguous"),
    ("partials", lambda t: t[1:], "must hold every tile's sums"),
    ("arrived", torch.Tensor.long, "must be int32"),
    ("arrived", lambda t: t.repeat(2)[::2], "must be contiguous"),
    ("arrived", lambda t: t[1:], "must hold every tile's sums"),
    ("alpha_at", torch.ones(1, dtype=torch.float64), "must be float32"),
    ("alpha_at", torch.ones(2), "must be one number"),
    ("fused_rank", R - 1, "must be 0, or R and at most 32"),
    ("blocks", 0, "must be at least 1"),
    ("splits", 0, "must cover K"),
    ("splits", 1, "must cover K"),
    ("chunk", 0, "must cover K"),
    ("chunk", 48, "must be a multiple of the tile's step"),
]  # fmt: skip

OUTER_RULES = [
    *((name, meta, "must be on a CUDA device") for name in ("left", "right", "out")),
    *((name, lambda t: t[None], "must have 2 dimensions") for name in ("left", "right", "out")),
    ("left", torch.zeros(M + 1, K, dtype=HALF), "must have the same, at most 32, rows"),
    ("left", torch.Tensor.double, FLOAT_OR_HALF),
    ("right", torch.Tensor.bfloat16, "must be float32"),
    ("right", torch.zeros(R, M).t(), "must be contiguous"),
    ("out", torch.zeros(K + 1, R, dtype=HALF), "must be [C, D], contiguous"),
    ("out", torch.zeros(K, R + 1, dtype=HALF), "must be [C, D], contiguous"),
    ("out", torch.zeros(R, K, dtype=HALF).t(), "must be [C, D], contiguous"),
    ("out", torch.Tensor.half, "must have the wide operand's type or float32"),
]  # fmt: skip


def refused(operator, arguments, name, value, rule):
    """The call raises, naming the argument and the rule."""
    arguments[name] = value(arguments[name]) if callable(value) else value
    with pytest.raises(RuntimeError) as raised:
        operator(**arguments)
    assert re.search(rf"lora_kernels_cuda: .*\b{name}\b.* {re.escape(rule)}", str(raised.value))


@pytest.mark.parametrize(("name", "value", "rule"), DECODE_RULES)
def test_what_decode_refuses(operators, name, value, rule):
    refused(operators.decode, decode_arguments(), name, value, rule)
    assert not operators.launches


@pytest.mark.parametrize(("name", "value", "rule"), OUTER_RULES)
def test_what_wgrad_refuses(operators, name, value, rule):
    refused(operators.wgrad, outer_arguments(), name, value, rule)
    assert not operators.launches


def test_sizes_that_an_int_cannot_hold_are_refused(operators):
    """Views that repeat one element: rows and columns are counted in 32 bits."""
    long = 2**31
    x, w = (torch.zeros(1, 1, dtype=HALF).expand(shape) for shape in ((M, long), (long, N)))
    arguments = decode_arguments(w=w, chunk=long, splits=1, fused_rank=0)
    refused(operators.decode, arguments, "x", x, "must have fewer than 2^31 rows and columns")
    left = torch.zeros(M, 1, dtype=HALF).expand(M, long)
    refused(operators.wgrad, outer_arguments(), "left", left, "must have fewer than 2^31 columns")


def test_rules_of_two_arguments(operators):
    tiles = decode_arguments(arrived=torch.zeros(3, dtype=torch.int32))
    refused(operators.decode, tiles, "w", torch.Tensor.float, "must be half")
    tiles |= {"x": tiles["x"].float(), "y": tiles["y"].float()}
    refused(operators.decode, tiles, "w", torch.Tensor.float, "must be half")
    ranks = {
        "a": torch.zeros(33, K, dtype=HALF).t(),
        "b": torch.zeros(33, N, dtype=HALF),
        "s": torch.zeros(M, 33),
    }
    refused(operators.decode, decode_arguments(**ranks), "fused_rank", 33, "must be 0, or R")
    rows = outer_arguments(left=torch.zeros(33, K, dtype=HALF))
    refused(operators.wgrad, rows, "right", torch.zeros(33, R), "must have the same, at most 32")
    assert not operators.launches


def test_one_launch_on_the_current_stream_of_the_operands_device(operators):
    device, current = operators.variable("tensor_device"), operators.variable("current_device")
    streams = operators.variable("streams", ctypes.c_void_p * 4)
    streams[:] = [0x10, 0x20, 0x30, 0x40]
    device.value, current.value = 2, 1
    arguments = decode_arguments()
    operators.decode(**arguments)
    (launched,) = operators.launches
    assert (launched.device, launched.stream) == (2, 0x30)
    assert (launched.grid, launched.block) == ((2, 2, 1), (128, 1, 1))
    assert current.value == 1
    check_decoded(arguments, 0.5)

    arguments = outer_arguments()
    operators.wgrad(**arguments)
    launched = operators.launches[1]
    assert (launched.device, launched.stream) == (2, 0x30)
    assert (launched.grid, launched.block) == ((1, 1, 1), (128, 1, 1))
    assert current.value == 1
    left, right = arguments["left"], arguments["right"]
    eager, exact = (left.float().t() @ right).to(HALF), left.double().t() @ right.double()
    assert_budget(arguments["out"], eager, exact, "out")

    device.value = 7
    with pytest.raises(RuntimeError, match="the device has no current stream"):
        operators.decode(**decode_arguments())
    assert current.value == 1 and len(operators.launches) == 2


def test_a_failed_launch_is_an_exception_with_the_runtimes_words(operators):
    operators.fails = 701
    for call in (
        lambda: operators.decode(**decode_arguments()),
        lambda: operators.wgrad(**outer_arguments()),
    ):
        with pytest.raises(
            RuntimeError, match="lora_kernels_cuda: the launch failed: CUDA error 701"
        ):
            call()
    assert operators.variable("current_device").value == 0 and not operators.launches
    operators.fails = 0
    arguments = decode_arguments()
    operators.decode(**arguments)  # the error is not told a second time
    check_decoded(arguments, 0.5)


def test_an_error_of_the_emulator_reaches_the_caller(operators):
    operators.ptx = ""
    with pytest.raises(PtxError, match="no kernel") as raised:
        operators.decode(**decode_arguments())
    assert "CUDA error 719" in str(raised.value.__cause__)


@pytest.mark.parametrize("alpha", [0.75, -2.0])
def test_alpha_is_read_on_the_device(operators, alpha):
    """As the number that stands there when the kernel runs; `alpha` is then without a meaning."""
    arguments = decode_arguments(alpha_at=torch.tensor(alpha), alpha=torch.nan)
    operators.decode(**arguments)
    check_decoded(arguments, alpha)
    assert operators.counters[0].tensors["alpha_at"].bytes_loaded > 0


@pytest.mark.parametrize("name", ["x", "w", "a"])
@pytest.mark.parametrize("view", ["rows apart", "begins later", "ends earlier"])
def test_alignment_is_that_of_the_view(operators, name, view):
    """Rows of 80 bytes allow vectors of 16, unless the distance of rows, the first address or their length does not."""
    arguments = decode_arguments()
    if view == "ends earlier":
        arguments |= {"x": arguments["x"][:, :-4].contiguous()}
        arguments |= {n: arguments[n].t()[:, :-4].contiguous().t() for n in ("w", "a")}
    rows = arguments[name] if name == "x" else arguments[name].t()
    if view == "rows apart":
        moved = torch.zeros(len(rows), K + 4, dtype=HALF)[:, :K]
    elif view == "ends earlier":
        moved = torch.full((len(rows), K), torch.nan, dtype=HALF)[:, :-4]
    else:
        moved = torch.zeros(rows.numel() + 4, dtype=HALF)[4:].view(rows.shape)
    moved.copy_(rows)
    arguments[name] = moved if name == "x" else moved.t()
    operators.decode(**arguments)
    check_decoded(arguments, 0.5)


def test_a_bias_of_one_number_may_have_any_stride(operators):
    """PyTorch calls it contiguous, so nobody copies it."""
    bias = torch.randn(7).to(HALF)[::7]
    assert bias.stride() == (7,) and bias.is_contiguous()
    arguments = decode_arguments(
        w=torch.randn(1, K).to(HALF).t(), b=torch.randn(R, 1).to(HALF), bias=bias, y=torch.full((M, 1), torch.nan).to(HALF)
    )  # fmt: skip
    operators.decode(**arguments)
    check_decoded(arguments, 0.5)


def test_a_single_column_of_x_may_have_any_stride(operators):
    x = torch.randn(1, M).to(HALF).t()
    assert x.stride() == (1, M) and x.is_contiguous()
    arguments = decode_arguments(
        x=x, w=torch.randn(N, 1).to(HALF).t(), a=torch.randn(R, 1).to(HALF).t()
    )
    operators.decode(**arguments)
    check_decoded(arguments, 0.5)


def test_the_host_code_neither_allocates_nor_waits(library):
    """It was linked against a runtime that can only launch; of PyTorch it asks for the tensors' descriptions."""
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True
    )
    asked = set(re.findall(r"\b(?:aoti_)?torch_\w+", listed.stdout))
    known = r"aoti_torch_(get|is_contiguous|dtype|device_type|library|delete|abi_version)\w*|torch_library_impl"
    assert asked and not [name for name in asked if not re.fullmatch(known, name)]
    assert not re.search(r"\bcuda\w+", listed.stdout)
