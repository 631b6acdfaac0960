"""Transformer blocks: norm, attention and feed-forward layer, combined as a config declares.

Axes, used in every comment, docstring and einsum:

    B batch   T tokens of this call   S slots of the cache, or T   D width   F feed-forward width
    H query heads   K key-value heads   C features per head   V vocabulary   L blocks   E routed experts of the base
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jax import lax

from xlora_jax.layers import matmul as products
from xlora_jax.layers import quantized
from xlora_jax.layers.modules import XLoraDense, quantized_kernel
from xlora_jax.models.cache import Cache, Place
from xlora_jax.models.config import ACTIVATIONS, NORMS, DecoderConfig
from xlora_jax.models.rope import apply_rope

__all__ = ["MLP", "Attention", "Block", "BlockContext", "LayerFlags", "Norm", "RoutedBlock", "attend"]

# Finite, so that softmax and gradient have no NaN if a query sees no key.
_LOWEST = float(np.finfo(np.float32).min)
# Largest number of queries per row for which attention is computed here instead of by JAX.
_FEW = 16


@struct.dataclass
class BlockContext:
    """Inputs shared by all blocks of one call: rotary cosine and sine, attention masks, cache positions."""

    rotary: tuple[jax.Array, jax.Array] | None
    sliding_rotary: tuple[jax.Array, jax.Array] | None
    mask: jax.Array | None  # bool [B or 1, 1, T, S]; None: causal
    sliding_mask: jax.Array | None
    place: Place | None
    attention: str | None = struct.field(pytree_node=False, default=None)  # type: ignore[no-untyped-call]


@struct.dataclass
class LayerFlags:
    """Per-block flags. Under scan these are traced, so blocks of all kinds share one compiled body."""

    index: Any
    sliding: Any
    no_rope: Any


class Norm(nn.Module):
    """Norm over the last axis, computed in float32.

    Attributes:
        kind: key of :data:`NORMS`.
        eps: number added to the mean square or the variance.
        dtype: dtype of the result.
        param_dtype: dtype of the parameters at initialization.
        heads: size of the second-to-last axis, if each of its members has a scale of its own; None for one scale.
    """

    kind: str
    eps: float
    dtype: jax.typing.DTypeLike
    param_dtype: jax.typing.DTypeLike
    heads: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalize ``x [..., D]`` over its last axis."""
        kind = NORMS[self.kind]
        y = x.astype(jnp.float32)
        if kind.centered:
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        if kind.scaled:
            shape = (x.shape[-1],) if self.heads is None else (self.heads, x.shape[-1])
            init = nn.initializers.zeros_init() if kind.offset else nn.initializers.ones_init()
            scale = self.param("scale", init, shape, self.param_dtype)
            if kind.rounds_first:
                return y.astype(self.dtype) * scale.astype(self.dtype)
            y = y * (kind.offset + scale.astype(jnp.float32))
            if kind.biased:
                bias = self.param("bias", nn.initializers.zeros_init(), shape, self.param_dtype)
                y = y + bias.astype(jnp.float32)
        return y.astype(self.dtype)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    *,
    scale: float,
    softcap: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Compute softmax attention.

    Args:
        q: ``[B, T, H, C]``.
        k: ``[B, K, C, S]``.
        v: ``[B, K, S, C]``.
        mask: bool ``[B or 1, 1, T, S]``, or None for causal.
        scale: factor of queries times keys.
        softcap: c in ``c tanh(. / c)`` of the scaled products, or None.
        implementation: argument of ``jax.nn.dot_product_attention``, which has no soft cap.

    Returns:
        ``[B, T, H, C]``.
    """
    # JAX's own attention has no soft cap, and in float16 it needs a kind of product that CPUs do not have. For few
    # queries, as in decoding, it makes XLA transpose all keys, which is up to three times slower on a CPU.
    few = q.shape[1] <= _FEW and mask is not None and implementation is None
    if softcap is None and not few and (q.dtype != jnp.float16 or implementation == "cudnn"):
        k, v = jnp.moveaxis(k, -1, 1), v.swapaxes(1, 2)
        return jax.nn.dot_product_attention(
            q, k, v, mask=mask, is_causal=mask is None, scale=scale, implementation=cast(Any, implementation)
        )
    batch, length, heads, width = q.shape
    shared, slots = v.shape[1:3]
    # Queries that share a key-value head are rows of one product.
    rows = q.reshape(batch, length, shared, -1, width).transpose(0, 2, 3, 1, 4).reshape(batch, shared, -1, width)
    logits = products.by_head(rows, k) * scale
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    if mask is None:
        mask = (jnp.arange(slots) <= jnp.arange(length)[:, None])[None, None]
    by_head = logits.reshape(batch, shared, -1, length, slots)
    weights = jax.nn.softmax(jnp.where(mask[:, :, None], by_head, _LOWEST), axis=-1).astype(v.dtype)
    y = products.by_head(weights.reshape(logits.shape), v).astype(v.dtype)
    return y.reshape(batch, shared, -1, length, width).transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, width)


class _Part(nn.Module):
    """Base class of the parts of a block."""

    config: DecoderConfig
    dtype: jax.typing.DTypeLike
    param_dtype: jax.typing.DTypeLike

    def dense(self, features: int, name: str, bias: bool) -> XLoraDense:
        """Make a projection."""
        return XLoraDense(features, use_bias=bias, dtype=self.dtype, param_dtype=self.param_dtype, name=name)

    def norm(self, name: str) -> Norm:
        """Make a norm."""
        return Norm(self.config.norm, self.config.norm_eps, self.dtype, self.param_dtype, name=name)


class Attention(_Part):
    """Causal attention with grouped-query heads (arXiv 2305.13245)."""

    @nn.compact
    def __call__(
        self, x: jax.Array, cache: Cache | None, context: BlockContext, layer: LayerFlags
    ) -> tuple[jax.Array, Cache | None]:
        """Attend from ``x [B, T, D]`` to itself, or write it to the cache and attend to that."""
        cfg = self.config
        q, k, v = self._heads(x)
        if cfg.rope is not None:
            assert context.rotary is not None
            cos, sin = context.rotary
            if context.sliding_rotary is not None:
                cos = jnp.where(layer.sliding, context.sliding_rotary[0], cos)
                sin = jnp.where(layer.sliding, context.sliding_rotary[1], sin)
            if any(cfg.no_rope):
                cos, sin = jnp.where(layer.no_rope, 1, cos), jnp.where(layer.no_rope, 0, sin)
            q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        mask = context.mask
        if context.sliding_mask is not None:
            if mask is None or isinstance(layer.sliding, bool):
                mask = context.sliding_mask if mask is None or layer.sliding else mask
            else:
                mask = jnp.where(layer.sliding, context.sliding_mask, mask)
        scale = cfg.head_dim**-0.5 if cfg.attention_scale is None else cfg.attention_scale
        if cfg.attention_scale_by_depth:
            q = (q / (layer.index + 1)).astype(q.dtype)
        attention = partial(attend, scale=scale, softcap=cfg.attention_softcap, implementation=context.attention)
        if cache is not None:
            assert context.place is not None
            cache, y = cache.attend(layer.index, q, k, v, mask, context.place, attention)
        else:
            y = attention(q, jnp.moveaxis(k, 1, -1), v.swapaxes(1, 2), mask)
            if mask is not None:
                # Padding can leave a query without keys. Its result is then zero, as in torch's SDPA.
                y = jnp.where(mask.any(axis=-1)[:, 0, :, None, None], y, jnp.zeros_like(y))
        y = y.reshape(*y.shape[:-2], -1)
        return self.dense(cfg.hidden_size, "o_proj", cfg.o_bias)(y), cache

    def _heads(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return queries ``[B, T, H, C]``, keys and values ``[B, T, K, C]``, normed but not rotated."""
        cfg = self.config
        counts = (cfg.num_heads, cfg.num_kv_heads, cfg.num_kv_heads)
        if cfg.qkv == "separate":
            names = ("q_proj", "k_proj", "v_proj")
            parts = [
                self.dense(count * cfg.head_dim, name, cfg.qkv_bias)(x)
                for name, count in zip(names, counts, strict=True)
            ]
        else:
            fused = self.dense(sum(counts) * cfg.head_dim, "qkv_proj", cfg.qkv_bias)(x)
            if cfg.qkv == "interleaved":
                by_head = fused.reshape(*x.shape[:-1], cfg.num_heads, 3, cfg.head_dim)
                parts = [by_head[..., i, :].reshape(*x.shape[:-1], -1) for i in range(3)]
            else:
                ends = np.cumsum(counts)[:-1] * cfg.head_dim
                parts = jnp.split(fused, ends.tolist(), axis=-1)
        if cfg.qk_norm == "whole":
            parts[:2] = self.norm("q_norm")(parts[0]), self.norm("k_norm")(parts[1])
        q, k, v = (part.reshape(*x.shape[:-1], count, cfg.head_dim) for part, count in zip(parts, counts, strict=True))
        if cfg.qk_norm == "head":
            q, k = self.norm("q_norm")(q), self.norm("k_norm")(k)
        elif cfg.qk_norm == "each_head":
            norm = partial(Norm, "layer_unbiased", cfg.norm_eps, self.dtype, self.param_dtype)
            q, k = norm(heads=counts[0], name="q_norm")(q), norm(heads=counts[1], name="k_norm")(k)
        return q, k, v


