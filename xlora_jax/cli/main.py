"""``xlora-jax``, with one subcommand per file of this folder."""

from __future__ import annotations

import typer

from xlora_jax.cli import experts, export, generate, inspect, merge, report, train
from xlora_jax.cli.compile_cache import keep_compiled_programs
from xlora_jax.cli.errors import EXIT_CODES, in_one_line
from xlora_jax.cli.terminal import show_warnings

__all__ = ["app", "main"]

app = typer.Typer(
    name="xlora-jax",
    help="X-LoRA, a mixture of LoRA experts, for JAX: look at files, train a gate, generate, report, export, merge.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

for _name, _module in (
    ("inspect", inspect),
    ("train", train),
    ("export", export),
    ("merge", merge),
    ("generate", generate),
    ("report", report),
):
    app.command(_name)(in_one_line(_name)(_module.command))

_experts = typer.Typer(
    help="Add an expert to a trained X-LoRA, or remove one, without training again.", no_args_is_help=True
)
app.add_typer(_experts, name="experts")
for _name, _function in (("add", experts.add), ("remove", experts.remove)):
    _experts.command(_name)(in_one_line(f"experts {_name}")(_function))


def main() -> None:
    """Run the command line."""
    show_warnings()
    keep_compiled_programs()
    app()
