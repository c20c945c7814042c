"""What the kernels in Gluon share: the order of tiles, how dependent launches meet, and a slot of a ring as a block."""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from lora_kernels.backends.triton.tiles import grouped_order

ordered = gluon.jit(grouped_order.fn)
gdc_wait = tl.extra.cuda.gdc_wait
gdc_launch_dependents = tl.extra.cuda.gdc_launch_dependents
# Up to Triton 3.8 another view of shared memory has another name.
_REINTERPRETS = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


@gluon.jit
def block(slot, desc):
    """A slot of the ring as the block that `desc` copies there."""
    if _REINTERPRETS:
        return slot.reinterpret(desc.dtype, desc.block_shape, desc.layout)
    else:
        return slot._reinterpret(desc.dtype, desc.block_shape, desc.layout)
