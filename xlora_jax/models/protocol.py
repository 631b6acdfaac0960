"""What the rest of the library needs of a base model."""

from __future__ import annotations

from typing import Any, Protocol

import jax

__all__ = ["BaseModule"]


class BaseModule(Protocol):
    """A base model: a Flax module of :mod:`xlora_jax.models`, or one wrapped by :mod:`xlora_jax.conversion.linen`.

    It is hashable, so that it can be a static argument of ``jax.jit``.
    """

    @property
    def config(self) -> Any:
        """Its declaration; ``hidden_size`` is the width of ``hidden_states``."""

    @property
    def dtype(self) -> jax.typing.DTypeLike:
        """Of the computation."""

    @property
    def param_dtype(self) -> jax.typing.DTypeLike:
        """Of the parameters."""

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """Run it: inputs by name, ``with_logits``, ``rngs``; gives a :class:`~xlora_jax.models.DecoderOutput`.

        With ``method="unembed"``: logits of the hidden states that follow ``variables``.
        """

    def empty_cache(self, batch: int, capacity: int, *args: Any, **kwargs: Any) -> Any:
        """Make a cache for generation, or raise NotImplementedError where there is none."""

    def clone(self, **changes: Any) -> Any:
        """Return a copy with other settings, such as ``remat``."""
