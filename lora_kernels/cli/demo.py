"""`python -m lora_kernels demo`: fine-tune a real encoder with the reference layer and with ours, and compare."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

MAX_LOSS_GAP = 1e-3  # float32 rounding, amplified over 60 steps, stayed below 1e-5 (x86, eager and C++ backends)
MIN_GAIN = 10.0  # points of accuracy


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=60, help="training steps (default: 60)")
    parser.add_argument(
        "--output", type=Path, default=Path("demo"), help="folder for plot and adapter"
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON")


def run(args: argparse.Namespace) -> int:
    """0 when the two runs agree, accuracy rose, the base is untouched and the saved adapter gives the same answers."""
    from lora_kernels import demo

    if args.steps < 1:
        raise ValueError(f"--steps must be at least 1, got {args.steps}")
    missing = demo.missing_packages()
    if missing:
        raise ModuleNotFoundError(f"the demo needs {', '.join(missing)}: run `make demo`")
    from tqdm import tqdm

    _say("loading the encoder twice and the words")
    words, held_out = demo.load_words()
    runs = [demo.start(which, demo.replacement(which), held_out) for which in ("reference", "ours")]
    base = {name: t.clone() for name, t in demo.base_weights(runs[1].model).items()}
    progress = tqdm(
        demo.train(runs, words, args.steps), total=args.steps, desc="training", unit="step"
    )
    for _ in progress:
        progress.set_postfix({run.name: f"{run.losses[-1]:.3f}" for run in runs})
    for each in runs:
        each.after = demo.accuracy(each.model, held_out)
    _say("measuring memory, each layer in a process of its own")
    memory = {each.name: demo.peak_memory_mib(each.name) for each in runs}

    theirs, ours = runs
    adapter_bytes = demo.save(ours.model, args.output / "adapter")
    same = torch.equal(
        demo.logits(demo.reload(args.output / "adapter"), held_out),
        demo.logits(ours.model, held_out),
    )
    untouched = all(torch.equal(base[n], t) for n, t in demo.base_weights(ours.model).items())
    _plot(runs, args.output / "loss.png")
    results = {
        "words": {"train": len(words), "held_out": len(held_out)},
        "steps": args.steps,
        "loss_gap": max(abs(a - b) for a, b in zip(theirs.losses, ours.losses, strict=True)),
        "trainable_parameters": sum(p.numel() for p in ours.model.parameters() if p.requires_grad),
        "all_parameters": sum(p.numel() for p in ours.model.parameters()),
        "adapter_bytes": adapter_bytes,
        "base_weights_identical": untouched,
        "reloaded_predictions_identical": same,
        "backend": _backend(ours.model, words),
        "runs": {
            each.name: {
                "accuracy_before": each.before,
                "accuracy_after": each.after,
                "first_loss": each.losses[0],
                "last_loss": each.losses[-1],
                "step_ms": each.median_ms,
                "peak_step_mib": memory[each.name],
            }
            for each in runs
        },
    }
    failures = _failures(results)
    if args.json:
        print(json.dumps({**results, "failures": failures}, indent=2))
    else:
        print(_table(results, args.output))
    for failure in failures:
        _say(f"FAILED: {failure}")
    return 1 if failures else 0


def _failures(results: dict[str, Any]) -> list[str]:
    found = []
    if results["loss_gap"] > MAX_LOSS_GAP:
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
    rows = [
        ("held-out accuracy before", "{accuracy_before:.1f} %"),
        ("held-out accuracy after", "{accuracy_after:.1f} %"),
        ("last training loss", "{last_loss:.4f}"),
        ("ms a step (median)", "{step_ms:.1f}"),
    ]
    if ours["peak_step_mib"] is not None:
        rows.append(("peak memory of a step", "{peak_step_mib:.0f} MiB"))
    lines = [f"\n{'':28}{'reference':>14}{'ours':>14}"]
    lines += [
        f"{title:28}{form.format(**theirs):>14}{form.format(**ours):>14}" for title, form in rows
    ]
    share = 100 * results["trainable_parameters"] / results["all_parameters"]
    lines += [
        "",
        f"speed-up of a step          {theirs['step_ms'] / ours['step_ms']:.2f}x ({results['backend']} backend)",
        f"largest loss gap            {results['loss_gap']:.1e} over {results['steps']} steps",
        f"trainable parameters        {results['trainable_parameters']:,} ({share:.1f} %)",
        f"adapter file                {results['adapter_bytes'] / 1024:.0f} KiB in {output / 'adapter'}",
        f"reloaded predictions        {_same(results['reloaded_predictions_identical'])}",
        f"base weights                {_same(results['base_weights_identical'])}",
        f"loss curves                 {output / 'loss.png'}",
    ]
    return "\n".join(lines)


def _same(yes: bool) -> str:
    return "bit-identical" if yes else "DIFFERENT"


def _backend(model: torch.nn.Module, words: Any) -> str:
    """The backend that a training batch's largest layer takes."""
    from lora_kernels import Problem, demo, modules, plan

    layer = max((layer for _, layer in modules.lora_layers(model)), key=lambda m: m.weight.numel())
    problem = Problem(
        M=demo.BATCH * words.ids.shape[1],
        N=layer.out_features,
        K=layer.in_features,
        R=layer.lora.rank,
        dtype="float32",
        adapter_dtype="float32",
        bias=layer.bias is not None,
    )
    return plan.explain(problem).backend


def _plot(runs: list[Any], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for run, width, opacity in zip(
        runs, (5.0, 1.5), (0.35, 1.0), strict=True
    ):  # one upon the other
        label = f"{run.name} ({run.after:.1f} % right)"
        axes.plot(run.losses, label=label, linewidth=width, alpha=opacity)
    axes.set(
        xlabel="step",
        ylabel="training loss",
        title="MiniLM, rank-8 LoRA: positive or negative word?",
    )
    axes.legend()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
