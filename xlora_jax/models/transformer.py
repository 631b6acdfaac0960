"""Base class of transformers: a stack of blocks, scanned or separate, and the output type.

Axes as in :mod:`xlora_jax.models.blocks`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct

from xlora_jax.models.blocks import Block, BlockContext, LayerFlags
from xlora_jax.models.cache import Cache
from xlora_jax.models.config import BlockGroup, DecoderConfig

__all__ = ["REMAT_POLICIES", "DecoderOutput", "Transformer"]

# Arrays of each block that are stored for the backward pass. The rest is recomputed from the block's input.
REMAT_POLICIES: dict[str, Callable[..., bool] | None] = {
    "full": None,  # only the block's input
    "dots": jax.checkpoint_policies.save_only_these_names("projection"),  # products with weights, experts added
    "dots_and_attention": jax.checkpoint_policies.dots_saveable,  # all products
}


@struct.dataclass
class DecoderOutput:
    """Output of a base model.

    Attributes:
        hidden_states: ``[B, T, D]`` after the final norm.
        logits: ``[B, T, V]``, or None if not requested.
        cache: cache with this call's keys and values, or None without a cache.
    """

    hidden_states: jax.Array
    logits: jax.Array | None = None
    cache: Any = None


class Transformer(nn.Module):
    """A stack of blocks; subclasses add embedding and head.

    Attributes:
        config: declaration of the family.
        dtype: dtype of the computation.
        param_dtype: dtype of the parameters at initialization.
        scan_layers: whether the blocks are stacked under ``nn.scan``, or are separate modules.
        remat: rematerialization policy for the backward pass, a key of :data:`REMAT_POLICIES`; None stores all
            activations.
        attention: implementation of ``jax.nn.dot_product_attention``: ``xla`` or ``cudnn`` (flash attention, on
            NVIDIA GPUs in bfloat16 or float16); None leaves the choice to JAX.
    """

    config: DecoderConfig
    dtype: jax.typing.DTypeLike = jnp.float32
    param_dtype: jax.typing.DTypeLike = jnp.float32
    scan_layers: bool = True
    remat: str | None = None
    attention: str | None = None

    def _block(self) -> Any:
        if self.remat is None:
            return Block
        if self.remat not in REMAT_POLICIES:
            raise ValueError(f"remat: expected None or one of {', '.join(REMAT_POLICIES)}, got {self.remat!r}")
        # Under scan the loop itself keeps XLA from merging the recomputation with the first computation.
        return nn.remat(Block, policy=REMAT_POLICIES[self.remat], prevent_cse=not self.scan_layers)

    def _scanned(self, group: BlockGroup) -> Any:
        scanned = nn.scan(
            self._block(),
            variable_axes={"params": 0, "experts": 0, "scalings": 0},
            split_rngs={"params": True, "lora_dropout": True},
            in_axes=(nn.broadcast, 0),
            length=group.length,
        )
        return scanned(self.config, self.dtype, self.param_dtype, group.routed, group.unnormed, name=group.name)

    def example_inputs(self) -> dict[str, jax.Array]:
        """Return inputs of the smallest call by name, for ``init``."""
        return {"input_ids": jnp.zeros((1, 1), jnp.int32)}

    def scanned_blocks(self) -> list[Any]:
        """Make the blocks in ``setup``, with one scan per group."""
        return [self._scanned(group) for group in self.config.groups]

    def single_blocks(self) -> list[Any]:
        """Make the blocks in ``setup`` as separate modules, to be assigned to ``layers``."""
        return [
            self._block()(self.config, self.dtype, self.param_dtype, group.routed, group.unnormed)
            for group in self.config.groups
            for _ in range(group.length)
        ]

    def run_blocks(self, x: jax.Array, cache: Cache | None, context: BlockContext) -> tuple[jax.Array, Cache | None]:
        """Run the residual stream ``x [B, T, D]`` and the cache through all blocks."""
        carry = (x, cache)
        flags = self._layers()
        if self.scan_layers:
            for group, blocks in zip(self.config.groups, self.blocks, strict=True):
                own = slice(group.start, group.start + group.length)
                carry, _ = blocks(carry, context, jax.tree.map(lambda flag, own=own: jnp.asarray(flag[own]), flags))
        else:
            for i, block in enumerate(self.layers):
                carry, _ = block(carry, context, jax.tree.map(lambda flag, i=i: flag[i].item(), flags))
        return carry

    def _layers(self) -> LayerFlags:
        """Return the per-block flags, each a NumPy array ``[L]``."""
        count = self.config.num_layers
        none = (False,) * count
        return LayerFlags(
            np.arange(count), np.asarray(self.config.sliding or none), np.asarray(self.config.no_rope or none)
        )
