"""Decoding with one cache for each pass, on the device from the prompt to the last token.

Two caches are exact: both passes are causal, so the gates at a position depend on earlier positions only, and neither
cache changes when a token is appended. A token costs one position through each pass: two reads of the weights. Two ways
need fewer, and give the same tokens:

**Stale gates.** The real pass at position p needs the gates of p, which the scaling pass has to give first; so the two
cannot share a read of the weights at the same position. They can at neighbouring ones. One step runs as one batch

    scaling pass  at p        gives the exact gates of p
    real pass     at p - 1    with its exact gates, known from the step before: gives the token of p, certain
    real pass     at p        with the gates of p - 1: gives a draft of p + 1 (gates change slowly)

where the token at p was drafted by the step before. If it is what the pass at p - 1 gives, the step has made a token
for one read of the weights, and what stood at p in the real cache is overwritten by the next step, with exact gates.
If not, the certain token takes its place, and one step is lost. With a share a of drafts accepted a token costs 2 - a
reads: never more than plain decoding, whatever the draft.

**Lookup.** Several tokens are guessed from an earlier place of the text (:func:`~xlora_jax.drafting.look_up`). Both
passes run over all of them, one after the other, and the guesses are kept as far as they are what the real pass gives:
two reads for one token and as many as were guessed right.

Every token that is kept was chosen from logits of exact gates, with the noise of its own position (see
:mod:`xlora_jax.sampling`): drafting changes neither a greedy nor a sampled text. One caveat: a step's matrix products
have more rows than those of plain decoding, so logits can differ in their last bits, and two tokens whose logits agree
to within those bits can change places.

The parts: a :class:`State`; a :class:`Mode`, which makes one step; :func:`prefill` and :func:`advance`, the two
compiled functions; :func:`decode`, the loop on the host that picks modes. Axes as in :mod:`xlora_jax.mixing`, S for the
slots of the token buffer and of the caches, V for the vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import struct
from jax import lax

from xlora_jax import mixing
from xlora_jax.drafting import GUESSES, Chooser, PassTimes, Way, look_up
from xlora_jax.forward import Params, XLora, base_forward, classify, real_pass, scaling_pass, unembed
from xlora_jax.models import KVCache, PairedCache, Place
from xlora_jax.sampling import Sampler
from xlora_jax.trees import flatten

__all__ = [
    "Base",
    "Draft",
    "Frozen",
    "Ints",
    "Lookup",
    "Mode",
    "Plain",
    "Settings",
    "StaleGates",
    "State",
    "StopAt",
    "advance",
    "bucket",
    "decode",
    "new_tokens",
    "prefill",
    "start",
]

Ints = npt.NDArray[np.int32]
# From the new tokens of a row to how many of them stay if they end it, else None.
StopAt = Callable[[Sequence[int]], int | None]
# Not at all; always one of the two ways; or whatever is likely to be fastest.
Draft = Literal[False, True, "gates", "lookup"]

# Steps between two looks of the host at the tokens, where it has to look at all: of one token, and of several.
_STEPS, _LOOKUP_STEPS = 16, 4
_ALL = np.iinfo(np.int32).max


@dataclass(frozen=True)
class Settings:
    """The part of a :class:`~xlora_jax.generation.GenerationConfig` that functions are compiled for; hashable.

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


class Mode(Protocol):
    """A way to make one step; hashable."""

    def step(self, model: XLora, settings: Settings, params: Params, state: State, active: jax.Array) -> State:
        """Make a step. Rows that are not ``active`` (bool ``[B]``) keep what they have."""
        ...


@dataclass(frozen=True)
class Base:
    """The base model alone."""

    def step(self, model: XLora, settings: Settings, params: Params, state: State, active: jax.Array) -> State:
        """See :class:`Mode`."""
        token, place = _last(state)
        out = base_forward(model, params, input_ids=token, cache=state.real, place=place, with_logits=False)
        logits = unembed(model, params, out.hidden_states)[:, 0]
        state = _replace(state, real=out.cache, reads=state.reads + active)
        return _append(settings, state, _choose(settings, state, logits, state.length), active)


