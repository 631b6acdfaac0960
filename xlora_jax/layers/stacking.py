"""Stacking of experts: from one pair of matrices per expert to the stacked arrays of a layer.

Axes: D input, F output, N experts, R stacked ranks of a layer, M modules stacked on a leading axis (``nn.scan``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xlora_jax.layers.arrow import direction

__all__ = ["Piece", "stack_pieces"]


@dataclass(frozen=True, eq=False)
class Piece:
    """One expert's part of one module: it adds ``scale * (x @ a @ b + bias)``.

    Attributes:
        expert: number of the expert.
        a: ``[D, r]``; for an embedding ``[V, r]``, for a convolution ``[kh, kw, D, r]``.
        b: ``[r, F]``.
        scale: LoRA scale: alpha/r, or alpha/sqrt(r) for rsLoRA.
        bias: ``[F]``, the bias of ``b``, or None.
        dropout: probability of LoRA dropout.
    """

    expert: int
    a: NDArray[Any]
    b: NDArray[Any]
    scale: float
    bias: NDArray[Any] | None = None
    dropout: float = 0.0


def stack_pieces(
    members: Sequence[Sequence[Piece]],
    shape: tuple[int, ...],
    num_experts: int,
    dtype: np.dtype[Any],
    *,
    directions: bool = False,
) -> dict[str, NDArray[Any]]:
    """Stack the pieces of each member, and pad members of smaller rank with columns that belong to no expert.

    Args:
        members: M sequences of pieces, in the order of the experts; a sequence may be empty.
        shape: shape of the base kernel: ``[D, F]``, ``[V, D]`` or ``[kh, kw, D, F]``.
        num_experts: N, number of experts.
        dtype: dtype of ``lora_a``, ``lora_b`` and ``lora_bias``.
        directions: whether to add ``directions [D, N]``, for :mod:`xlora_jax.layers.arrow`.

    Returns:
        The leaves of the ``experts`` collection, each with a leading M axis.
    """
    count, (*inputs, width_out) = len(members), shape
    rank = max(sum(piece.b.shape[0] for piece in member) for member in members)
    a = np.zeros((count, *inputs, rank), dtype)
    b = np.zeros((count, rank, width_out), dtype)
    columns = np.zeros((count, num_experts, rank), np.float32)
    bias = np.zeros((count, num_experts, width_out), dtype)
    bias_scale = np.zeros((count, num_experts), np.float32)
    dropout = np.zeros((count, num_experts), np.float32)
    has_bias = False
    for m, member in enumerate(members):
        first = 0
        for piece in member:
            own = slice(first, first + piece.b.shape[0])
            first = own.stop
            a[m, ..., own] = piece.a
            b[m, own] = piece.b
            columns[m, piece.expert, own] = piece.scale
            dropout[m, piece.expert] = piece.dropout
            if piece.bias is not None:
                has_bias = True
                bias[m, piece.expert] = piece.bias
                bias_scale[m, piece.expert] = piece.scale
    leaves = {"lora_a": a, "lora_b": b, "columns": columns}
    if has_bias:
        leaves |= {"lora_bias": bias, "bias_scale": bias_scale}
    if directions:
        found = np.zeros((count, *inputs, num_experts), dtype)
        for m, member in enumerate(members):
            for piece in member:
                found[m, ..., piece.expert] = direction(piece.a, piece.b)
        leaves["directions"] = found
    if dropout.any():
        leaves["lora_dropout"] = dropout
    return leaves
