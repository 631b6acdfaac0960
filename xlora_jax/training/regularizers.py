"""Optional terms of the loss that shape the routing; all off by default, as PEFT has none.

Axes: B batch, T tokens, L adapted layers (1 where they share their gates), N experts.
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
        load_balance: of :func:`load_balance_loss`; 0.01 in the paper.
        entropy: of :func:`router_entropy`. Positive sharpens the scalings, negative keeps them from collapsing.
        z_loss: of :func:`router_z_loss`; 0.001 in the paper.
        per_layer: balance the experts within every adapted layer (True), or over all layers together.
    """

    load_balance: float = 0.0
    entropy: float = 0.0
    z_loss: float = 0.0
    per_layer: bool = True

    def __bool__(self) -> bool:
        """Tell whether any term is on."""
        return bool(self.load_balance or self.entropy or self.z_loss)

    def __call__(
        self, logits: jax.Array, mask: jax.Array | None, *, temperature: float, top_k: int | None
    ) -> jax.Array:
        """Weighted sum of the terms that are on: float32 scalar.

        Args:
            logits: ``[B, T, L, N]`` of the classifier, before temperature and softmax.
            mask: ``[B, T]``, zero where a token is padding; None for no padding.
            temperature: of the softmax.
            top_k: experts kept per token and layer, or None.
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
    """Mean over tokens of ``values [B, T, ...]`` with ``weights [B, T]``."""
    total: jax.Array = jnp.einsum("bt...,bt->...", values, weights)
    return total / jnp.maximum(weights.sum(), 1)


def load_balance_loss(logits: jax.Array, weights: jax.Array, top_k: int = 1, per_layer: bool = True) -> jax.Array:
    """Load-balance loss of Switch Transformers (arXiv 2101.03961, equations 4 to 6).

    ``N * sum_e f_e P_e``, with f_e the share of choices that fall on expert e and P_e its mean probability. It is 1 for
    perfectly even routing and N when one expert has everything. For ``top_k`` > 1 each token makes that many choices,
    as in GShard (arXiv 2006.16668).

    Args:
        logits: float32 ``[B, T, L, N]``, divided by the temperature.
        weights: float32 ``[B, T]``, 0 for padding.
        top_k: choices per token and layer.
        per_layer: within every layer, then the mean of the layers; else over all layers together.

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

    As a penalty it is minimum-entropy regularisation (Grandvalet and Bengio, NIPS 2004); with a negative weight the
    confidence penalty of arXiv 1701.06548.

    Args:
        logits: float32 ``[B, T, L, N]``, divided by the temperature.
        weights: float32 ``[B, T]``, 0 for padding.

    Returns:
        Scalar.
    """
    log_p = jax.nn.log_softmax(logits, axis=-1)
    return _mean(-(jnp.exp(log_p) * log_p).sum(axis=-1), weights).mean()


def router_z_loss(logits: jax.Array, weights: jax.Array) -> jax.Array:
    """Router z-loss of ST-MoE (arXiv 2202.08906, equation 5): the mean of ``logsumexp(logits) ** 2``.

    Args:
        logits: float32 ``[B, T, L, N]``, divided by the temperature.
        weights: float32 ``[B, T]``, 0 for padding.

    Returns:
        Scalar.
    """
    return _mean(jnp.square(logsumexp(logits, axis=-1)), weights).mean()
