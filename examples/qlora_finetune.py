"""QLoRA: fine-tune an encoder whose layers are quantised to 4 bits, by PEFT on bitsandbytes and by this package.

    python examples/qlora_finetune.py --steps 60

The task is the demo's: is an English word positive or negative? The encoder is the pretrained MiniLM with its linear layers
in NF4, doubly quantised. Both models start from the same adapters, which PEFT made, and see the same words.
"""

import argparse
import time
from statistics import median

import bitsandbytes as bnb
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from lora_kernels import demo, replace_linear_with_lora
from lora_kernels.bench.memory import peak_bytes
from lora_kernels.modules import lora_layers

LEARNING_RATE = 1e-3


def quantise(encoder):
    """Put an NF4 layer in the place of every nn.Linear, and keep bias and dtype."""
    for module in list(encoder.modules()):
        for name, linear in module.named_children():
            if type(linear) is nn.Linear:
                packed = bnb.nn.Linear4bit(
                    linear.in_features, linear.out_features, quant_type="nf4", device="meta"
                )
                packed.bias = linear.bias
                packed.weight = bnb.nn.Params4bit(
                    linear.weight.data, quant_type="nf4", module=packed
                ).to(linear.weight.device)
                setattr(module, name, packed)
    encoder.is_loaded_in_4bit = True  # so that PEFT takes its layers of bitsandbytes


def with_peft(encoder, rank, alpha):
    """QLoRA as PEFT does it."""
    quantise(encoder)
    config = LoraConfig(r=rank, lora_alpha=alpha * rank, target_modules="all-linear")
    inject_adapter_in_model(config, encoder)


def with_ours(theirs):
    """QLoRA by this package, from the adapters that PEFT made in the encoder `theirs`."""

    @torch.no_grad()
    def replace(encoder, rank, alpha):
        quantise(encoder)
        replace_linear_with_lora(encoder, rank, alpha)
        made = dict(theirs.named_modules())
        for name, layer in lora_layers(encoder):
            layer.lora.A.copy_(made[name].lora_A["default"].weight.t())
            layer.lora.B.copy_(made[name].lora_B["default"].weight.t())

    return replace


class Run:
    """One of the two trainings, and what was measured of it."""

    def __init__(self, model):
        self.model, self.losses, self.times = model, [], []
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE)

    def step(self, batch):
        begin = time.perf_counter()
        self.losses.append(demo.train_step(self.model, self.optimizer, batch))
        self.times.append(1e3 * (time.perf_counter() - begin))

    def report(self, held_out, batch):
        step = lambda: demo.train_step(self.model, self.optimizer, batch)  # noqa: E731
        memory = peak_bytes(step, "cpu") / 2**20
        # Last: where a CPU has bfloat16 instructions bitsandbytes packs a weight anew in eval mode, and trains no more.
        accuracy = demo.accuracy(self.model, held_out)
        time_ms = median(self.times[3:] or self.times)  # the first steps fill caches
        return f"{accuracy:10.1f} %{time_ms:9.0f} ms{memory:10.0f} MiB"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"--steps must be positive, got {options.steps}")

    words, held_out = demo.load_words()
    peft = Run(demo.load_model(with_peft))
    ours = Run(demo.load_model(with_ours(peft.model.encoder)))
    ours.model.head.load_state_dict(peft.model.head.state_dict())
    print(f"{sum(1 for _ in lora_layers(ours.model))} NF4 layers with LoRA")

    generator = torch.Generator().manual_seed(demo.SEED)
    for step in range(options.steps):
        batch = words[torch.randint(len(words), (demo.BATCH,), generator=generator)]
        for run in (peft, ours)[:: 1 if step % 2 == 0 else -1]:  # in turns: other work slows both
            run.step(batch)
        if step % 20 == 0 or step == options.steps - 1:
            print(f"step {step:3}  loss {ours.losses[-1]:.4f}  (PEFT {peft.losses[-1]:.4f})")

    print(f"{'':24}{'accuracy':>12}{'a step':>12}{'its memory':>14}")
    print(f"{'PEFT on bitsandbytes':24}{peft.report(held_out, words[: demo.BATCH])}")
    print(f"{'lora_kernels':24}{ours.report(held_out, words[: demo.BATCH])}")


if __name__ == "__main__":
    main()
