"""Stand-ins for the operators of `csrc/cuda/bindings.cu` that run the shipped kernels' PTX in the emulator.

They do what the bindings do: describe the operands, pick the kernel that `launch.cu` picks, launch it once.
"""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from tests.ptx.counters import Counters
from tests.ptx.launch import prepare
from tests.ptx.parser import entry_names
from tests.ptx.test_cuda import Decode, ReduceOuter, Rows

TYPES = {torch.float32: "f", torch.bfloat16: "13__nv_bfloat16", torch.float16: "6__half"}


class EmulatedOperators:
    """`decode` and `reduce_outer` on CPU tensors; `counters` has what each launch counted."""

    def __init__(self, ptx: str, schedule: int | None = None) -> None:
        self.ptx, self.schedule = ptx, schedule
        self.entries = entry_names(ptx)
        self.counters: list[Counters] = []

    def decode(
        self, x, w, a, b, bias, y, s, partials, arrived, alpha_at, alpha, fused_rank, blocks, splits, chunk,
        skinny
    ):  # fmt: skip
        M, K = x.shape
        R = 0 if skinny else b.shape[0]
        rows = [_rows(x, False), _rows(w, True), _rows(a, True) if fused_rank else Rows()]
        tensors = {"x": x, "w": w, "b": b, "y": y, "partials": partials, "arrived": arrived}
        tensors |= {"a": a} if fused_rank else {}
        tensors |= {} if skinny else {"s": s}
        tensors |= {} if bias is None else {"bias": bias}
        params = Decode(
            *rows, b.data_ptr() if R else None, *(b.stride() if R else (0, 0)),
            None if bias is None else bias.data_ptr(), None if fused_rank else s.data_ptr(),
            None, y.data_ptr(), s.data_ptr(), partials.data_ptr(), arrived.data_ptr(),
            alpha, K, R, chunk, b.dtype == torch.float32, y.dtype == torch.float32, skinny,
        )  # fmt: skip
        tokens = 1 if M <= 8 else 2 if M <= 16 else 4
        k_major = int(rows[1].k_major)
        if x.dtype != torch.float32 and w.dtype != torch.float32:
            ranks = math.ceil(fused_rank / 16) if k_major else 0
            tile = f"MmaTileI{TYPES[x.dtype]}Li{tokens}ELi{ranks}ELb{k_major}E"
        else:
            tile = f"FmaTileI{TYPES[x.dtype]}Li{tokens}ELb{k_major}E"
        self._launch(f"decode_kernel|{tile}", (blocks, splits), params, tensors)

    def reduce_outer(self, left, right, out, left_is_wide):
        wide, skinny = (left, right) if left_is_wide else (right, left)
        out_column, out_rank = out.stride() if left_is_wide else out.stride()[::-1]
        params = ReduceOuter(
            wide.data_ptr(), skinny.data_ptr(), out.data_ptr(), *wide.stride(), out_column, out_rank,
            wide.shape[0], wide.shape[1], skinny.shape[1],
        )  # fmt: skip
        kernel = f"reduce_outer_kernelI{TYPES[wide.dtype]}" + (
            "f" if out.dtype == torch.float32 and wide.dtype != torch.float32 else ""
        )
        same = "S" if out.dtype == wide.dtype and wide.dtype != torch.float32 else ""
        grid = (math.ceil(wide.shape[1] / 128), math.ceil(skinny.shape[1] / 8))
        self._launch(kernel + same, grid, params, {"wide": wide, "skinny": skinny, "out": out})

    def _launch(
        self,
        needles: str,
        grid: tuple[int, int],
        params: ctypes.Structure,
        tensors: dict[str, Tensor],
    ):
        found = [
            name for name in self.entries if all(needle in name for needle in needles.split("|"))
        ]
        assert len(found) == 1, (needles, found)
        tensors = {name: t for name, t in tensors.items() if t.numel()}
        launch = prepare(
            self.ptx, grid, 128, [("p", "struct", params)], entry=found[0], pointed=tensors
        )
        self.counters.append(launch.run(self.schedule))


def _rows(t: Tensor, transposed: bool) -> Rows:
    """As `rows_of` of the bindings."""
    row, k = (1, 0) if transposed else (0, 1)
    k_major = t.stride(k) == 1 or t.shape[k] == 1
    stride = t.stride(row) if k_major else t.stride(k)
    size = t.element_size()
    run = t.shape[k] if k_major else t.shape[row]
    align = math.gcd(16, t.data_ptr(), stride * size, run * size)
    return Rows(t.data_ptr(), stride, t.shape[row], align, k_major)
