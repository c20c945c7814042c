"""A weight format as somebody outside of this package would add it: one subclass of `QuantizedWeight`."""

from __future__ import annotations

import torch

from lora_kernels.operands import QuantizedWeight


class Int8Rows(QuantizedWeight):
    """Rows of int8 codes, each with a float32 scale."""

    format = "int8_rows"

    def __init__(self, codes, scales, dtype=torch.float32, transposed=False):
        self.codes, self.scales, self._dtype, self.transposed = codes, scales, dtype, transposed

    @classmethod
    def quantize(cls, weight):
        scales = weight.abs().amax(1, keepdim=True).float() / 127
        return cls((weight / scales).round().to(torch.int8), scales, weight.dtype)

    @property
    def shape(self):
        rows, columns = self.codes.shape
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def dtype(self):
        return self._dtype

    @property
    def tensors(self):
        return self.codes, self.scales

    @property
    def sizes(self):
        return (int(self.transposed),)

    @classmethod
    def restored(cls, tensors, sizes, dtype):
        return cls(*tensors, dtype, bool(sizes[0]))

    def t(self):
        return Int8Rows(self.codes, self.scales, self._dtype, not self.transposed)

    def dense(self):
        weight = (self.codes * self.scales).to(self._dtype)
        return weight.t() if self.transposed else weight
