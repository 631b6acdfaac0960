"""What a gate does with a text: how much of each expert it takes, where, how decidedly, and what that is worth.

Axes: B batch, T tokens, L adapted layers (1 where they share their gates), N experts.
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
    """Sums over the tokens that are predicted; those of several batches add up.

    Attributes:
        tokens: their number, float32.
        loss: cross-entropy of the model, in nats.
        base_loss: of its base model alone.
        gates: ``[L, N]``, the gates that the layers see: after top-k, before the global weight.
        leads: ``[L, N]``, in how many of the tokens an expert's gate is the largest.
        entropy: ``[L]``, of the gates taken as shares of their sum, in nats; log N where all experts count the same.
    """

    tokens: jax.Array
    loss: jax.Array
    base_loss: jax.Array
    gates: jax.Array
    leads: jax.Array
    entropy: jax.Array

    def __add__(self, other: Routing) -> Routing:
        """Add up what two batches gave."""
        total: Routing = jax.tree.map(jnp.add, self, other)
        return total

    def mean(self) -> Routing:
        """Divide by the number of tokens, which stays."""
        means: Routing = jax.tree.map(lambda total: total / self.tokens, self)
        return means.replace(tokens=self.tokens)  # type: ignore[attr-defined,no-any-return]


def make_routing_step(xlora: XLora, *, loss_chunk: int = 256) -> Callable[[Params, Batch], Routing]:
    """Make the jitted function ``(params, batch) -> Routing``.

    Batches are those of :func:`~xlora_jax.training.step.batch_loss`.

    Raises:
        ValueError: when it is called, if the model classifies.
    """
    # Experts that weigh nothing leave the base model.
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
