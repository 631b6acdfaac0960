"""Checkpoints of training, with orbax: what learns, the optimiser's state, counts, RNG, and where the data stands.

The frozen base is never saved. Saving is asynchronous: arrays are copied to the host, and written while training goes
on. A checkpoint is complete or is not there; one that can't be written leaves the earlier ones as they are.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp

from xlora_jax.training.step import TrainState

__all__ = ["CheckpointError", "Checkpoints"]


class CheckpointError(OSError):
    """A checkpoint that can't be written or read; the message says which, why, and what is left."""


class Checkpoints:
    """The checkpoints of one run, ``<directory>/<step>``.

    Usable as a context manager, which waits for what is being written.
    """

    def __init__(self, directory: str | Path, *, keep: int = 2) -> None:
        """Open or create a directory of checkpoints.

        Args:
            directory: of this run alone.
            keep: how many of the latest to keep.

        Raises:
            CheckpointError: the directory can't be created or written to.
        """
        self.directory = Path(os.path.abspath(directory))
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            probe = self.directory / f".writable-{os.getpid()}"
            probe.write_bytes(b"?")
            probe.unlink()
        except OSError as error:
            raise CheckpointError(f"{self.directory}: no checkpoints can be written here ({error})") from error
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=True, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def __enter__(self) -> Checkpoints:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Wait for what is being written, unless an error is on its way already."""
        try:
            self.wait()
        except CheckpointError:
            if error is None:
                raise
        finally:
            self._manager.close()

    @property
    def latest(self) -> int | None:
        """Step of the latest complete checkpoint, or None."""
        step: int | None = self._manager.latest_step()
        return step

    def save(self, state: TrainState, data: Mapping[str, Any]) -> None:
        """Begin to write a checkpoint of ``state`` under its step.

        Args:
            state: as of now; it may be donated to the next step at once.
            data: JSON values: where the loader stands, and whatever else is to come back.

        Raises:
            CheckpointError: this one or the one before can't be written.
        """
        step = int(state.step)
        try:
            self._manager.check_for_errors()
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(_plain(state)),
                    data=ocp.args.JsonSave({"shapes": _shapes(state), "data": dict(data)}),
                ),
            )
        except Exception as error:
            raise self._failed(step, error) from error

    def check(self) -> None:
        """Raise CheckpointError if one can't be written, as soon as that is known."""
        try:
            self._manager.check_for_errors()
        except Exception as error:
            raise self._failed(None, error) from error

    def wait(self) -> None:
        """Wait until everything is written.

        Raises:
            CheckpointError: it can't be.
        """
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:
            raise self._failed(None, error) from error

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """Read the latest checkpoint, or return None if there is none.

        Args:
            like: a state of the same shapes; what is read lies where its arrays lie, so on any mesh.

        Returns:
            The state, and the JSON values saved with it.

        Raises:
            CheckpointError: it can't be read, or has other shapes.
        """
        step = self.latest
        if step is None:
            return None
        target = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), _plain(like)
        )
        where = self.directory / str(step)
        try:
            described = self._manager.restore(step, args=ocp.args.Composite(data=ocp.args.JsonRestore()))["data"]
            there, here = described["shapes"], _shapes(like)
            differ = sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name))
            if differ:
                name = differ[0]
                raise CheckpointError(
                    f"{where}: is of another model or optimiser: {name} is {there.get(name, 'absent')} there and "
                    f"{here.get(name, 'absent')} here, {len(differ)} arrays differ in all. Give the settings of the "
                    f"run that wrote it, or another output directory."
                )
            leaves = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target)))[
                "state"
            ]
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"{where}: can't be read ({type(error).__name__}: {error}). Remove it to go on from the checkpoint "
                f"before it, or give another output directory."
            ) from error
        state = TrainState(
            **{name: leaves[name] for name in leaves if name != "rng"},
            rng=jax.random.wrap_key_data(leaves["rng"], impl=jax.random.key_impl(like.rng)),
        )
        return state, dict(described["data"])

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


def _shapes(state: TrainState) -> dict[str, str]:
    """Shape and dtype of every array, by path."""
    return {
        jax.tree_util.keystr(path): f"{leaf.dtype.name}{list(leaf.shape)}"
        for path, leaf in jax.tree.leaves_with_path(_plain(state))
    }


def _plain(state: TrainState) -> dict[str, Any]:
    """The state as a dict of plain arrays: the PRNG key as its data."""
    return {
        "step": state.step,
        "trainable": state.trainable,
        "opt_state": state.opt_state,
        "rng": jax.random.key_data(state.rng),
        "skipped": state.skipped,
        "skipped_in_row": state.skipped_in_row,
    }
