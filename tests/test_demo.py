"""The demo's main job in small: a real encoder on real words, and that its checks can fail."""

from __future__ import annotations

import contextlib
import copy
import io
import json

import pytest
import torch

pytest.importorskip("transformers")

from lora_kernels import demo
from lora_kernels.__main__ import main
from lora_kernels.cli import demo as command

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("demo")]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the command printed, its exit code and its folder, after a few steps; of fewer held-out words."""
    folder = tmp_path_factory.mktemp("demo")
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "HELD_OUT", 200)
        code = main(["demo", "--steps", "12", "--output", str(folder), "--json"])
    return code, json.loads(out.getvalue()), folder


def test_both_runs_learn_the_same(results):
    code, found, _ = results
    assert code == 0 and found["failures"] == []
    assert found["loss_gap"] < 1e-5
    for run in found["runs"].values():
        assert run["accuracy_after"] - run["accuracy_before"] >= command.MIN_GAIN
        assert run["step_ms"] > 0
    theirs, ours = (found["runs"][name]["peak_step_mib"] for name in ("reference", "ours"))
    assert 0 < ours < theirs


def test_what_lora_promises_holds(results):
    _, found, folder = results
    assert found["base_weights_identical"] and found["reloaded_predictions_identical"]
    assert found["trainable_parameters"] < 0.03 * found["all_parameters"]
    file = folder / "adapter" / "adapter_model.safetensors"
    assert file.stat().st_size == found["adapter_bytes"] < 2e6
    assert (folder / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_table_holds_the_numbers(results):
    _, found, folder = results
    text = command._table(found, folder)
    for number in (
        f"{found['runs']['ours']['accuracy_after']:.1f} %",
        f"{found['runs']['reference']['step_ms']:.1f}",
        f"{found['trainable_parameters']:,}",
        f"{found['adapter_bytes'] / 1024:.0f} KiB",
    ):
        assert number in text


@pytest.mark.parametrize(
    "change, failure",
    [
        ({"loss_gap": 2 * command.MAX_LOSS_GAP}, "losses differ"),
        ({"loss_gap": float("nan")}, "losses differ"),
        ({"base_weights_identical": False}, "changed base weights"),
        ({"reloaded_predictions_identical": False}, "other predictions"),
        ({"accuracy_after": 50.0}, "accuracy rose by"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_check_can_fail(results, change, failure):
    found = copy.deepcopy(results[1])
    (found["runs"]["ours"] if "accuracy_after" in change else found).update(change)
    assert any(failure in line for line in command._failures(found))


def test_the_words_are_the_lexicons():
    words, held_out = demo.load_words()
    assert len(held_out) == 1000 and len(words) > 4000
    assert 0.3 < words.labels.double().mean() < 0.7
    seen = {tuple(row.tolist()) for row in words.ids}
    overlap = sum(tuple(row.tolist()) in seen for row in held_out.ids)
    assert overlap < 20  # spellings that the tokenizer does not tell apart


def test_accuracy_is_in_per_cent():
    class Oracle(torch.nn.Module):
        def forward(self, ids, mask):
            return torch.nn.functional.one_hot(ids[:, 0], 2).float()

    labels = torch.tensor([0, 1, 1, 0])
    words = demo.Words(torch.tensor([[0], [1], [0], [0]]), torch.ones(4, 1), labels)
    assert demo.accuracy(Oracle(), words) == 75.0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (
            ["--output", "FOLDER/file"],
            "--output must be a folder that can be written, got FOLDER/file",
        ),
        (["--output", "FOLDER/taken"], "got FOLDER/taken/loss.png: it is a folder"),
    ],
    ids=["steps", "a file", "a folder"],
)
def test_what_cannot_be_done_is_refused_before_anything_is_loaded(
    arguments, says, tmp_path, monkeypatch, capsys
):
    (tmp_path / "file").touch()
    (tmp_path / "taken" / "loss.png").mkdir(parents=True)
    monkeypatch.setattr(demo, "load_words", lambda: pytest.fail("the words were loaded"))
    arguments = [each.replace("FOLDER", str(tmp_path)) for each in arguments]
    assert main(["demo", *arguments]) == 2
    assert says.replace("FOLDER", str(tmp_path)) in capsys.readouterr().err
