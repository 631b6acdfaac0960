"""Interface of a base model, as the rest of the library uses it."""

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
        """Config of the model; its ``hidden_size`` is the width of ``hidden_states``."""

    @property
    def dtype(self) -> jax.typing.DTypeLike:
        """Dtype of the computation."""

    @property
    def param_dtype(self) -> jax.typing.DTypeLike:
        """Dtype of the parameters."""

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the model on inputs by name, ``with_logits`` and ``rngs``; return a ``DecoderOutput``.

        With ``method="unembed"``, return the logits for the hidden states that follow ``variables``. A module that
        can't has an attribute ``whole_logits`` that is True.
        """

    def empty_cache(self, batch: int, capacity: int, *args: Any, **kwargs: Any) -> Any:
        """Make a cache for generation, or raise NotImplementedError if the model has none."""

    def clone(self, **changes: Any) -> Any:
        """Return a copy with other settings, such as ``remat``."""
