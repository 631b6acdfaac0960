"""One decoder for all families of causal language models; :class:`DecoderConfig` declares their differences.

Blocks run under ``nn.scan`` over parameters stacked on a leading L axis, so compile time does not grow with depth. With
``scan_layers=False`` the blocks are separate modules ``layers_0``, ``layers_1``, .... This is slower to compile, but
slices no weights out of a stack; those slices would dominate the time of decoding one token. Axes as in
:mod:`xlora_jax.models.blocks`.
"""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn

from xlora_jax.layers.modules import XLoraDense, XLoraEmbed, XLoraTiedHead
from xlora_jax.models.blocks import BlockContext, Norm
from xlora_jax.models.cache import Cache, KVCache, Place
from xlora_jax.models.rope import Rope
from xlora_jax.models.transformer import DecoderOutput, Transformer

__all__ = ["Decoder", "last_token"]


def last_token(
    shape: tuple[int, ...], padding: int | None, input_ids: jax.Array | None, attention_mask: jax.Array | None
) -> jax.Array:
    """Find each row's last token, whose output gives the class of the sequence.

    As in transformers, this is the last token whose id is not ``padding``. Without ``padding`` or ``input_ids`` the
    mask decides. Without a mask too, it is the last position, as in transformers.

    Args:
        shape: ``[B, T]``.
        padding: padding token id; None for none.
        input_ids: int ``[B, T]``, or None.
        attention_mask: ``[B, T]``, zero at padding, or None.

    Returns:
        int32 ``[B]``.

    Raises:
        ValueError: there are several rows, and neither ``padding`` nor a mask shows where they end.
    """
    batch, length = shape
    if input_ids is not None and padding is not None:
        seen = input_ids != padding
    elif attention_mask is not None:
        seen = attention_mask != 0
    elif padding is None and batch != 1:
        raise ValueError(
            f"{batch} rows, and nothing tells where each ends: this model's config names no padding token "
            f"(pad_token_id); pass attention_mask, or one row at a time"
        )
    else:
        seen = jnp.ones((batch, length), bool)
    return (seen * jnp.arange(length)).argmax(axis=1)


