"""Checks of token ids and lengths that users pass in: on the host, before anything is compiled or run."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import numpy as np

__all__ = ["check_token_ids", "warn_beyond_context"]


def check_token_ids(ids: Any, vocab_size: int | None, name: str, *, ignored: int | None = None) -> None:
    """Check that every id has a row in the base's embedding.

    Args:
        ids: int ``[...]``, NumPy or JAX. Of an array spread over processes, this process's part is checked. Tracers
            are not checked: they have no values.
        vocab_size: V, number of rows; None or 0 checks nothing.
        name: name of the argument, for the message.
        ignored: value that is allowed beside the ids, such as the label of tokens that are not learned.

    Raises:
        ValueError: an id is below 0, or at least ``vocab_size``.
    """
    if not vocab_size or isinstance(ids, jax.core.Tracer):
        return
    parts = [ids]
    if isinstance(ids, jax.Array) and not ids.is_fully_addressable:
        parts = [shard.data for shard in ids.addressable_shards]
    for part in map(np.asarray, parts):
        wrong = (part < 0) | (part >= vocab_size)
        if ignored is not None:
            wrong &= part != ignored
        if wrong.any():
            place = tuple(int(index) for index in np.argwhere(wrong)[0])
            beside = "" if ignored is None else f", or {ignored}"
            raise ValueError(
                f"{name}: expected token ids from 0 to {vocab_size - 1}, the rows of the base's embedding{beside}, got "
                f"{int(part[place])} at {list(place)}. A larger id comes from a tokenizer with added tokens: use the "
                f"base's own tokenizer, or the base that was resized for it (resize_token_embeddings). Padding takes "
                f"any of these ids, together with an attention_mask."
            )


def warn_beyond_context(length: int, context_length: int | None, *, stacklevel: int = 2) -> None:
    """Warn once if an input has more tokens than the model has positions.

    Args:
        length: T, number of tokens of the longest row.
        context_length: number of positions that the model was made for; None if unknown.
        stacklevel: stack level of the warning, as in :func:`warnings.warn`.
    """
    if context_length is not None and length > context_length:
        warnings.warn(
            f"{length} tokens, but the model was made for {context_length} positions (max_position_embeddings): its "
            f"output beyond them may be poor.",
            UserWarning,
            stacklevel=stacklevel,
        )
