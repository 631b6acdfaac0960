"""Stacking of PEFT LoRA adapters: from one adapter per expert to stacked arrays per layer, and back.

Axes: D input, F output, N experts, R stacked ranks of a layer, L stacked blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import jax
import numpy as np
from numpy.typing import NDArray

from interop.hf.base import BaseOrigin, Placer, put_on_default_device
from interop.hf.families.table import ADAPTABLE, LEAVES, Placed
from interop.peft.adapter import LoraAdapter, LoraLayer
from interop.peft.names import match_module, renamed
from interop.storage.errors import FormatError, listed
from interop.storage.tensors import LazyTensor
from xlora_jax import BaseModel
from xlora_jax.layers.adapted import ABSENT, AdaptedLayers
from xlora_jax.layers.stacking import Piece, stack_pieces
from xlora_jax.models import Transformer
from xlora_jax.trees import Path, flatten, unflatten

__all__ = ["fit_adapters", "stack_experts", "unstack_experts"]


def fit_adapters(adapters: Sequence[LoraAdapter], base: BaseModel) -> tuple[LoraAdapter, ...]:
    """Check adapters against a base model, and return them with the base's module names.

    Raises:
        FormatError: an adapter has a layer that the base lacks, a layer of another shape, or changed weights of the
            base.
    """
    origin: BaseOrigin = base.origin
    module = cast(Transformer, base.module)
    shapes = origin.family.kernel_shapes(module)
    places = {placed.hf: placed for placed in origin.family.modules(module) if placed.kind in ADAPTABLE}
    for adapter in adapters:
        _check_side(adapter, origin)
    fitted = tuple(renamed(adapter, places) for adapter in adapters)
    for adapter in fitted:
        for name, layer in adapter.layers.items():
            if reason := origin.family.refused.get(name):
                raise FormatError(
                    f"adapter {adapter.name!r} ({adapter.path}): experts can't adapt {name!r} of "
                    f"{origin.name_or_path}: {reason}. Train the adapter without it (target_modules)."
                )
            place = places[name]
            _check_layer(adapter, layer, place, shapes[place.path], base)
            if layer.base_weight is not None:
                _check_own_weight(adapter, layer.base_weight, place, "weight", base)
        for name, tensor in adapter.base_weights.items():
            path, part = name.rsplit(".", 1)
            try:
                place = places[match_module(path, places)]
            except FormatError as error:
                raise FormatError(f"adapter {adapter.name!r} ({adapter.path}): {tensor.name!r}: {error}") from None
            _check_own_weight(adapter, tensor, place, part, base)
        _check_saved(adapter, base)
    return fitted


def _check_side(adapter: LoraAdapter, origin: BaseOrigin) -> None:
    """Refuse an adapter of the vision side of a multimodal base."""
    family = origin.family
    if odd := [path for path in adapter.layers if any(part in family.unread for part in path.split("."))]:
        raise FormatError(
            f"adapter {adapter.name!r} ({adapter.path}) adapts the vision side of {origin.name_or_path} "
            f"({listed(odd)}), and of a {family.model_type} only the text side is built. Expected modules of "
            f"{family.blocks.rpartition('.')[0]!r}: train it with target_modules of the language model alone, or leave "
            f"it out."
        )


def _check_saved(adapter: LoraAdapter, base: BaseModel) -> None:
    """Raise FormatError if the base has a module that the adapter says it saved whole, and its file lacks it."""
    has = [placed.hf for placed in base.origin.family.modules(cast(Transformer, base.module))]
    for name in adapter.not_saved:
        if found := [hf for hf in has if hf.endswith(name)]:
            raise FormatError(
                f"adapter {adapter.name!r} ({adapter.path}): modules_to_save names {name!r}, which the base has "
                f"({found[0]!r}), and no tensor of it is stored. The file was cut: save the adapter again."
            )


def stack_experts(
    adapters: Sequence[LoraAdapter],
    base: BaseModel,
    dtype: np.dtype[Any],
    place: Placer = put_on_default_device,
    *,
    directions: bool = False,
) -> tuple[dict[str, Any], AdaptedLayers]:
    """Stack adapters into the ``experts`` collection of a base model.

    Args:
        adapters: one adapter per expert, from :func:`fit_adapters`, in the order of the classifier's outputs.
        base: base model.
        dtype: dtype of ``lora_a`` and ``lora_b``. The scales in ``columns`` are float32.
        place: function that puts an array on devices; see :func:`interop.load_base`.
        directions: whether to add the experts' directions, which the router ``arrow`` needs.

    Returns:
        The collection, and the adapted layers with PEFT's numbers.

    Raises:
        FormatError: no layer is adapted, or one that can't have directions.
    """
    if directions:
        _check_directions(adapters)
    origin: BaseOrigin = base.origin
    module = cast(Transformer, base.module)
    shapes = origin.family.kernel_shapes(module)
    pieces: dict[str, list[Piece]] = {}
    for expert, adapter in enumerate(adapters):
        for name, layer in adapter.layers.items():
            pieces.setdefault(name, []).append(Piece(expert, layer.a, layer.b, layer.scale, layer.bias, layer.dropout))
    if not pieces:
        raise FormatError(f"the adapters {', '.join(a.name for a in adapters)} adapt no layer at all")
    with_bias = any(piece.bias is not None for found in pieces.values() for piece in found)
    layers = origin.family.adapted_layers(module, pieces.keys(), with_bias=with_bias)
    flat: dict[Path, jax.Array] = {}
    for slot in layers.slots:
        numbers = (slot.numbers,) if isinstance(slot.numbers, int) else slot.numbers
        members = [[] if number == ABSENT else pieces[layers.names[number]] for number in numbers]
        for leaf, stacked in stack_pieces(
            members, shapes[slot.path], len(adapters), dtype, directions=directions
        ).items():
            path = (*slot.path, leaf)
            flat[path] = place(("experts", *path), stacked[0] if isinstance(slot.numbers, int) else stacked)
    return unflatten(flat), layers


def _check_directions(adapters: Sequence[LoraAdapter]) -> None:
    for adapter in adapters:
        for name, layer in adapter.layers.items():
            if layer.kind != "linear":
                raise FormatError(
                    f"adapter {adapter.name!r} ({adapter.path}) adapts {name!r}, a module of kind {layer.kind!r}; the "
                    f"router 'arrow' expects linear modules only, as in PEFT. Use the router 'classifier'."
                )


def unstack_experts(
    experts: Mapping[str, Any], layers: AdaptedLayers, adapters: Sequence[LoraAdapter]
) -> list[LoraAdapter]:
    """Split the ``experts`` collection into adapters; the inverse of :func:`stack_experts`.

    Args:
        experts: ``experts`` collection, trained or not.
        layers: adapted layers of the collection.
        adapters: adapters as loaded, which give each expert's rank at each layer. An unchanged tensor is returned bit
            for bit, in its stored dtype.

    Returns:
        The adapters with the arrays of ``experts``.
    """
    flat = flatten(experts)
    taken: list[dict[str, LoraLayer]] = [{} for _ in adapters]
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
                name = layers.names[number]
                if name not in adapter.layers:
                    continue
                was = adapter.layers[name]
                own = slice(first, first + was.r)
                first += was.r
                taken[expert][name] = replace(
                    was,
                    a=_as_stored(arrays["lora_a"][..., own], was.a),
                    b=_as_stored(arrays["lora_b"][own], was.b),
                    bias=None if was.bias is None else _as_stored(arrays["lora_bias"][expert], was.bias),
                )
    return [
        replace(adapter, layers={name: found[name] for name in adapter.layers})
        for adapter, found in zip(adapters, taken, strict=True)
    ]


def _as_stored(array: NDArray[Any], stored: NDArray[Any]) -> NDArray[Any]:
    """Return ``stored`` if ``array`` is equal to it in its own dtype, else ``array``."""
    return stored if np.array_equal(stored.astype(array.dtype), array) else np.ascontiguousarray(array)


def _check_layer(
    adapter: LoraAdapter, layer: LoraLayer, place: Placed, shape: tuple[int, ...], base: BaseModel
) -> None:
    got = (*layer.a.shape[:-1], layer.b.shape[-1])
    where = f"adapter {adapter.name!r} ({adapter.path})"
    kind = ADAPTABLE[place.kind]
    if (layer.kind, got) != (kind, shape):
        raise FormatError(
            f"{where} is of another base than {base.origin.name_or_path}: its {place.hf} is for a {layer.kind} module "
            f"of shape {list(got)}, the base has a {kind} module of shape {list(shape)} there. It was trained on "
            f"{adapter.base_model_name_or_path!r}: use that base, or leave the adapter out."
        )


def _check_own_weight(adapter: LoraAdapter, tensor: LazyTensor, place: Placed, part: str, base: BaseModel) -> None:
    """Raise FormatError if the adapter's own weights of a base module differ from the base's."""
    own, stored = _weight(base, place, part), tensor.read()
    # Compare in both dtypes: the coarser one may have rounded.
    same = stored.shape == own.shape and (
        np.array_equal(stored.astype(own.dtype), own) or np.array_equal(own.astype(stored.dtype), stored)
    )
    if not same:
        raise FormatError(
            f"adapter {adapter.name!r} ({adapter.path}) brings its own weights of {place.hf} ({tensor.name!r}, shape "
            f"{list(stored.shape)}), which are not the base's ({list(own.shape)}): it was resized or trained, and "
            f"experts share one base. Use the base that it was trained on, or train the adapter without changing it."
        )


def _weight(base: BaseModel, place: Placed, part: str) -> NDArray[Any]:
    """Return the base's own weight (or bias) of a linear layer or an embedding, in torch's layout."""
    leaves = flatten(base.params)
    if part == "bias":
        bias = leaves.get((*place.path, "bias"))
        return np.zeros(0, np.float32) if bias is None else np.asarray(bias)[place.member]
    own = leaves.get((*place.path, "embedding"))
    if own is None:
        kernel = leaves.get((*place.path, "kernel"))
        # The kernel of a tied head is the embedding table.
        own = leaves[base.origin.family.table] if kernel is None else kernel
        if kernel is not None and LEAVES[place.kind]["kernel"][1]:
            own = np.swapaxes(np.asarray(own), -1, -2)
    weight: NDArray[Any] = np.asarray(own)[place.member]
    return weight
