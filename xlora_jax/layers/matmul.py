"""Matrix products for decoding, arranged so that XLA reads the weights fastest.

In decoding, few rows are multiplied by large matrices. Three cases need another form than one plain product:

- One row in float32 on a CPU: XLA uses one core, which reads memory more slowly than all cores together. A batch of
  products over parts of the contraction, one part for each core, uses all of them.
- One row in bfloat16 on a CPU: XLA converts the whole matrix to float32 first. With two rows it does not.
- One row on a GPU: for matrices of up to ten million elements XLA makes a multiplication and a sum, and may not fuse
  them. The products then go through memory, rounded to the dtype of the operands. Two rows stay a matrix product.
"""

from __future__ import annotations

import os
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from xlora_jax.backend import target_backend

__all__ = ["by_head", "dot_general", "matmul"]

# Number of elements of a matrix that is worth splitting. Below, the parts cost more than they save; above, one core
# keeps the memory busy.
_LEAST, _MOST = 2**16, 2**23
_MOST_PARTS = 8
# Number of rows that counts as few. On a CPU a matrix product packs its matrix first; for few rows, elementwise
# products summed in registers are faster.
_MOST_ROWS = 32


def dot_general(
    lhs: jax.Array,
    rhs: jax.Array,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    """Compute ``jax.lax.dot_general``: same arguments, same results up to the order of summation."""
    one_row = rhs.ndim == 2 and lhs.size == rhs.shape[0]
    contracts_last = tuple(map(tuple, dimension_numbers[0])) == ((lhs.ndim - 1,), (0,))
    if one_row and contracts_last and lhs.dtype == rhs.dtype:
        depth, width = rhs.shape
        backend = target_backend()
        if backend == "gpu" or (backend == "cpu" and rhs.dtype == jnp.bfloat16):
            rows = jnp.broadcast_to(lhs.reshape(1, depth), (2, depth))
            # On CPUs, the product of bfloat16 operands is float32.
            result = jnp.float32 if backend == "cpu" else preferred_element_type
            out = lax.dot_general(rows, rhs, (((1,), (0,)), ((), ())), precision, result)[0]
            return out.astype(preferred_element_type or rhs.dtype).reshape(*lhs.shape[:-1], width)
        if (parts := _parts(rhs)) > 1:
            row, matrices = lhs.reshape(parts, depth // parts), rhs.reshape(parts, depth // parts, width)
            out = lax.dot_general(row, matrices, (((1,), (1,)), ((0,), (0,))), precision, preferred_element_type)
            return out.sum(axis=0).reshape(*lhs.shape[:-1], width)
    return lax.dot_general(lhs, rhs, dimension_numbers, precision, preferred_element_type)


def matmul(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """Multiply ``x [..., D]`` by ``matrix [D, F]`` of the same dtype; the result is float32 or wider."""
    accumulate = jnp.promote_types(matrix.dtype, jnp.float32)
    if target_backend() == "gpu" and x.size <= _MOST_ROWS * x.shape[-1]:
        # XLA merges products of the same input, such as those of a layer and its experts, and copies their matrices
        # side by side for that, at every step of decoding. A barrier gives each product its own input, so XLA cannot
        # merge them.
        x, matrix = lax.optimization_barrier((x, matrix))
    return dot_general(x, matrix, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=accumulate)


def by_head(rows: jax.Array, matrices: jax.Array) -> jax.Array:
    """Multiply ``rows [B, K, R, D]`` of each head by that head's matrix ``[B, K, D, F]``, such as its keys or values.

    Returns:
        ``[B, K, R, F]``, float32 or wider.
    """
    accumulate = jnp.promote_types(matrices.dtype, jnp.float32)
    if target_backend() != "cpu" or rows.shape[2] > _MOST_ROWS:
        return jnp.einsum("bkrd,bkdf->bkrf", rows, matrices, preferred_element_type=accumulate)
    return (rows.astype(accumulate)[..., None] * matrices.astype(accumulate)[:, :, None]).sum(axis=-2)


def _parts(matrix: jax.Array) -> int:
    """Return the number of parts for the contraction of one row with ``matrix``; 1 means a plain product."""
    if target_backend() != "cpu" or matrix.dtype != jnp.float32 or not _LEAST <= matrix.size < _MOST:
        return 1
    parts = 1
    while 2 * parts <= min(os.cpu_count() or 1, _MOST_PARTS) and len(matrix) % (2 * parts) == 0:
        parts *= 2
    return parts
