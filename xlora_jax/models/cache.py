"""Keys and values of past tokens, as an explicit pytree.

Axes: B batch, T tokens of this call, S slots, H query heads, K key-value heads, C features per head, L blocks.

A row's token at position p is in slot p. A sliding-window layer whose window is shorter than the sequence keeps a ring
instead: slot ``p % S``, with S the window plus a chunk of tokens. So its memory does not grow with the sequence.
Memory per token, row and pass of any other layer is ``2 * K * C`` times the bytes of the cache's dtype.

The axes are in the order of attention's products for each head: queries ``[R, C]`` times keys ``[C, S]``, weights
``[R, S]`` times values ``[S, C]``. With any other order XLA copies both caches: at every step on CPUs, into and out of
every compiled loop on GPUs. On TPUs it copies keys unless they have the layout of the values, ``[S, C]``
(benchmarks/compile_ahead.py shows copies).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from xlora_jax.backend import target_backend

__all__ = ["Cache", "KVCache", "PairedCache", "Place"]

# Function of queries [B, T, H, C], keys [B, K, C, S], values [B, K, S, C], mask [B or 1, 1, T, S] to [B, T, H, C].
Attention = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], jax.Array]


@struct.dataclass
class Place:
    """Positions of a call's tokens.

    Attributes:
        start: int ``[B]``, position of each row's first token.
        last: int ``[B]``, position of each row's last real token; later tokens are padding. It may be below ``start``.
            Cache entries of padding are never seen, and are overwritten later.
    """

    start: jax.Array
    last: jax.Array

    def positions(self, length: int) -> jax.Array:
        """Return positions ``[B, T]`` of a call of T = ``length`` tokens; padding gets the last real token's position.

        So padding does not count as context if the largest position matters (``longrope``).
        """
        return jnp.minimum(self.start[:, None] + jnp.arange(length), self.last[:, None])


class Cache(Protocol):
    """Interface of a cache, as a decoder uses it."""

    def attend(
        self,
        layer: int | jax.Array,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        mask: jax.Array | None,
        place: Place,
        attention: Attention,
    ) -> tuple[Any, jax.Array]:
        """Write ``k`` and ``v [B, T, K, C]`` of one layer, then attend from ``q [B, T, H, C]`` to the whole cache.

        Returns:
            The new cache, and ``[B, T, H, C]``.
        """
        ...

    def positions(self, place: Place, *, sliding: bool) -> jax.Array:
        """Return the position ``[B or 1, S]`` of the token in each slot of the sliding layers, or of the others.

        It is negative for an empty slot.
        """
        ...


@struct.dataclass
class KVCache:
    """Keys and values of one pass.

    Attributes:
        k: ``[L, B, K, C, S]`` for scanned blocks, else a tuple of L arrays ``[B, K, C, S]``; on TPUs in the layout of
            ``v``.
        v: ``[L, B, K, S, C]`` or ``[B, K, S, C]``.
        rings: tuple with, for each block, whether its slots are a ring.
        keys_as_rows: whether keys share the values' layout.
    """

    k: Any
    v: Any
    rings: tuple[bool, ...] = struct.field(pytree_node=False)  # type: ignore[no-untyped-call]
    keys_as_rows: bool = struct.field(pytree_node=False)  # type: ignore[no-untyped-call]

    @classmethod
    def empty(
        cls,
        shape: tuple[int, int, int, int],
        dtype: jax.typing.DTypeLike,
        *,
        num_layers: int,
        stacked: bool,
        sliding: Sequence[bool] = (),
        ring: int | None = None,
    ) -> KVCache:
        """Make a cache.

        Args:
            shape: ``(B, K, S, C)``.
            dtype: dtype of keys and values.
            num_layers: L.
            stacked: whether blocks are scanned. Stacked layers have equal shapes, so rings are used only if all slide.
            sliding: tuple with, for each block, whether it slides; empty if none does.
            ring: number of slots that a sliding block needs; None for no rings.
        """
        batch, heads, capacity, width = shape
        as_rows = target_backend() == "tpu"
        rings = tuple(ring is not None and ring < capacity and slides for slides in sliding or [False] * num_layers)

        def pair(slots: int | None, *stack: int) -> tuple[jax.Array, jax.Array]:
            assert slots is not None
            of_values = slots, width
            of_keys = of_values if as_rows else (width, slots)
            k, v = (jnp.zeros((*stack, batch, heads, *last), dtype) for last in (of_keys, of_values))
            return k, v

        if stacked:
            rings = (all(rings),) * num_layers
            return cls(*pair(ring if rings[0] else capacity, num_layers), rings, as_rows)
        k, v = zip(*(pair(ring if is_ring else capacity) for is_ring in rings), strict=True)
        return cls(k, v, rings, as_rows)

    @property
    def bytes_per_token(self) -> int:
        """Return the bytes of one slot of a row, summed over the layers without a ring."""
        if not isinstance(self.k, tuple):
            return 0 if self.rings[0] else 2 * self.v.nbytes // (self.v.shape[1] * self.v.shape[-2])
        sizes = zip(self.v, self.rings, strict=True)
        return sum(2 * v.nbytes // (v.shape[0] * v.shape[-2]) for v, ring in sizes if not ring)

    def attend(
        self,
        layer: int | jax.Array,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        mask: jax.Array | None,
        place: Place,
        attention: Attention,
    ) -> tuple[KVCache, jax.Array]:
        """See :class:`Cache`."""
        stacked = not isinstance(self.k, tuple)
        whole = (self.k, self.v) if stacked else (self.k[layer], self.v[layer])
        ring = self.rings[0 if stacked else layer]
        index = layer if stacked else None
        keys, values = (
            _write(slots, new, place, ring, axis, index)
            for slots, new, axis in zip(whole, (k, v), (-2 if self.keys_as_rows else -1, -2), strict=True)
        )
        if stacked:
            cache = self.replace(k=keys, v=values)  # type: ignore[attr-defined]
            keys, values = (lax.dynamic_index_in_dim(slots, layer, keepdims=False) for slots in (keys, values))
        else:
            own = [(*all_[:layer], one, *all_[layer + 1 :]) for all_, one in ((self.k, keys), (self.v, values))]
            cache = self.replace(k=own[0], v=own[1])  # type: ignore[attr-defined]
        keys = keys.swapaxes(-1, -2) if self.keys_as_rows else keys
        return cache, attention(q, keys.astype(q.dtype), values.astype(q.dtype), mask)

    def positions(self, place: Place, *, sliding: bool) -> jax.Array:
        """See :class:`Cache`."""
        ring = sliding and any(self.rings)
        v = self.v[self.rings.index(ring) if ring in self.rings else 0] if isinstance(self.v, tuple) else self.v
        slots = jnp.arange(v.shape[-2])
        if not ring:
            return slots[None]
        # The latest position that maps to each slot.
        return place.last[:, None] - (place.last[:, None] - slots) % len(slots)


@struct.dataclass
class PairedCache:
    """Caches of two passes that run as one batch: the first half is the scaling pass, the second the real pass.

    Both caches have the same shapes. Each half of the batch attends to its own cache, and neither cache is copied.
    """

    scaling: KVCache
    real: KVCache

    def attend(
        self,
        layer: int | jax.Array,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        mask: jax.Array | None,
        place: Place,
        attention: Attention,
    ) -> tuple[PairedCache, jax.Array]:
        """See :class:`Cache`; the batch axis is ``2 B``."""
        half = len(q) // 2
        caches, outputs = [], []
        for cache, rows in ((self.scaling, slice(None, half)), (self.real, slice(half, None))):
            own_mask = mask if mask is None or len(mask) == 1 else mask[rows]
            own_place = Place(place.start[rows], place.last[rows])
            cache, y = cache.attend(layer, q[rows], k[rows], v[rows], own_mask, own_place, attention)
            caches.append(cache)
            outputs.append(y)
        return PairedCache(*caches), jnp.concatenate(outputs)

    def positions(self, place: Place, *, sliding: bool) -> jax.Array:
        """See :class:`Cache`."""
        return self.real.positions(place, sliding=sliding)


def _write(
    slots: jax.Array, new: jax.Array, place: Place, ring: bool, axis: int, layer: int | jax.Array | None
) -> jax.Array:
    """Return ``slots`` with ``new [B, T, K, C]`` written at row b from position ``place.start[b]`` on.

    Args:
        slots: keys or values, ``[B, K, ...]``, or with a leading axis of layers.
        new: keys or values of this call's tokens.
        place: positions of this call's tokens.
        ring: whether the slots are a ring.
        axis: axis of S, -1 or -2.
        layer: index of the layer in a stack; None without a stack.
    """
    batch, length, heads, _ = new.shape
    new = jnp.moveaxis(new.astype(slots.dtype), 1, axis)
    if batch == 1 and not ring:
        begin: list[Any] = [0] * new.ndim
        begin[axis] = place.start[0]
        if layer is None:
            return lax.dynamic_update_slice(slots, new, begin)
        return lax.dynamic_update_slice(slots, new[None], [layer, *begin])
    columns = place.start[:, None] + jnp.arange(length)
    if ring:
        # Padding would overwrite visible entries. A slot index out of range drops it.
        size = slots.shape[axis]
        columns = jnp.where(columns <= place.last[:, None], columns % size, size)
    # One index per row, head and slot, in the order of the axes, so the update needs no transposed layout.
    rows, head = jnp.arange(batch)[:, None, None], jnp.arange(heads)[:, None]
    index: tuple[Any, ...] = (rows, head, columns[:, None])
    if axis == -1:
        index, new = (rows, head, slice(None), columns[:, None]), new.swapaxes(-1, -2)
    at = slots.at[index] if layer is None else slots.at[(layer, *index)]
    return at.set(new, mode="drop") if ring else at.set(new, mode="promise_in_bounds", unique_indices=True)
