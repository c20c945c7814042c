"""The operands of a rank tail in parts, bfloat16: what "split" of `tiles.rank_product` multiplies, as one product of 3·R.

s [M, R] becomes (low | high | high) [M, 3·R] and b [R, N] becomes (high ; low ; high) [3·R, N], where s = high + low and b
likewise, and only the last of the highs has what is not finite. `shrink` stores its s so by itself.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.backends.triton.launch import cdiv, launch, rank_operand
from lora_kernels.backends.triton.tiles import store_parts
from lora_kernels.tuning.config import TAIL_PARTS, TileConfig, rank_block

_BLOCK = 1024  # elements


@triton.jit
def _store_block(
    block,
    ptr,  # [C, R]
    out_ptr,  # [C, 3·R]
    C,
    R,
    stride_c,
    stride_r,
    stride_out_c,
    stride_out_r,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    LEFT: tl.constexpr,
):
    """One block of rows and ranks of an operand, in parts."""
    blocks_r = tl.cdiv(R, BLOCK_R)
    offs_c = (block // blocks_r * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)[:, None]
    offs_r = (block % blocks_r * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)[None, :]
    mask = (offs_c < C) & (offs_r < R)
    values = tl.load(ptr + offs_c * stride_c + offs_r * stride_r, mask=mask, other=0.0)
    out_ptrs = out_ptr + offs_c * stride_out_c + offs_r * stride_out_r
    store_parts(out_ptrs, values.to(tl.float32), mask, R * stride_out_r, LEFT)


@triton.jit(do_not_specialize=["M", "s_blocks"])
def _parts_kernel(
    s_ptr,  # [M, R], or None
    b_ptr,  # [N, R]: b transposed
    s_out_ptr,  # [M, 3·R], rows of unit stride
    b_out_ptr,  # [N, 3·R]
    s_blocks,
    M,
    N,
    R,
    stride_sm,
    stride_sr,
    stride_bn,
    stride_br,
    stride_out_m,
    stride_out_n,
    stride_out_r,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        # The dependent product may start at once: it reads the parts only after its own K loop, behind a wait.
        tl.extra.cuda.gdc_launch_dependents()
    block = tl.program_id(0)
    if s_ptr is not None:
        if block < s_blocks:
            _store_block(
                block, s_ptr, s_out_ptr, M, R, stride_sm, stride_sr, stride_out_m, 1, BLOCK_C,
                BLOCK_R, True,
            )  # fmt: skip
            return
        block -= s_blocks
    _store_block(
        block, b_ptr, b_out_ptr, N, R, stride_bn, stride_br, stride_out_n, stride_out_r, BLOCK_C,
        BLOCK_R, False,
    )  # fmt: skip


def parts(
    s: Tensor | None, b: Tensor, config: TileConfig, *, release: bool = False
) -> tuple[Tensor | None, Tensor]:
    """s [M, R] float32, if given, and b [R, N] of any type in parts, [M, 3·R] and [3·R, N] bfloat16; none empty.

    Any strides. Tensor copies can fetch the results where N % 8 = 0. `release` lets a dependent launch that follows start
    early (sm_90 and newer).
    """
    R, N = b.shape
    ranks = rank_block(R, 64)
    M = 0 if s is None else s.shape[0]
    s_out = None if s is None else rank_operand(M, TAIL_PARTS * R, torch.bfloat16, b.device)
    if b.stride(1) == 1:  # as it lies in memory
        b_out = b.new_empty((TAIL_PARTS * R, N), dtype=torch.bfloat16)
    else:
        b_out = rank_operand(N, TAIL_PARTS * R, torch.bfloat16, b.device).t()
    blocks = [cdiv(rows, _BLOCK // ranks) * cdiv(R, ranks) for rows in (M, N)]
    launch(
        _parts_kernel,
        sum(blocks),
        config,
        b.device,
        s,
        b,
        s_out,
        b_out,
        blocks[0],
        M,
        N,
        R,
        *((0, 0) if s is None else s.stride()),
        b.stride(1),
        b.stride(0),
        0 if s_out is None else s_out.stride(0),
        b_out.stride(1),
        b_out.stride(0),
        BLOCK_C=_BLOCK // ranks,
        BLOCK_R=ranks,
        PDL=release,
    )
    return s_out, b_out
