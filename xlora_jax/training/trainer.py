"""Training runs: loop, meshes, checkpoints, evaluation, metrics, preemption.

The step itself is :func:`xlora_jax.training.step.make_train_step`. This module runs around it, on the host.
"""

from __future__ import annotations

import dataclasses
import warnings
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

from xlora_jax.atomic import read_json_object, replace_json, replacing_file
from xlora_jax.model import XLoraModel
from xlora_jax.sharding import make_mesh, put_batch, shard_params, state_shardings
from xlora_jax.training.checkpoints import CheckpointError, Checkpoints
from xlora_jax.training.config import TrainConfig
from xlora_jax.training.data import Loader, Rows
from xlora_jax.training.evaluation import evaluate
from xlora_jax.training.fingerprint import differences, read_fingerprint, run_fingerprint, versions_differ
from xlora_jax.training.metrics import MetricsWriter
from xlora_jax.training.optimizers import only_expert
from xlora_jax.training.preemption import Preemption
from xlora_jax.training.run_lock import run_lock
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

__all__ = ["NonFiniteError", "TrainResult", "Trainer", "mesh_of", "train"]


class NonFiniteError(ArithmeticError):
    """Too many steps in a row whose loss or gradient was not finite."""


@dataclass(frozen=True)
class TrainResult:
    """Result of a run.

    Attributes:
        model: trained model, in the dtype it was loaded in.
        state: final training state.
        finished: whether all steps are done. False after SIGTERM: the same call resumes the run.
        history: entries of the metrics from this call.
        summary: steps per second, tokens per second (all, and learned), share of time waiting for data, peak memory.
    """

    model: XLoraModel
    state: TrainState
    finished: bool
    history: list[dict[str, Any]] = field(repr=False)
    summary: dict[str, float]


def mesh_of(config: TrainConfig) -> Mesh | None:
    """Return the mesh that the settings describe, or None on one device."""
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
    on_metrics: Callable[[int, str, Mapping[str, float]], None] | None = None,
    show_progress: bool = False,
) -> TrainResult:
    """Train the classifier of a model, and with ``use_trainable_adapters`` its experts.

    With an ``output`` the run can be resumed: the same call continues from its latest checkpoint. The result is exact
    to the bit on the same devices. (Another mesh adds in another order, so last bits differ.) A call with other rows,
    parameters or settings is refused, unless ``config.allow_changed``. On SIGTERM, a checkpoint is saved and the
    function returns.

    Args:
        model: initial model.
        rows: training data.
        config: settings of the run.
        eval_rows: mapping of names to held-out rows.
        output: directory for checkpoints, metrics and settings. None writes nothing.
        optimizer: any optax transformation, instead of the one that ``config`` names.
        mesh: device mesh; default :func:`mesh_of` the settings.
        on_metrics: function called with (step, ``train`` or ``eval``, values) for every entry.
        show_progress: whether to show a bar with loss, tokens per second and the share of time waiting for data.

    Returns:
        The trained model, the state and the logged metrics.

    Raises:
        NonFiniteError: ``max_bad_steps`` steps in a row were not finite; the last batch is saved in ``output``.
        CheckpointError: a checkpoint can't be written or read.
        RunLockedError: another process is training into ``output``.
        ValueError: the settings conflict, a token is outside the base model's vocabulary, or the inputs differ from
            those of the run in ``output``.
    """
    trainer = Trainer(
        model,
        rows,
        config,
        eval_rows=eval_rows,
        output=output,
        optimizer=optimizer,
        mesh=mesh,
        on_metrics=on_metrics,
    )
    return trainer.run(show_progress=show_progress)


