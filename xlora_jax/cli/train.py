"""``xlora-jax train``, and the same as a Python call: :func:`run_training`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import jax
import typer

from xlora_jax.cli.terminal import say
from xlora_jax.job import Job, run_training
from xlora_jax.training.config import TrainConfig

__all__ = ["Job", "command", "run_training"]


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
    data: Annotated[str, typer.Option(help="What to learn: .jsonl, .txt, or a directory of HF datasets.")],
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
    allow_changed: Annotated[
        bool,
        typer.Option("--allow-changed", help="Go on with the run in OUTPUT with other data, model or settings."),
    ] = False,
    distributed: Annotated[bool, typer.Option(help="Start jax.distributed: one process of several (a pod).")] = False,
) -> None:
    """Train the gate of an X-LoRA model (and its experts with --xlora '{"use_trainable_adapters": true}').

    A line of JSONL is {"messages": [...]} (chat), {"prompt": ..., "completion": ...} or {"text": ...}; of the first
    two the answers alone are learnt. The trained gate is written to OUTPUT/model in PEFT's layout.
    """
    if distributed:
        jax.distributed.initialize()
    named_eval = {}
    for value in eval_data:
        name, separator, path = value.partition("=")
        named_eval.update({name: path} if separator else {"eval": value})
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
            "allow_changed": allow_changed,
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
        dtype=dtype,
        train=config,
    )
    result = run_training(job, show_progress=True)
    if jax.process_index() != 0:
        return
    if not result.finished:
        say(f"Stopped by SIGTERM at step {int(result.state.step)}, saved. The same command goes on from there.")
        return
    held_out = [entry for entry in result.history if entry["kind"] == "eval" and entry["step"] == steps]
    for entry in held_out:
        say(", ".join(f"{name} {value:.4f}" for name, value in entry.items() if name.endswith("_loss")))
    say(", ".join(f"{name.replace('_', ' ')} {value:,.4g}" for name, value in result.summary.items()))
    say(f"The trained gate is in {Path(output) / 'model'}")


def _json(text: str, option: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise typer.BadParameter(f"expected a JSON object, got {text!r} ({error})", param_hint=option) from error
    if not isinstance(values, dict):
        raise typer.BadParameter(f"expected a JSON object, got {text!r}", param_hint=option)
    return values
