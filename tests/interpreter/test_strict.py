"""The patched interpreter itself: its bfloat16 equals PyTorch's bit for bit, and each of its checks can fail."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.interpreter import strict
from tests.interpreter.arithmetic import narrowed, widened


def all_bfloat16() -> torch.Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Equal as bit patterns, any NaN counting as any other."""
    return torch.equal(ours.nan_to_num(nan=1e30), theirs.nan_to_num(nan=1e30))


@triton.jit
def _elementwise(a_ptr, b_ptr, f_ptr, out_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    a = tl.load(a_ptr + offs)
    b = tl.load(b_ptr + offs)
    f = tl.load(f_ptr + offs)
    tl.store(out_ptr + offs, a + b)
    tl.store(out_ptr + SIZE + offs, a * b)
    tl.store(out_ptr + 2 * SIZE + offs, -a)
    tl.store(out_ptr + 3 * SIZE + offs, tl.where(a > b, a, b))
    tl.store(out_ptr + 4 * SIZE + offs, f.to(tl.bfloat16))
    tl.store(out_ptr + 5 * SIZE + offs, f)  # converted by the store
    tl.store(out_ptr + 6 * SIZE + offs, a * (a > b).to(tl.bfloat16))


def test_bfloat16_arithmetic_is_torchs():
    a = all_bfloat16()
    b = a[torch.randperm(a.numel())]
    f = torch.cat([torch.randn(2**15), torch.randn(2**15) * 2.0**-130])
    f[:4] = torch.tensor([float("nan"), float("inf"), 3.4e38, -0.0])
    out = torch.empty(7, a.numel(), dtype=torch.bfloat16)
    _elementwise[(1,)](a, b, f, out, SIZE=a.numel())
    cast = f.to(torch.bfloat16)
    expected = (a + b, a * b, -a, torch.where(a > b, a, b), cast, cast, a * (a > b))
    for ours, theirs in zip(out, expected, strict=True):
        assert same_bits(ours, theirs)


def test_widening_and_narrowing_are_inverse():
    bits = all_bfloat16().view(torch.int16).numpy().view("uint16")
    finite = ~torch.isnan(all_bfloat16()).numpy()
    assert (narrowed(widened(bits))[finite] == bits[finite]).all()


@triton.jit
def _product(a_ptr, b_ptr, out_ptr, K: tl.constexpr, PRECISION: tl.constexpr):
    row = tl.arange(0, 16)
    k = tl.arange(0, K)
    a = tl.load(a_ptr + row[:, None] * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] * 16 + row[None, :])
    product = tl.dot(a, b, input_precision=PRECISION)
    tl.store(out_ptr + row[:, None] * 16 + row[None, :], product)


def product(a: torch.Tensor, b: torch.Tensor, precision: str = "ieee") -> torch.Tensor:
    out = torch.empty(16, 16)
    _product[(1,)](a, b, out, K=a.shape[1], PRECISION=precision)
    return out


def test_bfloat16_product():
    a, b = torch.randn(16, 32).bfloat16(), torch.randn(32, 16).bfloat16()
    assert torch.allclose(product(a, b), a.float() @ b.float(), atol=1e-5)


def test_tf32_drops_bits_and_three_products_keep_them():
    a, b = torch.full((16, 16), 1 + 2.0**-12), torch.eye(16)
    assert torch.equal(product(a, b, "tf32"), torch.ones(16, 16))
    assert torch.equal(product(a, b, "tf32x3"), a)
    assert torch.equal(product(a, b, "ieee"), a)
    infinite = a.clone()
    infinite[0, 0] = float("inf")
    assert product(infinite, torch.ones(16, 16), "tf32x3")[0, 0] == float("inf")


def test_products_too_short_for_tensor_cores_are_refused():
    with pytest.raises(InterpreterError, match="K >= 16"):
        product(torch.ones(16, 8).bfloat16(), torch.ones(8, 16).bfloat16())


@triton.jit
def _copy(
    src_ptr,
    out_ptr,
    shift,
    limit,
    stride,
    SIZE: tl.constexpr,
    HAS_OTHER: tl.constexpr,
):
    offs = tl.arange(0, SIZE)
    if HAS_OTHER:
        values = tl.load(src_ptr + shift + offs * stride, mask=offs < limit, other=0.0)
    else:
        values = tl.load(src_ptr + shift + offs * stride, mask=offs < limit)
    tl.store(out_ptr + offs, values)


