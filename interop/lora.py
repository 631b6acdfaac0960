"""PEFT LoRA adapters: read into plain arrays, checked against a base model, and written back.

What an adapter means is in two files: `adapter_config.json`, whose fields all stand in one table here with what is done
about each, and the tensors, whose keys name the adapted modules. Nothing in either is dropped in silence.

Axis legend: I inputs, O outputs, r rank, V vocabulary, D width, H and W of a kernel.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from interop.atomic import replacing
from interop.errors import FormatError, brief, listed
from interop.files import file_in, read_json, write_json
from interop.hub import resolve, weights_file
from interop.patterns import check_patterns, first_match
from interop.tensors import LazyTensor, open_file, open_tensors, read_finite, write_safetensors

Kind = Literal["linear", "embedding", "conv"]

CONFIG_FILE = "adapter_config.json"
WEIGHTS_STEM = "adapter_model"
_OWNED = (CONFIG_FILE, f"{WEIGHTS_STEM}.safetensors", f"{WEIGHTS_STEM}.bin")
_MAX_CONFIG_BYTES = 2 * 2**20


@dataclass(frozen=True, eq=False)
class LoraLayer:
    """One adapted module. Its contribution is `scale * (x @ a @ b)`, plus `scale * bias` where there is one.

    Attributes:
        kind: "linear", "embedding" or "conv".
        a: [I, r]; for an embedding [V, r], for a convolution [H, W, I, r]. In the stored dtype.
        b: [r, O]; for an embedding [r, D]. In the stored dtype.
        bias: [O], `lora_B`'s bias, or None.
        r: the rank.
        alpha: LoRA's alpha.
        scale: alpha / r, or alpha / sqrt(r) for rsLoRA.
        dropout: of the module's input, in training.
        groups: of a grouped convolution, whose B PEFT stores by group; `b` here is block-diagonal, the groups side by
            side.
        base_weight: the base module's own weight in torch's layout, which PEFT stores beside if an embedding is among
            the targets. The assembler holds it against the base: an expert can't bring a changed base with it.
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
        name: the user's name for it.
        path: the directory that it was read from.
        config: its `adapter_config.json`, whole.
        layers: by Hugging Face module path (`model.layers.0.self_attn.q_proj`), in stored order.
        head: tensors of the classification head that was trained along, by Hugging Face name (`score.weight`) and in
            torch's layout; none where there was no such head.
    """

    name: str
    path: Path
    config: Mapping[str, Any]
    layers: Mapping[str, LoraLayer]
    head: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    @property
    def base_model_name_or_path(self) -> str | None:
        """The base model that it was trained on, as its config says."""
        name: str | None = self.config.get("base_model_name_or_path")
        return name

    def without_head(self) -> LoraAdapter:
        """The adapter with its factors only."""
        return replace(self, head={}, config={**self.config, "modules_to_save": None}) if self.head else self


# ---------------------------------------------------------------------------------------------------------------------
# adapter_config.json: every field that any PEFT version wrote, and what is done about it


@dataclass(frozen=True)
class _Handled:
    """The field is read."""


@dataclass(frozen=True)
class _NoEffect:
    """Whatever its value, the stored A and B mean the same."""


@dataclass(frozen=True)
class _Refused:
    """Any value but the neutral ones would need what isn't here."""

    neutral: tuple[object, ...]
    why: str
    remedy: str


_MERGE = "merge the adapter into its base with PEFT (merge_and_unload) and extract a plain LoRA, or train one"
_PLAIN = "train a plain LoRA adapter"
_NOTHING: tuple[object, ...] = (None, [], {}, False, "")

