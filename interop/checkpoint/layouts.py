"""The checkpoint layouts: file names, classifier tensor names, and the ordering file.

Axis legend: D hidden size, S classifier size, N experts, L adapted layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from numpy.typing import NDArray

from interop.peft.adapter import WEIGHTS_STEM
from interop.peft.config import ADAPTER_CONFIG_FILE
from interop.storage.errors import FormatError, brief, listed
from interop.storage.files import file_in, read_json
from xlora_jax.config import XLoraConfig

__all__ = [
    "CARD_FILE",
    "CLASSIFIER_NAMES",
    "EXPERTS_FOLDER",
    "FIXED_ENTRIES",
    "ORDERING_FILE",
    "PEFT_HEAD_PREFIX",
    "PEFT_PREFIX",
    "UNHELD_TASKS",
    "XLORA_CLASSIFIER_STEM",
    "XLORA_CONFIG_FILE",
    "ClassifierNames",
    "Layout",
    "Linear",
    "Ordering",
    "XLoraCheckpoint",
    "classifier_tensors",
    "read_ordering",
]

Layout = Literal["peft", "xlora", "mistralrs"]
Linear = tuple[NDArray[Any], NDArray[Any] | None]
XLORA_CONFIG_FILE = "xlora_config.json"
XLORA_CLASSIFIER_STEM = "xlora_classifier"
ORDERING_FILE = "xlora_ordering.json"
EXPERTS_FOLDER = "experts"
CARD_FILE = "README.md"

FIXED_ENTRIES = (
    ADAPTER_CONFIG_FILE,
    f"{WEIGHTS_STEM}.safetensors",
    f"{XLORA_CLASSIFIER_STEM}.safetensors",
    XLORA_CONFIG_FILE,
    ORDERING_FILE,
    EXPERTS_FOLDER,
    CARD_FILE,
)


@dataclass(frozen=True, eq=False)
class XLoraCheckpoint:
    """The contents of an X-LoRA checkpoint.

    Attributes:
        directory: directory of the checkpoint.
        layout: "peft", "xlora" or "mistralrs".
        config: X-LoRA settings.
        classifier: (weight [inputs, outputs], bias [outputs]) of each linear layer, in order, in stored dtypes.
        adapters: expert name to directory or hub id, in the order of the classifier's outputs; None for an expert that
            was not found.
        layer_names: adapted layers in the order of their numbers; None if the checkpoint doesn't store them.
        extras: other settings: `task_type`, `base_model_name_or_path`, `peft_version`, ...; `quantized`, the
            quantization of the base that the gate was saved on, or None.
        head: tensors of the classification head, by Hugging Face name and in torch's layout; empty if the base's own
            head is used.
    """

    directory: Path
    layout: Layout
    config: XLoraConfig
    classifier: Sequence[Linear]
    adapters: Mapping[str, str | None]
    layer_names: Sequence[str] | None
    extras: Mapping[str, Any]
    head: Mapping[str, NDArray[Any]] = field(default_factory=dict)


PEFT_PREFIX = "base_model.internal_xlora_classifier."
# PEFT loads every tensor of the file into the module of that name, so a head can be stored under its module's name.
PEFT_HEAD_PREFIX = "base_model.lora_model.model."


@dataclass(frozen=True)
class ClassifierNames:
    """Names of the linear layers. In a `Sequential`, activations and dropouts take numbers too."""

    inner: str
    last: str
    stride: int
    stride_without_dropout: int

    def names(self, depth: int, dropout: float) -> list[str]:
        """Return the name of each linear layer of a classifier of that depth and dropout."""
        stride = self.stride if dropout > 0 else self.stride_without_dropout
        return [
            (self.inner if i < depth - 1 else self.last).format(stride * i)
            for i in range(depth)
        ]  # fmt: skip


CLASSIFIER_NAMES: dict[Layout, ClassifierNames] = {
    "peft": ClassifierNames("layers.{}", "layers.{}", 3, 2),  # Linear, ReLU, Dropout if p > 0
    "xlora": ClassifierNames("inner.{}", "last", 3, 3),  # Linear, ReLU, Dropout whatever p
    "mistralrs": ClassifierNames("inner.{}", "last", 1, 1),
}


def classifier_tensors(layout: Layout, config: XLoraConfig, classifier: Sequence[Linear]) -> dict[str, NDArray[Any]]:
    """Return the classifier's tensors under the layout's names, in torch's orientation."""
    tensors: dict[str, NDArray[Any]] = {}
    names = CLASSIFIER_NAMES[layout].names(config.xlora_depth, config.xlora_dropout_p)
    for name, (weight, bias) in zip(names, classifier, strict=True):
        tensors[f"{name}.weight"] = weight.T
        if bias is not None:
            tensors[f"{name}.bias"] = bias
    return tensors


# Task types whose PEFT model class can't hold an X-LoRA (0.21.2: TypeError). PEFT's general class can, so the task type
# is left out of PEFT's settings and kept in the ordering file.
UNHELD_TASKS = ("TOKEN_CLS",)


@dataclass(frozen=True)
class Ordering:
    """The contents of an ordering file; None if absent.

    Attributes:
        names: expert names.
        layers: adapted layers by number.
        task_type: PEFT's task type.
        quantized: quantization of the base that the gate was saved on.
    """

    names: Sequence[str] | None = None
    layers: Sequence[str] | None = None
    task_type: str | None = None
    quantized: str | None = None


def read_ordering(directory: Path) -> Ordering:
    """Read the ordering file of a directory; without a file, all fields are None."""
    path = file_in(directory, ORDERING_FILE)
    if path is None:
        return Ordering()
    content = read_json(path)
    names, layers = content.get("order"), content.get("layers")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) and name for name in names)):
        raise FormatError(f"{path}: order should be a list of the experts' names, got {brief(names)}.")
    if names is not None and len(set(names)) < len(names):
        raise FormatError(f"{path}: two experts of one name in order: {listed(names)}.")
    if layers is not None:
        numbers = list(layers.values()) if isinstance(layers, dict) else []
        whole = isinstance(layers, dict) and all(type(number) is int for number in numbers)
        if not whole or sorted(numbers) != list(range(len(numbers))):
            raise FormatError(
                f"{path}: layers should number the adapted layers from 0, each once, got {brief(layers)}."
            )
        layers = sorted(layers, key=layers.__getitem__)
    task_type = content.get("task_type")
    if task_type not in (None, *UNHELD_TASKS):
        raise FormatError(f"{path}: task_type should be one of {listed(UNHELD_TASKS)}, got {brief(task_type)}.")
    quantized = content.get("quantized")
    if quantized is not None and not isinstance(quantized, str):
        raise FormatError(f"{path}: quantized should name a quantization of the base, got {brief(quantized)}.")
    return Ordering(names, layers, task_type, quantized)
