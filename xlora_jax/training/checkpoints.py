"""Training checkpoints, with orbax: trainable parameters, optimizer state, counts, RNG and data position.

The frozen base is never saved. Saving is asynchronous: arrays are copied to the host, and written while training goes
on. A checkpoint is either complete or absent. If one can't be written, the earlier ones stay as they are. Each has
checksums of its arrays and of its JSON. A damaged one is set aside with a warning, and the one before it is restored.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import uuid
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from xlora_jax.atomic import check_writable
from xlora_jax.training.checksums import checksums
from xlora_jax.training.step import TrainState

__all__ = ["CheckpointError", "Checkpoints"]


_METADATA = "_CHECKPOINT_METADATA"


class CheckpointError(OSError):
    """A checkpoint that can't be written or read. The message names it, the reason and the checkpoints left."""


class Checkpoints:
    """The checkpoints of one run, ``<directory>/<step>``.

    Usable as a context manager, which waits for pending writes.
    """

    def __init__(self, directory: str | Path, *, keep: int = 2) -> None:
        """Open or create a directory of checkpoints.

        Args:
            directory: path of a directory that no other run uses.
            keep: number of the latest checkpoints to keep.

        Raises:
            CheckpointError: the directory can't be created or written to.
        """
        self.directory = Path(os.path.abspath(directory))
        try:
            check_writable(self.directory)
        except OSError as error:
            raise CheckpointError(f"{self.directory}: no checkpoints can be written here ({error})") from error
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=True, cleanup_tmp_directories=True
        )
        try:
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        except Exception as error:
            self._set_metadata_aside(error)
            try:
                self._manager = ocp.CheckpointManager(self.directory, options=options)
            except Exception as again:
                raise CheckpointError(
                    f"{self.directory}: these checkpoints can't be opened ({type(again).__name__}: {again}). Remove "
                    f"the directory to start anew, or give another output directory."
                ) from again

    def __enter__(self) -> Checkpoints:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Wait for pending writes, unless an error is already being raised."""
        try:
            self.wait()
        except CheckpointError:
            if error is None:
                raise
        finally:
            self._manager.close()

    @property
    def latest(self) -> int | None:
        """Return the step of the latest complete checkpoint, or None."""
        step: int | None = self._manager.latest_step()
        return step

    def save(self, state: TrainState, data: Mapping[str, Any]) -> None:
        """Begin to write a checkpoint of ``state``, named by its step.

        Args:
            state: current training state; it may be donated to the next step at once.
            data: JSON values: the loader's position, and anything else to restore.

        Raises:
            CheckpointError: this checkpoint or the previous one can't be written.
        """
        step = int(state.step)
        plain = _plain(state)
        # A copy: writing is asynchronous, and the caller may change its values meanwhile.
        data = copy.deepcopy(dict(data))
        described = {"shapes": _shapes(plain), "checksums": checksums(_named(plain)), "data": data}
        try:
            self._manager.check_for_errors()
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(plain),
                    data=ocp.args.JsonSave({**described, "sha256": _digest(described)}),
                ),
            )
        except Exception as error:
            raise self._failed(step, error) from error

    def check(self) -> None:
        """Raise CheckpointError if a pending write has failed."""
        try:
            self._manager.check_for_errors()
        except Exception as error:
            raise self._failed(None, error) from error

    def wait(self) -> None:
        """Wait until everything is written.

        Raises:
            CheckpointError: a checkpoint can't be written.
        """
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:
            raise self._failed(None, error) from error

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """Read the latest undamaged checkpoint, or return None if there are no checkpoints.

        Once an earlier one has been read, a damaged one is renamed to ``damaged-<step>-...``, with a warning.

        Args:
            like: state of the same shapes, on any mesh; the restored arrays get its shardings.

        Returns:
            The state, and the JSON values saved with it.

        Raises:
            CheckpointError: no checkpoint can be read, or the latest has other shapes.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        damaged: dict[int, str] = {}
        for step in steps:
            where = self.directory / str(step)
            found, reason = None, ""
            try:
                found = self._read(step, like)
            except CheckpointError:
                raise
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
            if not _all_agree(found is not None):
                damaged[step] = reason or "another process can't read it"
                continue
            for number, why in damaged.items():
                aside = self._set_aside(number)
                warnings.warn(
                    f"{self.directory / str(number)}: this checkpoint is damaged ({why}). It was renamed to {aside}, "
                    f"and training goes on from step {step}.",
                    UserWarning,
                    stacklevel=2,
                )
            if damaged:
                self._manager.reload()
            return found
        if not damaged:
            return None
        why = "; ".join(f"step {step}: {reason}" for step, reason in damaged.items())
        raise CheckpointError(
            f"{where}: no checkpoint can be read ({why}). Remove {self.directory} to start anew, or give another "
            f"output directory."
        )

    def _read(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Read one checkpoint; raise CheckpointError if it is of another model, any other error if it is damaged."""
        where = self.directory / str(step)
        described = self._manager.restore(step, args=ocp.args.Composite(data=ocp.args.JsonRestore()))["data"]
        file = where / "data" / "metadata"
        if not isinstance(described, dict) or not all(
            isinstance(described.get(name), dict) for name in ("shapes", "checksums", "data")
        ):
            raise ValueError(f"{file}: expected objects shapes, checksums and data")
        if described.pop("sha256", None) != _digest(described):
            raise ValueError(f"{file}: its checksum differs")
        plain = _plain(like)
        there, here = described["shapes"], _shapes(plain)
        differ = sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name))
        if differ:
            name = differ[0]
            raise CheckpointError(
                f"{where}: is of another model or optimizer: {name} is {there.get(name, 'absent')} there and "
                f"{here.get(name, 'absent')} here, {len(differ)} arrays differ in all. Give the settings of the "
                f"run that wrote it, or another output directory."
            )
        target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), plain)
        leaves = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target)))["state"]
        found = checksums(_named(leaves))
        changed = sorted(name for name, value in described["checksums"].items() if found.get(name) != value)
        if changed or found.keys() != described["checksums"].keys():
            raise ValueError(
                f"{where / 'state'}: the checksums of {', '.join(changed[:3])} differ, {len(changed)} in all"
            )
        state = TrainState(
            **{name: leaves[name] for name in leaves if name != "rng"},
            rng=jax.random.wrap_key_data(leaves["rng"], impl=jax.random.key_impl(like.rng)),
        )
        return state, dict(described["data"])

    def _set_metadata_aside(self, error: Exception) -> None:
        """Rename orbax's metadata files: it reads all of them at once, and can work without them."""
        found = sorted(self.directory.glob(f"[0-9]*/{_METADATA}"))
        if jax.process_index() == 0:
            for path in found:
                os.rename(path, path.with_name(f"damaged{_METADATA}"))
        _all_agree(True)
        warnings.warn(
            f"{self.directory}: a damaged {_METADATA} ({type(error).__name__}: {error}); those of {len(found)} "
            f"checkpoints were renamed to damaged{_METADATA}, and the checkpoints are read without.",
            UserWarning,
            stacklevel=3,
        )

    def _set_aside(self, step: int) -> Path:
        """Rename a damaged checkpoint, so that its step can be saved again and nothing is lost."""
        aside = self.directory / f"damaged-{step}-{uuid.uuid4().hex[:8]}"
        if jax.process_index() == 0:
            try:
                os.rename(self.directory / str(step), aside)
            except OSError as error:
                raise CheckpointError(
                    f"{self.directory / str(step)}: damaged, and can't be renamed ({error})"
                ) from error
        _all_agree(True)
        return aside

    def _failed(self, step: int | None, error: Exception) -> CheckpointError:
        which = "a checkpoint" if step is None else f"the checkpoint of step {step}"
        try:
            left = sorted(int(entry.name) for entry in self.directory.iterdir() if entry.name.isdigit())
        except OSError:
            left = []
        good = f"the last good one is of step {left[-1]}" if left else "there is no earlier one"
        return CheckpointError(
            f"{self.directory}: {which} can't be written ({type(error).__name__}: {error}); {good}. Make room, or the "
            f"directory writable, and start again with the same settings to go on from there."
        )


def _all_agree(holds: bool) -> bool:
    """Return whether ``holds`` is true on every process; wait for all of them."""
    if jax.process_count() == 1:
        return holds
    from jax.experimental import multihost_utils

    return bool(np.all(multihost_utils.process_allgather(np.array([holds]))))


def _named(plain: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Return every array by its path."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(plain)}


def _shapes(plain: Mapping[str, Any]) -> dict[str, str]:
    """Return the shape and dtype of every array by its path."""
    return {name: f"{leaf.dtype.name}{list(leaf.shape)}" for name, leaf in _named(plain).items()}


def _digest(described: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _plain(state: TrainState) -> dict[str, Any]:
    """Return the state as a dict of plain arrays, with the PRNG key as its data."""
    return {
        "step": state.step,
        "trainable": state.trainable,
        "opt_state": state.opt_state,
        "rng": jax.random.key_data(state.rng),
        "skipped": state.skipped,
        "skipped_in_row": state.skipped_in_row,
    }
