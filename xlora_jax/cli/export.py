"""``xlora-jax export``: a trained X-LoRA from one layout to another."""

from __future__ import annotations

import enum
import warnings
from typing import Annotated

import typer

from xlora_jax.cli.terminal import say

__all__ = ["command"]


class Layout(enum.StrEnum):
    """Of the directory that is written."""

    peft = "peft"
    xlora = "xlora"
    mistralrs = "mistralrs"


def command(
    base: Annotated[str, typer.Option(help="HF base model: directory or hub id. Its weights are not read.")],
    checkpoint: Annotated[str, typer.Option(help="Trained X-LoRA in any layout: directory or hub id.")],
    output: Annotated[str, typer.Option(help="Directory to write; an earlier export there is replaced.")],
    layout: Annotated[
        Layout, typer.Option(help="PEFT's, the original xlora package's, or the one that mistral.rs reads.")
    ] = Layout.peft,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=DIR",
            help="An expert: directory or hub id, in the checkpoint's order; replaces the checkpoint's paths. "
            "Repeatable, one for each expert.",
        ),
    ] = None,
) -> None:
    """Write a trained X-LoRA with its experts to a directory of its own, in the layout of those who shall read it.

    Weights are written as they are stored, bit for bit. What a layout can't express is refused, and nothing is written.
    """
    from interop import save_xlora
    from interop.checkpoint.read import read_xlora
    from interop.model import open_xlora
    from interop.storage.hub import resolve

    adapters = dict(text.partition("=")[::2] for text in adapter or ())
    if len(adapters) < len(adapter or ()) or not all(name and place for name, place in adapters.items()):
        raise typer.BadParameter("expected NAME=DIR, every name once", param_hint="--adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # loading says it again
        stored = read_xlora(resolve(checkpoint)).classifier[0][0].dtype
    dtype = stored if stored.itemsize < 8 else "float32"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        model = open_xlora(base, dtype=dtype, checkpoint=checkpoint, adapters=adapters or None)
        save_xlora(model, output, layout=layout.value)
    for warning in caught:
        say(f"note: {warning.message}", err=True)
    say(f"{output}: {len(model.expert_names)} experts, {', '.join(model.expert_names)}; see README.md there")
