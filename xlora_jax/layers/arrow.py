"""Arrow: gates that a layer computes from its own input and the experts' directions, without a classifier.

Ostapenko et al. 2024 (arXiv 2405.11157). The formula is :func:`xlora_jax.layers.mixing.direction_gates`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

__all__ = ["Arrow", "direction"]


@jax.tree_util.register_static
@dataclass(frozen=True)
class Arrow:
    """The source of a layer's gates, in the place of an array of gates. A pytree without leaves.

    Attributes:
        top_k: number of experts to keep, or None for all.
        temperature: divisor of the similarities.
        weight: factor of all gates.
    """

    top_k: int | None
    temperature: float
    weight: float


def direction(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
    """Return the input direction ``[D]`` that an expert amplifies most: the first singular vector of ``a @ b``.

    PEFT approximates it by 15 power iterations. This is the exact vector, whose sign is arbitrary.

    Args:
        a: ``[D, r]``.
        b: ``[r, F]``.

    Returns:
        A vector of length 1, or zeros if ``a @ b`` is zero.
    """
    q, small = np.linalg.qr(a.astype(np.float64))
    vectors, values, _ = np.linalg.svd(small @ b.astype(np.float64), full_matrices=False)
    first: NDArray[np.float64] = q @ vectors[:, 0] * (values[0] > 0)
    return first
