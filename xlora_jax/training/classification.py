"""Classification losses, and a training step for any loss of the model's output.

These are for PEFT's ``task_type`` SEQ_CLS and TOKEN_CLS. For causal language models, :mod:`xlora_jax.training.step` has
a step that never holds all logits at once. Axes as in :mod:`xlora_jax.layers.mixing`, and C for the classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from xlora_jax.passes import Params, XLora, XLoraOutput, forward
from xlora_jax.training.step import IGNORED_LABEL, Batch, TrainState, merge_params

__all__ = ["classification_loss", "make_objective_step"]


def classification_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the mean cross-entropy in nats, as transformers computes it for sequences and for tokens.

    Args:
        logits: ``[B, C]`` with labels ``[B]`` (SEQ_CLS), or ``[B, T, C]`` with labels ``[B, T]`` (TOKEN_CLS).
        labels: int; -100 is ignored.

    Returns:
        float32 scalar; 0 if every label is ignored.
    """
    if labels.shape != logits.shape[:-1]:
        raise ValueError(f"labels: expected shape {list(logits.shape[:-1])} from the logits, got {list(labels.shape)}")
    counted = labels != IGNORED_LABEL
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), jnp.where(counted, labels, 0))
    return jnp.where(counted, losses, 0).sum() / jnp.maximum(counted.sum(), 1)


def _classification(out: XLoraOutput, labels: jax.Array) -> jax.Array:
    assert out.logits is not None
    return classification_loss(out.logits, labels)


def make_objective_step(
    xlora: XLora,
    optimizer: optax.GradientTransformation,
    loss: Callable[[XLoraOutput, jax.Array], jax.Array] = _classification,
) -> Callable[[TrainState, Params, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Make the jitted step ``(state, frozen, batch) -> (state, metrics)`` for a loss of the model's output.

    Args:
        xlora: static description of the model.
        optimizer: any optax transformation.
        loss: function of the output and ``batch["labels"]``; default :func:`classification_loss` of its logits.

    Returns:
        The step; the state is donated. A batch has ``labels`` and the inputs of the model by name. The classifier's
        dropout and the experts' ``lora_dropout`` are on. Metrics are ``loss`` and ``grad_norm``.
    """

    def loss_of(trainable: Params, frozen: Params, batch: Batch, rng: jax.Array) -> jax.Array:
        dropout, lora_dropout = jax.random.split(rng)
        inputs: dict[str, Any] = {name: value for name, value in batch.items() if name != "labels"}
        rngs = {"dropout": dropout, "lora_dropout": lora_dropout}
        return loss(forward(xlora, merge_params(trainable, frozen), rngs=rngs, **inputs), batch["labels"])

    def step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        rng = jax.random.fold_in(state.rng, state.step)
        value, gradients = jax.value_and_grad(loss_of)(state.trainable, frozen, batch, rng)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        metrics = {"loss": value, "grad_norm": optax.tree.norm(gradients)}
        changes: dict[str, Any] = {"step": state.step + 1, "trainable": trainable, "opt_state": opt_state}
        return dataclasses.replace(state, **changes), metrics

    return jax.jit(step, donate_argnums=0)
