"""Tensor parallel training: one LoRA layer split over its outputs, the next over its inputs, one sum between ranks.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py        # on one machine, CPU or GPUs

Each rank holds and multiplies its share of W, A and B; adapters are trained, the base is frozen.
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

from lora_kernels import freeze_base, lora_parameters, replace_linear_with_lora
from lora_kernels.distributed import ColwiseLoRA, RowwiseLoRA


class FeedForward(nn.Module):
    """The feed-forward block of a transformer."""

    def __init__(self, width, hidden):
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(x)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"--steps must be positive, got {options.steps}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    mesh = init_device_mesh(device, (int(os.environ["WORLD_SIZE"]),))
    first = dist.get_rank() == 0

    torch.manual_seed(0)  # the same model and the same data on every rank
    model = FeedForward(64, 256).to(device)
    replace_linear_with_lora(model, rank=8, alpha=1.0)
    freeze_base(model)
    parallelize_module(model, mesh, {"up": ColwiseLoRA(), "down": RowwiseLoRA()})
    if first:
        for name, p in model.named_parameters():
            print(f"{name:15} {tuple(p.shape)!s:10} here {tuple(p.to_local().shape)}")

    x, target = torch.randn(2, 128, 64, device=device)
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-2)
    for step in range(options.steps):
        loss = nn.functional.mse_loss(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if first and (step % 10 == 0 or step == options.steps - 1):
            print(f"step {step:3}  loss {loss.item():.4f}")
    dist.barrier()  # nobody leaves while another still speaks to it
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
