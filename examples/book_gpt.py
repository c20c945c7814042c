"""The GPT of "Build a Large Language Model (From Scratch)" with LoRA on every linear layer, learning to write a verse.

    python examples/book_gpt.py --steps 60

It needs the package llms-from-scratch. Bytes serve as tokens, so nothing is downloaded.
"""

import argparse

import torch
from llms_from_scratch.ch04 import GPTModel, generate_text_simple
from torch import nn

from lora_kernels import freeze_base, lora_parameters, replace_linear_with_lora

VERSE = (
    "Tiger Tiger, burning bright,\nIn the forests of the night;\n"
    "What immortal hand or eye,\nCould frame thy fearful symmetry?\n"
)
CONFIG = {
    "vocab_size": 256,
    "context_length": 64,
    "emb_dim": 96,
    "n_heads": 4,
    "n_layers": 2,
    "drop_rate": 0.0,
    "qkv_bias": False,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"--steps must be positive, got {options.steps}")

    torch.manual_seed(123)
    model = GPTModel(CONFIG)
    # In the book: from llms_from_scratch.appendix_e import replace_linear_with_lora
    replaced = replace_linear_with_lora(model, rank=16, alpha=16)
    freeze_base(model)
    trained = sum(p.numel() for p in lora_parameters(model))
    print(f"{len(replaced)} layers with LoRA, {trained:,} trainable parameters")

    text = torch.tensor(list(VERSE.encode()))
    window = CONFIG["context_length"]
    starts = torch.arange(len(text) - window)
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=5e-3)
    for step in range(options.steps):
        chosen = starts[torch.randint(len(starts), (8,))]
        batch = torch.stack([text[i : i + window + 1] for i in chosen])
        logits = model(batch[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0 or step == options.steps - 1:
            print(f"step {step:3}  loss {loss.item():.4f}")

    model.eval()
    written = generate_text_simple(model, text[None, :12], max_new_tokens=40, context_size=window)
    print(bytes(written[0].tolist()).decode(errors="replace"))


if __name__ == "__main__":
    main()
