"""``xlora-jax export``: convert a trained X-LoRA from one layout to another."""

from __future__ import annotations

import enum
import warnings
from typing import Annotated

import typer

from xlora_jax.cli.options import Adapters, Base, Quiet, named_paths
from xlora_jax.cli.progress import working
from xlora_jax.cli.terminal import say

__all__ = ["command"]


class Layout(enum.StrEnum):
    """Layout of the written directory."""

    peft = "peft"
    xlora = "xlora"
    mistralrs = "mistralrs"


def command(
    base: Base,
    checkpoint: Annotated[str, typer.Option(help="Trained X-LoRA in any layout: directory or hub id.")],
    output: Annotated[str, typer.Option(help="Directory to write; an earlier export there is replaced.")],
    layout: Annotated[
        Layout, typer.Option(help="PEFT's, the original xlora package's, or the one that mistral.rs reads.")
    ] = Layout.peft,
    adapter: Adapters = None,
    quiet: Quiet = False,
) -> None:
    """Write a trained X-LoRA with its experts to one directory, in the layout of the target program.

    Weights are copied bit for bit. The base model's weights are not read. If the layout can't express a setting, the
    command fails and nothing is written.
    """
    from interop import save_xlora
    from interop.model import open_xlora, stored_dtype

    adapters = named_paths(adapter, "--adapter")
    dtype = stored_dtype(checkpoint)
    with working(f"writing {output}", quiet=quiet), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        model = open_xlora(base, dtype=dtype, checkpoint=checkpoint, adapters=adapters or None)
        save_xlora(model, output, layout=layout.value)
    for warning in () if quiet else caught:
        say(f"note: {warning.message}", err=True)
    say(f"{output}: {len(model.expert_names)} experts, {', '.join(model.expert_names)}; see README.md there")
