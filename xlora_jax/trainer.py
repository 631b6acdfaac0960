"""A whole training run: loop, meshes, checkpoints, evaluation, metrics, preemption.

The step is :func:`xlora_jax.training.make_train_step`; everything here happens around it, on the host.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.typing import NDArray

from xlora_jax.checkpoints import CheckpointError, Checkpoints
from xlora_jax.data import Loader, Rows
from xlora_jax.metrics import MetricsWriter, peak_memory
from xlora_jax.model import XLoraModel
from xlora_jax.optimizers import make_optimizer, make_schedule
from xlora_jax.regularizers import Regularizers
from xlora_jax.scaling_cache import ScalingCache, fingerprint
from xlora_jax.sharding import make_mesh, put_batch, shard_params, state_shardings
from xlora_jax.training import (
    TrainState,
    init_train_state,
    make_eval_step,
    make_scaling_step,
    make_train_step,
    merge_params,
)

__all__ = ["NonFiniteError", "TrainConfig", "TrainResult", "evaluate", "mesh_of", "train"]


class NonFiniteError(ArithmeticError):
    """Too many steps in a row whose loss or gradient was not finite."""


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run.

    Attributes:
        steps: optimiser steps of the whole run.
        batch_size: rows per micro-batch, of all devices together.
        accumulate: micro-batches per step.
        optimizer: a key of :data:`xlora_jax.optimizers.OPTIMIZERS`.
        learning_rate: peak.
        schedule: one of :data:`xlora_jax.optimizers.SCHEDULES`.
        warmup: steps of linear warm-up.
        weight_decay: decoupled.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: of adaptive optimisers.
        max_grad_norm: clip the gradient's norm; None for no clipping.
        seed: of data order and dropouts.
        param_dtype: in which to keep what learns; None leaves it as it was loaded.
        gate_dtype: in which the classifier computes; None takes the base model's, as PEFT does.
        remat: rematerialisation policy, a key of :data:`xlora_jax.models.transformer.REMAT_POLICIES`; None stores all.
        attention: ``xla`` or ``cudnn``; None leaves it to JAX.
        loss_chunk: positions of a row whose logits exist at a time.
        load_balance: weight of that regulariser, see :mod:`xlora_jax.regularizers`.
        entropy: likewise.
        z_loss: likewise.
        regularize_per_layer: balance within every layer, or over all together.
        eval_every: steps between evaluations; 0 evaluates at the end only.
        checkpoint_every: steps between checkpoints; 0 saves at the end and on SIGTERM only.
        keep_checkpoints: how many of the latest to keep.
        log_every: steps between entries of the metrics.
        max_bad_steps: so many steps in a row that are not finite stop the run.
        scaling_cache: ``off``, ``memory`` or ``disk``.
        scaling_cache_dtype: float32 or bfloat16.
        data: size of that mesh axis; -1 takes what the others leave.
        fsdp: likewise.
        tensor: likewise.
        tensorboard: also write TensorBoard's files.
    """

    steps: int = 1000
    batch_size: int = 8
    accumulate: int = 1
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    schedule: str = "cosine"
    warmup: int = 0
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    max_grad_norm: float | None = 1.0
    seed: int = 0
    param_dtype: str | None = "float32"
    gate_dtype: str | None = None
    remat: str | None = None
    attention: str | None = None
    loss_chunk: int = 256
    load_balance: float = 0.0
    entropy: float = 0.0
    z_loss: float = 0.0
    regularize_per_layer: bool = True
    eval_every: int = 0
    checkpoint_every: int = 0
    keep_checkpoints: int = 2
    log_every: int = 10
    max_bad_steps: int = 5
    scaling_cache: str = "off"
    scaling_cache_dtype: str = "float32"
    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    tensorboard: bool = True

    def __post_init__(self) -> None:
        """Refuse what can't work."""
        for name in ("steps", "batch_size", "accumulate", "loss_chunk", "log_every", "max_bad_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.scaling_cache not in ("off", "memory", "disk"):
            raise ValueError(f"scaling_cache: expected off, memory or disk, got {self.scaling_cache!r}")

    @property
    def regularizers(self) -> Regularizers:
        """The further terms of the loss."""
        return Regularizers(self.load_balance, self.entropy, self.z_loss, self.regularize_per_layer)

    def make_schedule(self) -> Callable[[Any], Any]:
        """Learning rate by step."""
        return make_schedule(self.schedule, self.learning_rate, self.steps, self.warmup)

    def make_optimizer(self) -> optax.GradientTransformation:
        """The optimiser that the settings describe."""
        return make_optimizer(
            self.optimizer,
            self.make_schedule(),
            weight_decay=self.weight_decay,
            b1=self.b1,
            b2=self.b2,
            eps=self.eps,
            max_grad_norm=self.max_grad_norm,
        )

    # What may change between a run and its resumption without changing what it computes.
    _FREE = (
        "eval_every",
        "checkpoint_every",
        "keep_checkpoints",
        "log_every",
        "max_bad_steps",
        "scaling_cache",
        "remat",
        "attention",
        "loss_chunk",
        "data",
        "fsdp",
        "tensor",
        "tensorboard",
    )

    def fixed(self) -> dict[str, Any]:
        """The settings that a resumed run must share with the run it resumes."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in self._FREE}


@dataclass(frozen=True)
class TrainResult:
    """What a run gives.

    Attributes:
        model: the trained model, in the dtype it was loaded in.
        state: where training stands.
        finished: False where SIGTERM ended it early; the same call goes on from there.
        history: the entries of the metrics, of this call.
        summary: steps per second, tokens per second (all, and those that are learnt), share of time in data, peak
            memory.
    """

    model: XLoraModel
    state: TrainState
    finished: bool
    history: list[dict[str, Any]] = field(repr=False)
    summary: dict[str, float]


def mesh_of(config: TrainConfig) -> Mesh | None:
    """The mesh that the settings describe, or None on one device."""
    if jax.device_count() == 1 and config.fsdp in (1, -1) and config.tensor in (1, -1):
        return None
    return make_mesh(config.data, config.fsdp, config.tensor)


def train(
    model: XLoraModel,
    rows: Rows,
    config: TrainConfig,
    *,
    eval_rows: Mapping[str, Rows] | None = None,
    output: str | Path | None = None,
    optimizer: optax.GradientTransformation | None = None,
    mesh: Mesh | None = None,
    cache_directory: str | Path | None = None,
    on_metrics: Callable[[int, str, Mapping[str, float]], None] | None = None,
    show_progress: bool = False,
) -> TrainResult:
    """Train the classifier of a model, and its experts with ``use_trainable_adapters``.

    With an ``output`` the run can be resumed: the same call goes on from its latest checkpoint, bit for bit on the same
    devices. SIGTERM saves a checkpoint and returns.

    Args:
        model: where training starts.
        rows: what to learn.
        config: settings.
        eval_rows: held-out rows by name.
        output: directory of the run: checkpoints, metrics, settings. None writes nothing.
        optimizer: any optax transformation in place of the one that ``config`` names.
        mesh: default :func:`mesh_of` the settings.
        cache_directory: of ``scaling_cache="disk"``; default ``output/scaling_cache``.
        on_metrics: called with (step, ``train`` or ``eval``, values) at every entry.
        show_progress: a bar with loss, tokens per second and the share of time in data.

    Returns:
        The trained model, the state, what was logged.

    Raises:
        NonFiniteError: ``max_bad_steps`` steps in a row were not finite; the last batch lies in ``output``.
        CheckpointError: a checkpoint can't be written or read.
        ValueError: settings that do not go together, or a token that the base model has not.
    """
    if (vocabulary := getattr(getattr(model.module, "config", None), "vocab_size", None)) is not None:
        for part in (rows, *(eval_rows or {}).values()):
            part.check_vocabulary(vocabulary)
    run = _Run(model, rows, config, optimizer, mesh_of(config) if mesh is None else mesh, cache_directory, output)
    with ExitStack() as stack:
        loader = run.loader(rows)
        started = 0
        checkpoints = None
        if output is not None:
            checkpoints = stack.enter_context(Checkpoints(Path(output) / "checkpoints", keep=config.keep_checkpoints))
            _save_settings(Path(output), config, checkpoints.latest, own_optimizer=optimizer is not None)
            found = checkpoints.restore(run.state)
            if found is not None:
                run.state, data = found
                loader.set_state(data["loader"])
                started = int(run.state.step)
        log = _Log(config, run.schedule if optimizer is None else None, on_metrics)
        if output is not None and jax.process_index() == 0:
            log.writer = stack.enter_context(MetricsWriter(output, resumed_at=started, tensorboard=config.tensorboard))
        progress = stack.enter_context(_progress(config.steps, started, show_progress))
        stop = stack.enter_context(_Preemption())
        finished = _loop(run, loader, config, checkpoints, log, progress, stop, eval_rows or {}, started, output)
    return TrainResult(run.trained(), run.state, finished, log.history, log.summary())


class _Run:
    """The compiled functions of a run, its state, and how batches get to the devices."""

    def __init__(
        self,
        model: XLoraModel,
        rows: Rows,
        config: TrainConfig,
        optimizer: optax.GradientTransformation | None,
        mesh: Mesh | None,
        cache_directory: str | Path | None,
        output: str | Path | None,
    ) -> None:
        self.model, self.config, self.mesh = model, config, mesh
        self.schedule = config.make_schedule()
        self.optimizer = config.make_optimizer() if optimizer is None else optimizer
        self.static = dataclasses.replace(
            model.xlora,
            module=model.module.clone(remat=config.remat, attention=config.attention),
            gate_dtype=None if config.gate_dtype is None else jnp.dtype(config.gate_dtype),
        )
        params = model.params if mesh is None else shard_params(model.params, mesh)
        dtype = None if config.param_dtype is None else jnp.dtype(config.param_dtype)
        self.state, self.frozen = init_train_state(params, model.config, self.optimizer, config.seed, dtype)
        shardings = None
        if mesh is not None:
            shardings = state_shardings(jax.eval_shape(lambda state: state, self.state), self.optimizer, mesh)
            self.state = jax.jit(lambda state: state, out_shardings=shardings)(self.state)
        self.step = make_train_step(
            self.static,
            self.optimizer,
            accumulate=config.accumulate,
            loss_chunk=config.loss_chunk,
            regularizers=config.regularizers,
            mesh=mesh,
            state_shardings=shardings,
        )
        self.evaluate = make_eval_step(self.static, loss_chunk=config.loss_chunk, mesh=mesh)
        self.cache: ScalingCache | None = None
        if config.scaling_cache != "off":
            self._open_cache(cache_directory, output)

    def _open_cache(self, directory: str | Path | None, output: str | Path | None) -> None:
        self.scaling = make_scaling_step(self.static, mesh=self.mesh)
        if jax.process_count() > 1:
            raise ValueError("scaling_cache: expected one process; rows can't be read back across processes")
        if self.config.scaling_cache == "disk":
            if directory is None and output is None:
                raise ValueError("scaling_cache disk: expected a cache_directory or an output directory, got neither")
            directory = Path(str(output)) / "scaling_cache" if directory is None else directory
        else:
            directory = None
        name = fingerprint(self.static, self.model.params)
        self.cache = ScalingCache(name, self.config.scaling_cache_dtype, directory)

    def loader(self, rows: Rows) -> Loader:
        return Loader(
            rows,
            self.config.batch_size,
            seed=self.config.seed,
            accumulate=self.config.accumulate,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def put(self, batch: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
        """Put a batch of the loader onto the devices, with its kept scaling pass if there is a cache."""
        batch = {name: array for name, array in batch.items() if name != "row"}
        accumulate = self.config.accumulate
        if self.cache is not None:
            flat = {n: a.reshape(-1, a.shape[-1]) for n, a in batch.items()}
            keys = self.cache.keys(flat)
            hidden = self.cache.get(keys)
            if hidden is None:
                inputs = {name: array for name, array in flat.items() if name != "labels"}
                hidden = self.cache.put(keys, self.scaling(self.frozen, self._on_devices(inputs, 1)))
            batch["scaling_hidden"] = hidden.reshape(*batch["input_ids"].shape, -1)
        return self._on_devices(batch, accumulate)

    def _on_devices(self, batch: Mapping[str, NDArray[Any]], accumulate: int) -> dict[str, Any]:
        if self.mesh is None:
            return {name: jnp.asarray(array) for name, array in batch.items()}
        return dict(put_batch(batch, self.mesh, accumulate))

    def trained(self) -> XLoraModel:
        """The model with what has been learnt, whole on every process that asks, in its own dtypes."""
        learnt = self.state.trainable
        if self.mesh is not None:
            whole = NamedSharding(self.mesh, P())
            learnt = jax.jit(lambda tree: tree, out_shardings=whole)(learnt)
        merged = merge_params(learnt, self.frozen)
        dtypes = jax.tree.map(lambda leaf: leaf.dtype, dict(self.model.params))
        params = jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), merged, dtypes)
        return self.model.replace(params=params)


def _loop(
    run: _Run,
    loader: Loader,
    config: TrainConfig,
    checkpoints: Checkpoints | None,
    log: _Log,
    progress: Callable[..., None],
    stop: _Preemption,
    eval_rows: Mapping[str, Rows],
    started: int,
    output: str | Path | None,
) -> bool:
    """Take the steps; False if stopped by SIGTERM."""
    before: tuple[Any, Any, Mapping[str, NDArray[Any]], int] | None = None
    saved = started
    number = started
    for number in range(started + 1, config.steps + 1):
        log.begin_data()
        batch = next(loader)
        arrays = run.put(batch)
        log.end_data()
        run.state, metrics = run.step(run.state, run.frozen, arrays)
        # The step before is looked at while this one runs, so that the device never waits for the host.
        if before is not None:
            _check_finite(before, config, output, number - 1)
            progress(number - 1, log.step(number - 1, before[1], before[3]))
        tokens = loader.rows.count(batch["row"]) * jax.process_count()
        before = (jnp.copy(run.state.skipped_in_row), metrics, batch, tokens)
        if checkpoints is not None:
            checkpoints.check()
        stopping = stop.asked(number)
        if (config.eval_every and number % config.eval_every == 0) or number == config.steps:
            for name, rows in eval_rows.items():
                log.write(number, "eval", evaluate_rows(run, rows, name))
        if checkpoints is not None and number < config.steps:
            due = config.checkpoint_every and number % config.checkpoint_every == 0
            if due or stopping:
                checkpoints.save(run.state, {"loader": loader.get_state()})
                saved = number
        if stopping:
            break
    if before is not None:
        progress(number, log.step(number, before[1], before[3], last=True))
        _check_finite(before, config, output, number)
    if checkpoints is not None and number > saved:
        checkpoints.save(run.state, {"loader": loader.get_state()})
        checkpoints.wait()
    return number >= config.steps


def _check_finite(before: Any, config: TrainConfig, output: str | Path | None, step: int) -> None:
    in_row, _, batch, _ = before
    if int(in_row) < config.max_bad_steps:
        return
    where = "give an output directory to have it saved"
    if output is not None:
        path = Path(output) / f"bad_batch_step_{step}_process_{jax.process_index()}.npz"
        np.savez_compressed(path, **dict(batch))
        where = f"saved as {path}"
    raise NonFiniteError(
        f"step {step}: loss or gradient was not finite for {int(in_row)} steps in a row. Nothing was learnt from them; "
        f"the last batch is {where}. Lower the learning rate, or compute in float32 or bfloat16 instead of float16."
    )


def evaluate_rows(run: _Run, rows: Rows, name: str) -> dict[str, float]:
    """Held-out loss of ``rows`` as ``{name}_loss``, in nats per token; every row once."""
    loss, _ = evaluate(
        run.evaluate, run.state.trainable, run.frozen, rows, run.config.batch_size, lambda b: run._on_devices(b, 1)
    )
    return {f"{name}_loss": loss}


def evaluate(
    step: Callable[..., Any],
    trainable: Any,
    frozen: Any,
    rows: Rows,
    batch_size: int,
    put: Callable[[Mapping[str, NDArray[Any]]], Any] = dict,
) -> tuple[float, NDArray[np.float64]]:
    """Evaluate on every row once.

    Args:
        step: of :func:`~xlora_jax.training.make_eval_step`.
        trainable: what learnt.
        frozen: the rest.
        rows: held-out rows.
        batch_size: rows at a time, of all processes together.
        put: from NumPy arrays to arrays on the devices.

    Returns:
        Mean cross-entropy per token in nats, and each expert's mean scaling ``[N]``.
    """
    from xlora_jax.losses import IGNORED_LABEL

    total, tokens, gates = 0.0, 0, np.zeros(1)
    local, rank = batch_size // jax.process_count(), jax.process_index()
    for start in range(0, len(rows), batch_size):
        batch = {name: array[start : start + batch_size] for name, array in rows.arrays.items()}
        missing = batch_size - len(batch["input_ids"])
        for name, array in batch.items():
            # One compiled shape: the last batch is filled up with rows in which nothing is learnt.
            fill = IGNORED_LABEL if name == "labels" else 0
            batch[name] = np.pad(array, ((0, missing), (0, 0)), constant_values=fill)[rank * local : (rank + 1) * local]
        loss, count, gate = step(trainable, frozen, put(batch))
        total, tokens, gates = total + float(loss), tokens + int(count), gates + np.asarray(gate, np.float64)
    return total / max(tokens, 1), gates / max(tokens, 1)


class _Log:
    """Times and metrics of the steps."""

    def __init__(
        self,
        config: TrainConfig,
        schedule: Callable[[Any], Any] | None,
        on_metrics: Callable[[int, str, Mapping[str, float]], None] | None,
    ) -> None:
        self.config, self.schedule, self.on_metrics = config, schedule, on_metrics
        self.writer: MetricsWriter | None = None
        self.history: list[dict[str, Any]] = []
        self._start = self._mark = time.perf_counter()
        self._data = self._data_begun = 0.0
        self._all_data = self._all_tokens = self._all_learnt = 0.0
        self._steps = 0
        self._losses: list[float] = []
        self._tokens = self._learnt = 0.0
        self.latest: dict[str, float] = {}

    def begin_data(self) -> None:
        self._data_begun = time.perf_counter()

    def end_data(self) -> None:
        self._data += time.perf_counter() - self._data_begun

    def step(self, number: int, metrics: Mapping[str, Any], tokens: int, last: bool = False) -> Mapping[str, float]:
        """Take up one step's metrics and its number of tokens, learnt or not; write an entry when it is due."""
        values = {name: float(value) for name, value in metrics.items()}
        self._steps += 1
        self._tokens += tokens
        self._learnt += values["tokens"]
        if values["finite"]:
            self._losses.append(values["loss"])
        if number % self.config.log_every == 0 or last:
            now = time.perf_counter()
            elapsed = max(now - self._mark, 1e-9)
            entry = {
                "loss": float(np.mean(self._losses)) if self._losses else float("nan"),
                **{name: value for name, value in values.items() if name in ("grad_norm", "regularization")},
                "tokens_per_second": self._tokens / elapsed,
                "learnt_tokens_per_second": self._learnt / elapsed,
                "data_share": self._data / elapsed,
            }
            if self.schedule is not None:
                entry["learning_rate"] = float(self.schedule(number - 1))
            self.write(number, "train", entry)
            self.latest = entry
            self._all_tokens += self._tokens
            self._all_learnt += self._learnt
            self._all_data += self._data
            self._mark, self._data, self._tokens, self._learnt, self._losses = now, 0.0, 0.0, 0.0, []
        return {**self.latest, "loss": values["loss"]}

    def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        self.history.append({"step": step, "kind": kind, **values})
        if self.writer is not None:
            self.writer.write(step, kind, values)
        if self.on_metrics is not None:
            self.on_metrics(step, kind, values)

    def summary(self) -> dict[str, float]:
        elapsed = max(time.perf_counter() - self._start, 1e-9)
        return {
            "steps_per_second": self._steps / elapsed,
            "tokens_per_second": self._all_tokens / elapsed,
            "learnt_tokens_per_second": self._all_learnt / elapsed,
            "data_share": self._all_data / elapsed,
            **peak_memory(),
        }


class _Preemption:
    """Whether SIGTERM has come; a context manager, which puts the old handler back."""

    def __init__(self) -> None:
        self._came = False
        self._old: Any = None
        # Python runs handlers in the main thread, and allows none to be set from others.
        self._main = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> _Preemption:
        if self._main and jax.process_count() == 1:
            self._old = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        if self._old is not None:
            signal.signal(signal.SIGTERM, self._old)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._came = True

    def asked(self, step: int) -> bool:
        """Whether to stop after this step; several processes agree on the step."""
        if jax.process_count() == 1:
            return self._came
        from jax.experimental import multihost_utils

        return bool(multihost_utils.reached_preemption_sync_point(step))


@contextmanager
def _progress(steps: int, started: int, show: bool) -> Iterator[Callable[..., None]]:
    """Give a function of (step, values) that moves a bar."""
    if not show or jax.process_index() != 0:
        yield lambda *_: None
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = [
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TextColumn("{task.fields[rate]:,.0f} tokens/s, {task.fields[learnt]:,.0f} learnt"),
        TextColumn("{task.fields[share]:.0%} in data"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    ]
    with Progress(*columns) as bar:
        task = bar.add_task("", total=steps, completed=started, loss=float("nan"), rate=0.0, learnt=0.0, share=0.0)

        def update(step: int, values: Mapping[str, float]) -> None:
            bar.update(
                task,
                completed=step,
                loss=values["loss"],
                rate=values.get("tokens_per_second", 0.0),
                learnt=values.get("learnt_tokens_per_second", 0.0),
                share=values.get("data_share", 0.0),
            )

        yield update


def _save_settings(output: Path, config: TrainConfig, latest: int | None, *, own_optimizer: bool) -> None:
    """Write ``train_config.json``; where checkpoints are already, they must be of the same settings."""
    path = output / "train_config.json"
    if latest is not None and path.exists():
        was = TrainConfig(**json.loads(path.read_text(encoding="utf-8"))).fixed()
        now = config.fixed()
        differ = [f"{name}: {was[name]!r} there, {now[name]!r} now" for name in now if now[name] != was[name]]
        if differ and not own_optimizer:
            raise ValueError(
                f"{output} holds a run with other settings ({'; '.join(differ)}): give the same ones to go on with it, "
                f"or another output directory"
            )
    if jax.process_index() == 0:
        try:
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n", encoding="utf-8")
            os.replace(partial, path)
        except OSError as error:
            raise CheckpointError(f"{path}: the settings can't be written ({error})") from error
