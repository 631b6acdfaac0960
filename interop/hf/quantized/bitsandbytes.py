"""Weights that bitsandbytes quantized: NF4 and FP4 in blocks, with scales quantized once more or not, and 8 bits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from interop.hf.quantized.grid import Codes, Grid, quantized_tensor
from interop.storage.errors import FormatError, brief
from interop.storage.files import parse_json
from interop.storage.tensors import LazyTensor
from xlora_jax.layers.quantized import LEVELS

__all__ = ["decode"]

_STATE = ".quant_state.bitsandbytes__"


def decode(tensors: Mapping[str, LazyTensor], settings: Mapping[str, Any], where: str) -> dict[str, LazyTensor]:
    """Return the tensors with each quantized weight in place of the tensors that hold it.

    Args:
        tensors: tensors of the files by name.
        settings: ``quantization_config`` of config.json; the tensors say all that is needed.
        where: path for messages.
    """
    found = dict(tensors)
    for name in tensors:
        if _STATE in name:
            weight = name.split(_STATE)[0]
            parts = {key: found.pop(key) for key in list(found) if key == weight or key.startswith(f"{weight}.")}
            found[weight] = _four_bits(weight, parts, name)
        elif name.endswith(".SCB"):
            module = name.removesuffix(".SCB")
            found.pop(f"{module}.weight_format", None)
            found[f"{module}.weight"] = _eight_bits(module, found.pop(f"{module}.weight", None), found.pop(name))
    return found


def _eight_bits(module: str, weight: LazyTensor | None, statistics: LazyTensor) -> LazyTensor:
    if weight is None or weight.dtype != np.int8 or weight.shape[:1] != (statistics.shape or (0,))[:1]:
        raise FormatError(
            f"{statistics.file}: {statistics.name!r} has the scales of {module}.weight; expected that tensor in int8 "
            f"with one row per scale, got {None if weight is None else (str(weight.dtype), weight.shape)}."
        )

    def load() -> Codes:
        largest = statistics.read().astype(np.float32).reshape(-1, 1)
        return Codes(weight.read(), largest * np.float32(7.874015718698502e-3))

    return quantized_tensor(weight.name, weight.file, weight.shape, Grid("int8", weight.shape[-1]), load)


def _four_bits(name: str, parts: Mapping[str, LazyTensor], state_name: str) -> LazyTensor:
    """Return a weight of packed codes; blocks of consecutive weights of the flattened matrix share a scale."""
    file = parts[state_name].file
    state = parse_json(parts[state_name].read().tobytes(), f"{file} ({state_name})")
    kind, block, shape = state_name.split(_STATE)[1], state.get("blocksize"), state.get("shape")
    needed = [f"{name}.absmax", f"{name}.quant_map"]
    nested = f"{name}.nested_absmax" in parts
    if nested:
        needed += [f"{name}.nested_absmax", f"{name}.nested_quant_map"]
    missing = [part for part in (name, *needed) if part not in parts]
    if (
        missing
        or not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape))
        or type(block) is not int
        or block < 1
    ):
        raise FormatError(
            f"{file}: {state_name!r}: expected the state of a quantized matrix with blocksize, shape and the tensors "
            f"{', '.join(needed)}; got {brief(state)}, missing {', '.join(missing) or 'none'}."
        )
    rows, depth = shape
    packed, absmax, levels = (parts[part] for part in (name, *needed[:2]))
    stored = math.prod(packed.shape) * packed.dtype.itemsize
    blocks = -(-rows * depth // block)
    if stored * 2 != rows * depth or math.prod(absmax.shape) != blocks or levels.shape != (16,):
        raise FormatError(
            f"{file}: {name!r}: expected {rows * depth // 2} bytes, {blocks} scales and 16 levels for shape {shape} in "
            f"blocks of {block}, got {stored}, {math.prod(absmax.shape)} and {list(levels.shape)}."
        )

    def load_scales() -> NDArray[np.float32]:
        scales = absmax.read().reshape(-1)
        if not nested:
            return scales.astype(np.float32)
        outer = parts[f"{name}.nested_absmax"].read().astype(np.float32).reshape(-1)
        table = parts[f"{name}.nested_quant_map"].read().astype(np.float32)
        width = state.get("nested_blocksize")
        if type(width) is not int or -(-scales.size // width) != outer.size or not (scales < len(table)).all():
            raise FormatError(
                f"{file}: {name!r}: nested scales do not fit: {scales.size} scales in blocks of {brief(width)}, "
                f"{outer.size} scales of these, {len(table)} levels."
            )
        values: NDArray[np.float32] = table[scales] * np.repeat(outer, width)[: scales.size]
        return values + np.float32(state.get("nested_offset", 0))

    def load_codes() -> NDArray[np.uint8]:
        halves = packed.read().reshape(-1).view(np.uint8)
        return np.stack([halves >> 4, halves & 15], axis=-1).reshape(rows, depth)

    table = levels.read().astype(np.float32)
    if kind == "nf4" and np.array_equal(table, LEVELS["nf4"]) and depth % block == 0 and block % 2 == 0:

        def load() -> Codes:
            return Codes(load_codes(), load_scales().reshape(rows, depth // block))

        return quantized_tensor(name, file, (rows, depth), Grid("nf4", block), load)

    def values() -> NDArray[np.float32]:
        found = table[load_codes()].reshape(-1)
        found *= np.repeat(load_scales(), block)[: found.size]
        return found.reshape(rows, depth)

    return LazyTensor(name, file, np.dtype(np.float32), (rows, depth), values)
