"""`xlora-jax report` and `generate --show-routing` on real files."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from interop import load_xlora, save_xlora
from xlora_jax import XLoraConfig
from xlora_jax.cli.main import app

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


def invoke(arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def trained(text_files, tmp_path_factory):
    """A base, and a checkpoint in the directory of a run."""
    folder, base_dir, adapters = text_files
    run = tmp_path_factory.mktemp("run")
    settings = XLoraConfig(
        hidden_size=json.loads((base_dir / "config.json").read_text())["hidden_size"],
        adapters={'"><img src=x>': str(adapters[0]), "two": str(adapters[1])},
        layerwise_scalings=True,
    )
    model = load_xlora(base_dir, config=settings)
    save_xlora(model, run / "model")
    entries = [{"step": step, "kind": "train", "loss": 1 / step} for step in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return folder, base_dir, run / "model", model


def test_report(trained, tmp_path):
    folder, base_dir, checkpoint, model = trained
    given = ("report", "--base", base_dir, "--checkpoint", checkpoint, "--length", 32, "--batch-size", 3)
    texts = ("--data", f"train={folder / 'train.jsonl'}", "--data", f"held={folder / 'held.jsonl'}")
    more = ("--effects", "--prompt", "abc def", "--max-new-tokens", 3, "--output", tmp_path / "report")
    done = invoke([*given, *texts, *more])
    assert done.exit_code == 0, done.output
    assert str(tmp_path / "report" / "report.html") in "".join(done.output.split())
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["experts"] == ['"><img src=x>', "two"]
    assert report["layers"] == list(model.layer_names)
    assert [entry["loss"] for entry in report["training"]] == [1, 0.5, 1 / 3]
    held = report["texts"]["held"]
    assert np.allclose(np.sum(held["mean_gates"], axis=-1), 1, rtol=1e-5)
    assert len(held["effects"]["without"]) == 2
    page = (tmp_path / "report" / "report.html").read_text()
    assert "<img" not in page
    assert str(folder) not in page
    sample = report["samples"][0]
    assert "".join(sample["tokens"]).replace(" ", "").startswith("abcdef")  # this tokenizer decodes with spaces
    assert sample["parts"] == [{"start": 0, "kind": "prompt"}, {"start": 7, "kind": "generated"}]
    assert {part["kind"] for part in report["samples"][1]["parts"]} == {"prompt", "answer"}
    # The table has the means over the layers.
    for name, entry in report["texts"].items():
        (line,) = (line for line in done.output.splitlines() if line.startswith(f"│ {name}"))
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        assert cells[1] == f"{entry['tokens']:,}"
        assert cells[2:4] == [f"{entry['base_loss']:.3f}", f"{entry['loss']:.3f}"]
        assert cells[4:6] == [f"{gate:.2f}" for gate in np.mean(entry["mean_gates"], axis=0)]


def test_labels_split_a_file(trained, tmp_path):
    folder, base_dir, checkpoint, _ = trained
    lines = [{"text": "abcabc", "domain": "low"}, {"text": "xyzxyz", "domain": 7}, {"text": "cab", "domain": "low"}]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = ("report", "--base", base_dir, "--checkpoint", checkpoint, "--length", 16, "--data", f"all={data}")
    done = invoke([*given, "--label", "domain"])
    assert done.exit_code == 0, done.output
    counts = {
        line.split("│")[1].strip(): line.split("│")[2].strip() for line in done.output.splitlines() if "│" in line
    }
    assert counts == {"low": "9", "7": "6"}  # each text ends with a token that is predicted too
    refused = invoke([*given, "--label", "topic"])
    assert refused.exit_code == 1
    assert "data.jsonl, line 1: topic: expected text or a whole number" in " ".join(refused.output.split())
    texts = ("--data", f"held={folder / 'held.jsonl'}")
    for wrong, message in (
        (("--data", "held"), "expected NAME=PATH"),
        ((*texts, *texts), "given twice"),
        (("--run", folder), "which has no metrics.jsonl"),
        (("--prompt", "a"), "--prompt needs --output"),
        (("--sample-tokens", "-1"), "--sample-tokens: expected at least 0, got -1"),
    ):
        more = () if wrong[0] == "--prompt" else ("--output", tmp_path / "out")
        refused = invoke([*given, *wrong, *more])
        assert refused.exit_code == 1, wrong
        assert message in " ".join(refused.output.split())


def test_generate_shows_the_routing(trained):
    _, base_dir, checkpoint, model = trained
    given = ("generate", "--base", base_dir, "--prompt", "abc", "--max-new-tokens", 4)
    done = invoke([*given, "--checkpoint", checkpoint, "--show-routing"])
    assert done.exit_code == 0, done.output
    routing = model.routing("abc", max_new_tokens=4)
    legend, shown = done.output.split("\n", 1)
    for name, share in zip(model.expert_names, routing.shares.mean(axis=(0, 1)), strict=True):
        assert f"{name} {share:.0%}" in legend
    assert shown == routing.marked() + "\n"
    assert len(routing.tokens) == 7
    refused = invoke([*given, "--show-routing"])
    assert "--show-routing needs --checkpoint" in " ".join(refused.output.split())
