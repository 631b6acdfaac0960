"""Generation with one cache for each pass, on the device from the prompt to the last token.

Two caches are exact: both passes are causal, so the gates at a position depend on earlier positions only, and neither
cache changes when a token is appended. Every new token costs one token through each pass. Axes as in
:mod:`xlora_jax.mixing`, and V for the vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from xlora_jax.forward import Params, XLora, base_forward, classify, real_pass, scaling_pass, unembed
from xlora_jax.models import KVCache
from xlora_jax.sampling import Sampler

__all__ = ["Caches", "Generated", "extend", "generate"]


@struct.dataclass
class Caches:
    """The caches of the two passes; with the experts disabled there is no real pass, and ``real`` is None."""

    scaling: KVCache
    real: KVCache | None


@struct.dataclass
class Generated:
    """What :func:`generate` gives.

    Attributes:
        tokens: int32 ``[B, new]``; after a row's end of sequence, the padding token.
        scalings: ``[B, T + new, L or 1, N]`` by position, zero where there is no token; None if not recorded. The
            last token generated has none: nothing was predicted from it.
    """

    tokens: jax.Array
    scalings: jax.Array | None


def extend(
    model: XLora, params: Params, caches: Caches, tokens: jax.Array, start: jax.Array, last: jax.Array
) -> tuple[jax.Array, jax.Array | None, Caches]:
    """Run ``tokens [B, T]`` at positions from ``start [B]`` on through both passes.

    Args:
        model: static description.
        params: of the model.
        caches: of the positions before ``start``.
        tokens: int ``[B, T]``.
        start: int ``[B]``.
        last: int ``[B]``, the row's last true token among the T; those behind it are padding, which the next call
            overwrites.

    Returns:
        Logits ``[B, V]`` at ``last``, scalings ``[B, T, L or 1, N]`` (None if experts are disabled), caches.
    """
    # Padding takes the position of the last token, so that it does not count as context for `longrope`.
    positions = start[:, None] + jnp.minimum(jnp.arange(tokens.shape[1]), last[:, None])
    inputs: dict[str, Any] = {"input_ids": tokens, "positions": positions, "start": start}

    def at_last(x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, last.reshape(-1, *[1] * (x.ndim - 1)), axis=1)

    if caches.real is None:
        out = base_forward(model, params, cache=caches.scaling, with_logits=False, **inputs)
        assert out.cache is not None
        return unembed(model, params, at_last(out.hidden_states))[:, 0], None, Caches(out.cache, None)
    hidden_states, scaling_cache = scaling_pass(model, params, cache=caches.scaling, **inputs)
    scalings = classify(model, params, hidden_states)
    out = real_pass(model, params, scalings, cache=caches.real, with_logits=False, **inputs)
    # The output head may have experts too: it needs the gates of the one position that it sees.
    logits = unembed(model, params, at_last(out.hidden_states), at_last(scalings))
    assert scaling_cache is not None
    return logits[:, 0], scalings, Caches(scaling_cache, out.cache)


@partial(jax.jit, static_argnums=0, static_argnames=("max_new_tokens", "sampler", "eos", "pad", "experts", "record"))
def generate(
    model: XLora,
    params: Params,
    input_ids: jax.Array,
    attention_mask: jax.Array,
    rng: jax.Array,
    *,
    max_new_tokens: int,
    sampler: Sampler,
    eos: tuple[int, ...] = (),
    pad: int = 0,
    experts: bool = True,
    record: bool = False,
) -> Generated:
    """Generate from a batch of prompts; one compiled function, no host round trip per token.

    Args:
        model: static description.
        params: of the model.
        input_ids: int ``[B, T]``.
        attention_mask: ``[B, T]``, zero at padding, which may stand anywhere; every row has a token.
        rng: PRNG key of the draws.
        max_new_tokens: at least 1.
        sampler: how a token is chosen.
        eos: tokens that end a row.
        pad: what follows them.
        experts: False runs the base model alone.
        record: also return the scalings.

    Returns:
        The new tokens, and the scalings if recorded.
    """
    batch, length = input_ids.shape
    # Slots are positions: tokens move together at the row's start, in order, and padding behind them.
    order = jnp.argsort(attention_mask == 0, axis=1, stable=True)
    tokens = jnp.take_along_axis(input_ids, order, axis=1)
    lengths = (attention_mask != 0).sum(axis=1)
    capacity = length + max_new_tokens
    cache = model.module.empty_cache(batch, capacity)
    caches = Caches(cache, model.module.empty_cache(batch, capacity) if experts else None)

    start = jnp.zeros(batch, jnp.int32)
    logits, scalings, caches = extend(model, params, caches, tokens, start, lengths - 1)
    recorded = None
    if record and scalings is not None:
        real = (jnp.arange(length) < lengths[:, None])[:, :, None, None]
        recorded = jnp.zeros((batch, capacity, *scalings.shape[2:]), scalings.dtype)
        recorded = recorded.at[:, :length].set(jnp.where(real, scalings, 0))

    def choose(step: jax.Array, logits: jax.Array, done: jax.Array) -> tuple[jax.Array, jax.Array]:
        token = sampler(jax.random.fold_in(rng, step), logits)
        token = jnp.where(done, pad, token)
        return token, done | jnp.isin(token, jnp.asarray(eos, jnp.int32))

    first, done = choose(jnp.int32(0), logits, jnp.zeros(batch, bool))
    out = jnp.full((batch, max_new_tokens), pad, jnp.int32).at[:, 0].set(first)

    def unfinished(state: tuple[Any, ...]) -> jax.Array:
        step, _, done, *_ = state
        return jnp.logical_and(step < max_new_tokens, ~done.all())

    def one_token(state: tuple[Any, ...]) -> tuple[Any, ...]:
        step, out, done, caches, recorded = state
        token = lax.dynamic_index_in_dim(out, step - 1, axis=1)
        at = lengths + step - 1
        logits, scalings, caches = extend(model, params, caches, token, at, jnp.zeros(batch, jnp.int32))
        if recorded is not None and scalings is not None:
            recorded = recorded.at[jnp.arange(batch), at].set(scalings[:, 0])
        token, done = choose(step, logits, done)
        return step + 1, lax.dynamic_update_index_in_dim(out, token, step, axis=1), done, caches, recorded

    state = (jnp.int32(1), out, done, caches, recorded)
    _, out, _, _, recorded = lax.while_loop(unfinished, one_token, state)
    return Generated(out, recorded)
