"""Config classes that declare the differences between transformer families, as data.

Axes as in :mod:`xlora_jax.models.blocks`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from xlora_jax.models.rope import Rope

__all__ = ["ACTIVATIONS", "NORMS", "BlockGroup", "DecoderConfig", "NormKind", "RoutedMLP"]

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu_squared": lambda x: jnp.square(jax.nn.relu(x)),
    "tanh": jnp.tanh,
}


@dataclass(frozen=True)
class NormKind:
    """A norm variant.

    Attributes:
        centered: whether it subtracts the mean (arXiv 1607.06450); else it is a root mean square norm (arXiv
            1910.07467).
        scaled: whether it has a scale.
        biased: whether it has a bias.
        offset: number added to the stored scale.
        rounds_first: whether it rounds to the compute dtype before it applies the scale, as Llama's does.
    """

    centered: bool = False
    scaled: bool = True
    biased: bool = False
    offset: float = 0.0
    rounds_first: bool = False


NORMS = {
    "rms": NormKind(rounds_first=True),
    "rms_float32": NormKind(),
    "rms_offset": NormKind(offset=1.0),
    "layer": NormKind(centered=True, biased=True),
    "layer_unbiased": NormKind(centered=True),
    "layer_plain": NormKind(centered=True, scaled=False),
}


@dataclass(frozen=True)
class RoutedMLP:
    """The base's own mixture of experts: a router picks a few feed-forward layers for each token.

    Attributes:
        num_experts: E.
        top_k: number of experts per token.
        intermediate_size: F of each expert.
        renormalize: whether the weights of the picked experts are scaled to sum to one.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    renormalize: bool = True

    def __post_init__(self) -> None:
        """Validate the fields."""
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"routed top_k: expected 1..{self.num_experts}, got {self.top_k}")