class Trainer:
    """A run: compiled functions, state, data, checkpoints, log and stop signal.

    The arguments are those of :func:`train`. :meth:`run` is the loop; nothing is written before it.
    """

    def __init__(
        self,
        model: XLoraModel,
        rows: Rows,
        config: TrainConfig,
        *,
        eval_rows: Mapping[str, Rows] | None = None,
        output: str | Path | None = None,
        optimizer: optax.GradientTransformation | None = None,
        mesh: Mesh | None = None,
        on_metrics: Callable[[int, str, Mapping[str, float]], None] | None = None,
    ) -> None:
        self.model, self.config, self.eval_rows = model, config, dict(eval_rows or {})
        self.output = None if output is None else Path(output)
        vocab_size = getattr(model.module.config, "vocab_size", None)
        for part in (rows, *self.eval_rows.values()):
            part.check_vocabulary(vocab_size)
        self.mesh = mesh_of(config) if mesh is None else mesh
        self.own_optimizer = optimizer is not None
        self.optimizer = config.make_optimizer() if optimizer is None else optimizer
        if config.only_expert is not None:
            self.optimizer = self._only_expert(config.only_expert)
        self.xlora = dataclasses.replace(
            model.xlora,
            module=model.module.clone(remat=config.remat, attention=config.attention),
            gate_dtype=None if config.gate_dtype is None else jnp.dtype(config.gate_dtype),
        )
        self.cache = self._open_cache() if config.scaling_cache != "off" else None
        self.rows = rows
        self.loader = Loader(
            rows,
            config.batch_size,
            seed=config.seed,
            accumulate=config.accumulate,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        self.log = RunLog(
            config, None if self.own_optimizer else config.make_schedule(), on_metrics, model.expert_names
        )
        self.stop = Preemption()
        self.checkpoints: Checkpoints | None = None
        self._saved = 0
        self._place_and_compile()

    def _only_expert(self, name: str) -> optax.GradientTransformation:
        names, config = self.model.expert_names, self.model.config
        if name not in names:
            raise ValueError(f"only_expert: no expert {name!r}; the experts are {', '.join(names)}")
        if config.use_trainable_adapters:
            raise ValueError("only_expert trains the gate alone: expected use_trainable_adapters=False")
        return only_expert(self.optimizer, config.xlora_depth, len(names), names.index(name))

    def _place_and_compile(self) -> None:
        """Put parameters and optimizer state on their devices, and make the compiled functions."""
        config, mesh = self.config, self.mesh
        params = self.model.params if mesh is None else shard_params(self.model.params, mesh)
        dtype = None if config.param_dtype is None else jnp.dtype(config.param_dtype)
        self.state, self.frozen = init_train_state(params, self.model.config, self.optimizer, config.seed, dtype)
        shardings = None
        if mesh is not None:
            shardings = state_shardings(jax.eval_shape(lambda state: state, self.state), self.optimizer, mesh)
            self.state = jax.jit(lambda state: state, out_shardings=shardings)(self.state)
        self._step = make_train_step(
            self.xlora,
            self.optimizer,
            accumulate=config.accumulate,
            loss_chunk=config.loss_chunk,
            regularizers=config.regularizers,
            mesh=mesh,
            state_shardings=shardings,
        )
        self._eval_step = make_eval_step(self.xlora, loss_chunk=config.loss_chunk, mesh=mesh)
        self._scaling_step = make_scaling_step(self.xlora, mesh=mesh)

    def _open_cache(self) -> ScalingCache:
        if jax.process_count() > 1:
            raise ValueError("scaling_cache: expected one process; rows can't be read back across processes")
        directory = self.config.scaling_cache_directory
        if self.config.scaling_cache == "memory":
            directory = None
        elif directory is None:
            if self.output is None:
                raise ValueError(
                    "scaling_cache disk: expected scaling_cache_directory or an output directory, got neither"
                )
            directory = str(self.output / "scaling_cache")
        return ScalingCache(fingerprint(self.xlora, self.model.params), self.config.scaling_cache_dtype, directory)

    def run(self, *, show_progress: bool = False, locked: bool = False) -> TrainResult:
        """Run the remaining steps, from the latest checkpoint if there is one.

        Args:
            show_progress: whether to show a bar with loss, tokens per second and the share of time waiting for data.
            locked: whether the caller holds the :func:`~xlora_jax.training.run_lock.run_lock` of the output directory.
        """
        with ExitStack() as stack:
            if self.output is not None and jax.process_index() == 0 and not locked:
                stack.enter_context(run_lock(self.output))
            started = 0 if self.output is None else self._resume(self.output, stack)
            progress = stack.enter_context(progress_bar(self.config.steps, started, show_progress))
            stack.enter_context(self.stop)
            finished = self._loop(started, progress)
        return TrainResult(self.trained(), self.state, finished, self.log.history, self.log.summary())

    def _resume(self, output: Path, stack: ExitStack) -> int:
        """Open the run's files, restore the latest checkpoint, and return its step."""
        self.checkpoints = stack.enter_context(Checkpoints(output / "checkpoints", keep=self.config.keep_checkpoints))
        model = self.model
        inputs = run_fingerprint(self.xlora, model.params, model.expert_names, self.rows)
        _settle(output, self.config, inputs, self.checkpoints.latest, own_optimizer=self.own_optimizer)
        found = self.checkpoints.restore(self.state)
        started = 0
        if found is not None:
            self.state, data = found
            started = int(self.state.step)
            try:
                self.loader.set_state(data["loader"])
                self.log.set_state(data["log"])
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                raise CheckpointError(
                    f"{output / 'checkpoints' / str(started)}: expected where the data and the log stand, got "
                    f"{data!r:.200} ({type(error).__name__}: {error}); remove this checkpoint to go on from the one "
                    f"before"
                ) from error
        if jax.process_index() == 0:
            writer = MetricsWriter(output, resumed_at=started, tensorboard=self.config.tensorboard)
            self.log.writer = stack.enter_context(writer)
        return started

    def _loop(self, started: int, progress: Callable[[int, Mapping[str, float]], None]) -> bool:
        """Run the steps after ``started``; return False if stopped by SIGTERM."""
        config = self.config
        previous: tuple[jax.Array, Mapping[str, Any], Mapping[str, NDArray[Any]], int] | None = None
        number = self._saved = started
        for number in range(started + 1, config.steps + 1):
            self.log.begin_data()
            batch = next(self.loader)
            arrays = self._put(batch)
            self.log.end_data()
            self.state, metrics = self._step(self.state, self.frozen, arrays)
            # The previous step's metrics are read while this one runs, so the device never waits for the host.
            if previous is not None:
                self._check_finite(number - 1, previous[0], previous[2])
                progress(number - 1, self.log.step(number - 1, previous[1], previous[3]))
            tokens = self.loader.rows.count(batch["row"]) * jax.process_count()
            previous = (jnp.copy(self.state.skipped_in_row), metrics, batch, tokens)
            if self.checkpoints is not None:
                self.checkpoints.check()
            stopping = self.stop.asked(number)
            if (config.eval_every and number % config.eval_every == 0) or number == config.steps:
                self._evaluate(number)
            due = config.checkpoint_every and number % config.checkpoint_every == 0
            if self.checkpoints is not None and number < config.steps and (due or stopping):
                # Write the step's entry before the checkpoint, so that a kill in between does not lose it.
                progress(number, self.log.step(number, metrics, tokens))
                self._check_finite(number, previous[0], previous[2])
                previous = None
                self._save(number)
            if stopping:
                break
        if previous is not None:
            progress(number, self.log.step(number, previous[1], previous[3], last=True))
            self._check_finite(number, previous[0], previous[2])
        if self.checkpoints is not None and number > self._saved:
            self._save(number)
            self.checkpoints.wait()
        return number >= config.steps

    def _put(self, batch: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
        """Put a batch of the loader on the devices, with its cached scaling pass if there is a cache."""
        batch = {name: array for name, array in batch.items() if name != "row"}
        if self.cache is not None:
            flat = {name: array.reshape(-1, array.shape[-1]) for name, array in batch.items()}
            keys = self.cache.keys(flat)
            hidden = self.cache.get(keys)
            if hidden is None:
                inputs = {name: array for name, array in flat.items() if name != "labels"}
                hidden = self.cache.put(keys, self._scaling_step(self.frozen, self._on_devices(inputs, 1)))
            batch["scaling_hidden"] = hidden.reshape(*batch["input_ids"].shape, -1)
        return self._on_devices(batch, self.config.accumulate)

    def _on_devices(self, batch: Mapping[str, NDArray[Any]], accumulate: int) -> dict[str, Any]:
        if self.mesh is None:
            return {name: jnp.asarray(array) for name, array in batch.items()}
        return dict(put_batch(batch, self.mesh, accumulate))

    def _save(self, number: int) -> None:
        if self.checkpoints is not None:
            self.log.flush()
            self.checkpoints.save(self.state, {"loader": self.loader.get_state(), "log": self.log.get_state()})
            self._saved = number

    def _evaluate(self, number: int) -> None:
        """Log the held-out loss of each data set as ``{name}_loss``, in nats per token over all rows."""
        for name, rows in self.eval_rows.items():
            loss, _ = evaluate(
                self._eval_step,
                self.state.trainable,
                self.frozen,
                rows,
                self.config.batch_size,
                lambda batch: self._on_devices(batch, 1),
            )
            self.log.write(number, "eval", {f"{name}_loss": loss})

    def _check_finite(self, step: int, skipped_in_row: jax.Array, batch: Mapping[str, NDArray[Any]]) -> None:
        if int(skipped_in_row) < self.config.max_bad_steps:
            return
        where = "give an output directory to have it saved"
        if self.output is not None:
            path = self.output / f"bad_batch_step_{step}_process_{jax.process_index()}.npz"
            arrays: dict[str, Any] = dict(batch)
            with replacing_file(path) as file:
                np.savez_compressed(file, **arrays)
            where = f"saved as {path}"
        raise NonFiniteError(
            f"step {step}: loss or gradient was not finite for {int(skipped_in_row)} steps in a row. Nothing was "
            f"learned from them; the last batch is {where}. Lower the learning rate, or compute in float32 or bfloat16 "
            f"instead of float16."
        )

    def trained(self) -> XLoraModel:
        """Return the model with the learned parameters, in its own dtypes and unsharded on every calling process."""
        learned = self.state.trainable
        if self.mesh is not None:
            whole = NamedSharding(self.mesh, P())
            learned = jax.jit(lambda tree: tree, out_shardings=whole)(learned)
        merged = merge_params(learned, self.frozen)
        dtypes = jax.tree.map(lambda leaf: leaf.dtype, dict(self.model.params))
        params = jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), merged, dtypes)
        return self.model.replace(params=params)


