"""PEFT LoRA adapters side by side: from one adapter per expert to one stacked array per layer, and back.

Axes: D input, F output, N experts, R stacked ranks of a layer, L stacked blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from interop.base import BaseOrigin, abstract_params
from interop.errors import FormatError
from interop.lora import LoraAdapter, LoraLayer, match_module
from xlora_jax import BaseModel
from xlora_jax.layers import ABSENT, AdaptedLayers
from xlora_jax.trees import Path, flatten, unflatten

__all__ = ["stack_experts", "unstack_experts"]

_KINDS = ("linear", "embedding")


@dataclass(frozen=True)
class _Piece:
    """One expert's LoRA layer, and which expert it is of."""

    expert: int
    layer: LoraLayer


def stack_experts(
    adapters: Sequence[LoraAdapter], base: BaseModel, dtype: np.dtype[Any]
) -> tuple[dict[str, Any], AdaptedLayers]:
    """Stack adapters into the ``experts`` collection of a base model.

    Args:
        adapters: one per expert, in the order of the classifier's outputs.
        base: what they adapt.
        dtype: of ``lora_a`` and ``lora_b``. The columns' scales are float32.

    Returns:
        The collection, and the layers numbered as PEFT does.

    Raises:
        FormatError: an adapter has a layer that the base has not, or of another shape.
    """
    origin: BaseOrigin = base.origin
    module = base.module
    places = {
        placed.hf: placed
        for placed in origin.family.modules(module.config.num_layers, stacked=module.scan_layers)
        if placed.kind in _KINDS
    }
    shapes = _layer_shapes(base)
    pieces: dict[str, list[_Piece]] = {}
    for expert, adapter in enumerate(adapters):
        for key, layer in adapter.layers.items():
            name = match_module(key, places)
            _check_piece(adapter, name, layer, places[name].kind, shapes[places[name].path], base)
            pieces.setdefault(name, []).append(_Piece(expert, layer))
    if not pieces:
        raise FormatError(f"the adapters {', '.join(a.name for a in adapters)} adapt no layer at all")
    with_bias = any(piece.layer.bias is not None for found in pieces.values() for piece in found)
    layers = origin.family.adapted_layers(
        module.config.num_layers, pieces.keys(), stacked=module.scan_layers, with_bias=with_bias
    )
    flat: dict[Path, jax.Array] = {}
    for slot in layers.slots:
        numbers = (slot.numbers,) if isinstance(slot.numbers, int) else slot.numbers
        members = [[] if number == ABSENT else pieces[layers.names[number]] for number in numbers]
        for leaf, stacked in _stack(members, shapes[slot.path], len(adapters), dtype).items():
            flat[(*slot.path, leaf)] = jnp.asarray(stacked[0] if isinstance(slot.numbers, int) else stacked)
    return unflatten(flat), layers


def unstack_experts(
    experts: Mapping[str, Any], layers: AdaptedLayers, adapters: Sequence[LoraAdapter]
) -> list[LoraAdapter]:
    """Take the experts apart again; the inverse of :func:`stack_experts`.

    Args:
        experts: the collection, trained or not.
        layers: its numbering.
        adapters: what was loaded: they tell which expert has which rank where. A tensor that did not change comes back
            in the dtype in which it was stored, so bit for bit.

    Returns:
        The adapters with the arrays of ``experts``.
    """
    flat = flatten(experts)
    taken: list[dict[str, LoraLayer]] = [{} for _ in adapters]
    keys = [{match_module(key, layers.names): key for key in adapter.layers} for adapter in adapters]
    for slot in layers.slots:
        leaves = {leaf: flat.get((*slot.path, leaf)) for leaf in ("lora_a", "lora_b", "lora_bias")}
        numbers = (slot.numbers,) if isinstance(slot.numbers, int) else slot.numbers
        for member, number in enumerate(numbers):
            if number == ABSENT:
                continue
            arrays = {
                leaf: np.asarray(value if isinstance(slot.numbers, int) else value[member])
                for leaf, value in leaves.items()
                if value is not None
            }
            first = 0
            for expert, adapter in enumerate(adapters):
                key = keys[expert].get(layers.names[number])
                if key is None:
                    continue
                was = adapter.layers[key]
                own = slice(first, first + was.r)
                first += was.r
                taken[expert][key] = replace(
                    was,
                    a=_as_stored(arrays["lora_a"][..., own], was.a),
                    b=_as_stored(arrays["lora_b"][own], was.b),
                    bias=None if was.bias is None else _as_stored(arrays["lora_bias"][expert], was.bias),
                )
    return [
        replace(adapter, layers={key: found[key] for key in adapter.layers})
        for adapter, found in zip(adapters, taken, strict=True)
    ]


