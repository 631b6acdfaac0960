"""Fingerprint of a run: a named entry for each input that determines its result.

A resumed run compares fingerprints and names the inputs that changed.

Whole contents are compared, never samples. The checksums of model arrays are those of
:mod:`xlora_jax.training.checksums`, so meshes, stacked blocks and storage dtypes make no difference.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from xlora_jax.atomic import read_json_object
from xlora_jax.layers.adapted import ABSENT
from xlora_jax.passes import Params, XLora
from xlora_jax.training.checksums import partial_checksums
from xlora_jax.training.data import Rows
from xlora_jax.trees import arrays, flatten

__all__ = [
    "array_checksums",
    "differences",
    "expert_checksums",
    "read_fingerprint",
    "rows_checksums",
    "run_fingerprint",
    "versions_differ",
]

_MOST_NAMES = 3
_MAX_BYTES = 2**26


def run_fingerprint(xlora: XLora, params: Params, expert_names: Sequence[str], rows: Rows) -> dict[str, Any]:
    """Describe the inputs of a run, as JSON values.

    Args:
        xlora: static description of the model.
        params: parameters at the start: base, experts, initial classifier.
        expert_names: names in the order of the classifier's outputs.
        rows: tokenized training data.
    """
    from xlora_jax import __version__

    settings = xlora.config.to_dict()
    del settings["adapters"]  # paths, which may change
    module = xlora.module
    lora = next(leaf for path, leaf in flatten(params["experts"]).items() if path[-1] == "lora_a")
    return {
        "rows": rows_checksums(rows),
        "config": {**settings, "dtype": jnp.dtype(module.dtype).name, "expert_dtype": jnp.dtype(lora.dtype).name},
        "base_config": {
            field.name: repr(getattr(module.config, field.name)) for field in dataclasses.fields(module.config)
        },
        "experts": dict(zip(expert_names, expert_checksums(xlora, params["experts"]), strict=True)),
        "base": array_checksums(xlora, params["base"]),
        "classifier": array_checksums(xlora, params["classifier"]),
        "versions": {"jax": jax.__version__, "xlora_jax": __version__},
    }


def rows_checksums(rows: Rows) -> dict[str, Any]:
    """Describe tokenized data: its size, and a checksum of each array that depends on the order of the rows."""
    digests = {}
    for name, array in rows.arrays.items():
        digest = hashlib.sha256()
        for start in range(0, len(array), 4096):
            digest.update(np.ascontiguousarray(array[start : start + 4096]).data)
        digests[name] = digest.hexdigest()[:32]
    return {"count": len(rows), "length": int(rows.arrays["input_ids"].shape[1]), "arrays": digests}


def array_checksums(xlora: XLora, params: Params) -> dict[str, str]:
    """Compute a checksum of each array of base and classifier, and for stacked blocks one per block."""
    module = xlora.module
    stacks: dict[str, list[str]] = {}
    if getattr(module, "scan_layers", False):
        stacks = {
            group.name: [f"layers_{group.start + i}" for i in range(group.length)]
            for group in getattr(module.config, "groups", ())
        }
    flat = arrays(params)
    asked = {"/".join(path): (leaf, (0,) if path[0] in stacks else ()) for path, leaf in flat.items()}
    sums = partial_checksums(asked)
    found = {}
    for path, leaf in flat.items():
        value = sums["/".join(path)]
        parts = [(path, value)]
        shape = list(leaf.shape)
        if path[0] in stacks:
            parts = [((name, *path[1:]), part) for name, part in zip(stacks[path[0]], value, strict=True)]
            shape = shape[1:]
        for name, part in parts:
            found["/".join(name)] = f"{int(part):016x} {shape}"
    return dict(sorted(found.items()))


def expert_checksums(xlora: XLora, experts: Params) -> list[str]:
    """Compute a checksum of each expert: its matrices, scales, biases and dropout rates, by adapted layer.

    Returns:
        Checksums in the order of the experts. Each is independent of the other experts.
    """
    flat = flatten(experts)
    asked = {}
    for slot in xlora.layers.slots:
        stack = () if isinstance(slot.numbers, int) else (0,)
        for leaf, axis in (("lora_a", -1), ("lora_b", -2), ("lora_bias", -2)):
            if (path := (*slot.path, leaf)) in flat:
                asked["/".join(path)] = (flat[path], (*stack, axis))
    sums = partial_checksums(asked)
    layers: dict[int, dict[str, NDArray[Any]]] = {}
    for slot in xlora.layers.slots:
        found: dict[str, NDArray[Any]] = {}
        for leaf in ("columns", "bias_scale", "lora_dropout"):
            if (path := (*slot.path, leaf)) in flat:
                found[leaf] = np.asarray(flat[path], np.float32)
        for leaf in ("lora_a", "lora_b", "lora_bias"):
            if (name := "/".join((*slot.path, leaf))) in sums:
                found[leaf] = sums[name]
        if isinstance(slot.numbers, int):
            layers[slot.numbers] = found
            continue
        for member, number in enumerate(slot.numbers):
            if number != ABSENT:
                layers[number] = {leaf: value[member] for leaf, value in found.items()}
    return [_expert_checksum(xlora.layers.names, layers, expert) for expert in range(xlora.num_experts)]


def _expert_checksum(names: Sequence[str], layers: Mapping[int, Mapping[str, NDArray[Any]]], expert: int) -> str:
    digest = hashlib.sha256()
    for number, layer in sorted(layers.items()):
        scales = layer["columns"][expert]
        own = np.flatnonzero(scales)
        if not own.size:  # this expert does not adapt the layer
            continue
        digest.update(f"{names[number]} {own.size}".encode())
        digest.update(scales[own].tobytes() + layer["lora_a"][own].tobytes() + layer["lora_b"][own].tobytes())
        # These arrays may exist only because other experts need them. If they have no effect, they count as absent.
        if "bias_scale" in layer and layer["bias_scale"][expert] != 0:
            digest.update(b"bias" + layer["bias_scale"][expert].tobytes() + layer["lora_bias"][expert].tobytes())
        if "lora_dropout" in layer and layer["lora_dropout"][expert] != 0:
            digest.update(b"dropout" + layer["lora_dropout"][expert].tobytes())
    return digest.hexdigest()[:32]


def read_fingerprint(path: Path) -> dict[str, Any]:
    """Read a stored fingerprint.

    Raises:
        ValueError: the file is damaged or lacks an entry; the message names it.
    """
    found = read_json_object(path, _MAX_BYTES)
    for name in ("rows", "config", "base_config", "experts", "base", "classifier", "versions"):
        if not isinstance(found.get(name), dict):
            raise ValueError(f"{path}: expected an object {name!r}, got {found.get(name)!r:.80}")
    return found


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the names of the entries that differ between two fingerprints, except library versions."""
    found = []
    if was["rows"] != now["rows"]:
        sizes = [
            f"{part.get('count')!s:.20} of {part.get('length')!s:.20} tokens" for part in (was["rows"], now["rows"])
        ]
        found.append(
            f"rows: {sizes[0]} there, {sizes[1]} now"
            if sizes[0] != sizes[1]
            else f"rows: {sizes[0]} as there, with other content or in another order"
        )
    for part, label in (("config", "config"), ("base_config", "base")):
        for name in _changed(was[part], now[part]):
            there, here = (f"{side[part].get(name)!s:.120}" for side in (was, now))
            found.append(f"{label}: {name:.100} {there} there, {here} now")
    if list(was["experts"]) != list(now["experts"]):
        found.append(f"experts: {_few(was['experts'])} there, {_few(now['experts'])} now")
    else:
        changed = _changed(was["experts"], now["experts"])
        found += [f"expert {name!r:.100}: other weights, scale, layers or dropout" for name in changed]
    for part in ("base", "classifier"):
        if changed := _changed(was[part], now[part]):
            found.append(f"{part}: {_few(changed)} ({len(changed)} of {len(now[part])} arrays differ)")
    return found


def versions_differ(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the names of the libraries whose versions differ."""
    return [
        f"{name:.100} {was['versions'].get(name)!s:.40} there, {now['versions'].get(name)!s:.40} now"
        for name in _changed(was["versions"], now["versions"])
    ]


def _changed(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the keys whose values differ, those of ``now`` first."""
    absent = object()
    return [name for name in {**now, **was} if was.get(name, absent) != now.get(name, absent)]


def _few(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _MOST_NAMES} more" if len(listed) > _MOST_NAMES else ""
    return ", ".join(f"{name:.100}" for name in listed[:_MOST_NAMES]) + more
