"""Adding an expert to a trained X-LoRA, and removing one, without training the gate again.

Only the last layer of the classifier depends on the experts. Its outputs ``[L, N]`` get a column, or lose one.

Axes: H inputs of the last layer, L adapted layers (1 if all layers share their gates), N experts.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from interop.experts import fit_adapters, stack_experts, unstack_experts
from interop.hf.base import leave_in_memory, put_on_default_device
from interop.model import XLoraOrigin
from interop.peft.adapter import LoraAdapter, load_lora
from interop.storage.errors import FormatError
from xlora_jax import BaseModel, XLoraModel
from xlora_jax.trees import flatten

__all__ = ["add_expert", "remove_expert"]

_PRIOR = 1e-6


def add_expert(
    model: XLoraModel, name: str, adapter: str | Path, *, prior: float = _PRIOR, **hub_options: Any
) -> XLoraModel:
    """Add an expert to a trained model, after the others.

    The new column of the classifier is the mean of the other columns, minus a constant. With ``enable_softmax`` the
    constant is such that the expert's gate is at most ``prior`` for every token, and ``prior`` where all other gates
    are equal. Without a softmax the column is zero and its bias is ``prior``. At a layer that only the new expert
    adapts, the other experts' columns are their means over the old layers.

    With the default prior the outputs are the old ones within rounding. The gate of the new expert can learn from
    there: ``TrainConfig(only_expert=name)`` changes nothing but the new column.

    Args:
        model: model from :func:`interop.load_xlora`.
        name: name of the expert.
        adapter: PEFT LoRA directory or hub id.
        prior: gate of the new expert, above 0 and below 1.
        **hub_options: as in :func:`interop.load_lora`.

    Returns:
        The model with one more expert.

    Raises:
        ValueError: the name is in use, or the prior is out of range.
        FormatError: the adapter can't be used, or has a classification head other than the model's.
    """
    _check_router(model)
    if name in model.expert_names:
        raise ValueError(
            f"name: the model has an expert {name!r} already; its experts: {', '.join(model.expert_names)}"
        )
    if not 0 < prior < 1:
        raise ValueError(f"prior: expected a number above 0 and below 1, got {prior}")
    added = load_lora(adapter, name=name, **hub_options)
    _check_head(added, model)
    config = model.config
    scaling = config.scaling_pass_gate(len(model.expert_names))
    if scaling != 0:
        warnings.warn(
            f"the scaling pass runs with the experts at a gate of {scaling:g}, and {name!r} takes part in it: the "
            f"gates of all experts change. Train the gate again, or use a gate with scaling_pass_value 0.",
            UserWarning,
            stacklevel=2,
        )
    elif any(layer.bias is not None for layer in added.layers.values()):
        warnings.warn(
            f"{name!r} has a lora_bias, which acts whatever its gate: the outputs change.", UserWarning, stacklevel=2
        )
    adapters = (*_current(model), added)
    names = (*model.expert_names, name)

    def widen(kernel: NDArray[Any], bias: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        others = kernel.mean(axis=-1, keepdims=True), bias.mean(axis=-1, keepdims=True)
        count = kernel.shape[-1]
        if config.enable_softmax or config.enable_softmax_topk:
            # The mean of exp is at least exp of the mean, so the gate is at most c / (c + N), with c the factor below.
            factor = math.log(prior * count / (1 - prior))
            shift = factor * (config.softmax_temperature if config.enable_softmax else 1.0)
            new = others[0], others[1] + shift
        elif config.top_k_lora is not None:
            new = others[0], others[1] - 1e4  # never among the largest
        else:
            new = np.zeros_like(others[0]), np.full_like(others[1], prior)
        return np.concatenate([kernel, new[0]], axis=-1), np.concatenate([bias, new[1]], axis=-1)

    return _with_experts(model, adapters, names, widen)


def remove_expert(model: XLoraModel, name: str) -> XLoraModel:
    """Remove an expert from a trained model. A softmax shares its weight among the others.

    Args:
        model: model from :func:`interop.load_xlora`.
        name: name of the expert.

    Returns:
        The model without the expert. A ``top_k_lora`` above the number of experts left is lowered, with a warning.

    Raises:
        ValueError: there is no such expert, or no other.
    """
    _check_router(model)
    if name not in model.expert_names:
        raise ValueError(f"name: no expert {name!r}; the experts are {', '.join(model.expert_names)}")
    if len(model.expert_names) == 1:
        raise ValueError(f"name: {name!r} is the only expert, and X-LoRA needs one; use the base model alone")
    number = model.expert_names.index(name)
    names = tuple(other for other in model.expert_names if other != name)
    if model.config.top_k_lora is not None and model.config.top_k_lora > len(names):
        warnings.warn(f"top_k_lora is {len(names)} now, the number of experts left", UserWarning, stacklevel=2)
        model = model.replace(config=dataclasses.replace(model.config, top_k_lora=len(names), adapters={}))
    adapters = tuple(adapter for i, adapter in enumerate(_current(model)) if i != number)

    def narrow(kernel: NDArray[Any], bias: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        return np.delete(kernel, number, axis=-1), np.delete(bias, number, axis=-1)

    return _with_experts(model, adapters, names, narrow)


def _current(model: XLoraModel) -> list[LoraAdapter]:
    """Return the adapters with the model's arrays, which may be trained."""
    return unstack_experts(model.params["experts"], model.layers, model.origin.adapters)


