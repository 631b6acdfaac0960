"""The state of a generation: token buffers, caches, counters, and the updates that every step makes.

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
from xlora_jax.generation.given import Given
from xlora_jax.generation.sampling import Sampler
from xlora_jax.models import Decoder, KVCache, Place
from xlora_jax.passes import XLora

__all__ = [
    "UNBOUNDED",
    "Draft",
    "Ints",
    "Settings",
    "State",
    "StopAt",
    "append_token",
    "bucket",
    "choose_token",
    "chunk_size",
    "keeps_cache",
    "last_token",
    "new_tokens",
    "own_scalings",
    "passes",
    "record_scalings",
    "row_bytes",
    "select_rows",
    "start",
    "update",
]

Ints = npt.NDArray[np.int32]
# Function from the new tokens of a row to the number of tokens to keep if they end the row, else None.
StopAt = Callable[[Sequence[int]], int | None]
# False: never; True: the way that is likely to be fastest, or none; "gates", "lookup": always that way.
Draft = Literal[False, True, "gates", "lookup"]
UNBOUNDED = np.iinfo(np.int32).max


@dataclass(frozen=True)
class Settings:
    """The static part of a :class:`~xlora_jax.generation.generate.GenerationConfig`, for compilation; hashable.

    Attributes:
        sampler: rule that chooses a token.
        eos: tokens that end a row.
        cache_dtype: dtype of keys and values; defaults to the compute dtype.
        prefill_chunk: maximum number of prompt tokens that run at once.
        draft: way to draft, or False.
        frozen_after: number of new tokens after which the gates stay constant; None for never.
        record: whether to keep the scalings of all positions.
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
    """All arrays that change from step to step. Each step takes a state and returns the next; buffers are donated.

    Attributes:
        tokens: int32 ``[B, S]``, each row from slot 0 on: prompt, new tokens, and a draft if one is ``pending``.
        length: int32 ``[B]``, number of certain tokens. All of them but the last have been through both passes.
        limit: int32 ``[B]``, length at which a row ends.
        done: bool ``[B]``, whether the row has ended.
        pending: bool ``[B]``, whether the token at position ``length`` is a draft.
        scalings: ``[B, L or 1, N]`` of the last position that has been through both passes: ``length - 2``, or
            ``length - 1`` if a draft is pending. None for a base model alone.
        given: ``[B, L or 1, N]``, constant scalings of the rows that are not ``gated``; None if all rows are.
        gated: bool ``[B]``, whether a row's scalings are the classifier's; None if all are.
        recorded: ``[B, S, L or 1, N]``, scalings by position, zero for positions without; None if not recorded.
        scaling: cache of the scaling pass; None for a base model alone, or if no row is ``gated``.
        real: cache of the real pass, or of the base model alone; None for a model that keeps no cache.
        rng: PRNG key of the draws.
        reads: int32 ``[B]``, number of reads of the weights before the row ended.
        checked: int32 ``[B]``, number of checked drafts of :class:`StaleGates`.
        accepted: int32 ``[B]``, number of checked drafts that were right.
        guessed: int32 ``[B]``, number of tokens that :class:`Lookup` guessed right.
    """

    tokens: jax.Array
    length: jax.Array
    limit: jax.Array
    done: jax.Array
    pending: jax.Array
    scalings: jax.Array | None
    given: jax.Array | None
    gated: jax.Array | None
    recorded: jax.Array | None
    scaling: KVCache | None
    real: KVCache | None
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
    given: Given | None = None,
) -> State:
    """Return the initial state.

    Args:
        xlora: static description.
        prompts: int32 ``[B, T]``; each row begins at slot 0 and has no gaps.
        lengths: int32 ``[B]``, number of tokens of each row.
        max_new_tokens: maximum number of new tokens per row, at least 1.
        settings: settings of the generation.
        rng: PRNG key of the draws.
        experts: whether to run the experts; False for the base model alone.
        given: scalings of rows that do not use the classifier's; None if all rows use them.
    """
    batch = len(prompts)
    longest = int(lengths.max())
    capacity, margin = _slots(xlora, longest, max_new_tokens, settings, experts)
    tokens = np.zeros((batch, capacity), np.int32)
    tokens[:, :longest] = prompts[:, :longest]
    count = passes(experts, given) if keeps_cache(xlora) else 0
    caches = [xlora.module.empty_cache(batch, capacity, settings.cache_dtype, margin) for _ in range(count)]
    scalings = recorded = constant = gated = None
    if experts:
        shape = _scalings_shape(xlora, given)
        scalings = jnp.zeros((batch, *shape), xlora.module.dtype)
        if given is not None:
            constant = jnp.broadcast_to(jnp.asarray(given.scalings, xlora.module.dtype), scalings.shape)
            gated = ~jnp.asarray(given.rows)
        recorded = jnp.zeros((batch, capacity, *shape), xlora.module.dtype) if settings.record else None
    return State(
        tokens=jnp.asarray(tokens),
        length=jnp.asarray(lengths, jnp.int32),
        limit=jnp.asarray(lengths + max_new_tokens, jnp.int32),
        done=jnp.zeros(batch, bool),
        pending=jnp.zeros(batch, bool),
        scalings=scalings,
        given=constant,
        gated=gated,
        recorded=recorded,
        scaling=caches[1] if count > 1 else None,
        real=caches[0] if count else None,
        rng=rng,
        reads=jnp.zeros(batch, jnp.int32),
        checked=jnp.zeros(batch, jnp.int32),
        accepted=jnp.zeros(batch, jnp.int32),
        guessed=jnp.zeros(batch, jnp.int32),
    )


