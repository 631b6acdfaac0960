"""Every command ends in one line and an exit code, whatever goes wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from xlora_jax.cli.errors import in_one_line
from xlora_jax.cli.main import app

ROOT = Path(__file__).parents[3]


def run_with(error):
    """Exit code and standard error of a command that raises."""
    small = typer.Typer()

    @small.command()
    @in_one_line("try")
    def command(number: int = 1) -> None:
        raise error

    result = CliRunner().invoke(small, [])
    return result.exit_code, result.stderr


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("file.json: field 'x':\n  expected\ta"), "file.json: field 'x': expected a"),
        (OSError(28, "No space left on device", "run/x"), "[Errno 28] No space left on device: 'run/x'"),
        (KeyError("loader"), "KeyError: 'loader' (XLORA_JAX_TRACEBACK=1 shows where)"),
        (RecursionError(), "RecursionError: (XLORA_JAX_TRACEBACK=1 shows where)"),
        (MemoryError(), "MemoryError: (XLORA_JAX_TRACEBACK=1 shows where)"),
        (ValueError("\x1b[31m"), "\\x1b[31m"),
        (ValueError("\ud800"), "\\ud800"),
    ],
)
def test_an_error_is_one_line(error, line, monkeypatch):
    monkeypatch.delenv("XLORA_JAX_TRACEBACK", raising=False)
    assert run_with(error) == (1, f"xlora-jax try: error: {line}\n")


def test_the_traceback_is_there_on_demand(monkeypatch):
    monkeypatch.setenv("XLORA_JAX_TRACEBACK", "1")
    code, text = run_with(KeyError("loader"))
    assert code == 1
    assert text.startswith("Traceback (most recent call last):")
    assert text.splitlines()[-1].startswith("xlora-jax try: error: KeyError: 'loader'")


def test_interrupts_and_usage_have_codes_of_their_own():
    assert run_with(KeyboardInterrupt()) == (130, "xlora-jax try: interrupted\n")
    assert run_with(typer.BadParameter("no"))[0] == 2
    assert run_with(typer.Exit(3)) == (3, "")


def test_the_codes_are_in_the_help():
    text = " ".join(CliRunner().invoke(app, ["--help"]).output.split())
    for word in ("Exit codes:", "2, wrong usage", "130", "SIGTERM", "XLORA_JAX_TRACEBACK"):
        assert word in text


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "--base", "{x}/none", "{x}"],
        ["generate", "--base", "{x}", "--prompt", "a"],
        ["report", "--base", "{x}", "--checkpoint", "{x}", "--data", "a={x}/none"],
        ["report", "--base", "{x}", "--checkpoint", "{x}", "--data", "a={x}/none", "--batch-size", "0"],
        ["export", "--base", "{x}", "--checkpoint", "{x}", "--output", "{x}/out"],
        ["train", "--base", "{x}", "--adapter", "a={x}", "--data", "{x}/none", "--output", "{x}/out"],
    ],
)
def test_every_command_ends_so(arguments, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": "\\ud800"}')
    result = CliRunner().invoke(app, [argument.format(x=tmp_path) for argument in arguments])
    assert result.exit_code == 1
    if arguments[0] != "inspect":
        assert result.stderr.splitlines()[-1].startswith(f"xlora-jax {arguments[0]}: error: ")
        assert len(result.stderr.splitlines()) == 1
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


# A job in the background of a shell is started with SIGINT ignored, and Python then installs no handler.
INTERRUPTIBLE = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from xlora_jax.cli import main
main()
"""


@pytest.mark.slow
def test_an_interrupted_training_ends_with_130(text_files, tmp_path):
    folder, base_dir, adapters = text_files
    command = [
        *(sys.executable, "-c", INTERRUPTIBLE, "train", "--base", base_dir),
        *("--adapter", f"a={adapters[0]}", "--adapter", f"b={adapters[1]}", "--data", folder / "train.jsonl"),
        *("--output", tmp_path / "run", "--length", "32", "--batch-size", "2", "--steps", "100000"),
        *("--log-every", "1", "--checkpoint-every", "0", "--set", '{"tensorboard": false}'),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    metrics = tmp_path / "run" / "metrics.jsonl"
    with subprocess.Popen(command, env=environment, text=True, **pipes) as process:
        try:
            while not (metrics.exists() and metrics.read_text().count("\n") > 3):
                assert process.poll() is None, process.communicate()
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert err.splitlines()[-1] == "xlora-jax train: interrupted"
    assert "Traceback" not in err
