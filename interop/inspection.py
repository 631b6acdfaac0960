"""Inspection of a directory: base model, LoRA adapter or X-LoRA checkpoint, its contents, and reasons for refusal."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from interop.checkpoint.layouts import XLORA_CONFIG_FILE, XLoraCheckpoint
from interop.checkpoint.read import read_xlora
from interop.experts import fit_adapters
from interop.hf.base import blank_head, open_base
from interop.hf.config import BASE_CONFIG_FILE
from interop.hf.families.fields import NoHeadError
from interop.hf.families.table import ADAPTABLE
from interop.hf.quantized.grid import QuantizedTensor
from interop.hf.quantized.readers import open_weights
from interop.hf.torch_base import TorchFamily
from interop.model import experts_of, open_xlora
from interop.peft.adapter import LoraAdapter, load_lora
from interop.peft.config import ADAPTER_CONFIG_FILE
from interop.peft.heads import head_of
from interop.storage.errors import FormatError, listed
from interop.storage.files import file_in, read_json
from interop.storage.hub import resolve, weights_file
from xlora_jax.trees import flatten

__all__ = ["Inspection", "inspect_path"]


@dataclass
class Inspection:
    """Findings about a path, up to the first reason for refusal.

    Attributes:
        path: path or hub id as given.
        kind: "base model", "LoRA adapter", "X-LoRA checkpoint", or "unknown".
        facts: descriptions of the contents, by topic.
        notes: warnings that loading would give.
        refused: reasons why loading would fail; empty if it would not.
    """

    path: str
    kind: str = "unknown"
    facts: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


def inspect_path(dir_or_id: str | os.PathLike[str], base: str | None = None) -> Inspection:
    """Return the kind and contents of a directory or hub id, and whether it would be loaded.

    Of a base model only config.json and the headers of its weights are read; adapters and classifiers are read whole.

    Args:
        dir_or_id: directory, hub id, or weights file of an expert in mistral.rs's layout.
        base: directory or hub id of a base model, to check adapters and checkpoints against.
    """
    found = Inspection(os.fspath(dir_or_id))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            _look(found, base)
        except (ValueError, OSError, ImportError) as error:
            found.refused.append(str(error))
    found.notes += dict.fromkeys(str(warning.message) for warning in caught if warning.category is UserWarning)
    return found


def _look(found: Inspection, base: str | None) -> None:
    if weights_file(found.path) is not None:
        found.kind = "LoRA adapter"
        _look_at_adapter(found, base)
        return
    directory = resolve(found.path, files=(ADAPTER_CONFIG_FILE, XLORA_CONFIG_FILE, BASE_CONFIG_FILE))
    names = {name: file_in(directory, name) for name in (XLORA_CONFIG_FILE, ADAPTER_CONFIG_FILE, BASE_CONFIG_FILE)}
    path = next((path for path in names.values() if path is not None), None)
    if path is None:
        inside = sorted(e.name for e in directory.iterdir() if any((e / name).is_file() for name in names))
        hint = f" There are some in its folders {listed(inside)}." if inside else ""
        raise FormatError(
            f"{directory}: no base model ({BASE_CONFIG_FILE}), no LoRA adapter or X-LoRA checkpoint of PEFT "
            f"({ADAPTER_CONFIG_FILE}), no X-LoRA checkpoint of the original layout ({XLORA_CONFIG_FILE}).{hint}"
        )
    if path.name == BASE_CONFIG_FILE:
        found.kind = "base model"
        _look_at_base(found)
    elif path.name == XLORA_CONFIG_FILE or read_json(path).get("peft_type") == "XLORA":
        found.kind = "X-LoRA checkpoint"
        _look_at_checkpoint(found, read_json(path), base)
    else:
        found.kind = "LoRA adapter"
        _say_origin(found, read_json(path))
        _look_at_adapter(found, base)


# ---------------------------------------------------------------------------------------------------------------------
# Base models

_WIDTHS = {
    "layers": "num_layers",
    "hidden size": "hidden_size",
    "heads": "num_heads",
    "kv heads": "num_kv_heads",
    "head size": "head_dim",
    "feed-forward size": "intermediate_size",
    "vocabulary": "vocab_size",
}


def _look_at_base(found: Inspection) -> None:
    try:
        model = open_base(found.path)
    except NoHeadError:
        model = open_base(found.path, head=blank_head(found.path))
        found.facts["head"] = "none that classifies; adapters for SEQ_CLS and TOKEN_CLS bring one"
    family, config = model.origin.family, model.module.config
    count = sum(int(np.prod(leaf.shape)) for leaf in flatten(model.params).values())
    found.facts["family"] = f"{family.model_type} ({family.causal_lm})"
    found.facts["backend"] = "torchax (PyTorch code)" if isinstance(family, TorchFamily) else "flax"
    found.facts["parameters"] = f"{count:,}"
    try:
        tensors = open_weights(model.origin.directory)[0].values()
        if model.origin.quantized is not None:
            found.facts["quantized by"] = model.origin.quantized
        found.facts["dtype"] = _listed(
            tensor.grid.kind if isinstance(tensor, QuantizedTensor) else str(tensor.dtype) for tensor in tensors
        )
        found.facts["files"] = _listed(tensor.file.name for tensor in tensors)
    except FileNotFoundError:  # a hub id; a directory without weights is refused above
        found.facts["dtype"] = f"{model.origin.config.get('dtype')}, by config.json; the weights are not downloaded"
    widths = {topic: getattr(config, name, None) for topic, name in _WIDTHS.items()}
    found.facts["sizes"] = ", ".join(f"{topic} {size}" for topic, size in widths.items() if size is not None)
    found.facts["can be adapted"] = _targets(p.hf for p in family.modules(model.module) if p.kind in ADAPTABLE)


# ---------------------------------------------------------------------------------------------------------------------
# Adapters


def _say_origin(found: Inspection, config: Mapping[str, Any]) -> None:
    base = config.get("base_model_name_or_path", config.get("base_model_id"))
    found.facts["trained on"] = "unknown" if base is None else str(base)
    if config.get("peft_version") is not None:
        found.facts["written by"] = f"PEFT {config['peft_version']}"


def _look_at_adapter(found: Inspection, base: str | None) -> None:
    adapter = load_lora(found.path)
    _say_origin(found, adapter.config)
    layers = adapter.layers.values()
    found.facts |= {
        "rank": _listed(layer.r for layer in layers),
        "alpha": _listed(layer.alpha for layer in layers),
        "scale": _scales(adapter),
        "targets": _targets(adapter.layers),
        "parameters": f"{sum(layer.a.size + layer.b.size for layer in layers):,}",
        "dtype": _listed(str(array.dtype) for layer in layers for array in (layer.a, layer.b)),
    }
    extras = {
        "lora_dropout": next((layer.dropout for layer in layers if layer.dropout), None),
        "lora_bias": any(layer.bias is not None for layer in layers) or None,
    }
    found.facts |= {name: str(value) for name, value in extras.items() if value is not None}
    _say_head(found, adapter.head)
    if base is not None:
        fitted = fit_adapters((adapter,), open_base(base, head=head_of(adapter)))
        found.facts[_FITS] = f"yes, {len(fitted[0].layers)} of its layers ({base})"


def _say_head(found: Inspection, head: Mapping[str, NDArray[Any]]) -> None:
    if head:
        found.facts["head"] = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in head.items())


_FITS = "fits the base"


def _scales(adapter: LoraAdapter) -> str:
    kind = "alpha / sqrt(r), rsLoRA" if adapter.config.get("use_rslora") else "alpha / r"
    return f"{kind}: {_listed(f'{layer.scale:g}' for layer in adapter.layers.values())}"


def _listed(values: Iterable[object]) -> str:
    return ", ".join(str(value) for value in sorted(set(values), key=lambda v: (isinstance(v, str), v)))


_BLOCK = re.compile(r"\.(\d+)\.")


def _targets(paths: Iterable[str]) -> str:
    """Return kinds of modules and their blocks: `q_proj, v_proj in layers 0-31; lm_head`."""
    blocks: dict[str, list[int]] = {}
    for path in paths:
        block = _BLOCK.search(path)
        blocks.setdefault(path.rsplit(".", 1)[-1], []).extend([int(block[1])] if block else [])
    together: dict[str, list[str]] = {}
    for module, numbers in blocks.items():
        together.setdefault(_ranges(sorted(set(numbers))), []).append(module)
    return "; ".join(
        ", ".join(modules) + (f" in layers {numbers}" if numbers else "") for numbers, modules in together.items()
    )


def _ranges(numbers: Sequence[int]) -> str:
    """Return sorted numbers with runs as ranges: `0-3, 7`."""
    if not numbers:
        return ""
    breaks = [i + 1 for i, (a, b) in enumerate(pairwise(numbers)) if b != a + 1]
    runs = [numbers[a:b] for a, b in pairwise([0, *breaks, len(numbers)])]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


# ---------------------------------------------------------------------------------------------------------------------
# X-LoRA checkpoints

_LAYOUTS = {"peft": "PEFT's", "xlora": "the original xlora package's", "mistralrs": "mistral.rs's"}
_SETTINGS = (
    *("layerwise_scalings", "top_k_lora", "enable_softmax", "enable_softmax_topk", "softmax_temperature"),
    *("scaling_pass_value", "global_scaling_weight", "xlora_dropout_p", "use_trainable_adapters"),
)


def _look_at_checkpoint(found: Inspection, config: Mapping[str, Any], base: str | None) -> None:
    _say_origin(found, config)
    trained = read_xlora(resolve(found.path))
    first = trained.classifier[0][0]
    widths = [first.shape[0], *(weight.shape[1] for weight, _ in trained.classifier)]
    found.facts |= {
        "layout": _LAYOUTS[trained.layout],
        "experts": str(len(trained.adapters)),
        "classifier": f"depth {trained.config.xlora_depth}: {' -> '.join(map(str, widths))}, complete",
        "dtype": str(first.dtype),
        "settings": ", ".join(f"{name} {getattr(trained.config, name)}" for name in _SETTINGS),
    }
    if trained.layer_names is not None:
        found.facts["adapted layers"] = f"{len(trained.layer_names)}: {_targets(trained.layer_names)}"
    elif trained.config.layerwise_scalings:
        found.facts["adapted layers"] = str(widths[-1] // len(trained.adapters))
    _say_head(found, trained.head)
    _look_at_experts(found, trained)
    experts_of(trained)
    if base is not None and not found.refused:
        model = open_xlora(base, checkpoint=found.path)
        found.facts[_FITS] = f"yes, {len(model.layer_names)} of its layers ({base})"


def _look_at_experts(found: Inspection, trained: XLoraCheckpoint) -> None:
    for number, (name, path) in enumerate(trained.adapters.items()):
        topic = f"expert {number}" if name == str(number) else f"expert {number}, {name}"
        if path is None:
            found.facts[topic] = "not found"
            continue
        found.facts[topic] = path
        try:
            adapter = load_lora(path, name=name)
        except (ValueError, OSError, ImportError) as error:
            found.refused.append(str(error))
        else:
            ranks = _listed(layer.r for layer in adapter.layers.values())
            found.facts[topic] = f"rank {ranks}, {_targets(adapter.layers)} ({path})"
