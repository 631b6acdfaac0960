"""Writing of X-LoRA checkpoints in any layout.

PEFT reads the experts' paths from `adapter_config.json`, relative to the working directory, and ignores the argument
`adapters=` of `PeftModel.from_pretrained` (`config=` works). So the paths are written as absolute paths. After a move,
:func:`~interop.checkpoint.places.repoint` rewrites them.
"""

from __future__ import annotations

import dataclasses
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from interop.checkpoint.card import model_card
from interop.checkpoint.layouts import (
    CARD_FILE,
    EXPERTS_FOLDER,
    FIXED_ENTRIES,
    ORDERING_FILE,
    PEFT_HEAD_PREFIX,
    PEFT_PREFIX,
    UNHELD_TASKS,
    XLORA_CLASSIFIER_STEM,
    XLORA_CONFIG_FILE,
    Layout,
    Linear,
    classifier_tensors,
    read_ordering,
)
from interop.peft.adapter import WEIGHTS_STEM, LoraAdapter, adapter_config, adapter_tensors, write_lora
from interop.peft.config import ADAPTER_CONFIG_FILE
from interop.peft.names import renamed
from interop.storage.atomic import check_replaceable, replacing
from interop.storage.errors import FormatError, listed
from interop.storage.files import write_json
from interop.storage.tensors import write_safetensors
from xlora_jax.atomic import replace_text
from xlora_jax.config import XLoraConfig

__all__ = ["write_xlora"]


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
    num_labels: int | None = None,
    quantized: str | None = None,
) -> None:
    """Write a self-contained checkpoint: settings, classifier, experts, their names, a model card.

    Args:
        directory: directory to create, or to replace as a whole if it holds an earlier save of this function.
        layout: "peft", "xlora" (the original) or "mistralrs".
        config: X-LoRA settings; their `adapters` are not used.
        classifier: (kernel [inputs, outputs], bias [outputs]) of each linear layer, in order.
        adapters: adapters of the experts, in the order of the classifier's outputs.
        base_model: directory or hub id of the base model, written into the settings as it is.
        layer_names: adapted layers in the order of their numbers, by Hugging Face module path.
        extras: further fields for PEFT's settings: `task_type`, `revision`, `auto_mapping`.
        head: tensors of a classification head that is not the base's own, by Hugging Face name and in torch's layout.
            The experts are written without heads, because PEFT's X-LoRA can't load adapters with heads.
        num_labels: number of classes of `head`, for the card.
        quantized: grid of the base's kernels, for the card; None for floating point.

    Raises:
        FormatError: the arguments don't fit together, or the layout can't express the model.
        FileExistsError: the directory holds something else.
    """
    target = Path(directory).expanduser().resolve()
    check_layout(layout, config, classifier, adapters, layer_names, head)
    names = [adapter.name for adapter in adapters]
    adapters = [renamed(adapter.factors_only(), layer_names) for adapter in adapters]
    scaling_pass_value = config.scaling_pass_gate(len(names))
    config = dataclasses.replace(config, adapters=dict.fromkeys(names, ""), scaling_pass_value=scaling_pass_value)
    task_type = (extras or {}).get("task_type", "CAUSAL_LM")
    ordering: dict[str, Any] = {
        "base_model_id": base_model,
        "order": names,
        "layers": {name: number for number, name in enumerate(layer_names)},
    }
    if task_type in UNHELD_TASKS:
        ordering["task_type"] = task_type
    if quantized is not None:
        ordering["quantized"] = quantized
    with replacing(target, owned=_owned(target)) as partial:
        write_json(partial / ORDERING_FILE, ordering)
        labels = num_labels if head else None
        card = model_card(layout, config, adapters, base_model, len(layer_names), task_type, labels, quantized)
        replace_text(partial / CARD_FILE, card)
        if layout == "peft":
            _write_peft(partial, target, config, classifier, adapters, base_model, task_type, extras or {}, head or {})
        elif layout == "xlora":
            _write_original(partial, config, classifier, adapters, base_model)
        else:
            _write_mistralrs(partial, config, classifier, adapters, base_model, layer_names)


def check_layout(
    layout: str,
    config: XLoraConfig,
    classifier: Sequence[Linear],
    adapters: Sequence[LoraAdapter],
    layer_names: Sequence[str],
    head: Mapping[str, NDArray[Any]] | None = None,
) -> None:
    """Check that a layout can express a model; arguments as those of :func:`write_xlora`. Nothing is written.

    Raises:
        FormatError: it can't, or the parts don't fit together.
    """
    if layout not in get_args(Layout):
        raise FormatError(f"layout {layout!r}; expected one of {', '.join(get_args(Layout))}.")
    names = [adapter.name for adapter in adapters]
    _check_model(config, classifier, names, layer_names)
    if head and layout != "peft":
        raise FormatError(f"layout {layout!r} has no place for a classification head ({listed(head)}); use 'peft'.")
    adapters = [renamed(adapter.factors_only(), layer_names) for adapter in adapters]
    if layout == "xlora":
        _check_original(adapters)
    elif layout == "mistralrs":
        _check_mistralrs(config, classifier, adapters, layer_names)


