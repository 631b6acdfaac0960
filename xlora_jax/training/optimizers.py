"""Optimizers and learning-rate schedules by name, for callers without an optax transformation of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

__all__ = ["OPTIMIZERS", "SCHEDULES", "make_optimizer", "make_schedule", "only_expert"]

Schedule = Callable[[Any], Any]

# name -> (schedule, weight decay, first and second beta, epsilon) -> transformation
OPTIMIZERS: dict[str, Callable[[Schedule, float, float, float, float], optax.GradientTransformation]] = {
    "adamw": lambda rate, decay, b1, b2, eps: optax.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=decay),
    "adam": lambda rate, decay, b1, b2, eps: optax.adam(rate, b1=b1, b2=b2, eps=eps),
    "lion": lambda rate, decay, b1, b2, eps: optax.lion(rate, b1=b1, b2=b2, weight_decay=decay),
    "adafactor": lambda rate, decay, b1, b2, eps: optax.adafactor(rate, weight_decay_rate=decay or None),
    "sgd": lambda rate, decay, b1, b2, eps: optax.sgd(rate, momentum=b1 or None),
}

SCHEDULES = ("constant", "linear", "cosine")


def make_schedule(name: str, peak: float, steps: int, warmup: int = 0) -> Schedule:
    """Make a schedule: a linear warm-up from 0, then constant or decaying to 0 at the last step.

    Args:
        name: one of :data:`SCHEDULES`.
        peak: learning rate after the warm-up.
        steps: number of steps of the whole training.
        warmup: number of warm-up steps.

    Raises:
        ValueError: the name is unknown, or the warm-up is longer than the training.
    """
    if name not in SCHEDULES:
        raise ValueError(f"schedule: expected one of {', '.join(SCHEDULES)}, got {name!r}")
    if not 0 <= warmup <= steps:
        raise ValueError(f"warm-up: expected between 0 and the {steps} steps of the training, got {warmup}")
    rest = max(steps - warmup, 1)
    after: Schedule = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, 0.0, rest),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest),
    }[name]()
    if not warmup:
        return after
    joined: Schedule = optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])
    return joined


def make_optimizer(
    name: str,
    schedule: Schedule,
    *,
    weight_decay: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    max_grad_norm: float | None = 1.0,
) -> optax.GradientTransformation:
    """Make an optimizer that first clips the gradient's global norm.

    Args:
        name: key of :data:`OPTIMIZERS`.
        schedule: function from a step to its learning rate.
        weight_decay: coefficient of the decoupled weight decay (not for ``adam`` and ``sgd``).
        b1: decay of the first moment; the momentum of ``sgd``.
        b2: decay of the second moment.
        eps: epsilon of adaptive optimizers.
        max_grad_norm: maximum norm of the gradient; None for no clipping.

    Raises:
        ValueError: the name is unknown, or the optimizer would ignore the weight decay.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer: expected one of {', '.join(OPTIMIZERS)}, got {name!r}")
    if weight_decay and name in ("adam", "sgd"):
        raise ValueError(f"optimizer {name!r} has no weight decay: expected 0, got {weight_decay}; use adamw")
    optimizer = OPTIMIZERS[name](schedule, weight_decay, b1, b2, eps)
    if max_grad_norm is None:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(max_grad_norm), optimizer)


def only_expert(
    optimizer: optax.GradientTransformation, depth: int, experts: int, number: int
) -> optax.GradientTransformation:
    """Restrict an optimizer to the classifier's outputs for one expert; everything else keeps its values.

    Args:
        optimizer: any optax transformation of the trainable parameters.
        depth: number of linear layers of the classifier.
        experts: N, number of experts.
        number: number of the expert that learns.
    """

    def own(path: tuple[Any, ...], leaf: Any) -> Any:
        if [key.key for key in path[:2]] != ["classifier", f"dense_{depth - 1}"]:
            return jnp.zeros_like(leaf)
        columns = leaf.reshape(*leaf.shape[:-1], -1, experts)
        return jnp.where(jnp.arange(experts) == number, columns, 0).reshape(leaf.shape)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        # The gradient is masked for the clipping by its norm, the update for weight decay.
        updates, state = optimizer.update(jax.tree_util.tree_map_with_path(own, updates), state, params)
        return jax.tree_util.tree_map_with_path(own, updates), state

    return optax.GradientTransformation(optimizer.init, update)
