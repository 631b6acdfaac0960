"""``xlora-jax report``: show a trained gate's routing of texts, as a table, a page, JSON and plots."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from xlora_jax.atomic import check_writable
from xlora_jax.cli.options import Adapters, Base, Quantize, Quiet, named_paths
from xlora_jax.cli.progress import tracked, working
from xlora_jax.cli.terminal import cell, say

__all__ = ["command"]

Option = typer.Option


def command(
    base: Base,
    checkpoint: Annotated[str, Option(help="Trained X-LoRA: PEFT's layout, the original one, or a hub id.")],
    data: Annotated[list[str], Option(help="NAME=FILE of texts, as those of train. Repeatable.")],
    adapter: Adapters = None,
    label: Annotated[
        str | None, Option(help="Field of the records that names their text, such as domain; splits each file by it.")
    ] = None,
    prompt: Annotated[
        list[str] | None, Option("--prompt", "-p", help="Show this text with what is generated from it. Repeatable.")
    ] = None,
    max_new_tokens: Annotated[int, Option(help="Tokens to generate for each prompt.")] = 64,
    effects: Annotated[
        bool, Option("--effects", help="Measure each expert's effect on the loss: alone, left out, uniform mix.")
    ] = False,
    run: Annotated[
        Path | None, Option(help="Directory of the training run, for its curves. Default: the one above CHECKPOINT.")
    ] = None,
    length: Annotated[int, Option(help="Tokens per row.")] = 512,
    rows: Annotated[int, Option(help="Rows of each text at most; 0 for all.")] = 64,
    batch_size: Annotated[int, Option(help="Rows at a time.")] = 8,
    sample_tokens: Annotated[int, Option(help="Tokens of each text in the token view; 0 shows none.")] = 256,
    skip_bad_records: Annotated[int, Option(help="Bad records to leave out and list; the next one is an error.")] = 0,
    dtype: Annotated[str | None, Option(help="float32, bfloat16 or float16; default: as in config.json.")] = None,
    quantize: Quantize = None,
    title: Annotated[str, Option(help="Title of the page.")] = "Which expert does what",
    output: Annotated[
        Path | None, Option(help="Directory for report.html, report.json, and each plot as PNG and SVG.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Report for each text the experts' effect on the loss, and the gate's choice of experts by layer.

    Losses are in nats per token. An expert's share is its mean gate. "decided" is 1 if one expert has the whole weight,
    and 0 if all experts have the same weight.
    """
    from interop import load_xlora
    from interop.hf.generation_config import load_generation_config
    from interop.hf.tokenizer import load_codec
    from xlora_jax.report import check_report, report_routing
    from xlora_jax.training.data import encode_records, lay_out, read_records
    from xlora_jax.training.records import BadRecords

    for name, value, least in (
        ("--rows", rows, 0),
        ("--batch-size", batch_size, 1),
        ("--sample-tokens", sample_tokens, 0),
        ("--max-new-tokens", max_new_tokens, 1),
    ):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    if output is not None:
        check_report()
        check_writable(output)
    elif prompt:
        raise ValueError("--prompt needs --output: the texts are shown on the page")
    training = None if output is None else _training(checkpoint, run)
    texts, adapters = named_paths(data, "--data"), named_paths(adapter, "--adapter") or None
    bad = BadRecords(skip_bad_records)
    with working("reading texts", quiet=quiet):
        codec = load_codec(base)
        given: dict[str, Any] = {}
        for name, path in texts.items():
            records = read_records(path, bad)
            for part, own in _by_label(records, label, name, len(texts) > 1).items():
                given[part] = lay_out(encode_records(own, codec, bad), length)
        bad.warn()
    with working(f"loading {base}", quiet=quiet):
        model = load_xlora(base, checkpoint=checkpoint, adapters=adapters, dtype=dtype, quantize=quantize)
    samples = []
    for text in prompt or ():
        with working("generating", quiet=quiet):
            config = load_generation_config(base)
            samples.append(model.routing(text, codec=codec, config=config, max_new_tokens=max_new_tokens))

    def progress(batches: Iterable[int], name: str, total: int) -> Iterable[int]:
        return tracked(batches, name, total=total, quiet=quiet)

    report = report_routing(
        model,
        given,
        codec=codec if output is not None else None,
        effects=effects,
        max_rows=rows,
        batch_size=batch_size,
        sample_tokens=sample_tokens,
        samples=samples,
        training=training,
        title=title,
        progress=progress,
    )
    _print(model.expert_names, report.content)
    if output is not None:
        say(report.write(output))


def _by_label(records: Any, label: str | None, name: str, several: bool) -> Mapping[str, Any]:
    """Return the records by the value of a field; without one all are of the text ``name``.

    Raises:
        RecordError: a record has no such field, or its value is no text or number.
    """
    from xlora_jax.training.records import RecordError

    if label is None:
        return {name: records}
    found: dict[str, list[int]] = {}
    for number, record in enumerate(records):
        value = record.get(label) if isinstance(record, Mapping) else None
        if not isinstance(value, str | int) or isinstance(value, bool):
            raise RecordError(
                f"{records.place(number)}: {label}: expected text or a whole number, because of --label, got "
                f"{value!r:.80}; add the field, or leave --label out"
            )
        found.setdefault(f"{name}: {value}" if several else str(value), []).append(number)
    return {key: records.select(numbers) for key, numbers in found.items()}


def _training(checkpoint: str, run: Path | None) -> list[dict[str, Any]] | None:
    """Return the entries of the run's metrics, or None if the checkpoint is not in the directory of a run."""
    from xlora_jax.training.metrics import read_metrics

    if run is None:
        path = Path(checkpoint).absolute().parent / "metrics.jsonl"
        return read_metrics(path) if path.is_file() else None
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"--run: expected the directory of a training run, got {run}, which has no metrics.jsonl")
    return read_metrics(path)


def _print(experts: Sequence[str], content: Mapping[str, Any]) -> None:
    table = Table(title="mean gate of each expert; losses in nats per token")
    for column in ("text", "tokens", "base", "X-LoRA", *experts, "decided"):
        table.add_column(cell(column), justify="left" if column == "text" else "right")
    for name, entry in content["texts"].items():
        gates = np.mean(entry["mean_gates"], axis=0)
        table.add_row(
            cell(name),
            f"{entry['tokens']:,}",
            f"{entry['base_loss']:.3f}",
            f"{entry['loss']:.3f}",
            *(f"[bold]{gate:.2f}[/bold]" if gate == gates.max() else f"{gate:.2f}" for gate in gates),
            f"{1 - np.mean(entry['entropy']) if len(experts) > 1 else 1:.2f}",
        )
    Console().print(table)
