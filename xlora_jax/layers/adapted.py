"""The adapted layers of a model: their order, and the paths of their variables.

PEFT numbers the adapted layers in the order of torch's ``modules()``; a layerwise classifier's output depends on that
order. :class:`AdaptedLayers` holds the order as data and gives each layer its gates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xlora_jax.layers.arrow import Arrow

__all__ = ["ABSENT", "AdaptedLayers", "Slot"]

ABSENT = -1


@dataclass(frozen=True)
class Slot:
    """Place of one module, or of a stack of modules, in the collections of variables.

    Attributes:
        path: keys from the root of a collection to the module, such as ``("layers", "mlp", "up_proj")``.
        numbers: number of the adapted layer. For a module whose variables are stacked on a leading axis (``nn.scan``),
            a tuple with one number per member: :data:`ABSENT` (-1) for a member without experts.
    """

    path: tuple[str, ...]
    numbers: int | tuple[int, ...]


@dataclass(frozen=True)
class AdaptedLayers:
    """The adapted layers of a model; hashable, so that it can be a static argument.

    Attributes:
        names: module paths in the order of the classifier's output (for HF models, PEFT's order).
        slots: places of the layers. Every number below ``len(names)`` occurs once.
        with_bias: whether any expert has a ``lora_bias``, which acts even where its gate is zero.
    """

    names: tuple[str, ...]
    slots: tuple[Slot, ...]
    with_bias: bool = False

    def __post_init__(self) -> None:
        """Check that names and slots number the same layers."""
        found = sorted(number for slot in self.slots for number in np.ravel(slot.numbers) if number != ABSENT)
        if found != list(range(len(self.names))):
            raise ValueError(f"slots number the layers {found}, expected each of 0..{len(self.names) - 1} once")

    def __len__(self) -> int:
        """Return L, the number of adapted layers."""
        return len(self.names)

    def collection(self, gates: jax.Array | Arrow, weight: float | jax.Array) -> dict[str, Any]:
        """Return gates as the ``scalings`` collection.

        Args:
            gates: ``[B, T, L, N]``, or ``[B, T, 1, N]`` if all layers share them; or the source of gates that each
                layer computes itself.
            weight: global scaling weight. The gates already contain it; biases need it separately.

        Returns:
            Nested mapping with ``gates [B, T, N]`` at each slot; stacked slots have a leading axis.
        """
        tree: dict[str, Any] = {}
        for slot in self.slots:
            leaf: dict[str, Any]
            # The columns of an absent member are all zero, so any gate will do.
            index = np.maximum(np.asarray(slot.numbers), 0)
            leaf = {"gates": gates if isinstance(gates, Arrow) else _at(gates, index)}
            if self.with_bias:
                leaf["weight"] = jnp.full(index.shape, weight, jnp.float32)
            node = tree
            for key in slot.path[:-1]:
                node = node.setdefault(key, {})
            node[slot.path[-1]] = leaf
        return tree

    def unstacked(self, groups: Mapping[str, Sequence[str]]) -> AdaptedLayers:
        """Return the same layers with stacked slots split into one slot per member.

        Args:
            groups: first key of the stacked slots to the first keys of their members, in order.
        """
        slots: list[Slot] = []
        for slot in self.slots:
            names = groups.get(slot.path[0])
            if names is None:
                slots.append(slot)
            else:
                members = zip(names, np.atleast_1d(slot.numbers).tolist(), strict=True)
                slots += [Slot((name, *slot.path[1:]), number) for name, number in members if number != ABSENT]
        return AdaptedLayers(self.names, tuple(slots), self.with_bias)

    def expand(self, scalings: jax.Array) -> jax.Array:
        """Return scalings ``[B, T, L, N]`` from ``[B, T, L, N]`` or ``[B, T, 1, N]``."""
        return jnp.broadcast_to(scalings, (*scalings.shape[:2], len(self), scalings.shape[-1]))


def _at(gates: jax.Array, index: Any) -> jax.Array:
    """Return the gates of the layers with these numbers: ``[*index.shape, B, T, N]``."""
    by_layer = jnp.moveaxis(gates, 2, 0)
    if gates.shape[2] == 1:
        return jnp.broadcast_to(by_layer[0], (*index.shape, *by_layer.shape[1:]))
    return by_layer[index]
