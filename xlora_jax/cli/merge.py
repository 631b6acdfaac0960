"""``xlora-jax merge``: one plain PEFT LoRA adapter from a trained X-LoRA."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from xlora_jax.cli.options import Adapters, Base, Quiet, held_out_paths, named_paths
from xlora_jax.cli.progress import working
from xlora_jax.cli.terminal import cell, say

__all__ = ["command"]


def command(
    base: Base,
    checkpoint: Annotated[str, typer.Option(help="Trained X-LoRA: PEFT's layout, the original one, or a hub id.")],
    data: Annotated[str, typer.Option(help="Texts whose mean gates are merged, as those of train.")],
    output: Annotated[str, typer.Option(help="Directory of the adapter; an earlier adapter there is replaced.")],
    rank: Annotated[
        int | None, typer.Option(help="Cut the adapter to this rank. Default: the sum of the ranks, which is exact.")
    ] = None,
    eval_data: Annotated[
        list[str] | None,
        typer.Option("--eval", help="Held-out texts for the losses; NAME=FILE for several. Default: those of --data."),
    ] = None,
    adapter: Adapters = None,
    length: Annotated[int, typer.Option(help="Tokens per row.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Rows at a time.")] = 8,
    skip_bad_records: Annotated[
        int, typer.Option(help="Bad records to leave out and list; the next one is an error.")
    ] = 0,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: as in config.json.")] = None,
    quiet: Quiet = False,
) -> None:
    """Merge the experts into one plain LoRA adapter, each layer with its mean gates over a text.

    PEFT, and any program that reads LoRA adapters, loads the result. It has one set of weights for all tokens, so it is
    an approximation of the X-LoRA: the losses in nats per token show how good.
    """
    from interop import as_model, load_xlora, merge_experts, save_lora
    from interop.hf.tokenizer import load_codec
    from interop.peft.adapter import check_lora_target
    from xlora_jax.training.data import encode_records, lay_out, read_records
    from xlora_jax.training.evaluation import mean_gates
    from xlora_jax.training.records import BadRecords

    for name, value in (("--rank", rank), ("--batch-size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    check_lora_target(output)
    texts = held_out_paths(eval_data)
    bad = BadRecords(skip_bad_records)
    with working("reading texts", quiet=quiet):
        codec = load_codec(base)

        def rows_of(path: str) -> Any:
            return lay_out(encode_records(read_records(path, bad), codec, bad), length)

        rows = rows_of(data)
        held_out = {name: rows_of(path) for name, path in texts.items()} or {data: rows}
        bad.warn()
    with working(f"loading {base}", quiet=quiet):
        model = load_xlora(base, checkpoint=checkpoint, adapters=named_paths(adapter, "--adapter") or None, dtype=dtype)
    for part in (rows, *held_out.values()):
        part.check_vocabulary(model.module.config.vocab_size)
    with working("computing the mean gates", quiet=quiet):
        gates = mean_gates(model.xlora, model.params, rows, batch_size)
    exact = merge_experts(model, gates)
    written = exact if rank is None else merge_experts(model, gates, rank=rank)
    off = model.replace(config=dataclasses.replace(model.config, global_scaling_weight=0.0))
    models = {"base": off, "X-LoRA": model, f"merged, rank {_rank(exact)}": as_model(exact, model)}
    if _rank(written) != _rank(exact):
        models[f"merged, rank {_rank(written)}"] = as_model(written, model)
    with working("computing the losses", quiet=quiet):
        losses = {name: _losses(each, held_out, batch_size) for name, each in models.items()}
    save_lora(written, output)
    table = Table(title="loss in nats per token", title_justify="left")
    table.add_column(cell("text"))
    for name in losses:
        table.add_column(cell(name), justify="right")
    for text in held_out:
        table.add_row(cell(text), *(f"{found[text]:.4f}" for found in losses.values()))
    Console().print(table)
    say(f"{output}: a LoRA adapter of rank {_rank(written)} for {base}")


def _rank(adapter: Any) -> int:
    return int(adapter.config["r"])


def _losses(model: Any, held_out: Mapping[str, Any], batch_size: int) -> dict[str, float]:
    from xlora_jax.training.evaluation import evaluate
    from xlora_jax.training.step import make_eval_step, split_params

    step = make_eval_step(model.xlora)
    parts = split_params(model.params, model.config)
    return {name: evaluate(step, *parts, rows, min(batch_size, len(rows)))[0] for name, rows in held_out.items()}
