"""Checksums of arrays, computed on their devices. They do not depend on how an array is sharded.

A checksum consists of two sums over the elements, modulo 2**32. Each sums the element's bits mixed with its index. For
a given index the mixing is one to one, so one changed element always changes both sums. Any other change goes unnoticed
with a probability of about 2**-64. Integer sums are exact in any order, so every mesh gives the same result.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.typing import NDArray

__all__ = ["checksums", "partial_checksums"]


def checksums(arrays: Mapping[str, jax.Array]) -> dict[str, str]:
    """Compute a checksum of each array's bits, as 16 hexadecimal digits; all processes get the same result.

    Args:
        arrays: mapping of names to arrays, with the same names on every process and any sharding.
    """
    sums = {name: _start(array, (), False) for name, array in arrays.items()}
    return {name: _digits(np.asarray(pair)) for name, pair in sums.items()}


def partial_checksums(arrays: Mapping[str, tuple[jax.Array, tuple[int, ...]]]) -> dict[str, NDArray[np.uint64]]:
    """Compute checksums of the values in parts of arrays.

    They depend on values, not bits, so bfloat16 and the same numbers in float32 give equal checksums.

    Args:
        arrays: mapping of names to an array and the axes to keep. Indices count within a part.

    Returns:
        A mapping of names to arrays with the shape of the kept axes.
    """
    sums = {name: _start(array, kept, True) for name, (array, kept) in arrays.items()}
    pairs = {name: np.asarray(pair).astype(np.uint64) for name, pair in sums.items()}
    return {name: (pair[0] << np.uint64(32)) + pair[1] for name, pair in pairs.items()}


def _digits(pair: NDArray[np.uint32]) -> str:
    return f"{int(pair[0]):08x}{int(pair[1]):08x}"


def _start(array: Any, kept: tuple[int, ...], as_values: bool) -> jax.Array:
    """Start the sums, which are the same on every process; reading the result waits for it."""
    sharding = getattr(array, "sharding", None)
    whole = NamedSharding(sharding.mesh, P()) if isinstance(sharding, NamedSharding) else None
    pair: jax.Array = _compiled(kept, as_values, whole)(array)
    return pair


@cache
def _compiled(kept: tuple[int, ...], as_values: bool, whole: NamedSharding | None) -> Any:
    return jax.jit(partial(_sums, kept=kept, as_values=as_values), out_shardings=whole)


def _sums(array: jax.Array, kept: tuple[int, ...], as_values: bool) -> jax.Array:
    """Return both sums, uint32 ``[2, *kept]``."""
    kept = tuple(axis % array.ndim for axis in kept)
    bits = _bits(array, as_values)
    summed = [axis for axis in range(bits.ndim) if axis not in kept]
    place, stride = jnp.zeros((1,) * bits.ndim, jnp.uint32), 1
    for axis in reversed(summed):
        shape = [size if number == axis else 1 for number, size in enumerate(bits.shape)]
        place += lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    first = _mixed(place + jnp.uint32(1))
    second = _mixed(~first)
    terms = (_mixed(bits ^ first), _mixed(bits + second))
    return jnp.stack([term.sum(summed, dtype=jnp.uint32) for term in terms])


def _bits(array: jax.Array, as_values: bool) -> jax.Array:
    if as_values and jnp.issubdtype(array.dtype, jnp.floating) and array.dtype.itemsize < 4:
        array = array.astype(jnp.float32)
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    if array.dtype.itemsize == 8:
        wide: jax.Array = lax.bitcast_convert_type(array, jnp.uint32)  # a last axis of two
        return wide
    bits: jax.Array = lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}"))
    return bits.astype(jnp.uint32)


def _mixed(number: jax.Array) -> jax.Array:
    """Mix the bits of each number, one to one (the finalizer of MurmurHash3)."""
    mixed: jax.Array = (number ^ (number >> 16)) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    mixed ^= mixed >> 16
    return mixed
