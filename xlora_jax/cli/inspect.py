"""``xlora-jax inspect``: describe a directory or a data file, and tell whether it would load."""

from __future__ import annotations

from typing import Annotated

import typer

from xlora_jax.cli.options import Quiet
from xlora_jax.cli.progress import working
from xlora_jax.cli.terminal import cell

__all__ = ["command"]


def command(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="PATH...",
            help="Base models, LoRA adapters or X-LoRA checkpoints: directories or hub ids. Or training data: files, "
            "or directories of HF datasets.",
        ),
    ],
    base: Annotated[
        str | None,
        typer.Option(
            help="HF base model, directory or hub id: would each of them go with it? Its tokenizer reads data."
        ),
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens per row, for training data.")] = 1024,
    quiet: Quiet = False,
) -> None:
    """Describe each path: its kind, its contents, and anything that would be refused, with the reason.

    Weights of base models are not read, only their descriptions in the files. For training data, the command shows the
    records, the share of learned tokens, the documents cut or dropped at a row length, and examples with the learned
    tokens marked. The exit code is 1 if anything would be refused.
    """
    from rich.console import Console
    from rich.table import Table

    from interop.inspection import inspect_path
    from xlora_jax.cli.data_view import show_data
    from xlora_jax.training.records import is_data

    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    refused = False
    for path in paths:
        if is_data(path):
            with working(f"reading {path}", quiet=quiet):
                refused |= not show_data(console, path, base, length)
            continue
        with working(f"reading {path}", quiet=quiet):
            found = inspect_path(path, base)
        refused |= bool(found.refused)
        table = Table(show_header=False, title=cell(path), title_justify="left")
        table.add_column(no_wrap=True, style="bold")
        table.add_column(overflow="fold")
        rows = [("what it is", found.kind, "")]
        rows += [(topic, fact, "") for topic, fact in found.facts.items()]
        rows += [("note", note, "yellow") for note in ([] if quiet else found.notes)]
        rows += [("refused", reason, "red") for reason in found.refused]
        for topic, text, style in rows:
            table.add_row(cell(topic), cell(text, style))
        console.print(table)
    if refused:
        raise typer.Exit(1)
