"""``xlora-jax experts``: add an expert to a trained X-LoRA, or remove one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Annotated, Any

import typer

from xlora_jax.cli.export import Layout
from xlora_jax.cli.options import Adapters, Base, Quiet, named_paths
from xlora_jax.cli.progress import working
from xlora_jax.cli.terminal import say

__all__ = ["add", "remove"]

Checkpoint = Annotated[str, typer.Option(help="Trained X-LoRA in any layout: directory or hub id.")]
Output = Annotated[str, typer.Option(help="Directory to write; an earlier export there is replaced.")]


def add(
    base: Base,
    checkpoint: Checkpoint,
    new: Annotated[
        str, typer.Option("--new", metavar="NAME=DIR", help="The new expert: PEFT LoRA directory or hub id.")
    ],
    output: Output,
    prior: Annotated[
        float, typer.Option(help="Gate of the new expert at most, above 0 and below 1. The default changes nothing.")
    ] = 1e-6,
    layout: Layout = Layout.peft,
    adapter: Adapters = None,
    quiet: Quiet = False,
) -> None:
    """Add an expert to a trained X-LoRA. Its gate begins at almost zero, so the outputs stay.

    The gate then learns with "xlora-jax train --checkpoint OUTPUT --set '{"only_expert": "NAME"}'", which changes
    nothing but the outputs for the new expert.
    """
    from interop import add_expert

    ((name, path),) = named_paths([new], "--new").items()
    _edit(base, checkpoint, output, layout, adapter, quiet, lambda model: add_expert(model, name, path, prior=prior))


def remove(
    base: Base,
    checkpoint: Checkpoint,
    name: Annotated[str, typer.Option(help="Name of the expert to remove.")],
    output: Output,
    layout: Layout = Layout.peft,
    adapter: Adapters = None,
    quiet: Quiet = False,
) -> None:
    """Remove an expert from a trained X-LoRA. The softmax shares its weight among the others."""
    from interop import remove_expert

    _edit(base, checkpoint, output, layout, adapter, quiet, lambda model: remove_expert(model, name))


def _edit(
    base: str,
    checkpoint: str,
    output: str,
    layout: Layout,
    adapter: list[str] | None,
    quiet: bool,
    edit: Callable[[Any], Any],
) -> None:
    from interop import save_xlora
    from interop.checkpoint.write import check_target
    from interop.model import open_xlora, stored_dtype

    check_target(output)
    adapters = named_paths(adapter, "--adapter") or None
    with working(f"writing {output}", quiet=quiet), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        model = edit(open_xlora(base, dtype=stored_dtype(checkpoint), checkpoint=checkpoint, adapters=adapters))
        save_xlora(model, output, layout=layout.value)
    for warning in () if quiet else caught:
        say(f"note: {warning.message}", err=True)
    say(f"{output}: {len(model.expert_names)} experts, {', '.join(model.expert_names)}; see README.md there")
