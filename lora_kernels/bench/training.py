"""The training suite: steps of a transformer block and of a real encoder, every linear layer with LoRA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_kernels import demo, modules, reference
from lora_kernels.bench import contenders, results
from lora_kernels.bench.clock import Call, clock_for, interleaved
from lora_kernels.bench.contenders import Layer
from lora_kernels.bench.linear import Effort, first_line
from lora_kernels.bench.results import Row

NAMES = ("frozen", "reference", "compiled", "addmm", "peft", "ours")
RANK, ALPHA = 8, 2.0
WIDTH, HEADS, LENGTH, BATCH = 768, 12, 128, 4
MAX_LOSS_GAP = 1e-3


class Block(nn.Module):
    """One pre-norm transformer block: causal attention and a GELU MLP, [batch, length, width] -> the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        split = (
            self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        )
        q, k, v = split.unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Wrapped(nn.Module):
    """A linear layer computed by a contender, on rows."""

    def __init__(self, linear: nn.Linear, contender: str) -> None:
        super().__init__()
        initial = reference.LoRALayer(linear.in_features, linear.out_features, RANK, ALPHA)
        A, B = (nn.Parameter(t.detach().to(linear.weight)) for t in (initial.A, initial.B))
        self.out_features = linear.out_features
        layer = Layer(linear.weight, linear.bias, A, B, ALPHA)
        built = contenders.build(contender, layer)
        self.function = built.function
        self.trained = nn.ParameterList(built.trained)

    def forward(self, x: Tensor) -> Tensor:
        y = self.function(x.reshape(-1, x.shape[-1]))
        return y.view(*x.shape[:-1], self.out_features)


def replace_all(model: nn.Module, contender: str) -> None:
    """Compute every nn.Linear below `model` by a contender, from the same initial adapters for all."""
    if contender == "frozen":
        return
    if contender == "ours":
        modules.replace_linear_with_lora(model, RANK, ALPHA)
    elif contender in ("reference", "compiled"):
        reference.replace_linear_with_lora(model, RANK, ALPHA)
    else:
        _wrap(model, contender)


def block_step(contender: str, device: str, dtype: torch.dtype) -> Callable[[], Tensor]:
    """A step of the block: forward, backward down to its input, AdamW; returns the loss."""
    torch.manual_seed(0)
    block = Block(WIDTH, HEADS).requires_grad_(False)
    x = torch.randn(BATCH, LENGTH, WIDTH).to(device, dtype).requires_grad_()
    torch.manual_seed(1)
    replace_all(block, contender)
    block.to(device, dtype)
    trained = [p for p in block.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None
    run: Any = torch.compile(block, dynamic=False) if contender == "compiled" else block

    def step() -> Tensor:
        x.grad = None
        loss = run(x).float().square().mean()
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def minilm_step(contender: str, device: str, dtype: torch.dtype) -> Callable[[], Tensor]:
    """A training step of the demo's encoder and task, head included.

    "frozen" has no adapters, and its gradients go down to the embeddings as they go to the first adapter.
    """
    missing = demo.missing_packages()
    if missing:
        raise ModuleNotFoundError(f"needs {', '.join(missing)}")
    if contender == "compiled":
        raise ValueError("the encoder is not compiled as a whole")
    words, _ = demo.load_words()
    model = demo.load_model(lambda encoder, rank, alpha: replace_all(encoder, contender))
    torch.manual_seed(2)  # the head was made after a contender's own random draws
    model.head.reset_parameters()
    model.to(device, dtype)
    if contender == "frozen":
        embeddings = model.encoder.get_submodule("embeddings")
        embeddings.register_forward_hook(lambda *call: call[-1].requires_grad_())
    batch = words[: demo.BATCH]
    batch = demo.Words(batch.ids.to(device), batch.mask.to(device), batch.labels.to(device))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    return lambda: torch.tensor(demo.train_step(model, optimizer, batch))


MODELS = {"block": block_step, "minilm": minilm_step}


def measure(
    which: str,
    device: str,
    effort: Effort,
    left_out: dict[str, str],
    names: tuple[str, ...] = NAMES,
    dtype: str = "float32",
) -> list[Row]:
    """A row for each contender; before timing, its first losses must be those of the reference."""
    calls: dict[str, Call] = {}
    expected: list[float] = []
    for name in dict.fromkeys(("reference", "frozen", *names)):
        try:
            step = MODELS[which](name, device, getattr(torch, dtype))
            losses = [step().item() for _ in range(3)]
        except (ImportError, ValueError, RuntimeError, TypeError) as error:
            if name == "ours" and not isinstance(error, ImportError):
                raise
            left_out[f"{which}: {name}"] = first_line(error)
            continue
        if name == "reference":
            expected = losses
        elif name != "frozen" and expected:
            wrong = _disagreement(losses, expected, dtype)
            if wrong is not None and name == "ours":
                raise RuntimeError(f"{which}: {name}: {wrong}")
            if wrong is not None:
                left_out[f"{which}: {name}"] = wrong
                continue
        calls[name] = step
    if "reference" not in calls:
        return []
    taken = interleaved(calls, clock_for(device), seconds=effort.seconds, rounds=effort.rounds)
    return [results.row("training", f"{which} {dtype}", "step", name, taken) for name in taken]


def _disagreement(losses: list[float], expected: list[float], dtype: str) -> str | None:
    """What is wrong with a contender's losses, or None."""
    allowed = MAX_LOSS_GAP if dtype == "float32" else 20 * MAX_LOSS_GAP
    gap = max(abs(a - b) / max(abs(b), 1e-6) for a, b in zip(losses, expected, strict=True))
    if gap <= allowed:
        return None
    return f"losses differ from the reference's by {gap:.1e}, over {allowed}"


def _wrap(module: nn.Module, contender: str) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, Wrapped(child, contender))
        else:
            _wrap(child, contender)
