"""``xlora-jax train``, and the same as a Python call: :func:`run_training`."""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import jax
import typer

from xlora_jax import XLoraConfig
from xlora_jax.checkpoints import CheckpointError
from xlora_jax.data import Rows, encode_records, lay_out, read_records
from xlora_jax.records import BadRecords
from xlora_jax.trainer import NonFiniteError, TrainConfig, TrainResult, mesh_of, train

__all__ = ["Job", "command", "run_training"]


@dataclass(frozen=True)
class Job:
    """All that ``xlora-jax train`` takes.

    Attributes:
        base: HF model directory or hub id, with its tokenizer.
        adapters: expert name -> PEFT LoRA directory or hub id.
        data: what to learn: whatever :func:`xlora_jax.records.read_records` reads.
        output: directory of the run; the same job goes on where it stopped. The trained gate is in ``output/model``.
        eval_data: held-out data by name.
        checkpoint: trained X-LoRA to start from, in place of a new classifier.
        xlora: settings of the new classifier, PEFT's field names.
        length: tokens per row.
        pack: several documents per row.
        dtype: of base and computation; None takes the one in config.json.
        expert_dtype: of the experts.
        layout: of ``output/model``: ``peft``, ``xlora`` or ``mistralrs``.
        skip_bad_records: number of bad records to leave out, of all data together; the next one is an error.
        train: settings of the run.
    """

    base: str
    adapters: Mapping[str, str]
    data: Any
    output: str
    eval_data: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None
    xlora: Mapping[str, Any] = field(default_factory=dict)
    length: int = 1024
    pack: bool = True
    dtype: str | None = None
    expert_dtype: str = "float32"
    layout: str = "peft"
    skip_bad_records: int = 0
    train: TrainConfig = field(default_factory=TrainConfig)


def run_training(job: Job, *, show_progress: bool = False) -> TrainResult:
    """Load, train, save: what ``xlora-jax train`` does.

    Returns:
        The result. If it is ``finished``, the trained model lies in ``job.output/model``; if not, SIGTERM came: the
        same job goes on from its last checkpoint.

    Raises:
        ValueError: settings or data that can't be used; the message says what to change.
        OSError: files that can't be read or written.
        NonFiniteError: the loss was not finite for too many steps in a row.
    """
    from interop import load_xlora, save_xlora
    from interop.codec import load_codec
    from xlora_jax.sharding import placer

    codec = load_codec(job.base)

    bad = BadRecords(job.skip_bad_records)

    def rows_of(source: Any) -> Rows:
        rows = lay_out(encode_records(read_records(source, bad), codec, bad), job.length, pack=job.pack)
        if rows.cut or rows.dropped:
            warnings.warn(
                f"{rows.cut} answers were cut off at {job.length} tokens, {rows.dropped} records have nothing to learn "
                f"within that length and were left out; raise the row length to keep them",
                stacklevel=2,
            )
        return rows

    rows = rows_of(job.data)
    held_out = {name: rows_of(source) for name, source in job.eval_data.items()}
    bad.warn()
    mesh = mesh_of(job.train)
    place = None if mesh is None else placer(mesh)
    options: dict[str, Any] = {"dtype": job.dtype, "expert_dtype": job.expert_dtype, "seed": job.train.seed}
    if job.checkpoint is not None:
        if job.xlora:
            raise ValueError(
                "give either checkpoint (which has its settings) or settings of a new classifier, not both"
            )
        model = load_xlora(
            job.base, checkpoint=job.checkpoint, adapters=dict(job.adapters) or None, place=place, **options
        )
    else:
        model = load_xlora(job.base, adapters=dict(job.adapters), config=_config_for(job), place=place, **options)
    output = Path(job.output)
    result = train(
        model,
        rows,
        job.train,
        eval_rows=held_out,
        output=output,
        mesh=mesh,
        show_progress=show_progress,
    )
    if result.finished and jax.process_index() == 0:
        save_xlora(result.model, output / "model", layout=job.layout)
        _write_json(output / "job.json", _describe(job))
    return result