def _read_settings(path: Path) -> TrainConfig:
    values = read_json_object(path)
    try:
        return TrainConfig(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: expected the settings of a run ({str(error)[:500]}); restore the file, or give another "
            f"output directory"
        ) from error


_MOST_NAMED = 10


def _settle(
    output: Path, config: TrainConfig, inputs: Mapping[str, Any], latest: int | None, *, own_optimizer: bool
) -> None:
    """Compare a run's settings and inputs with those of the existing checkpoints, then write them to disk.

    Raises:
        ValueError: they differ, and ``config.allow_changed`` is off; the message names the differences.
        CheckpointError: the settings or inputs can't be written.
    """
    settings, fingerprint = output / "train_config.json", output / "fingerprint.json"
    if latest is not None:
        differ, unknown = [], []
        if settings.exists():
            was = _read_settings(settings).fixed(own_optimizer=own_optimizer)
            now = config.fixed(own_optimizer=own_optimizer)
            differ += [f"{name}: {was[name]!r} there, {now[name]!r} now" for name in now if now[name] != was[name]]
        else:
            unknown.append("settings")
        if fingerprint.exists():
            stored = read_fingerprint(fingerprint)
            differ += differences(stored, inputs)
            if versions := versions_differ(stored, inputs):
                _warn(f"{output} holds a run of other versions ({', '.join(versions)}): results may differ")
        else:
            unknown.append("inputs")
        if len(differ) > _MOST_NAMED:
            differ[_MOST_NAMED:] = [f"and {len(differ) - _MOST_NAMED} more"]
        if differ and not config.allow_changed:
            raise ValueError(
                f"{output} holds a run with other settings or inputs ({'; '.join(differ)}): give the same ones to go "
                f"on with it, or another output directory; allow_changed (--allow-changed) goes on all the same"
            )
        if differ:
            _warn(f"{output}: the run goes on with other settings or inputs, as allowed ({'; '.join(differ)})")
        if unknown:
            _warn(
                f"{output} holds checkpoints, but no record of the {' and '.join(unknown)} that they came from: see "
                f"to it that they are the same"
            )
    if jax.process_index() == 0:
        try:
            replace_json(fingerprint, inputs)
            replace_json(settings, dataclasses.asdict(dataclasses.replace(config, allow_changed=False)))
        except OSError as error:
            raise CheckpointError(f"{output}: settings and inputs can't be written down ({error})") from error


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=5)
