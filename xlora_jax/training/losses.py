"""Training losses: next-token cross-entropy, whole or in chunks.

Axes: B batch, T tokens, D width, V vocabulary, L adapted layers, N experts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

__all__ = [
    "IGNORED_LABEL",
    "HeadFunction",
    "causal_lm_loss",
    "chunked_cross_entropy",
    "next_token_targets",
    "summed_cross_entropy",
]

IGNORED_LABEL = -100

# (trainable parameters, frozen parameters, hidden [B, t, D], scalings [B, t, L, N] or None) -> logits [B, t, V]
HeadFunction = Callable[[Any, Any, jax.Array, jax.Array | None], jax.Array]


def next_token_targets(labels: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """Return int ``[B, T]``: at t the label of t + 1, ignored at the end of a row and between packed documents."""
    targets = jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED_LABEL)
    if segment_ids is None:
        return targets
    same = jnp.pad(segment_ids[:, 1:] == segment_ids[:, :-1], ((0, 0), (0, 1)))
    return jnp.where(same, targets, IGNORED_LABEL)


def causal_lm_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the mean cross-entropy of the next token, in nats, as transformers computes it.

    Args:
        logits: ``[B, T, V]``; cast to float32.
        labels: int ``[B, T]``, not shifted: the label at t is predicted from t - 1. -100 is ignored.

    Returns:
        float32 scalar; 0 if every label is ignored.
    """
    targets = next_token_targets(labels)
    return summed_cross_entropy(logits, targets) / jnp.maximum((targets != IGNORED_LABEL).sum(), 1)


def chunked_cross_entropy(
    head: HeadFunction,
    learned: Any,
    frozen: Any,
    hidden_states: jax.Array,
    scalings: jax.Array | None,
    targets: jax.Array,
    chunk: int,
) -> jax.Array:
    """Return the summed cross-entropy of all tokens without storing the logits of all tokens.

    The output head is applied to ``chunk`` positions of each row at a time, and the chunk's gradient is computed right
    away. So logits are computed once, and only ``[B, chunk, V]`` of them exist at a time. The chunks run over
    positions, so any kind of head works: tied, capped, or adapted by experts.

    Args:
        head: pure function to logits; it must not close over differentiated arrays.
        learned: tree of the head's parameters that have a gradient, possibly empty.
        frozen: tree of the head's other parameters.
        hidden_states: ``[B, T, D]``.
        scalings: ``[B, T, L or 1, N]`` for a head with experts, or None.
        targets: int ``[B, T]``, already shifted; -100 is ignored.
        chunk: number of positions per chunk, at least 1.

    Returns:
        float32 scalar, in nats.
    """
    if chunk < 1:
        raise ValueError(f"loss chunk: expected at least 1 position, got {chunk}")
    total: jax.Array = _chunked(head, chunk, learned, frozen, hidden_states, scalings, targets)
    return total


def summed_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Return the summed cross-entropy of logits ``[B, T, V]`` for targets ``[B, T]``, already shifted; in float32."""
    counted = targets != IGNORED_LABEL
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), jnp.where(counted, targets, 0))
    return jnp.where(counted, losses, 0).sum()


def _split(array: jax.Array, chunk: int, fill: float | int = 0) -> jax.Array:
    """Reshape ``[B, T, ...]`` to ``[chunks, B, chunk, ...]``, padded at the end."""
    batch, length, *rest = array.shape
    chunks = -(-length // chunk)
    padding = [(0, 0), (0, chunks * chunk - length), *[(0, 0)] * len(rest)]
    padded = jnp.pad(array, padding, constant_values=fill)
    return jnp.moveaxis(padded.reshape(batch, chunks, chunk, *rest), 1, 0)


def _join(chunks: jax.Array, length: int) -> jax.Array:
    """Undo :func:`_split`."""
    joined = jnp.moveaxis(chunks, 0, 1)
    return joined.reshape(joined.shape[0], -1, *joined.shape[3:])[:, :length]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked(
    head: HeadFunction,
    chunk: int,
    learned: Any,
    frozen: Any,
    hidden: jax.Array,
    scalings: jax.Array | None,
    targets: jax.Array,
) -> jax.Array:
    chunk = min(chunk, hidden.shape[1])

    def body(total: jax.Array, part: Any) -> tuple[jax.Array, None]:
        h, s, t = part
        return total + summed_cross_entropy(head(learned, frozen, h, s), t), None

    start: jax.Array = jnp.float32(0)
    return lax.scan(body, start, _parts(hidden, scalings, targets, chunk))[0]


def _parts(hidden: jax.Array, scalings: jax.Array | None, targets: jax.Array, chunk: int) -> Any:
    s = None if scalings is None else _split(scalings, chunk)
    return _split(hidden, chunk), s, _split(targets, chunk, IGNORED_LABEL)


def _chunked_forward(
    head: HeadFunction,
    chunk: int,
    learned: Any,
    frozen: Any,
    hidden: jax.Array,
    scalings: jax.Array | None,
    targets: jax.Array,
) -> tuple[jax.Array, Any]:
    length = hidden.shape[1]
    chunk = min(chunk, length)

    def body(carry: Any, part: Any) -> tuple[Any, Any]:
        total, d_learned = carry
        h, s, t = part

        def loss(learned: Any, h: jax.Array, s: jax.Array | None) -> jax.Array:
            return summed_cross_entropy(head(learned, frozen, h, s), t)

        value, (d_more, d_h, d_s) = jax.value_and_grad(loss, argnums=(0, 1, 2))(learned, h, s)
        return (total + value, jax.tree.map(jnp.add, d_learned, d_more)), (d_h, d_s)

    start = (jnp.float32(0), jax.tree.map(jnp.zeros_like, learned))
    (total, d_learned), (d_hidden, d_scalings) = lax.scan(body, start, _parts(hidden, scalings, targets, chunk))
    d_scalings = None if scalings is None else _join(d_scalings, length)
    return total, (d_learned, _join(d_hidden, length), d_scalings)


def _chunked_backward(head: HeadFunction, chunk: int, gradients: Any, d_total: jax.Array) -> tuple[Any, ...]:
    d_learned, d_hidden, d_scalings = jax.tree.map(lambda g: g * d_total.astype(g.dtype), gradients)
    return d_learned, None, d_hidden, d_scalings, None


_chunked.defvjp(_chunked_forward, _chunked_backward)
