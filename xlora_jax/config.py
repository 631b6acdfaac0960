"""The X-LoRA configuration: PEFT's fields, names and defaults, validated in one place.

`XLoraConfig` is frozen and hashable, so it can be a static argument of a jitted function: a changed setting is a new
config (`dataclasses.replace`). Settings that PEFT warns about give a warning here too; settings that can't work are an
error.
"""

from __future__ import annotations

import math
import numbers
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, cast

__all__ = ["XLoraConfig"]

_DEFAULT_HIDDEN_SIZE = 4096

# Default of the fields that PEFT fills in with a warning. After construction these fields are never None.
_MISSING: Any = None


class _Adapters(Mapping[str, str]):
    """An ordered, immutable and hashable mapping of expert name to directory or hub id.

    The order is the order of the experts in the classifier's output, so two mappings that differ in order are
    different.
    """

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[str, str]) -> None:
        self._items = dict(items)

    def __getitem__(self, name: str) -> str:
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(tuple(self._items.items()))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mapping):
            return NotImplemented
        return tuple(self.items()) == tuple(other.items())

    def __repr__(self) -> str:
        return repr(self._items)


@dataclass(frozen=True)
class XLoraConfig:
    """Settings of an X-LoRA model, with the names and defaults of `peft.XLoraConfig`.

    Args:
        hidden_size: width of the base model's hidden states. None warns and means 4096, as in PEFT.
        adapters: expert name to LoRA directory or hub id, in the order of the classifier's outputs. None warns and
            means no experts known yet.
        enable_softmax: whether the classifier's outputs go through a softmax over the experts, after division by
            `softmax_temperature`.
        enable_softmax_topk: whether the `top_k_lora` selected gates go through a softmax. Not useful together with
            `enable_softmax`.
        layerwise_scalings: one gate per expert and adapted layer (True), or one gate per expert for all layers (False).
        xlora_depth: number of linear layers of the classifier, at least 1.
        xlora_size: width of the classifier's inner layers; no effect at depth 1.
        xlora_dropout_p: dropout probability after each inner layer, in [0, 1); no effect at depth 1.
        use_trainable_adapters: whether the experts are trained together with the classifier.
        softmax_temperature: divisor of the classifier's outputs, above 0; lower is sharper.
        top_k_lora: number of largest gates to keep per adapted layer, between 1 and the number of experts. None keeps
            all.
        scaling_pass_value: constant gate of the scaling pass. None means 1/n for n experts.
        global_scaling_weight: factor of every expert's output.

    Raises:
        TypeError: a field has the wrong type (a number as a string, a bool as a number, ...).
        ValueError: a field has a value that can't work.
    """

    hidden_size: int = _MISSING
    adapters: Mapping[str, str] = _MISSING
    enable_softmax: bool = True
    enable_softmax_topk: bool = False
    layerwise_scalings: bool = False
    xlora_depth: int = 1
    xlora_size: int = 2048
    xlora_dropout_p: float = 0.2
    use_trainable_adapters: bool = False
    softmax_temperature: float = 1.0
    top_k_lora: int | None = None
    scaling_pass_value: float | None = 0.0
    global_scaling_weight: float = 1.0

    def __post_init__(self) -> None:
        """Fill in PEFT's defaults, normalize numbers and validate the fields."""
        given = vars(self)
        if given["hidden_size"] is None:
            _warn(f"hidden_size is not given: {_DEFAULT_HIDDEN_SIZE} is assumed; pass the base model's hidden size.")
            self._set("hidden_size", _DEFAULT_HIDDEN_SIZE)
        if given["adapters"] is None:
            _warn("adapters is not given: no experts are assumed; pass {name: directory or hub id}.")
            self._set("adapters", {})

        self._set("adapters", _adapters(self.adapters))
        for name in ("hidden_size", "xlora_depth", "xlora_size"):
            self._set(name, _integer(name, getattr(self, name)))
        for name in ("enable_softmax", "enable_softmax_topk", "layerwise_scalings", "use_trainable_adapters"):
            _require_bool(name, getattr(self, name))
        for name in ("xlora_dropout_p", "softmax_temperature", "global_scaling_weight"):
            self._set(name, _real(name, getattr(self, name)))
        if self.top_k_lora is not None:
            self._set("top_k_lora", _integer("top_k_lora", self.top_k_lora))
        if self.scaling_pass_value is not None:
            self._set("scaling_pass_value", _real("scaling_pass_value", self.scaling_pass_value))

        _require("hidden_size", self.hidden_size, self.hidden_size >= 1, "at least 1")
        _require("xlora_depth", self.xlora_depth, self.xlora_depth >= 1, "at least 1")
        if self.xlora_depth > 1:
            _require("xlora_size", self.xlora_size, self.xlora_size >= 1, "at least 1 (xlora_depth is above 1)")
        _require("xlora_dropout_p", self.xlora_dropout_p, 0.0 <= self.xlora_dropout_p < 1.0, "at least 0 and below 1")
        _require("softmax_temperature", self.softmax_temperature, self.softmax_temperature > 0.0, "above 0")
        if self.top_k_lora is not None:
            _require("top_k_lora", self.top_k_lora, self.top_k_lora >= 1, "at least 1, or None to keep all experts")
        if self.adapters:
            self.validate_experts(len(self.adapters))

        if self.enable_softmax_topk and self.top_k_lora is None:
            _warn("enable_softmax_topk is set but top_k_lora is not: the softmax runs over all non-zero gates.")
        if self.enable_softmax_topk and self.enable_softmax:
            _warn("enable_softmax_topk and enable_softmax are both set: two softmaxes in a row work worse than one.")

    def validate_experts(self, n_experts: int) -> None:
        """Raise ValueError unless these settings work with `n_experts` experts."""
        if n_experts < 1:
            raise ValueError("X-LoRA needs at least one expert, got none: pass adapters={name: directory or hub id}.")
        if self.top_k_lora is not None and self.top_k_lora > n_experts:
            raise ValueError(
                f"top_k_lora must be at most the number of experts ({n_experts}), got {self.top_k_lora}: lower it, or "
                f"set it to None to keep all experts."
            )

    def scaling_pass_gate(self, n_experts: int) -> float:
        """Return the constant gate of the scaling pass: `scaling_pass_value`, or 1/n if that is None."""
        self.validate_experts(n_experts)
        return 1.0 / n_experts if self.scaling_pass_value is None else self.scaling_pass_value

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> XLoraConfig:
        """Return a config from PEFT's field names; a missing field takes PEFT's default.

        Raises:
            ValueError: a field is not one of the 13, or has a value that can't work.
            TypeError: a value has the wrong type.
        """
        known = [field.name for field in fields(cls)]
        unknown = [repr(name) for name in values if name not in known]
        if unknown:
            raise ValueError(f"unknown field in an X-LoRA config: {', '.join(unknown)}; known are {', '.join(known)}.")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return the 13 fields under PEFT's names, as JSON values; `from_dict` of them gives an equal config."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["adapters"] = dict(self.adapters)
        return values

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # during construction only: the dataclass is frozen


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=4)  # _warn, __post_init__, __init__, the caller


def _require(name: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {expected}, got {value!r}.")


def _wrong_type(name: str, value: object, expected: str) -> TypeError:
    return TypeError(f"{name} must be {expected}, got {value!r} ({type(value).__name__}).")


def _require_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise _wrong_type(name, value, "True or False")


def _integer(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise _wrong_type(name, value, "an integer")
    return int(value)


def _real(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise _wrong_type(name, value, "a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    _require(name, value, math.isfinite(number), "finite")
    return number


def _adapters(value: object) -> _Adapters:
    if not isinstance(value, Mapping):
        raise _wrong_type("adapters", value, "a mapping of expert name to directory or hub id")
    items = {}
    for name, path in cast(Mapping[object, object], value).items():
        if not isinstance(name, str) or not name:
            raise _wrong_type("an expert's name in adapters", name, "a non-empty string")
        if not isinstance(path, str | os.PathLike):
            raise _wrong_type(f"adapters[{name!r}]", path, "a directory or hub id")
        items[name] = str(path)
    return _Adapters(items)