def _check_router(model: XLoraModel) -> None:
    if model.router != "classifier":
        raise ValueError(f"the router {model.router!r} has no classifier to edit: load the model with other adapters")


def _check_head(added: LoraAdapter, model: XLoraModel) -> None:
    own = model.origin.base.head
    if not added.head:
        return
    same = own is not None and added.head.keys() == own.tensors.keys()
    if not same or not all(np.array_equal(tensor, own.tensors[key]) for key, tensor in added.head.items()):
        raise FormatError(
            f"adapter {added.name!r} ({added.path}) brings a classification head that is not the model's, and a model "
            f"has one head; expected an adapter without a head or with the same."
        )


def _with_experts(
    model: XLoraModel, adapters: Sequence[LoraAdapter], names: tuple[str, ...], change: Any
) -> XLoraModel:
    """Return the model with other experts; ``change`` edits kernel ``[H, L, N]`` and bias ``[L, N]``."""
    origin: XLoraOrigin = model.origin
    base = BaseModel(model.module, model.params["base"], origin.base)
    leaves = [leaf for path, leaf in flatten(model.params["experts"]).items() if path[-1] == "lora_a"]
    in_memory = isinstance(leaves[0], np.ndarray)
    place = leave_in_memory if in_memory else put_on_default_device
    fitted = fit_adapters(adapters, base)
    experts, layers = stack_experts(fitted, base, np.dtype(leaves[0].dtype), place)
    last = f"dense_{model.config.xlora_depth - 1}"
    stored = model.params["classifier"][last]
    kernel, bias = (np.asarray(stored[part]).astype(np.float64) for part in ("kernel", "bias"))
    count = len(model.expert_names)
    kernel, bias = kernel.reshape(len(kernel), -1, count), bias.reshape(-1, count)
    if model.config.layerwise_scalings:
        kernel, bias = (
            _by_name(kernel, model.layer_names, layers.names),
            _by_name(bias, model.layer_names, layers.names),
        )
    kernel, bias = change(kernel, bias)
    as_array = np.asarray if in_memory else jnp.asarray
    dtype = stored["kernel"].dtype
    edited = {
        "kernel": as_array(kernel.reshape(len(kernel), -1).astype(dtype)),
        "bias": as_array(bias.reshape(-1).astype(dtype)),
    }
    params: Mapping[str, Any] = {
        **model.params,
        "experts": experts,
        "classifier": {**model.params["classifier"], last: edited},
    }
    paths = {adapter.name: str(adapter.path) for adapter in adapters}
    config = dataclasses.replace(model.config, adapters={name: paths[name] for name in names})
    return XLoraModel(model.module, params, config, layers, names, dataclasses.replace(origin, adapters=tuple(fitted)))


def _by_name(array: NDArray[Any], old: Sequence[str], new: Sequence[str]) -> NDArray[Any]:
    """Return ``[..., L, N]`` with other layers; a new layer gets the mean of the old ones."""
    mean = array.mean(axis=-2)
    columns = [array[..., old.index(name), :] if name in old else mean for name in new]
    return np.stack(columns, axis=-2)
