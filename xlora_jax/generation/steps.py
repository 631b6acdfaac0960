"""Ways to make one decoding step: base alone, plain, constant gates, stale gates, lookup, recomputation.

:mod:`xlora_jax.generation.decoding` explains their costs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp

from xlora_jax.generation.drafting import GUESSES, look_up
from xlora_jax.generation.state import (
    Settings,
    State,
    append_token,
    choose_token,
    last_token,
    own_scalings,
    record_scalings,
    select_rows,
    update,
)
from xlora_jax.layers import mixing
from xlora_jax.models import PairedCache, Place
from xlora_jax.passes import Params, XLora, classify, real_pass, scaling_pass, single_pass, unembed

__all__ = ["MODES", "Base", "Frozen", "Lookup", "Mode", "Plain", "Recompute", "StaleGates"]


class Mode(Protocol):
    """A way to make one step; hashable."""

    def step(self, xlora: XLora, settings: Settings, params: Params, state: State, active: jax.Array) -> State:
        """Make a step. Rows that are not ``active`` (bool ``[B]``) stay as they are."""
        ...


@dataclass(frozen=True)
class Base:
    """The only pass of a model without a classifier."""

    def step(self, xlora: XLora, settings: Settings, params: Params, state: State, active: jax.Array) -> State:
        """See :class:`Mode`."""
        token, place = last_token(state)
        out = single_pass(xlora, params, input_ids=token, cache=state.real, place=place, with_logits=False)
        logits = unembed(xlora, params, out.hidden_states, xlora.arrow)[:, 0]
        state = update(state, real=out.cache, reads=state.reads + active)
        return append_token(settings, state, choose_token(settings, state, logits, state.length), active)


@dataclass(frozen=True)
class Plain:
    """Both passes, one after the other."""

    def step(self, xlora: XLora, settings: Settings, params: Params, state: State, active: jax.Array) -> State:
        """See :class:`Mode`."""
        token, place = last_token(state)
        hidden, scaling = scaling_pass(xlora, params, input_ids=token, cache=state.scaling, place=place)
        scalings = own_scalings(state, classify(xlora, params, hidden))
        out = real_pass(xlora, params, scalings, input_ids=token, cache=state.real, place=place, with_logits=False)
        logits = unembed(xlora, params, out.hidden_states, scalings)[:, 0]
        state = update(
            state,
            scaling=scaling,
            real=out.cache,
            scalings=select_rows(active, scalings[:, 0], state.scalings),
            recorded=record_scalings(state.recorded, scalings[:, 0], state.length - 1, active),
            reads=state.reads + 2 * active,
        )
        return append_token(settings, state, choose_token(settings, state, logits, state.length), active)


@dataclass(frozen=True)
class Recompute:
    """Both passes over the whole text for every token, for a model that keeps no cache."""

    def step(self, xlora: XLora, settings: Settings, params: Params, state: State, active: jax.Array) -> State:
        """See :class:`Mode`."""
        rows, last = jnp.arange(len(state.tokens)), state.length - 1
        there = jnp.arange(state.tokens.shape[1]) < state.length[:, None]
        inputs: dict[str, Any] = {"input_ids": state.tokens, "attention_mask": there.astype(jnp.int32)}
        if state.scalings is None:
            logits = single_pass(xlora, params, **inputs).logits
            state = update(state, reads=state.reads + active)
        else:
            hidden, _ = scaling_pass(xlora, params, **inputs)
            scalings = own_scalings(state, classify(xlora, params, hidden))
            logits = real_pass(xlora, params, scalings, **inputs).logits
            state = update(
                state,
                scalings=select_rows(active, scalings[rows, last], state.scalings),
                recorded=None if state.recorded is None else jnp.where(there[:, :, None, None], scalings, 0),
                reads=state.reads + 2 * active,
            )
        assert logits is not None
        token = choose_token(settings, state, logits[rows, last], state.length)
        return append_token(settings, state, token, active)


@dataclass(frozen=True)
class Frozen:
    """The real pass alone, with the scalings of the state.

    Exact for rows with scalings of their own. For other rows, approximate: their scalings are those of the last token
    before freezing.
    """

    def step(self, xlora: XLora, settings: Settings, params: Params, state: State, active: jax.Array) -> State:
        """See :class:`Mode`."""
        assert state.scalings is not None
        token, place = last_token(state)
        scalings = state.scalings[:, None]
        out = real_pass(xlora, params, scalings, input_ids=token, cache=state.real, place=place, with_logits=False)
        logits = unembed(xlora, params, out.hidden_states, scalings)[:, 0]
        state = update(
            state,
            real=out.cache,
            recorded=record_scalings(state.recorded, state.scalings, state.length - 1, active),
            reads=state.reads + active,
        )
        return append_token(settings, state, choose_token(settings, state, logits, state.length), active)


@dataclass(frozen=True)
class StaleGates:
    """Both passes as one batch, one position apart; see :mod:`xlora_jax.generation.decoding`."""

    def step(self, xlora: XLora, settings: Settings, params: Params, state: State, active: jax.Array) -> State:
        """See :class:`Mode`."""
        assert state.scalings is not None
        assert state.scaling is not None
        rows = jnp.arange(len(state.tokens))
        old, position = state.scalings, state.length - 1 + state.pending
        logits, fresh, caches = self._passes(xlora, params, state, position)
        state = update(state, scaling=caches.scaling, real=caches.real)

        certain = choose_token(settings, state, logits[:, 0], position)
        right = ~state.pending | (certain == state.tokens[rows, position])
        checks = active & state.pending
        state = update(
            state,
            checked=state.checked + checks,
            accepted=state.accepted + (checks & right),
            reads=state.reads + active,
        )
        state = append_token(settings, state, certain, checks)
        # A row that has just ended gets no draft, and no scalings of its last token, which predicts nothing.
        moves = active & right & ~state.done
        draft = choose_token(settings, state, logits[:, 1], position + 1)
        slot = jnp.where(moves, position + 1, state.tokens.shape[1])
        return update(
            state,
            tokens=state.tokens.at[rows, slot].set(draft, mode="drop"),
            pending=jnp.where(active, moves, state.pending),
            scalings=select_rows(moves, fresh, old),
            recorded=record_scalings(state.recorded, fresh, position, moves),
        )

    def _passes(
        self, xlora: XLora, params: Params, state: State, position: jax.Array
    ) -> tuple[jax.Array, jax.Array, PairedCache]:
        """Run the scaling pass at ``position [B]``, and the real pass at ``position - 1`` and ``position``.

        The scaling pass runs at both positions too, so that the two passes are halves of one rectangular batch. At the
        first position it overwrites its cache with the same values.

        Returns:
            Logits ``[B, 2, V]`` of the two positions, scalings ``[B, L or 1, N]`` of the second, caches.
        """
        assert state.scalings is not None
        assert state.scaling is not None
        assert state.real is not None
        batch = len(state.tokens)
        two = jnp.stack([position - 1, position], axis=1)
        tokens = jnp.take_along_axis(state.tokens, two, axis=1)
        known = jnp.broadcast_to(state.scalings[:, None], (batch, 2, *state.scalings.shape[1:]))
        constant = mixing.constant_scalings(known.shape, xlora.config.scaling_pass_gate(xlora.num_experts), known.dtype)
        out = real_pass(
            xlora,
            params,
            jnp.concatenate([constant, known]),
            input_ids=jnp.concatenate([tokens, tokens]),
            cache=PairedCache(state.scaling, state.real),
            place=Place(*(jnp.concatenate([column, column]) for column in (two[:, 0], two[:, 1]))),
            with_logits=False,
        )
        fresh = own_scalings(state, classify(xlora, params, out.hidden_states[:batch, 1:]))[:, 0]
        logits = unembed(xlora, params, out.hidden_states[batch:], known)
        return logits, fresh, cast(PairedCache, out.cache)


@dataclass(frozen=True)
class Lookup:
    """Both passes, one after the other, over the last token and the guesses that follow it."""

    def step(self, xlora: XLora, settings: Settings, params: Params, state: State, active: jax.Array) -> State:
        """See :class:`Mode`."""
        rows = jnp.arange(len(state.tokens))
        position = state.length - 1
        columns = position[:, None] + jnp.arange(GUESSES + 1)
        guesses = look_up(state.tokens, state.length)
        state = update(state, tokens=state.tokens.at[rows[:, None], columns[:, 1:]].set(guesses))
        tokens = jnp.take_along_axis(state.tokens, columns, axis=1)
        # Guesses beyond a row's limit count as padding, because the model may not have their positions.
        place = Place(position, jnp.clip(state.limit - 2, position, position + GUESSES))
        hidden, scaling = scaling_pass(xlora, params, input_ids=tokens, cache=state.scaling, place=place)
        scalings = own_scalings(state, classify(xlora, params, hidden))
        out = real_pass(xlora, params, scalings, input_ids=tokens, cache=state.real, place=place, with_logits=False)
        logits = unembed(xlora, params, out.hidden_states, scalings)
        state = update(state, scaling=scaling, real=out.cache, reads=state.reads + 2 * active)
        for step in range(GUESSES + 1):
            state = update(
                state,
                scalings=select_rows(active, scalings[:, step], state.scalings),
                recorded=record_scalings(state.recorded, scalings[:, step], state.length - 1, active),
                guessed=state.guessed + active * (step > 0),
            )
            token = choose_token(settings, state, logits[:, step], state.length)
            right = token == state.tokens[rows, state.length]
            state = append_token(settings, state, token, active)
            active = active & right & ~state.done
        return state


MODES: dict[str, Mode] = {"plain": Plain(), "gates": StaleGates(), "lookup": Lookup()}
