"""`xlora-jax report` on real files."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from interop import load_xlora, save_xlora
from xlora_jax import XLoraConfig
from xlora_jax.cli.main import app


def invoke(arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_report(text_files, tmp_path):
    folder, base_dir, adapters = text_files
    checkpoint = tmp_path / "xlora"
    settings = XLoraConfig(
        hidden_size=json.loads((base_dir / "config.json").read_text())["hidden_size"],
        adapters={"one": str(adapters[0]), "two": str(adapters[1])},
        layerwise_scalings=True,
    )
    model = load_xlora(base_dir, config=settings)
    save_xlora(model, checkpoint)
    given = ("report", "--base", base_dir, "--checkpoint", checkpoint, "--length", 32, "--batch-size", 3)
    texts = ("--data", f"train={folder / 'train.jsonl'}", "--data", f"held={folder / 'held.jsonl'}")
    done = invoke([*given, *texts, "--output", tmp_path / "report"])
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["experts"] == ["one", "two"]
    assert report["layers"] == list(model.layer_names)
    held = report["texts"]["held"]
    assert np.allclose(np.sum(held["mean_gates"], axis=-1), 1, rtol=1e-5)
    assert (tmp_path / "report" / "report.png").read_bytes()[1:4] == b"PNG"
    assert {entry.name for entry in (tmp_path / "report").iterdir()} == {"report.json", "report.png"}
    # What stands in the table is the mean over the layers.
    for name, entry in report["texts"].items():
        (line,) = (line for line in done.output.splitlines() if line.startswith(f"│ {name}"))
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        assert cells[1] == f"{entry['tokens']:,}"
        assert cells[2:4] == [f"{entry['base_loss']:.3f}", f"{entry['loss']:.3f}"]
        assert cells[4:6] == [f"{gate:.2f}" for gate in np.mean(entry["mean_gates"], axis=0)]
    for wrong, message in (("held", "expected NAME=PATH"), (f"train={folder}", "given twice")):
        refused = invoke([*given, *texts, "--data", wrong])
        assert refused.exit_code == 1
        assert message in " ".join(refused.output.split())