def copy(src, *, shift=0, limit=8, stride=1, out=None, other=True):
    out = torch.empty(8, dtype=src.dtype) if out is None else out
    _copy[(1,)](src, out, shift, limit, stride, SIZE=8, HAS_OTHER=other)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_masked_lanes_are_poison_without_other(dtype):
    src = torch.ones(8, dtype=dtype)
    assert copy(src, limit=5)[5:].eq(0).all()
    assert copy(src, limit=5, other=False)[5:].isnan().all()


def test_every_address_must_be_an_element_of_its_own_tensor():
    buffer = torch.arange(40.0)
    assert torch.equal(copy(buffer[8:16]), buffer[8:16])
    for wrong in (
        {"shift": 1},  # one past the end, though the storage goes on
        {"shift": -1},
        {"shift": 16},  # into another part of the same storage
    ):
        with pytest.raises(InterpreterError, match="src_ptr does not have"):
            copy(buffer[8:16], **wrong)
    every_other = buffer[:16:2]
    assert torch.equal(copy(every_other, stride=2), every_other)
    with pytest.raises(InterpreterError, match="load of 4 elements"):
        copy(every_other)  # half of its addresses fall between the elements
    with pytest.raises(InterpreterError, match="store of 3 elements that out_ptr"):
        copy(torch.ones(8), out=torch.empty(5))


@triton.jit
def _through_descriptor(desc, out_ptr, row, WHOLE: tl.constexpr):
    block = desc.load([row, 0])
    offs = tl.arange(0, 8)
    tl.store(out_ptr + offs[:, None] * 8 + offs[None, :], block)


def test_descriptors_fill_with_zeros_and_keep_to_their_tensor():
    src = torch.arange(96.0).view(12, 8)
    out = torch.empty(8, 8)
    _through_descriptor[(1,)](TensorDescriptor.from_tensor(src, [8, 8]), out, 8, WHOLE=True)
    assert torch.equal(out[:4], src[8:]) and out[4:].eq(0).all()
    lying = TensorDescriptor(src[:6], [12, 8], [8, 1], [8, 8])
    with pytest.raises(InterpreterError, match="desc does not have"):
        _through_descriptor[(1,)](lying, out, 0, WHOLE=True)


@triton.jit
def _last_one_wins(out_ptr):
    tl.store(out_ptr, tl.program_id(0))


def test_program_order_changes_what_a_race_leaves():
    out = torch.zeros(1, dtype=torch.int32)
    seen = {}
    for order in ("ascending", "descending", "shuffled"):
        with strict.program_order(order):
            _last_one_wins[(8,)](out)
        seen[order] = out.item()
    assert seen["ascending"] == 7 and seen["descending"] == 0 and seen["shuffled"] not in (0, 7)


@triton.jit
def _atomic(out_ptr, value):
    tl.atomic_add(out_ptr, value)


def test_float_atomics_are_refused():
    out = torch.zeros(1, dtype=torch.int32)
    _atomic[(3,)](out, 2)
    assert out.item() == 6
    with pytest.raises(InterpreterError, match="float atomic"):
        _atomic[(1,)](torch.zeros(1), 1.0)


@pytest.mark.parametrize("grid", [(0,), (1, 65536), (1, 1, 65536)])
def test_grids_that_a_gpu_refuses(grid):
    with pytest.raises(ValueError, match="cannot be launched"):
        _last_one_wins[grid](torch.zeros(1, dtype=torch.int32))


@triton.jit
def _dependent(first_ptr, other_ptr, out_ptr, WAIT: tl.constexpr):
    other = tl.load(other_ptr)
    if WAIT:
        tl.extra.cuda.gdc_wait()
    tl.store(out_ptr, tl.load(first_ptr) + other)


def test_a_dependent_launch_must_wait_before_it_reads():
    first, other, out = torch.zeros(1, dtype=torch.int32), torch.ones(1, dtype=torch.int32), None
    out = torch.zeros(1, dtype=torch.int32)
    _last_one_wins[(3,)](first)
    _dependent[(1,)](first, other, out, WAIT=True, launch_pdl=True)
    assert out.item() == 3
    _last_one_wins[(3,)](first)
    with pytest.raises(InterpreterError, match="before the kernel that writes it"):
        _dependent[(1,)](first, other, out, WAIT=False, launch_pdl=True)
    _last_one_wins[(3,)](first)
    _dependent[(1,)](first, other, out, WAIT=False)  # an ordinary launch need not


def test_loads_and_stores_are_counted():
    with strict.recording() as launches:
        copy(torch.ones(8), limit=5)
    (launch,) = launches
    assert (launch.loads["src_ptr"], launch.stores["out_ptr"], launch.grid) == (5, 8, (1,))
    assert "out_ptr" not in launch.loads and "src_ptr" not in launch.stores


def test_new_memory_is_not_a_number():
    assert torch.ones(1).new_empty(3).isnan().all()