@dataclass(frozen=True)
class Plain:
    """Both passes, one after the other."""

    def step(self, model: XLora, settings: Settings, params: Params, state: State, active: jax.Array) -> State:
        """See :class:`Mode`."""
        token, place = _last(state)
        hidden, scaling = scaling_pass(model, params, input_ids=token, cache=state.scaling, place=place)
        scalings = classify(model, params, hidden)
        out = real_pass(model, params, scalings, input_ids=token, cache=state.real, place=place, with_logits=False)
        logits = unembed(model, params, out.hidden_states, scalings)[:, 0]
        state = _replace(
            state,
            scaling=scaling,
            real=out.cache,
            scalings=_where(active, scalings[:, 0], state.scalings),
            recorded=_record(state.recorded, scalings[:, 0], state.length - 1, active),
            reads=state.reads + 2 * active,
        )
        return _append(settings, state, _choose(settings, state, logits, state.length), active)


@dataclass(frozen=True)
class Frozen:
    """The real pass alone, with the gates of the last token before. Approximate."""

    def step(self, model: XLora, settings: Settings, params: Params, state: State, active: jax.Array) -> State:
        """See :class:`Mode`."""
        assert state.scalings is not None
        token, place = _last(state)
        scalings = state.scalings[:, None]
        out = real_pass(model, params, scalings, input_ids=token, cache=state.real, place=place, with_logits=False)
        logits = unembed(model, params, out.hidden_states, scalings)[:, 0]
        state = _replace(
            state,
            real=out.cache,
            recorded=_record(state.recorded, state.scalings, state.length - 1, active),
            reads=state.reads + active,
        )
        return _append(settings, state, _choose(settings, state, logits, state.length), active)


@dataclass(frozen=True)
class StaleGates:
    """Both passes as one batch, a position apart; see the head of this module."""

    def step(self, model: XLora, settings: Settings, params: Params, state: State, active: jax.Array) -> State:
        """See :class:`Mode`."""
        assert state.scalings is not None
        assert state.scaling is not None
        rows = jnp.arange(len(state.tokens))
        old, position = state.scalings, state.length - 1 + state.pending
        logits, fresh, caches = self._passes(model, params, state, position)
        state = _replace(state, scaling=caches.scaling, real=caches.real)

        certain = _choose(settings, state, logits[:, 0], position)
        right = ~state.pending | (certain == state.tokens[rows, position])
        checks = active & state.pending
        state = _replace(
            state,
            checked=state.checked + checks,
            accepted=state.accepted + (checks & right),
            reads=state.reads + active,
        )
        state = _append(settings, state, certain, checks)
        # A row that has just ended is left without a draft, and without the scalings that nothing is predicted from.
        moves = active & right & ~state.done
        draft = _choose(settings, state, logits[:, 1], position + 1)
        slot = jnp.where(moves, position + 1, state.tokens.shape[1])
        return _replace(
            state,
            tokens=state.tokens.at[rows, slot].set(draft, mode="drop"),
            pending=jnp.where(active, moves, state.pending),
            scalings=_where(moves, fresh, old),
            recorded=_record(state.recorded, fresh, position, moves),
        )

    def _passes(
        self, model: XLora, params: Params, state: State, position: jax.Array
    ) -> tuple[jax.Array, jax.Array, PairedCache]:
        """Run the scaling pass at ``position [B]``, the real pass there and one before.

        The scaling pass runs both tokens too, so that the two passes are halves of one rectangular batch; at the first
        it writes again what is there.

        Returns:
            Logits ``[B, 2, V]`` of the two positions, scalings ``[B, L or 1, N]`` of the second, caches.
        """
        assert state.scalings is not None
        assert state.scaling is not None
        batch = len(state.tokens)
        two = jnp.stack([position - 1, position], axis=1)
        tokens = jnp.take_along_axis(state.tokens, two, axis=1)
        known = jnp.broadcast_to(state.scalings[:, None], (batch, 2, *state.scalings.shape[1:]))
        constant = mixing.constant_scalings(known.shape, model.config.scaling_pass_gate(model.num_experts), known.dtype)
        out = real_pass(
            model,
            params,
            jnp.concatenate([constant, known]),
            input_ids=jnp.concatenate([tokens, tokens]),
            cache=PairedCache(state.scaling, state.real),
            place=Place(*(jnp.concatenate([column, column]) for column in (two[:, 0], two[:, 1]))),
            with_logits=False,
        )
        fresh = classify(model, params, out.hidden_states[:batch, 1:])[:, 0]
        logits = unembed(model, params, out.hidden_states[batch:], known)
        return logits, fresh, cast(PairedCache, out.cache)


