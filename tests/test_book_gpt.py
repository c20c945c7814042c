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


def train(replace, trainable_base, rank, **sizes):
    """The losses of a few steps of the book's classifier on made-up tokens."""
    torch.manual_seed(123)
    config = {**CONFIG, **sizes}
    model = GPTModel(config)
    model.out_head = nn.Linear(config["emb_dim"], 2)
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


SMALL = {"emb_dim": 12, "n_heads": 2, "n_layers": 1}  # the book's own test model


@pytest.mark.parametrize("trainable_base", [False, True], ids=["frozen base", "trained base"])
@pytest.mark.parametrize("rank, sizes", [(4, {}), (16, SMALL)], ids=["", "rank above widths"])
def test_losses_are_the_books(trainable_base, rank, sizes):
    theirs, their_model = train(appendix_e.replace_linear_with_lora, trainable_base, rank, **sizes)
    ours, our_model = train(replace_linear_with_lora, trainable_base, rank, **sizes)
    assert ours == pytest.approx(theirs, abs=1e-5)
    assert ours[-1] < ours[0] - 0.01
    states = dict(our_model.state_dict()), dict(their_model.state_dict())
    assert list(states[0]) == list(states[1])
    torch.testing.assert_close(*states, atol=2e-4, rtol=1e-3)


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
