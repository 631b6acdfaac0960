"""The state of a generation: token buffers, caches, counters, and the small updates that every step makes.

Axes as in :mod:`xlora_jax.layers.mixing`, S for the slots of the token buffer and of the caches, V for the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import struct

from xlora_jax.generation.drafting import GUESSES
from xlora_jax.generation.sampling import Sampler
from xlora_jax.models import KVCache, Place
from xlora_jax.passes import XLora

Ints = npt.NDArray[np.int32]
# From the new tokens of a row to how many of them stay if they end it, else None.
StopAt = Callable[[Sequence[int]], int | None]
# Not at all; always one of the two ways; or whatever is likely to be fastest.
Draft = Literal[False, True, "gates", "lookup"]
UNBOUNDED = np.iinfo(np.int32).max


@dataclass(frozen=True)
class Settings:
    """The part of a :class:`~xlora_jax.generation.generate.GenerationConfig` that functions are compiled for; hashable.

    Attributes:
        sampler: how a token is chosen.
        eos: tokens that end a row.
        cache_dtype: of keys and values; None takes that of the model's computation.
        prefill_chunk: the most tokens of a prompt that run at once.
        draft: whether and how to draft.
        frozen_after: new tokens after which the gates stay as they are; None for never.
        record: keep the scalings of all positions.
    """

    sampler: Sampler
    eos: tuple[int, ...] = ()
    cache_dtype: Any = None
    prefill_chunk: int = 512
    draft: Draft = True
    frozen_after: int | None = None
    record: bool = False


@struct.dataclass
class State:
    """Everything that changes from step to step. Each step takes one and gives the next; buffers are donated.

    Attributes:
        tokens: int32 ``[B, S]``, each row from slot 0 on: prompt, new tokens, and a draft where one is ``pending``.
        length: int32 ``[B]``, tokens that are certain. All but the last of them have been through both passes.
        limit: int32 ``[B]``, length at which a row ends.
        done: bool ``[B]``, whether it has.
        pending: bool ``[B]``, whether the token at position ``length`` is a draft.
        scalings: ``[B, L or 1, N]`` of position ``length - 2``, the last that has been through, or of ``length - 1``
            where a draft is pending; None for a base alone.
        recorded: ``[B, S, L or 1, N]``, scalings by position, zero where there are none; None if not recorded.
        scaling: the scaling pass's cache; None for a base alone.
        real: the real pass's, or the base's.
        rng: PRNG key of the draws.
        reads: int32 ``[B]``, reads of the weights while the row was going on.
        checked: int32 ``[B]``, drafts of :class:`StaleGates` that were checked.
        accepted: int32 ``[B]``, those that were right.
        guessed: int32 ``[B]``, tokens that :class:`Lookup` guessed right.
    """

    tokens: jax.Array
    length: jax.Array
    limit: jax.Array
    done: jax.Array
    pending: jax.Array
    scalings: jax.Array | None
    recorded: jax.Array | None
    scaling: KVCache | None
    real: KVCache
    rng: jax.Array
    reads: jax.Array
    checked: jax.Array
    accepted: jax.Array
    guessed: jax.Array


def start(
    xlora: XLora,
    prompts: Ints,
    lengths: Ints,
    *,
    max_new_tokens: int,
    settings: Settings,
    rng: jax.Array,
    experts: bool = True,
) -> State:
    """Make the state before anything has run.

    Args:
        xlora: static description.
        prompts: int32 ``[B, T]``, each row from the left without gaps.
        lengths: int32 ``[B]``, how many tokens each row has.
        max_new_tokens: at least 1.
        settings: of the generation.
        rng: PRNG key of the draws.
        experts: False for the base alone.
    """
    batch = len(prompts)
    longest = int(lengths.max())
    capacity, margin = _slots(xlora, longest, max_new_tokens, settings, experts)
    tokens = np.zeros((batch, capacity), np.int32)
    tokens[:, :longest] = prompts[:, :longest]
    caches = [xlora.module.empty_cache(batch, capacity, settings.cache_dtype, margin) for _ in range(1 + experts)]
    scalings = recorded = None
    if experts:
        shape = (len(xlora.layers) if xlora.config.layerwise_scalings else 1, xlora.num_experts)
        scalings = jnp.zeros((batch, *shape), xlora.module.dtype)
        recorded = jnp.zeros((batch, capacity, *shape), xlora.module.dtype) if settings.record else None
    return State(
        tokens=jnp.asarray(tokens),
        length=jnp.asarray(lengths, jnp.int32),
        limit=jnp.asarray(lengths + max_new_tokens, jnp.int32),
        done=jnp.zeros(batch, bool),
        pending=jnp.zeros(batch, bool),
        scalings=scalings,
        recorded=recorded,
        scaling=caches[1] if experts else None,
        real=caches[0],
        rng=rng,
        reads=jnp.zeros(batch, jnp.int32),
        checked=jnp.zeros(batch, jnp.int32),
        accepted=jnp.zeros(batch, jnp.int32),
        guessed=jnp.zeros(batch, jnp.int32),
    )


def _slots(
    xlora: XLora, longest: int, max_new_tokens: int, settings: Settings, experts: bool
) -> tuple[int, int | None]:
    """Slots of a row, and those that a ring has beside its window; None for no rings."""
    chunk = chunk_size(xlora, longest, settings)
    # Slots behind the longest row, for drafts; and whole chunks of the prompt.
    ahead = GUESSES if experts and settings.draft else 0
    capacity = bucket(max(longest + max_new_tokens + ahead, -(-longest // chunk) * chunk))
    # No rings where the whole sequence may have to run again. A ring holds the window and what is written at once.
    return capacity, None if xlora.module.config.rope_switches_at is not None else max(chunk, ahead + 1)


def row_bytes(xlora: XLora, longest: int, max_new_tokens: int, settings: Settings, experts: bool) -> int:
    """Return the bytes of each row of a state, caches included; arguments as those of :func:`start`."""
    capacity, margin = _slots(xlora, longest, max_new_tokens, settings, experts)

    # JAX has no shapes beyond 64 bits: of a cache that large, a part tells the size.
    part = min(capacity, 2**31)
    cache = _cache_bytes(cast(Hashable, xlora.module), part, settings.cache_dtype, margin) * capacity // part
    size = 4 * capacity + cache * (1 + experts)
    if experts and settings.record:
        layers = len(xlora.layers) if xlora.config.layerwise_scalings else 1
        size += capacity * layers * xlora.num_experts * jnp.dtype(xlora.module.dtype).itemsize
    return size


@lru_cache(maxsize=64)
def _cache_bytes(module: Any, capacity: int, dtype: Any, margin: int | None) -> int:
    leaves = jax.tree.leaves(jax.eval_shape(lambda: module.empty_cache(1, capacity, dtype, margin)))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def new_tokens(state: State, first: Ints) -> list[Ints]:
    """Give each row's tokens behind its prompt, which has ``first [B]``."""
    # Copies: the buffers are about to be donated.
    tokens, length = np.array(state.tokens), np.array(state.length)
    return [row[start:end] for row, start, end in zip(tokens, first, length, strict=True)]