def check_target(directory: str | os.PathLike[str]) -> None:
    """Check that a directory can be created, or replaced by :func:`write_xlora`. Nothing is written.

    Raises:
        FileExistsError: it is a file, or holds something else than an earlier save.
        OSError: it can't be written.
    """
    target = Path(directory).expanduser().resolve()
    check_replaceable(target, owned=_owned(target))


def _owned(target: Path) -> list[str]:
    """Return the entries that an earlier save wrote; empty if there was no earlier save."""
    try:
        names = read_ordering(target).names if target.is_dir() else None
    except FormatError:
        names = None
    if names is None:
        return []
    return [
        re.sub(r"([*?[])", r"[\1]", form) for name in names for form in (name, f"{name}.json", f"{name}.safetensors")
    ] + [*FIXED_ENTRIES]


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
        "task_type": None if task_type in UNHELD_TASKS else task_type,
        "base_model_name_or_path": base_model,
        "revision": extras.get("revision"),
        "auto_mapping": extras.get("auto_mapping"),
        "inference_mode": True,
    }
    write_json(partial / ADAPTER_CONFIG_FILE, beside | fields)
    tensors = classifier_tensors("peft", config, classifier)
    write_safetensors(
        partial / f"{WEIGHTS_STEM}.safetensors",
        {PEFT_PREFIX + name: tensor for name, tensor in tensors.items()}
        | {PEFT_HEAD_PREFIX + name: tensor for name, tensor in head.items()},
    )


_FOLDER_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def _original_settings(config: XLoraConfig, adapters: Sequence[LoraAdapter], base_model: str) -> dict[str, Any]:
    settings = config.to_dict() | {"adapters": [adapter.name for adapter in adapters]}
    return {"base_model_id": base_model, "use_bias": True, "enable_relu_and_dropout": True} | settings


def _check_names(layout: str, names: Sequence[str]) -> None:
    for name in names:
        if not _FOLDER_NAME.fullmatch(name) or name in FIXED_ENTRIES:
            raise FormatError(
                f"layout {layout!r} stores experts under their names, and {name!r} is no name for a file; use letters, "
                f"digits, '_', '-' and '.', or layout 'peft'."
            )


def _check_original(adapters: Sequence[LoraAdapter]) -> None:
    _check_names("xlora", [adapter.name for adapter in adapters])
    for adapter in adapters:
        for path, layer in adapter.layers.items():
            if layer.kind == "embedding":
                raise FormatError(
                    f"layout 'xlora': the expert {adapter.name!r} adapts the embedding {path!r}, and the original "
                    f"X-LoRA can't run such an expert (it multiplies token numbers by gates); use layout 'peft'."
                )


def _write_original(
    partial: Path,
    config: XLoraConfig,
    classifier: Sequence[Linear],
    adapters: Sequence[LoraAdapter],
    base_model: str,
) -> None:
    for adapter in adapters:
        (partial / adapter.name).mkdir()
        write_lora(adapter, partial / adapter.name)
    write_json(partial / XLORA_CONFIG_FILE, _original_settings(config, adapters, base_model))
    write_safetensors(partial / f"{XLORA_CLASSIFIER_STEM}.safetensors", classifier_tensors("xlora", config, classifier))


def _check_mistralrs(
    config: XLoraConfig, classifier: Sequence[Linear], adapters: Sequence[LoraAdapter], layer_names: Sequence[str]
) -> None:
    names = [adapter.name for adapter in adapters]
    _check_names("mistralrs", names)
    if config.enable_softmax_topk:
        raise FormatError(
            "layout 'mistralrs': enable_softmax_topk is not implemented in mistral.rs; use layout 'peft'."
        )
    if config.top_k_lora is not None and config.scaling_pass_gate(len(names)) != 0:
        raise FormatError(
            f"layout 'mistralrs': top_k_lora {config.top_k_lora} with scaling_pass_value {config.scaling_pass_value}: "
            f"PEFT selects the top k in the scaling pass too, and mistral.rs does not; use scaling_pass_value 0, or "
            f"layout 'peft'."
        )
    _as_wide_as_hidden(config, classifier)
    for adapter in adapters:
        _mistralrs_expert(adapter, adapters[0], layer_names)
    fixed = [ORDERING_FILE, CARD_FILE, XLORA_CONFIG_FILE, f"{XLORA_CLASSIFIER_STEM}.safetensors"]
    written = sorted([*fixed, *(f"{name}.{ending}" for name in names for ending in ("json", "safetensors"))])
    for name in names:  # it takes for an expert's every file whose name contains the expert's
        files_of = [file for file in written if name in file]
        if files_of != [f"{name}.json", f"{name}.safetensors"]:
            raise FormatError(
                f"layout 'mistralrs': mistral.rs finds an expert's files by its name as a part of theirs, and {name!r} "
                f"is a part of {listed(files_of)}; load the expert under another name."
            )


