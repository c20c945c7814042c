"""Train several adapters over one frozen model at once: each sample of a batch has the adapter of its task.

    python examples/many_adapters.py --steps 30

The tasks are maps of one input that contradict one another, so that one adapter could not learn them all. Then the adapters
are saved in PEFT's layout, one folder each, and loaded by name into a fresh model.
"""

import argparse
from pathlib import Path

import torch
from torch import nn

from lora_kernels import (
    add_adapter,
    freeze_base,
    load_named_adapter,
    lora_parameters,
    save_named_adapter,
    select_adapters,
)

TASKS = {"same": 1.0, "negated": -1.0, "doubled": 2.0}


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 4))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--output", type=Path, default=Path("demo/many_adapters"))
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"--steps must be positive, got {options.steps}")

    model, teacher = make_model(), make_model()
    for rank, name in enumerate(TASKS, start=4):
        add_adapter(model, name, rank, alpha=1.0)  # ranks and scales may differ
    freeze_base(model)
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=2e-2)
    names = [list(TASKS)[i % len(TASKS)] for i in range(48)]
    factors = torch.tensor([TASKS[name] for name in names]).unsqueeze(1)
    for step in range(options.steps):
        x = torch.randn(len(names), 16)
        select_adapters(model, names)  # one product for all of them
        loss = (model(x) - factors * teacher(x).detach()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in (0, options.steps - 1):
            print(f"step {step:3}  loss {loss.item():.4f}")

    fresh = make_model()
    for name in TASKS:
        save_named_adapter(model, name, options.output / name)
        load_named_adapter(fresh, name, options.output / name)
    select_adapters(fresh, names)
    with torch.no_grad():
        gap = (fresh(x) - model(x)).abs().max().item()
    print(f"saved to {options.output}; a fresh model's outputs differ by {gap:.1e}")


if __name__ == "__main__":
    main()