def bucket(length: int, least: int = 16) -> int:
    """Round up to ``least`` times a power of two, or 1.5 times that, so that few lengths are compiled for."""
    size = least
    while size < length:
        if size * 3 // 2 >= length:
            return size * 3 // 2
        size *= 2
    return size


def chunk_size(xlora: XLora, longest: int, settings: Settings) -> int:
    """Tokens per call of :func:`prefill`."""
    # Where the longest position decides the rotary frequencies of all, a prompt cannot be cut.
    whole = xlora.module.config.rope_switches_at is not None
    size = min(bucket(longest), xlora.module.config.max_positions or UNBOUNDED)
    return size if whole else min(size, settings.prefill_chunk)


def last_token(state: State) -> tuple[jax.Array, Place]:
    """The last certain token ``[B, 1]`` and its place."""
    position = state.length - 1
    return jnp.take_along_axis(state.tokens, position[:, None], axis=1), Place(position, position)


def choose_token(settings: Settings, state: State, logits: jax.Array, length: jax.Array) -> jax.Array:
    """Choose a token ``[B]`` from ``logits [B, V]`` for the position ``length [B]``."""
    return settings.sampler(state.rng, logits, state.tokens, length)


def append_token(settings: Settings, state: State, token: jax.Array, emits: jax.Array) -> State:
    """Append ``token [B]`` to the rows where ``emits``, and see which of them have ended."""
    rows = jnp.arange(len(token))
    slot = jnp.where(emits, state.length, state.tokens.shape[1])
    length = state.length + emits
    ended = jnp.isin(token, jnp.asarray(settings.eos, jnp.int32)) | (length >= state.limit)
    return update(
        state,
        tokens=state.tokens.at[rows, slot].set(token, mode="drop"),
        length=length,
        done=state.done | (emits & ended),
    )


def record_scalings(
    recorded: jax.Array | None, scalings: jax.Array, position: jax.Array, where: jax.Array
) -> jax.Array | None:
    """Write ``scalings [B, L or 1, N]`` at ``position [B]`` of the rows ``where``."""
    if recorded is None:
        return None
    slot = jnp.where(where, position, recorded.shape[1])
    return recorded.at[jnp.arange(len(position)), slot].set(scalings, mode="drop")


def select_rows(rows: jax.Array, new: jax.Array, old: jax.Array | None) -> jax.Array:
    """Take the scalings ``new`` in the given ``rows`` (bool ``[B]``) and ``old`` elsewhere."""
    assert old is not None
    return jnp.where(rows[:, None, None], new, old)


def update(state: State, **changes: Any) -> State:
    """Return the state with some fields replaced."""
    return cast(State, state.replace(**changes))  # type: ignore[attr-defined]
