"""`xlora-jax train` on real text_files, and the same as a Python call."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from interop import load_xlora
from tests.helpers.cli import SETTINGS, XLORA, arguments, invoke
from tests.helpers.reference import peft_run, prompt, relative_error, reload_in_peft
from xlora_jax.cli.train import _job
from xlora_jax.job import Job, run_training
from xlora_jax.training.config import TrainConfig


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
def test_a_run_on_a_quantized_base_is_resumed_bit_for_bit(text_files, tmp_path):
    def run(*more):
        done = invoke(arguments(text_files, tmp_path / "run", *more))
        assert done.exit_code == 0, done.output
        return (tmp_path / "run" / "model" / "adapter_model.safetensors").read_bytes()

    undisturbed = run("--quantize", "nf4")
    assert json.loads((tmp_path / "run" / "job.json").read_text())["quantize"] == "nf4"
    assert 'quantize="nf4"' in (tmp_path / "run" / "model" / "README.md").read_text()
    shutil.rmtree(tmp_path / "run" / "model")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    assert run("--quantize", "nf4") == undisturbed
    base = ["--base", text_files[1], "--checkpoint", tmp_path / "run" / "model", "--quantize", "nf4"]
    for command in (
        ["generate", *base, "--prompt", "abc", "--max-new-tokens", 2],
        ["report", *base, "--data", f"held={text_files[0] / 'held.jsonl'}", "--length", 32],
    ):
        done = invoke(command)
        assert done.exit_code == 0, done.output
    # The same run on another base is another run.
    done = invoke(arguments(text_files, tmp_path / "run"))
    assert done.exit_code != 0
    assert "kernel" in done.output


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
        # With a rate of zero nothing is learned: the evaluation is that of the start.
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

    assert "expected NAME=PATH" in refused("--adapter", "directory")
    assert "given twice" in refused("--adapter", "one=x")
    assert "steps: expected at least 1, got 0" in refused("--steps", 0)
    assert "expected a JSON object" in refused("--xlora", "{depth}")
    assert "unknown settings of a run: 'stepps'" in refused("--set", '{"stepps": 1}')
    assert "nothing of this name" in refused(replace=("--data", tmp_path / "none.jsonl"))
    assert not (tmp_path / "run").exists()


def test_a_settings_file_gives_any_field_and_options_win(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "base: a\nadapters: {one: b}\ndata: d\noutput: o\nlength: 77\nxlora: {xlora_depth: 3}\n"
        "train: {steps: 5, b2: 0.9, max_grad_norm: null}\n"
    )
    job = _job({"base": "c", "length": None}, {"steps": 9, "seed": None}, path)
    assert (job.base, job.adapters, job.length, job.xlora) == ("c", {"one": "b"}, 77, {"xlora_depth": 3})
    assert job.train == TrainConfig(steps=9, b2=0.9, max_grad_norm=None, checkpoint_every=100)
    # What a run writes down is such a file.
    (tmp_path / "job.json").write_text(json.dumps(dataclasses.asdict(job)))
    assert _job({}, {}, tmp_path / "job.json") == job
    for text, words in (
        ("stepps: 1", "unknown fields 'stepps'; expected adapters, base"),
        ("train: {stepps: 1}", "unknown settings of a run: 'stepps'"),
        ("[1, 2]", "expected a mapping of names"),
        ("a: [", "expected YAML or JSON"),
        ("base: a\nadapters: {one: b}\ndata: d", "--output is missing; give it, or output: in the file"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            _job({}, {}, path)


def test_help_is_enough_to_begin():
    text = invoke(["train", "--help"]).output
    for word in ("--base", "--adapter", "--data", "--output", "--checkpoint-every", "prompt", "completion", "messages"):
        assert word in text
