"""Decoding with one cache for each pass, on the device from the prompt to the last token.

Two caches are exact: both passes are causal, so the gates at a position depend only on the tokens up to that position,
and neither cache changes when a token is appended. A token costs one position in each pass: two reads of the weights.
Two methods need fewer reads and give the same tokens:

**Stale gates.** The real pass at position p needs the gates of p, which only the scaling pass at p gives. So the two
passes cannot share a read of the weights at the same position, but they can at adjacent positions. One step runs as one
batch

    scaling pass  at p        gives the exact gates of p
    real pass     at p - 1    with its exact gates, known from the step before: gives the token of p, certain
    real pass     at p        with the gates of p - 1: gives a draft of p + 1 (gates change slowly)

where the token at p was drafted by the previous step. If the draft equals the certain token, the step has made a token
for one read of the weights. The next step then overwrites position p of the real cache, with exact gates. If the draft
was wrong, the certain token replaces it, and one step is lost. If a share a of the drafts is accepted, a token costs
2 - a reads: never more than plain decoding, whatever the draft.

**Lookup.** Several tokens are guessed from an earlier place in the text
(:func:`~xlora_jax.generation.drafting.look_up`). Both passes run over all of them, one after the other. The guesses
that agree with the real pass are kept: two reads give one token plus every correct guess.

Every kept token was chosen from logits of exact gates, with the noise of its own position (see
:mod:`xlora_jax.generation.sampling`). So drafting changes neither greedy nor sampled text. One caveat: a step's matrix
products have more rows than those of plain decoding, so logits can differ in their last bits, and two tokens whose
logits agree to within those bits can swap.

This module has the two compiled functions, :func:`prefill` and :func:`advance`, and :func:`decode`, the loop on the
host that picks the mode of the next steps. The state is in :mod:`xlora_jax.generation.state`, and the modes, each a way
to make one step, are in :mod:`xlora_jax.generation.steps`. Axes as in :mod:`xlora_jax.layers.mixing`, S for the slots
of the token buffer and of the caches, V for the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from xlora_jax.generation.drafting import Chooser
from xlora_jax.generation.state import (
    UNBOUNDED,
    Ints,
    Settings,
    State,
    StopAt,
    append_token,
    choose_token,
    chunk_size,
    keeps_cache,
    new_tokens,
    own_scalings,
    select_rows,
    update,
)
from xlora_jax.generation.steps import MODES, Base, Frozen, Mode, Plain, Recompute, StaleGates
from xlora_jax.models import Place
from xlora_jax.passes import Params, XLora, classify, real_pass, scaling_pass, single_pass, unembed

__all__ = ["advance", "decode", "prefill"]

# Steps between two checks of the tokens by the host, if checks are needed: for steps of one token, and for lookup.
_STEPS, _LOOKUP_STEPS = 16, 4


@partial(jax.jit, static_argnums=(0, 1), static_argnames="chunk", donate_argnums=3)
def prefill(xlora: XLora, settings: Settings, params: Params, state: State, offset: jax.Array, *, chunk: int) -> State:
    """Run one chunk of the prompts through both passes, and choose the first token of rows that end in the chunk.

    Args:
        xlora: static description.
        settings: settings of the generation.
        params: parameters of the model.
        state: state after all chunks before this one.
        offset: position of the chunk's first token.
        chunk: T, number of tokens per row.
    """
    batch = len(state.tokens)
    tokens = lax.dynamic_slice_in_dim(state.tokens, offset, chunk, axis=1)
    place = Place(jnp.full(batch, offset), jnp.minimum(state.length - 1, offset + chunk - 1))
    last = state.length - 1 - offset
    ends = (last >= 0) & (last < chunk)
    inputs: dict[str, Any] = {"input_ids": tokens, "place": place}

    def at_last(x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, jnp.clip(last, 0, chunk - 1).reshape(-1, *[1] * (x.ndim - 1)), axis=1)

    if state.scalings is None:
        out = single_pass(xlora, params, cache=state.real, with_logits=False, **inputs)
        logits = unembed(xlora, params, at_last(out.hidden_states), xlora.arrow)[:, 0]
        state = update(state, real=out.cache)
    else:
        scaling = None
        if state.scaling is None:
            assert state.given is not None
            scalings = jnp.broadcast_to(state.given[:, None], (batch, chunk, *state.given.shape[1:]))
        else:
            hidden, scaling = scaling_pass(xlora, params, cache=state.scaling, **inputs)
            scalings = own_scalings(state, classify(xlora, params, hidden))
        out = real_pass(xlora, params, scalings, cache=state.real, with_logits=False, **inputs)
        # The output head may have experts too, so it needs the gates of its one position.
        logits = unembed(xlora, params, at_last(out.hidden_states), at_last(scalings))[:, 0]
        recorded = state.recorded
        if recorded is not None:
            there = (offset + jnp.arange(chunk) < state.length[:, None])[:, :, None, None]
            recorded = lax.dynamic_update_slice_in_dim(recorded, jnp.where(there, scalings, 0), offset, axis=1)
        state = update(
            state,
            scaling=scaling,
            real=out.cache,
            scalings=select_rows(ends, at_last(scalings)[:, 0], state.scalings),
            recorded=recorded,
        )
    return append_token(settings, state, choose_token(settings, state, logits, state.length), ends & ~state.done)


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def advance(
    xlora: XLora, settings: Settings, mode: Mode, params: Params, state: State, stop: jax.Array, steps: jax.Array
) -> State:
    """Make steps of one mode until every row has ended or reached its ``stop``, without a host round trip per token.

    Args:
        xlora: static description.
        settings: settings of the generation.
        mode: way to make a step.
        params: parameters of the model.
        state: state after :func:`prefill` of all chunks.
        stop: int32 ``[B]``, length at which a row waits.
        steps: maximum number of steps.
    """

    def active(state: State) -> jax.Array:
        return ~state.done & (state.length < stop)

    def goes_on(carry: tuple[jax.Array, State]) -> jax.Array:
        step, state = carry
        return (step < steps) & active(state).any()

    def body(carry: tuple[jax.Array, State]) -> tuple[jax.Array, State]:
        step, state = carry
        return step + 1, mode.step(xlora, settings, params, state, active(state))

    _, state = lax.while_loop(goes_on, body, (jnp.int32(0), state))
    return state


def decode(
    xlora: XLora,
    settings: Settings,
    params: Params,
    state: State,
    *,
    steps: int | None = None,
    stop_at: StopAt | None = None,
) -> Iterator[State]:
    """Run a state from :func:`start` to its end.

    Args:
        xlora: static description.
        settings: settings of the generation.
        params: parameters of the model.
        state: initial state, donated.
        steps: maximum number of steps between two states; None for no limit.
        stop_at: function called with each row's new tokens before a state is yielded. It returns the number of tokens
            to keep if they end the row, else None.

    Yields:
        States. The first follows the prompts and has one new token per row. Each is donated when the next is made.
    """
    first = np.array(state.length)
    most = np.array(state.limit)
    if stop_at is not None:
        steps = min(steps or _STEPS, _STEPS)
    if not keeps_cache(xlora):
        yield from _recomputed(xlora, settings, params, state, steps, stop_at)
        return
    switch = xlora.module.config.rope_switches_at
    state = _stopped(_prefill_all(xlora, settings, params, state), first, stop_at)
    yield state

    def run(state: State, mode: Mode, stop: Ints, limit: int | None = None) -> State:
        bound = min(x for x in (steps, limit, UNBOUNDED) if x is not None)
        state = advance(xlora, settings, mode, params, state, jnp.asarray(stop, jnp.int32), jnp.int32(bound))
        return _stopped(state, first, stop_at)

    if switch is not None and first.max() <= switch < most.max() - 1:
        # From position `switch` on, the model uses other rotary frequencies, and all cached keys are wrong. The token
        # at `switch` itself is still chosen before that; drafting would look beyond it.
        mode = _without_drafts(state)
        while (left := switch + 1 - int(state.length.max())) > 0 and not state.done.all():
            state = run(state, mode, most, left)
            yield state
        state = _stopped(_prefill_all(xlora, settings, params, state), first, stop_at)
        yield state

    thaw = most if settings.frozen_after is None else np.minimum(first + settings.frozen_after, most)
    chooser = None
    if state.scaling is not None and settings.draft is True and Chooser.pays(_bytes_of(params)):
        chooser = Chooser(np.array(state.length))
    while True:
        length, done = np.array(state.length), np.array(state.done)
        if done.all():
            return
        stop, limit = most, None
        if state.scaling is None:
            mode = _without_drafts(state)
        elif (done | (length >= thaw)).all():
            mode = Frozen()
        elif chooser is not None:
            chooser.see(np.array(state.tokens), length, int(state.checked.sum()), int(state.accepted.sum()))
            way = chooser.choose()
            mode = MODES[way]
            limit = _LOOKUP_STEPS if way == "lookup" else _STEPS
        else:
            stop = thaw
            mode = MODES[settings.draft if isinstance(settings.draft, str) else "plain"]
        if not isinstance(mode, StaleGates):
            state = update(state, pending=jnp.zeros_like(state.pending))
        state = run(state, mode, stop, limit)
        yield state


def _recomputed(
    xlora: XLora, settings: Settings, params: Params, state: State, steps: int | None, stop_at: StopAt | None
) -> Iterator[State]:
    """Run a state of a model without a cache; as :func:`decode`."""
    first, most = np.array(state.length), np.array(state.limit)
    limit = 1
    while not np.array(state.done).all():
        stop = jnp.asarray(most, jnp.int32)
        state = advance(xlora, settings, Recompute(), params, state, stop, jnp.int32(limit))
        if limit == 1:  # the first token is the prompt's, as with a cache
            state = update(state, reads=jnp.zeros_like(state.reads))
        state = _stopped(state, first, stop_at)
        yield state
        limit = min(steps or UNBOUNDED, UNBOUNDED)


def _without_drafts(state: State) -> Mode:
    """Return the exact mode of one token per step that needs the fewest passes."""
    if state.scalings is None:
        return Base()
    return Frozen() if state.scaling is None else Plain()


def _bytes_of(params: Params) -> int:
    return sum(int(leaf.nbytes) for leaf in jax.tree.leaves(params))


def _stopped(state: State, first: Ints, stop_at: StopAt | None) -> State:
    """Return the state after ``stop_at`` has ended some of the rows."""
    if stop_at is None:
        return state
    kept = [stop_at(new.tolist()) for new in new_tokens(state, first)]
    ends = np.array([keep is not None for keep in kept])
    if not ends.any():
        return state
    length = np.where(ends, first + np.array([keep or 0 for keep in kept]), np.array(state.length))
    return update(state, length=jnp.asarray(length, jnp.int32), done=state.done | jnp.asarray(ends))


def _prefill_all(xlora: XLora, settings: Settings, params: Params, state: State) -> State:
    longest = int(state.length.max())
    chunk = min(chunk_size(xlora, longest, settings), state.tokens.shape[1])
    for offset in range(0, longest, chunk):
        state = prefill(xlora, settings, params, state, jnp.int32(offset), chunk=chunk)
    return state
