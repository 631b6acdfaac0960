"""Cache of scaling-pass results, from epoch to epoch.

If base and experts are frozen, the classifier's input for a given row never changes. From the second epoch on it is
read instead of computed. Each entry on disk has a checksum. A damaged entry counts as missing: it is computed again,
with one warning. Axes: B rows, T tokens, D width.
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
    """Return a hash of everything that a model's scaling pass depends on: its settings and its arrays' checksums."""
    gate = xlora.config.scaling_pass_gate(xlora.num_experts)
    # Recomputation, attention kernel and layout give the same numbers, so they are not part of the hash.
    module = xlora.module
    described: list[Any] = [repr(module.config), jnp.dtype(module.dtype).name, gate]
    described.append(array_checksums(xlora, params["base"]))
    if gate != 0 or xlora.layers.with_bias:
        described.append(expert_checksums(xlora, params["experts"]))
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:32]


class ScalingCache:
    """Hidden states ``[T, D]`` by row content and model, in memory or in files."""

    def __init__(
        self, model: str, dtype: jax.typing.DTypeLike = "float32", directory: str | Path | None = None
    ) -> None:
        """Open a cache.

        Args:
            model: :func:`fingerprint` of the model.
            dtype: stored element type, float32 or bfloat16. bfloat16 halves the size, and is exact for a bfloat16
                model.
            directory: folder of the entries; None keeps them in memory. Models and runs can share a folder.
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
            # An entry's file name consists of its key and its checksum.
            for name in os.listdir(self._directory):
                if (match := _NAME.fullmatch(name)) is not None:
                    self._names[match[1]] = name
        self._warned = False
        self.hits = 0
        self.misses = 0

    def keys(self, batch: Mapping[str, NDArray[Any]]) -> list[str]:
        """Return a key for each row of ``batch``, a mapping of arrays ``[B, T]``."""
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
        """Return ``[B, T, D]`` if every row is in the cache, else None."""
        rows = [self._read(key) for key in keys]
        if any(row is None for row in rows):
            self.misses += len(keys)
            return None
        self.hits += len(keys)
        return np.stack([row for row in rows if row is not None])

    def put(self, keys: list[str], hidden_states: Any) -> NDArray[Any]:
        """Store rows ``[B, T, D]``, and return them as :meth:`get` will."""
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
        # The file is not flushed to disk. If a power cut damages an entry, its checksum shows it.
        with replacing_file(self._directory / name, durable=False) as file:
            # NumPy's file format has no bfloat16, so the bits are stored as integers.
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
        except Exception as error:  # NumPy's header parser can raise any error
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
    """Return a hash of the row and its key, so that an entry under another key's name is rejected."""
    digest = hashlib.sha256(repr((key, row.dtype.name, row.shape)).encode())
    digest.update(np.ascontiguousarray(row).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()[:32]


def _parsed(path: Path, key: str, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return the row in a file; raise ValueError if any bit of it has changed."""
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
