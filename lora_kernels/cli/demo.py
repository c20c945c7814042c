"""`python -m lora_kernels demo`: fine-tune a real encoder with the reference layer and with ours, and compare."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lora_kernels import Problem, adapters, demo, modules, plan, reference
from lora_kernels.adapter_file import WEIGHTS_FILE
from lora_kernels.bench.memory import peak_bytes
from lora_kernels.cli import check_output, say

MAX_LOSS_GAP = 1e-3  # float32 rounding, amplified over 60 steps, stayed below 1e-5 (x86, eager and C++ backends)
MIN_GAIN = 10.0  # points of accuracy
LEARNING_RATE = 1e-3
HEAD_FILE = "head.safetensors"


@dataclass
class Run:
    """One of the two trainings and what was measured of it."""

    model: demo.SentimentModel
    optimizer: torch.optim.Optimizer
    before: float  # held-out accuracy
    losses: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)

    def step(self, batch: demo.Words) -> None:
        begin = time.perf_counter()
        self.losses.append(demo.train_step(self.model, self.optimizer, batch))
        self.step_ms.append(1e3 * (time.perf_counter() - begin))

    def measured(self, held_out: demo.Words, batch: demo.Words) -> dict[str, float]:
        """What the table shows; the memory is that of one more step."""
        after = demo.accuracy(self.model, held_out)
        peak = peak_bytes(lambda: demo.train_step(self.model, self.optimizer, batch), "cpu")
        return {
            "accuracy_before": self.before,
            "accuracy_after": after,
            "first_loss": self.losses[0],
            "last_loss": self.losses[-1],
            "step_ms": median(self.step_ms[3:] or self.step_ms),  # the first steps fill caches
            "peak_step_mib": peak / 2**20,
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--steps", type=int, default=60, help="training steps (default: 60)")
    add("--output", type=Path, default=Path("demo"), help="folder for plot and adapter")
    add("--json", action="store_true", help="print the results as JSON")


def run(args: argparse.Namespace) -> int:
    """0 when the two runs agree, accuracy rose, the base is untouched and the saved adapter gives the same answers."""
    if args.steps < 1:
        raise ValueError(f"--steps must be at least 1, got {args.steps}")
    missing = demo.missing_packages()
    if missing:
        raise ModuleNotFoundError(f"the demo needs {', '.join(missing)}: run `make demo`")
    folder, plot = args.output / "adapter", args.output / "loss.png"
    check_output(folder, is_file=False)
    check_output(plot, is_file=True)

    say("loading the encoder twice and the words")
    words, held_out = demo.load_words()
    theirs, ours = runs = [_start(which, held_out) for which in (reference, modules)]
    base = {name: t.clone() for name, t in demo.base_weights(ours.model).items()}
    generator = torch.Generator().manual_seed(demo.SEED)
    for step in range(args.steps):
        batch = words[torch.randint(len(words), (demo.BATCH,), generator=generator)]
        for each in runs[:: 1 if step % 2 == 0 else -1]:  # in turns: other work slows both alike
            each.step(batch)
        if step % 10 == 0 or step == args.steps - 1:
            say(f"step {step:3}: loss {theirs.losses[-1]:.4f} (reference), {ours.losses[-1]:.4f}")
    # Before another step is taken for its memory.
    answers = demo.logits(ours.model, held_out)
    adapters.save_adapter(ours.model, folder)
    save_file(ours.model.head.state_dict(), folder / HEAD_FILE)
    reloaded = demo.load_model(lambda encoder, rank, alpha: None)
    adapters.load_adapter(reloaded, folder)
    reloaded.head.load_state_dict(load_file(folder / HEAD_FILE))
    parameters = list(ours.model.parameters())
    results = {
        "words": {"train": len(words), "held_out": len(held_out)},
        "steps": args.steps,
        "loss_gap": max(abs(a - b) for a, b in zip(theirs.losses, ours.losses, strict=True)),
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "all_parameters": sum(p.numel() for p in parameters),
        "adapter_bytes": (folder / WEIGHTS_FILE).stat().st_size,
        "base_weights_identical": all(
            torch.equal(base[name], t) for name, t in demo.base_weights(ours.model).items()
        ),
        "reloaded_predictions_identical": torch.equal(demo.logits(reloaded, held_out), answers),
        "backend": _backend(ours.model, words),
        "runs": {
            name: each.measured(held_out, words[: demo.BATCH])
            for name, each in (("reference", theirs), ("ours", ours))
        },
    }
    _plot({"reference": theirs.losses, "ours": ours.losses}, plot)
    failures = _failures(results)
    if args.json:
        print(json.dumps({**results, "failures": failures}, indent=2))
    else:
        print(_table(results, args.output))
    for failure in failures:
        say(f"FAILED: {failure}")
    return 1 if failures else 0


def _start(layers: Any, held_out: demo.Words) -> Run:
    """A model with the LoRA layers of a module, ready to train: head and adapters only."""
    model = demo.load_model(layers.replace_linear_with_lora)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE)
    return Run(model, optimizer, demo.accuracy(model, held_out))


def _failures(results: dict[str, Any]) -> list[str]:
    found = []
    if not results["loss_gap"] <= MAX_LOSS_GAP:
        found.append(f"the two runs' losses differ by {results['loss_gap']:.2e} > {MAX_LOSS_GAP}")
    for name, each in results["runs"].items():
        gain = each["accuracy_after"] - each["accuracy_before"]
        if gain < MIN_GAIN:
            found.append(f"{name}: accuracy rose by {gain:.1f} points, not by {MIN_GAIN:.0f}")
    if not results["base_weights_identical"]:
        found.append("training changed base weights")
    if not results["reloaded_predictions_identical"]:
        found.append("the reloaded adapter gives other predictions")
    return found


def _table(results: dict[str, Any], output: Path) -> str:
    theirs, ours = results["runs"]["reference"], results["runs"]["ours"]
    share = 100 * results["trainable_parameters"] / results["all_parameters"]
    same = {True: "bit-identical", False: "DIFFERENT"}
    rows = [
        ("held-out accuracy before", "{accuracy_before:.1f} %"),
        ("held-out accuracy after", "{accuracy_after:.1f} %"),
        ("last training loss", "{last_loss:.4f}"),
        ("ms a step (median)", "{step_ms:.1f}"),
        ("peak memory of a step", "{peak_step_mib:.0f} MiB"),
    ]
    return "\n".join(
        [
            f"\n{'':28}{'reference':>14}{'ours':>14}",
            *(f"{title:28}{f.format(**theirs):>14}{f.format(**ours):>14}" for title, f in rows),
            "",
            f"speed-up of a step          {theirs['step_ms'] / ours['step_ms']:.2f}x ({results['backend']} backend)",
            f"largest loss gap            {results['loss_gap']:.1e} over {results['steps']} steps",
            f"trainable parameters        {results['trainable_parameters']:,} ({share:.1f} %)",
            f"adapter file                {results['adapter_bytes'] / 1024:.0f} KiB in {output / 'adapter'}",
            f"reloaded predictions        {same[results['reloaded_predictions_identical']]}",
            f"base weights                {same[results['base_weights_identical']]}",
            f"loss curves                 {output / 'loss.png'}",
        ]
    )


def _backend(model: torch.nn.Module, words: demo.Words) -> str:
    """The backend that a training batch's largest layer takes."""
    layer = max((layer for _, layer in modules.lora_layers(model)), key=lambda m: m.weight.numel())
    sizes = demo.BATCH * words.ids.shape[1], layer.out_features, layer.in_features, layer.lora.rank
    problem = Problem(*sizes, "float32", "float32", bias=layer.bias is not None)
    return plan.explain(problem).backend


def _plot(losses: dict[str, list[float]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for (name, values), width, opacity in zip(losses.items(), (5.0, 1.5), (0.35, 1.0), strict=True):
        axes.plot(values, label=name, linewidth=width, alpha=opacity)  # one upon the other
    title = "MiniLM, rank-8 LoRA: positive or negative word?"
    axes.set(xlabel="step", ylabel="training loss", title=title)
    axes.legend()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
