"""A whole training job as one call: load, train, save."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from xlora_jax.atomic import replace_json
from xlora_jax.config import XLoraConfig
from xlora_jax.training.config import TrainConfig
from xlora_jax.training.data import Rows, encode_records, lay_out, read_records
from xlora_jax.training.records import BadRecords
from xlora_jax.training.run_lock import run_lock
from xlora_jax.training.trainer import Trainer, TrainResult, mesh_of

__all__ = ["Job", "run_training"]


@dataclass(frozen=True)
class Job:
    """Inputs and settings of ``xlora-jax train``.

    Attributes:
        base: HF model directory or hub id, with its tokenizer.
        adapters: mapping of expert names to PEFT LoRA directories or hub ids.
        data: training data, any source of :func:`xlora_jax.training.records.read_records`.
        output: directory of the run; the same job resumes there. The trained gate is in ``output/model``.
        eval_data: mapping of names to held-out data.
        checkpoint: trained X-LoRA to start from, instead of a new classifier.
        xlora: settings of the new classifier, with PEFT's field names.
        length: number of tokens per row.
        pack: whether to put several documents into a row.
        dtype: dtype of the base model and the computation; None takes the one in config.json.
        quantize: ``int8``, ``int4`` or ``nf4`` to keep the base's kernels in fewer bits; None keeps them in ``dtype``.
        expert_dtype: dtype of the experts.
        layout: layout of ``output/model``: ``peft``, ``xlora`` or ``mistralrs``.
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
    quantize: str | None = None
    expert_dtype: str = "float32"
    layout: str = "peft"
    skip_bad_records: int = 0
    train: TrainConfig = field(default_factory=TrainConfig)


def run_training(job: Job, *, show_progress: bool = False) -> TrainResult:
    """Load a model, train it and save it, as ``xlora-jax train`` does.

    Returns:
        The result. If it is ``finished``, the trained model is in ``job.output/model``. If not, SIGTERM stopped the
        run, and the same job resumes from its last checkpoint.

    Raises:
        ValueError: settings or data can't be used, or differ from those of the run in ``job.output``. The message says
            how to fix it.
        OSError: a file can't be read or written. Before training, it is checked that the result can be written.
        NonFiniteError: the loss was not finite for too many steps in a row.
    """
    from interop.checkpoint.write import check_target
    from interop.hf.tokenizer import load_codec

    output = Path(job.output)
    check_target(output / "model")  # before any long work
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
    with ExitStack() as stack:
        if jax.process_index() == 0:
            stack.enter_context(run_lock(output))
        return _run_locked(job, rows, held_out, show_progress)


def _run_locked(job: Job, rows: Rows, held_out: Mapping[str, Rows], show_progress: bool) -> TrainResult:
    """Load, train and save while holding the run's lock."""
    from interop import load_xlora, save_xlora
    from interop.model import check_save
    from xlora_jax.sharding import placer

    output = Path(job.output)
    mesh = mesh_of(job.train)
    place = None if mesh is None else placer(mesh)
    options: dict[str, Any] = {
        "dtype": job.dtype,
        "quantize": job.quantize,
        "expert_dtype": job.expert_dtype,
        "seed": job.train.seed,
    }
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
    if jax.process_index() == 0:
        check_save(model, output / "model", job.layout)
        if not (output / "job.json").exists():
            replace_json(output / "job.json", _describe(job))
    trainer = Trainer(model, rows, job.train, eval_rows=held_out, output=output, mesh=mesh)
    result = trainer.run(show_progress=show_progress, locked=True)
    if result.finished and jax.process_index() == 0:
        save_xlora(result.model, output / "model", layout=job.layout)
        # If a resumed run was allowed to change settings, these are the ones it finished with.
        replace_json(output / "job.json", _describe(job))
    return result


def _config_for(job: Job) -> XLoraConfig:
    from interop.hf.base import open_base

    width = open_base(job.base).module.config.hidden_size
    return XLoraConfig(hidden_size=width, adapters=dict(job.adapters), **job.xlora)


def _describe(job: Job) -> dict[str, Any]:
    values = dataclasses.asdict(dataclasses.replace(job, data=None, eval_data={}))
    values["data"] = str(job.data) if isinstance(job.data, str | Path) else "records"
    values["eval_data"] = {
        name: str(s) if isinstance(s, str | Path) else "records" for name, s in job.eval_data.items()
    }
    return values
