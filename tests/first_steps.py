"""What a stranger does first with an installed package, and what must come of it: `python first_steps.py BACKEND`.

It imports nothing of the sources. BACKEND is what a call that names none must take here.
"""

from __future__ import annotations

import sys
import tempfile

import torch

import lora_kernels
from lora_kernels import (
    explain,
    freeze_base,
    load_adapter,
    lora_parameters,
    merge_lora,
    replace_linear_with_lora,
    save_adapter,
    unmerge_lora,
)


def train(expected: str) -> None:
    """Fifty steps against the formula in PyTorch's operations, then adapters, merging and unmerging."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
    replace_linear_with_lora(model, rank=8, alpha=2)
    freeze_base(model)
    x, wanted = torch.randn(128, 32), torch.randn(128, 8)
    lora, layer = model[0].lora, model[0].linear
    found = explain(x, layer.weight, lora.A, lora.B, 2.0, layer.bias)
    assert found.backend == expected, found
    optimizer = torch.optim.Adam(lora_parameters(model), lr=0.02)
    losses = []
    for _ in range(50):
        optimizer.zero_grad()
        loss = (model(x) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], losses
    with torch.no_grad():
        plain = layer(x) + 2 * (x @ lora.A @ lora.B)
        torch.testing.assert_close(model[0](x), plain)
        with tempfile.TemporaryDirectory() as folder:
            save_adapter(model, folder)
            load_adapter(model, folder)
        before, y = layer.weight.clone(), model(x)
        merge_lora(model)
        torch.testing.assert_close(model(x), y, atol=1e-4, rtol=1e-4)
        unmerge_lora(model)
        assert torch.equal(layer.weight, before)


if __name__ == "__main__":
    train(sys.argv[1])
    print(f"lora_kernels {lora_kernels.__version__} with torch {torch.__version__}: {sys.argv[1]}")