_FIELDS: dict[str, _Handled | _NoEffect | _Refused] = {
    "peft_type": _Handled(),
    "base_model_name_or_path": _Handled(),
    "r": _Handled(),
    "lora_alpha": _Handled(),
    "rank_pattern": _Handled(),
    "alpha_pattern": _Handled(),
    "use_rslora": _Handled(),
    "lora_dropout": _Handled(),
    "lora_bias": _Handled(),
    "init_lora_weights": _Handled(),
    "ensure_weight_tying": _Handled(),
    # What they selected shows in the stored keys.
    "target_modules": _NoEffect(),
    "exclude_modules": _NoEffect(),
    "layers_to_transform": _NoEffect(),
    "layers_pattern": _NoEffect(),
    # About the base's weight, the training, or the file.
    "fan_in_fan_out": _NoEffect(),
    "velora_config": _NoEffect(),
    "eva_config": _NoEffect(),
    "corda_config": _NoEffect(),
    "loftq_config": _NoEffect(),
    "lora_ga_config": _NoEffect(),
    "qalora_group_size": _NoEffect(),
    "megatron_core": _NoEffect(),
    "merge_weights": _NoEffect(),
    "runtime_config": _NoEffect(),
    "task_type": _NoEffect(),
    "inference_mode": _NoEffect(),
    "auto_mapping": _NoEffect(),
    "peft_version": _NoEffect(),
    "revision": _NoEffect(),
    "use_dora": _Refused(_NOTHING, "DoRA rescales the base's weights (PEFT's X-LoRA refuses it too)", _MERGE),
    "bias": _Refused(
        ("none", *_NOTHING), "it trained biases of the base, and experts would overwrite each other", _PLAIN
    ),
    "modules_to_save": _Handled(),
    "trainable_token_indices": _Refused(_NOTHING, "it replaces rows of the base's embedding", _PLAIN),
    "layer_replication": _Refused(_NOTHING, "its base has replicated layers", _PLAIN),
    "target_parameters": _Refused(_NOTHING, "it adapts parameters that are no modules", _PLAIN),
    "alora_invocation_tokens": _Refused(_NOTHING, "aLoRA acts from certain tokens on only", _PLAIN),
    "use_qalora": _Refused(_NOTHING, "QALoRA pools the inputs", _PLAIN),
    "use_bdlora": _Refused(_NOTHING, "BD-LoRA has block-diagonal factors", _PLAIN),
    "kasa_config": _Refused(_NOTHING, "KaSA changes the base's weights and has a third factor", _PLAIN),
    "arrow_config": _Refused(
        _NOTHING, "Arrow routes among adapters by itself", "load the adapters it routes to as experts"
    ),
    "monteclora_config": _Refused(_NOTHING, "MonteCLoRA samples its factors", _PLAIN),
    "megatron_config": _Refused(
        _NOTHING, "Megatron's parallel layers are not supported", "convert the adapter to HF's layers"
    ),
    "enable_lora": _Refused(_NOTHING, "the merged projections of PEFT 0.2 are not supported", _PLAIN),
}

# Names of classification heads in transformers. PEFT saves them whole for task_type SEQ_CLS and TOKEN_CLS: which of the
# two a model has shows in the stored keys.
_HEADS = ("classifier", "score")

# Initialisations that leave the base as it was. The others (pissa, olora, corda, loftq, lora_ga) change it.
_PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True)
class _Settings:
    """What `adapter_config.json` says about the forward pass, checked."""

    r: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    dropout: float
    bias: bool
    tied: bool
    heads: tuple[str, ...]

    def of(self, path: str) -> tuple[int, float]:
        """Rank and alpha of the module at `path`."""
        rank = self.rank_pattern.get(first_match(self.rank_pattern, path), self.r)
        alpha = self.alpha_pattern.get(first_match(self.alpha_pattern, path), self.alpha)
        return rank, alpha

    def scale(self, r: int, alpha: float) -> float:
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r