def _config_for(job: Job) -> XLoraConfig:
    from transformers import AutoConfig

    from interop.hub import resolve

    text = AutoConfig.from_pretrained(resolve(job.base)).get_text_config()
    return XLoraConfig(hidden_size=text.hidden_size, adapters=dict(job.adapters), **job.xlora)


def _describe(job: Job) -> dict[str, Any]:
    values = dataclasses.asdict(dataclasses.replace(job, data=None, eval_data={}))
    values["data"] = str(job.data) if isinstance(job.data, str | Path) else "records"
    values["eval_data"] = {
        name: str(s) if isinstance(s, str | Path) else "records" for name, s in job.eval_data.items()
    }
    return values


def _write_json(path: Path, values: Any) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _named(values: list[str], option: str) -> dict[str, str]:
    named = {}
    for value in values:
        name, separator, path = value.partition("=")
        if not separator or not name or not path:
            raise typer.BadParameter(f"expected NAME=DIRECTORY, got {value!r}", param_hint=option)
        if name in named:
            raise typer.BadParameter(f"the name {name!r} is given twice", param_hint=option)
        named[name] = path
    return named


_DEFAULT = TrainConfig()


def command(
    base: Annotated[str, typer.Option(help="Base model: an HF directory or hub id, with its tokenizer.")],
    adapter: Annotated[
        list[str], typer.Option(help="NAME=DIRECTORY of an expert, a PEFT LoRA adapter. Repeat it, one per expert.")
    ],
    data: Annotated[
        str,
        typer.Option(help="What to learn: .jsonl, .json, .csv, .txt, .parquet, or HF datasets by directory or name."),
    ],
    output: Annotated[str, typer.Option(help="Directory of the run. The same command goes on where it stopped.")],
    eval_data: Annotated[list[str], typer.Option("--eval", help="Held-out data; NAME=PATH for several.")] = [],  # noqa: B006
    checkpoint: Annotated[
        str | None, typer.Option(help="Start from this trained X-LoRA instead of a new gate.")
    ] = None,
    xlora: Annotated[
        str, typer.Option(help="Settings of the gate, as JSON with PEFT's names: '{\"xlora_depth\": 2}'.")
    ] = "{}",
    settings: Annotated[
        str,
        typer.Option(
            "--set",
            help='Any other field of TrainConfig, as JSON: \'{"b2": 0.95, "z_loss": 0.001, "keep_checkpoints": 3}\'.',
        ),
    ] = "{}",
    length: Annotated[int, typer.Option(help="Tokens per row.")] = 1024,
    pack: Annotated[bool, typer.Option(help="Put several documents into a row.")] = True,
    skip_bad_records: Annotated[
        int, typer.Option(help="Bad records to leave out and list; the next one ends the run.")
    ] = 0,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = _DEFAULT.steps,
    batch_size: Annotated[int, typer.Option(help="Rows per micro-batch, over all devices.")] = _DEFAULT.batch_size,
    accumulate: Annotated[int, typer.Option(help="Micro-batches per step.")] = _DEFAULT.accumulate,
    optimizer: Annotated[str, typer.Option(help="adamw, adam, lion, adafactor or sgd.")] = _DEFAULT.optimizer,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = _DEFAULT.learning_rate,
    schedule: Annotated[str, typer.Option(help="constant, linear or cosine.")] = _DEFAULT.schedule,
    warmup: Annotated[int, typer.Option(help="Steps of linear warm-up.")] = _DEFAULT.warmup,
    weight_decay: Annotated[float, typer.Option(help="Decoupled weight decay.")] = _DEFAULT.weight_decay,
    max_grad_norm: Annotated[float, typer.Option(help="Clip the gradient's norm; 0 does not.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the new gate, the data's order and the dropouts.")] = 0,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: as in config.json.")] = None,
    remat: Annotated[str | None, typer.Option(help="Save memory: full, dots or dots_and_attention.")] = None,
    attention: Annotated[str | None, typer.Option(help="xla, or cudnn (flash attention on NVIDIA GPUs).")] = None,
    eval_every: Annotated[int, typer.Option(help="Steps between evaluations; 0: at the end.")] = 0,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints; 0: at the end.")] = 100,
    log_every: Annotated[int, typer.Option(help="Steps between entries of metrics.jsonl.")] = _DEFAULT.log_every,
    scaling_cache: Annotated[
        str, typer.Option(help="off, memory or disk: keep what the scaling pass gives from epoch to epoch.")
    ] = _DEFAULT.scaling_cache,
    data_axis: Annotated[
        int, typer.Option("--data-parallel", help="Mesh: copies of the model; -1: what is left.")
    ] = -1,
    fsdp: Annotated[int, typer.Option(help="Mesh: devices that share the parameters.")] = 1,
    tensor: Annotated[int, typer.Option(help="Mesh: devices that share each layer's width.")] = 1,
    distributed: Annotated[bool, typer.Option(help="Start jax.distributed: one process of several (a pod).")] = False,
) -> None:
    """Train the gate of an X-LoRA model (and its experts with --xlora '{"use_trainable_adapters": true}').

    A record is {"messages": [...]} (chat), {"prompt": ..., "completion": ...} or {"text": ...}; of the first two the
    answers alone are learnt. "xlora-jax inspect DATA --base BASE" shows what is learnt of a file. The trained gate is
    written to OUTPUT/model in PEFT's layout.
    """
    if distributed:
        jax.distributed.initialize()
    named_eval = {}
    for value in eval_data:
        name, separator, path = value.partition("=")
        named_eval.update({name: path} if separator else {"eval": value})
    try:
        config = TrainConfig(
            **{
                "steps": steps,
                "batch_size": batch_size,
                "accumulate": accumulate,
                "optimizer": optimizer,
                "learning_rate": learning_rate,
                "schedule": schedule,
                "warmup": warmup,
                "weight_decay": weight_decay,
                "max_grad_norm": max_grad_norm or None,
                "seed": seed,
                "remat": remat,
                "attention": attention,
                "eval_every": eval_every,
                "checkpoint_every": checkpoint_every,
                "log_every": log_every,
                "scaling_cache": scaling_cache,
                "data": data_axis,
                "fsdp": fsdp,
                "tensor": tensor,
                **_json(settings, "--set"),
            }
        )
        job = Job(
            base=base,
            adapters=_named(adapter, "--adapter"),
            data=data,
            output=output,
            eval_data=named_eval,
            checkpoint=checkpoint,
            xlora=_json(xlora, "--xlora"),
            length=length,
            pack=pack,
            skip_bad_records=skip_bad_records,
            dtype=dtype,
            train=config,
        )
        result = run_training(job, show_progress=True)
    except (ValueError, TypeError, OSError, ImportError, CheckpointError, NonFiniteError) as error:
        typer.echo(f"xlora-jax train: {error}", err=True)
        raise typer.Exit(1) from error
    if jax.process_index() != 0:
        return
    if not result.finished:
        typer.echo(f"Stopped by SIGTERM at step {int(result.state.step)}, saved. The same command goes on from there.")
        return
    held_out = [entry for entry in result.history if entry["kind"] == "eval" and entry["step"] == steps]
    for entry in held_out:
        typer.echo(", ".join(f"{name} {value:.4f}" for name, value in entry.items() if name.endswith("_loss")))
    typer.echo(", ".join(f"{name.replace('_', ' ')} {value:,.4g}" for name, value in result.summary.items()))
    typer.echo(f"The trained gate is in {Path(output) / 'model'}")


def _json(text: str, option: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise typer.BadParameter(f"expected a JSON object, got {text!r} ({error})", param_hint=option) from error
    if not isinstance(values, dict):
        raise typer.BadParameter(f"expected a JSON object, got {text!r}", param_hint=option)
    return values
