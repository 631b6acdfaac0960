"""``xlora-jax train``: :func:`xlora_jax.run_training` from the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import jax
import typer

from xlora_jax.cli.options import Quantize, Quiet, held_out_paths, json_object, named_paths, read_settings_file
from xlora_jax.cli.terminal import say
from xlora_jax.job import Job, run_training
from xlora_jax.training.config import TrainConfig

__all__ = ["command"]

Option = typer.Option
_RUN_FIELDS = {field.name for field in dataclasses.fields(TrainConfig)}
_JOB_FIELDS = {field.name for field in dataclasses.fields(Job)}


def command(
    base: Annotated[str | None, Option(help="HF base model with its tokenizer: directory or hub id.")] = None,
    adapter: Annotated[
        list[str] | None,
        Option(metavar="NAME=DIR", help="An expert: PEFT LoRA directory or hub id. Repeatable, one for each expert."),
    ] = None,
    data: Annotated[
        str | None,
        Option(help="Data to learn: .jsonl, .json, .csv, .txt, .parquet, or HF datasets by directory or name."),
    ] = None,
    output: Annotated[
        str | None, Option(help="Directory of the run. The same command goes on where it stopped.")
    ] = None,
    config: Annotated[
        Path | None, Option(help="Settings as YAML or JSON: any field of the job, as in OUTPUT/job.json. Options win.")
    ] = None,
    eval_data: Annotated[
        list[str] | None, Option("--eval", help="Held-out data; NAME=PATH for several. Repeatable.")
    ] = None,
    checkpoint: Annotated[str | None, Option(help="Start from this trained X-LoRA instead of a new gate.")] = None,
    xlora: Annotated[
        str | None, Option(help="Settings of the gate, as JSON with PEFT's names: '{\"xlora_depth\": 2}'.")
    ] = None,
    settings: Annotated[
        str | None,
        Option("--set", help='Other fields of TrainConfig, as JSON: \'{"b2": 0.95, "z_loss": 0.001}\'.'),
    ] = None,
    length: Annotated[int | None, Option(help="Tokens per row; default 1024.")] = None,
    pack: Annotated[bool | None, Option(help="Put several documents into a row; the default.")] = None,
    skip_bad_records: Annotated[
        int | None, Option(help="Bad records to leave out and list, default 0; the next one ends the run.")
    ] = None,
    steps: Annotated[int | None, Option(help="Optimizer steps; default 1000.")] = None,
    batch_size: Annotated[int | None, Option(help="Rows per micro-batch, over all devices; default 8.")] = None,
    accumulate: Annotated[int | None, Option(help="Micro-batches per step; default 1.")] = None,
    optimizer: Annotated[str | None, Option(help="adamw (default), adam, lion, adafactor or sgd.")] = None,
    learning_rate: Annotated[float | None, Option(help="Peak learning rate; default 0.001.")] = None,
    schedule: Annotated[str | None, Option(help="constant, linear or cosine (default).")] = None,
    warmup: Annotated[int | None, Option(help="Steps of linear warm-up; default 0.")] = None,
    weight_decay: Annotated[float | None, Option(help="Decoupled weight decay; default 0.")] = None,
    max_grad_norm: Annotated[float | None, Option(help="Clip the gradient's norm, default 1; 0 does not clip.")] = None,
    seed: Annotated[int | None, Option(help="Seed of the new gate, data order and dropout; default 0.")] = None,
    dtype: Annotated[str | None, Option(help="float32, bfloat16 or float16; default: as in config.json.")] = None,
    quantize: Quantize = None,
    remat: Annotated[str | None, Option(help="Save memory: full, dots or dots_and_attention.")] = None,
    attention: Annotated[str | None, Option(help="xla, or cudnn (flash attention on NVIDIA GPUs).")] = None,
    eval_every: Annotated[int | None, Option(help="Steps between evaluations; default 0: at the end.")] = None,
    checkpoint_every: Annotated[
        int | None, Option(help="Steps between checkpoints, default 100; 0: at the end.")
    ] = None,
    log_every: Annotated[int | None, Option(help="Steps between entries of metrics.jsonl; default 10.")] = None,
    scaling_cache: Annotated[
        str | None, Option(help="off (default), memory or disk: keep the scaling pass from epoch to epoch.")
    ] = None,
    data_axis: Annotated[
        int | None, Option("--data-parallel", help="Mesh: copies of the model; default -1: all devices left.")
    ] = None,
    fsdp: Annotated[int | None, Option(help="Mesh: devices that share the parameters; default 1.")] = None,
    tensor: Annotated[int | None, Option(help="Mesh: devices that share each layer's width; default 1.")] = None,
    allow_changed: Annotated[
        bool, Option("--allow-changed", help="Go on with the run in OUTPUT with other data, model or settings.")
    ] = False,
    distributed: Annotated[bool, Option(help="Start jax.distributed: one process of several (a pod).")] = False,
    quiet: Quiet = False,
) -> None:
    """Train the gate of an X-LoRA model (and its experts with --xlora '{"use_trainable_adapters": true}').

    A record is {"messages": [...]} (chat), {"prompt": ..., "completion": ...} or {"text": ...}. In the first two, only
    the answers are learned. "xlora-jax inspect DATA --base BASE" marks the learned tokens of a file. The trained gate
    is written to OUTPUT/model in PEFT's layout, and the settings of the run to OUTPUT/job.json.
    """
    if distributed:
        jax.distributed.initialize()
    given = {
        "base": base,
        "adapters": named_paths(adapter, "--adapter") or None,
        "data": data,
        "output": output,
        "eval_data": held_out_paths(eval_data) or None,
        "checkpoint": checkpoint,
        "xlora": None if xlora is None else json_object(xlora, "--xlora"),
        "length": length,
        "pack": pack,
        "skip_bad_records": skip_bad_records,
        "dtype": dtype,
        "quantize": quantize,
    }
    run = {
        "steps": steps,
        "batch_size": batch_size,
        "accumulate": accumulate,
        "optimizer": optimizer,
        "learning_rate": learning_rate,
        "schedule": schedule,
        "warmup": warmup,
        "weight_decay": weight_decay,
        "max_grad_norm": max_grad_norm,
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
        "allow_changed": allow_changed or None,
        **json_object(settings or "{}", "--set"),
    }
    job = _job(given, run, config)
    result = run_training(job, show_progress=not quiet)
    if jax.process_index() != 0:
        return
    if not result.finished:
        say(f"Stopped by SIGTERM at step {int(result.state.step)}, saved. The same command goes on from there.")
        return
    last = job.train.steps
    for entry in result.history:
        if entry["kind"] == "eval" and entry["step"] == last:
            say(", ".join(f"{name} {value:.4f}" for name, value in entry.items() if name.endswith("_loss")))
    say(", ".join(f"{name.replace('_', ' ')} {value:,.4g}" for name, value in result.summary.items()))
    say(f"The trained gate is in {Path(job.output) / 'model'}")


def _job(given: Mapping[str, Any], run: Mapping[str, Any], config: Path | None) -> Job:
    """Return the job from a settings file and options; options take precedence."""
    read = {} if config is None else read_settings_file(config)
    if unknown := sorted(read.keys() - _JOB_FIELDS):
        raise ValueError(
            f"{config}: unknown fields {', '.join(map(repr, unknown))}; expected {', '.join(sorted(_JOB_FIELDS))}"
        )
    stored = read.pop("train", None) or {}
    if not isinstance(stored, Mapping):
        raise ValueError(f"{config}: train: expected a mapping of TrainConfig's fields, got {stored!r}")
    fields = {"checkpoint_every": 100, **stored, **{name: value for name, value in run.items() if value is not None}}
    if unknown := sorted(fields.keys() - _RUN_FIELDS):
        raise ValueError(
            f"unknown settings of a run: {', '.join(map(repr, unknown))}; expected {', '.join(sorted(_RUN_FIELDS))}"
        )
    # On the command line 0 means no clipping, which is null in JSON and YAML.
    fields["max_grad_norm"] = fields.get("max_grad_norm", TrainConfig.max_grad_norm) or None
    values = {**read, **{name: value for name, value in given.items() if value is not None}}
    for name in ("base", "adapters", "data", "output"):
        if not values.get(name) and not (name == "adapters" and values.get("checkpoint")):
            option = "--adapter NAME=DIR" if name == "adapters" else f"--{name}"
            raise ValueError(f"{option} is missing; give it, or {name}: in the file of --config")
    return Job(**{"adapters": {}, **values}, train=TrainConfig(**fields))