def _read_settings(config: Mapping[str, Any], where: str) -> _Settings:
    if config.get("peft_type") != "LORA":
        raise FormatError(
            f"{where}: peft_type is {config.get('peft_type')!r}; expected 'LORA', other kinds can't be experts."
        )
    for name, value in config.items():
        _check_field(name, value, where)
    _check_initialisation(config.get("init_lora_weights"), where)
    base = config.get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        raise FormatError(f"{where}: base_model_name_or_path should be a string, got {base!r}.")
    if "r" not in config:
        raise FormatError(f"{where}: the field r (the rank) is missing.")
    r = _checked(where, "r", config["r"], _is_rank, "an integer of at least 1")
    alpha = _checked(where, "lora_alpha", config.get("lora_alpha", 8), _is_number, "a number")
    dropout = _checked(
        where,
        "lora_dropout",
        config.get("lora_dropout", 0.0),
        _is_dropout,
        "a number of at least 0 and below 1",
    )
    return _Settings(
        r=r,
        alpha=alpha,
        rank_pattern=_read_pattern(config, "rank_pattern", where, _is_rank, "an integer of at least 1"),
        alpha_pattern=_read_pattern(config, "alpha_pattern", where, _is_number, "a number"),
        use_rslora=_read_bool(config, "use_rslora", where),
        dropout=dropout,
        bias=_read_bool(config, "lora_bias", where),
        tied=_read_bool(config, "ensure_weight_tying", where),
        heads=_read_heads(config, where),
    )


def _read_heads(config: Mapping[str, Any], where: str) -> tuple[str, ...]:
    saved: list[Any] = _checked(
        where,
        "modules_to_save",
        config.get("modules_to_save") or [],
        lambda value: type(value) is list and all(type(name) is str for name in value),
        "a list of modules' names",
    )
    if others := [name for name in saved if name not in _HEADS]:
        raise FormatError(
            f"{where}: modules_to_save = {brief(others)} can't be an expert: it replaces whole modules of the base; "
            f"expected none but a classification head ({listed(_HEADS)}). What you can do: {_PLAIN}."
        )
    return tuple(dict.fromkeys(saved))


def _check_field(name: str, value: object, where: str) -> None:
    rule = _FIELDS.get(name)
    if rule is None and not _is_one_of(value, _NOTHING):
        raise FormatError(
            f"{where}: unknown field {name!r} = {brief(value)}. It may change what the adapter means, so it isn't "
            f"ignored; remove it if you know that it doesn't, or update this library."
        )
    if isinstance(rule, _Refused) and not _is_one_of(value, rule.neutral):
        raise FormatError(
            f"{where}: {name} = {brief(value)} can't be an expert: {rule.why}. What you can do: {rule.remedy}."
        )


def _check_initialisation(value: object, where: str) -> None:
    if isinstance(value, str):
        value = value.lower()
    if not _is_one_of(value, _PLAIN_INITIALISATIONS):
        raise FormatError(
            f"{where}: init_lora_weights = {brief(value)} can't be an expert: that initialisation changed the base's "
            f"weights. What you can do: convert it with PEFT, save_pretrained(..., "
            f"path_initial_model_for_weight_conversion=...), which stores a plain LoRA."
        )


def _is_one_of(value: object, choices: Iterable[object]) -> bool:
    return any(type(value) is type(choice) and value == choice for choice in choices)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30


def _is_dropout(value: Any) -> bool:
    return _is_number(value) and 0 <= value < 1


def _is_rank(value: object) -> bool:
    return type(value) is int and 1 <= value < 2**31


def _checked(where: str, name: str, value: Any, holds: Callable[[Any], bool], expected: str) -> Any:
    if not holds(value):
        raise FormatError(f"{where}: {name} should be {expected}, got {brief(value)} ({type(value).__name__}).")
    return value


def _read_bool(config: Mapping[str, Any], name: str, where: str) -> bool:
    value: bool = _checked(where, name, config.get(name) or False, lambda value: type(value) is bool, "true or false")
    return value


