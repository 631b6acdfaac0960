"""PEFT LoRA adapters: read into plain arrays, checked against a base model, and written back.

An adapter consists of `adapter_config.json`, which :mod:`interop.peft.config` reads, and of tensors, whose keys name
the adapted modules. Nothing in either is dropped in silence.

Axis legend: I inputs, O outputs, r rank, V vocabulary, D width, H and W of a kernel.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from interop.peft.config import ADAPTER_CONFIG_FILE, HEADS, PLAIN, AdapterSettings, read_settings
from interop.peft.formats import format_of_files, format_of_keys
from interop.peft.patterns import check_patterns
from interop.storage.atomic import check_replaceable, replacing
from interop.storage.errors import FormatError, brief, listed
from interop.storage.files import file_in, read_json, write_json
from interop.storage.hub import resolve, weights_file
from interop.storage.tensors import LazyTensor, open_file, open_tensors, read_finite, write_safetensors

__all__ = [
    "WEIGHTS_STEM",
    "Kind",
    "LoraAdapter",
    "LoraLayer",
    "adapter_config",
    "adapter_tensors",
    "check_lora_target",
    "load_lora",
    "save_lora",
    "write_lora",
]

Kind = Literal["linear", "embedding", "conv"]

WEIGHTS_STEM = "adapter_model"
_OWNED = (ADAPTER_CONFIG_FILE, f"{WEIGHTS_STEM}.safetensors", f"{WEIGHTS_STEM}.bin")
_MAX_CONFIG_BYTES = 2 * 2**20


@dataclass(frozen=True, eq=False)
class LoraLayer:
    """One adapted module. Its contribution is `scale * (x @ a @ b)`, plus `scale * bias` if there is a bias.

    Attributes:
        kind: "linear", "embedding" or "conv".
        a: [I, r]; for an embedding [V, r], for a convolution [H, W, I, r]. In the stored dtype.
        b: [r, O]; for an embedding [r, D]. In the stored dtype.
        bias: [O], `lora_B`'s bias, or None.
        r: rank.
        alpha: LoRA's alpha.
        scale: LoRA scale: alpha / r, or alpha / sqrt(r) for rsLoRA.
        dropout: dropout probability of the module's input in training.
        groups: number of groups of a grouped convolution. PEFT stores its B by group; `b` here is block-diagonal.
        base_weight: base module's own weight in torch's layout, which PEFT also stores if an embedding is among the
            targets. `interop.experts` compares it with the base, because an expert can't change the base.
    """

    kind: Kind
    a: NDArray[Any]
    b: NDArray[Any]
    bias: NDArray[Any] | None
    r: int
    alpha: float
    scale: float
    dropout: float
    base_weight: LazyTensor | None = None
    velora: LazyTensor | None = None
    groups: int = 1


@dataclass(frozen=True, eq=False)
class LoraAdapter:
    """A LoRA adapter.

    Attributes:
        name: name that the user gave.
        path: directory that the adapter was read from.
        config: complete contents of `adapter_config.json`.
        layers: adapted modules by Hugging Face module path (`model.layers.0.self_attn.q_proj`), in stored order.
        head: tensors of the classification head trained with the adapter, by Hugging Face name (`score.weight`) and in
            torch's layout; empty if there is no such head.
        base_weights: embeddings of the base that PEFT also stored, by Hugging Face name of the tensor.
            `interop.experts` compares them with the base.
        not_saved: modules that `modules_to_save` names and the file lacks. The base must not have them.
    """

    name: str
    path: Path
    config: Mapping[str, Any]
    layers: Mapping[str, LoraLayer]
    head: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    base_weights: Mapping[str, LazyTensor] = field(default_factory=dict)
    not_saved: tuple[str, ...] = ()

    @property
    def base_model_name_or_path(self) -> str | None:
        """Name of the base model that the adapter was trained on, from its config."""
        name: str | None = self.config.get("base_model_name_or_path")
        return name

    def factors_only(self) -> LoraAdapter:
        """Return the adapter without head and without weights of the base model."""
        return replace(self, head={}, base_weights={}, not_saved=(), config={**self.config, "modules_to_save": None})


# ---------------------------------------------------------------------------------------------------------------------
# Keys of tensors

_PREFIX = "base_model.model."
_PATH = r"(?P<path>[\w.-]{1,512})"
# The optional group before `weight` is the adapter's name, which PEFT removes from the keys when it saves.
_KEYS = (
    re.compile(_PATH + r"\.(?P<part>lora_[AB])(?:\.[^.]+)?\.weight"),
    re.compile(_PATH + r"\.lora_B(?:\.[^.]+)?\.(?P<part>bias)"),
    re.compile(_PATH + r"\.(?P<part>lora_embedding_[AB])(?:\.[^.]+)?"),
    re.compile(_PATH + r"\.(?P<part>base_layer)\.weight"),
    re.compile(_PATH + r"\.(?P<part>lora_velora_embed)(?:\.[^.]+)?"),
)


# Wrapper modules of torch.compile, FSDP, activation checkpointing, DeepSpeed and Opacus.
_WRAPPED = re.compile(
    r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module|_wrapped_module|_module)\."
)
# Names of embeddings and output heads in transformers, which PEFT may store whole, in addition to the factors.
_EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings")
_STORED_EMBEDDING = re.compile(rf"(?:[\w.-]{{1,512}}\.)?(?:{'|'.join(_EMBEDDINGS)})\.(?:weight|bias)")


def _short(key: str) -> str:
    """Return a key without the parts that training frameworks and PEFT add to the module's name."""
    key = re.sub(r"\.modules_to_save(?:\.default)?(?=\.)", "", _WRAPPED.sub("", key))
    while key.startswith(_PREFIX):
        key = key.removeprefix(_PREFIX)
    return key


