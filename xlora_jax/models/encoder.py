"""Encoders with a classification head, from the blocks of the decoder: BERT, RoBERTa, DistilBERT, ViT.

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
from xlora_jax.models.transformer import DecoderOutput, Transformer

__all__ = ["Encoder", "EncoderConfig", "VisionTransformer"]


@dataclass(frozen=True)
class EncoderConfig(DecoderConfig):
    """What an encoder declares besides what its blocks are.

    Attributes:
        head: ``token``: a class for each token; ``pooled``: one for the sequence, from its first token through a
            dense layer with ``pooler_activation``; ``first``: from its first token as it is.
        pooler_activation: a key of :data:`~xlora_jax.models.config.ACTIVATIONS`.
        token_types: rows of the table of token types; 0 for none.
        padding_token: the token whose copies have no position (RoBERTa), so that others are counted without them;
            None where positions are 0..T-1 (BERT).
        image_size: height and width in pixels; empty for text.
        patch_size: height and width of a patch.
        channels: of an image.
    """

    heads: ClassVar[tuple[str, ...]] = ("token", "pooled", "first")

    head: str = "pooled"
    pooler_activation: str = "tanh"
    token_types: int = 0
    image_size: tuple[int, ...] = ()
    patch_size: tuple[int, ...] = ()
    channels: int = 3

    def __post_init__(self) -> None:
        """Refuse what cannot be built."""
        super().__post_init__()
        if any(size % patch for size, patch in zip(self.image_size, self.patch_size, strict=True)):
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")


class _Classifying(Transformer):
    """Blocks in which every position sees every other, and a head that classifies."""

    config: EncoderConfig

    def make_blocks_and_head(self) -> None:
        """Make them; for ``setup``."""
        cfg = self.config
        if self.scan_layers:
            self.blocks = self.scanned_blocks()
        else:
            self.layers = self.single_blocks()
        if cfg.head == "pooled":
            self.pooler = XLoraDense(cfg.hidden_size, dtype=self.dtype, param_dtype=self.param_dtype)
        classifier = XLoraDense(cfg.num_labels, dtype=self.dtype, param_dtype=self.param_dtype)
        if cfg.head == "token":
            self.token_classifier = classifier
        else:
            self.classifier = classifier

    def see_all(self, x: jax.Array, attention_mask: jax.Array | None) -> jax.Array:
        """Take ``x [B, T, D]`` through the blocks; padding is seen by none."""
        length = x.shape[1]
        mask = jnp.ones((1, 1, length, length), bool)
        if attention_mask is not None:
            mask = mask & (attention_mask != 0)[:, None, None, :]
        return self.run_blocks(x, None, BlockContext(None, None, mask, None, None, self.attention))[0]

    def unembed(self, hidden_states: jax.Array) -> jax.Array:
        """Logits ``[B, T, C]`` of ``hidden_states [B, T, D]`` for the ``token`` head, else ``[B, C]``."""
        if self.config.head == "token":
            return self.token_classifier(hidden_states)
        # Every position goes through the head, since each has its own gates; the first is taken then.
        if self.config.head == "pooled":
            hidden_states = ACTIVATIONS[self.config.pooler_activation](self.pooler(hidden_states))
        return self.classifier(hidden_states)[:, 0]

    def empty_cache(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: an encoder sees its input as a whole."""
        raise NotImplementedError(f"{type(self).__name__} does not generate: it is an encoder")


class Encoder(_Classifying):
    """A bidirectional text encoder with a classification head."""

    def setup(self) -> None:
        """Make the submodules; their names are the keys of the parameters."""
        cfg = self.config
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        assert cfg.learned_positions is not None
        self.embed_tokens = XLoraEmbed(cfg.vocab_size, cfg.hidden_size, **dtypes)
        self.embed_positions = nn.Embed(cfg.learned_positions, cfg.hidden_size, **dtypes)
        if cfg.token_types:
            self.embed_types = nn.Embed(cfg.token_types, cfg.hidden_size, **dtypes)
        self.embed_norm = Norm(cfg.norm, cfg.norm_eps, self.dtype, self.param_dtype)
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
            inputs_embeds: ``[B, T, D]`` in place of the embedding of ``input_ids``.
            attention_mask: bool or int ``[B, T]``, zero where a token is padding; None for no padding.
            token_type_ids: int ``[B, T]``; default 0.
            positions: int ``[B or 1, T]``; default as the family has them.
            with_logits: also apply the head.

        Returns:
            Hidden states and logits.

        Raises:
            ValueError: not exactly one of ``input_ids`` and ``inputs_embeds``; more tokens than positions.
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
        x = self.embed_norm(x + self.embed_positions(positions + cfg.position_offset))
        hidden_states = self.see_all(x, attention_mask)
        return DecoderOutput(hidden_states, self.unembed(hidden_states) if with_logits else None)


class _Embeddings(nn.Module):
    """The class token before the patches, and a learned position for each."""

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

    def unembed(self, hidden_states: jax.Array) -> jax.Array:
        """Logits ``[B, C]`` of ``hidden_states [B, 1 + P, D]`` before the final norm."""
        return super().unembed(self.norm(hidden_states))

    def example_inputs(self) -> dict[str, jax.Array]:
        """One image."""
        return {"pixel_values": jnp.zeros((1, self.config.channels, *self.config.image_size), self.dtype)}

    def __call__(self, *, pixel_values: jax.Array, with_logits: bool = True) -> DecoderOutput:
        """Run the model.

        Args:
            pixel_values: ``[B, channels, height, width]``, as HF's image processors give them.
            with_logits: also apply the head.

        Returns:
            Hidden states ``[B, 1 + P, D]``, class token first, and logits ``[B, C]``. The hidden states are those
            before the final norm, as transformers' ``hidden_states[-1]``, which is what PEFT's classifier reads.

        Raises:
            ValueError: images of another size.
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
