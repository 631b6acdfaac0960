"""Products of one row with a matrix, which is what decoding on a CPU consists of.

XLA's CPU backend computes such a product on one core, which does not read memory as fast as all cores together. As a
batch of products over parts of the contraction, one for each core, it takes all of them. Everything else is
``jax.lax.dot_general``.
"""

from __future__ import annotations

import os
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["dot_general", "matmul"]

# Sizes of a matrix, in elements, for which it pays: below, the parts cost more than they save; above, one core keeps
# the memory busy.
_LEAST, _MOST = 2**16, 2**23
_MOST_PARTS = 8


def dot_general(
    lhs: jax.Array,
    rhs: jax.Array,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    """``jax.lax.dot_general``, with the same arguments and results up to the order of summation."""
    parts = _parts(lhs, rhs, dimension_numbers)
    if parts == 1:
        return lax.dot_general(lhs, rhs, dimension_numbers, precision, preferred_element_type)
    depth, width = rhs.shape
    row = lhs.reshape(parts, depth // parts)
    matrices = rhs.reshape(parts, depth // parts, width)
    sums = lax.dot_general(row, matrices, (((1,), (1,)), ((0,), (0,))), precision, preferred_element_type)
    return sums.sum(axis=0).reshape(*lhs.shape[:-1], width)


def matmul(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """Multiply ``x [..., D]`` by ``matrix [D, F]`` of the same dtype; accumulates, and returns, float32 or wider."""
    accumulate = jnp.promote_types(matrix.dtype, jnp.float32)
    return dot_general(x, matrix, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=accumulate)


def _parts(lhs: jax.Array, rhs: jax.Array, dimension_numbers: Any) -> int:
    """Into how many parts to take the contraction; 1 for a plain product."""
    one_row = rhs.ndim == 2 and lhs.size == rhs.shape[0]
    contracts_last = tuple(map(tuple, dimension_numbers[0])) == ((lhs.ndim - 1,), (0,))
    if not (one_row and contracts_last and _LEAST <= rhs.size < _MOST):
        return 1
    if jax.default_backend() != "cpu" or lhs.dtype != jnp.float32 or rhs.dtype != jnp.float32:
        return 1
    parts = 1
    while 2 * parts <= min(os.cpu_count() or 1, _MOST_PARTS) and rhs.shape[0] % (2 * parts) == 0:
        parts *= 2
    return parts
