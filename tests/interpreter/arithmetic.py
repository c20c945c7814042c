"""Arithmetic of the patched interpreter: bfloat16 through float32, TF32 products, and what an unread lane holds."""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle


def widened(bits: np.ndarray) -> np.ndarray:
    """float32 values of bfloat16 bit patterns."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrowed(values: np.ndarray) -> np.ndarray:
    """bfloat16 bit patterns of float32 values, rounded to nearest even; NaN stays NaN."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def _is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def float32(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(widened(handle.data), tl.float32) if _is_bf16(handle) else handle


def _bf16_again(output: np.ndarray) -> TensorHandle:
    if output.dtype == np.bool_:  # a comparison
        return TensorHandle(output, tl.int1)
    return TensorHandle(narrowed(output), tl.bfloat16)


def binary_op_by(stock):
    def binary_op(self, lhs, rhs, op):
        if not (_is_bf16(lhs) and _is_bf16(rhs)):
            return stock(self, lhs, rhs, op)
        with np.errstate(all="ignore"):
            return _bf16_again(op(widened(lhs.data), widened(rhs.data)))

    return binary_op


def unary_op_by(stock):
    def unary_op(self, arg, op):
        return _bf16_again(op(widened(arg.data))) if _is_bf16(arg) else stock(self, arg, op)

    return unary_op


def cast_impl_by(stock):
    def cast_impl(self, src, dst_type):
        src = float32(src)
        if dst_type.scalar != tl.bfloat16:
            return stock(self, src, dst_type)
        return TensorHandle(narrowed(src.data), tl.bfloat16)

    return cast_impl


def tf32(values: np.ndarray) -> np.ndarray:
    """`values` as a tensor core reads them, without the last thirteen bits: the worst that hardware does."""
    return (np.ascontiguousarray(values).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


@np.errstate(all="ignore")
def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    left, right = float32(a).data, float32(b).data
    if left.dtype == np.float32 and not _is_bf16(a):
        name = str(input_precision).rsplit(".", 1)[-1]
        if name == "TF32":
            left, right = tf32(left), tf32(right)
        elif name == "TF32x3":
            high, low = tf32(left), tf32(left - tf32(left))
            right_high, right_low = tf32(right), tf32(right - tf32(right))
            small = low @ right_high + high @ right_low
            # As Triton does it: an infinity's low part is NaN, which must not reach the sum.
            d = TensorHandle(d.data + np.where(np.isnan(small), 0.0, small), d.dtype)
            left, right = high, right_high
    return TensorHandle(np.matmul(left, right, dtype=d.data.dtype) + d.data, d.dtype.scalar)


def poison(dtype: tl.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """What a masked lane without `other` holds: NaN, or the largest integer."""
    if dtype == tl.bfloat16:
        return np.full(shape, 0x7FC0, np.uint16)
    kind = interpreter._get_np_dtype(dtype)
    return np.full(shape, np.nan if kind.kind == "f" else np.iinfo(kind).max, kind)
