"""Checksums of arrays that do not depend on how the arrays are sharded.

A checksum is a sum over elements, modulo 2**64: each element's bits times an odd number that depends on its position.
So each process sums its own shards, and the sums of all processes add up. One changed element always changes it, since
odd numbers have inverses modulo 2**64; any other change goes unnoticed with a probability of about 2**-64.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

__all__ = ["checksums"]

_CHUNK = 2**20


def checksums(arrays: Mapping[str, jax.Array]) -> dict[str, str]:
    """Compute the checksum of each array, 16 hexadecimal digits; every process gets those of the whole arrays.

    Args:
        arrays: by name, the same on every process; sharded in any way.
    """
    sums = np.array([_local(array) for array in arrays.values()], np.uint64)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        # Halves, because JAX has no 64-bit integers by default.
        halves = np.stack([sums >> np.uint64(32), sums & np.uint64(0xFFFFFFFF)]).astype(np.uint32)
        gathered = np.asarray(multihost_utils.process_allgather(halves)).astype(np.uint64)
        sums = ((gathered[:, 0] << np.uint64(32)) + gathered[:, 1]).sum(axis=0, dtype=np.uint64)
    return {name: f"{int(value):016x}" for name, value in zip(arrays, sums, strict=True)}


def _local(array: jax.Array) -> int:
    """The sum over this process's shards, each part of the array once."""
    shards = [shard for shard in array.addressable_shards if shard.replica_id == 0]
    return sum(_sum(np.asarray(shard.data), shard.index, array.shape) for shard in shards) % 2**64


def _sum(values: NDArray[Any], index: tuple[slice, ...], shape: tuple[int, ...]) -> int:
    """The sum over a part of an array of ``shape`` that is at ``index`` in it."""
    starts = [int(part.start or 0) for part in index]
    strides = [int(np.prod(shape[axis + 1 :], dtype=np.int64)) for axis in range(len(shape))]
    words = _words(values)
    total = 0
    for begin in range(0, len(words), _CHUNK):
        part = words[begin : begin + _CHUNK]
        flat = np.arange(begin, begin + len(part))
        places = np.unravel_index(flat, values.shape) if values.ndim else ()
        position = np.zeros(len(part), np.uint64)
        for place, start, stride in zip(places, starts, strides, strict=True):
            position += ((place + start) * stride).astype(np.uint64)
        total += int((part * _odd(position)).sum(dtype=np.uint64))
    return total % 2**64


def _words(values: NDArray[Any]) -> NDArray[np.uint64]:
    """The bits of each element as an integer, plus one: a zero counts too."""
    flat = np.ascontiguousarray(values).reshape(-1)
    if flat.dtype == np.bool_:
        flat = flat.view(np.uint8)
    return flat.view(f"u{flat.dtype.itemsize}").astype(np.uint64) + np.uint64(1)


def _odd(position: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A well-mixed odd number for each position (the finalizer of splitmix64)."""
    mixed = (position + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (mixed ^ (mixed >> np.uint64(31))) | np.uint64(1)
