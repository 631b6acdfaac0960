"""A whole training run: loop, meshes, checkpoints, evaluation, metrics, preemption.

The step is :func:`xlora_jax.training.step.make_train_step`; everything here happens around it, on the host.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.typing import NDArray

from xlora_jax.model import XLoraModel
from xlora_jax.sharding import make_mesh, put_batch, shard_params, state_shardings
from xlora_jax.training.checkpoints import CheckpointError, Checkpoints
from xlora_jax.training.config import TrainConfig
from xlora_jax.training.data import Loader, Rows
from xlora_jax.training.evaluation import evaluate
from xlora_jax.training.metrics import MetricsWriter
from xlora_jax.training.preemption import Preemption
from xlora_jax.training.run_log import RunLog, progress_bar
from xlora_jax.training.scaling_cache import ScalingCache, fingerprint
from xlora_jax.training.step import (
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
class TrainResult:
    """What a run gives.

    Attributes:
        model: the trained model, in the dtype it was loaded in.
        state: where training stands.
        finished: False where SIGTERM ended it early; the same call goes on from there.
        history: the entries of the metrics, of this call.
        summary: steps per second, tokens per second, share of time in data, peak memory.
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
        ValueError: settings that do not go together.
    """
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
        log = RunLog(config, run.schedule if optimizer is None else None, on_metrics)
        if output is not None and jax.process_index() == 0:
            log.writer = stack.enter_context(MetricsWriter(output, resumed_at=started, tensorboard=config.tensorboard))
        progress = stack.enter_context(progress_bar(config.steps, started, show_progress))
        stop = stack.enter_context(Preemption())
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
    log: RunLog,
    progress: Callable[..., None],
    stop: Preemption,
    eval_rows: Mapping[str, Rows],
    started: int,
    output: str | Path | None,
) -> bool:
    """Take the steps; False if stopped by SIGTERM."""
    before: tuple[Any, Any, Mapping[str, NDArray[Any]]] | None = None
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
            progress(number - 1, log.step(number - 1, before[1]))
        before = (jnp.copy(run.state.skipped_in_row), metrics, batch)
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
        progress(number, log.step(number, before[1], last=True))
        _check_finite(before, config, output, number)
    if checkpoints is not None and number > saved:
        checkpoints.save(run.state, {"loader": loader.get_state()})
        checkpoints.wait()
    return number >= config.steps


def _check_finite(before: Any, config: TrainConfig, output: str | Path | None, step: int) -> None:
    in_row, _, batch = before
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
