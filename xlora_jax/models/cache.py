"""Keys and values of past tokens, as an explicit pytree.

Axes: B batch, T tokens of this call, S slots, K key-value heads, C features per head, L blocks.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

__all__ = ["KVCache"]


@struct.dataclass
class KVCache:
    """Keys and values of past tokens; slot s of a row holds its token at position s.

    Attributes:
        k: ``[L, B, S, K, C]`` for scanned blocks, else a tuple of L arrays ``[B, S, K, C]``.
        v: likewise.
    """

    k: Any
    v: Any

    def update(
        self, layer: int | jax.Array, k: jax.Array, v: jax.Array, start: jax.Array
    ) -> tuple[KVCache, jax.Array, jax.Array]:
        """Write ``k`` and ``v`` ``[B, T, K, C]`` of one layer from slot ``start [B]`` on; what stood there is replaced.

        Returns:
            The new cache, and that layer's keys and values ``[B, S, K, C]``.
        """
        if isinstance(self.k, tuple):
            assert isinstance(layer, int)
            keys, values = _write(self.k[layer], k, start), _write(self.v[layer], v, start)
            cache = KVCache(
                (*self.k[:layer], keys, *self.k[layer + 1 :]), (*self.v[:layer], values, *self.v[layer + 1 :])
            )
        else:
            cache = KVCache(_write(self.k, k, start, layer), _write(self.v, v, start, layer))
            keys = lax.dynamic_index_in_dim(cache.k, layer, keepdims=False)
            values = lax.dynamic_index_in_dim(cache.v, layer, keepdims=False)
        return cache, keys, values

    @property
    def capacity(self) -> int:
        """S, the number of slots."""
        k = self.k[0] if isinstance(self.k, tuple) else self.k
        return int(k.shape[-3])


def _write(slots: jax.Array, new: jax.Array, start: jax.Array, layer: int | jax.Array | None = None) -> jax.Array:
    """Return ``slots`` with ``new [B, T, K, C]`` written at row b from slot ``start[b]`` on."""
    new = new.astype(slots.dtype)
    batch, length = new.shape[:2]
    if batch == 1:
        begin = (0, start[0], 0, 0)
        if layer is None:
            return lax.dynamic_update_slice(slots, new, begin)
        return lax.dynamic_update_slice(slots, new[None], (layer, *begin))
    rows = jnp.arange(batch)[:, None]
    columns = start[:, None] + jnp.arange(length)
    at = slots.at[rows, columns] if layer is None else slots.at[layer, rows, columns]
    return at.set(new, mode="promise_in_bounds", unique_indices=True)