class MLP(_Part):
    """Feed-forward layer, ``down(act(up(x)))``, or gated (arXiv 2002.05202), ``down(act(gate(x)) * up(x))``."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map ``x [B, T, D]`` to the same shape."""
        cfg = self.config
        act, width, bias = ACTIVATIONS[cfg.activation], cfg.intermediate_size, cfg.mlp_bias
        if cfg.mlp == "gated":
            y = act(self.dense(width, "gate_proj", bias)(x)) * self.dense(width, "up_proj", bias)(x)
        elif cfg.mlp == "fused_gated":
            gate, up = jnp.split(self.dense(2 * width, "gate_up_proj", bias)(x), 2, axis=-1)
            y = act(gate) * up
        else:
            y = act(self.dense(width, "up_proj", bias)(x))
        return self.dense(cfg.hidden_size, "down_proj", bias)(y)


class _StackedDense(nn.Module):
    """A stack of E matrices, of which each input row is multiplied by one."""

    num_experts: int
    features: int
    dtype: jax.typing.DTypeLike
    param_dtype: jax.typing.DTypeLike

    @nn.compact
    def __call__(self, rows: jax.Array, sizes: jax.Array) -> jax.Array:
        """Map ``rows [M, in]``, sorted by expert, to ``[M, features]``; ``sizes [E]`` counts each expert's rows."""
        stored = quantized_kernel(self)
        if stored is not None:
            return quantized.ragged_dot(rows, stored, sizes)
        init = nn.initializers.lecun_normal(batch_axis=0)
        shape = (self.num_experts, rows.shape[-1], self.features)
        kernel = self.param("kernel", init, shape, self.param_dtype)
        return lax.ragged_dot(rows, kernel.astype(self.dtype), sizes)


