"""``xlora-jax report``: show a trained gate's routing of texts, as a table, as JSON and as a picture."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from xlora_jax.atomic import check_writable, replace_json, replacing_file
from xlora_jax.cli.options import Adapters, Base, Quantize, Quiet, named_paths
from xlora_jax.cli.progress import tracked, working
from xlora_jax.cli.terminal import cell, say, visible

__all__ = ["command"]


def command(
    base: Base,
    checkpoint: Annotated[str, typer.Option(help="Trained X-LoRA: PEFT's layout, the original one, or a hub id.")],
    data: Annotated[list[str], typer.Option(help="NAME=FILE of texts, as those of train. Repeatable.")],
    adapter: Adapters = None,
    length: Annotated[int, typer.Option(help="Tokens per row.")] = 512,
    rows: Annotated[int, typer.Option(help="Rows of each text at most; 0 for all.")] = 64,
    batch_size: Annotated[int, typer.Option(help="Rows at a time.")] = 8,
    skip_bad_records: Annotated[
        int, typer.Option(help="Bad records to leave out and list; the next one is an error.")
    ] = 0,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: as in config.json.")] = None,
    quantize: Quantize = None,
    output: Annotated[Path | None, typer.Option(help="Directory for report.json and report.png.")] = None,
    quiet: Quiet = False,
) -> None:
    """Report for each text the experts' effect on the loss, and the gate's choice of experts by layer.

    Losses are in nats per token. An expert's share is its mean gate. "decided" is 1 if one expert has the whole weight,
    and 0 if all experts have the same weight.
    """
    from interop import load_xlora
    from interop.hf.tokenizer import load_codec
    from xlora_jax.training.data import encode_records, lay_out, read_records
    from xlora_jax.training.records import BadRecords
    from xlora_jax.training.routing import make_routing_step

    for name, value, least in (("--rows", rows, 0), ("--batch-size", batch_size, 1)):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    if output is not None:
        check_writable(output)
    if output is not None and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--output draws with matplotlib, which is missing: pip install 'xlora-jax[plots]'")
    texts, adapters = named_paths(data, "--data"), named_paths(adapter, "--adapter") or None
    bad = BadRecords(skip_bad_records)
    with working("reading texts", quiet=quiet):
        codec = load_codec(base)
        given = {
            name: lay_out(encode_records(read_records(path, bad), codec, bad), length) for name, path in texts.items()
        }
        bad.warn()
    with working(f"loading {base}", quiet=quiet):
        model = load_xlora(base, checkpoint=checkpoint, adapters=adapters, dtype=dtype, quantize=quantize)
    for part in given.values():
        part.check_vocabulary(model.module.config.vocab_size)
    step = partial(make_routing_step(model.xlora), model.params)
    found = {name: _routing_of(step, part.arrays, rows, batch_size, name, quiet) for name, part in given.items()}
    _print(model.expert_names, found)
    if output is not None:
        _write(output, model, found)


def _routing_of(
    step: Callable[[Any], Any], arrays: Mapping[str, Any], rows: int, batch_size: int, name: str, quiet: bool
) -> Any:
    """Return the means over a text as NumPy arrays."""
    import jax
    import numpy as np

    from xlora_jax.training.losses import IGNORED_LABEL

    total = None
    count = len(arrays["input_ids"]) if rows == 0 else min(rows, len(arrays["input_ids"]))
    batch_size = min(batch_size, count)
    starts = range(0, count, batch_size)
    for start in tracked(starts, name, total=len(starts), quiet=quiet):
        batch = {}
        for field, array in arrays.items():
            part = array[start : min(start + batch_size, count)]
            # The last batch is filled up with rows that predict nothing, so there is only one shape to compile.
            fill = IGNORED_LABEL if field == "labels" else 0
            batch[field] = np.pad(part, ((0, batch_size - len(part)), (0, 0)), constant_values=fill)
        part = step(batch)
        total = part if total is None else total + part
    assert total is not None
    return jax.tree.map(np.asarray, total.mean())


def _decided(routing: Any) -> Any:
    """Return ``[L]``: 0 if all gates are equal, 1 if one expert has the whole weight."""
    import numpy as np

    count = routing.gates.shape[-1]
    return 1 - routing.entropy / np.log(count) if count > 1 else np.ones_like(routing.entropy)


def _print(experts: Sequence[str], found: Mapping[str, Any]) -> None:
    table = Table(title="mean gate of each expert; losses in nats per token")
    for column in ("text", "tokens", "base", "X-LoRA", *experts, "decided"):
        table.add_column(cell(column), justify="left" if column == "text" else "right")
    for name, routing in found.items():
        gates = routing.gates.mean(axis=0)
        table.add_row(
            cell(name),
            f"{int(routing.tokens):,}",
            f"{routing.base_loss:.3f}",
            f"{routing.loss:.3f}",
            *(f"[bold]{gate:.2f}[/bold]" if gate == gates.max() else f"{gate:.2f}" for gate in gates),
            f"{_decided(routing).mean():.2f}",
        )
    Console().print(table)


def _write(output: Path, model: Any, found: Mapping[str, Any]) -> None:
    """Write report.json and report.png."""
    experts = list(model.expert_names)
    layers = list(model.layer_names) if model.config.layerwise_scalings else ["all layers"]
    report = {
        "experts": experts,
        "layers": layers,
        "texts": {
            name: {
                "tokens": int(routing.tokens),
                "base_loss": float(routing.base_loss),
                "loss": float(routing.loss),
                "mean_gates": routing.gates.tolist(),
                "leads": routing.leads.tolist(),
                "entropy": routing.entropy.tolist(),
            }
            for name, routing in found.items()
        },
    }
    output.mkdir(parents=True, exist_ok=True)
    replace_json(output / "report.json", report)
    with replacing_file(output / "report.png") as file:
        _draw(file, experts, layers, found)
    say(f"{output / 'report.json'} and {output / 'report.png'}")


def _draw(file: IO[bytes], experts: Sequence[str], layers: Sequence[str], found: Mapping[str, Any]) -> None:
    """Draw, for each text, the mean gate of each expert at each layer, from none (light) to all (dark)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    height = max(2.2, 1.2 + 0.09 * len(layers))
    figure, panels = plt.subplots(
        1,
        len(found),
        figsize=(1.5 + (0.6 + 0.45 * len(experts)) * len(found), height),
        dpi=150,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for panel, (name, routing) in zip(panels[0], found.items(), strict=True):
        image = panel.imshow(routing.gates, vmin=0, vmax=1, cmap="Blues", aspect="auto", interpolation="nearest")
        title = f"{visible(name)}\n{routing.base_loss:.2f} to {routing.loss:.2f}"
        panel.set_title(title, fontsize=9, parse_math=False)  # a name with dollar signs is not a formula
        panel.set_xticks(range(len(experts)), [*map(visible, experts)], rotation=90, fontsize=8, parse_math=False)
        panel.tick_params(length=0)
    if len(layers) > 24:
        places = range(0, len(layers), -(-len(layers) // 12))
        panels[0][0].set_yticks(list(places), [layers[place] for place in places], fontsize=6)
    else:
        panels[0][0].set_yticks(range(len(layers)), layers, fontsize=6)
    figure.colorbar(image, ax=list(panels[0]), label="mean gate")
    figure.savefig(file, format="png")
    plt.close(figure)
