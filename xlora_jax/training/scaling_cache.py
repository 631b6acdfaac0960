"""What the scaling pass gave, kept from epoch to epoch.

With frozen base and experts the classifier's input for a given row never changes: from the second epoch on it is read
back instead of computed. Axes: T tokens, D width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from xlora_jax.passes import Params, XLora
from xlora_jax.trees import flatten

__all__ = ["ScalingCache", "fingerprint"]

_KEYED = ("input_ids", "positions", "segment_ids", "attention_mask")


def fingerprint(xlora: XLora, params: Params) -> str:
    """Name a model by what its scaling pass depends on: a hash of settings, and of sampled values of its arrays.

    Of each array some 4000 values are read, spread over it evenly: enough to tell apart models that were trained
    or loaded differently, and cheap for a base of any size.
    """
    gate = xlora.config.scaling_pass_gate(xlora.num_experts)
    # How the same numbers are computed (recomputation, attention kernel, layout) makes no other model.
    module = xlora.module
    digest = hashlib.sha256(repr((module.config, jnp.dtype(module.dtype).name, gate)).encode())
    for root in ("base", "experts") if gate != 0 or xlora.layers.with_bias else ("base",):
        for path, leaf in sorted(flatten(params[root]).items()):
            step = max(1, leaf.size // 4096)
            sample = np.asarray(jax.device_get(jnp.ravel(leaf)[::step][:4096].astype(jnp.float32)))
            digest.update(repr((path, leaf.shape)).encode())
            digest.update(sample.tobytes())
    return digest.hexdigest()[:32]


class ScalingCache:
    """Hidden states ``[T, D]`` by the content of a row and the model, in memory or in files."""

    def __init__(
        self, model: str, dtype: jax.typing.DTypeLike = "float32", directory: str | Path | None = None
    ) -> None:
        """Open a cache.

        Args:
            model: :func:`fingerprint` of the model.
            dtype: to keep them in: float32, or bfloat16 for half the room (exact for a bfloat16 model).
            directory: where to keep them; None keeps them in memory. One for all models and runs will do.
        """
        self._dtype = jnp.dtype(dtype)
        if self._dtype not in (jnp.float32, jnp.bfloat16):
            raise ValueError(f"scaling cache: expected dtype float32 or bfloat16, got {self._dtype}")
        self._model = model
        self._kept: dict[str, NDArray[Any]] = {}
        self._directory = None
        if directory is not None:
            self._directory = Path(directory) / f"{model}-{self._dtype.name}"
            self._directory.mkdir(parents=True, exist_ok=True)
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
            # NumPy's files do not know bfloat16: bits are kept as integers. A kill leaves no half of a file behind.
            partial = self._directory / f".{key}.partial.npy"
            np.save(partial, row.view(np.uint16) if self._dtype == jnp.bfloat16 else row)
            partial.replace(self._directory / f"{key}.npy")
        return rows

    def _read(self, key: str) -> NDArray[Any] | None:
        if self._directory is None:
            return self._kept.get(key)
        try:
            row: NDArray[Any] = np.load(self._directory / f"{key}.npy")
        except FileNotFoundError:
            return None
        return row.view(self._dtype) if self._dtype == jnp.bfloat16 else row
