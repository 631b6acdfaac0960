"""A small `xlora-jax train`, called in this process."""

from __future__ import annotations

import json

from typer.testing import CliRunner

from xlora_jax.cli.main import app

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