class Decoder(Transformer):
    """A causal language model."""

    def setup(self) -> None:
        """Make the submodules; their names are the keys of the parameters."""
        cfg = self.config
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        width = cfg.embed_size or cfg.hidden_size
        self.embed_tokens = XLoraEmbed(cfg.vocab_size, width, embed_scale=cfg.embed_scale, **dtypes)
        if cfg.learned_positions is not None:
            self.embed_positions = nn.Embed(cfg.learned_positions, cfg.hidden_size, **dtypes)
        if cfg.embed_size is not None:
            self.project_in = XLoraDense(cfg.hidden_size, use_bias=False, **dtypes)
            self.project_out = XLoraDense(cfg.embed_size, use_bias=False, **dtypes)
        if self.scan_layers:
            self.blocks = self.scanned_blocks()
        else:
            self.layers = self.single_blocks()
        if cfg.final_norm:
            self.norm = Norm(cfg.norm, cfg.norm_eps, self.dtype, self.param_dtype)
        if cfg.head == "last":
            self.score = XLoraDense(cfg.num_labels, use_bias=False, **dtypes)
        elif cfg.head == "token":
            self.token_classifier = XLoraDense(cfg.num_labels, **dtypes)
        elif cfg.tie_word_embeddings:
            self.lm_head: Any = XLoraTiedHead(use_bias=cfg.head_bias, **dtypes)
        else:
            self.lm_head = XLoraDense(cfg.vocab_size, use_bias=cfg.head_bias, **dtypes)

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        *,
        inputs_embeds: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: Cache | None = None,
        place: Place | None = None,
        with_logits: bool = True,
    ) -> DecoderOutput:
        """Run the model.

        Args:
            input_ids: int ``[B, T]``; or ``inputs_embeds``.
            inputs_embeds: ``[B, T, D]`` instead of the embedding of ``input_ids``.
            attention_mask: bool or int ``[B, T]``, zero at padding; None for no padding. Not with a cache, whose rows
                have no gaps.
            positions: int ``[B or 1, T]``; default 0..T-1, or the positions of ``place``.
            segment_ids: int ``[B, T]``, document numbers of packed rows; tokens see only their own document. Give
                ``positions`` that count from each document's start. Not with a cache.
            cache: keys and values of earlier tokens; this call's are added.
            place: positions of this call's tokens in ``cache``.
            with_logits: whether to apply the output head too.

        Returns:
            Hidden states, logits, cache. The logits are ``[B, T, V]``, with a head ``token`` ``[B, T, C]``. With a head
            ``last`` they are ``[B, C]``, from the token that :func:`last_token` finds.

        Raises:
            ValueError: not exactly one of ``input_ids`` and ``inputs_embeds`` is given; a mask comes with a cache; or a
                row's last token is unknown, see :func:`last_token`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected exactly one of input_ids and inputs_embeds")
        masked = attention_mask is not None or segment_ids is not None
        if (cache is None) != (place is None) or (cache is not None and masked):
            raise ValueError("cache and place come together, and without attention_mask and segment_ids")
        x, positions = self._embed(input_ids, inputs_embeds, attention_mask, positions, place)
        x, cache = self.run_blocks(x, cache, self._context(x, attention_mask, positions, segment_ids, cache, place))
        hidden_states = self.norm(x) if self.config.final_norm else x
        if self.config.embed_size is not None:
            hidden_states = self.project_out(hidden_states)
        logits = self.unembed(hidden_states) if with_logits else None
        if logits is not None and self.config.head == "last":
            last = last_token(hidden_states.shape[:2], self.config.padding_token, input_ids, attention_mask)
            logits = jnp.take_along_axis(logits, last[:, None, None], axis=1)[:, 0]
        return DecoderOutput(hidden_states, logits, cache)

    def unembed(self, hidden_states: jax.Array) -> jax.Array:
        """Return logits ``[B, T, V]``, or ``[B, T, C]`` of classes, for final-norm outputs ``[B, T, D]``."""
        cfg = self.config
        if cfg.head != "lm":
            classifier = self.score if cfg.head == "last" else self.token_classifier
            return classifier(hidden_states)
        if cfg.tie_word_embeddings:
            logits = self.lm_head(hidden_states, self.embed_tokens.embedding)
        else:
            logits = self.lm_head(hidden_states)
        if cfg.logit_divisor != 1:
            logits = logits / cfg.logit_divisor
        if cfg.logit_softcap is not None:
            logits = cfg.logit_softcap * jnp.tanh(logits / cfg.logit_softcap)
        return cast(jax.Array, logits)

    def _embed(
        self,
        input_ids: jax.Array | None,
        inputs_embeds: jax.Array | None,
        attention_mask: jax.Array | None,
        positions: jax.Array | None,
        place: Place | None,
    ) -> tuple[jax.Array, jax.Array]:
        """Return the residual stream before the first block, and the positions ``[B or 1, T]``."""
        cfg = self.config
        x = self.embed_tokens(input_ids) if input_ids is not None else jnp.asarray(inputs_embeds, self.dtype)
        if cfg.input_multiplier != 1:
            x = x * cfg.input_multiplier
        if cfg.embed_size is not None:
            x = self.project_in(x)
        length = x.shape[1]
        if positions is None:
            positions = jnp.arange(length)[None] if place is None else place.positions(length)
            if cfg.positions_from_mask and attention_mask is not None:
                seen = (attention_mask != 0).astype(jnp.int32)
                positions = jnp.cumsum(seen, axis=1) * seen - 1
        if cfg.max_positions is not None:
            if length > cfg.max_positions:
                raise ValueError(
                    f"this model has {cfg.max_positions} positions, got {length} tokens; shorten the input"
                )
            x = x + self.embed_positions(positions + cfg.position_offset)
        return x, positions

    def empty_cache(
        self, batch: int, capacity: int, dtype: jax.typing.DTypeLike | None = None, chunk: int | None = None
    ) -> KVCache:
        """Make a cache.

        Args:
            batch: B.
            capacity: S, largest number of tokens in a row.
            dtype: dtype of keys and values; defaults to the compute dtype.
            chunk: largest number of tokens T in a call. If given, sliding blocks keep only their window and a chunk.

        Raises:
            NotImplementedError: the head classifies.
        """
        cfg = self.config
        if cfg.head != "lm":
            raise NotImplementedError(f"this model does not generate: its head, {cfg.head!r}, classifies")
        return KVCache.empty(
            (batch, cfg.num_kv_heads, capacity, cfg.head_dim),
            dtype or self.dtype,
            num_layers=cfg.num_layers,
            stacked=self.scan_layers,
            sliding=cfg.sliding,
            ring=None if chunk is None or cfg.window is None else cfg.window + chunk,
        )

    def _context(
        self,
        x: jax.Array,
        attention_mask: jax.Array | None,
        positions: jax.Array,
        segment_ids: jax.Array | None,
        cache: Cache | None,
        place: Place | None,
    ) -> BlockContext:
        cfg = self.config
        length = jnp.arange(x.shape[1])
        queries = length[None] if place is None else place.start[:, None] + length

        def visible(sliding: bool) -> jax.Array:
            """Return the mask, bool ``[B or 1, 1, T, S]``."""
            keys = length[None] if cache is None or place is None else cache.positions(place, sliding=sliding)
            seen = (keys[:, None, :] <= queries[:, :, None]) & (keys >= 0)[:, None, :]
            if attention_mask is not None:
                seen = seen & (attention_mask != 0)[:, None, :]
            if segment_ids is not None:
                seen = seen & (segment_ids[:, :, None] == segment_ids[:, None, :])
            if sliding and cfg.window is not None:
                seen = seen & (keys[:, None, :] > queries[:, :, None] - cfg.window)
            return seen[:, None]

        sliding = visible(True) if cfg.window is not None else None
        full = None
        masked = any(x is not None for x in (cache, attention_mask, segment_ids, sliding))
        if masked and not all(cfg.sliding or [False]):
            full = visible(False)

        def rotary(rope: Rope | None) -> tuple[jax.Array, jax.Array] | None:
            if rope is None:
                return None
            cos, sin = rope.cos_sin(positions)
            return cos.astype(x.dtype), sin.astype(x.dtype)

        return BlockContext(rotary(cfg.rope), rotary(cfg.sliding_rope), full, sliding, place, self.attention)
