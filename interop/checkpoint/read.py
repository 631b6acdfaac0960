"""Reading of X-LoRA checkpoints in any layout.

| layout | settings | classifier | experts |
|---|---|---|---|
| peft | adapter_config.json | adapter_model.safetensors or .bin | by paths in the settings; ours in experts/0, 1, ... |
| xlora | xlora_config.json | xlora_classifier.safetensors or .pt | folders by name |
| mistralrs | xlora_config.json | xlora_classifier.safetensors | <name>.safetensors and <name>.json |

Every checkpoint that this library writes also has `xlora_ordering.json`, mistral.rs's ordering file, with the experts'
names and the numbers of the adapted layers. PEFT requires experts named "0", "1", ..., so in its layout only this file
has the names.
"""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from interop.checkpoint.layouts import (
    CLASSIFIER_NAMES,
    PEFT_HEAD_PREFIX,
    PEFT_PREFIX,
    XLORA_CLASSIFIER_STEM,
    XLORA_CONFIG_FILE,
    Layout,
    Linear,
    Ordering,
    XLoraCheckpoint,
    read_ordering,
)
from interop.checkpoint.places import find_expert, find_original_expert, folders_of_experts
from interop.peft.adapter import WEIGHTS_STEM
from interop.peft.config import ADAPTER_CONFIG_FILE
from interop.storage.errors import FormatError, brief, listed
from interop.storage.files import file_in, read_json
from interop.storage.tensors import (
    LazyTensor,
    open_file,
    open_tensors,
    read_finite,
)
from xlora_jax.config import XLoraConfig

__all__ = ["read_xlora"]

_MAX_DEPTH = 1000
_FIELDS = tuple(field.name for field in dataclasses.fields(XLoraConfig))


def read_xlora(directory: str | os.PathLike[str]) -> XLoraCheckpoint:
    """Read an X-LoRA checkpoint of any layout.

    Args:
        directory: directory of the checkpoint; for a hub id see `interop.storage.hub.resolve`.

    Raises:
        FileNotFoundError: the directory has no X-LoRA checkpoint.
        FormatError: the checkpoint is broken, incomplete or not supported; the message names file, tensor or field.
    """
    directory = Path(directory)
    ordering = read_ordering(directory)
    config_path = file_in(directory, XLORA_CONFIG_FILE)
    if config_path is not None:
        return _read_original(directory, config_path, ordering)
    config_path = file_in(directory, ADAPTER_CONFIG_FILE)
    if config_path is not None:
        return _read_peft(directory, config_path, ordering)
    raise FileNotFoundError(
        f"{directory}: no X-LoRA checkpoint; expected {ADAPTER_CONFIG_FILE} (PEFT) or {XLORA_CONFIG_FILE} (the "
        f"original)."
    )


# Fields of PEFT's config beyond the 13, without effect on the forward pass.
_PEFT_EXTRAS = (
    "peft_type", "task_type", "inference_mode", "auto_mapping", "base_model_name_or_path", "revision", "peft_version"
)  # fmt: skip
_ORIGINAL_EXTRAS = ("base_model_id", "use_bias", "enable_relu_and_dropout", "device", "stop_token_id")
_NEUTRAL: tuple[object, ...] = (None, False, "", [], {})