@dataclass(frozen=True)
class Lookup:
    """Both passes, one after the other, over the last token and guesses behind it; see the head of this module."""

    def step(self, model: XLora, settings: Settings, params: Params, state: State, active: jax.Array) -> State:
        """See :class:`Mode`."""
        rows = jnp.arange(len(state.tokens))
        position = state.length - 1
        columns = position[:, None] + jnp.arange(GUESSES + 1)
        guesses = look_up(state.tokens, state.length)
        state = _replace(state, tokens=state.tokens.at[rows[:, None], columns[:, 1:]].set(guesses))
        tokens = jnp.take_along_axis(state.tokens, columns, axis=1)
        # What a row has no room for counts as padding: its position may be one that the model does not have.
        place = Place(position, jnp.clip(state.limit - 2, position, position + GUESSES))
        hidden, scaling = scaling_pass(model, params, input_ids=tokens, cache=state.scaling, place=place)
        scalings = classify(model, params, hidden)
        out = real_pass(model, params, scalings, input_ids=tokens, cache=state.real, place=place, with_logits=False)
        logits = unembed(model, params, out.hidden_states, scalings)
        state = _replace(state, scaling=scaling, real=out.cache, reads=state.reads + 2 * active)
        for step in range(GUESSES + 1):
            state = _replace(
                state,
                scalings=_where(active, scalings[:, step], state.scalings),
                recorded=_record(state.recorded, scalings[:, step], state.length - 1, active),
                guessed=state.guessed + active * (step > 0),
            )
            token = _choose(settings, state, logits[:, step], state.length)
            right = token == state.tokens[rows, state.length]
            state = _append(settings, state, token, active)
            active = active & right & ~state.done
        return state


_MODES: dict[str, Mode] = {"plain": Plain(), "gates": StaleGates(), "lookup": Lookup()}


