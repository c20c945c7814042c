"""Dense copies of quantised weights: W = code[nibble]·scale of NF4, W = code·scale of int8 and fp8, each rounded once.

For more rows than `decode` takes, W is decoded once and then read by the ordinary product: inside of its loop each block
of rows would decode it again. The bits are those of the weight's own `dense()`. So these kernels are compiled without
contraction: a scale's product and sum round one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.backends.triton.launch import cdiv, launch, needs_int64
from lora_kernels.backends.triton.scratch import lent
from lora_kernels.backends.triton.tiles import as_int64, fp8_scale, fp8_value, int8_scale, nf4_scale
from lora_kernels.operands import QuantizedWeight
from lora_kernels.tuning.config import TileConfig


@triton.jit
def _dequantise_nf4_kernel(
    packed_ptr,  # uint8 [elements / 2], the even elements in the high nibbles
    absmax_ptr,  # float32 or, with code2, uint8 [elements / 64]
    code_ptr,  # float32 [16]
    code2_ptr,  # float32 [256]
    absmax2_ptr,  # float32 [elements / 64 / 256]
    offset_ptr,  # float32 [1]
    w_ptr,  # [elements], contiguous
    elements,
    packed_bytes,
    BLOCKS: tl.constexpr,
    INT64: tl.constexpr,
):
    """BLOCKS blocks of 64 elements, which share a scale."""
    block = as_int64(tl.program_id(0), INT64) * BLOCKS + tl.arange(0, BLOCKS)
    scale = nf4_scale(
        absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, block, block < tl.cdiv(elements, 64)
    )
    byte = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    packed = tl.load(packed_ptr + byte, mask=byte < packed_bytes, other=0)
    shift = 4 - 4 * tl.arange(0, 2)
    nibble = tl.reshape((packed[:, :, None] >> shift[None, None, :]) & 15, (BLOCKS, 64))
    w = tl.load(code_ptr + nibble) * scale[:, None]
    element = block[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(w_ptr + element, w.to(w_ptr.dtype.element_ty), mask=element < elements)


@triton.jit
def _dequantise_bytes_kernel(
    codes_ptr,  # int8 [N, K], or float8_e4m3fn as int8
    scales_ptr,  # float32, of each row of int8, of each SCALE_ROWS x SCALE_COLS block of fp8
    w_ptr,  # [N, K], contiguous
    N,
    K,
    stride_n,
    stride_k,
    FORMAT: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE_COLS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INT64: tl.constexpr,
):
    blocks_k = tl.cdiv(K, BLOCK_K)
    offs_n = tl.program_id(0) // blocks_k * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.program_id(0) % blocks_k * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (offs_n < N)[:, None] & (offs_k < K)[None, :]
    row, col = as_int64(offs_n, INT64)[:, None], as_int64(offs_k, INT64)[None, :]
    codes = tl.load(codes_ptr + row * stride_n + col * stride_k, mask=mask, other=0)
    if FORMAT == "int8":
        w = codes.to(tl.float32) * int8_scale(scales_ptr, row, row < N)
    else:
        w = fp8_value(codes) * fp8_scale(scales_ptr, row, col, mask, K, SCALE_ROWS, SCALE_COLS)
    tl.store(w_ptr + row * K + col, w.to(w_ptr.dtype.element_ty), mask=mask)


def _nf4(weight: Any, out: Tensor, config: TileConfig) -> None:
    elements, (packed, values) = out.numel(), nf4_arguments(weight)
    blocks = config.block_n * config.block_k // 64
    launch(
        _dequantise_nf4_kernel,
        cdiv(elements, blocks * 64),
        config,
        out.device,
        packed,
        *values,
        out,
        elements,
        cdiv(elements, 2),
        contract=False,
        BLOCKS=blocks,
        # A last program's masked lanes count too.
        INT64=elements + blocks * 64 > 2**31,
    )


def _bytes(weight: Any, out: Tensor, config: TileConfig) -> None:
    """int8 and fp8: one program for each block_n x block_k tile of codes."""
    codes, scales, (rows, cols) = bytes_arguments(weight)
    N, K = out.shape
    launch(
        _dequantise_bytes_kernel,
        cdiv(N, config.block_n) * cdiv(K, config.block_k),
        config,
        out.device,
        codes,
        scales,
        out,
        N,
        K,
        *codes.stride(),
        contract=False,
        FORMAT=weight.format,
        SCALE_ROWS=rows,
        SCALE_COLS=cols,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        INT64=needs_int64(codes, out),
    )


# Rows or columns of a block that has them all: one number, and one kernel, for every such size.
_WHOLE = 1 << 30


def nf4_arguments(weight: Any) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """(codes as bytes, the five tensors of their values) of an NF4 weight, contiguous as kernels take them."""
    packed = weight.packed.contiguous().flatten().view(torch.uint8)
    parts = weight.absmax, weight.code, weight.code2, weight.absmax2, weight.offset
    return packed, tuple(None if t is None else t.contiguous() for t in parts)


def bytes_arguments(weight: Any) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """(codes [N, K] as int8, their scales, contiguous, rows and columns that share one) of an int8 or fp8 weight."""
    codes = weight.codes.view(torch.int8)
    if weight.format == "int8":
        return codes, weight.absmax.contiguous(), (1, _WHOLE)
    shared = zip(weight.block, codes.shape, strict=True)
    rows, cols = (_WHOLE if size >= whole else size for size, whole in shared)
    return codes, weight.scales.contiguous(), (rows, cols)


def dequantise(weight: QuantizedWeight, out: Tensor, config: TileConfig) -> None:
    """Write the matrix [N, K] that is stored into `out`, contiguous, of the dtype that W is rounded to."""
    if out.numel():
        decode = _nf4 if weight.format == "nf4" else _bytes
        decode(weight, out, config)


@contextmanager
def decoded(weight: Any, config: TileConfig) -> Iterator[Tensor]:
    """A QuantizedWeight as a dense tensor in memory that is lent: for products launched within the block."""
    N, K = (weight.t() if weight.transposed else weight).shape
    with lent(N, K, weight.dtype, weight.device) as out:
        dequantise(weight, out, config)
        yield out.t() if weight.transposed else out
