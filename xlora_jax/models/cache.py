"""Keys and values of past tokens, as an explicit pytree.

Axes: B batch, T tokens of this call, S slots, H query heads, K key-value heads, C features per head, L blocks.

A row's token at position p stands in slot p. Where a layer slides and its window is shorter than the sequence, it keeps
a ring instead: slot ``p % S``, with S the window and a chunk of tokens, so that memory does not grow with the sequence.
Memory per token, row and pass of a layer that does not slide: ``2 * K * C`` times the bytes of the cache's dtype.

The axes stand in the order of attention's products, for each head: rows of queries ``[R, C]`` times keys ``[C, S]``,
rows of weights ``[R, S]`` times values ``[S, C]``. In any other order XLA copies both caches: at every step on CPUs,
into and out of every compiled loop on GPUs. On TPUs it copies keys unless they lie as values do, ``[S, C]``
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

# From queries [B, T, H, C], keys [B, K, C, S], values [B, K, S, C] and a mask [B or 1, 1, T, S] to [B, T, H, C].
Attention = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], jax.Array]


@struct.dataclass
class Place:
    """Where the tokens of a call belong.

    Attributes:
        start: int ``[B]``, position of each row's first token.
        last: int ``[B]``, position of its last true token: those behind it are padding, and ``last`` may lie before
            ``start``. What padding leaves in a cache is never seen, and overwritten later.
    """

    start: jax.Array
    last: jax.Array

    def positions(self, length: int) -> jax.Array:
        """Positions ``[B, T]`` of a call of T = ``length`` tokens; padding takes that of the last true one.

        So it does not count as context where the longest position matters (``longrope``).
        """
        return jnp.minimum(self.start[:, None] + jnp.arange(length), self.last[:, None])


class Cache(Protocol):
    """What a decoder needs of a cache."""

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
        """Write ``k`` and ``v [B, T, K, C]`` of one layer, then attend from ``q [B, T, H, C]`` to all it holds.

        Returns:
            The new cache, and ``[B, T, H, C]``.
        """
        ...

    def positions(self, place: Place, *, sliding: bool) -> jax.Array:
        """Position ``[B or 1, S]`` of what stands in each slot of the layers that slide, or of those that do not.

        Negative where nothing does.
        """
        ...


@struct.dataclass
class KVCache:
    """Keys and values of one pass.

    Attributes:
        k: ``[L, B, K, C, S]`` for scanned blocks, else a tuple of L arrays ``[B, K, C, S]``; on TPUs as ``v``.
        v: ``[L, B, K, S, C]`` or ``[B, K, S, C]``.
        rings: for each block, whether its slots are a ring.
        keys_as_rows: whether keys lie as values do.
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
            dtype: of keys and values.
            num_layers: L.
            stacked: whether blocks are scanned. Stacked layers are alike: rings are used if all slide.
            sliding: for each block, whether it slides; empty if none does.
            ring: slots that suffice for a block that slides; None for no rings.
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
        """Bytes of a row's slot in all layers that do not keep a ring."""
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
        # The latest position that falls into each slot.
        return place.last[:, None] - (place.last[:, None] - slots) % len(slots)


@struct.dataclass
class PairedCache:
    """The caches of two passes that run as one batch: its first half is the scaling pass, its second the real one.

    Both have the same shapes. Each half of the batch attends to its own cache, and neither is copied.
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
        new: of the tokens of this call.
        place: where they belong.
        ring: whether the slots are one.
        axis: that of S, -1 or -2.
        layer: which of the stacked layers; None where they are not.
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
        # Padding would overwrite what is still seen: it is dropped, by a slot that does not exist.
        size = slots.shape[axis]
        columns = jnp.where(columns <= place.last[:, None], columns % size, size)
    # One index per row, head and slot, in the order of the axes: what is written lies where it will lie.
    rows, head = jnp.arange(batch)[:, None, None], jnp.arange(heads)[:, None]
    index: tuple[Any, ...] = (rows, head, columns[:, None])
    if axis == -1:
        index, new = (rows, head, slice(None), columns[:, None]), new.swapaxes(-1, -2)
    at = slots.at[index] if layer is None else slots.at[(layer, *index)]
    return at.set(new, mode="drop") if ring else at.set(new, mode="promise_in_bounds", unique_indices=True)
