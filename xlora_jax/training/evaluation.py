"""Evaluate a model on held-out rows: loss, mean scalings, mean gates of each layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from xlora_jax.layers import mixing
from xlora_jax.passes import Params, XLora, classify, scaling_pass
from xlora_jax.training.data import Rows
from xlora_jax.training.losses import IGNORED_LABEL, next_token_targets

__all__ = ["evaluate", "mean_gates"]


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
    total, tokens, scalings = 0.0, 0, np.zeros(1)
    for batch in _batches(rows, batch_size):
        loss, count, sums = step(trainable, frozen, put(batch))
        total, tokens, scalings = total + float(loss), tokens + int(count), scalings + np.asarray(sums, np.float64)
    return total / max(tokens, 1), scalings / max(tokens, 1)


def mean_gates(xlora: XLora, params: Params, rows: Rows, batch_size: int = 8) -> NDArray[np.float64]:
    """Return each expert's mean gate at each adapted layer, over the tokens that the rows predict.

    Args:
        xlora: static description.
        params: parameters of the model.
        rows: rows of a causal language model.
        batch_size: number of rows at a time.

    Returns:
        Gates ``[L, N]``, after top-k, the softmax over the selected and the global weight: the factors of the experts'
        outputs.

    Raises:
        ValueError: the rows predict no token.
    """
    total, tokens = np.zeros(1), 0.0
    for batch in _batches(rows, min(batch_size, len(rows))):
        sums, count = _gate_sums(xlora, params, batch)
        total, tokens = total + np.asarray(sums, np.float64), tokens + float(count)
    if not tokens:
        raise ValueError("mean_gates: expected rows with tokens to predict, got none")
    return np.broadcast_to(total / tokens, (len(xlora.layers), xlora.num_experts)).copy()


@partial(jax.jit, static_argnums=0)
def _gate_sums(xlora: XLora, params: Params, batch: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
    """Return the sum of the gates ``[L or 1, N]`` over the predicted tokens, and the number of these tokens."""
    inputs: dict[str, Any] = {name: array for name, array in batch.items() if name != "labels"}
    hidden, _ = scaling_pass(xlora, params, **inputs)
    gates = mixing.layer_gates(
        classify(xlora, params, hidden),
        top_k=xlora.config.top_k_lora,
        softmax_selected=xlora.config.enable_softmax_topk,
        weight=xlora.config.global_scaling_weight,
    )
    counted = next_token_targets(batch["labels"], batch.get("segment_ids")) != IGNORED_LABEL
    sums = jnp.einsum("btln,bt->ln", gates.astype(jnp.float32), counted.astype(jnp.float32), precision="highest")
    return sums, counted.sum()


def _batches(rows: Rows, batch_size: int) -> Iterator[dict[str, NDArray[Any]]]:
    """Yield all rows in batches of one shape, and of each batch the part of this process."""
    local, rank = batch_size // jax.process_count(), jax.process_index()
    for start in range(0, len(rows), batch_size):
        batch = {name: array[start : start + batch_size] for name, array in rows.arrays.items()}
        missing = batch_size - len(batch["input_ids"])
        for name, array in batch.items():
            # The last batch is filled up with rows that have nothing to learn, so there is only one shape to compile.
            fill = IGNORED_LABEL if name == "labels" else 0
            batch[name] = np.pad(array, ((0, missing), (0, 0)), constant_values=fill)[rank * local : (rank + 1) * local]
        yield batch
