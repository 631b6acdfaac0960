"""Integer weights in 4 or 8 bits, packed into int32, of compressed-tensors, AWQ and GPTQ.

The value of a code q in a group with scale s and zero point z is ``(q - z) s``. Scales have at most 16 bits, so that
``q s - z s`` is the same number in float32.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from interop.hf.quantized.grid import Codes, Grid, quantized_tensor
from interop.storage.errors import FormatError, brief
from interop.storage.tensors import LazyTensor

__all__ = ["decode_awq", "decode_compressed", "decode_gptq"]

# Position of the column of each 4-bit code in an int32 of AWQ, from the lowest bits up.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def decode_awq(tensors: Mapping[str, LazyTensor], settings: Mapping[str, Any], where: str) -> dict[str, LazyTensor]:
    """Return the tensors with each quantized weight of AWQ in place of the tensors that hold it.

    Args:
        tensors: tensors of the files by name.
        settings: ``quantization_config`` of config.json.
        where: path for messages.
    """
    _expect(settings, where, bits=(4,), version=("gemm", "GEMM", None))

    def unpack(packed: NDArray[Any], bits: int) -> NDArray[np.uint8]:
        codes = _unpacked(packed, bits)
        return codes.reshape(len(codes), -1, 8)[..., np.argsort(_AWQ_ORDER)].reshape(len(codes), -1)

    def weight(module: str, parts: Mapping[str, LazyTensor]) -> LazyTensor:
        packed, zeros, scales = _parts(module, parts, "qweight", "qzeros", "scales")
        depth, width = packed.shape[0], packed.shape[1] * 8
        return _weight(
            module, scales, (width, depth), 4,
            codes=lambda: unpack(packed.read(), 4).T,
            scales=lambda: scales.read().T,
            zeros=lambda: unpack(zeros.read(), 4).T,
            packed=((packed, (depth, width // 8)), (zeros, (scales.shape[0], width // 8))),
            groups=scales.shape[::-1],
        )  # fmt: skip

    return _decoded(tensors, ("qweight", "qzeros", "scales"), weight)


def decode_gptq(tensors: Mapping[str, LazyTensor], settings: Mapping[str, Any], where: str) -> dict[str, LazyTensor]:
    """Return the tensors with each quantized weight of GPTQ in place of the tensors that hold it.

    Arguments are those of :func:`decode_awq`.
    """
    bits = _expect(settings, where, bits=(4, 8), checkpoint_format=("gptq", "gptq_v2", None))
    # The first format stores zero points minus one.
    added = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1
    count = 32 // bits

    def weight(module: str, parts: Mapping[str, LazyTensor]) -> LazyTensor:
        packed, zeros, scales = _parts(module, parts, "qweight", "qzeros", "scales")
        depth, width = packed.shape[0] * count, packed.shape[1]
        order = parts.get(f"{module}.g_idx")
        if order is not None:
            groups = np.arange(depth) // max(1, depth // max(1, scales.shape[0]))
            if order.shape != (depth,) or not np.array_equal(order.read(), groups):
                raise FormatError(
                    f"{order.file}: {order.name!r}: the inputs of a group are not consecutive (desc_act, act-order), "
                    f"which is not supported. Take a version without it, or the model that this one was made from."
                )
        return _weight(
            module, scales, (width, depth), bits,
            codes=lambda: _unpacked(np.ascontiguousarray(packed.read().T), bits),
            scales=lambda: scales.read().T,
            zeros=lambda: _unpacked(zeros.read(), bits).T.astype(np.int16) + np.int16(added),
            packed=((packed, (depth // count, width)), (zeros, (scales.shape[0], width // count))),
            groups=scales.shape[::-1],
        )  # fmt: skip

    return _decoded(tensors, ("qweight", "qzeros", "scales", "g_idx"), weight)


def decode_compressed(
    tensors: Mapping[str, LazyTensor], settings: Mapping[str, Any], where: str
) -> dict[str, LazyTensor]:
    """Return the tensors with each quantized weight of compressed-tensors in place of the tensors that hold it.

    Arguments are those of :func:`decode_awq`. Activations are not quantized; a warning says so if the file asks for it.
    """
    groups = settings.get("config_groups")
    parts_of = [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []
    if any(group.get("input_activations") for group in parts_of):
        warnings.warn(
            f"{where}: the file asks for quantized activations too. Here only the weights are, so that results are "
            f"closer to those of the model that this one was made from.",
            UserWarning,
            stacklevel=4,
        )

    def weight(module: str, parts: Mapping[str, LazyTensor]) -> LazyTensor:
        zeros = parts.get(f"{module}.weight_zero_point")
        if f"{module}.weight_g_idx" in parts:
            raise FormatError(
                f"{parts[f'{module}.weight_g_idx'].file}: {module}.weight_g_idx: the inputs of a group are not "
                f"consecutive (actorder), which is not supported. Take a version without it, or the model that this "
                f"one was made from."
            )
        if f"{module}.weight_packed" not in parts:
            stored, scales = _parts(module, parts, "weight", "weight_scale")
            if stored.dtype != np.int8:
                raise FormatError(
                    f"{stored.file}: tensor {stored.name!r}: expected int8, got {stored.dtype}; of compressed-tensors, "
                    f"weights in int4 and int8 are supported. Take one of these, or the model that this one was made "
                    f"from."
                )
            bits, shape = 8, stored.shape
            codes: Callable[[], NDArray[Any]] = lambda: (stored.read().astype(np.int16) + 128).astype(np.uint8)  # noqa: E731
            packed: list[tuple[LazyTensor, tuple[int, ...]]] = []
        else:
            stored, scales, size = _parts(module, parts, "weight_packed", "weight_scale", "weight_shape")
            shape = tuple(int(length) for length in size.read().reshape(-1))
            bits = 32 * stored.shape[-1] // max(1, shape[-1]) if len(shape) == 2 else 0
            if bits not in (4, 8):
                raise FormatError(
                    f"{stored.file}: tensor {stored.name!r}: expected a matrix in 4 or 8 bits, got {list(stored.shape)}"
                    f" of int32 for a weight of shape {list(shape)}."
                )
            codes = lambda: _unpacked(stored.read(), bits)  # noqa: E731
            packed = [(stored, (shape[0], shape[1] * bits // 32))]
        count = 1 if scales.shape in ((), (1,)) else scales.shape[-1]
        half = 2 ** (bits - 1)
        if zeros is not None and zeros.dtype == np.int32:
            packed.append((zeros, (-(-shape[0] * bits // 32), count)))
        elif zeros is not None and (zeros.dtype != np.int8 or math.prod(zeros.shape) != math.prod(scales.shape)):
            raise FormatError(
                f"{zeros.file}: tensor {zeros.name!r}: expected a zero point in int8 for each of the scales "
                f"{list(scales.shape)}, or int32 with several, got {zeros.dtype} {list(zeros.shape)}."
            )

        def read_zeros() -> NDArray[Any]:
            assert zeros is not None
            if zeros.dtype == np.int32:
                return _unpacked(np.ascontiguousarray(zeros.read().T), bits).T[: shape[0]]
            return np.broadcast_to(zeros.read().reshape(-1, count).astype(np.int16) + half, (shape[0], count))

        return _weight(
            module, scales, shape, bits,
            codes=codes,
            scales=lambda: np.broadcast_to(scales.read().reshape(-1, count), (shape[0], count)),
            zeros=None if zeros is None else read_zeros,
            packed=packed,
            groups=(shape[0], count) if scales.shape in ((), (1,)) else scales.shape,
        )  # fmt: skip

    endings = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
    ignored = ("input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point")
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(tuple(f".{n}" for n in ignored))}
    return _decoded(kept, endings, weight)


def _expect(settings: Mapping[str, Any], where: str, *, bits: tuple[int, ...], **allowed: Sequence[Any]) -> int:
    """Return the number of bits, after a check of the settings."""
    for name, values in {"bits": bits, **allowed}.items():
        if settings.get(name) not in values:
            raise FormatError(
                f"{where}: field 'quantization_config': {name}: expected one of "
                f"{', '.join(str(value) for value in values if value is not None)}, got {brief(settings.get(name))}. "
                f"Take such a version, or the model that this one was made from."
            )
    found: int = settings["bits"]
    return found


def _decoded(
    tensors: Mapping[str, LazyTensor],
    endings: Sequence[str],
    weight: Callable[[str, Mapping[str, LazyTensor]], LazyTensor],
) -> dict[str, LazyTensor]:
    """Return the tensors with the weight of each module that has tensors with one of the endings."""
    modules: dict[str, dict[str, LazyTensor]] = {}
    found = dict(tensors)
    for name in tensors:
        module, _, ending = name.rpartition(".")
        if ending in endings:
            modules.setdefault(module, {})[name] = found.pop(name)
    for module, parts in modules.items():
        plain = f"{module}.weight"
        if plain in found:
            parts[plain] = found.pop(plain)
        found[plain] = weight(module, parts)
    return found


def _parts(module: str, parts: Mapping[str, LazyTensor], *endings: str) -> list[LazyTensor]:
    missing = [ending for ending in endings if f"{module}.{ending}" not in parts]
    if missing:
        some = next(iter(parts.values()))
        raise FormatError(
            f"{some.file}: module {module!r} is quantized: expected its tensors {', '.join(endings)}, missing: "
            f"{', '.join(missing)}. Download the files again."
        )
    found = [parts[f"{module}.{ending}"] for ending in endings]
    for tensor in found:
        if len(tensor.shape) != 2 and tensor.name.rpartition(".")[2] in ("qweight", "qzeros", "scales"):
            raise FormatError(f"{tensor.file}: tensor {tensor.name!r}: expected two axes, got {list(tensor.shape)}.")
    return found


def _weight(
    module: str,
    scale_tensor: LazyTensor,
    shape: tuple[int, ...],
    bits: int,
    *,
    codes: Callable[[], NDArray[Any]],
    scales: Callable[[], NDArray[Any]],
    zeros: Callable[[], NDArray[Any]] | None,
    packed: Sequence[tuple[LazyTensor, tuple[int, ...]]],
    groups: tuple[int, ...],
) -> LazyTensor:
    """Return the weight ``[F, D]``, from functions that read its unsigned codes, scales and zero points.

    Args:
        module: name of the module.
        scale_tensor: tensor of the scales, for messages.
        shape: ``[F, D]``.
        bits: 4 or 8.
        codes: function that reads unsigned codes ``[F, D]``.
        scales: function that reads scales ``[F, G]``.
        zeros: function that reads zero points ``[F, G]`` on the scale of the codes; None: the middle of the codes.
        packed: int32 tensors and the shape that each must have.
        groups: shape of the scales, ``[F, G]``.
    """
    name, file = f"{module}.weight", scale_tensor.file
    width, depth = shape if len(shape) == 2 else (0, 0)
    if len(groups) != 2 or groups[0] != width or not groups[1] or depth % groups[1]:
        raise FormatError(
            f"{file}: tensor {scale_tensor.name!r}: expected a scale for each of {width} outputs and each group of "
            f"{depth} inputs, got {list(scale_tensor.shape)}."
        )
    for tensor, expected in packed:
        if tensor.dtype != np.int32 or tensor.shape != expected or math.prod(expected) == 0:
            raise FormatError(
                f"{tensor.file}: tensor {tensor.name!r}: expected int32 {list(expected)} for a weight of shape "
                f"{list(shape)} in {bits} bits, got {tensor.dtype} {list(tensor.shape)}."
            )
    half = 2 ** (bits - 1)

    def load() -> Codes:
        unsigned, scale = codes(), scales().astype(np.float32)
        offset = None
        if zeros is not None:
            # Codes in 8 bits are shifted to be signed.
            offset = (np.float32(half if bits == 8 else 0) - zeros().astype(np.float32)) * scale
        return Codes((unsigned ^ 0x80).view(np.int8) if bits == 8 else unsigned, scale, offset)

    grid = Grid("int8" if bits == 8 else "int4", depth // groups[1], zeros is not None)
    return quantized_tensor(name, Path(file), shape, grid, load)


def _unpacked(packed: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Return the unsigned codes in the last axis of an int32 array, from the lowest bits up."""
    octets = np.ascontiguousarray(packed).view(np.uint8)  # all formats are little-endian
    if bits == 8:
        return octets
    return np.stack([octets & 15, octets >> 4], axis=-1).reshape(*octets.shape[:-1], -1)
