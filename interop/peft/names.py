"""Match an adapter's module names with those of the base model."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from dataclasses import replace
from functools import cache

from interop.peft.adapter import LoraAdapter, LoraLayer
from interop.peft.formats import format_of_keys
from interop.storage.errors import FormatError, listed

__all__ = ["match_module", "renamed"]

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
