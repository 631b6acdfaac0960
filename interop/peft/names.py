"""Matching of an adapter's module names with those of the base model."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from dataclasses import replace
from functools import cache

from interop.peft.adapter import LoraAdapter, LoraLayer
from interop.peft.formats import format_of_keys
from interop.storage.errors import FormatError, listed

__all__ = ["match_module", "renamed"]

# Leading parts of a module's path that differ between a causal model, a multimodal model and a bare decoder.
_WRAPPERS = ("base_model", "model", "language_model", "text_model", "transformer", "module")


def match_module(path: str, known: Collection[str]) -> str:
    """Return the module of the base that an adapter's path means.

    That is the path itself, if the base has it. Otherwise it is the one module that differs only in leading wrappers
    (`layers.0...` or `language_model.model.layers.0...` for `model.layers.0...`), or whose path ends in the given path.

    Raises:
        FormatError: no module matches, or several do; the message names the nearest ones.
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
    reason = format_of_keys([f"{path}."]) or "It is of another architecture, or targets a module that isn't supported"
    raise FormatError(
        f"{path!r} is no module of the base model that can be adapted; nearest: {listed(nearest) or 'none'}. {reason}."
    )


@cache
def _core(path: str) -> str:
    parts = path.split(".")
    while len(parts) > 1 and parts[0] in _WRAPPERS:
        del parts[0]
    return ".".join(parts)


def renamed(adapter: LoraAdapter, known: Collection[str]) -> LoraAdapter:
    """Return the adapter with the base's module names, as `match_module` finds them in `known`.

    Raises:
        FormatError: a path matches no module or several, or two paths match the same module.
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
    # Fields that select modules by their old names, perhaps by regular expressions, must select the new names.
    selection = dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
    config = {**adapter.config, **selection, "target_modules": list(layers), "rank_pattern": {}, "alpha_pattern": {}}
    return replace(adapter, layers=layers, config=config)
