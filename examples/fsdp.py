"""Fully sharded training (FSDP2) of a PEFT model in bfloat16; the layers read their parameters after FSDP gathered them.

    torchrun --nproc-per-node 2 examples/fsdp.py                   # on one machine, CPU or GPUs
    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 examples/fsdp.py

The model is a tiny Llama with random weights.
"""

import argparse
import os

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from lora_kernels.integrations.peft import accelerate


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
    model = get_peft_model(
        LlamaForCausalLM(config), LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    ).to(device)
    report = accelerate(model)
    if rank == 0:
        print(str(report).splitlines()[0])

    mesh = init_device_mesh(device.type, (ranks,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.base_model.model.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)

    tokens = torch.randint(64, (8 * ranks, 16)).to(device)
    mine = tokens.chunk(ranks)[rank]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3)
    for step in range(options.steps):
        loss = model(input_ids=mine, labels=mine).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        dist.all_reduce(loss := loss.detach().float())
        if rank == 0 and (step % 10 == 0 or step == options.steps - 1):
            print(f"step {step:3}  loss {loss.item() / ranks:.4f}")
    dist.barrier()  # nobody leaves while another still speaks to it
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
