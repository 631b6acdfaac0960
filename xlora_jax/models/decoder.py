"""One decoder for the families of causal language models, told apart by what :class:`DecoderConfig` declares.

Axes, used in every comment, docstring and einsum:

    B batch   T tokens of this call   S slots of the cache, or T   D width   F feed-forward width
    H query heads   K key-value heads   C features per head   V vocabulary   L blocks

Blocks run under ``nn.scan`` over parameters stacked on a leading L axis, so compile time does not grow with depth; with
``scan_layers=False`` they stand side by side as ``layers_0``, ``layers_1``, ...: slower to compile, but no weight is
sliced out of a stack, which is what decoding one token at a time is bound by.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jax import lax

from xlora_jax.models.cache import KVCache
from xlora_jax.models.rope import Rope, apply_rope
from xlora_jax.modules import XLoraDense, XLoraEmbed, XLoraTiedHead

__all__ = ["ACTIVATIONS", "REMAT_POLICIES", "Decoder", "DecoderConfig", "DecoderOutput"]

# What the backward pass finds stored of each block; the rest is computed again from the block's input.
REMAT_POLICIES: dict[str, Callable[..., bool] | None] = {
    "full": None,  # nothing but the block's input
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # products with weights
    "dots_and_attention": jax.checkpoint_policies.dots_saveable,  # all products
}

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


@dataclass(frozen=True)
class DecoderConfig:
    """What a family declares of itself.

    Attributes:
        vocab_size: V.
        hidden_size: D.
        intermediate_size: F.
        num_layers: L.
        num_heads: H.
        num_kv_heads: K, a divisor of H.
        head_dim: C; H * C need not be D.
        rope: rotary embedding of queries and keys.
        activation: a key of :data:`ACTIVATIONS`.
        norm_eps: added to the mean square in every RMS norm.
        qkv_bias: whether query, key and value projections have a bias.
        o_bias: whether the output projection has one.
        mlp_bias: whether the three projections of the MLP have one.
        tie_word_embeddings: logits from the embedding table, no ``lm_head`` kernel.
        window: tokens that a sliding-window layer sees, itself included; None where no layer slides.
        sliding: for each block, whether it slides.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope
    activation: str = "silu"
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    window: int | None = None
    sliding: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what cannot be built."""
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")
        if (self.window is not None) != any(self.sliding):
            raise ValueError(f"window {self.window} and sliding {self.sliding} do not go together")
        if self.sliding and len(self.sliding) != self.num_layers:
            raise ValueError(f"sliding: expected {self.num_layers} entries, one per layer, got {len(self.sliding)}")


@struct.dataclass
class DecoderOutput:
    """What a decoder gives.

    Attributes:
        hidden_states: ``[B, T, D]`` after the final norm.
        logits: ``[B, T, V]``, or None if not asked for.
        cache: the cache with this call's keys and values, or None if there was none.
    """

    hidden_states: jax.Array
    logits: jax.Array | None = None
    cache: KVCache | None = None


@struct.dataclass
class _Context:
    """What all blocks of one call share: rotary cosine and sine, which slots each query sees, where to write."""

    cos: jax.Array
    sin: jax.Array
    mask: jax.Array | None  # bool [B or 1, 1, T, S]; None: causal
    sliding_mask: jax.Array | None
    start: jax.Array | None
    attention: str | None = struct.field(pytree_node=False, default=None)  # type: ignore[no-untyped-call]


class RMSNorm(nn.Module):
    """Root mean square norm (arXiv 1910.07467), computed in float32; rounded before the scale, as in HF models."""

    eps: float
    dtype: jax.typing.DTypeLike
    param_dtype: jax.typing.DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise ``x [..., D]`` over its last axis."""
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],), self.param_dtype)
        y = x.astype(jnp.float32)
        y = y * lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        return y.astype(self.dtype) * scale.astype(self.dtype)


class Attention(nn.Module):
    """Causal attention with grouped-query heads (arXiv 2305.13245) and rotary positions."""

    config: DecoderConfig
    dtype: jax.typing.DTypeLike
    param_dtype: jax.typing.DTypeLike

    @nn.compact
    def __call__(
        self, x: jax.Array, cache: KVCache | None, context: _Context, layer: int | jax.Array, mask: jax.Array | None
    ) -> tuple[jax.Array, KVCache | None]:
        """Attend from ``x [B, T, D]`` to itself, or to the cache that it is written to first."""
        cfg = self.config

        def heads(name: str, count: int) -> jax.Array:
            y = self._dense(count * cfg.head_dim, name, cfg.qkv_bias)(x)
            return y.reshape(*y.shape[:-1], count, cfg.head_dim)

        q, k, v = heads("q_proj", cfg.num_heads), heads("k_proj", cfg.num_kv_heads), heads("v_proj", cfg.num_kv_heads)
        q, k = apply_rope(q, context.cos, context.sin), apply_rope(k, context.cos, context.sin)
        if cache is not None:
            assert context.start is not None
            cache, k, v = cache.update(layer, k, v, context.start)
            k, v = k.astype(q.dtype), v.astype(q.dtype)
        y = jax.nn.dot_product_attention(
            q, k, v, mask=mask, is_causal=mask is None, implementation=cast(Any, context.attention)
        )
        if mask is not None and cache is None:
            # Padding can leave a query nothing to attend to. Its result is zero then, as torch's SDPA has it.
            y = jnp.where(mask.any(axis=-1)[:, 0, :, None, None], y, jnp.zeros_like(y))
        y = y.reshape(*y.shape[:-2], -1)
        return self._dense(cfg.hidden_size, "o_proj", cfg.o_bias)(y), cache

    def _dense(self, features: int, name: str, bias: bool) -> XLoraDense:
        return XLoraDense(features, use_bias=bias, dtype=self.dtype, param_dtype=self.param_dtype, name=name)


