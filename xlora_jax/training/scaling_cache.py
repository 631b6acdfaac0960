"""Results of the scaling pass, kept from epoch to epoch.

With frozen base and experts the classifier's input for a given row never changes: from the second epoch on it is read
back instead of computed. An entry on disk carries a checksum. One that is damaged counts as missing: it is computed
again, with one warning. Axes: B rows, T tokens, D width.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from xlora_jax.atomic import replacing_file
from xlora_jax.passes import Params, XLora
from xlora_jax.training.fingerprint import array_checksums, expert_checksums

__all__ = ["ScalingCache", "fingerprint"]

_NAME = re.compile(r"([0-9a-f]{32})-[0-9a-f]{32}\.npy")
_KEYED = ("input_ids", "positions", "segment_ids", "attention_mask")


def fingerprint(xlora: XLora, params: Params) -> str:
    """Name a model by all that its scaling pass depends on: a hash of settings and of its arrays' checksums."""
    gate = xlora.config.scaling_pass_gate(xlora.num_experts)
    # How the same numbers are computed (recomputation, attention kernel, layout) makes no other model.
    module = xlora.module
    described: list[Any] = [repr(module.config), jnp.dtype(module.dtype).name, gate]
    described.append(array_checksums(xlora, params["base"]))
    if gate != 0 or xlora.layers.with_bias:
        described.append(expert_checksums(xlora, params["experts"]))
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:32]


class ScalingCache:
    """Hidden states ``[T, D]`` by the content of a row and the model, in memory or in files."""

    def __init__(
        self, model: str, dtype: jax.typing.DTypeLike = "float32", directory: str | Path | None = None
    ) -> None:
        """Open a cache.

        Args:
            model: :func:`fingerprint` of the model.
            dtype: stored element type: float32, or bfloat16 for half the room (exact for a bfloat16 model).
            directory: folder of the entries; None keeps them in memory. All models and runs can share one.
        """
        self._dtype = jnp.dtype(dtype)
        if self._dtype not in (jnp.float32, jnp.bfloat16):
            raise ValueError(f"scaling cache: expected dtype float32 or bfloat16, got {self._dtype}")
        self._model = model
        self._kept: dict[str, NDArray[Any]] = {}
        self._names: dict[str, str] = {}
        self._directory = None
        if directory is not None:
            self._directory = Path(directory) / f"{model}-{self._dtype.name}"
            self._directory.mkdir(parents=True, exist_ok=True)
            # The name of an entry is its key and its checksum.
            for name in os.listdir(self._directory):
                if (match := _NAME.fullmatch(name)) is not None:
                    self._names[match[1]] = name
        self._warned = False
        self.hits = 0
        self.misses = 0

    def keys(self, batch: Mapping[str, NDArray[Any]]) -> list[str]:
        """Return a key for each row of ``batch``, arrays ``[B, T]``."""
        names = [name for name in _KEYED if name in batch]
        rows = len(batch["input_ids"])
        found = []
        for row in range(rows):
            digest = hashlib.sha256(json.dumps(names).encode())
            for name in names:
                digest.update(np.ascontiguousarray(batch[name][row], np.int32).tobytes())
            found.append(digest.hexdigest()[:32])
        return found

    def get(self, keys: list[str]) -> NDArray[Any] | None:
        """Return ``[B, T, D]`` if every row is here, else None."""
        rows = [self._read(key) for key in keys]
        if any(row is None for row in rows):
            self.misses += len(keys)
            return None
        self.hits += len(keys)
        return np.stack([row for row in rows if row is not None])

    def put(self, keys: list[str], hidden_states: Any) -> NDArray[Any]:
        """Keep rows ``[B, T, D]``; returns them as :meth:`get` will."""
        rows: NDArray[Any] = np.asarray(hidden_states).astype(self._dtype)
        for key, row in zip(keys, rows, strict=True):
            if self._directory is None:
                self._kept[key] = row.copy()
                continue
            try:
                self._write(key, row)
            except OSError as error:
                self._warn(f"{self._directory}: entries can't be written ({error})")
        return rows

    def _write(self, key: str, row: NDArray[Any]) -> None:
        assert self._directory is not None
        name = f"{key}-{_digest(key, row)}.npy"
        # Not flushed to disk: an entry that a power cut leaves damaged is found out by its checksum.
        with replacing_file(self._directory / name, durable=False) as file:
            # NumPy's files do not know bfloat16: bits are kept as integers.
            np.save(file, row.view(np.uint16) if self._dtype == jnp.bfloat16 else row)
        self._names[key] = name

    def _read(self, key: str) -> NDArray[Any] | None:
        if self._directory is None:
            return self._kept.get(key)
        if key not in self._names:
            return None
        path = self._directory / self._names[key]
        try:
            row = _parsed(path, key, self._dtype)
        except FileNotFoundError:
            return None
        except Exception as error:  # whatever NumPy's parser of headers raises
            self._warn(f"{path}: a damaged entry ({error})")
            del self._names[key]
            with suppress(OSError):
                path.unlink()
            return None
        return row

    def _warn(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"scaling cache: {reason}; its row is computed again. Further ones are not reported.",
                UserWarning,
                stacklevel=4,
            )


_MAX_ENTRY_BYTES = 2**31


def _digest(key: str, row: NDArray[Any]) -> str:
    """The key is hashed too: an entry under another's name is no entry."""
    digest = hashlib.sha256(repr((key, row.dtype.name, row.shape)).encode())
    digest.update(np.ascontiguousarray(row).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()[:32]


def _parsed(path: Path, key: str, dtype: np.dtype[Any]) -> NDArray[Any]:
    """The row in a file. Raises ValueError if a single bit of it is another than was written."""
    if path.stat().st_size > _MAX_ENTRY_BYTES:
        raise ValueError(f"expected at most {_MAX_ENTRY_BYTES} bytes")
    file = io.BytesIO(path.read_bytes())
    np.lib.format.read_magic(file)
    shape, turned, stored = np.lib.format.read_array_header_1_0(file)
    content = file.read()
    as_stored = np.dtype(np.uint16) if dtype == jnp.bfloat16 else dtype
    if stored != as_stored or turned or math.prod(shape) * dtype.itemsize != len(content):
        raise ValueError(f"expected rows of {as_stored}, got {stored} {shape} in {len(content)} bytes")
    row: NDArray[Any] = np.frombuffer(content, dtype).reshape(shape)
    if path.name != f"{key}-{_digest(key, row)}.npy":
        raise ValueError("its checksum differs")
    return row
