"""Optional loss terms that shape the routing. All are off by default, because PEFT has none.

Axes: B batch, T tokens, L adapted layers (1 if they share their gates), N experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.nn import logsumexp

__all__ = ["Regularizers", "load_balance_loss", "router_entropy", "router_z_loss"]


@dataclass(frozen=True)
class Regularizers:
    """Weights of the terms; a term of weight 0 is not computed.

    Attributes:
        load_balance: weight of :func:`load_balance_loss`; 0.01 in the paper.
        entropy: weight of :func:`router_entropy`. A positive one sharpens the scalings; a negative one prevents
            collapse.
        z_loss: weight of :func:`router_z_loss`; 0.001 in the paper.
        per_layer: whether to balance the experts within every adapted layer, or over all layers together.
    """

    load_balance: float = 0.0
    entropy: float = 0.0
    z_loss: float = 0.0
    per_layer: bool = True

    def __bool__(self) -> bool:
        """Return whether any term is on."""
        return bool(self.load_balance or self.entropy or self.z_loss)

    def __call__(
        self, logits: jax.Array, mask: jax.Array | None, *, temperature: float, top_k: int | None
    ) -> jax.Array:
        """Return the weighted sum of the terms that are on, a float32 scalar.

        Args:
            logits: ``[B, T, L, N]`` of the classifier, before temperature and softmax.
            mask: ``[B, T]``, zero at padding; None for no padding.
            temperature: softmax temperature.
            top_k: number of experts kept per token and layer, or None.
        """
        logits = logits.astype(jnp.float32) / temperature
        weights = jnp.ones(logits.shape[:2]) if mask is None else (mask != 0).astype(jnp.float32)
        total: jax.Array = jnp.float32(0)
        if self.load_balance:
            total += self.load_balance * load_balance_loss(logits, weights, top_k or 1, self.per_layer)
        if self.entropy:
            total += self.entropy * router_entropy(logits, weights)
        if self.z_loss:
            total += self.z_loss * router_z_loss(logits, weights)
        return total


def _mean(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Return the mean over tokens of ``values [B, T, ...]`` with ``weights [B, T]``."""
    total: jax.Array = jnp.einsum("bt...,bt->...", values, weights)
    return total / jnp.maximum(weights.sum(), 1)


def load_balance_loss(logits: jax.Array, weights: jax.Array, top_k: int = 1, per_layer: bool = True) -> jax.Array:
    """Return the load-balance loss of Switch Transformers (arXiv 2101.03961, equations 4 to 6).

    It is ``N * sum_e f_e P_e``, with f_e the share of choices that fall on expert e and P_e its mean probability. It is
    1 for perfectly even routing, and N if one expert gets everything. For ``top_k`` > 1 each token makes that many
    choices, as in GShard (arXiv 2006.16668).

    Args:
        logits: float32 ``[B, T, L, N]``, divided by the temperature.
        weights: float32 ``[B, T]``, 0 for padding.
        top_k: number of choices per token and layer.
        per_layer: whether to take the mean of each layer's loss, or the loss over all layers together.

    Returns:
        Scalar.
    """
    experts = logits.shape[-1]
    _, chosen = jax.lax.top_k(logits, min(top_k, experts))
    share = _mean(jax.nn.one_hot(chosen, experts).mean(axis=-2), weights)  # [L, N]
    probability = _mean(jax.nn.softmax(logits, axis=-1), weights)
    if not per_layer:
        share, probability = share.mean(axis=0, keepdims=True), probability.mean(axis=0, keepdims=True)
    return experts * (share * probability).sum(axis=-1).mean()


def router_entropy(logits: jax.Array, weights: jax.Array) -> jax.Array:
    """Return the mean entropy of a token's scalings, in nats: between 0 (one expert) and log N (all alike).

    With a positive weight it is minimum-entropy regularization (Grandvalet and Bengio, NIPS 2004); with a negative
    weight it is the confidence penalty of arXiv 1701.06548.

    Args:
        logits: float32 ``[B, T, L, N]``, divided by the temperature.
        weights: float32 ``[B, T]``, 0 for padding.

    Returns:
        Scalar.
    """
    log_p = jax.nn.log_softmax(logits, axis=-1)
    return _mean(-(jnp.exp(log_p) * log_p).sum(axis=-1), weights).mean()


def router_z_loss(logits: jax.Array, weights: jax.Array) -> jax.Array:
    """Return the router z-loss of ST-MoE (arXiv 2202.08906, equation 5): the mean of ``logsumexp(logits) ** 2``.

    Args:
        logits: float32 ``[B, T, L, N]``, divided by the temperature.
        weights: float32 ``[B, T]``, 0 for padding.

    Returns:
        Scalar.
    """
    return _mean(jnp.square(logsumexp(logits, axis=-1)), weights).mean()