def _read_pattern(
    config: Mapping[str, Any], name: str, where: str, holds: Callable[[Any], bool], expected: str
) -> dict[str, Any]:
    patterns: dict[str, Any] = _checked(
        where, name, config.get(name) or {}, lambda value: type(value) is dict, "an object of pattern to value"
    )
    if len(patterns) > _MAX_PATTERNS:
        raise FormatError(f"{where}: {name} has {len(patterns)} entries; expected at most {_MAX_PATTERNS}.")
    for pattern, value in patterns.items():
        _checked(where, f"{name}[{brief(pattern)}]", value, holds, expected)
    return patterns


_MAX_PATTERNS = 10_000


def _check_patterns(settings: _Settings, paths: Collection[str], where: str) -> None:
    check_patterns(settings.rank_pattern, paths, where, "rank_pattern")
    check_patterns(settings.alpha_pattern, paths, where, "alpha_pattern")


# ---------------------------------------------------------------------------------------------------------------------
# Keys of tensors

_PREFIX = "base_model.model."
_PATH = r"(?P<path>[\w.-]{1,512})"
# The last group before `weight` is the adapter's name, which PEFT takes out of the keys when it saves.
_KEYS = (
    re.compile(_PATH + r"\.(?P<part>lora_[AB])(?:\.[^.]+)?\.weight"),
    re.compile(_PATH + r"\.lora_B(?:\.[^.]+)?\.(?P<part>bias)"),
    re.compile(_PATH + r"\.(?P<part>lora_embedding_[AB])(?:\.[^.]+)?"),
    re.compile(_PATH + r"\.(?P<part>base_layer)\.weight"),
    re.compile(_PATH + r"\.(?P<part>lora_velora_embed)(?:\.[^.]+)?"),
)


def _short(key: str) -> str:
    while key.startswith(_PREFIX):
        key = key.removeprefix(_PREFIX)
    return key


def _split_head(
    tensors: Mapping[str, LazyTensor], heads: Sequence[str], where: str
) -> tuple[dict[str, NDArray[Any]], dict[str, LazyTensor]]:
    """The tensors of a classification head, under the base's names, and the others."""
    head: dict[str, NDArray[Any]] = {}
    rest: dict[str, LazyTensor] = {}
    for key, tensor in tensors.items():
        short = _short(key)
        if short.split(".")[0] in heads and re.fullmatch(r"\w+(\.\w+)?\.(weight|bias)", short):
            if len(tensor.shape) != (2 if short.endswith("weight") else 1) or 0 in tensor.shape:
                raise FormatError(f"{where}: {key!r} has shape {list(tensor.shape)}; expected a dense layer's.")
            head[short] = read_finite(tensor)
        else:
            rest[key] = tensor
    if heads and not head:
        raise FormatError(
            f"{where}: no tensor of a classification head, though modules_to_save names {listed(heads)}; expected keys "
            f"like {_PREFIX}{heads[0]}.weight. The file was cut: save the adapter again."
        )
    return head, rest


def _by_module(tensors: Mapping[str, LazyTensor], where: str) -> dict[str, dict[str, LazyTensor]]:
    """The tensors of each adapted module by part: lora_A, lora_B, bias, lora_embedding_A, ..., base_layer."""
    modules: dict[str, dict[str, LazyTensor]] = {}
    unknown: list[str] = []
    for key, tensor in tensors.items():
        short = _short(key)
        match = next((match for pattern in _KEYS if (match := pattern.fullmatch(short))), None)
        if match is None:
            unknown.append(key)
            continue
        parts = modules.setdefault(match["path"], {})
        if match["part"] in parts:
            first = parts[match["part"]].name
            raise FormatError(f"{where}: {first!r} and {key!r} are both {match['part']} of {match['path']!r}.")
        parts[match["part"]] = tensor
    if unknown:
        raise FormatError(
            f"{where}: {len(unknown)} tensors are no part of a LoRA adapter, which would not be complete without them: "
            f"{listed(unknown)}. Expected keys like {_PREFIX}<module>.lora_A.weight. What you can do: {_PLAIN} (where "
            f"these are embeddings: save it with save_embedding_layers=False)."
        )
    if not modules:
        raise FormatError(f"{where}: no LoRA tensors; expected keys like {_PREFIX}<module>.lora_A.weight.")
    return modules


