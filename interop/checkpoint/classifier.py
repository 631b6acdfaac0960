"""Conversion of a classifier from and to torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from interop.checkpoint.layouts import classifier_tensors
from interop.storage.errors import FormatError, listed
from interop.storage.tensors import from_torch, to_torch
from xlora_jax.config import XLoraConfig

__all__ = ["classifier_from_torch", "classifier_to_torch"]

_TORCH_SLOT = re.compile(
    r"(?:base_model\.)?(?:internal_xlora_classifier\.)?(?:(?:layers|inner)\.(?P<slot>\d{1,6})|last)\.(?P<part>weight|bias)"
)


def classifier_from_torch(classifier: Any) -> dict[str, dict[str, NDArray[Any]]]:
    """Return the parameters of our classifier from a torch classifier.

    Args:
        classifier: PEFT's live `XLoraClassifier`, a module that holds one (a `PeftModel`), the state dict of either,
            or the state dict of the original package's classifier.

    Returns:
        `{"dense_0": {"kernel": [inputs, outputs], "bias": [outputs]}, "dense_1": ..., ...}`, in torch's dtypes.

    Raises:
        FormatError: the state dict is incomplete, or is not a classifier's.
    """
    state = classifier if isinstance(classifier, Mapping) else classifier.state_dict()
    if any("internal_xlora_classifier." in key for key in state):
        state = {key: tensor for key, tensor in state.items() if "internal_xlora_classifier." in key}
    slots: dict[int, dict[str, NDArray[Any]]] = {}
    for key, tensor in state.items():
        match = _TORCH_SLOT.fullmatch(key)
        if match is None:
            raise FormatError(
                f"{key!r} is no tensor of an X-LoRA classifier; expected layers.0.weight, layers.0.bias, ..."
            )
        slot = int(match["slot"]) if match["slot"] else 10**9  # `last`
        array = from_torch(tensor)
        slots.setdefault(slot, {})["kernel" if match["part"] == "weight" else "bias"] = (
            array.T if match["part"] == "weight" else array
        )
    numbers = [slot for slot in sorted(slots) if slot < 10**9]
    stride = numbers[1] - numbers[0] if len(numbers) > 1 else 0
    incomplete = [slot for slot, parts in slots.items() if parts.keys() != {"kernel", "bias"}]
    if not slots or numbers != [stride * i for i in range(len(numbers))] or incomplete:
        raise FormatError(
            f"an incomplete X-LoRA classifier: {listed(state)}; expected weight and bias of layers 0, 2, 4, ... or 0, "
            f"3, 6, .... PEFT 0.20 and later drop some when they save; take the state_dict of the live model."
        )
    dense = [slots[slot] for slot in sorted(slots)]
    for before, after in pairwise(dense):
        if before["kernel"].shape[-1] != after["kernel"].shape[0]:
            raise FormatError(
                f"an incomplete X-LoRA classifier: a layer of {before['kernel'].shape[-1]} outputs stands before one "
                f"of {after['kernel'].shape[0]} inputs."
            )
    return {f"dense_{i}": parts for i, parts in enumerate(dense)}


def classifier_to_torch(params: Mapping[str, Mapping[str, Any]], config: XLoraConfig) -> dict[str, Any]:
    """Return the state dict for PEFT's `XLoraClassifier` from the parameters of our classifier.

    Args:
        params: `{"dense_0": {"kernel": [inputs, outputs], "bias": [outputs]}, ...}`.
        config: settings of the classifier; depth and dropout decide PEFT's numbers of the layers.

    Returns:
        `{"layers.0.weight": tensor, ...}`, for `load_state_dict`, in the parameters' dtypes.

    Raises:
        FormatError: the parameters are of another depth than the settings.
    """
    wanted = [f"dense_{i}" for i in range(config.xlora_depth)]
    if sorted(params) != sorted(wanted):
        raise FormatError(f"the classifier has {listed(sorted(params))}; expected {listed(wanted)} (xlora_depth).")
    linears = [(np.asarray(params[name]["kernel"]), np.asarray(params[name]["bias"])) for name in wanted]
    return {name: to_torch(array) for name, array in classifier_tensors("peft", config, linears).items()}
