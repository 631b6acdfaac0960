"""From logits to the next token. Warpers as in transformers, in its order: temperature, top-k, top-p."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["Sampler", "keep_top_k", "keep_top_p"]


def keep_top_k(logits: jax.Array, k: int) -> jax.Array:
    """Set all of ``logits [..., V]`` below the k-th largest to -inf; those equal to it stay."""
    k = min(k, logits.shape[-1])
    return jnp.where(logits < lax.top_k(logits, k)[0][..., -1:], -jnp.inf, logits)


def keep_top_p(logits: jax.Array, p: float) -> jax.Array:
    """Keep the fewest most probable of ``logits [..., V]`` whose probabilities reach ``p``, set the others to -inf.

    Nucleus sampling, arXiv 1904.09751. The most probable token always stays.
    """
    order = jnp.argsort(logits, axis=-1)
    ascending = jnp.take_along_axis(logits, order, axis=-1)
    drop = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1) <= 1 - p
    drop = drop.at[..., -1].set(False)
    kept = jnp.where(drop, -jnp.inf, ascending)
    return jnp.take_along_axis(kept, jnp.argsort(order, axis=-1), axis=-1)


@dataclass(frozen=True)
class Sampler:
    """How the next token is chosen; hashable.

    Attributes:
        do_sample: draw from the distribution (True), or take the most probable token (False).
        temperature: positive; divides the logits.
        top_k: keep the k most probable tokens; None or 0 keeps all.
        top_p: keep the most probable tokens that together reach this probability; None or 1 keeps all.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        """Refuse settings without meaning."""
        if not self.temperature > 0:
            raise ValueError(f"temperature: expected > 0, got {self.temperature}; for greedy decoding do_sample=False")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"top_k: expected >= 0 (0 keeps all), got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected within (0, 1], got {self.top_p}")

    def warp(self, logits: jax.Array) -> jax.Array:
        """Return ``logits [..., V]`` in float32 as warped by temperature, top-k and top-p."""
        logits = logits.astype(jnp.float32) / self.temperature
        if self.top_k:
            logits = keep_top_k(logits, self.top_k)
        if self.top_p is not None and self.top_p < 1:
            logits = keep_top_p(logits, self.top_p)
        return logits

    def __call__(self, rng: jax.Array, logits: jax.Array) -> jax.Array:
        """Choose int32 tokens ``[B]`` from ``logits [B, V]``."""
        if not self.do_sample:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return jax.random.categorical(rng, self.warp(logits), axis=-1).astype(jnp.int32)
