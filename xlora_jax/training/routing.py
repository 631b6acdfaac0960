"""Statistics of a gate on a text: the weight of each expert per layer, how concentrated, and the effect on the loss.

Axes: B batch, T tokens, L adapted layers (1 if they share their gates), N experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from xlora_jax.layers import mixing
from xlora_jax.passes import Params, XLora
from xlora_jax.training.losses import IGNORED_LABEL, next_token_targets
from xlora_jax.training.step import Batch, batch_loss

__all__ = ["Routing", "make_routing_step"]


@struct.dataclass
class Routing:
    """Sums over the predicted tokens; the sums of several batches can be added.

    Attributes:
        tokens: number of predicted tokens, float32.
        loss: cross-entropy of the model, in nats.
        base_loss: cross-entropy of its base model alone.
        gates: ``[L, N]``, gates after top-k, before the global weight.
        leads: ``[L, N]``, number of tokens for which the expert's gate is the largest.
        entropy: ``[L]``, entropy of the gates as shares of their sum, in nats; log N if all gates are equal.
    """

    tokens: jax.Array
    loss: jax.Array
    base_loss: jax.Array
    gates: jax.Array
    leads: jax.Array
    entropy: jax.Array

    def __add__(self, other: Routing) -> Routing:
        """Add the sums of two batches."""
        total: Routing = jax.tree.map(jnp.add, self, other)
        return total

    def mean(self) -> Routing:
        """Return the sums divided by the number of tokens, which is kept."""
        means: Routing = jax.tree.map(lambda total: total / self.tokens, self)
        return means.replace(tokens=self.tokens)  # type: ignore[attr-defined,no-any-return]


def make_routing_step(xlora: XLora, *, loss_chunk: int = 256) -> Callable[[Params, Batch], Routing]:
    """Make the jitted function ``(params, batch) -> Routing``.

    A batch is as in :func:`~xlora_jax.training.step.batch_loss`.

    Raises:
        ValueError: on the call, if the model classifies.
    """
    # With expert weights of zero the base model remains.
    alone = dataclasses.replace(xlora, config=dataclasses.replace(xlora.config, global_scaling_weight=0.0))

    def step(params: Params, batch: Batch) -> Routing:
        loss, _, scalings = batch_loss(xlora, {}, params, batch, loss_chunk=loss_chunk)
        base_loss, _, _ = batch_loss(alone, {}, params, batch, loss_chunk=loss_chunk)
        counted = (next_token_targets(batch["labels"], batch.get("segment_ids")) != IGNORED_LABEL).astype(jnp.float32)
        gates = mixing.layer_gates(
            scalings.astype(jnp.float32),
            top_k=xlora.config.top_k_lora,
            softmax_selected=xlora.config.enable_softmax_topk,
        )
        total = gates.sum(axis=-1, keepdims=True)
        shares = gates / jnp.where(total == 0, 1, total)
        entropy = -(shares * jnp.log(jnp.where(shares > 0, shares, 1))).sum(axis=-1)
        leads = jax.nn.one_hot(gates.argmax(axis=-1), xlora.num_experts)
        return Routing(
            tokens=counted.sum(),
            loss=loss,
            base_loss=base_loss,
            gates=jnp.einsum("btln,bt->ln", gates, counted),
            leads=jnp.einsum("btln,bt->ln", leads, counted),
            entropy=jnp.einsum("btl,bt->l", entropy, counted),
        )

    return jax.jit(step)