@dataclass(frozen=True)
class DecoderConfig:
    """Declaration of a decoder family. Each field is one independent difference between families.

    Attributes:
        vocab_size: V.
        hidden_size: D.
        intermediate_size: F.
        num_layers: L.
        num_heads: H.
        num_kv_heads: K, a divisor of H.
        head_dim: C; H * C need not be D.
        rope: rotary embedding of queries and keys; None for none.
        sliding_rope: rotary embedding of the sliding blocks, if different (Gemma 3).
        no_rope: tuple with, for each block, whether it has no rotary embedding (SmolLM3); empty if all have one.
        learned_positions: number of rows in a learned position table, which is added to the embedding; None for no
            table.
        position_offset: row of position 0 in that table (OPT: 2).
        positions_from_mask: whether positions skip padding, so that padding on the left shifts nothing (OPT).
        qkv: layout of the query, key and value projections: ``separate``; ``fused``, side by side in one (Phi-3,
            GPT-2); or ``interleaved``, head by head in one (GPT-NeoX).
        qk_norm: norm of queries and keys before rotation: None; per ``head``, with one scale for all (Qwen3);
            ``each_head``, a layer norm without bias that has a scale for each head (StableLM); or over all heads,
            ``whole`` (OLMo 2).
        attention_scale: factor of queries times keys; None means 1 / sqrt(C).
        attention_scale_by_depth: whether to divide the scale by the block's number, counted from 1 (GPT-2's option).
        attention_softcap: c in ``c tanh(. / c)`` of the attention logits; None for none (Gemma 2).
        window: number of tokens that a token of a sliding-window layer sees, itself included; None if no layer slides.
        sliding: tuple with, for each block, whether it slides.
        mlp: kind of MLP: ``gated``, ``fused_gated`` (gate and up in one projection) or ``plain`` (no gate).
        activation: key of :data:`ACTIVATIONS`.
        routed: mixture of experts that replaces the MLP; None for none.
        routed_layers: tuple with, for each block, whether it has the mixture of experts; empty if all have it.
        norm: key of :data:`NORMS`.
        norm_eps: number added to the mean square or the variance.
        norm_placement: place of the norms: ``before`` attention and MLP; ``after`` each, before their output is added
            (OLMo 2); ``around``, both (Gemma 2); or on the ``sum`` (OPT's 350m).
        parallel: input of parallel attention and MLP. ``shared``: both see the same normed input (Phi). ``own``: each
            has its own norm of the same stream (GPT-NeoX). None: they are not parallel.
        first_norm: whether a norm precedes the attention of the first block too. ModernBERT has none there, because it
            norms the embedding.
        final_norm: whether a norm follows the last block.
        qkv_bias: whether query, key and value projections have a bias.
        o_bias: whether the output projection has a bias.
        mlp_bias: whether the projections of the MLP have a bias.
        head_bias: whether ``lm_head`` has a bias.
        tie_word_embeddings: whether the embedding table is also the output head, without an ``lm_head`` kernel.
        embed_size: width of the embedding table if it is not D; projections convert its width to D and back (OPT's
            350m).
        embed_scale: factor of the looked-up embeddings, but not of ``inputs_embeds`` (Gemma).
        input_multiplier: factor of the looked-up embeddings and of ``inputs_embeds`` (Granite).
        residual_multiplier: factor of the outputs that attention and MLP add to the stream (Granite).
        logit_divisor: divisor of the logits (Granite).
        logit_softcap: c in ``c tanh(. / c)`` of the output logits; None for none.
        head: output head. ``lm``: logits of the next token. ``token``: a class for each token. ``last``: a class for
            the sequence, from the last token that is not padding.
        num_labels: C, number of classes of a classification head.
        padding_token: padding token id; the ``last`` head skips it. None if there is none.
        context_length: number of positions that the model was made for; None if unknown. It is information only.
    """

    heads: ClassVar[tuple[str, ...]] = ("lm", "token", "last")

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope | None
    sliding_rope: Rope | None = None
    no_rope: tuple[bool, ...] = ()
    learned_positions: int | None = None
    position_offset: int = 0
    positions_from_mask: bool = False
    qkv: str = "separate"
    qk_norm: str | None = None
    attention_scale: float | None = None
    attention_scale_by_depth: bool = False
    attention_softcap: float | None = None
    window: int | None = None
    sliding: tuple[bool, ...] = ()
    mlp: str = "gated"
    activation: str = "silu"
    routed: RoutedMLP | None = None
    routed_layers: tuple[bool, ...] = ()
    norm: str = "rms"
    norm_eps: float = 1e-6
    norm_placement: str = "before"
    parallel: str | None = None
    first_norm: bool = True
    final_norm: bool = True
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    tie_word_embeddings: bool = False
    embed_size: int | None = None
    embed_scale: float = 1.0
    input_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logit_divisor: float = 1.0
    logit_softcap: float | None = None
    head: str = "lm"
    num_labels: int = 2
    padding_token: int | None = None
    context_length: int | None = None

    def __post_init__(self) -> None:
        """Validate the fields."""
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        for name, known in (
            ("activation", tuple(ACTIVATIONS)),
            ("norm", tuple(NORMS)),
            ("norm_placement", ("before", "after", "around", "sum")),
            ("parallel", (None, "shared", "own")),
            ("qkv", ("separate", "fused", "interleaved")),
            ("qk_norm", (None, "head", "each_head", "whole")),
            ("mlp", ("gated", "fused_gated", "plain")),
            ("head", self.heads),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(map(str, known))}, got {getattr(self, name)!r}")
        if (self.window is not None) != any(self.sliding):
            raise ValueError(f"window {self.window} and sliding {self.sliding} do not go together")
        if self.parallel is not None and self.norm_placement != "before":
            raise ValueError(f"parallel {self.parallel!r} needs norm_placement 'before', got {self.norm_placement!r}")
        if self.qkv == "interleaved" and self.num_kv_heads != self.num_heads:
            raise ValueError(f"interleaved qkv has as many kv heads as heads ({self.num_heads}): {self.num_kv_heads}")
        for name in ("sliding", "no_rope", "routed_layers"):
            entries = getattr(self, name)
            if entries and len(entries) != self.num_layers:
                raise ValueError(f"{name}: expected {self.num_layers} entries, one per layer, got {len(entries)}")

    @property
    def groups(self) -> tuple[BlockGroup, ...]:
        """Groups of consecutive blocks with the same parameters. Each is one scan; most models have one."""
        routed = self.routed_layers or (self.routed is not None,) * self.num_layers
        kinds = [(routed[i], i == 0 and not self.first_norm) for i in range(self.num_layers)]
        starts = [i for i in range(self.num_layers) if i == 0 or kinds[i] != kinds[i - 1]]
        return tuple(
            BlockGroup("layers" if len(starts) == 1 else f"group_{g}", start, end - start, *kinds[start])
            for g, (start, end) in enumerate(zip(starts, (*starts[1:], self.num_layers), strict=True))
        )

    @property
    def rope_switches_at(self) -> int | None:
        """Length in tokens beyond which the rotary frequencies change, or None (see :class:`Rope`)."""
        switches = [rope.switches_at for rope in (self.rope, self.sliding_rope) if rope is not None]
        return next((switch for switch in switches if switch is not None), None)

    @property
    def max_positions(self) -> int | None:
        """Number of positions, or None if it is not limited."""
        return None if self.learned_positions is None else self.learned_positions - self.position_offset


@dataclass(frozen=True)
class BlockGroup:
    """Consecutive blocks whose parameters are stacked together.

    Attributes:
        name: key of the parameters.
        start: index of the first block.
        length: number of blocks.
        routed: whether the blocks have a mixture of experts instead of an MLP.
        unnormed: whether no norm precedes the attention.
    """

    name: str
    start: int
    length: int
    routed: bool
    unnormed: bool
