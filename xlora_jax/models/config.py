"""What families of transformers declare of themselves: the differences between them, as data.

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
    """How a norm goes about it.

    Attributes:
        centred: subtract the mean (arXiv 1607.06450); else a root mean square norm (arXiv 1910.07467).
        scaled: whether it has a scale.
        biased: whether it has a bias too.
        offset: added to the stored scale.
        rounds_first: round to the computation's dtype before the scale is applied, as Llama's does.
    """

    centred: bool = False
    scaled: bool = True
    biased: bool = False
    offset: float = 0.0
    rounds_first: bool = False


NORMS = {
    "rms": NormKind(rounds_first=True),
    "rms_float32": NormKind(),
    "rms_offset": NormKind(offset=1.0),
    "layer": NormKind(centred=True, biased=True),
    "layer_unbiased": NormKind(centred=True),
    "layer_plain": NormKind(centred=True, scaled=False),
}


@dataclass(frozen=True)
class RoutedMLP:
    """A feed-forward layer of many, of which a router picks a few for each token (mixture of experts of the base).

    Attributes:
        num_experts: E, how many there are.
        top_k: how many see a token.
        intermediate_size: F of each.
        renormalise: whether the weights of those picked are made to sum to one.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    renormalise: bool = True

    def __post_init__(self) -> None:
        """Refuse what cannot be built."""
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"routed top_k: expected 1..{self.num_experts}, got {self.top_k}")


@dataclass(frozen=True)
class DecoderConfig:
    """What a family declares of itself. Each field is one difference between families, apart from all others.

    Attributes:
        vocab_size: V.
        hidden_size: D.
        intermediate_size: F.
        num_layers: L.
        num_heads: H.
        num_kv_heads: K, a divisor of H.
        head_dim: C; H * C need not be D.
        rope: rotary embedding of queries and keys; None for none.
        sliding_rope: that of the blocks that slide, if it is another (Gemma 3).
        no_rope: for each block, whether it does without (SmolLM3); empty if none does.
        learned_positions: rows of a learned table of positions that is added to the embedding; None for no table.
        position_offset: row of position 0 in that table (OPT: 2).
        positions_from_mask: whether positions count tokens only, so that padding on the left shifts nothing (OPT).
        qkv: ``separate`` projections of query, key and value; ``fused`` side by side in one (Phi-3, GPT-2); or
            ``interleaved`` in one, head by head (GPT-NeoX).
        qk_norm: norm of queries and keys before rotation: None; per ``head``, with one scale for all (Qwen3);
            ``each_head``, a layer norm without bias that has a scale for each head (StableLM); or over all heads,
            ``whole`` (OLMo 2).
        attention_scale: multiplies queries times keys; None means 1 / sqrt(C).
        attention_scale_by_depth: divide it by the number of the block, counted from 1 (GPT-2's option).
        attention_softcap: c in ``c tanh(. / c)`` of the attention logits; None for none (Gemma 2).
        window: tokens that a sliding-window layer sees, itself included; None where no layer slides.
        sliding: for each block, whether it slides.
        mlp: ``gated``, ``fused_gated`` (gate and up in one projection) or ``plain`` (no gate).
        activation: a key of :data:`ACTIVATIONS`.
        routed: the mixture of experts in place of an MLP; None for none.
        routed_layers: for each block, whether it has that; empty if all do.
        norm: a key of :data:`NORMS`.
        norm_eps: added to the mean square or the variance.
        norm_placement: ``before`` attention and MLP; ``after`` each, before their output is added (OLMo 2); ``around``,
            both (Gemma 2); or on the ``sum`` (OPT's 350m).
        parallel: ``shared``: attention and MLP see the same normed input (Phi); ``own``: each its own norm of the same
            stream (GPT-NeoX); None: one after the other.
        first_norm: whether a norm precedes the attention of the first block too (not in ModernBERT, which norms the
            embedding).
        final_norm: whether a norm follows the last block.
        qkv_bias: whether query, key and value projections have a bias.
        o_bias: whether the output projection has one.
        mlp_bias: whether the projections of the MLP have one.
        head_bias: whether ``lm_head`` has one.
        tie_word_embeddings: logits from the embedding table, no ``lm_head`` kernel.
        embed_size: width of the embedding table where it is not D: a projection leads in and one out (OPT's 350m).
        embed_scale: multiplies what is looked up, but not ``inputs_embeds`` (Gemma).
        input_multiplier: multiplies both (Granite).
        residual_multiplier: multiplies what attention and MLP add (Granite).
        logit_divisor: divides the logits (Granite).
        logit_softcap: as ``attention_softcap``, of the logits.
        head: what stands behind the blocks. ``lm``: logits of the next token; ``token``: a class for each token;
            ``last``: one for the sequence, from the last token that is not padding.
        num_labels: C, classes of the head, if it classifies.
        padding_token: padding token id; the ``last`` head skips it. None where there is none.
        context_length: positions that the model was made for; None if unknown. Nothing is computed from it.
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
        """Refuse what cannot be built."""
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
        """Runs of blocks with the same parameters: each is one scan. All but few models have one."""
        routed = self.routed_layers or (self.routed is not None,) * self.num_layers
        kinds = [(routed[i], i == 0 and not self.first_norm) for i in range(self.num_layers)]
        starts = [i for i in range(self.num_layers) if i == 0 or kinds[i] != kinds[i - 1]]
        return tuple(
            BlockGroup("layers" if len(starts) == 1 else f"group_{g}", start, end - start, *kinds[start])
            for g, (start, end) in enumerate(zip(starts, (*starts[1:], self.num_layers), strict=True))
        )

    @property
    def rope_switches_at(self) -> int | None:
        """Length in tokens beyond which the rotary frequencies are others, or None (see :class:`Rope`)."""
        switches = [rope.switches_at for rope in (self.rope, self.sliding_rope) if rope is not None]
        return next((switch for switch in switches if switch is not None), None)

    @property
    def max_positions(self) -> int | None:
        """How many positions there are, or None where any may come."""
        return None if self.learned_positions is None else self.learned_positions - self.position_offset


@dataclass(frozen=True)
class BlockGroup:
    """Consecutive blocks whose parameters are stacked together.

    Attributes:
        name: key of their parameters.
        start: number of the first.
        length: how many.
        routed: whether they have a mixture of experts in place of an MLP.
        unnormed: whether no norm precedes their attention.
    """

    name: str
    start: int
    length: int
    routed: bool
    unnormed: bool
