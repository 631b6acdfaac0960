"""A quantized tensor of a file, and its way into a kernel of this library without a change of its values.

Axes: F outputs, D inputs, G groups of consecutive inputs that share a scale. Files hold a weight as ``[F, D]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from interop.storage.errors import FormatError
from interop.storage.tensors import LazyTensor, require_finite
from xlora_jax.layers.quantized import LEVELS, QuantizedKernel, pack

__all__ = ["Codes", "Grid", "QuantizedTensor", "common_grid", "fill", "quantized_tensor"]


@dataclass(frozen=True)
class Grid:
    """Kind of a quantized tensor.

    Attributes:
        kind: ``int8``, ``int4`` or ``nf4``, as in :class:`xlora_jax.layers.quantized.QuantizedKernel`.
        group: number of inputs that share a scale.
        offsets: whether each group has an offset.
    """

    kind: str
    group: int
    offsets: bool = False


@dataclass(frozen=True)
class Codes:
    """Contents of a quantized tensor; the values are ``level(code) * scale + offset``.

    Attributes:
        codes: int8 ``[F, D]`` (int8), or uint8 ``[F, D]`` from 0 to 15.
        scales: float32 ``[F, G]``.
        offsets: float32 ``[F, G]``, or None.
    """

    codes: NDArray[Any]
    scales: NDArray[np.float32]
    offsets: NDArray[np.float32] | None = None

    def levels(self, kind: str) -> NDArray[np.float32]:
        """Return the codes' levels ``[F, D]``."""
        if kind == "nf4":
            levels: NDArray[np.float32] = LEVELS["nf4"][self.codes]
            return levels
        return self.codes.astype(np.float32) - np.float32(8 if kind == "int4" and self.offsets is None else 0)


@dataclass(frozen=True)
class QuantizedTensor(LazyTensor):
    """A quantized weight ``[F, D]``; as a :class:`LazyTensor` it gives its values in float32.

    Attributes:
        grid: kind of its codes.
        load_codes: function that reads the codes.
    """

    grid: Grid
    load_codes: Callable[[], Codes]


def quantized_tensor(
    name: str, file: Path, shape: tuple[int, ...], grid: Grid, load_codes: Callable[[], Codes]
) -> QuantizedTensor:
    """Make a tensor of a file from the function that reads its codes; scales and offsets are checked to be finite."""
    if len(shape) != 2 or shape[1] % grid.group:
        raise FormatError(
            f"{file}: tensor {name!r}: expected [outputs, inputs] with inputs divisible by the group of {grid.group}, "
            f"got {list(shape)}."
        )

    def load() -> Codes:
        codes = load_codes()
        for part in (codes.scales, codes.offsets):
            if part is not None:
                require_finite(part, f"{name} (scales)", file)
        return codes

    def values() -> NDArray[np.float32]:
        codes = load()
        groups = codes.levels(grid.kind).reshape(shape[0], -1, grid.group)
        groups *= codes.scales[..., None]
        if codes.offsets is not None:
            groups += codes.offsets[..., None]
        return groups.reshape(shape)

    return QuantizedTensor(name, file, np.dtype(np.float32), shape, values, grid, load)


def common_grid(tensors: Sequence[LazyTensor]) -> Grid | None:
    """Return the grid that holds the values of all tensors, or None if there is none.

    Blocks under ``nn.scan`` share one kernel, and some programs quantize some blocks in 4 bits and others in 6 or 8.
    """
    grids = [tensor.grid for tensor in tensors if isinstance(tensor, QuantizedTensor)]
    kinds = {grid.kind for grid in grids}
    if len(grids) < len(tensors) or ("nf4" in kinds and len(kinds) > 1):
        return None
    kind = kinds.pop() if len(kinds) == 1 else "int8"
    group = math.gcd(*(grid.group for grid in grids))
    if kind != "int8" and group % 2:
        return None
    return Grid(kind, group, any(grid.offsets for grid in grids))


def fill(tensor: QuantizedTensor, grid: Grid, into: QuantizedKernel) -> None:
    """Read a tensor into a kernel ``[D, F]`` in NumPy arrays; ``grid`` is the kernel's, from :func:`common_grid`."""
    read = tensor.load_codes()
    codes, offsets = read.codes, read.offsets
    if grid.kind == "int8" and tensor.grid.kind == "int4":
        codes = codes.astype(np.int8) - np.int8(8 if offsets is None else 0)
    elif grid.kind == "int4" and grid.offsets and offsets is None:
        offsets = read.scales * np.float32(-8)
    if grid.offsets and offsets is None:
        offsets = np.zeros_like(read.scales)
    into.codes[...] = codes.T if grid.kind == "int8" else pack(codes.T, grid.group)
    repeats = tensor.grid.group // grid.group
    into.scales[...] = np.repeat(read.scales, repeats, axis=1).T
    if offsets is not None:
        into.offsets[...] = np.repeat(offsets, repeats, axis=1).T
