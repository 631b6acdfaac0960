"""The log of scalings of a model, as PEFT keeps it or within bounds, and its file.

Axes: B batch, T tokens, L adapted layers, N experts.
"""

from __future__ import annotations

import json
import threading
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from xlora_jax.atomic import replacing_file

__all__ = ["MODES", "ScalingsLog", "load_scalings_log"]

MODES = ("all", "reservoir", "mean", "every")
_FORMAT = "xlora-jax scalings log 1"


@dataclass
class ScalingsLog:
    """A log of scalings. All modes but ``all`` are bounded: their memory does not grow with the number of calls.

    ======================= ==================================================================================
    mode                    entries
    ======================= ==================================================================================
    ``all``                 every call, as in PEFT
    ``reservoir``           ``size`` calls, each of all calls with equal probability (algorithm R of Vitter, 1985)
    ``mean``                one entry ``[1, 1, L, N]``: the mean over all tokens of all calls, without padding
    ``every``               every ``every``-th call, the first included; of these the last ``size``
    ======================= ==================================================================================

    A log may be filled from several threads.

    Attributes:
        mode: one of :data:`MODES`.
        size: number of entries kept by ``reservoir`` and ``every``.
        every: distance of the calls kept by ``every``.
        seed: random seed of ``reservoir``.
        seen: number of calls so far.
        tokens: number of tokens in the mean.
    """

    mode: str = "all"
    size: int = 100
    every: int = 1
    seed: int = 0
    seen: int = 0
    tokens: int = 0
    _entries: list[tuple[int, Any]] = field(default_factory=list, repr=False)
    _sum: NDArray[np.float64] | None = field(default=None, repr=False)
    _dtype: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: the mode is unknown, or a number is below 1.
        """
        if self.mode not in MODES:
            raise ValueError(f"mode: expected {', '.join(MODES)}, got {self.mode!r}")
        for name in ("size", "every"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}")
        self._random = np.random.default_rng(self.seed)
        self._lock = threading.Lock()

    def record(self, scalings: jax.Array, mask: Any = None) -> None:
        """Add a call: its scalings ``[B, T, L, N]``, and its mask ``[B, T]``, zero at padding."""
        with self._lock:
            number = self.seen
            self.seen += 1
            if self.mode == "all":
                self._entries.append((number, scalings))
            elif self.mode == "mean":
                self._add(scalings, mask)
            elif self.mode == "every":
                if number % self.every == 0:
                    self._entries.append((number, np.asarray(scalings)))
                    del self._entries[: -self.size]
            elif number < self.size:
                self._entries.append((number, np.asarray(scalings)))
            else:
                place = int(self._random.integers(0, number + 1))
                if place < self.size:
                    del self._entries[place]
                    # The order of the entries is that of their calls, so each place is as probable as any other.
                    self._entries.append((number, np.asarray(scalings)))

    def _add(self, scalings: jax.Array, mask: Any) -> None:
        values = np.asarray(scalings).astype(np.float64)
        counted = np.ones(values.shape[:2], bool) if mask is None else np.asarray(mask) != 0
        total = values[counted].sum(axis=0)
        if self._sum is not None and self._sum.shape != total.shape:
            raise ValueError(f"log: expected scalings of {list(self._sum.shape)}, got {list(total.shape)}; clear it")
        self._sum = total if self._sum is None else self._sum + total
        self._dtype = scalings.dtype
        self.tokens += int(counted.sum())

    def entries(self) -> list[jax.Array]:
        """Return the entries ``[B, T, L, N]``, in the order of their calls."""
        return [jnp.asarray(entry) for _, entry in self._now()]

    def indices(self) -> list[int]:
        """Return the number of each entry's call, from 0; for the mean, that of the last call."""
        return [number for number, _ in self._now()]

    def _now(self) -> list[tuple[int, Any]]:
        with self._lock:
            if self.mode != "mean":
                return list(self._entries)
            if self._sum is None or not self.tokens:
                return []
            return [(self.seen - 1, (self._sum / self.tokens)[None, None].astype(self._dtype))]

    def clear(self) -> None:
        """Remove all entries and start to count anew."""
        with self._lock:
            self._entries.clear()
            self._sum, self.seen, self.tokens = None, 0, 0
            self._random = np.random.default_rng(self.seed)

    def empty(self) -> ScalingsLog:
        """Return a new log with the same settings."""
        return ScalingsLog(self.mode, self.size, self.every, self.seed)

    def __len__(self) -> int:
        """Return the number of entries."""
        return len(self._now())

    def __iter__(self) -> Iterator[jax.Array]:
        """Iterate over the entries."""
        return iter(self.entries())

    def save(self, path: str | Path, *, expert_names: Sequence[str] = (), layer_names: Sequence[str] = ()) -> None:
        """Write the log to an ``.npz`` file, which :func:`load_scalings_log` reads.

        Its arrays are ``entry_0``, ``entry_1``, ... (``[B, T, L, N]``; bfloat16 as float32, which is exact),
        ``indices`` (int64, the number of each entry's call), and ``about``, a JSON object as text.

        Raises:
            ValueError: the path does not end in ``.npz``.
            OSError: the file can't be written.
        """
        if Path(path).suffix != ".npz":
            raise ValueError(f"{path}: expected a path that ends in .npz")
        now = self._now()
        arrays: dict[str, Any] = {}
        for place, (_, entry) in enumerate(now):
            array = np.asarray(entry)
            arrays[f"entry_{place}"] = array.astype(np.float32) if array.dtype == jnp.bfloat16 else array
        about = {
            "format": _FORMAT,
            **{name: getattr(self, name) for name in ("mode", "size", "every", "seed", "seen", "tokens")},
            "dtypes": [str(entry.dtype) for _, entry in now],
            "expert_names": list(expert_names),
            "layer_names": list(layer_names),
        }
        indices = np.array([number for number, _ in now], np.int64)
        with replacing_file(path) as file:
            np.savez_compressed(file, **arrays, indices=indices, about=np.array(json.dumps(about)))


def load_scalings_log(path: str | Path) -> ScalingsLog:
    """Read a log that :meth:`ScalingsLog.save` wrote. A loaded log can be filled further.

    Raises:
        ValueError: the file is damaged, or holds something else; the message names it.
        OSError: the file can't be read.
    """
    try:
        # np.load leaves a file open that is no archive.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            about = json.loads(str(stored["about"]))
            if about["format"] != _FORMAT:
                raise ValueError(f"expected the format {_FORMAT!r}, got {about['format']!r}")
            log = ScalingsLog(about["mode"], about["size"], about["every"], about["seed"])
            indices, dtypes = stored["indices"].tolist(), about["dtypes"]
            entries = [
                (number, jnp.asarray(stored[f"entry_{place}"], jnp.dtype(dtype)))
                for place, (number, dtype) in enumerate(zip(indices, dtypes, strict=True))
            ]
            seen, tokens = int(about["seen"]), int(about["tokens"])
    except OSError:
        raise
    except (ValueError, KeyError, TypeError, EOFError, RecursionError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path}: expected a log of scalings as save_scalings_log writes it ({type(error).__name__}: {error}); "
            f"write it anew"
        ) from error
    log.seen, log.tokens = seen, tokens
    if log.mode == "mean" and entries:
        mean = entries[0][1]
        log._sum, log._dtype = np.asarray(mean, np.float64)[0, 0] * tokens, mean.dtype
    else:
        log._entries = [(number, entry if log.mode == "all" else np.asarray(entry)) for number, entry in entries]
    return log
