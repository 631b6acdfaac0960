"""Reading of `adapter_config.json`.

A table lists every field that any PEFT version writes: fields that are read, have no effect, or are refused.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from interop.peft.formats import format_of_config
from interop.peft.patterns import first_match
from interop.storage.errors import FormatError, brief

__all__ = ["ADAPTER_CONFIG_FILE", "HEADS", "PLAIN", "TASKS", "AdapterSettings", "read_settings"]

ADAPTER_CONFIG_FILE = "adapter_config.json"


@dataclass(frozen=True)
class _Handled:
    """The field is read."""


@dataclass(frozen=True)
class _NoEffect:
    """The meaning of the stored A and B does not depend on the field."""


@dataclass(frozen=True)
class _Refused:
    """Values other than the neutral ones are not implemented."""

    neutral: tuple[object, ...]
    why: str
    remedy: str


_MERGE = "merge the adapter into its base with PEFT (merge_and_unload) and extract a plain LoRA, or train one"
PLAIN = "train a plain LoRA adapter"
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
    # They select modules, and the stored keys name the selected modules.
    "target_modules": _NoEffect(),
    "exclude_modules": _NoEffect(),
    "layers_to_transform": _NoEffect(),
    "layers_pattern": _NoEffect(),
    # They concern the base's weight, the training, or the file.
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
        ("none", *_NOTHING), "it trained biases of the base, and experts would overwrite each other", PLAIN
    ),
    "modules_to_save": _Handled(),
    "trainable_token_indices": _Refused(_NOTHING, "it replaces rows of the base's embedding", PLAIN),
    "layer_replication": _Refused(_NOTHING, "its base has replicated layers", PLAIN),
    "target_parameters": _Refused(_NOTHING, "it adapts parameters that are no modules", PLAIN),
    "alora_invocation_tokens": _Refused(_NOTHING, "aLoRA acts from certain tokens on only", PLAIN),
    "use_qalora": _Refused(_NOTHING, "QALoRA pools the inputs", PLAIN),
    "use_bdlora": _Refused(_NOTHING, "BD-LoRA has block-diagonal factors", PLAIN),
    "kasa_config": _Refused(_NOTHING, "KaSA changes the base's weights and has a third factor", PLAIN),
    "arrow_config": _Refused(
        _NOTHING, "Arrow routes among adapters by itself", "load the adapters it routes to as experts"
    ),
    "monteclora_config": _Refused(_NOTHING, "MonteCLoRA samples its factors", PLAIN),
    "megatron_config": _Refused(
        _NOTHING, "Megatron's parallel layers are not supported", "convert the adapter to HF's layers"
    ),
    "enable_lora": _Refused(_NOTHING, "the merged projections of PEFT 0.2 are not supported", PLAIN),
}

# Names of classification heads in transformers. PEFT saves them whole for task_type SEQ_CLS and TOKEN_CLS; the stored
# keys name the one that the model has.
HEADS = ("classifier", "pre_classifier", "score")  # DistilBERT has the first two
TASKS = ("SEQ_CLS", "TOKEN_CLS")
# Initializations that don't change the base. The others (pissa, olora, corda, loftq, lora_ga) change it.
_PLAIN_INITIALIZATIONS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True)
class AdapterSettings:
    """Checked fields of `adapter_config.json` that affect the forward pass."""

    r: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    dropout: float
    bias: bool
    tied: bool
    saved: tuple[str, ...]
    heads: tuple[str, ...]

    def of(self, path: str) -> tuple[int, float]:
        """Return rank and alpha of the module at `path`."""
        rank = self.rank_pattern.get(first_match(self.rank_pattern, path), self.r)
        alpha = self.alpha_pattern.get(first_match(self.alpha_pattern, path), self.alpha)
        return rank, alpha

    def scale(self, r: int, alpha: float) -> float:
        """Return the factor of the contribution: alpha / r, or alpha / sqrt(r) for rsLoRA."""
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r


def read_settings(config: Mapping[str, Any], where: str) -> AdapterSettings:
    """Read and check an adapter's config; ``where`` names the adapter in errors."""
    if config.get("peft_type") != "LORA":
        hint = format_of_config(config) or "Other kinds can't be experts"
        raise FormatError(f"{where}: peft_type is {brief(config.get('peft_type'))}; expected 'LORA'. {hint}.")
    for name, value in config.items():
        _check_field(name, value, where)
    _pass_over(config, where)
    _check_initialization(config.get("init_lora_weights"), where)
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
    saved = _read_saved(config, where)
    return AdapterSettings(
        r=r,
        alpha=alpha,
        rank_pattern=_read_pattern(config, "rank_pattern", where, _is_rank, "an integer of at least 1"),
        alpha_pattern=_read_pattern(config, "alpha_pattern", where, _is_number, "a number"),
        use_rslora=_read_bool(config, "use_rslora", where),
        dropout=dropout,
        bias=_read_bool(config, "lora_bias", where),
        tied=_read_bool(config, "ensure_weight_tying", where),
        saved=saved,
        # For classification tasks PEFT saves these heads whole, whatever modules_to_save is.
        heads=tuple(name for name in HEADS if name in saved or config.get("task_type") in TASKS),
    )


def _read_saved(config: Mapping[str, Any], where: str) -> tuple[str, ...]:
    saved: list[str] = _checked(
        where,
        "modules_to_save",
        config.get("modules_to_save") or [],
        lambda value: type(value) is list and all(type(name) is str and name for name in value),
        "a list of modules' names",
    )
    return tuple(dict.fromkeys(saved))


# PEFT version of the table. An unknown field of a later version may be a setting of a new kind of LoRA.
_KNOWN_VERSION = (0, 21)


def _pass_over(config: Mapping[str, Any], where: str) -> None:
    """Warn of unknown fields, which PEFT ignores; raise FormatError for unknown fields that a later PEFT wrote."""
    unknown = {name: value for name, value in config.items() if name not in _FIELDS}
    unknown = {name: value for name, value in unknown.items() if not _is_one_of(value, _NOTHING)}
    if not unknown:
        return
    version = re.match(r"(\d+)\.(\d+)", str(config.get("peft_version") or ""))
    if version and (int(version[1]), int(version[2])) > _KNOWN_VERSION:
        name, value = next(iter(unknown.items()))
        raise FormatError(
            f"{where}: unknown field {name!r} = {brief(value)}, written by PEFT {config['peft_version']}, which is "
            f"later than the one known here (0.21). It may change what the adapter means, so it isn't ignored; remove "
            f"it if you know that it doesn't, or update this library."
        )
    warnings.warn(
        f"{where}: {ADAPTER_CONFIG_FILE} has fields that PEFT doesn't know and ignores, and so does this library: "
        f"{', '.join(map(brief, unknown))}.",
        UserWarning,
        stacklevel=4,
    )


def _check_field(name: str, value: object, where: str) -> None:
    rule = _FIELDS.get(name)
    if isinstance(rule, _Refused) and not _is_one_of(value, rule.neutral):
        raise FormatError(
            f"{where}: {name} = {brief(value)} can't be an expert: {rule.why}. What you can do: {rule.remedy}."
        )


def _check_initialization(value: object, where: str) -> None:
    if isinstance(value, str):
        value = value.lower()
    if not _is_one_of(value, _PLAIN_INITIALIZATIONS):
        raise FormatError(
            f"{where}: init_lora_weights = {brief(value)} can't be an expert: that initialization changed the base's "
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


_MAX_PATTERNS = 10_000


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
