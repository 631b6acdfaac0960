"""Products of few rows with a matrix, which decoding consists of, in the forms that XLA reads matrices fastest in.

On CPUs a product of one row is computed on one core, which does not read memory as fast as all cores together. As a
batch of products over parts of the contraction, one for each core, it takes all of them. On GPUs a product of one row
with a matrix of up to ten million elements becomes a multiplication and a sum, which XLA can leave apart: the products
then go through memory, rounded to the dtype of the operands. Two rows stay a matrix product. So they do in bfloat16 on
CPUs, where for one row the whole matrix is converted to float32 first.
"""

from __future__ import annotations

import os
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from xlora_jax.backend import target_backend

__all__ = ["by_head", "dot_general", "matmul"]

# Sizes of a matrix, in elements, for which it pays: below, the parts cost more than they save; above, one core keeps
# the memory busy.
_LEAST, _MOST = 2**16, 2**23
_MOST_PARTS = 8
# Few rows. On a CPU a sum of products that stay in registers is faster for them than a product, whose matrix is packed
# first.
_MOST_ROWS = 32


def dot_general(
    lhs: jax.Array,
    rhs: jax.Array,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    """``jax.lax.dot_general``, with the same arguments and results up to the order of summation."""
    one_row = rhs.ndim == 2 and lhs.size == rhs.shape[0]
    contracts_last = tuple(map(tuple, dimension_numbers[0])) == ((lhs.ndim - 1,), (0,))
    if one_row and contracts_last and lhs.dtype == rhs.dtype:
        depth, width = rhs.shape
        backend = target_backend()
        if backend == "gpu" or (backend == "cpu" and rhs.dtype == jnp.bfloat16):
            rows = jnp.broadcast_to(lhs.reshape(1, depth), (2, depth))
            # A CPU's product in bfloat16 gives float32.
            result = jnp.float32 if backend == "cpu" else preferred_element_type
            out = lax.dot_general(rows, rhs, (((1,), (0,)), ((), ())), precision, result)[0]
            return out.astype(preferred_element_type or rhs.dtype).reshape(*lhs.shape[:-1], width)
        if (parts := _parts(rhs)) > 1:
            row, matrices = lhs.reshape(parts, depth // parts), rhs.reshape(parts, depth // parts, width)
            out = lax.dot_general(row, matrices, (((1,), (1,)), ((0,), (0,))), precision, preferred_element_type)
            return out.sum(axis=0).reshape(*lhs.shape[:-1], width)
    return lax.dot_general(lhs, rhs, dimension_numbers, precision, preferred_element_type)


def matmul(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """Multiply ``x [..., D]`` by ``matrix [D, F]`` of the same dtype; accumulates, and returns, float32 or wider."""
    accumulate = jnp.promote_types(matrix.dtype, jnp.float32)
    if target_backend() == "gpu" and x.size <= _MOST_ROWS * x.shape[-1]:
        # XLA makes products of one input one product, here those of a layer and of its experts, and copies their
        # matrices side by side for it: at every step of decoding. Behind a barrier each has an input of its own.
        x, matrix = lax.optimization_barrier((x, matrix))
    return dot_general(x, matrix, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=accumulate)


def by_head(rows: jax.Array, matrices: jax.Array) -> jax.Array:
    """Multiply ``rows [B, K, R, D]`` by matrices of their own ``[B, K, D, F]``, such as keys or values of each head.

    Returns:
        ``[B, K, R, F]``, float32 or wider.
    """
    accumulate = jnp.promote_types(matrices.dtype, jnp.float32)
    if target_backend() != "cpu" or rows.shape[2] > _MOST_ROWS:
        return jnp.einsum("bkrd,bkdf->bkrf", rows, matrices, preferred_element_type=accumulate)
    return (rows.astype(accumulate)[..., None] * matrices.astype(accumulate)[:, :, None]).sum(axis=-2)


def _parts(matrix: jax.Array) -> int:
    """Into how many parts to take the contraction of a row with ``matrix``; 1 for a plain product."""
    if target_backend() != "cpu" or matrix.dtype != jnp.float32 or not _LEAST <= matrix.size < _MOST:
        return 1
    parts = 1
    while 2 * parts <= min(os.cpu_count() or 1, _MOST_PARTS) and len(matrix) % (2 * parts) == 0:
        parts *= 2
    return parts