class _RoutedExperts(_Part):
    """The gated feed-forward layers that a router picks from."""

    @nn.compact
    def __call__(self, rows: jax.Array, sizes: jax.Array) -> jax.Array:
        """Map ``rows [M, D]``, sorted by expert, to the same shape."""
        routed = self.config.routed
        assert routed is not None

        def stacked(features: int, name: str) -> _StackedDense:
            return _StackedDense(routed.num_experts, features, self.dtype, self.param_dtype, name=name)

        gate = ACTIVATIONS[self.config.activation](stacked(routed.intermediate_size, "gate_proj")(rows, sizes))
        up = stacked(routed.intermediate_size, "up_proj")(rows, sizes)
        return stacked(self.config.hidden_size, "down_proj")(gate * up, sizes)


class RoutedBlock(_Part):
    """Mixture of experts of the base model (arXiv 2101.03961): a router sends each token through ``top_k`` of E.

    These experts are part of the frozen base, and no LoRA acts on them or on the router: PEFT cannot target them.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map ``x [B, T, D]`` to the same shape."""
        routed = self.config.routed
        assert routed is not None
        rows = x.reshape(-1, x.shape[-1])
        logits = nn.Dense(
            routed.num_experts, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype, name="router"
        )(rows)
        weights, chosen = lax.top_k(jax.nn.softmax(logits.astype(jnp.float32), axis=-1), routed.top_k)
        if routed.renormalize:
            weights = weights / weights.sum(axis=-1, keepdims=True)
        # Each token has top_k copies, which are sorted so that an expert's rows are contiguous.
        order = jnp.argsort(chosen.reshape(-1))
        token = order // routed.top_k
        sizes = jnp.bincount(chosen.reshape(-1), length=routed.num_experts)
        y = _RoutedExperts(self.config, self.dtype, self.param_dtype, name="experts")(rows[token], sizes)
        y = y * weights.reshape(-1)[order][:, None].astype(y.dtype)
        return jnp.zeros_like(rows).at[token].add(y).reshape(x.shape)


class Block(_Part):
    """Attention and MLP, each added to the residual stream.

    Attributes:
        routed: whether a mixture of experts replaces the MLP.
        unnormed: whether no norm precedes the attention.
    """

    routed: bool = False
    unnormed: bool = False

    @nn.compact
    def __call__(
        self, carry: tuple[jax.Array, Cache | None], context: BlockContext, layer: LayerFlags
    ) -> tuple[tuple[jax.Array, Cache | None], None]:
        """Map the residual stream ``[B, T, D]`` and the cache; the signature is that of ``nn.scan``."""
        cfg = self.config
        x, cache = carry
        part = (cfg, self.dtype, self.param_dtype)
        attention = Attention(*part, name="self_attn")
        mlp = (RoutedBlock if self.routed else MLP)(*part, name="mlp")
        before, after, on_sum = (
            cfg.norm_placement in places for places in (("before", "around"), ("after", "around"), ("sum",))
        )

        def add(x: jax.Array, y: jax.Array) -> jax.Array:
            return x + y if cfg.residual_multiplier == 1 else x + y * cfg.residual_multiplier

        normed = self.norm("pre_attention_norm")(x) if before and not self.unnormed else x
        y, cache = attention(normed, cache, context, layer)
        if cfg.parallel is not None:
            x = add(x, y + mlp(normed if cfg.parallel == "shared" else self.norm("pre_mlp_norm")(x)))
            return (x, cache), None
        x = add(x, self.norm("post_attention_norm")(y) if after else y)
        x = self.norm("post_attention_norm")(x) if on_sum else x
        y = mlp(self.norm("pre_mlp_norm")(x) if before else x)
        x = add(x, self.norm("post_mlp_norm")(y) if after else y)
        x = self.norm("post_mlp_norm")(x) if on_sum else x
        return (x, cache), None