def _split_head(
    tensors: Mapping[str, LazyTensor], heads: Sequence[str], where: str
) -> tuple[dict[str, NDArray[Any]], dict[str, LazyTensor]]:
    """Return the tensors of a classification head, under the base's names, and the other tensors."""
    head: dict[str, NDArray[Any]] = {}
    rest: dict[str, LazyTensor] = {}
    for key, tensor in tensors.items():
        short = _short(key)
        # Match ends of names, as PEFT does: if it saves `classifier`, it saves `pre_classifier` too.
        if short.split(".")[0].endswith(tuple(heads)) and re.fullmatch(r"\w+(\.\w+)?\.(weight|bias)", short):
            if len(tensor.shape) != (2 if short.endswith("weight") else 1) or 0 in tensor.shape:
                raise FormatError(f"{where}: {key!r} has shape {list(tensor.shape)}; expected a dense layer's.")
            head[short] = read_finite(tensor)
        else:
            rest[key] = tensor
    return head, rest


def _not_saved(settings: AdapterSettings, tensors: Iterable[str], where: str) -> tuple[str, ...]:
    """Return the names in `modules_to_save` without stored tensors, after a check of the other names."""
    parts = {part for key in tensors for part in _short(key).split(".")}
    stored = [name for name in settings.saved if any(part.endswith(name) for part in parts)]
    if others := [name for name in stored if name not in settings.heads]:
        raise FormatError(
            f"{where}: modules_to_save = {brief(others)} can't be an expert: it replaces whole modules of the base; "
            f"expected none but a classification head ({listed(HEADS)}). What you can do: {PLAIN}."
        )
    return tuple(name for name in settings.saved if name not in stored)


