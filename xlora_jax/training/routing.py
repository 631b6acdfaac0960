"""Routing of a batch of text: sums for the metrics, and the losses with and without the experts.

Axes: B batch, T tokens, L adapted layers (1 if they share their gates), N experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from xlora_jax.layers import mixing
from xlora_jax.passes import Params, XLora, classify, scaling_pass
from xlora_jax.routing.metrics import RoutingSums, routing_sums
from xlora_jax.training.losses import IGNORED_LABEL, next_token_targets
from xlora_jax.training.step import Batch, check_batch, inputs_of, scaled_loss

__all__ = ["Routing", "make_routing_step"]


@struct.dataclass
class Routing:
    """Sums over the predicted tokens of a batch; :class:`~xlora_jax.routing.metrics.Total` adds those of several.

    Losses are cross-entropies in nats, float32. Those after ``base_loss`` are None if they were not asked for.

    Attributes:
        sums: sums of the gates after top-k, before the global weight.
        loss: loss of the model.
        base_loss: loss of its base model alone.
        uniform_loss: loss with the gate 1/N for every expert, layer and token.
        alone_losses: ``[N]``, loss with the gate 1 for one expert and 0 for the others.
        without_losses: ``[N]``, loss with the gate of one expert set to 0 and the others as they are (leave one out).
    """

    sums: RoutingSums
    loss: jax.Array
    base_loss: jax.Array
    uniform_loss: jax.Array | None = None
    alone_losses: jax.Array | None = None
    without_losses: jax.Array | None = None


def make_routing_step(
    xlora: XLora, *, effects: bool = False, loss_chunk: int = 256
) -> Callable[[Params, Batch], Routing]:
    """Make the jitted function ``(params, batch) -> Routing``.

    Args:
        xlora: static description of the model.
        effects: whether to compute each expert's effect on the loss too, which costs 2N + 1 more passes.
        loss_chunk: number of positions of a row whose logits exist at a time.

    Returns:
        The function. A batch is as in :func:`~xlora_jax.training.step.batch_loss`.

    Raises:
        ValueError: on the call, if the model classifies.
    """
    config, count = xlora.config, xlora.num_experts
    # With expert weights of zero the base model remains.
    alone = dataclasses.replace(xlora, config=dataclasses.replace(config, global_scaling_weight=0.0))
    # Takes gates as they are.
    fixed = dataclasses.replace(xlora, config=dataclasses.replace(config, top_k_lora=None, enable_softmax_topk=False))

    def step(params: Params, batch: Batch) -> Routing:
        check_batch(xlora, batch)
        hidden = batch.get("scaling_hidden")
        if hidden is None:
            hidden, _ = scaling_pass(xlora, params, **inputs_of(batch))
        scalings = classify(xlora, params, hidden.astype(xlora.module.dtype))
        gates = mixing.layer_gates(scalings, top_k=config.top_k_lora, softmax_selected=config.enable_softmax_topk)

        def loss_of(gates: jax.Array, model: XLora = fixed) -> jax.Array:
            return scaled_loss(model, {}, params, batch, gates, loss_chunk=loss_chunk)

        counted = next_token_targets(batch["labels"], batch.get("segment_ids")) != IGNORED_LABEL
        routing = Routing(
            sums=routing_sums(gates, counted, segment_ids=batch.get("segment_ids")),
            loss=loss_of(gates),
            base_loss=loss_of(gates, alone),
        )
        if not effects:
            return routing
        one, none = jnp.eye(count, dtype=gates.dtype), jnp.zeros((count, count), gates.dtype)
        # Each variant keeps a part of the gates and adds constants.
        kept = jnp.concatenate([none, 1 - one, none[:1]])
        added = jnp.concatenate([one, none, jnp.full((1, count), 1 / count, gates.dtype)])
        losses = lax.map(lambda variant: loss_of(gates * variant[0] + variant[1]), (kept, added))
        changed: Routing = routing.replace(  # type: ignore[attr-defined]
            alone_losses=losses[:count], without_losses=losses[count:-1], uniform_loss=losses[-1]
        )
        return changed

    return jax.jit(step)
