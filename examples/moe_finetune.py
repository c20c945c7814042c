"""Fine-tune a small mixture of experts with PEFT's `target_parameters`, twice from one seed: as it is, and accelerated.

    python examples/moe_finetune.py --steps 20

The model is a Qwen3-MoE made from a configuration, with random weights, so nothing is downloaded. The adapters are on the
experts' two stacks of weights and on the attention; `accelerate` is the one line more.
"""

import argparse
import time
from statistics import median

import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from lora_kernels.integrations.peft import accelerate

TEXT = "A token goes to a few experts, and each expert has a low-rank adapter of its own. " * 4


def make_model():
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=128,
        hidden_size=128,
        moe_intermediate_size=96,
        num_experts=16,
        num_experts_per_tok=4,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        decoder_sparse_step=1,
    )
    adapters = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=["q_proj", "v_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    return get_peft_model(Qwen3MoeForCausalLM(config), adapters)


class Run:
    """A model in training: its losses and the seconds of its steps."""

    def __init__(self, model):
        self.model, self.losses, self.times = model, [], []
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-2)

    def step(self, tokens):
        start = time.perf_counter()
        loss = self.model(input_ids=tokens, labels=tokens).loss
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())
        self.times.append(time.perf_counter() - start)

    def milliseconds(self):
        return 1e3 * median(self.times)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"--steps must be positive, got {options.steps}")
    tokens = torch.tensor(list(TEXT.encode())).view(4, -1)

    plain, ours = Run(make_model()), Run(make_model())
    model = ours.model
    print(accelerate(model))
    for step in range(options.steps):
        plain.step(tokens)
        ours.step(tokens)
        if step in (0, options.steps - 1):
            print(f"step {step:3}  loss {ours.losses[step]:.4f}")
    gap = max(abs(a - b) for a, b in zip(ours.losses, plain.losses, strict=True))
    print(
        f"losses differ from PEFT's by {gap:.1e}; a step takes {ours.milliseconds():.0f} ms, "
        f"PEFT's {plain.milliseconds():.0f}"
    )

    model.eval()
    prompt = tokens[:1, :12]
    written = model.generate(input_ids=prompt, max_new_tokens=24, do_sample=False, pad_token_id=0)
    print(f"generated: {bytes(written[0].tolist())!r}")


if __name__ == "__main__":
    main()
