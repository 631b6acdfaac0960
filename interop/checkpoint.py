"""X-LoRA checkpoints as data: PEFT's layout, the original one, and the one that mistral.rs reads; in and out.

| layout | settings | classifier | experts |
|---|---|---|---|
| peft | adapter_config.json | adapter_model.safetensors or .bin | by paths in the settings; ours in experts/0, 1, ... |
| xlora | xlora_config.json | xlora_classifier.safetensors or .pt | folders by name |
| mistralrs | xlora_config.json | xlora_classifier.safetensors | <name>.safetensors and <name>.json |

What is written here has, in every layout, `xlora_ordering.json` beside: mistral.rs's ordering file, with the experts'
names and the numbers of the adapted layers. PEFT wants experts named "0", "1", ..., so there it keeps the names.

PEFT takes the experts' paths from its JSON as they stand, relative to the working directory, and ignores the argument
`adapters=` of `PeftModel.from_pretrained` (it reads `config=`). So they are written as absolute paths, and where the
directory has moved `repoint` rewrites them: `python -c "import interop; interop.repoint('DIR')"`.

Axis legend: D hidden size, S classifier size, N experts, L adapted layers.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from interop.atomic import replacing
from interop.card import model_card
from interop.errors import FormatError, brief, listed
from interop.files import file_in, read_json, write_json
from interop.hub import is_hub_id
from interop.lora import CONFIG_FILE, WEIGHTS_STEM, LoraAdapter, adapter_config, adapter_tensors, renamed, write_lora
from interop.tensors import (
    LazyTensor,
    from_torch,
    open_file,
    open_tensors,
    read_finite,
    to_torch,
    write_safetensors,
)
from xlora_jax.atomic import replace_text
from xlora_jax.config import XLoraConfig

Layout = Literal["peft", "xlora", "mistralrs"]
Linear = tuple[NDArray[Any], NDArray[Any] | None]

XLORA_CONFIG_FILE = "xlora_config.json"
XLORA_CLASSIFIER_STEM = "xlora_classifier"
ORDERING_FILE = "xlora_ordering.json"
EXPERTS_FOLDER = "experts"
_CARD_FILE = "README.md"
_FIXED_ENTRIES = (
    CONFIG_FILE,
    f"{WEIGHTS_STEM}.safetensors",
    f"{XLORA_CLASSIFIER_STEM}.safetensors",
    XLORA_CONFIG_FILE,
    ORDERING_FILE,
    EXPERTS_FOLDER,
    _CARD_FILE,
)
_MAX_DEPTH = 1000
_MAX_PATH = 4096
_MAX_NAME = 200
_FIELDS = tuple(field.name for field in dataclasses.fields(XLoraConfig))


@dataclass(frozen=True, eq=False)
class XLoraCheckpoint:
    """A trained X-LoRA as it stands in files.

    Attributes:
        directory: where it was read from.
        layout: "peft", "xlora" or "mistralrs".
        config: its settings.
        classifier: (weight [inputs, outputs], bias [outputs]) of its linear layers, in order, in stored dtypes.
        adapters: expert name to directory or hub id, in the order of the classifier's outputs; None where the
            checkpoint names one that isn't to be found.
        layer_names: the adapted layers by their numbers, or None where the checkpoint doesn't tell.
        extras: what else its settings hold: `task_type`, `base_model_name_or_path`, `peft_version`, ...
        head: tensors of the classification head, by Hugging Face name and in torch's layout; none where the base's own
            is used.
    """

    directory: Path
    layout: Layout
    config: XLoraConfig
    classifier: Sequence[Linear]
    adapters: Mapping[str, str | None]
    layer_names: Sequence[str] | None
    extras: Mapping[str, Any]
    head: Mapping[str, NDArray[Any]] = field(default_factory=dict)


# ---------------------------------------------------------------------------------------------------------------------
# Where each linear layer of the classifier stands in a layout

_PEFT_PREFIX = "base_model.internal_xlora_classifier."
# PEFT loads every tensor of the file into the module of that name: so a head can stand there under its own.
_PEFT_HEAD_PREFIX = "base_model.lora_model.model."


@dataclass(frozen=True)
class _Slots:
    """Names of the linear layers. Activation and dropout take numbers too where modules stand in one sequence."""

    inner: str
    last: str
    stride: int
    stride_without_dropout: int

    def names(self, depth: int, dropout: float) -> list[str]:
        stride = self.stride if dropout > 0 else self.stride_without_dropout
        return [
            (self.inner if i < depth - 1 else self.last).format(stride * i)
            for i in range(depth)
        ]  # fmt: skip


_SLOTS: dict[Layout, _Slots] = {
    "peft": _Slots("layers.{}", "layers.{}", 3, 2),  # Linear, ReLU, Dropout if p > 0
    "xlora": _Slots("inner.{}", "last", 3, 3),  # Linear, ReLU, Dropout whatever p
    "mistralrs": _Slots("inner.{}", "last", 1, 1),
}


def _classifier_tensors(layout: Layout, config: XLoraConfig, classifier: Sequence[Linear]) -> dict[str, NDArray[Any]]:
    """The classifier under the layout's names, in torch's orientation."""
    tensors: dict[str, NDArray[Any]] = {}
    names = _SLOTS[layout].names(config.xlora_depth, config.xlora_dropout_p)
    for name, (weight, bias) in zip(names, classifier, strict=True):
        tensors[f"{name}.weight"] = weight.T
        if bias is not None:
            tensors[f"{name}.bias"] = bias
    return tensors


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_xlora(directory: str | os.PathLike[str]) -> XLoraCheckpoint:
    """Reads an X-LoRA checkpoint of any layout.

    Args:
        directory: of the checkpoint; for a hub id see `interop.hub.resolve`.

    Raises:
        FileNotFoundError: no X-LoRA checkpoint there.
        FormatError: one that is broken, incomplete, or can't be expressed; the message names file, tensor or field.
    """
    directory = Path(directory)
    ordering = _read_ordering(directory)
    config_path = file_in(directory, XLORA_CONFIG_FILE)
    if config_path is not None:
        return _read_original(directory, config_path, ordering)
    config_path = file_in(directory, CONFIG_FILE)
    if config_path is not None:
        return _read_peft(directory, config_path, ordering)
    raise FileNotFoundError(
        f"{directory}: no X-LoRA checkpoint; expected {CONFIG_FILE} (PEFT) or {XLORA_CONFIG_FILE} (the original)."
    )


# PEFT's class of models for these can't hold an X-LoRA (0.21.2: TypeError), its general one can: so in PEFT's settings
# there is none, and the ordering file keeps it.
_UNHELD_TASKS = ("TOKEN_CLS",)


@dataclass(frozen=True)
class _Ordering:
    names: Sequence[str] | None = None
    layers: Sequence[str] | None = None
    task_type: str | None = None


def _read_ordering(directory: Path) -> _Ordering:
    path = file_in(directory, ORDERING_FILE)
    if path is None:
        return _Ordering()
    content = read_json(path)
    names, layers = content.get("order"), content.get("layers")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) and name for name in names)):
        raise FormatError(f"{path}: order should be a list of the experts' names, got {brief(names)}.")
    if names is not None and len(set(names)) < len(names):
        raise FormatError(f"{path}: two experts of one name in order: {listed(names)}.")
    if layers is not None:
        numbers = list(layers.values()) if isinstance(layers, dict) else []
        if not all(type(number) is int for number in numbers) or sorted(numbers) != list(range(len(layers))):
            raise FormatError(
                f"{path}: layers should number the adapted layers from 0, each once, got {brief(layers)}."
            )
        layers = sorted(layers, key=layers.__getitem__)
    task_type = content.get("task_type")
    if task_type not in (None, *_UNHELD_TASKS):
        raise FormatError(f"{path}: task_type should be one of {listed(_UNHELD_TASKS)}, got {brief(task_type)}.")
    return _Ordering(names, layers, task_type)


# Fields of PEFT's configs beside the 13, without effect on the forward pass.
_PEFT_EXTRAS = (
    "peft_type", "task_type", "inference_mode", "auto_mapping", "base_model_name_or_path", "revision", "peft_version"
)  # fmt: skip
_ORIGINAL_EXTRAS = ("base_model_id", "use_bias", "enable_relu_and_dropout", "device", "stop_token_id")
_NEUTRAL: tuple[object, ...] = (None, False, "", [], {})


def _split(content: Mapping[str, Any], known: Sequence[str], where: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The 13 fields, and the others. Raises FormatError for one that is known to neither, unless it says nothing."""
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