def _as_stored(array: NDArray[Any], stored: NDArray[Any]) -> NDArray[Any]:
    """Return the stored array where ``array`` is what loading it gave, else ``array``."""
    return stored if np.array_equal(stored.astype(array.dtype), array) else np.ascontiguousarray(array)


def _layer_shapes(base: BaseModel) -> dict[Path, tuple[int, int]]:
    """Input and output width of every layer that can be adapted; for an embedding its V and D."""
    shapes: dict[Path, tuple[int, int]] = {}
    for path, leaf in flatten(abstract_params(base.module)).items():
        if path[-1] in ("kernel", "embedding"):
            shapes[path[:-1]] = leaf.shape[-2:]
    config = base.module.config
    shapes.setdefault(("lm_head",), (config.hidden_size, config.vocab_size))
    return shapes


def _check_piece(
    adapter: LoraAdapter, name: str, layer: LoraLayer, kind: str, shape: tuple[int, int], base: BaseModel
) -> None:
    got = (layer.a.shape[0], layer.b.shape[-1])
    if layer.kind != kind or got != shape:
        raise FormatError(
            f"adapter {adapter.name!r} ({adapter.path}) is not of this base ({base.origin.name_or_path}): layer {name} "
            f"is a {kind} layer of {shape[0]} -> {shape[1]}, the adapter has a {layer.kind} layer of {got[0]} -> "
            f"{got[1]}; it was trained on {adapter.base_model_name_or_path!r}."
        )
    if layer.base_weight is not None:
        table = np.asarray(base.params["embed_tokens"]["embedding"])
        if not np.array_equal(np.asarray(layer.base_weight, table.dtype), table):
            raise FormatError(
                f"adapter {adapter.name!r} ({adapter.path}): it brings its own weights of {name}, which differ from "
                f"the base's; experts share one base. Save it with save_embedding_layers=False if the table was not "
                f"trained, or train the adapter without it."
            )


def _stack(
    members: list[list[_Piece]], shape: tuple[int, int], n: int, dtype: np.dtype[Any]
) -> dict[str, NDArray[Any]]:
    """Lay the pieces of each member side by side, and pad members of smaller rank with columns that are nobody's."""
    count, (width_in, width_out) = len(members), shape
    rank = max(sum(piece.layer.r for piece in member) for member in members)
    a = np.zeros((count, width_in, rank), dtype)
    b = np.zeros((count, rank, width_out), dtype)
    columns = np.zeros((count, n, rank), np.float32)
    bias = np.zeros((count, n, width_out), dtype)
    bias_scale = np.zeros((count, n), np.float32)
    dropout = np.zeros((count, n), np.float32)
    has_bias = False
    for m, member in enumerate(members):
        first = 0
        for expert, layer in ((piece.expert, piece.layer) for piece in member):
            own = slice(first, first + layer.r)
            first += layer.r
            a[m, :, own] = layer.a
            b[m, own] = layer.b
            columns[m, expert, own] = layer.scale
            dropout[m, expert] = layer.dropout
            if layer.bias is not None:
                has_bias = True
                bias[m, expert] = layer.bias
                bias_scale[m, expert] = layer.scale
    leaves = {"lora_a": a, "lora_b": b, "columns": columns}
    if has_bias:
        leaves |= {"lora_bias": bias, "bias_scale": bias_scale}
    if dropout.any():
        leaves["lora_dropout"] = dropout
    return leaves
