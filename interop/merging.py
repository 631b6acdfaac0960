"""Merging: one plain PEFT LoRA adapter from the experts of an X-LoRA model and constant gates.

An adapted layer adds ``sum over experts of gate x scale x (x @ a @ b)``. With constant gates that is one LoRA layer:
the factors side by side, with gates and scales in ``b``. Its rank is the sum of the experts' ranks. A cut to a lower
rank keeps the largest singular values of the product ``a @ b``, which is the best approximation in the Frobenius norm.

Axes: I inputs, O outputs, R sum of the experts' ranks, L adapted layers, N experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from interop.experts import fit_adapters, stack_experts, unstack_experts
from interop.hf.base import BaseOrigin, head_tensors
from interop.model import TASK_TYPES, XLoraOrigin
from interop.peft.adapter import LoraAdapter, LoraLayer
from interop.storage.errors import FormatError
from xlora_jax import BaseModel, XLoraConfig, XLoraModel

__all__ = ["as_model", "merge_experts"]


def merge_experts(model: XLoraModel, gates: ArrayLike, *, rank: int | None = None, name: str = "merged") -> LoraAdapter:
    """Merge the experts of a model into one plain LoRA adapter, for :func:`interop.save_lora`.

    All layers have one rank and a scale of 1, without patterns, so that programs that read only ``r`` and
    ``lora_alpha`` can load the adapter. A layer of smaller rank is filled up with zeros.

    Args:
        model: model from :func:`interop.load_xlora`.
        gates: gate of each expert at each adapted layer, broadcast to ``[L, N]``, such as those of
            :func:`xlora_jax.mean_gates`. Top-k and the global weight are already in them.
        rank: rank of the adapter, at least 1. None keeps the sum of the experts' ranks, which is exact.
        name: name of the adapter.

    Returns:
        The adapter, with float32 factors.

    Raises:
        ValueError: the gates or the rank can't be used.
        FormatError: a layer can't be merged.
    """
    gates = _checked_gates(gates, (len(model.layers), len(model.expert_names)))
    if rank is not None and rank < 1:
        raise ValueError(f"rank: expected at least 1, or None for the exact merge, got {rank}")
    origin: XLoraOrigin = model.origin
    adapters = unstack_experts(model.params["experts"], model.layers, origin.adapters)
    weight = model.config.global_scaling_weight
    layers: dict[str, LoraLayer] = {}
    for number, path in enumerate(model.layer_names):
        experts = [(adapter.layers[path], gate) for adapter, gate in zip(adapters, gates[number], strict=True)
                   if path in adapter.layers]  # fmt: skip
        layers[path] = _merged(path, [layer for layer, _ in experts], [gate for _, gate in experts], weight)
    with_bias = any(layer.bias is not None for layer in layers.values())
    if rank is not None:
        layers = {path: _cut(path, layer, rank) for path, layer in layers.items()}
    width = max(layer.r for layer in layers.values())
    layers = {path: _padded(path, layer, width, with_bias) for path, layer in layers.items()}
    head = head_tensors(BaseModel(model.module, model.params["base"], origin.base))
    config = {
        "peft_type": "LORA",
        "task_type": origin.extras.get("task_type", TASK_TYPES.get(model.module.config.head)),
        "base_model_name_or_path": origin.base.name_or_path,
        "r": width,
        "lora_alpha": width,
        "lora_dropout": 0.0,
        "lora_bias": with_bias,
        "bias": "none",
        "fan_in_fan_out": any(adapter.config.get("fan_in_fan_out") is True for adapter in adapters),
        "target_modules": _targets(model, layers),
        "modules_to_save": sorted({tensor.split(".")[0] for tensor in head}) or None,
        "inference_mode": True,
    }
    return LoraAdapter(name, Path(name), config, layers, head)


def as_model(adapter: LoraAdapter, base: XLoraModel) -> XLoraModel:
    """Return a model with one adapter at a constant gate of 1, on the base of another model.

    It computes the same as PEFT with that adapter. So the functions of this library, such as
    :func:`xlora_jax.evaluate`, apply to a merged adapter too.

    Raises:
        FormatError: the adapter does not fit the base.
    """
    alone = BaseModel(base.module, base.params["base"], base.origin.base)
    fitted = fit_adapters((adapter,), alone)
    experts, layers = stack_experts(fitted, alone, np.dtype(np.float32))
    width = base.module.config.hidden_size
    # The softmax over one expert is 1, whatever the classifier.
    dense = {"kernel": jnp.zeros((width, 1), base.module.param_dtype), "bias": jnp.zeros(1, base.module.param_dtype)}
    params = {"base": alone.params, "experts": experts, "classifier": {"dense_0": dense}}
    config = XLoraConfig(hidden_size=width, adapters={adapter.name: str(adapter.path)})
    return XLoraModel(base.module, params, config, layers, (adapter.name,), XLoraOrigin(alone.origin, fitted, {}))


def _checked_gates(gates: ArrayLike, shape: tuple[int, int]) -> NDArray[np.float64]:
    array = np.asarray(gates, np.float64)
    try:
        array = np.broadcast_to(array, shape)
    except ValueError:
        raise ValueError(
            f"gates: expected {list(shape)} (adapted layers, experts), or a shape that broadcasts to it, got "
            f"{list(array.shape)}"
        ) from None
    if not np.isfinite(array).all():
        raise ValueError("gates: expected finite numbers, got NaN or infinity")
    return array


def _merged(path: str, layers: Sequence[LoraLayer], gates: Sequence[float], weight: float) -> LoraLayer:
    """Return the layers as one layer of scale 1, exactly."""
    if any(layer.groups > 1 for layer in layers):
        raise FormatError(
            f"{path!r} is a convolution of {max(layer.groups for layer in layers)} groups, whose merged factors PEFT "
            f"can't store; expected one group. Leave the experts of this layer out."
        )
    used = [(layer, gate) for layer, gate in zip(layers, gates, strict=True) if gate] or [(layers[0], 0.0)]
    a = np.concatenate([layer.a.astype(np.float32) for layer, _ in used], axis=-1)
    b = np.concatenate([layer.b.astype(np.float64) * (gate * layer.scale) for layer, gate in used])
    # A bias of lora_B acts whatever the gate.
    biases = [layer.bias.astype(np.float64) * (layer.scale * weight) for layer in layers if layer.bias is not None]
    bias = np.sum(biases, axis=0).astype(np.float32) if biases else None
    return LoraLayer(layers[0].kind, a, b.astype(np.float32), bias, len(b), len(b), 1.0, 0.0)


def _cut(path: str, layer: LoraLayer, rank: int) -> LoraLayer:
    """Return the best approximation of a layer at a lower rank."""
    if layer.r <= rank:
        return layer
    # With a = Qa Ra and b = Rb' Qb', the singular values of a @ b are those of the small matrix Ra Rb'.
    qa, ra = np.linalg.qr(layer.a.reshape(-1, layer.r).astype(np.float64))
    qb, rb = np.linalg.qr(layer.b.T.astype(np.float64))
    u, values, v = np.linalg.svd(ra @ rb.T, full_matrices=False)
    root = np.sqrt(values[:rank])
    a, b = qa @ (u[:, :rank] * root), (qb @ (v[:rank].T * root)).T
    a = a.reshape(*layer.a.shape[:-1], -1)
    return dataclasses.replace(layer, a=a.astype(np.float32), b=b.astype(np.float32), r=len(b), alpha=len(b))


def _padded(path: str, layer: LoraLayer, rank: int, with_bias: bool) -> LoraLayer:
    """Return a layer with zeros up to a rank, and with a bias if any layer has one, as PEFT expects."""
    missing = rank - layer.r
    a = np.pad(layer.a, [(0, 0)] * (layer.a.ndim - 1) + [(0, missing)])
    b = np.pad(layer.b, [(0, missing), (0, 0)])
    bias = layer.bias
    if with_bias and bias is None:
        if layer.kind == "embedding":
            raise FormatError(
                f"{path!r} is an embedding, and another layer has a lora_bias, which PEFT allows only if no embedding "
                f"is adapted; leave out the experts of one kind."
            )
        bias = np.zeros(b.shape[1], np.float32)
    return dataclasses.replace(layer, a=a, b=b, bias=bias, r=rank, alpha=rank)


def _targets(model: XLoraModel, layers: dict[str, Any]) -> list[str]:
    """Return the last parts of the layers' names if these select just these layers, else the whole names."""
    origin: BaseOrigin = model.origin.base
    short = sorted({path.rsplit(".")[-1] for path in layers})
    modules = [placed.hf for placed in origin.family.modules(model.module)]
    selected = {path for path in modules if path.rsplit(".")[-1] in short}
    return short if selected == set(layers) and not origin.family.unread else list(layers)