def _by_module(
    tensors: Mapping[str, LazyTensor], where: str
) -> tuple[dict[str, dict[str, LazyTensor]], dict[str, LazyTensor]]:
    """Return the tensors of each adapted module by part (lora_A, lora_B, bias, ...), and the base's own embeddings."""
    modules: dict[str, dict[str, LazyTensor]] = {}
    base_weights: dict[str, LazyTensor] = {}
    unknown: list[str] = []
    if empty := [key for key, tensor in tensors.items() if ".lora_" in key and 0 in tensor.shape]:
        raise FormatError(
            f"{where}: {listed(empty)} hold no values (shape {list(tensors[empty[0]].shape)}). DeepSpeed's ZeRO-3 "
            f"leaves such placeholders where parameters are not gathered for saving. Set "
            f"stage3_gather_16bit_weights_on_model_save, or get the weights out of its checkpoint by zero_to_fp32.py."
        )
    for key, tensor in tensors.items():
        short = _short(key)
        match = next((match for pattern in _KEYS if (match := pattern.fullmatch(short))), None)
        if match is None and _STORED_EMBEDDING.fullmatch(short):
            base_weights[short] = tensor
            continue
        if match is None:
            unknown.append(key)
            continue
        parts = modules.setdefault(match["path"], {})
        if match["part"] in parts:
            first = parts[match["part"]].name
            raise FormatError(f"{where}: {first!r} and {key!r} are both {match['part']} of {match['path']!r}.")
        parts[match["part"]] = tensor
    if unknown:
        hint = format_of_keys(unknown) or f"What you can do: {PLAIN}"
        raise FormatError(
            f"{where}: {len(unknown)} tensors are no part of a LoRA adapter, which would not be complete without them: "
            f"{listed(unknown)}. Expected keys like {_PREFIX}<module>.lora_A.weight. {hint}."
        )
    if not modules:
        raise FormatError(f"{where}: no LoRA tensors; expected keys like {_PREFIX}<module>.lora_A.weight.")
    return modules, base_weights


def _read_layer(path: str, parts: Mapping[str, LazyTensor], settings: AdapterSettings, where: str) -> LoraLayer:
    is_embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    if is_embedding and settings.bias:
        raise FormatError(f"{where}: lora_bias is set, but {path!r} is an embedding, which has none in PEFT.")
    names = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A", "lora_B")
    wanted = {*names, "bias"} if settings.bias else set(names)
    found = parts.keys() - {"base_layer", "lora_velora_embed"}
    if found != wanted:
        raise FormatError(
            f"{where}: {path!r} has {listed(sorted(found)) or 'nothing'}; expected {listed(sorted(wanted))} (lora_bias "
            f"is {str(settings.bias).lower()}). The file was cut or mixed: save the adapter again."
        )
    first, second = (parts[name] for name in names)
    kind = _kind(first, second, where)
    rank, alpha = settings.of(path)
    groups = _groups(second, rank) if kind == "conv" else 1
    for tensor, axis in ((first, 0), (second, 1)):
        if tensor.shape[axis] * (groups if tensor is second else 1) != rank:
            raise FormatError(
                f"{where}: {tensor.name!r} has shape {list(tensor.shape)}, so rank {tensor.shape[axis]}; expected "
                f"{rank}, by r and rank_pattern in {ADAPTER_CONFIG_FILE}. Config and weights are of different adapters."
            )
    bias = parts.get("bias")
    if bias is not None and bias.shape != second.shape[:1]:
        raise FormatError(f"{where}: {bias.name!r} has shape {list(bias.shape)}; expected {list(second.shape[:1])}.")
    a, b = read_finite(first), read_finite(second)
    return LoraLayer(
        kind=kind,
        a=a.transpose(2, 3, 1, 0) if kind == "conv" else a.T,
        b=_block_diagonal(b.reshape(b.shape[:2]), groups),
        bias=None if bias is None else read_finite(bias),
        r=rank,
        alpha=alpha,
        scale=settings.scale(rank, alpha),
        dropout=settings.dropout,
        base_weight=parts.get("base_layer"),
        velora=parts.get("lora_velora_embed"),
        groups=groups,
    )


def _groups(b: LazyTensor, rank: int) -> int:
    """Return the number of groups of a convolution, from its B [O, rank / groups, 1, 1]."""
    groups = rank // b.shape[1]
    return groups if groups * b.shape[1] == rank and b.shape[0] % groups == 0 else 1


def _block_diagonal(b: NDArray[Any], groups: int) -> NDArray[Any]:
    """Return [r, O] from the stored [O, r / groups]: each group's outputs depend on its own part of the rank."""
    if groups == 1:
        return b.T
    width, rank = b.shape[0] // groups, b.shape[1]
    whole = np.zeros((rank * groups, b.shape[0]), b.dtype)
    for group in range(groups):
        own = slice(group * width, (group + 1) * width)
        whole[group * rank : (group + 1) * rank, own] = b[own].T
    return whole


