"""`xlora-jax train` on real text_files, and the same as a Python call."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from typer.testing import CliRunner

from interop import load_xlora
from tests.reference import peft_run, prompt, relative_error, reload_in_peft
from xlora_jax.cli.main import app
from xlora_jax.cli.train import Job, run_training
from xlora_jax.trainer import TrainConfig

SETTINGS = {"steps": 6, "batch_size": 2, "learning_rate": 0.02, "log_every": 2}
XLORA = {"xlora_depth": 2, "xlora_size": 24, "xlora_dropout_p": 0.0}


def arguments(text_files, output, *more):
    folder, base_dir, adapters = text_files
    return [
        "train",
        *("--base", base_dir, "--data", folder / "train.jsonl", "--eval", f"held={folder / 'held.jsonl'}"),
        *("--adapter", f"one={adapters[0]}", "--adapter", f"two={adapters[1]}", "--output", output),
        *("--length", 32, "--xlora", json.dumps(XLORA), "--checkpoint-every", 2),
        *(part for name, value in SETTINGS.items() for part in (f"--{name.replace('_', '-')}", value)),
        *more,
    ]


def invoke(arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_command_and_call_give_the_same_and_peft_loads_it(text_files, tmp_path):
    folder, base_dir, adapters = text_files
    done = invoke(arguments(text_files, tmp_path / "run", "--set", '{"b2": 0.95}'))
    assert done.exit_code == 0, done.output
    assert "held_loss" in done.output
    entries = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [e["step"] for e in entries if e["kind"] == "train"] == [2, 4, 6]
    assert {"loss", "grad_norm", "tokens_per_second", "data_share", "learning_rate"} <= entries[0].keys()
    assert any((tmp_path / "run" / "tensorboard").iterdir())
    assert json.loads((tmp_path / "run" / "train_config.json").read_text())["b2"] == 0.95

    job = Job(
        base=str(base_dir),
        adapters={"one": str(adapters[0]), "two": str(adapters[1])},
        data=[json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()],
        output=str(tmp_path / "call"),
        xlora=XLORA,
        length=32,
        train=TrainConfig(**SETTINGS, b2=0.95),
    )
    result = run_training(job)
    assert result.finished
    command = load_xlora(base_dir, checkpoint=tmp_path / "run" / "model")
    pairs = zip(
        jax.tree.leaves(command.params["classifier"]), jax.tree.leaves(result.model.params["classifier"]), strict=True
    )
    assert all(np.array_equal(a, b) for a, b in pairs)

    inputs = prompt(2, 9)
    logits, _ = peft_run(reload_in_peft(base_dir, tmp_path / "run" / "model"), **inputs)
    assert relative_error(result.model(**inputs).logits, logits) < 1e-5

    again = invoke(arguments(text_files, tmp_path / "run", "--set", '{"b2": 0.95}'))
    assert again.exit_code == 0, again.output
    assert int(result.state.step) == 6


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_dropout_of_the_adapters_acts_in_training_only(text_files, tmp_path):
    folder, base_dir, adapters = text_files

    def first_entries(rate, name):
        directories = []
        for adapter in adapters:
            copy = shutil.copytree(adapter, tmp_path / name / Path(adapter).name)
            config = json.loads((copy / "adapter_config.json").read_text())
            (copy / "adapter_config.json").write_text(json.dumps({**config, "lora_dropout": rate}))
            directories.append(copy)
        # With a rate of zero nothing is learnt: the evaluation is that of the start.
        given = arguments((folder, base_dir, directories), tmp_path / name / "run", "--set", '{"steps": 1}')
        given[given.index("--learning-rate") + 1] = 0.0
        done = invoke(given)
        assert done.exit_code == 0, done.output
        lines = (tmp_path / name / "run" / "metrics.jsonl").read_text().splitlines()
        entries = {entry["kind"]: entry for entry in map(json.loads, lines)}
        return entries["train"]["loss"], entries["eval"]["held_loss"]

    plain, dropped = (first_entries(rate, name) for rate, name in ((0.0, "a"), (0.5, "b")))
    assert abs(dropped[0] / plain[0] - 1) > 1e-4
    assert dropped[1] == plain[1]


def test_mistakes_are_named_before_anything_is_loaded(text_files, tmp_path):
    def refused(*more, replace=None):
        given = [str(a) for a in arguments(text_files, tmp_path / "run", *more)]
        if replace:
            given[given.index(replace[0]) + 1] = str(replace[1])
        done = invoke(given)
        assert done.exit_code != 0
        return " ".join(done.output.split())

    assert "expected NAME=DIRECTORY" in refused("--adapter", "directory")
    assert "given twice" in refused("--adapter", "one=x")
    assert "steps: expected at least 1, got 0" in refused("--steps", 0)
    assert "expected a JSON object" in refused("--xlora", "{depth}")
    assert "unexpected keyword argument 'stepps'" in refused("--set", '{"stepps": 1}')
    assert "nothing of this name" in refused(replace=("--data", tmp_path / "none.jsonl"))
    assert not (tmp_path / "run").exists()


def test_help_is_enough_to_begin():
    text = invoke(["train", "--help"]).output
    for word in ("--base", "--adapter", "--data", "--output", "--checkpoint-every", "prompt", "completion", "messages"):
        assert word in text
