"""Evaluate a model on held-out rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from xlora_jax.training.data import Rows

__all__ = ["evaluate"]


def evaluate(
    step: Callable[..., Any],
    trainable: Any,
    frozen: Any,
    rows: Rows,
    batch_size: int,
    put: Callable[[Mapping[str, NDArray[Any]]], Any] = dict,
) -> tuple[float, NDArray[np.float64]]:
    """Evaluate on every row once.

    Args:
        step: function made by :func:`~xlora_jax.training.step.make_eval_step`.
        trainable: tree of the trainable parameters.
        frozen: tree of the other parameters.
        rows: held-out rows.
        batch_size: number of rows per batch, over all processes.
        put: function that puts NumPy arrays on the devices.

    Returns:
        Mean cross-entropy per token in nats, and each expert's mean scaling ``[N]``.
    """
    from xlora_jax.training.losses import IGNORED_LABEL

    total, tokens, scalings = 0.0, 0, np.zeros(1)
    local, rank = batch_size // jax.process_count(), jax.process_index()
    for start in range(0, len(rows), batch_size):
        batch = {name: array[start : start + batch_size] for name, array in rows.arrays.items()}
        missing = batch_size - len(batch["input_ids"])
        for name, array in batch.items():
            # The last batch is filled up with rows that have nothing to learn, so there is only one shape to compile.
            fill = IGNORED_LABEL if name == "labels" else 0
            batch[name] = np.pad(array, ((0, missing), (0, 0)), constant_values=fill)[rank * local : (rank + 1) * local]
        loss, count, sums = step(trainable, frozen, put(batch))
        total, tokens, scalings = total + float(loss), tokens + int(count), scalings + np.asarray(sums, np.float64)
    return total / max(tokens, 1), scalings / max(tokens, 1)