def start(
    model: XLora,
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
        model: static description.
        prompts: int32 ``[B, T]``, each row from the left without gaps.
        lengths: int32 ``[B]``, how many tokens each row has.
        max_new_tokens: at least 1.
        settings: of the generation.
        rng: PRNG key of the draws.
        experts: False for the base alone.
    """
    batch = len(prompts)
    longest = int(lengths.max())
    chunk = _chunk(model, longest, settings)
    # Slots behind the longest row, for drafts; and whole chunks of the prompt.
    ahead = GUESSES if experts and settings.draft else 0
    capacity = bucket(max(longest + max_new_tokens + ahead, -(-longest // chunk) * chunk))
    tokens = np.zeros((batch, capacity), np.int32)
    tokens[:, :longest] = prompts[:, :longest]
    # No rings where the whole sequence may have to run again. A ring holds the window and what is written at once.
    margin = None if model.module.config.rope_switches_at is not None else max(chunk, ahead + 1)
    caches = [model.module.empty_cache(batch, capacity, settings.cache_dtype, margin) for _ in range(1 + experts)]
    scalings = recorded = None
    if experts:
        shape = (len(model.layers) if model.config.layerwise_scalings else 1, model.num_experts)
        scalings = jnp.zeros((batch, *shape), model.module.dtype)
        recorded = jnp.zeros((batch, capacity, *shape), model.module.dtype) if settings.record else None
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


@partial(jax.jit, static_argnums=(0, 1), static_argnames="chunk", donate_argnums=3)
def prefill(model: XLora, settings: Settings, params: Params, state: State, offset: jax.Array, *, chunk: int) -> State:
    """Run one chunk of the prompts through both passes, and choose the first token of rows that end in it.

    Args:
        model: static description.
        settings: of the generation.
        params: of the model.
        state: with all chunks before this one run.
        offset: position of the chunk's first token.
        chunk: T, tokens per row.
    """
    batch = len(state.tokens)
    tokens = lax.dynamic_slice_in_dim(state.tokens, offset, chunk, axis=1)
    place = Place(jnp.full(batch, offset), jnp.minimum(state.length - 1, offset + chunk - 1))
    last = state.length - 1 - offset
    ends = (last >= 0) & (last < chunk)
    inputs: dict[str, Any] = {"input_ids": tokens, "place": place}

    def at_last(x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, jnp.clip(last, 0, chunk - 1).reshape(-1, *[1] * (x.ndim - 1)), axis=1)

    if state.scaling is None:
        out = base_forward(model, params, cache=state.real, with_logits=False, **inputs)
        logits = unembed(model, params, at_last(out.hidden_states))[:, 0]
        state = _replace(state, real=out.cache)
    else:
        hidden, scaling = scaling_pass(model, params, cache=state.scaling, **inputs)
        scalings = classify(model, params, hidden)
        out = real_pass(model, params, scalings, cache=state.real, with_logits=False, **inputs)
        # The output head may have experts too: it needs the gates of the one position that it sees.
        logits = unembed(model, params, at_last(out.hidden_states), at_last(scalings))[:, 0]
        recorded = state.recorded
        if recorded is not None:
            there = (offset + jnp.arange(chunk) < state.length[:, None])[:, :, None, None]
            recorded = lax.dynamic_update_slice_in_dim(recorded, jnp.where(there, scalings, 0), offset, axis=1)
        state = _replace(
            state,
            scaling=scaling,
            real=out.cache,
            scalings=_where(ends, at_last(scalings)[:, 0], state.scalings),
            recorded=recorded,
        )
    return _append(settings, state, _choose(settings, state, logits, state.length), ends & ~state.done)


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def advance(
    model: XLora, settings: Settings, mode: Mode, params: Params, state: State, stop: jax.Array, steps: jax.Array
) -> State:
    """Make steps of one mode until every row has ended or come to its ``stop``, without a host round trip per token.

    Args:
        model: static description.
        settings: of the generation.
        mode: how to make a step.
        params: of the model.
        state: after :func:`prefill` of all chunks.
        stop: int32 ``[B]``, length at which a row waits.
        steps: the most steps to make.
    """

    def active(state: State) -> jax.Array:
        return ~state.done & (state.length < stop)

    def goes_on(carry: tuple[jax.Array, State]) -> jax.Array:
        step, state = carry
        return (step < steps) & active(state).any()

    def body(carry: tuple[jax.Array, State]) -> tuple[jax.Array, State]:
        step, state = carry
        return step + 1, mode.step(model, settings, params, state, active(state))

    _, state = lax.while_loop(goes_on, body, (jnp.int32(0), state))
    return state


def decode(
    model: XLora,
    params: Params,
    state: State,
    settings: Settings,
    *,
    steps: int | None = None,
    stop_at: StopAt | None = None,
) -> Iterator[State]:
    """Run a state from :func:`start` to its end.

    Args:
        model: static description.
        params: of the model.
        state: donated.
        settings: of the generation.
        steps: the most steps between two states; None for no such bound.
        stop_at: asked about each row's new tokens before a state is yielded: how many stay if they end it, else None.

    Yields:
        States; the first is after the prompts and has one new token per row. Each is donated when the next is made.
    """
    first = np.array(state.length)
    most = np.array(state.limit)
    switch = model.module.config.rope_switches_at
    if stop_at is not None:
        steps = min(steps or _STEPS, _STEPS)
    state = _stopped(_prefill_all(model, settings, params, state), first, stop_at)
    yield state

    def run(state: State, mode: Mode, stop: Ints, limit: int | None = None) -> State:
        bound = min(x for x in (steps, limit, _ALL) if x is not None)
        state = advance(model, settings, mode, params, state, jnp.asarray(stop, jnp.int32), jnp.int32(bound))
        return _stopped(state, first, stop_at)

    if switch is not None and first.max() <= switch < most.max() - 1:
        # The token at position `switch` is the first whose pass has other rotary frequencies, and then all that is
        # cached is no longer true. It is chosen before; drafting would look beyond it.
        mode: Mode = Base() if state.scaling is None else Plain()
        while (left := switch + 1 - int(state.length.max())) > 0 and not state.done.all():
            state = run(state, mode, most, left)
            yield state
        state = _stopped(_prefill_all(model, settings, params, state), first, stop_at)
        yield state

    thaw = most if settings.frozen_after is None else np.minimum(first + settings.frozen_after, most)
    chooser = None
    if state.scaling is not None and settings.draft is True:
        times = PassTimes.of(*_bytes_read(params), jax.default_backend())
        if times is not None:
            chooser = Chooser(times, np.array(state.length), _step_seconds(model, settings, state.tokens.shape))
    while True:
        length, done = np.array(state.length), np.array(state.done)
        if done.all():
            return
        stop, limit = most, None
        way: Way | None = None
        if state.scaling is None:
            mode = Base()
        elif (done | (length >= thaw)).all():
            mode = Frozen()
        elif chooser is not None:
            chooser.see(np.array(state.tokens), length, int(state.checked.sum()), int(state.accepted.sum()))
            way = chooser.choose()
            mode = _MODES[way]
            limit = _LOOKUP_STEPS if way == "lookup" else _STEPS
        else:
            stop = thaw
            mode = _MODES[settings.draft if isinstance(settings.draft, str) else "plain"]
        if not isinstance(mode, StaleGates):
            state = _replace(state, pending=jnp.zeros_like(state.pending))
        reads, started = np.array(state.reads), time.perf_counter()
        state = run(state, mode, stop, limit)
        if chooser is not None and way is not None:
            steps_made = (np.array(state.reads) - reads).max() / (1 if way == "gates" else 2)
            chooser.timed(way, (time.perf_counter() - started) / steps_made)
        yield state


@lru_cache(maxsize=64)
def _step_seconds(model: XLora, settings: Settings, shape: tuple[int, ...]) -> dict[Way, float]:
    """Where times of steps are kept from one generation to the next: by what steps are compiled for."""
    return {}


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


def _stopped(state: State, first: Ints, stop_at: StopAt | None) -> State:
    """End the rows that ``stop_at`` ends."""
    if stop_at is None:
        return state
    kept = [stop_at(new.tolist()) for new in new_tokens(state, first)]
    ends = np.array([keep is not None for keep in kept])
    if not ends.any():
        return state
    length = np.where(ends, first + np.array([keep or 0 for keep in kept]), np.array(state.length))
    return _replace(state, length=jnp.asarray(length, jnp.int32), done=state.done | jnp.asarray(ends))


def _bytes_read(params: Params) -> tuple[int, int]:
    """Bytes of the weights that the scaling pass and the real pass read."""
    base = flatten(params["base"])
    # A table of embeddings is looked up, and read as a whole only where it is the head too.
    table = {path for path in base if path[0] == "embed_tokens"}
    head = {path for path in base if path[0] == "lm_head"} or table
    blocks = sum(int(leaf.nbytes) for path, leaf in base.items() if path not in head | table)
    experts = sum(int(leaf.nbytes) for leaf in jax.tree.leaves(params["experts"]))
    return blocks, blocks + experts + sum(int(base[path].nbytes) for path in head)


def _chunk(model: XLora, longest: int, settings: Settings) -> int:
    """Tokens per call of :func:`prefill`."""
    # Where the longest position decides the rotary frequencies of all, a prompt cannot be cut.
    whole = model.module.config.rope_switches_at is not None
    size = min(bucket(longest), model.module.config.max_positions or _ALL)
    return size if whole else min(size, settings.prefill_chunk)


def _prefill_all(model: XLora, settings: Settings, params: Params, state: State) -> State:
    longest = int(state.length.max())
    chunk = min(_chunk(model, longest, settings), state.tokens.shape[1])
    for offset in range(0, longest, chunk):
        state = prefill(model, settings, params, state, jnp.int32(offset), chunk=chunk)
    return state


def _last(state: State) -> tuple[jax.Array, Place]:
    """The last certain token ``[B, 1]`` and its place."""
    position = state.length - 1
    return jnp.take_along_axis(state.tokens, position[:, None], axis=1), Place(position, position)


def _choose(settings: Settings, state: State, logits: jax.Array, length: jax.Array) -> jax.Array:
    return settings.sampler(state.rng, logits, state.tokens, length)


def _append(settings: Settings, state: State, token: jax.Array, emits: jax.Array) -> State:
    """Append ``token [B]`` to the rows where ``emits``, and see which of them have ended."""
    rows = jnp.arange(len(token))
    slot = jnp.where(emits, state.length, state.tokens.shape[1])
    length = state.length + emits
    ended = jnp.isin(token, jnp.asarray(settings.eos, jnp.int32)) | (length >= state.limit)
    return _replace(
        state,
        tokens=state.tokens.at[rows, slot].set(token, mode="drop"),
        length=length,
        done=state.done | (emits & ended),
    )


def _record(recorded: jax.Array | None, scalings: jax.Array, position: jax.Array, where: jax.Array) -> jax.Array | None:
    """Write ``scalings [B, L or 1, N]`` at ``position [B]`` of the rows ``where``."""
    if recorded is None:
        return None
    slot = jnp.where(where, position, recorded.shape[1])
    return recorded.at[jnp.arange(len(position)), slot].set(scalings, mode="drop")


def _where(rows: jax.Array, new: jax.Array, old: jax.Array | None) -> jax.Array:
    assert old is not None
    return jnp.where(rows[:, None, None], new, old)


def _replace(state: State, **changes: Any) -> State:
    return cast(State, state.replace(**changes))  # type: ignore[attr-defined]
