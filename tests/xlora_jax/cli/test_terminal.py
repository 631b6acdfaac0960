"""No text from files or models reaches the terminal with a control character in it, or as markup."""

import ast
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table
from typer.testing import CliRunner

from xlora_jax.cli.main import app
from xlora_jax.cli.terminal import cell, say, visible

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("\x9b31m", r"\x9b31m"),
        ("a\rb\x08\x7f\x00", r"a\x0db\x08\x7f\x00"),
        ("a\u202eb\u2028\u2066", r"a\u202eb\u2028\u2066"),
        ("\ud800", r"\ud800"),
        ("tab\t line\n ü 漢 \U0001f600 שלום", "tab\t line\n ü 漢 \U0001f600 שלום"),
    ],
)
def test_control_characters_become_visible(text, want, capsys):
    assert visible(text) == want
    say(text)
    assert capsys.readouterr().out == want + "\n"


@pytest.mark.parametrize(
    "text", ["[bold]x[/bold]", "[/]", "[/nothing]", "[link=http://example.org]x[/link]", "\x1b[1m"]
)
def test_a_cell_is_no_markup(text):
    table = Table(title=cell(text))
    table.add_column(cell(text))
    table.add_row(cell(text))
    console = Console(width=100, force_terminal=True, color_system=None)
    with console.capture() as capture:
        console.print(table)
    assert capture.get().count(visible(text)) == 3
    assert "\x1b]8" not in capture.get()


def test_nothing_else_prints():
    for path in ROOT.glob("xlora_jax/**/*.py"):
        if path.name == "terminal.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
            assert name not in ("echo", "secho", "print_json"), f"{path}, line {node.lineno}: use say()"
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_column" and node.args:
                assert isinstance(node.args[0], ast.Call), f"{path}, line {node.lineno}: use cell()"


@pytest.fixture
def hostile(base, experts, tmp_path):
    """An adapter in a folder whose name is an escape sequence and markup, and that names such a base."""
    folder = tmp_path / "\x1b[31m[bold]x[slash]"
    shutil.copytree(experts(base("llama"), "unequal")[0], folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": "\x1b]0;t\x07[/bold]", "peft_version": "\x9b1"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_inspect(hostile):
    done = CliRunner().invoke(app, ["inspect", str(hostile)])
    assert done.exit_code == 0, done.output
    assert r"\x1b]0;t\x07[/bold]" in done.output
    assert not {"\x1b", "\x07", "\x9b", "\r"} & set(done.output)


def test_errors(hostile):
    (hostile / "adapter_config.json").write_text("{")
    for arguments in (
        ["inspect", str(hostile)],
        ["export", "--base", str(hostile), "--checkpoint", str(hostile), "--output", "x"],
        ["generate", "--base", str(hostile), "-p", "a"],
        ["report", "--base", str(hostile), "--checkpoint", str(hostile), "--data", f"a={hostile}"],
    ):
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 1
        assert not {"\x1b", "\x07", "\x9b", "\r"} & set(done.output + done.stderr)
