"""Dense copies of quantised weights: W = code[nibble]·scale of NF4, W = code·scale of int8 rows, each rounded once.

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
from lora_kernels.backends.triton.tiles import int8_scale, nf4_scale, widen
from lora_kernels.operands import QuantizedWeight
from lora_kernels.tuning.config import TileConfig


@triton.jit
def _dequantise_nf4_kernel(
    packed_ptr,  # uint8 [elements / 2], the even elements in the high nibbles
    absmax_ptr,  # float32 or, where DOUBLE, uint8 [elements / 64]
    code_ptr,  # float32 [16]
    code2_ptr,  # float32 [256]
    absmax2_ptr,  # float32 [elements / 64 / 256]
    offset_ptr,  # float32 [1]
    w_ptr,  # [elements], contiguous
    elements,
    packed_bytes,
    BLOCKS: tl.constexpr,
    DOUBLE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """BLOCKS blocks of 64 elements, which share a scale."""
    block = widen(tl.program_id(0), WIDE) * BLOCKS + tl.arange(0, BLOCKS)
    scale = nf4_scale(
        absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, block, block < tl.cdiv(elements, 64), DOUBLE
    )
    byte = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    packed = tl.load(packed_ptr + byte, mask=byte < packed_bytes, other=0)
    shift = 4 - 4 * tl.arange(0, 2)
    nibble = tl.reshape((packed[:, :, None] >> shift[None, None, :]) & 15, (BLOCKS, 64))
    w = tl.load(code_ptr + nibble) * scale[:, None]
    element = block[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(w_ptr + element, w.to(w_ptr.dtype.element_ty), mask=element < elements)


@triton.jit
def _dequantise_int8_kernel(
    codes_ptr,  # int8 [N, K]
    absmax_ptr,  # float32 [N]
    w_ptr,  # [N, K], contiguous
    N,
    K,
    stride_n,
    stride_k,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDE: tl.constexpr,
):
    blocks_k = tl.cdiv(K, BLOCK_K)
    offs_n = tl.program_id(0) // blocks_k * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.program_id(0) % blocks_k * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (offs_n < N)[:, None] & (offs_k < K)[None, :]
    row, col = widen(offs_n, WIDE), widen(offs_k, WIDE)
    scale = int8_scale(absmax_ptr, row, offs_n < N)
    codes = tl.load(
        codes_ptr + row[:, None] * stride_n + col[None, :] * stride_k, mask=mask, other=0
    )
    w = codes.to(tl.float32) * scale[:, None]
    tl.store(w_ptr + row[:, None] * K + col[None, :], w.to(w_ptr.dtype.element_ty), mask=mask)


def _nf4(weight: Any, out: Tensor, config: TileConfig) -> None:
    elements = out.numel()
    blocks = config.block_n * config.block_k // 64
    launch(
        _dequantise_nf4_kernel,
        cdiv(elements, blocks * 64),
        config,
        out.device,
        *nf4_arguments(weight),
        out,
        elements,
        cdiv(elements, 2),
        contract=False,
        BLOCKS=blocks,
        DOUBLE=weight.code2 is not None,
        # A last program's masked lanes count too.
        WIDE=elements + blocks * 64 > 2**31,
    )


def _int8(weight: Any, out: Tensor, config: TileConfig) -> None:
    (N, K), codes = out.shape, weight.codes
    launch(
        _dequantise_int8_kernel,
        cdiv(N, config.block_n) * cdiv(K, config.block_k),
        config,
        out.device,
        codes,
        weight.absmax.contiguous(),
        out,
        N,
        K,
        *codes.stride(),
        contract=False,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        WIDE=needs_int64(codes, out),
    )


_DECODERS = {"nf4": _nf4, "int8": _int8}


def nf4_arguments(weight: Any) -> tuple[Tensor | None, ...]:
    """The tensors of an NF4 weight as kernels take them: contiguous, with the codes as bytes."""
    packed = weight.packed.contiguous().flatten().view(torch.uint8)
    parts = weight.absmax, weight.code, weight.code2, weight.absmax2, weight.offset
    return packed, *(None if t is None else t.contiguous() for t in parts)


def dequantise(weight: QuantizedWeight, out: Tensor, config: TileConfig) -> None:
    """Write the matrix [N, K] that is stored into `out`, contiguous, of the dtype that W is rounded to."""
    if out.numel():
        _DECODERS[weight.format](weight, out, config)


@contextmanager
def decoded(weight: Any, config: TileConfig) -> Iterator[Tensor]:
    """A QuantizedWeight as a dense tensor in memory that is lent: for products launched within the block."""
    N, K = (weight.t() if weight.transposed else weight).shape
    with lent(N, K, weight.dtype, weight.device) as out:
        dequantise(weight, out, config)
        yield out.t() if weight.transposed else out
