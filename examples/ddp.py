"""Data parallel training with DistributedDataParallel, which needs nothing from this package.

    torchrun --nproc-per-node 2 examples/ddp.py                    # on one machine, CPU or GPUs
    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 examples/ddp.py

The model is a tiny Llama with random weights; every linear layer gets a LoRA branch.
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from lora_kernels import freeze_base, lora_parameters, replace_linear_with_lora


def start():
    """(rank, number of ranks, device of this rank)."""
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    if not on_gpu:
        return dist.get_rank(), dist.get_world_size(), torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return dist.get_rank(), dist.get_world_size(), device


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"--steps must be positive, got {options.steps}")
    rank, ranks, device = start()

    torch.manual_seed(0)  # the same model and the same data on every rank
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    model = LlamaForCausalLM(config)
    replace_linear_with_lora(model, rank=8, alpha=2)
    freeze_base(model)
    parallel = DistributedDataParallel(model.to(device))

    tokens = torch.randint(64, (8 * ranks, 16)).to(device)
    mine = tokens.chunk(ranks)[rank]
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=5e-3)
    for step in range(options.steps):
        loss = parallel(input_ids=mine, labels=mine).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        dist.all_reduce(loss := loss.detach())
        if rank == 0 and (step % 10 == 0 or step == options.steps - 1):
            print(f"step {step:3}  loss {loss.item() / ranks:.4f}")
    dist.barrier()  # nobody leaves while another still speaks to it
    # Before its process group: the two, taken down at once at exit, can wait for each other.
    del parallel
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
