"""Generation with one cache for each pass, on the device from the prompt to the last token.

Two caches are exact: both passes are causal, so the gates at a position depend on earlier positions only, and neither
cache changes when a token is appended. A token costs one position through each pass: two reads of the weights.

**Drafting** makes it nearly one. The real pass at position p needs the gates of p, which the scaling pass has to give
first; so the two cannot share a read of the weights at the same position. They can at neighbouring ones. One step runs
as one batch

    scaling pass  at p        gives the exact gates of p
    real pass     at p - 1    with its exact gates, known from the step before: gives the token of p, certain
    real pass     at p        with the gates of p - 1: gives a draft of p + 1 (gates change slowly)

where the token at p was drafted by the step before. If it is what the pass at p - 1 gives, the step has made a token
for one read of the weights, and what stood at p in the real cache is overwritten by the next step, with exact gates.
If not, the certain token takes its place, and one step is lost. With a share a of drafts accepted a token costs 2 - a
reads: never more than plain decoding, whatever the draft.

Every token that is kept was chosen from logits of exact gates, with the noise of its own position (see
:mod:`xlora_jax.sampling`): drafting changes neither a greedy nor a sampled text. One caveat: a step's matrix products
have more rows than those of plain decoding, so logits can differ in their last bits, and two tokens whose logits agree
to within those bits can change places.

The parts: a :class:`State`; a :class:`Mode`, which makes one step; :func:`prefill` and :func:`advance`, the two
compiled functions; :func:`decode`, the loop on the host that picks modes; :func:`generate` and :func:`stream`, which
take prompts and give tokens. Axes as in :mod:`xlora_jax.mixing`, S for the slots of the token buffer and of the caches,
V for the vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import struct
from jax import lax

from xlora_jax import mixing
from xlora_jax.forward import Params, XLora, base_forward, classify, real_pass, scaling_pass, unembed
from xlora_jax.models import Decoder, KVCache, PairedCache, Place
from xlora_jax.sampling import LogitsProcessor, Sampler

__all__ = [
    "Base",
    "Drafted",
    "Frozen",
    "Generated",
    "GenerationConfig",
    "GenerationStats",
    "Mode",
    "Plain",
    "Settings",
    "State",
    "advance",
    "bucket",
    "decode",
    "generate",
    "prefill",
    "start",
    "stream",
]

Ints = npt.NDArray[np.int32]
# From the new tokens of a row to how many of them stay if they end it, else None.
StopAt = Callable[[Sequence[int]], int | None]

# Steps between two looks of the host at the tokens, where it has to look at all.
_STEPS = 16
# Credit for drafting, in tokens of plain decoding: see `Drafted`.
_CREDIT = 3.0
_EARNED_PER_TOKEN = 0.03
# Time of a step that drafts, as a share of plain decoding's time per token.
_COST, _COST_ON_CPU = 0.55, 1.05
_ALL = np.iinfo(np.int32).max


@dataclass(frozen=True)
class GenerationConfig:
    """What can be asked of a generation. Names and meaning are those of transformers where it has them.

    Attributes:
        max_new_tokens: at least 1.
        do_sample: draw (True) or take the most probable token (False).
        temperature: positive; divides the logits of a draw.
        top_k: draw among the k most probable tokens; None or 0 for all.
        top_p: draw among the fewest most probable tokens that together reach this probability.
        min_p: draw among tokens at least this many times as probable as the most probable one.
        repetition_penalty: above 1 makes what has occurred in the row less probable, greedy or drawn.
        logits_processors: your own, see :class:`~xlora_jax.sampling.LogitsProcessor`.
        num_return_sequences: rows for each prompt, one behind the other, each with draws of its own.
        eos_token_id: token or tokens that end a row; None runs every row to the end.
        pad_token_id: fills a row after its end; None takes the first ``eos_token_id``.
        seed: of the draws. What is drawn depends on seed, row and position only.
        stop_at: from the new tokens of a row to how many of them stay if they end it, else None; asked every few steps.
            See :class:`~xlora_jax.text.StopStrings`.
        draft: draft a token while the one before it is checked, where that is usually faster: the tokens are the same,
            with fewer reads of the weights. A :class:`Drafted` says what is faster here.
        frozen_after: keep the gates as they are after so many new tokens, and run one pass per token from then on.
            APPROXIMATE: from there on the tokens are not those of the model. Nothing is drafted then.
        cache_dtype: of keys and values; None takes the model's.
        prefill_chunk: the most tokens of a prompt that run at once; bounds the memory of long prompts.
    """

    max_new_tokens: int = 20
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    logits_processors: Sequence[LogitsProcessor] = ()
    num_return_sequences: int = 1
    eos_token_id: int | Sequence[int] | None = None
    pad_token_id: int | None = None
    seed: int = 0
    stop_at: StopAt | None = None
    draft: bool | Drafted = True
    frozen_after: int | None = None
    cache_dtype: jax.typing.DTypeLike | None = None
    prefill_chunk: int = 512

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        for name, least in (("max_new_tokens", 1), ("num_return_sequences", 1), ("prefill_chunk", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if self.frozen_after is not None and self.frozen_after < 1:
            raise ValueError(f"frozen_after: expected at least 1 new token, or None, got {self.frozen_after}")

    @property
    def eos(self) -> tuple[int, ...]:
        """All tokens that end a row."""
        return () if self.eos_token_id is None else tuple(int(token) for token in np.ravel(self.eos_token_id))

    @property
    def pad(self) -> int:
        """The token that fills a row after its end."""
        return self.pad_token_id if self.pad_token_id is not None else (*self.eos, 0)[0]

    def settings(self, *, record: bool = False) -> Settings:
        """The static part, from which functions are compiled.

        Args:
            record: keep the scalings of all positions.

        Raises:
            ValueError: a setting of the sampler without meaning.
        """
        sampler = Sampler.of(
            do_sample=self.do_sample,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            extra=self.logits_processors,
        )
        draft = Drafted() if self.draft is True else self.draft or None
        if self.frozen_after is not None:
            # The gates that stay would depend on whether the last token before was drafted.
            draft = None
        dtype = None if self.cache_dtype is None else jnp.dtype(self.cache_dtype)
        return Settings(sampler, self.eos, dtype, self.prefill_chunk, draft, self.frozen_after, record)


@dataclass(frozen=True)
class Settings:
    """The part of a :class:`GenerationConfig` that functions are compiled for; hashable.

    Attributes:
        sampler: how a token is chosen.
        eos: tokens that end a row.
        cache_dtype: of keys and values; None takes that of the model's computation.
        prefill_chunk: the most tokens of a prompt that run at once.
        draft: how to draft; None for plain decoding.
        frozen_after: new tokens after which the gates stay as they are; None for never.
        record: keep the scalings of all positions.
    """

    sampler: Sampler
    eos: tuple[int, ...] = ()
    cache_dtype: Any = None
    prefill_chunk: int = 512
    draft: Drafted | None = None
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
        checked: int32 ``[B]``, drafts that were checked.
        accepted: int32 ``[B]``, those that were right.
        credit: float32, see :class:`Drafted`.
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
    credit: jax.Array


@dataclass(frozen=True)
class GenerationStats:
    """What a generation cost.

    Attributes:
        rows: sequences generated.
        prompt_tokens: without padding, all rows together.
        new_tokens: likewise.
        prefill_seconds: until the first token of every row, compilation included if there was any.
        decode_seconds: from there to the end.
        reads_per_token: reads of the weights per token of a row, first tokens aside: 1 is the base model alone, 2 plain
            decoding with two passes.
        acceptance: share of drafts that were right; None if nothing was drafted.
        cache_bytes: of both caches.
        cache_bytes_per_token: of a row, in layers that do not keep a ring: what one more token needs.
    """

    rows: int
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    reads_per_token: float
    acceptance: float | None
    cache_bytes: int
    cache_bytes_per_token: int


class Mode(Protocol):
    """A way to make one step; hashable."""

    def step(self, model: XLora, settings: Settings, params: Params, state: State, active: jax.Array) -> State:
        """Make a step. Rows that are not ``active`` (bool ``[B]``) keep what they have."""
        ...

    def goes_on(self, state: State) -> jax.Array | bool:
        """Whether to make another one, as far as this mode is concerned."""
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

    def goes_on(self, state: State) -> bool:
        """See :class:`Mode`."""
        return True


@dataclass(frozen=True)
class Plain:
    """Both passes, one after the other.

    Attributes:
        resumes: stop once there is credit for drafting again.
    """

    resumes: bool = False

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
            credit=state.credit + _EARNED_PER_TOKEN,
        )
        return _append(settings, state, _choose(settings, state, logits, state.length), active)

    def goes_on(self, state: State) -> jax.Array | bool:
        """See :class:`Mode`."""
        return state.credit < _CREDIT if self.resumes else True


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

    def goes_on(self, state: State) -> bool:
        """See :class:`Mode`."""
        return True


@dataclass(frozen=True)
class Drafted:
    """Both passes as one batch, a position apart; see the head of this module.

    Where a step costs more than half of what plain decoding costs per token, drafting pays only if enough drafts are
    accepted. So it has a credit: every step costs ``cost``, every token earns 1, and plain decoding takes over where
    the credit is used up, for some hundred tokens. A generation of n tokens is slower than plain decoding by at most
    3 / n + 3%, if ``cost`` is true; ``benchmarks/generate.py`` measures it. At 1 or more nothing is drafted.

    Attributes:
        cost: time of a step, as a share of the time of a token in plain decoding. A half if reading weights is all
            that takes time, as on a GPU or TPU with few rows; on CPUs rows are not free, and steps cost more than they
            save. None takes what is usual for the backend.
    """

    cost: float | None = None

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        if self.cost is not None and not self.cost > 0:
            raise ValueError(f"cost: expected above 0, or None, got {self.cost}")

    @property
    def share(self) -> float:
        """``cost``, or what is usual for JAX's default backend."""
        return self.cost if self.cost is not None else _COST_ON_CPU if jax.default_backend() == "cpu" else _COST

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
        earned = checks.sum() / jnp.maximum(active.sum(), 1)
        return _replace(
            state,
            tokens=state.tokens.at[rows, slot].set(draft, mode="drop"),
            pending=jnp.where(active, moves, state.pending),
            scalings=_where(moves, fresh, old),
            recorded=_record(state.recorded, fresh, position, moves),
            credit=jnp.minimum(state.credit + earned - self.share, _CREDIT),
        )

    def goes_on(self, state: State) -> jax.Array:
        """See :class:`Mode`."""
        return state.credit >= self.share

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
    # A slot more than the longest row, for a draft; and whole chunks of the prompt.
    capacity = bucket(max(longest + max_new_tokens + 1, -(-longest // chunk) * chunk))
    tokens = np.zeros((batch, capacity), np.int32)
    tokens[:, :longest] = prompts[:, :longest]
    # No rings where the whole sequence may have to run again. A step that drafts writes two positions at once.
    margin = None if model.module.config.rope_switches_at is not None else max(chunk, 2)
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
        credit=jnp.float32(_CREDIT),
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
        return (step < steps) & active(state).any() & mode.goes_on(state)

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

    share = _ALL if settings.draft is None else settings.draft.share
    drafting = share < 1
    thaw = most if settings.frozen_after is None else np.minimum(first + settings.frozen_after, most)
    while True:
        length, done = np.array(state.length), np.array(state.done)
        if done.all():
            return
        stop = most
        if state.scaling is None:
            mode = Base()
        elif (done | (length >= thaw)).all():
            mode = Frozen()
        else:
            stop = thaw
            mode = Plain()
            if settings.draft is not None and share < 1:
                # Once out of credit, drafting waits for all of it, not for the cost of one step.
                drafting = float(state.credit) >= (share if drafting else _CREDIT)
                mode = settings.draft if drafting else Plain(resumes=True)
        if not isinstance(mode, Drafted):
            state = _replace(state, pending=jnp.zeros_like(state.pending))
        state = run(state, mode, stop)
        yield state


@dataclass(frozen=True)
class Generated:
    """What :func:`generate` gives.

    Attributes:
        tokens: int32 ``[B, T + new]``, NumPy: the prompts as given, then what was generated, then padding.
        scalings: ``[B, T + new - 1, L or 1, N]`` by column, zero where there is no token; None if not recorded. The
            last token generated has none: nothing was predicted from it.
        stats: what it cost.
    """

    tokens: Ints
    scalings: jax.Array | None
    stats: GenerationStats


def generate(
    model: XLora,
    params: Params,
    input_ids: Any,
    attention_mask: Any,
    config: GenerationConfig,
    *,
    experts: bool = True,
    record: bool = False,
) -> Generated:
    """Generate from a batch of prompts.

    Args:
        model: static description.
        params: of the model.
        input_ids: int ``[B, T]``.
        attention_mask: ``[B, T]``, zero at padding, which may stand anywhere; None for none.
        config: what is asked for.
        experts: False runs the base model alone.
        record: also return the scalings.

    Raises:
        ValueError: shapes that do not fit, a prompt without tokens, or a setting without meaning.
    """
    run = _Run.of(model, params, input_ids, attention_mask, config, experts=experts, record=record)
    *_, state = run.states(None)
    width = run.input_ids.shape[1]
    tokens = np.full((len(run.input_ids), width + config.max_new_tokens), config.pad, np.int32)
    tokens[:, :width] = run.input_ids
    for row, new in enumerate(_new_tokens(state, run.lengths)):
        tokens[row, width : width + len(new)] = new
    scalings = _by_column(state, run.attention_mask, run.lengths, config.max_new_tokens)
    return Generated(tokens, scalings, run.stats(state))


def stream(
    model: XLora,
    params: Params,
    input_ids: Any,
    attention_mask: Any,
    config: GenerationConfig,
    *,
    experts: bool = True,
    steps: int = 4,
) -> Generator[list[Ints], None, GenerationStats]:
    """Generate piece by piece; the tokens are those of :func:`generate`, whose arguments these are.

    Args:
        model: static description.
        params: of the model.
        input_ids: int ``[B, T]``.
        attention_mask: ``[B, T]``, or None.
        config: what is asked for.
        experts: False runs the base model alone.
        steps: between two pieces.

    Yields:
        For each row its new tokens since the last piece, int32; rows go on at their own pace.

    Returns:
        What it cost: the value of ``yield from``.
    """
    run = _Run.of(model, params, input_ids, attention_mask, config, experts=experts)
    given = np.zeros_like(run.lengths)
    state = None
    for state in run.states(steps):
        new = _new_tokens(state, run.lengths)
        piece = [tokens[count:] for tokens, count in zip(new, given, strict=True)]
        if any(map(len, piece)):
            yield piece
        # A stop can take tokens back that were given; they are not given again.
        given = np.maximum(given, [len(tokens) for tokens in new])
    assert state is not None
    return run.stats(state)


def bucket(length: int, least: int = 16) -> int:
    """Round up to ``least`` times a power of two, or 1.5 times that, so that few lengths are compiled for."""
    size = least
    while size < length:
        if size * 3 // 2 >= length:
            return size * 3 // 2
        size *= 2
    return size


@dataclass
class _Run:
    """One generation under way: its prompts, and when what happened.

    Attributes:
        input_ids: int32 ``[B, T]`` as given, a row for each sequence to be returned.
        attention_mask: ``[B, T]``.
        lengths: int32 ``[B]``, tokens of the prompts.
    """

    model: XLora
    params: Params
    config: GenerationConfig
    settings: Settings
    experts: bool
    input_ids: Ints
    attention_mask: Ints
    lengths: Ints
    started: float = 0.0
    prefilled: float = 0.0

    @classmethod
    def of(
        cls,
        model: XLora,
        params: Params,
        input_ids: Any,
        attention_mask: Any,
        config: GenerationConfig,
        *,
        experts: bool,
        record: bool = False,
    ) -> _Run:
        ids = np.asarray(input_ids)
        if ids.ndim != 2 or ids.dtype.kind not in "iu":
            raise ValueError(f"input_ids: expected int [batch, tokens], got {ids.dtype} {list(ids.shape)}")
        mask = np.ones(ids.shape, np.int32) if attention_mask is None else np.asarray(attention_mask)
        if mask.shape != ids.shape:
            raise ValueError(
                f"attention_mask: expected the shape of input_ids {list(ids.shape)}, got {list(mask.shape)}"
            )
        lengths = (mask != 0).sum(axis=1).astype(np.int32)
        if not lengths.all():
            raise ValueError(f"prompt {int(np.argmin(lengths))} has no tokens: its attention_mask is all zero")
        if not isinstance(model.module, Decoder):
            raise NotImplementedError(
                f"generate: expected a causal language model of xlora_jax.models (Decoder), got "
                f"{type(model.module).__name__}, which keeps no cache"
            )
        most = model.module.config.max_positions
        if most is not None and lengths.max() + config.max_new_tokens > most:
            raise ValueError(
                f"this model has {most} positions, got a prompt of {lengths.max()} tokens and max_new_tokens "
                f"{config.max_new_tokens}: shorten one of them"
            )
        ids, mask, lengths = (np.repeat(array, config.num_return_sequences, axis=0) for array in (ids, mask, lengths))
        settings = config.settings(record=record and experts)
        return cls(model, params, config, settings, experts, ids.astype(np.int32), mask, lengths)

    def states(self, steps: int | None) -> Iterator[State]:
        self.started = time.perf_counter()
        # Slots are positions: tokens move together at the row's start, in order, and padding behind them.
        order = np.argsort(self.attention_mask == 0, axis=1, kind="stable")
        state = start(
            self.model,
            np.take_along_axis(self.input_ids, order, axis=1),
            self.lengths,
            max_new_tokens=self.config.max_new_tokens,
            settings=self.settings,
            rng=jax.random.key(self.config.seed),
            experts=self.experts,
        )
        stop_at = self.config.stop_at
        for after in decode(self.model, self.params, state, self.settings, steps=steps, stop_at=stop_at):
            if not self.prefilled:
                after.length.block_until_ready()
                self.prefilled = time.perf_counter()
            yield after

    def stats(self, state: State) -> GenerationStats:
        new, checked = int(state.length.sum() - self.lengths.sum()), int(state.checked.sum())
        caches = [cache for cache in (state.scaling, state.real) if cache is not None]
        return GenerationStats(
            rows=len(self.lengths),
            prompt_tokens=int(self.lengths.sum()),
            new_tokens=new,
            prefill_seconds=self.prefilled - self.started,
            decode_seconds=time.perf_counter() - self.prefilled,
            reads_per_token=int(state.reads.sum()) / max(new - len(self.lengths), 1),
            acceptance=int(state.accepted.sum()) / checked if checked else None,
            cache_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(caches)),
            cache_bytes_per_token=sum(cache.bytes_per_token for cache in caches),
        )


def _new_tokens(state: State, first: Ints) -> list[Ints]:
    """Each row's tokens behind its prompt, which has ``first [B]``."""
    # Copies: the buffers are about to be donated.
    tokens, length = np.array(state.tokens), np.array(state.length)
    return [row[start:end] for row, start, end in zip(tokens, first, length, strict=True)]


def _stopped(state: State, first: Ints, stop_at: StopAt | None) -> State:
    """End the rows that ``stop_at`` ends."""
    if stop_at is None:
        return state
    kept = [stop_at(new.tolist()) for new in _new_tokens(state, first)]
    ends = np.array([keep is not None for keep in kept])
    if not ends.any():
        return state
    length = np.where(ends, first + np.array([keep or 0 for keep in kept]), np.array(state.length))
    return _replace(state, length=jnp.asarray(length, jnp.int32), done=state.done | jnp.asarray(ends))


def _by_column(state: State, attention_mask: Ints, first: Ints, new: int) -> jax.Array | None:
    """Scalings by column of the prompts as given, from scalings by position."""
    if state.recorded is None:
        return None
    columns = first[:, None] + np.arange(new - 1)
    position = np.concatenate([np.maximum(np.cumsum(attention_mask != 0, axis=1) - 1, 0), columns], axis=1)
    there = np.concatenate([attention_mask != 0, columns < np.array(state.length)[:, None]], axis=1)
    scalings = jnp.take_along_axis(state.recorded, jnp.asarray(position)[:, :, None, None], axis=1)
    return jnp.where(jnp.asarray(there)[:, :, None, None], scalings, 0)


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
