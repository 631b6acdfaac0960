"""The two passes of X-LoRA as pure functions over one tree of parameters.

    hidden   = base(tokens)                     scaling pass: experts off, or at a constant; no gradient
    scalings = classifier(hidden)               [B, T, L, N]
    logits   = base + experts(tokens, gates)    real pass: every adapted layer mixes its experts per token

``params`` is ``{"base": ..., "experts": ..., "classifier": ...}``. The first argument of every function here is
:class:`XLora`, the static part; ``jax.jit(f, static_argnums=0)`` makes the two passes one compiled function. Axes as in
:mod:`xlora_jax.layers.mixing`, and V for the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from xlora_jax.config import XLoraConfig
from xlora_jax.layers import mixing
from xlora_jax.layers.adapted import AdaptedLayers
from xlora_jax.layers.arrow import Arrow
from xlora_jax.layers.modules import XLoraClassifier
from xlora_jax.models import BaseModule, Cache, DecoderOutput

__all__ = [
    "Params",
    "XLora",
    "XLoraOutput",
    "base_forward",
    "classify",
    "forward",
    "real_pass",
    "scaling_pass",
    "single_pass",
    "unembed",
]

Params = Mapping[str, Any]


@dataclass(frozen=True)
class XLora:
    """The static part of an X-LoRA model; hashable.

    Attributes:
        module: Flax module of the base model.
        layers: adapted layers.
        num_experts: N, number of experts.
        config: X-LoRA settings.
        gate_dtype: dtype of the classifier's computation; None means the base model's, as in PEFT.
        router: source of the gates: ``classifier``, or ``arrow`` (:mod:`xlora_jax.layers.arrow`), which needs no
            scaling pass.
    """

    module: BaseModule
    layers: AdaptedLayers
    num_experts: int
    config: XLoraConfig
    gate_dtype: jax.typing.DTypeLike | None = None
    router: str = "classifier"

    def __post_init__(self) -> None:
        """Check the settings against the number of experts."""
        self.config.validate_experts(self.num_experts)

    @property
    def classifier(self) -> XLoraClassifier:
        """Classifier that the settings describe.

        Raises:
            ValueError: the router is another.
        """
        if self.router != "classifier":
            raise ValueError(f"the router {self.router!r} has no classifier: each layer computes its own gates")
        config = self.config
        return XLoraClassifier(
            num_layers=len(self.layers),
            num_experts=self.num_experts,
            depth=config.xlora_depth,
            size=config.xlora_size,
            dropout_rate=config.xlora_dropout_p,
            layerwise=config.layerwise_scalings,
            softmax=config.enable_softmax,
            temperature=config.softmax_temperature,
            dtype=self.gate_dtype or self.module.dtype,
            param_dtype=self.module.param_dtype,
        )

    @property
    def arrow(self) -> Arrow | None:
        """Source of gates that stands for the scalings if the router is ``arrow``, else None."""
        config = self.config
        if self.router != "arrow":
            return None
        return Arrow(config.top_k_lora, config.softmax_temperature, config.global_scaling_weight)

    def gates(self, scalings: jax.Array | Arrow) -> dict[str, Any]:
        """Return the ``scalings`` collection for the real pass, from scalings ``[B, T, L or 1, N]`` or their source."""
        weight = self.config.global_scaling_weight
        if isinstance(scalings, Arrow):
            return self.layers.collection(scalings, weight)
        gates = mixing.layer_gates(
            scalings, top_k=self.config.top_k_lora, softmax_selected=self.config.enable_softmax_topk, weight=weight
        )
        return self.layers.collection(gates, weight)


@struct.dataclass
class XLoraOutput:
    """Output of a call of the model.

    Attributes:
        logits: ``[B, T, V]`` in the base model's dtype; None if not requested.
        hidden_states: ``[B, T, D]`` of the real pass, after the final norm.
        scalings: ``[B, T, L, N]``, the classifier's output, before top-k; None with the experts disabled, or without
            a classifier.
    """

    logits: jax.Array | None
    hidden_states: jax.Array
    scalings: jax.Array | None


def base_forward(xlora: XLora, params: Params, **inputs: Any) -> DecoderOutput:
    """Run the base model alone; ``inputs`` are those of :class:`~xlora_jax.models.Decoder`."""
    return cast(DecoderOutput, xlora.module.apply({"params": params["base"]}, **inputs))


def scaling_pass(
    xlora: XLora, params: Params, *, rngs: Mapping[str, jax.Array] | None = None, **inputs: Any
) -> tuple[jax.Array, Cache | None]:
    """Run the first pass, which gives the hidden states that the classifier reads.

    Args:
        xlora: static description.
        params: parameter tree; ``base`` and ``experts`` are read.
        rngs: PRNG keys by name; the key ``lora_dropout`` turns the experts' dropout on.
        **inputs: inputs of the base model.

    Returns:
        Hidden states ``[B, T, D]``, through which no gradient flows, and the cache of this pass.
    """
    variables: dict[str, Any] = {"params": params["base"]}
    gate = xlora.config.scaling_pass_gate(xlora.num_experts)
    # At gate 0 the experts add only the biases of lora_B, if there are any.
    if gate != 0 or xlora.layers.with_bias:
        # One gate for all examples and positions.
        shape = (1, 1, 1, xlora.num_experts)
        variables["experts"] = params["experts"]
        variables["scalings"] = xlora.gates(mixing.constant_scalings(shape, gate, xlora.module.dtype))
    variables = lax.stop_gradient(variables)
    out = xlora.module.apply(variables, rngs=dict(rngs or {}), with_logits=False, **inputs)
    out = cast(DecoderOutput, out)
    return lax.stop_gradient(out.hidden_states), out.cache


def classify(
    xlora: XLora, params: Params, hidden_states: jax.Array, *, rngs: Mapping[str, jax.Array] | None = None
) -> jax.Array:
    """Return scalings ``[B, T, L or 1, N]`` of ``hidden_states [B, T, D]``; a key ``dropout`` turns dropout on."""
    deterministic = "dropout" not in (rngs or {})
    scalings = xlora.classifier.apply(
        {"params": params["classifier"]}, hidden_states, deterministic=deterministic, rngs=dict(rngs or {})
    )
    return cast(jax.Array, scalings)


def real_pass(
    xlora: XLora,
    params: Params,
    scalings: jax.Array | Arrow,
    *,
    rngs: Mapping[str, jax.Array] | None = None,
    **inputs: Any,
) -> DecoderOutput:
    """Run the second pass: the base model with its experts mixed by ``scalings [B, T, L or 1, N]`` or their source."""
    variables = {"params": params["base"], "experts": params["experts"], "scalings": xlora.gates(scalings)}
    return cast(DecoderOutput, xlora.module.apply(variables, rngs=dict(rngs or {}), **inputs))


def forward(
    xlora: XLora,
    params: Params,
    input_ids: jax.Array | None = None,
    *,
    attention_mask: jax.Array | None = None,
    inputs_embeds: jax.Array | None = None,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    scalings: jax.Array | None = None,
    rngs: Mapping[str, jax.Array] | None = None,
    with_logits: bool = True,
    **more: jax.Array | None,
) -> XLoraOutput:
    """Run both passes.

    Args:
        xlora: static description.
        params: ``{"base", "experts", "classifier"}``.
        input_ids: int ``[B, T]``, or ``inputs_embeds``.
        attention_mask: ``[B, T]``, zero at padding.
        inputs_embeds: ``[B, T, D]``.
        positions: int ``[B or 1, T]``; default 0..T-1.
        segment_ids: int ``[B, T]``, number of the document of each token in a packed row; a token attends to its own
            document only.
        scalings: array to use instead of the classifier's scalings, broadcast to ``[B, T, L, N]``; no scaling pass
            runs then.
        rngs: PRNG keys by name: ``dropout`` for the classifier's dropout, ``lora_dropout`` for the experts'. Without
            its key a dropout is off.
        with_logits: whether to apply the output head.
        **more: other inputs of the base model, such as ``token_type_ids`` or ``pixel_values``.

    Returns:
        Logits, hidden states and scalings.
    """
    given = {
        "input_ids": input_ids,
        "inputs_embeds": inputs_embeds,
        "attention_mask": attention_mask,
        "positions": positions,
        "segment_ids": segment_ids,
        **more,
    }
    inputs = {name: value for name, value in given.items() if value is not None}
    rngs = dict(rngs or {})
    lora_rngs: list[dict[str, jax.Array]] = [{}, {}]
    if "lora_dropout" in rngs:
        lora_rngs = [{"lora_dropout": key} for key in jax.random.split(rngs["lora_dropout"])]
    if scalings is None and xlora.arrow is not None:
        out = real_pass(xlora, params, xlora.arrow, rngs=lora_rngs[1], with_logits=with_logits, **inputs)
        return XLoraOutput(out.logits, out.hidden_states, None)
    if scalings is None:
        hidden_states, _ = scaling_pass(xlora, params, rngs=lora_rngs[0], **inputs)
        scalings = classify(xlora, params, hidden_states, rngs={k: v for k, v in rngs.items() if k == "dropout"})
    else:
        scalings = jnp.asarray(scalings, xlora.module.dtype)
        tokens = input_ids if input_ids is not None else inputs_embeds
        # Without tokens (images), scalings for all positions stay one gate for each example.
        positions_of = (1, 1) if tokens is None else tokens.shape[:2]
        shape = jnp.broadcast_shapes(scalings.shape, (*positions_of, len(xlora.layers), xlora.num_experts))
        scalings = jnp.broadcast_to(scalings, shape)
    out = real_pass(xlora, params, scalings, rngs=lora_rngs[1], with_logits=with_logits, **inputs)
    return XLoraOutput(out.logits, out.hidden_states, xlora.layers.expand(scalings))


def single_pass(xlora: XLora, params: Params, **inputs: Any) -> DecoderOutput:
    """Run the one pass of a model without a classifier: with the router's gates, or else the base model alone."""
    if xlora.arrow is None:
        return base_forward(xlora, params, **inputs)
    return real_pass(xlora, params, xlora.arrow, **inputs)


def unembed(
    xlora: XLora, params: Params, hidden_states: jax.Array, scalings: jax.Array | Arrow | None = None
) -> jax.Array:
    """Return logits ``[B, T, V]`` of ``hidden_states [B, T, D]``; with ``scalings``, the head's experts are mixed."""
    variables = {"params": params["base"]}
    if scalings is not None:
        variables |= {"experts": params["experts"], "scalings": xlora.gates(scalings)}
    return cast(jax.Array, xlora.module.apply(variables, hidden_states, method="unembed"))