def _read_peft(directory: Path, config_path: Path, ordering: _Ordering) -> XLoraCheckpoint:
    content = read_json(config_path)
    if content.get("peft_type") != "XLORA":
        raise FormatError(f"{config_path}: peft_type is {content.get('peft_type')!r}; expected 'XLORA'.")
    fields, extras = _split(content, _PEFT_EXTRAS, config_path)
    if ordering.task_type is not None:
        extras["task_type"] = ordering.task_type
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
        name.removeprefix(_PEFT_HEAD_PREFIX): read_finite(tensor)
        for name, tensor in stored.items()
        if name.startswith(_PEFT_HEAD_PREFIX)
    }
    tensors = _without_prefix({name: t for name, t in stored.items() if not name.startswith(_PEFT_HEAD_PREFIX)})
    wanted = [
        f"{name}.{part}"
        for name in _SLOTS["peft"].names(config.xlora_depth, config.xlora_dropout_p)
        for part in ("weight", "bias")
    ]
    missing = [name for name in wanted if name not in tensors]
    if missing:
        tensors |= _recovered(directory, missing)
    classifier = _read_classifier(tensors, "peft", config, len(adapters), ordering.layers, directory)
    return XLoraCheckpoint(directory, "peft", config, classifier, adapters, ordering.layers, extras, head)


