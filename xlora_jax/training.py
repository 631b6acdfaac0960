"""Training of the gate, and of the experts if asked for, with any optax transformation.

Only what learns has gradients and optimiser state: the parameters are split into a trainable and a frozen tree, and the
loss is differentiated with respect to the first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from flax import struct

from xlora_jax.config import XLoraConfig
from xlora_jax.forward import Params, XLora, forward
from xlora_jax.trees import Path, flatten, unflatten

__all__ = [
    "IGNORED_LABEL",
    "TrainState",
    "causal_lm_loss",
    "init_train_state",
    "make_train_step",
    "merge_params",
    "split_params",
]

IGNORED_LABEL = -100
_LEARNED_BY_EXPERTS = ("lora_a", "lora_b", "lora_bias")

Batch = Mapping[str, jax.Array]


def causal_lm_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy of the next token, in nats, as transformers computes it.

    Args:
        logits: ``[B, T, V]``; taken to float32.
        labels: int ``[B, T]``, not shifted: the label at t is predicted from t - 1. -100 is ignored.

    Returns:
        float32 scalar; 0 if every label is ignored.
    """
    targets = labels[:, 1:]
    counted = targets != IGNORED_LABEL
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits[:, :-1].astype(jnp.float32), jnp.where(counted, targets, 0)
    )
    return jnp.where(counted, losses, 0).sum() / jnp.maximum(counted.sum(), 1)


def split_params(params: Params, config: XLoraConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split into what learns and what does not: two trees with the same paths, which :func:`merge_params` joins.

    The classifier learns; with ``use_trainable_adapters`` so do the experts' ``lora_a``, ``lora_b`` and ``lora_bias``,
    but not the columns that say whose they are.
    """
    flat = flatten(params)

    def learns(path: Path) -> bool:
        if path[0] == "experts":
            return config.use_trainable_adapters and path[-1] in _LEARNED_BY_EXPERTS
        return path[0] == "classifier"

    trainable = {path: leaf for path, leaf in flat.items() if learns(path)}
    frozen = {path: leaf for path, leaf in flat.items() if path not in trainable}
    return unflatten(trainable), unflatten(frozen)


def merge_params(trainable: Params, frozen: Params) -> dict[str, Any]:
    """Join what :func:`split_params` split."""
    return unflatten(flatten(frozen) | flatten(trainable))


@struct.dataclass
class TrainState:
    """What changes from step to step.

    Attributes:
        step: int32, steps taken.
        trainable: the parameters that learn.
        opt_state: the optimiser's state, over ``trainable`` alone.
        rng: PRNG key of the dropouts, folded with ``step``.
    """

    step: jax.Array
    trainable: dict[str, Any]
    opt_state: optax.OptState
    rng: jax.Array


def init_train_state(
    params: Params, config: XLoraConfig, optimizer: optax.GradientTransformation, seed: int = 0
) -> tuple[TrainState, dict[str, Any]]:
    """Start training from ``params``.

    Returns:
        The state, and the frozen parameters, which every step is given beside it.
    """
    trainable, frozen = split_params(params, config)
    # A copy: the step donates its state, and `params` stay with the caller.
    trainable = jax.tree.map(jnp.copy, trainable)
    return TrainState(jnp.int32(0), trainable, optimizer.init(trainable), jax.random.key(seed)), frozen


def make_train_step(
    model: XLora, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Params, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Make the jitted step ``(state, frozen, batch) -> (state, metrics)``; the state is donated.

    A batch has ``input_ids`` and ``labels`` ``[B, T]``, and may have ``attention_mask``. The classifier's dropout and
    the experts' ``lora_dropout`` act, as in PEFT's training mode. Metrics are ``loss`` and ``grad_norm``.
    """

    def loss_of(trainable: Params, frozen: Params, batch: Batch, rng: jax.Array) -> jax.Array:
        dropout, lora_dropout = jax.random.split(rng)
        out = forward(
            model,
            merge_params(trainable, frozen),
            batch["input_ids"],
            attention_mask=batch.get("attention_mask"),
            rngs={"dropout": dropout, "lora_dropout": lora_dropout},
        )
        assert out.logits is not None
        return causal_lm_loss(out.logits, batch["labels"])

    def step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        rng = jax.random.fold_in(state.rng, state.step)
        loss, grads = jax.value_and_grad(loss_of)(state.trainable, frozen, batch, rng)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        trainable = cast(dict[str, Any], optax.apply_updates(state.trainable, updates))
        metrics = {"loss": loss, "grad_norm": optax.global_norm(grads)}
        return TrainState(state.step + 1, trainable, opt_state, state.rng), metrics

    return jax.jit(step, donate_argnums=0)