def _read_layer(path: str, parts: Mapping[str, LazyTensor], settings: _Settings, where: str) -> LoraLayer:
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
                f"{rank}, by r and rank_pattern in {CONFIG_FILE}. Config and weights are of different adapters."
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
    """The groups of a convolution, from its B [O, rank / groups, 1, 1]."""
    groups = rank // b.shape[1]
    return groups if groups * b.shape[1] == rank and b.shape[0] % groups == 0 else 1


def _block_diagonal(b: NDArray[Any], groups: int) -> NDArray[Any]:
    """[r, O] from the stored [O, r / groups]: each group's outputs see its own part of the rank."""
    if groups == 1:
        return b.T
    width, rank = b.shape[0] // groups, b.shape[1]
    whole = np.zeros((rank * groups, b.shape[0]), b.dtype)
    for group in range(groups):
        own = slice(group * width, (group + 1) * width)
        whole[group * rank : (group + 1) * rank, own] = b[own].T
    return whole


def _by_group(adapter: LoraAdapter, path: str) -> NDArray[Any]:
    """The inverse: [O, r / groups] of a layer."""
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
    """Reads a PEFT LoRA adapter.

    Args:
        dir_or_id: its directory or hub id; or its weights' file where the config stands beside under the same name
            (`math.safetensors`, `math.json`), as mistral.rs has it.
        name: the name that it gets; None takes the last part of `dir_or_id` (or of `subfolder`).
        **hub_options: `revision`, `subfolder`, `token`, `cache_dir`, `local_files_only`, as of `interop.hub.resolve`.

    Returns:
        The adapter, with all factors in memory, in their stored dtypes.

    Raises:
        FileNotFoundError: no such directory or repository, or no adapter in it.
        FormatError: what is there is broken, incomplete, or an option that no expert can have. The message names the
            adapter, the tensor or option, and the remedy.
    """
    weights = weights_file(dir_or_id)
    files = (CONFIG_FILE, f"{WEIGHTS_STEM}.safetensors")
    directory = weights.parent if weights else resolve(dir_or_id, files=files, **hub_options)
    if name is None:
        place = Path(dir_or_id).expanduser().absolute()
        name = weights.stem if weights else Path(hub_options.get("subfolder") or place).name
    where = f"adapter {name!r} ({directory})"
    config_file = weights.with_suffix(".json").name if weights else CONFIG_FILE
    config_path = file_in(directory, config_file)
    if config_path is None:
        raise FileNotFoundError(f"{where}: no {config_file}; expected the directory of a PEFT LoRA adapter.")
    config = read_json(config_path, _MAX_CONFIG_BYTES)
    settings = _read_settings(config, where)
    tensors = open_file(weights) if weights else open_tensors(directory, WEIGHTS_STEM)
    head, tensors = _split_head(tensors, settings.heads, where)
    modules = _by_module(tensors, where)
    _check_patterns(settings, modules, where)
    layers = {path: _read_layer(path, parts, settings, where) for path, parts in modules.items()}
    embeddings = [path for path, layer in layers.items() if layer.kind == "embedding"]
    if settings.tied and embeddings:
        raise FormatError(
            f"{where}: ensure_weight_tying with {embeddings[0]!r} among the targets can't be an expert: the factors of "
            f"two modules are one. What you can do: train without it, or without embeddings among the targets."
        )
    return LoraAdapter(name=name, path=directory, config=config, layers=layers, head=head)