def keeps_cache(xlora: XLora) -> bool:
    """Return whether the base model has a cache; any other runs the whole text for every token."""
    return isinstance(xlora.module, Decoder)


def passes(experts: bool, given: Given | None) -> int:
    """Return the number of passes, and so of caches: 2, or 1 for the base model alone and if no row uses the gate."""
    return 1 + (experts and (given is None or not given.rows.all()))


def _scalings_shape(xlora: XLora, given: Given | None) -> tuple[int, int]:
    by_layer = xlora.config.layerwise_scalings or (given is not None and given.scalings.shape[1] > 1)
    return (len(xlora.layers) if by_layer else 1, xlora.num_experts)


def _slots(
    xlora: XLora, longest: int, max_new_tokens: int, settings: Settings, experts: bool
) -> tuple[int, int | None]:
    """Slots of a row, and those that a ring has beside its window; None for no rings."""
    if not keeps_cache(xlora):
        return bucket(longest + max_new_tokens), None
    chunk = chunk_size(xlora, longest, settings)
    # Slots behind the longest row, for drafts; and whole chunks of the prompt.
    ahead = GUESSES if experts and settings.draft else 0
    capacity = bucket(max(longest + max_new_tokens + ahead, -(-longest // chunk) * chunk))
    # No rings where the whole sequence may have to run again. A ring holds the window and what is written at once.
    return capacity, None if xlora.module.config.rope_switches_at is not None else max(chunk, ahead + 1)


def row_bytes(
    xlora: XLora,
    longest: int,
    max_new_tokens: int,
    settings: Settings,
    experts: bool,
    given: Given | None = None,
) -> int:
    """Return the bytes of each row of a state, caches included; arguments as those of :func:`start`."""
    capacity, margin = _slots(xlora, longest, max_new_tokens, settings, experts)

    # JAX has no shapes beyond 64 bits: of a cache that large, a part tells the size.
    part = min(capacity, 2**31)
    cache = 0
    if keeps_cache(xlora):
        cache = _cache_bytes(cast(Hashable, xlora.module), part, settings.cache_dtype, margin) * capacity // part
    size = 4 * capacity + cache * passes(experts, given)
    if experts and settings.record:
        size += capacity * math.prod(_scalings_shape(xlora, given)) * jnp.dtype(xlora.module.dtype).itemsize
    return size


@lru_cache(maxsize=64)
def _cache_bytes(module: Any, capacity: int, dtype: Any, margin: int | None) -> int:
    leaves = jax.tree.leaves(jax.eval_shape(lambda: module.empty_cache(1, capacity, dtype, margin)))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def new_tokens(state: State, first: Ints) -> list[Ints]:
    """Return each row's tokens after its prompt of ``first [B]`` tokens."""
    # Copy, because the next step donates the buffers.
    tokens, length = np.array(state.tokens), np.array(state.length)
    return [row[start:end] for row, start, end in zip(tokens, first, length, strict=True)]


def bucket(length: int, least: int = 16) -> int:
    """Round up to ``least`` times a power of two, or 1.5 times that, so that few programs are compiled."""
    size = least
    while size < length:
        if size * 3 // 2 >= length:
            return size * 3 // 2
        size *= 2
    return size


def chunk_size(xlora: XLora, longest: int, settings: Settings) -> int:
    """Return the number of tokens per call of :func:`prefill`."""
    # If the longest position decides the rotary frequencies of all positions, a prompt cannot be cut.
    whole = xlora.module.config.rope_switches_at is not None
    size = min(bucket(longest), xlora.module.config.max_positions or UNBOUNDED)
    return size if whole else min(size, settings.prefill_chunk)


def last_token(state: State) -> tuple[jax.Array, Place]:
    """Return the last certain token ``[B, 1]`` and its place."""
    position = state.length - 1
    return jnp.take_along_axis(state.tokens, position[:, None], axis=1), Place(position, position)


def choose_token(settings: Settings, state: State, logits: jax.Array, length: jax.Array) -> jax.Array:
    """Choose a token ``[B]`` from ``logits [B, V]`` for the position ``length [B]``."""
    return settings.sampler(state.rng, logits, state.tokens, length)


def append_token(settings: Settings, state: State, token: jax.Array, emits: jax.Array) -> State:
    """Append ``token [B]`` to the rows where ``emits``, and mark the rows that have ended."""
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


def own_scalings(state: State, scalings: jax.Array) -> jax.Array:
    """Replace the classifier's ``scalings [B, T, L or 1, N]`` in the rows that have their own."""
    if state.given is None:
        return scalings
    assert state.gated is not None
    return jnp.where(state.gated[:, None, None, None], scalings, state.given[:, None])


def update(state: State, **changes: Any) -> State:
    """Return the state with some fields replaced."""
    return cast(State, state.replace(**changes))  # type: ignore[attr-defined]
