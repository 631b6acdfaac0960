"""Encoders with a classification head, from the blocks of the decoder: BERT, RoBERTa, DistilBERT, ModernBERT, ViT.

Axes as in :mod:`xlora_jax.models.blocks`; C classes, P patches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from xlora_jax.layers.modules import XLoraConv, XLoraDense, XLoraEmbed
from xlora_jax.models.blocks import BlockContext, Norm
from xlora_jax.models.config import ACTIVATIONS, DecoderConfig
from xlora_jax.models.rope import Rope
from xlora_jax.models.transformer import DecoderOutput, Transformer

__all__ = ["Encoder", "EncoderConfig", "VisionTransformer"]


@dataclass(frozen=True)
class EncoderConfig(DecoderConfig):
    """Declaration of an encoder family. These fields are added to those of the blocks.

    Attributes:
        window: number of tokens that a sliding-window layer sees on each side of a token; None if no layer slides.
        head: output head. ``token``: a class for each token. ``pooled``: a class for the sequence, from its first token
            through a dense layer, the pooler. ``first``: a class for the sequence, directly from its first token.
        pooler_activation: key of :data:`~xlora_jax.models.config.ACTIVATIONS`.
        pooler_bias: whether the pooler has a bias.
        pooler_norm: whether a norm follows the pooler's activation (ModernBERT).
        pools_tokens: whether the head ``token`` has a pooler too (ModernBERT).
        pools_mean: whether the pooler sees the mean of all tokens instead of the first one.
        token_types: number of rows in the token-type table; 0 for none.
        padding_token: id of the token that positions skip (RoBERTa); None if positions are 0..T-1 (BERT).
        image_size: height and width in pixels; empty for text.
        patch_size: height and width of a patch.
        channels: number of channels of an image.
    """

    heads: ClassVar[tuple[str, ...]] = ("token", "pooled", "first")

    head: str = "pooled"
    final_norm: bool = False
    pooler_activation: str = "tanh"
    pooler_bias: bool = True
    pooler_norm: bool = False
    pools_tokens: bool = False
    pools_mean: bool = False
    token_types: int = 0
    image_size: tuple[int, ...] = ()
    patch_size: tuple[int, ...] = ()
    channels: int = 3

    def __post_init__(self) -> None:
        """Validate the fields."""
        super().__post_init__()
        if self.pooler_activation not in ACTIVATIONS:
            raise ValueError(
                f"pooler_activation: expected one of {', '.join(ACTIVATIONS)}, got {self.pooler_activation!r}"
            )
        if any(size % patch for size, patch in zip(self.image_size, self.patch_size, strict=True)):
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")


class _Classifying(Transformer):
    """Blocks in which every position sees every other, and a head that classifies."""

    config: EncoderConfig

    @property
    def has_pooler(self) -> bool:
        """Whether the head begins with a dense layer of its own."""
        return self.config.head == "pooled" or (self.config.head == "token" and self.config.pools_tokens)

    def make_blocks_and_head(self) -> None:
        """Make the blocks and the head, in ``setup``."""
        cfg = self.config
        if self.scan_layers:
            self.blocks = self.scanned_blocks()
        else:
            self.layers = self.single_blocks()
        if self.has_pooler:
            self.pooler = XLoraDense(
                cfg.hidden_size, use_bias=cfg.pooler_bias, dtype=self.dtype, param_dtype=self.param_dtype
            )
            if cfg.pooler_norm:
                self.pooler_norm = Norm(cfg.norm, cfg.norm_eps, self.dtype, self.param_dtype)
        classifier = XLoraDense(cfg.num_labels, dtype=self.dtype, param_dtype=self.param_dtype)
        if cfg.head == "token":
            self.token_classifier = classifier
        else:
            self.classifier = classifier

    def see_all(self, x: jax.Array, attention_mask: jax.Array | None, positions: jax.Array | None = None) -> jax.Array:
        """Run ``x [B, T, D]`` through the blocks; no token attends to padding.

        Args:
            x: embedding.
            attention_mask: ``[B, T]``, zero at padding, or None.
            positions: int ``[B or 1, T]``, for rotary embedding; None without it.
        """
        cfg = self.config
        place = jnp.arange(x.shape[1])
        mask = jnp.ones((1, 1, len(place), len(place)), bool)
        if attention_mask is not None:
            mask = mask & (attention_mask != 0)[:, None, None, :]
        near = None if cfg.window is None else mask & (abs(place[:, None] - place) <= cfg.window)

        def rotary(rope: Rope | None) -> tuple[jax.Array, jax.Array] | None:
            if rope is None or positions is None:
                return None
            cos, sin = rope.cos_sin(positions)
            return cos.astype(x.dtype), sin.astype(x.dtype)

        context = BlockContext(rotary(cfg.rope), rotary(cfg.sliding_rope), mask, near, None, self.attention)
        return self.run_blocks(x, None, context)[0]

    def unembed(self, hidden_states: jax.Array, attention_mask: jax.Array | None = None) -> jax.Array:
        """Compute logits.

        Args:
            hidden_states: ``[B, T, D]``.
            attention_mask: ``[B, T]``, zero at padding, which is left out of a mean; None for no padding.

        Returns:
            ``[B, T, C]`` for the ``token`` head, else ``[B, C]``.
        """
        cfg = self.config

        def mean(x: jax.Array) -> jax.Array:
            counted = jnp.ones(x.shape[:2], x.dtype) if attention_mask is None else (attention_mask != 0)
            weights = counted.astype(x.dtype)[..., None]
            return (x * weights).sum(axis=1, keepdims=True) / jnp.maximum(weights.sum(axis=1, keepdims=True), 1)

        # Each position has its own gates, so all of them go through the head before the first or the mean is taken.
        # Dense layers are linear, so the mean of their outputs is the output for the mean.
        x = hidden_states
        if self.has_pooler:
            x = self.pooler(x)
            if cfg.head == "pooled" and cfg.pools_mean:
                x = jnp.broadcast_to(mean(x), x.shape)
            x = ACTIVATIONS[cfg.pooler_activation](x)
            x = self.pooler_norm(x) if cfg.pooler_norm else x
        if cfg.head == "token":
            return self.token_classifier(x)
        logits = self.classifier(x)
        return mean(logits)[:, 0] if cfg.pools_mean else logits[:, 0]

    def empty_cache(self, *args: Any, **kwargs: Any) -> Any:
        """Raise NotImplementedError: an encoder sees its input as a whole."""
        raise NotImplementedError(f"{type(self).__name__} does not generate: it is an encoder")


class Encoder(_Classifying):
    """A bidirectional text encoder with a classification head."""

    def setup(self) -> None:
        """Make the submodules; their names are the keys of the parameters."""
        cfg = self.config
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.embed_tokens = XLoraEmbed(cfg.vocab_size, cfg.hidden_size, **dtypes)
        if cfg.learned_positions is not None:
            self.embed_positions = nn.Embed(cfg.learned_positions, cfg.hidden_size, **dtypes)
        if cfg.token_types:
            self.embed_types = nn.Embed(cfg.token_types, cfg.hidden_size, **dtypes)
        self.embed_norm = Norm(cfg.norm, cfg.norm_eps, self.dtype, self.param_dtype)
        if cfg.final_norm:
            self.norm = Norm(cfg.norm, cfg.norm_eps, self.dtype, self.param_dtype)
        self.make_blocks_and_head()

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        *,
        inputs_embeds: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        with_logits: bool = True,
    ) -> DecoderOutput:
        """Run the model.

        Args:
            input_ids: int ``[B, T]``; or ``inputs_embeds``.
            inputs_embeds: ``[B, T, D]`` instead of the embedding of ``input_ids``.
            attention_mask: bool or int ``[B, T]``, zero at padding; None for no padding.
            token_type_ids: int ``[B, T]``; default 0.
            positions: int ``[B or 1, T]``; default as the family counts them.
            with_logits: whether to apply the head too.

        Returns:
            Hidden states and logits.

        Raises:
            ValueError: not exactly one of ``input_ids`` and ``inputs_embeds`` is given, or there are more tokens than
                positions.
        """
        cfg = self.config
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected exactly one of input_ids and inputs_embeds")
        x = self.embed_tokens(input_ids) if input_ids is not None else jnp.asarray(inputs_embeds, self.dtype)
        length = x.shape[1]
        most = cfg.max_positions
        if most is not None and length > most:
            raise ValueError(f"this model has {most} positions, got {length} tokens: shorten the input")
        if positions is None:
            positions = jnp.arange(length)[None]
            if cfg.padding_token is not None and input_ids is not None:
                real = (input_ids != cfg.padding_token).astype(jnp.int32)
                positions = jnp.cumsum(real, axis=1) * real - 1
        if cfg.token_types:
            types = jnp.zeros((1, length), jnp.int32) if token_type_ids is None else token_type_ids
            x = x + self.embed_types(types)
        if cfg.learned_positions is not None:
            x = x + self.embed_positions(positions + cfg.position_offset)
        hidden_states = self.see_all(self.embed_norm(x), attention_mask, positions)
        hidden_states = self.norm(hidden_states) if cfg.final_norm else hidden_states
        return DecoderOutput(hidden_states, self.unembed(hidden_states, attention_mask) if with_logits else None)


class _Embeddings(nn.Module):
    """Embedding of patches: a class token in front, and a learned position for each."""

    dtype: jax.typing.DTypeLike
    param_dtype: jax.typing.DTypeLike

    @nn.compact
    def __call__(self, patches: jax.Array) -> jax.Array:
        """Return ``[B, 1 + P, D]`` for ``patches [B, P, D]``."""
        batch, count, width = patches.shape
        init = nn.initializers.normal(0.02)
        token = self.param("cls_token", init, (1, 1, width), self.param_dtype)
        positions = self.param("position_embeddings", init, (1, 1 + count, width), self.param_dtype)
        token = jnp.broadcast_to(token.astype(self.dtype), (batch, 1, width))
        return jnp.concatenate([token, patches], axis=1) + positions.astype(self.dtype)


class VisionTransformer(_Classifying):
    """ViT (arXiv 2010.11929) with a classification head."""

    def setup(self) -> None:
        """Make the submodules; their names are the keys of the parameters."""
        cfg = self.config
        self.patches = XLoraConv(
            cfg.hidden_size,
            cfg.patch_size,
            strides=cfg.patch_size,
            padding="VALID",
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        self.embeddings = _Embeddings(self.dtype, self.param_dtype)
        self.norm = Norm(cfg.norm, cfg.norm_eps, self.dtype, self.param_dtype)
        self.make_blocks_and_head()

    def unembed(self, hidden_states: jax.Array, attention_mask: jax.Array | None = None) -> jax.Array:
        """Return logits ``[B, C]`` for ``hidden_states [B, 1 + P, D]`` before the final norm."""
        return super().unembed(self.norm(hidden_states), attention_mask)

    def example_inputs(self) -> dict[str, jax.Array]:
        """Return one image."""
        return {"pixel_values": jnp.zeros((1, self.config.channels, *self.config.image_size), self.dtype)}

    def __call__(self, *, pixel_values: jax.Array, with_logits: bool = True) -> DecoderOutput:
        """Run the model.

        Args:
            pixel_values: ``[B, channels, height, width]``, as HF's image processors give them.
            with_logits: whether to apply the head too.

        Returns:
            Hidden states ``[B, 1 + P, D]``, class token first, and logits ``[B, C]``. The hidden states precede the
            final norm, as in transformers' ``hidden_states[-1]``, which PEFT's classifier reads.

        Raises:
            ValueError: the images have another size.
        """
        cfg = self.config
        expected = (cfg.channels, *cfg.image_size)
        if pixel_values.shape[1:] != expected:
            raise ValueError(
                f"pixel_values: expected [batch, {', '.join(map(str, expected))}], got {pixel_values.shape}"
            )
        x = self.patches(jnp.moveaxis(pixel_values, 1, -1).astype(self.dtype))
        x = self.embeddings(x.reshape(x.shape[0], -1, x.shape[-1]))
        hidden_states = self.see_all(x, None)
        return DecoderOutput(hidden_states, self.unembed(hidden_states) if with_logits else None)
