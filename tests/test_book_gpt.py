"""The book's own GPT and LoRA classes: trained a few steps with theirs and with ours, the losses are the same."""

from __future__ import annotations

import pytest
import torch
from llms_from_scratch import appendix_e
from llms_from_scratch.ch04 import GPTModel
from torch import nn

from lora_kernels import LinearWithLoRA, freeze_base, replace_linear_with_lora

CONFIG = {
    "vocab_size": 101,
    "context_length": 24,
    "emb_dim": 48,
    "n_heads": 4,
    "n_layers": 2,
    "drop_rate": 0.0,
    "qkv_bias": False,
}
STEPS = 6


def train(replace, trainable_base, rank):
    """The losses of a few steps of the book's classifier on made-up tokens."""
    torch.manual_seed(123)
    model = GPTModel(CONFIG)
    model.out_head = nn.Linear(CONFIG["emb_dim"], 2)
    if not trainable_base:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
    replace(model, rank=rank, alpha=rank)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.1
    )
    tokens, labels = torch.randint(101, (16, 24)), torch.randint(2, (16,))
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(tokens)[:, -1, :], labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model


@pytest.mark.parametrize("trainable_base", [False, True], ids=["frozen base", "trained base"])
@pytest.mark.parametrize("rank", [4, 16])
def test_losses_are_the_books(trainable_base, rank):
    theirs, their_model = train(appendix_e.replace_linear_with_lora, trainable_base, rank)
    ours, our_model = train(replace_linear_with_lora, trainable_base, rank)
    assert ours == pytest.approx(theirs, abs=1e-5)
    assert ours[-1] < ours[0] - 0.01
    assert list(our_model.state_dict()) == list(their_model.state_dict())
    for key, value in their_model.state_dict().items():
        torch.testing.assert_close(our_model.state_dict()[key], value, atol=2e-4, rtol=1e-3)


def test_a_rank_above_every_width():
    """The book's own test model has layers of 12 and 2 outputs at rank 16."""
    losses = []
    for replace in (appendix_e.replace_linear_with_lora, replace_linear_with_lora):
        torch.manual_seed(1)
        model = GPTModel({**CONFIG, "emb_dim": 12, "n_heads": 2, "n_layers": 1})
        model.out_head = nn.Linear(12, 2)
        replace(model, rank=16, alpha=16)
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
        tokens, labels = torch.randint(101, (5, 24)), torch.randint(2, (5,))
        losses.append([])
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(tokens)[:, -1, :], labels)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_the_books_checkpoint_loads():
    _, theirs = train(appendix_e.replace_linear_with_lora, False, 4)
    model = GPTModel(CONFIG)
    model.out_head = nn.Linear(CONFIG["emb_dim"], 2)
    names = replace_linear_with_lora(model, rank=4, alpha=4)
    model.load_state_dict(theirs.state_dict(), strict=True)
    freeze_base(model)
    assert len(names) == 2 * 6 + 1 and isinstance(model.trf_blocks[0].att.W_query, LinearWithLoRA)
    tokens = torch.randint(101, (3, 10))
    torch.testing.assert_close(model.eval()(tokens), theirs.eval()(tokens), atol=1e-5, rtol=1e-4)