class MLP(nn.Module):
    """Gated feed-forward layer (arXiv 2002.05202): ``down(act(gate(x)) * up(x))``."""

    config: DecoderConfig
    dtype: jax.typing.DTypeLike
    param_dtype: jax.typing.DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map ``x [B, T, D]`` to the same shape."""
        cfg = self.config

        def dense(features: int, name: str) -> XLoraDense:
            return XLoraDense(
                features, use_bias=cfg.mlp_bias, dtype=self.dtype, param_dtype=self.param_dtype, name=name
            )

        gate = ACTIVATIONS[cfg.activation](dense(cfg.intermediate_size, "gate_proj")(x))
        return dense(cfg.hidden_size, "down_proj")(gate * dense(cfg.intermediate_size, "up_proj")(x))


class Block(nn.Module):
    """One pre-norm block: attention, then MLP, each added to the residual stream."""

    config: DecoderConfig
    dtype: jax.typing.DTypeLike
    param_dtype: jax.typing.DTypeLike

    @nn.compact
    def __call__(
        self, carry: tuple[jax.Array, KVCache | None], context: _Context, layer: Any, sliding: Any
    ) -> tuple[tuple[jax.Array, KVCache | None], None]:
        """Map the residual stream ``[B, T, D]`` and the cache; the form is that of ``nn.scan``."""
        x, cache = carry
        mask = context.mask
        if context.sliding_mask is not None:
            # Under scan `sliding` is traced: both kinds of block are one compiled body.
            mask = context.sliding_mask if mask is None else jnp.where(sliding, context.sliding_mask, mask)
        norm = partial(RMSNorm, self.config.norm_eps, self.dtype, self.param_dtype)
        part = (self.config, self.dtype, self.param_dtype)
        y, cache = Attention(*part, name="self_attn")(norm(name="input_layernorm")(x), cache, context, layer, mask)
        x = x + y
        x = x + MLP(*part, name="mlp")(norm(name="post_attention_layernorm")(x))
        return (x, cache), None


class Decoder(nn.Module):
    """A causal language model.

    Attributes:
        config: the family's declaration.
        dtype: of the computation.
        param_dtype: of the parameters at initialisation.
        scan_layers: stack the blocks under ``nn.scan``, or stand them side by side.
        remat: rematerialise each block's activations in a backward pass, by a policy of :data:`REMAT_POLICIES`; None
            stores them all.
        attention: implementation of ``jax.nn.dot_product_attention``: ``xla`` or ``cudnn`` (flash attention, on
            NVIDIA GPUs in bfloat16 or float16); None is JAX's own choice.
    """

    config: DecoderConfig
    dtype: jax.typing.DTypeLike = jnp.float32
    param_dtype: jax.typing.DTypeLike = jnp.float32
    scan_layers: bool = True
    remat: str | None = None
    attention: str | None = None

    def setup(self) -> None:
        """Make the submodules; their names are the keys of the parameters."""
        cfg = self.config
        self.embed_tokens = XLoraEmbed(cfg.vocab_size, cfg.hidden_size, dtype=self.dtype, param_dtype=self.param_dtype)
        block: Any = Block
        if self.remat is not None:
            if self.remat not in REMAT_POLICIES:
                raise ValueError(f"remat: expected None or one of {', '.join(REMAT_POLICIES)}, got {self.remat!r}")
            # Under scan the loop itself keeps XLA from merging the second computation with the first.
            block = nn.remat(Block, policy=REMAT_POLICIES[self.remat], prevent_cse=not self.scan_layers)
        if self.scan_layers:
            scanned = nn.scan(
                block,
                variable_axes={"params": 0, "experts": 0, "scalings": 0},
                split_rngs={"params": True, "lora_dropout": True},
                in_axes=(nn.broadcast, 0, 0),
                length=cfg.num_layers,
            )
            self.layers: Any = scanned(cfg, self.dtype, self.param_dtype)
        else:
            self.layers = [block(cfg, self.dtype, self.param_dtype) for _ in range(cfg.num_layers)]
        self.norm = RMSNorm(cfg.norm_eps, self.dtype, self.param_dtype)
        if cfg.tie_word_embeddings:
            self.lm_head: Any = XLoraTiedHead(dtype=self.dtype)
        else:
            self.lm_head = XLoraDense(cfg.vocab_size, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype)

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        *,
        inputs_embeds: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: KVCache | None = None,
        start: jax.Array | None = None,
        with_logits: bool = True,
    ) -> DecoderOutput:
        """Run the model.

        Args:
            input_ids: int ``[B, T]``; or ``inputs_embeds``.
            inputs_embeds: ``[B, T, D]`` in place of the embedding of ``input_ids``.
            attention_mask: bool or int ``[B, T]``, zero where a token is padding; None for no padding. Not with a
                cache, where every row's tokens stand at its positions without gaps.
            positions: int ``[B or 1, T]``; default 0..T-1, or ``start`` onwards.
            segment_ids: int ``[B, T]``: documents packed into one row; tokens see their own only. Give ``positions``
                that count from each document's start. Not with a cache.
            cache: keys and values of earlier tokens; this call's are written to it.
            start: int ``[B]``, with ``cache``: position, and slot, of each row's first token of this call.
            with_logits: also apply the output head.

        Returns:
            Hidden states, logits, cache.

        Raises:
            ValueError: not exactly one of ``input_ids`` and ``inputs_embeds``; a mask with a cache.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected exactly one of input_ids and inputs_embeds")
        masked = attention_mask is not None or segment_ids is not None
        if (cache is None) != (start is None) or (cache is not None and masked):
            raise ValueError("cache and start come together, and without attention_mask and segment_ids")
        x = self.embed_tokens(input_ids) if input_ids is not None else jnp.asarray(inputs_embeds, self.dtype)
        context = self._context(x, attention_mask, positions, segment_ids, cache, start)
        sliding = np.asarray(self.config.sliding or [False] * self.config.num_layers)
        carry = (x, cache)
        if self.scan_layers:
            carry, _ = self.layers(carry, context, jnp.arange(self.config.num_layers), jnp.asarray(sliding))
        else:
            for i, block in enumerate(self.layers):
                carry, _ = block(carry, context, i, bool(sliding[i]))
        x, cache = carry
        hidden_states = self.norm(x)
        logits = self.unembed(hidden_states) if with_logits else None
        return DecoderOutput(hidden_states, logits, cache)

    def unembed(self, hidden_states: jax.Array) -> jax.Array:
        """Logits ``[B, T, V]`` of ``hidden_states [B, T, D]`` after the final norm."""
        if self.config.tie_word_embeddings:
            return cast(jax.Array, self.lm_head(hidden_states, self.embed_tokens.embedding))
        return cast(jax.Array, self.lm_head(hidden_states))

    def empty_cache(self, batch: int, capacity: int, dtype: jax.typing.DTypeLike | None = None) -> KVCache:
        """Make a cache of ``capacity`` slots for each of ``batch`` rows, in ``dtype`` (the computation's if None)."""
        cfg = self.config
        shape = (batch, capacity, cfg.num_kv_heads, cfg.head_dim)
        dtype = dtype or self.dtype
        if self.scan_layers:
            return KVCache(jnp.zeros((cfg.num_layers, *shape), dtype), jnp.zeros((cfg.num_layers, *shape), dtype))
        return KVCache(
            tuple(jnp.zeros(shape, dtype) for _ in range(cfg.num_layers)),
            tuple(jnp.zeros(shape, dtype) for _ in range(cfg.num_layers)),
        )

    def _context(
        self,
        x: jax.Array,
        attention_mask: jax.Array | None,
        positions: jax.Array | None,
        segment_ids: jax.Array | None,
        cache: KVCache | None,
        start: jax.Array | None,
    ) -> _Context:
        length = x.shape[1]
        queries = jnp.arange(length)[None] if start is None else start[:, None] + jnp.arange(length)
        keys = jnp.arange(length if cache is None else cache.capacity)
        visible = keys <= queries[:, :, None]  # [B or 1, T, S]
        if attention_mask is not None:
            visible = visible & (attention_mask != 0)[:, None, :]
        if segment_ids is not None:
            visible = visible & (segment_ids[:, :, None] == segment_ids[:, None, :])
        sliding = full = None
        if self.config.window is not None:
            sliding = (visible & (keys > queries[:, :, None] - self.config.window))[:, None]
        if not all(self.config.sliding or [False]) and (
            cache is not None or attention_mask is not None or segment_ids is not None or sliding is not None
        ):
            full = visible[:, None]
        cos, sin = self.config.rope.cos_sin(queries if positions is None else positions)
        return _Context(cos.astype(x.dtype), sin.astype(x.dtype), full, sliding, start, self.attention)