def _by_group(adapter: LoraAdapter, path: str) -> NDArray[Any]:
    """Return [O, r / groups] of a layer; the inverse of :func:`_block_diagonal`."""
    layer = adapter.layers[path]
    rank, width = (size // layer.groups for size in layer.b.shape)
    blocks = [
        layer.b[group * rank : (group + 1) * rank, group * width : (group + 1) * width].T
        for group in range(layer.groups)
    ]
    stored = np.concatenate(blocks)
    if not np.array_equal(_block_diagonal(stored, layer.groups), layer.b):
        raise FormatError(
            f"adapter {adapter.name!r}: {path!r} is a convolution of {layer.groups} groups, and its B joins outputs of "
            f"one with ranks of another, which PEFT can't store; expected zeros outside of the groups' blocks."
        )
    return stored


def _kind(first: LazyTensor, second: LazyTensor, where: str) -> Kind:
    dimensions = (len(first.shape), len(second.shape))
    if 0 not in first.shape + second.shape:
        if dimensions == (2, 2):
            return "embedding" if "lora_embedding_A" in first.name else "linear"
        if dimensions == (4, 4) and second.shape[2:] == (1, 1):
            return "conv"
    raise FormatError(
        f"{where}: {first.name!r} {list(first.shape)} and {second.name!r} {list(second.shape)} are no pair; expected "
        f"[r, in] and [out, r], or [r, in, h, w] and [out, r, 1, 1] for a 2d convolution."
    )


# ---------------------------------------------------------------------------------------------------------------------
# Loading and saving


def load_lora(dir_or_id: str | os.PathLike[str], *, name: str | None = None, **hub_options: Any) -> LoraAdapter:
    """Load a PEFT LoRA adapter.

    Args:
        dir_or_id: directory or hub id; or a weights file with its config beside it under the same name
            (`math.safetensors`, `math.json`), as in mistral.rs's layout.
        name: name of the adapter; None takes the last part of `dir_or_id` (or of `subfolder`).
        **hub_options: `revision`, `subfolder`, `token`, `cache_dir`, `local_files_only`, as in
            `interop.storage.hub.resolve`.

    Returns:
        The adapter, with all factors in memory, in their stored dtypes.

    Raises:
        FileNotFoundError: the directory or repository does not exist, or has no adapter.
        FormatError: a file is broken or incomplete, or an option is not supported. The message names the adapter, the
            tensor or option, and the remedy.
    """
    weights = weights_file(dir_or_id)
    files = (ADAPTER_CONFIG_FILE, f"{WEIGHTS_STEM}.safetensors")
    directory = weights.parent if weights else resolve(dir_or_id, files=files, **hub_options)
    if name is None:
        place = Path(dir_or_id).expanduser().absolute()
        name = weights.stem if weights else Path(hub_options.get("subfolder") or place).name
    where = f"adapter {name!r} ({directory})"
    config_file = weights.with_suffix(".json").name if weights else ADAPTER_CONFIG_FILE
    config_path = file_in(directory, config_file)
    if config_path is None:
        raise FileNotFoundError(
            f"{where}: no {config_file}; expected the directory of a PEFT LoRA adapter.{_hint(directory)}"
        )
    config = read_json(config_path, _MAX_CONFIG_BYTES)
    settings = read_settings(config, where)
    tensors = open_file(weights) if weights else open_tensors(directory, WEIGHTS_STEM)
    not_saved = _not_saved(settings, tensors, where)
    head, tensors = _split_head(tensors, settings.heads, where)
    modules, base_weights = _by_module(tensors, where)
    check_patterns(settings.rank_pattern, modules, where, "rank_pattern")
    check_patterns(settings.alpha_pattern, modules, where, "alpha_pattern")
    layers = {path: _read_layer(path, parts, settings, where) for path, parts in modules.items()}
    embeddings = [path for path, layer in layers.items() if layer.kind == "embedding"]
    if settings.tied and embeddings:
        raise FormatError(
            f"{where}: ensure_weight_tying with {embeddings[0]!r} among the targets can't be an expert: the factors of "
            f"two modules are one. What you can do: train without it, or without embeddings among the targets."
        )
    return LoraAdapter(name, directory, config, layers, head, base_weights, not_saved)


def _hint(directory: Path) -> str:
    """Return a description of the contents of a directory without an adapter's config."""
    inside = sorted(str(path.parent.relative_to(directory)) for path in directory.glob(f"*/{ADAPTER_CONFIG_FILE}"))
    if inside:
        return f" There are adapters in its folders {listed(inside)} (PEFT saves named ones so): give one of them."
    words = format_of_files(directory)
    return f" {words}." if words else ""


def save_lora(adapter: LoraAdapter, directory: str | os.PathLike[str]) -> None:
    """Write an adapter as a PEFT directory, which `PeftModel.from_pretrained` and `load_lora` read.

    The config is the original one, with patterns for changed ranks and alphas. Tensors are written in their own dtypes,
    so an unchanged adapter is restored bit for bit.

    Raises:
        FileExistsError: the directory holds files that don't belong to an adapter.
    """
    with replacing(directory, owned=_OWNED) as partial:
        write_lora(adapter, partial)


def check_lora_target(directory: str | os.PathLike[str]) -> None:
    """Check that `save_lora` can create or replace a directory. Nothing is written.

    Raises:
        FileExistsError: the directory is a file, or holds files that don't belong to an adapter.
        OSError: the directory can't be written.
    """
    check_replaceable(Path(directory).expanduser().resolve(), owned=_OWNED)


def write_lora(adapter: LoraAdapter, directory: Path) -> None:
    """Write an adapter's two files into an existing directory, which is not replaced, unlike in `save_lora`."""
    write_json(directory / ADAPTER_CONFIG_FILE, adapter_config(adapter))
    write_safetensors(directory / f"{WEIGHTS_STEM}.safetensors", adapter_tensors(adapter))


def adapter_tensors(adapter: LoraAdapter) -> dict[str, NDArray[Any] | LazyTensor]:
    """Return the adapter's tensors under PEFT's keys, in torch's layout."""
    tensors: dict[str, NDArray[Any] | LazyTensor] = {}
    for path, layer in adapter.layers.items():
        prefix = f"{_PREFIX}{path}.lora_"
        if layer.base_weight is not None:
            tensors[f"{_PREFIX}{path}.base_layer.weight"] = layer.base_weight
        if layer.velora is not None:
            tensors[f"{prefix}velora_embed"] = layer.velora
        if layer.kind == "embedding":
            tensors[f"{prefix}embedding_A"], tensors[f"{prefix}embedding_B"] = layer.a.T, layer.b.T
            continue
        conv = layer.kind == "conv"
        tensors[f"{prefix}A.weight"] = layer.a.transpose(3, 2, 0, 1) if conv else layer.a.T
        tensors[f"{prefix}B.weight"] = _by_group(adapter, path)[:, :, None, None] if conv else layer.b.T
        if layer.bias is not None:
            tensors[f"{prefix}B.bias"] = layer.bias
    beside: dict[str, NDArray[Any] | LazyTensor] = {**adapter.base_weights, **adapter.head}
    return tensors | {f"{_PREFIX}{name}": tensor for name, tensor in beside.items()}


def adapter_config(adapter: LoraAdapter) -> dict[str, Any]:
    """Return the adapter's original config, with patterns for layers of another rank or alpha."""
    config = dict(adapter.config)
    settings = read_settings(config, f"adapter {adapter.name!r}")
    if any(settings.of(path) != (layer.r, layer.alpha) for path, layer in adapter.layers.items()):
        ranks = {path: layer.r for path, layer in adapter.layers.items() if layer.r != settings.r}
        alphas = {path: layer.alpha for path, layer in adapter.layers.items() if layer.alpha != settings.alpha}
        config |= {"rank_pattern": _as_patterns(ranks), "alpha_pattern": _as_patterns(alphas)}
    for path, layer in adapter.layers.items():
        scale = settings.scale(layer.r, layer.alpha)
        if not math.isclose(layer.scale, scale, rel_tol=1e-6):
            raise FormatError(
                f"adapter {adapter.name!r}: {path!r} has scale {layer.scale}, but its r and alpha give {scale}; "
                f"change alpha."
            )
    return config


def _as_patterns(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return full paths as patterns. `^` keeps a short path from matching the end of a longer one."""
    return {"^" + re.escape(path): value for path, value in values.items()}