def _without_prefix(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    return {name.removeprefix(_PEFT_PREFIX): tensor for name, tensor in tensors.items()}


def _recovered(directory: Path, missing: Sequence[str]) -> dict[str, LazyTensor]:
    """The tensors that PEFT left out of the checkpoint's file, from the folders that it writes beside.

    PEFT 0.20 and later leave out every tensor with `.{name of an adapter}.` in its key when they save the X-LoRA
    adapter, and experts are named by numbers. Saving expert i, they take `.i` out of the keys instead: so slot i
    stands in the folder of expert i, without its number.
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
            key = f"{_PEFT_PREFIX}layers.{part}"
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


def _read_original(directory: Path, config_path: Path, ordering: _Ordering) -> XLoraCheckpoint:
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
    given = given or dict.fromkeys(ordering.names or _folders_of_experts(directory), "")
    adapters = {name: _original_expert(directory, name, path) for name, path in given.items()}
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
    # Up to depth 2 the classifier's tensors have the same names in both; there the experts' files tell.
    consecutive = "inner.1.weight" in tensors
    flat = config.xlora_depth <= 2 and any(str(place).endswith(".safetensors") for place in adapters.values())
    layout: Layout = "mistralrs" if consecutive or flat else "xlora"
    classifier = _read_classifier(tensors, layout, config, len(adapters), ordering.layers, directory)
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
    names = _SLOTS[layout].names(config.xlora_depth, config.xlora_dropout_p)
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
    """What the last layer's outputs must be; any multiple of the experts where the number of layers isn't known."""
    if not config.layerwise_scalings:
        return experts
    if layers is not None:
        return experts * len(layers)
    return math.prod(weight.shape[:1]) // experts * experts


# ---------------------------------------------------------------------------------------------------------------------
# The experts' places


def find_expert(directory: Path, path: str) -> str | None:
    """Where the expert is that a checkpoint in PEFT's layout gives as `path`.

    That is the folder of the checkpoint that the path ends in (the directory may have moved, its experts with it), else
    the path itself if there is a directory, else a hub id.
    """
    # No file system takes longer paths; a name that is too long, or holds a zero, is no directory's either.
    if len(path) > _MAX_PATH:
        raise FormatError(f"{directory}: an expert's path has {len(path)} characters; expected at most {_MAX_PATH}.")
    parts = Path(path).parts
    # Of `..` and the root nothing can stand in the checkpoint: only the parts after the last of them are looked for.
    start = 1 + max((i for i, part in enumerate(parts) if part in (os.sep, "..")), default=-1)
    try:
        for first in range(start, len(parts)):
            inside = directory.joinpath(*parts[first:])
            # PEFT's own folders in a checkpoint are called 0, 1, ... and hold no adapters.
            plausible = not (first == len(parts) - 1 and parts[first].isdigit())
            if plausible and (inside / CONFIG_FILE).is_file():
                return str(inside)
        if Path(path).is_dir():
            return path
    except (OSError, ValueError) as error:
        raise FormatError(f"{directory}: the expert's path {brief(path)} can't be looked up ({error}).") from error
    return path if is_hub_id(path) else None


def _original_expert(directory: Path, name: str, path: object) -> str | None:
    if name != Path(name).name or name == ".." or len(os.fsencode(name)) > _MAX_NAME:
        raise FormatError(f"{directory}: the expert {name!r} is no folder's name.")
    if (directory / name / CONFIG_FILE).is_file():
        return str(directory / name)
    if (directory / f"{name}.json").is_file():
        return str(directory / f"{name}.safetensors")
    return find_expert(directory, path) if isinstance(path, str) and path else None


def _folders_of_experts(directory: Path) -> list[str]:
    """The original loader's order where the settings don't name the experts: that of the folders' names."""
    names = sorted(entry.name for entry in directory.iterdir() if (entry / CONFIG_FILE).is_file())
    if names:
        warnings.warn(
            f"{directory}: {XLORA_CONFIG_FILE} doesn't name the experts; taken in the order of their folders, "
            f"{listed(names)}. If they were trained in another order, pass adapters= in that order.",
            UserWarning,
            stacklevel=4,
        )
    return names


def repoint(directory: str | os.PathLike[str]) -> None:
    """Rewrites the experts' paths of a checkpoint in PEFT's layout after it was moved, so that PEFT finds them.

    Raises:
        FormatError: not a checkpoint in PEFT's layout, or an expert that is neither in the directory nor where its path
            says.
    """
    directory = Path(directory).resolve()
    path = file_in(directory, CONFIG_FILE)
    content = {} if path is None else read_json(path)
    if path is None or content.get("peft_type") != "XLORA" or not isinstance(content.get("adapters"), dict):
        raise FormatError(f"{directory}: no X-LoRA checkpoint in PEFT's layout.")
    found = {name: find_expert(directory, str(place)) for name, place in content["adapters"].items()}
    lost = [f"{name} ({content['adapters'][name]})" for name, place in found.items() if place is None]
    if lost:
        raise FormatError(f"{path}: these experts are not to be found: {listed(lost)}. Copy them into {directory}.")
    content["adapters"] = {
        name: str(Path(place).resolve()) if Path(place).is_dir() else place for name, place in found.items() if place
    }
    write_json(path, content)


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def write_xlora(
    directory: str | os.PathLike[str],
    *,
    layout: str,
    config: XLoraConfig,
    classifier: Sequence[Linear],
    adapters: Sequence[LoraAdapter],
    base_model: str,
    layer_names: Sequence[str],
    extras: Mapping[str, Any] | None = None,
    head: Mapping[str, NDArray[Any]] | None = None,
) -> None:
    """Writes a self-contained checkpoint: settings, classifier, experts, their names, a model card.

    Args:
        directory: created, or replaced as a whole if it holds an earlier save of this function.
        layout: "peft", "xlora" (the original) or "mistralrs".
        config: settings. `adapters` in it is not used.
        classifier: (kernel [inputs, outputs], bias [outputs]) of its linear layers, in order.
        adapters: the experts, in the order of the classifier's outputs.
        base_model: the base's directory or hub id, as the settings shall name it.
        layer_names: the adapted layers in the order of their numbers, by Hugging Face module path.
        extras: further fields for PEFT's settings: `task_type`, `revision`, `auto_mapping`.
        head: tensors of a classification head that is not the base's own, by Hugging Face name and in torch's layout.
            The experts are written without theirs: PEFT's X-LoRA can't load such.

    Raises:
        FormatError: what doesn't fit together, or what the layout can't express.
        FileExistsError: the directory holds something else.
    """
    if layout not in get_args(Layout):
        raise FormatError(f"layout {layout!r}; expected one of {', '.join(get_args(Layout))}.")
    target = Path(directory).expanduser().resolve()
    names = [adapter.name for adapter in adapters]
    _check_model(config, classifier, names, layer_names)
    if head and layout != "peft":
        raise FormatError(f"layout {layout!r} has no place for a classification head ({listed(head)}); use 'peft'.")
    adapters = [renamed(adapter, layer_names).without_head() for adapter in adapters]
    scaling_pass_value = config.scaling_pass_gate(len(names))
    config = dataclasses.replace(config, adapters=dict.fromkeys(names, ""), scaling_pass_value=scaling_pass_value)
    task_type = (extras or {}).get("task_type", "CAUSAL_LM")
    ordering: dict[str, Any] = {
        "base_model_id": base_model,
        "order": names,
        "layers": {name: number for number, name in enumerate(layer_names)},
    }
    if task_type in _UNHELD_TASKS:
        ordering["task_type"] = task_type
    with replacing(target, owned=_owned(target)) as partial:
        write_json(partial / ORDERING_FILE, ordering)
        labels = len(head[max(head)]) if head else None  # of RoBERTa's two layers the output's name is the later one
        card = model_card(layout, config, adapters, base_model, len(layer_names), task_type, labels)
        replace_text(partial / _CARD_FILE, card)
        if layout == "peft":
            _write_peft(partial, target, config, classifier, adapters, base_model, task_type, extras or {}, head or {})
        elif layout == "xlora":
            _write_original(partial, config, classifier, adapters, base_model)
        else:
            _write_mistralrs(partial, config, classifier, adapters, base_model, layer_names)


def _owned(target: Path) -> list[str]:
    """What an earlier save left there; nothing, so that nothing is replaced, where there was none."""
    try:
        names = _read_ordering(target).names if target.is_dir() else None
    except FormatError:
        names = None
    if names is None:
        return []
    return [
        re.sub(r"([*?[])", r"[\1]", form) for name in names for form in (name, f"{name}.json", f"{name}.safetensors")
    ] + [*_FIXED_ENTRIES]


def _check_model(
    config: XLoraConfig, classifier: Sequence[Linear], names: Sequence[str], layer_names: Sequence[str]
) -> None:
    if not names:
        raise FormatError("no experts: an X-LoRA checkpoint needs at least one.")
    if len(set(names)) < len(names):
        raise FormatError(f"two experts of one name: {listed(names)}; load_lora(..., name=...) gives another.")
    config.validate_experts(len(names))
    widths = [config.hidden_size] + [config.xlora_size] * (config.xlora_depth - 1)
    widths.append(len(names) * (len(layer_names) if config.layerwise_scalings else 1))
    shapes = [(weight.shape, None if bias is None else bias.shape) for weight, bias in classifier]
    expected = [((widths[i], widths[i + 1]), (widths[i + 1],)) for i in range(config.xlora_depth)]
    if shapes != expected:
        raise FormatError(
            f"the classifier has layers (weight, bias) of {shapes}; expected {expected} for {len(names)} experts, "
            f"{len(layer_names)} adapted layers and the settings' depth and sizes."
        )


def _write_peft(
    partial: Path,
    target: Path,
    config: XLoraConfig,
    classifier: Sequence[Linear],
    adapters: Sequence[LoraAdapter],
    base_model: str,
    task_type: str | None,
    extras: Mapping[str, Any],
    head: Mapping[str, NDArray[Any]],
) -> None:
    outside = sorted({path for adapter in adapters for path in adapter.layers if not path.startswith("model.")})
    if outside:
        shown = ", ".join(outside[:3]) + (", ..." if len(outside) > 3 else "")
        warnings.warn(
            f"experts adapt {shown}: PEFT itself refuses to load an X-LoRA with modules outside of `model.` (seen with "
            f"0.21); it loads here.",
            UserWarning,
            stacklevel=4,
        )
    for number, adapter in enumerate(adapters):
        folder = partial / EXPERTS_FOLDER / str(number)
        folder.mkdir(parents=True)
        write_lora(adapter, folder)
    fields = config.to_dict() | {
        "adapters": {str(i): str(target / EXPERTS_FOLDER / str(i)) for i in range(len(adapters))}
    }
    beside = {
        "peft_type": "XLORA",
        "task_type": None if task_type in _UNHELD_TASKS else task_type,
        "base_model_name_or_path": base_model,
        "revision": extras.get("revision"),
        "auto_mapping": extras.get("auto_mapping"),
        "inference_mode": True,
    }
    write_json(partial / CONFIG_FILE, beside | fields)
    tensors = _classifier_tensors("peft", config, classifier)
    write_safetensors(
        partial / f"{WEIGHTS_STEM}.safetensors",
        {_PEFT_PREFIX + name: tensor for name, tensor in tensors.items()}
        | {_PEFT_HEAD_PREFIX + name: tensor for name, tensor in head.items()},
    )


_FOLDER_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def _original_settings(config: XLoraConfig, adapters: Sequence[LoraAdapter], base_model: str) -> dict[str, Any]:
    settings = config.to_dict() | {"adapters": [adapter.name for adapter in adapters]}
    return {"base_model_id": base_model, "use_bias": True, "enable_relu_and_dropout": True} | settings


def _check_names(layout: str, names: Sequence[str]) -> None:
    for name in names:
        if not _FOLDER_NAME.fullmatch(name) or name in _FIXED_ENTRIES:
            raise FormatError(
                f"layout {layout!r} stores experts under their names, and {name!r} is no name for a file; use letters, "
                f"digits, '_', '-' and '.', or layout 'peft'."
            )


def _write_original(
    partial: Path,
    config: XLoraConfig,
    classifier: Sequence[Linear],
    adapters: Sequence[LoraAdapter],
    base_model: str,
) -> None:
    _check_names("xlora", [adapter.name for adapter in adapters])
    for adapter in adapters:
        for path, layer in adapter.layers.items():
            if layer.kind == "embedding":
                raise FormatError(
                    f"layout 'xlora': the expert {adapter.name!r} adapts the embedding {path!r}, and the original "
                    f"X-LoRA can't run such an expert (it multiplies token numbers by gates); use layout 'peft'."
                )
        (partial / adapter.name).mkdir()
        write_lora(adapter, partial / adapter.name)
    write_json(partial / XLORA_CONFIG_FILE, _original_settings(config, adapters, base_model))
    write_safetensors(
        partial / f"{XLORA_CLASSIFIER_STEM}.safetensors", _classifier_tensors("xlora", config, classifier)
    )


def _write_mistralrs(
    partial: Path,
    config: XLoraConfig,
    classifier: Sequence[Linear],
    adapters: Sequence[LoraAdapter],
    base_model: str,
    layer_names: Sequence[str],
) -> None:
    names = [adapter.name for adapter in adapters]
    _check_names("mistralrs", names)
    if config.enable_softmax_topk:
        raise FormatError(
            "layout 'mistralrs': enable_softmax_topk is not implemented in mistral.rs; use layout 'peft'."
        )
    files = {
        XLORA_CONFIG_FILE: _original_settings(config, adapters, base_model)
        | {"xlora_dropout_p": 0.0},  # mistral.rs applies the classifier's dropout when it generates
        **{f"{adapter.name}.json": _mistralrs_expert(adapter, adapters[0], layer_names) for adapter in adapters},
    }
    for name, content in files.items():
        write_json(partial / name, content)
    write_safetensors(
        partial / f"{XLORA_CLASSIFIER_STEM}.safetensors", _classifier_tensors("mistralrs", config, classifier)
    )
    for adapter in adapters:
        write_safetensors(partial / f"{adapter.name}.safetensors", adapter_tensors(adapter))
    for name in names:  # it takes for an expert's every file whose name contains the expert's
        files_of = sorted(entry.name for entry in partial.iterdir() if name in entry.name)
        if files_of != sorted((f"{name}.json", f"{name}.safetensors")):
            raise FormatError(
                f"layout 'mistralrs': mistral.rs finds an expert's files by its name as a part of theirs, and {name!r} "
                f"is a part of {listed(files_of)}; load the expert under another name."
            )


_MISTRALRS_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_BLOCK_MODULE = re.compile(r"model\.layers\.(?P<block>\d+)\.(?:self_attn|mlp)\.(?P<module>\w+)")


def _mistralrs_expert(adapter: LoraAdapter, first: LoraAdapter, layer_names: Sequence[str]) -> dict[str, Any]:
    """The adapter's config, in the four fields that mistral.rs reads."""
    where = f"layout 'mistralrs': the expert {adapter.name!r}"
    if adapter.layers.keys() != set(layer_names):
        other = sorted(set(layer_names) - adapter.layers.keys())
        raise FormatError(
            f"{where} doesn't adapt {listed(other)}, as others do; there all experts must adapt the same."
        )
    matches = {path: _BLOCK_MODULE.fullmatch(path) for path in adapter.layers}
    odd = [path for path, match in matches.items() if match is None or match["module"] not in _MISTRALRS_MODULES]
    odd += [path for path, layer in adapter.layers.items() if layer.kind != "linear" and path not in odd]
    if odd:
        raise FormatError(f"{where} adapts {listed(odd)}; there only {listed(_MISTRALRS_MODULES)} can be adapted.")
    biased = [path for path, layer in adapter.layers.items() if layer.bias is not None]
    if biased:
        raise FormatError(f"{where} has lora_bias, which is not implemented there.")
    modules = {match["module"] for match in matches.values() if match}
    blocks = {int(match["block"]) for match in matches.values() if match}
    limited = adapter.config.get("layers_to_transform") is not None
    if limited or len(adapter.layers) != len(modules) * len(blocks) or blocks != set(range(len(blocks))):
        raise FormatError(
            f"{where} adapts {listed(sorted(modules))} in some blocks only; there a target is adapted in every block."
        )
    settings = {(layer.r, layer.scale) for layer in adapter.layers.values()}
    if len(settings) > 1:
        raise FormatError(f"{where} has layers of different (rank, scale), {sorted(settings)}; there it has one.")
    rank, scale = settings.pop()
    # alpha / r is the only scale there: rsLoRA's is written as an alpha that gives it.
    plain = {"use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}, "target_modules": sorted(modules)}
    return adapter_config(adapter) | plain | {"r": rank, "lora_alpha": scale * rank}


# ---------------------------------------------------------------------------------------------------------------------
# The classifier alone, from and to torch

_TORCH_SLOT = re.compile(
    r"(?:base_model\.)?(?:internal_xlora_classifier\.)?(?:(?:layers|inner)\.(?P<slot>\d{1,6})|last)\.(?P<part>weight|bias)"
)


def classifier_from_torch(classifier: Any) -> dict[str, dict[str, NDArray[Any]]]:
    """The parameters of our classifier from one in torch.

    Args:
        classifier: PEFT's live `XLoraClassifier`, a module that holds one (a `PeftModel`), the state dict of either,
            or that of the original xlora's classifier.

    Returns:
        `{"dense_0": {"kernel": [inputs, outputs], "bias": [outputs]}, "dense_1": ..., ...}`, in torch's dtypes.

    Raises:
        FormatError: no such state dict, or an incomplete one.
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
    """The state dict for PEFT's `XLoraClassifier` from the parameters of ours.

    Args:
        params: `{"dense_0": {"kernel": [inputs, outputs], "bias": [outputs]}, ...}`.
        config: its settings: depth and dropout tell where PEFT has which layer.

    Returns:
        `{"layers.0.weight": tensor, ...}`, for `load_state_dict`, in the parameters' dtypes.

    Raises:
        FormatError: parameters of another depth.
    """
    wanted = [f"dense_{i}" for i in range(config.xlora_depth)]
    if sorted(params) != sorted(wanted):
        raise FormatError(f"the classifier has {listed(sorted(params))}; expected {listed(wanted)} (xlora_depth).")
    linears = [(np.asarray(params[name]["kernel"]), np.asarray(params[name]["bias"])) for name in wanted]
    return {name: to_torch(array) for name, array in _classifier_tensors("peft", config, linears).items()}
