"""``xlora-jax``: one subcommand a file of this folder."""

from __future__ import annotations

import typer

from xlora_jax.cli import export, generate, inspect, report, train
from xlora_jax.cli.terminal import show_warnings

__all__ = ["app", "main"]

app = typer.Typer(
    name="xlora-jax",
    help="X-LoRA, a mixture of LoRA experts, for JAX: look at files, train a gate, generate, report, export.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

app.command("inspect")(inspect.command)
app.command("train")(train.command)
app.command("export")(export.command)
app.command("generate")(generate.command)
app.command("report")(report.command)


def main() -> None:
    """Run the command line."""
    show_warnings()
    app()
