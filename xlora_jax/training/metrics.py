"""Write metrics of a run as JSON lines and for TensorBoard."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from xlora_jax.atomic import open_to_append, replacing_file

__all__ = ["MetricsWriter", "peak_memory", "read_metrics"]


class MetricsWriter:
    """Writer of ``metrics.jsonl`` and TensorBoard's files, a context manager.

    A resumed run drops the entries logged after its checkpoint, so no step occurs twice.
    """

    def __init__(self, directory: str | Path, *, resumed_at: int = 0, tensorboard: bool = True) -> None:
        """Open the files.

        Args:
            directory: path of the run, created if missing.
            resumed_at: number of the checkpoint's step; entries of later steps are dropped.
            tensorboard: whether to write TensorBoard's files too, in ``directory/tensorboard``; needs ``tensorboardX``.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "metrics.jsonl"
        _keep_until(path, resumed_at)
        self._file = open_to_append(path)
        self._board: Any = None
        if tensorboard:
            from tensorboardX import SummaryWriter  # type: ignore[import-untyped,unused-ignore]

            self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=resumed_at + 1)

    def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Write one entry: ``kind`` is ``train`` or ``eval``."""
        self._file.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def flush(self) -> None:
        """Flush all entries to disk, so that even a power cut loses none."""
        os.fsync(self._file.fileno())
        if self._board is not None:
            self._board.flush()

    def __enter__(self) -> MetricsWriter:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def _keep_until(path: Path, step: int) -> None:
    """Drop entries of later steps, and an incomplete last line."""
    if not path.exists():
        return
    with replacing_file(path) as file:
        file.writelines(line + b"\n" for line, entry in _lines(path) if entry["step"] <= step)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Return the entries of a run's ``metrics.jsonl``, without an incomplete last line.

    Raises:
        ValueError: a line is no entry; the message names it.
        OSError: the file can't be read.
    """
    return [entry for _, entry in _lines(Path(path))]


def _lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    found = []
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line.decode("utf-8"))
            if type(entry["step"]) is not int:
                raise TypeError(f"step is {entry['step']!r:.40}")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            if number == len(lines) and not isinstance(error, KeyError | TypeError):
                continue
            raise ValueError(
                f"{path}, line {number}: expected a JSON object with a whole number step, got {line[:80]!r}; correct "
                f"or remove the line, or give another output directory"
            ) from error
        found.append((line, entry))
    return found


def peak_memory() -> dict[str, float]:
    """Return the peak memory so far in GiB, of the host process and of the first device if the backend reports it."""
    import resource
    import sys

    import jax

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    found = {"peak_host_gib": peak / 2**30}
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        found["peak_device_gib"] = stats["peak_bytes_in_use"] / 2**30
    return found