def save_lora(adapter: LoraAdapter, directory: str | os.PathLike[str]) -> None:
    """Writes an adapter as a PEFT directory, which `PeftModel.from_pretrained` and `load_lora` read.

    The config is the original one but for what the layers changed (a rank or alpha of their own); tensors are written
    in the dtypes that they have, so an unchanged adapter comes back bit by bit.

    Raises:
        FileExistsError: the directory holds files that are no adapter's.
    """
    with replacing(directory, owned=_OWNED) as partial:
        write_lora(adapter, partial)


def write_lora(adapter: LoraAdapter, directory: Path) -> None:
    """Writes an adapter's two files into an existing directory; `save_lora` without the replacing."""
    write_json(directory / CONFIG_FILE, adapter_config(adapter))
    write_safetensors(directory / f"{WEIGHTS_STEM}.safetensors", adapter_tensors(adapter))


def adapter_tensors(adapter: LoraAdapter) -> dict[str, NDArray[Any] | LazyTensor]:
    """The adapter's tensors under PEFT's keys, in torch's layout."""
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
    return tensors | {f"{_PREFIX}{name}": tensor for name, tensor in adapter.head.items()}


def adapter_config(adapter: LoraAdapter) -> dict[str, Any]:
    """The adapter's config: the original, with patterns for the layers whose rank or alpha it doesn't give."""
    config = dict(adapter.config)
    settings = _read_settings(config, f"adapter {adapter.name!r}")
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
    """Full paths as patterns. `^` keeps a short path from matching the end of a longer one."""
    return {"^" + re.escape(path): value for path, value in values.items()}


# ---------------------------------------------------------------------------------------------------------------------
# The adapter's module names, and the base's

# Names that a causal model, a multimodal one and a bare decoder put in front of the same module.
_WRAPPERS = ("base_model", "model", "language_model", "text_model", "transformer", "module")


def match_module(path: str, known: Collection[str]) -> str:
    """The module of the base that an adapter's path means.

    That is the path itself; else the one module that is the same but for wrappers in front (`layers.0...` or
    `language_model.model.layers.0...` for `model.layers.0...`), or that ends in the path.

    Raises:
        FormatError: none or several; the message names the nearest ones.
    """
    if path in known:
        return path
    core = _core(path)
    candidates = [module for module in known if _core(module) == core or module.endswith("." + path)]
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        raise FormatError(f"{path!r} could be any of {listed(candidates)} of the base model.")
    nearest = difflib.get_close_matches(path, list(known)[:2000], n=3, cutoff=0.4)
    raise FormatError(
        f"{path!r} is no module of the base model that can be adapted; nearest: {listed(nearest) or 'none'}. The "
        f"adapter is of another architecture, or targets a module that isn't supported."
    )


@cache
def _core(path: str) -> str:
    parts = path.split(".")
    while len(parts) > 1 and parts[0] in _WRAPPERS:
        del parts[0]
    return ".".join(parts)


def renamed(adapter: LoraAdapter, known: Collection[str]) -> LoraAdapter:
    """The adapter with its layers under the base's own module names, as `match_module` finds them in `known`.

    Raises:
        FormatError: a path that matches none or several, or two that match the same module.
    """
    where = f"adapter {adapter.name!r}"
    layers: dict[str, LoraLayer] = {}
    for path, layer in adapter.layers.items():
        try:
            module = match_module(path, known)
        except FormatError as error:
            raise FormatError(f"{where}: {error}") from None
        if module in layers:
            raise FormatError(f"{where}: {path!r} and another path both mean {module!r} of the base model.")
        layers[module] = layer
    if layers.keys() == adapter.layers.keys():
        return adapter
    # What selected modules by their old names, by regular expressions perhaps, has to name the new ones.
    selection = dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
    config = {**adapter.config, **selection, "target_modules": list(layers), "rank_pattern": {}, "alpha_pattern": {}}
    return replace(adapter, layers=layers, config=config)