def _write_mistralrs(
    partial: Path,
    config: XLoraConfig,
    classifier: Sequence[Linear],
    adapters: Sequence[LoraAdapter],
    base_model: str,
    layer_names: Sequence[str],
) -> None:
    config, classifier = _as_wide_as_hidden(config, classifier)
    files = {
        XLORA_CONFIG_FILE: _original_settings(config, adapters, base_model)
        | {"xlora_dropout_p": 0.0},  # mistral.rs applies the classifier's dropout in generation
        **{f"{adapter.name}.json": _mistralrs_expert(adapter, adapters[0], layer_names) for adapter in adapters},
    }
    for name, content in files.items():
        write_json(partial / name, content)
    write_safetensors(
        partial / f"{XLORA_CLASSIFIER_STEM}.safetensors", classifier_tensors("mistralrs", config, classifier)
    )
    for adapter in adapters:
        write_safetensors(partial / f"{adapter.name}.safetensors", adapter_tensors(adapter))


def _as_wide_as_hidden(config: XLoraConfig, classifier: Sequence[Linear]) -> tuple[XLoraConfig, Sequence[Linear]]:
    """Widen the classifier's inner layers to the hidden size with units that are always zero.

    mistral.rs 0.9.5 builds the last layer for inputs of the hidden size, whatever `xlora_size` is.
    """
    if config.xlora_depth == 1 or config.xlora_size == config.hidden_size:
        return config, classifier
    more = config.hidden_size - config.xlora_size
    if more < 0:
        raise FormatError(
            f"layout 'mistralrs': xlora_size {config.xlora_size} is above the hidden size {config.hidden_size}, and "
            f"mistral.rs takes the hidden size for it; use layout 'peft', or train with an xlora_size of at most that."
        )
    wide: list[Linear] = []
    for i, (weight, bias) in enumerate(classifier):
        inputs, outputs = (more if i > 0 else 0), (more if i < len(classifier) - 1 else 0)
        wide.append((np.pad(weight, ((0, inputs), (0, outputs))), None if bias is None else np.pad(bias, (0, outputs))))
    return dataclasses.replace(config, xlora_size=config.hidden_size), wide


# Modules that mistral.rs adapts in each kind of model, from its source (0.9.5).
_MISTRALRS_MODULES = {
    "Llama, Mistral, Mixtral, Gemma": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "Phi 2": ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"),
    "Phi 3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "Starcoder 2": ("q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"),
}
_BLOCK_MODULE = re.compile(r"model\.layers\.(?P<block>\d+)\.(?:self_attn|mlp)\.(?P<module>\w+)")


def _mistralrs_expert(adapter: LoraAdapter, first: LoraAdapter, layer_names: Sequence[str]) -> dict[str, Any]:
    """Return the adapter's config in the fields that mistral.rs reads."""
    where = f"layout 'mistralrs': the expert {adapter.name!r}"
    if adapter.layers.keys() != set(layer_names):
        other = sorted(set(layer_names) - adapter.layers.keys())
        raise FormatError(
            f"{where} doesn't adapt {listed(other)}, as others do; there all experts must adapt the same."
        )
    matches = {path: _BLOCK_MODULE.fullmatch(path) for path in adapter.layers}
    modules_of = [match["module"] for match in matches.values() if match]
    known = max(_MISTRALRS_MODULES.values(), key=lambda names: sum(module in names for module in modules_of))
    odd = [path for path, match in matches.items() if match is None or match["module"] not in known]
    odd += [path for path, layer in adapter.layers.items() if layer.kind != "linear" and path not in odd]
    if odd:
        able = "; ".join(f"of {model} {', '.join(names)}" for model, names in _MISTRALRS_MODULES.items())
        raise FormatError(f"{where} adapts {listed(odd)}; there only these can be adapted: {able}.")
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
    # mistral.rs knows only the scale alpha / r, so rsLoRA's scale is written as the alpha that gives it.
    plain = {"use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}, "target_modules": sorted(modules)}
    return adapter_config(adapter) | plain | {"r": rank, "lora_alpha": scale * rank}