def _split(content: Mapping[str, Any], known: Sequence[str], where: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the 13 fields, and the others; raise FormatError for an unknown field with a value that is not empty."""
    fields = {name: value for name, value in content.items() if name in _FIELDS}
    extras = {name: value for name, value in content.items() if name not in _FIELDS}
    for name, value in extras.items():
        if name not in known and not any(type(value) is type(n) and value == n for n in _NEUTRAL):
            raise FormatError(
                f"{where}: unknown field {name!r} = {brief(value)}. It may change what the checkpoint means; remove it "
                f"if you know that it doesn't, or update this library."
            )
    return fields, extras


def _config(fields: Mapping[str, Any], where: Path) -> XLoraConfig:
    try:
        config = XLoraConfig.from_dict(fields)
    except (TypeError, ValueError) as error:
        raise FormatError(f"{where}: {error}") from error
    if config.xlora_depth > _MAX_DEPTH:
        raise FormatError(f"{where}: xlora_depth is {config.xlora_depth}; expected at most {_MAX_DEPTH}.")
    return config


def _read_peft(directory: Path, config_path: Path, ordering: Ordering) -> XLoraCheckpoint:
    content = read_json(config_path)
    if content.get("peft_type") != "XLORA":
        raise FormatError(f"{config_path}: peft_type is {content.get('peft_type')!r}; expected 'XLORA'.")
    fields, extras = _split(content, _PEFT_EXTRAS, config_path)
    if ordering.task_type is not None:
        extras["task_type"] = ordering.task_type
    extras["quantized"] = ordering.quantized
    paths = fields.get("adapters") or {}
    if not isinstance(paths, dict) or not all(isinstance(path, str) for path in paths.values()):
        raise FormatError(f"{config_path}: adapters should be an object of name to path, got {brief(paths)}.")
    numbers = [str(i) for i in range(len(paths))]
    if paths.keys() == set(numbers):
        paths = {number: paths[number] for number in numbers}  # PEFT sorts them as text, "10" before "2"
    elif list(paths) == sorted(paths) and len(paths) > 1:
        warnings.warn(
            f"{config_path}: PEFT sorts the experts by name when it saves ({listed(paths)}); if they were trained in "
            f"another order, pass adapters= in that order.",
            UserWarning,
            stacklevel=3,
        )
    names = ordering.names if ordering.names is not None and len(ordering.names) == len(paths) else list(paths)
    adapters = {name: find_expert(directory, path) for name, path in zip(names, paths.values(), strict=True)}
    config = _config(fields | {"adapters": dict(zip(names, paths.values(), strict=True))}, config_path)
    stored = open_tensors(directory, WEIGHTS_STEM)
    head = {
        name.removeprefix(PEFT_HEAD_PREFIX): read_finite(tensor)
        for name, tensor in stored.items()
        if name.startswith(PEFT_HEAD_PREFIX)
    }
    tensors = _without_prefix({name: t for name, t in stored.items() if not name.startswith(PEFT_HEAD_PREFIX)})
    wanted = [
        f"{name}.{part}"
        for name in CLASSIFIER_NAMES["peft"].names(config.xlora_depth, config.xlora_dropout_p)
        for part in ("weight", "bias")
    ]
    missing = [name for name in wanted if name not in tensors]
    if missing:
        tensors |= _recovered(directory, missing)
    classifier = _read_classifier(tensors, "peft", config, len(adapters), ordering.layers, directory)
    return XLoraCheckpoint(directory, "peft", config, classifier, adapters, ordering.layers, extras, head)


def _without_prefix(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    return {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in tensors.items()}


def _recovered(directory: Path, missing: Sequence[str]) -> dict[str, LazyTensor]:
    """Return the tensors that PEFT left out of the checkpoint's file, from the numbered folders beside the file.

    When PEFT 0.20 and later save the X-LoRA adapter, they leave out every tensor with `.{name of an adapter}.` in its
    key, and experts are named by numbers. When they save expert i, they remove `.i` from the keys instead. So layer i
    of the classifier is in the folder of expert i, without its number.
    """
    found: dict[str, LazyTensor] = {}
    for name in missing:
        slot, part = name.removeprefix("layers.").split(".")
        folder = directory / slot
        if folder.is_dir() and folder.resolve().is_relative_to(directory.resolve()):
            try:
                tensors = open_tensors(folder, WEIGHTS_STEM)
            except FileNotFoundError:
                continue
            key = f"{PEFT_PREFIX}layers.{part}"
            if key in tensors:
                found[name] = tensors[key]
    lost = [name for name in missing if name not in found]
    reason = (
        "PEFT 0.20 and later drop tensors of the classifier whose number is also the name of an expert when they save "
        "(and fill them with random values when they load)"
    )
    if lost:
        raise FormatError(
            f"{directory}: the classifier is incomplete, without {listed(lost)}. {reason}. They are not in the "
            f"numbered folders beside either: save the model again with PEFT up to 0.19.1, or hand the live model over "
            f"by classifier_from_torch."
        )
    warnings.warn(
        f"{directory}: {listed(missing)} were recovered from the numbered folders beside: {reason}.",
        UserWarning,
        stacklevel=4,
    )
    return found


def _read_original(directory: Path, config_path: Path, ordering: Ordering) -> XLoraCheckpoint:
    fields, extras = _split(read_json(config_path), _ORIGINAL_EXTRAS, config_path)
    given = fields.get("adapters")
    if isinstance(given, list):
        if not all(isinstance(name, str) and name for name in given):
            raise FormatError(f"{config_path}: adapters should be a list of names, got {brief(given)}.")
        if len(set(given)) < len(given):
            raise FormatError(f"{config_path}: two experts of one name in adapters: {listed(given)}.")
        given = dict.fromkeys(given, "")
    elif given is not None and not isinstance(given, dict):
        raise FormatError(f"{config_path}: adapters should be a list of names, got {brief(given)}.")
    given = given or dict.fromkeys(ordering.names or folders_of_experts(directory), "")
    adapters = {name: find_original_expert(directory, name, path) for name, path in given.items()}
    config = _config(fields | {"adapters": {name: path or name for name, path in adapters.items()}}, config_path)
    for name in ("use_bias", "enable_relu_and_dropout"):
        if type(extras.get(name, True)) is not bool:
            raise FormatError(f"{config_path}: {name} should be true or false, got {brief(extras[name])}.")
    if config.xlora_depth > 1 and not extras.get("enable_relu_and_dropout", True):
        raise FormatError(
            f"{config_path}: enable_relu_and_dropout is false: a classifier of {config.xlora_depth} linear layers "
            f"without activation between them has no equivalent in PEFT or here. Train it again with ReLU."
        )
    candidates = [f"{XLORA_CLASSIFIER_STEM}{extension}" for extension in (".safetensors", ".pt")]
    path = next((path for name in candidates if (path := file_in(directory, name))), None)
    if path is None:
        raise FileNotFoundError(f"{directory}: no {' or '.join(candidates)}.")
    tensors = open_file(path)
    # Up to depth 2 the classifier's tensors have the same names in both layouts; the experts' files differ.
    consecutive = "inner.1.weight" in tensors
    flat = config.xlora_depth <= 2 and any(str(place).endswith(".safetensors") for place in adapters.values())
    layout: Layout = "mistralrs" if consecutive or flat else "xlora"
    classifier = _read_classifier(tensors, layout, config, len(adapters), ordering.layers, directory)
    extras["quantized"] = ordering.quantized
    return XLoraCheckpoint(directory, layout, config, classifier, adapters, ordering.layers, extras)


def _read_classifier(
    tensors: Mapping[str, LazyTensor],
    layout: Layout,
    config: XLoraConfig,
    experts: int,
    layers: Sequence[str] | None,
    directory: Path,
) -> list[Linear]:
    if experts == 0:
        raise FormatError(f"{directory}: no experts at all; the settings should name them in adapters.")
    names = CLASSIFIER_NAMES[layout].names(config.xlora_depth, config.xlora_dropout_p)
    known = {f"{name}.{part}" for name in names for part in ("weight", "bias")}
    unexpected = [name for name in tensors if name not in known]
    missing = [f"{name}.weight" for name in names if f"{name}.weight" not in tensors]
    if missing or unexpected:
        raise FormatError(
            f"{directory}: not the classifier that the settings describe (xlora_depth {config.xlora_depth}, "
            f"xlora_dropout_p {config.xlora_dropout_p}): missing {listed(missing) or 'nothing'}, unexpected "
            f"{listed(unexpected) or 'nothing'}."
        )
    classifier: list[Linear] = []
    for i, name in enumerate(names):
        weight, bias = tensors[f"{name}.weight"], tensors.get(f"{name}.bias")
        inputs = config.hidden_size if i == 0 else config.xlora_size
        outputs = config.xlora_size if i < len(names) - 1 else _outputs(config, experts, layers, weight)
        for tensor, shape in ((weight, (outputs, inputs)), (bias, (outputs,))):
            if tensor is not None and tensor.shape != shape:
                raise FormatError(
                    f"{tensor.file}: {tensor.name!r} has shape {list(tensor.shape)}; expected {list(shape)} for "
                    f"hidden_size {config.hidden_size}, xlora_size {config.xlora_size}, {experts} experts, "
                    f"layerwise_scalings {config.layerwise_scalings}."
                )
        classifier.append((read_finite(weight).T, None if bias is None else read_finite(bias)))
    lacking = [
        f"{name}.bias {list(weight.shape[1:])}"
        for name, (weight, bias) in zip(names, classifier, strict=True)
        if bias is None
    ]
    if lacking:
        raise FormatError(
            f"{directory}: the classifier has no bias (use_bias false), which neither PEFT nor this library has. Zeros "
            f"compute the same: add {', '.join(lacking)} of zeros to {tensors[f'{names[0]}.weight'].file.name} and set "
            f"use_bias to true in {XLORA_CONFIG_FILE}."
        )
    return classifier


def _outputs(config: XLoraConfig, experts: int, layers: Sequence[str] | None, weight: LazyTensor) -> int:
    """Return the required outputs of the last layer; any multiple of the experts if the layer count is unknown."""
    if not config.layerwise_scalings:
        return experts
    if layers is not None:
        return experts * len(layers)
    return math.prod(weight.shape[:1]) // experts * experts
