"""From logits to the next token: the processors of transformers, in its order, and a reproducible draw.

A processor is a frozen dataclass that maps ``(logits, tokens, length)`` to logits. A :class:`Sampler` holds a tuple of
processors, so it is hashable and can be a static argument of ``jax.jit``. The noise of a draw depends on seed, row and
position alone. So the text is the same with and without drafts, streamed or not.

Axes: B batch, S slots of the token buffer, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax

__all__ = [
    "LogitsProcessor",
    "MinP",
    "RepetitionPenalty",
    "Sampler",
    "Temperature",
    "TopK",
    "TopP",
]


class LogitsProcessor(Protocol):
    """A pure function of the logits and of the earlier tokens; hashable."""

    def __call__(self, logits: jax.Array, tokens: jax.Array, length: jax.Array) -> jax.Array:
        """Return the changed logits.

        Args:
            logits: float32 ``[B, V]``.
            tokens: int32 ``[B, S]``; the first ``length[b]`` tokens of row b are valid.
            length: int32 ``[B]``, number of tokens of each row.
        """
        ...


@dataclass(frozen=True)
class RepetitionPenalty:
    """Discourage tokens that occur in the row: divide their positive logits by ``penalty``, multiply negative ones.

    arXiv 1909.05858. The prompt counts; padding does not.

    Attributes:
        penalty: positive factor; above 1 discourages.
    """

    penalty: float

    def __post_init__(self) -> None:
        """Validate the fields."""
        _require("repetition_penalty", self.penalty, self.penalty > 0, "> 0 (1 changes nothing)")

    def __call__(self, logits: jax.Array, tokens: jax.Array, length: jax.Array) -> jax.Array:
        """See :class:`LogitsProcessor`."""
        rows = jnp.arange(len(tokens))[:, None]
        there = jnp.where(jnp.arange(tokens.shape[1]) < length[:, None], tokens, logits.shape[-1])
        seen = jnp.zeros(logits.shape, bool).at[rows, there].set(True, mode="drop")
        return jnp.where(seen, jnp.where(logits < 0, logits * self.penalty, logits / self.penalty), logits)


@dataclass(frozen=True)
class Temperature:
    """Divide the logits.

    Attributes:
        temperature: positive divisor; lower is sharper.
    """

    temperature: float

    def __post_init__(self) -> None:
        """Validate the fields."""
        _require("temperature", self.temperature, self.temperature > 0, "> 0; for greedy decoding do_sample=False")

    def __call__(self, logits: jax.Array, tokens: jax.Array, length: jax.Array) -> jax.Array:
        """See :class:`LogitsProcessor`."""
        return logits / self.temperature


@dataclass(frozen=True)
class TopK:
    """Keep the k largest logits and those equal to the k-th; set the others to -inf.

    Attributes:
        k: number of logits to keep, at least 1; above V it keeps all.
    """

    k: int

    def __post_init__(self) -> None:
        """Validate the fields."""
        _require("top_k", self.k, self.k >= 1, ">= 1 (None or 0 keeps all)")

    def __call__(self, logits: jax.Array, tokens: jax.Array, length: jax.Array) -> jax.Array:
        """See :class:`LogitsProcessor`."""
        k = min(self.k, logits.shape[-1])
        return jnp.where(logits < lax.top_k(logits, k)[0][..., -1:], -jnp.inf, logits)


@dataclass(frozen=True)
class TopP:
    """Keep the fewest most probable tokens whose probabilities together reach p (nucleus sampling, arXiv 1904.09751).

    Attributes:
        p: probability in (0, 1]. The most probable token always stays.
    """

    p: float

    def __post_init__(self) -> None:
        """Validate the fields."""
        _require("top_p", self.p, 0 < self.p <= 1, "within (0, 1]")

    def __call__(self, logits: jax.Array, tokens: jax.Array, length: jax.Array) -> jax.Array:
        """See :class:`LogitsProcessor`."""
        order = jnp.argsort(logits, axis=-1)
        ascending = jnp.take_along_axis(logits, order, axis=-1)
        drop = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1) <= 1 - self.p
        drop = drop.at[..., -1].set(False)
        kept = jnp.where(drop, -jnp.inf, ascending)
        return jnp.take_along_axis(kept, jnp.argsort(order, axis=-1), axis=-1)


@dataclass(frozen=True)
class MinP:
    """Keep tokens at least ``p`` times as probable as the most probable one (arXiv 2407.01082).

    Attributes:
        p: factor in [0, 1].
    """

    p: float

    def __post_init__(self) -> None:
        """Validate the fields."""
        _require("min_p", self.p, 0 <= self.p <= 1, "within [0, 1]")

    def __call__(self, logits: jax.Array, tokens: jax.Array, length: jax.Array) -> jax.Array:
        """See :class:`LogitsProcessor`."""
        probabilities = jax.nn.softmax(logits, axis=-1)
        least = self.p * probabilities.max(axis=-1, keepdims=True)
        return jnp.where(probabilities < least, -jnp.inf, logits)


@dataclass(frozen=True)
class Sampler:
    """A rule that chooses the next token; hashable.

    Attributes:
        do_sample: whether to draw from the distribution (True) or take the most probable token (False).
        processors: processors of the logits, applied in this order before the choice.
    """

    do_sample: bool = False
    processors: tuple[LogitsProcessor, ...] = ()

    @classmethod
    def of(
        cls,
        *,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        extra: Sequence[LogitsProcessor] = (),
    ) -> Sampler:
        """Make a sampler from the settings of transformers' ``generate``.

        Args:
            do_sample: see :class:`Sampler`. If False, the next four settings have no effect, as in transformers.
            temperature: see :class:`Temperature`.
            top_k: see :class:`TopK`; None or 0 keeps all.
            top_p: see :class:`TopP`; None or 1 keeps all.
            min_p: see :class:`MinP`; None or 0 keeps all.
            repetition_penalty: see :class:`RepetitionPenalty`; acts on greedy decoding too.
            extra: your own processors; they come after the penalty and before the temperature, as in transformers.

        Raises:
            ValueError: a setting is invalid.
        """
        # All processors are made, so that an invalid setting is refused even if it would have no effect.
        draw: list[LogitsProcessor] = [Temperature(temperature)]
        if top_k:
            draw.append(TopK(top_k))
        if top_p is not None:
            draw.append(TopP(top_p))
        if min_p:
            draw.append(MinP(min_p))
        penalty = RepetitionPenalty(repetition_penalty)
        neutral = (Temperature(1.0), TopP(1.0), RepetitionPenalty(1.0))
        chosen = [penalty, *extra, *(draw if do_sample else ())]
        return cls(do_sample, tuple(processor for processor in chosen if processor not in neutral))

    def process(self, logits: jax.Array, tokens: jax.Array, length: jax.Array) -> jax.Array:
        """Apply the processors and return float32 ``[B, V]``; arguments as in :class:`LogitsProcessor`."""
        logits = logits.astype(jnp.float32)
        for processor in self.processors:
            logits = processor(logits, tokens, length)
        return logits

    def __call__(self, rng: jax.Array, logits: jax.Array, tokens: jax.Array, length: jax.Array) -> jax.Array:
        """Choose the token that follows the first ``length`` of each row.

        Args:
            rng: PRNG key of the whole generation, the same at every position.
            logits: float ``[B, V]``.
            tokens: int32 ``[B, S]``.
            length: int32 ``[B]``, number of tokens of each row.

        Returns:
            int32 ``[B]``.
        """
        logits = self.process(logits, tokens, length)
        if not self.do_sample:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)

        def draw(row: jax.Array, position: jax.Array, scores: jax.Array) -> jax.Array:
            # Gumbel noise of this row and position. A draft and its check use the same noise, so they nearly always
            # agree on the token if their distributions are close. The check's draw is the one that is kept.
            return jax.random.categorical(jax.random.fold_in(jax.random.fold_in(rng, row), position), scores)

        return jax.vmap(draw)(jnp.arange(len(logits)), length, logits).astype(jnp.int32)


def _require(name: str, value: float, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {value}")
