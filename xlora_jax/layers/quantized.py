"""Frozen matrices in 8 and 4 bits: their grids, their pytree, and their product with activations.

Axes: D input, F output, G groups of consecutive inputs that share a scale.

A kernel ``[D, F]`` is stored as codes. Its values are ``level(code) * scales[group, f] + offsets[group, f]``:

    kind   level(code)                         codes
    int8   code, -128 to 127                   int8 [D, F]
    int4   code - 8, or code with offsets      uint8 [D/2, F], two codes per byte
    nf4    one of 16 quantiles of a normal     uint8 [D/2, F], two codes per byte
           distribution (arXiv 2305.14314)

This is our own code because qwix 0.1.8 does not fit: it ignores the leading axes of ``nn.scan``, needs whole arrays in
memory, replaces functions of ``jax.lax`` globally, and fails in our decoding. Look again when its next version is out.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from numpy.typing import NDArray

from xlora_jax.backend import target_backend
from xlora_jax.layers import matmul as products

__all__ = [
    "KINDS",
    "LEVELS",
    "QuantizedKernel",
    "dequantize",
    "empty",
    "group_size",
    "matmul",
    "pack",
    "quantize",
    "ragged_dot",
]

# For each kind, the number of inputs that share a scale in our own quantization; None: all.
KINDS: dict[str, int | None] = {"int8": None, "int4": 64, "nf4": 64}
_LEAST_GROUP = 8

# QLoRA's levels (arXiv 2305.14314, appendix E), as bitsandbytes stores them.
_NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
_NF4_BOUNDS = (_NF4[1:] + _NF4[:-1]) / 2
LEVELS = {"int4": np.arange(-8, 8, dtype=np.float32), "nf4": _NF4}
# Number of weights that are quantized at a time; their float32 copies fit into a processor's cache.
_CHUNK = 2**18
# Number of weights in a part of a kernel on CPUs, about; their float32 copies fit into a processor's cache.
_PART = 2**19
# Number of rows up to which a grouped product is cheaper than the kernel's floating-point copy.
_FEW_ROWS = 32


@struct.dataclass
class QuantizedKernel:
    """A frozen kernel ``[..., D, F]`` in 8 or 4 bits, in place of a floating-point leaf ``kernel``.

    Leading axes are those of stacked blocks or experts; ``nn.scan`` slices all arrays.

    Attributes:
        codes: int8 ``[..., D, F]``, or uint8 ``[..., D/2, F]``. Of a group's 4-bit codes, the first half is in the low
            four bits and the second half in the high four bits.
        scales: float32 ``[..., G, F]``.
        offsets: float32 ``[..., G, F]``, or None for no offsets.
        kind: key of :data:`KINDS`.
    """

    codes: Any
    scales: Any
    offsets: Any = None
    kind: str = struct.field(pytree_node=False, default="int8")  # type: ignore[no-untyped-call]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape ``[..., D, F]`` of the kernel that it stands for."""
        *stack, rows, width = self.codes.shape
        return (*stack, rows * (1 if self.kind == "int8" else 2), width)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.codes.shape)


def group_size(depth: int, kind: str) -> int | None:
    """Return the number of inputs that share a scale in :func:`quantize`, or None if D = ``depth`` can't be divided."""
    wanted = KINDS[kind]
    size = depth if wanted is None else math.gcd(depth, wanted)
    return None if wanted is not None and size < _LEAST_GROUP else size


def empty(shape: tuple[int, ...], kind: str, group: int, *, offsets: bool = False) -> QuantizedKernel:
    """Allocate a kernel ``[..., D, F]`` in NumPy arrays, aligned so that JAX can use them on CPUs without a copy.

    Args:
        shape: ``[..., D, F]``.
        kind: key of :data:`KINDS`.
        group: number of inputs that share a scale; it divides D.
        offsets: whether there are offsets.
    """
    *stack, depth, width = shape
    scales = (*stack, depth // group, width)
    eight = kind == "int8"
    return QuantizedKernel(
        _aligned((*stack, depth // (1 if eight else 2), width), np.int8 if eight else np.uint8),
        _aligned(scales, np.float32),
        _aligned(scales, np.float32) if offsets else None,
        kind,
    )


def _aligned(shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    size = math.prod(shape) * np.dtype(dtype).itemsize
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    aligned: NDArray[Any] = buffer[start : start + size].view(dtype).reshape(shape)
    return aligned


def pack(codes: NDArray[Any], group: int) -> NDArray[np.uint8]:
    """Pack 4-bit codes ``[D, F]``, each 0 to 15, into uint8 ``[D/2, F]``; see :class:`QuantizedKernel`."""
    depth, width = codes.shape
    halves = codes.astype(np.uint8).reshape(depth // group, 2, group // 2, width)
    packed: NDArray[np.uint8] = halves[:, 0] | halves[:, 1] << np.uint8(4)
    return packed.reshape(depth // 2, width)


def quantize(weight: NDArray[Any], kind: str, into: QuantizedKernel) -> None:
    """Quantize a matrix, part by part, with the nearest level for each weight.

    Args:
        weight: float ``[D, F]``; the transpose of a C-ordered array is read fastest.
        kind: key of :data:`KINDS`.
        into: kernel in NumPy arrays with the shape of ``weight``, which is filled.
    """
    depth, width = weight.shape
    groups = into.scales.shape[0]
    step = max(1, _CHUNK // depth)
    for start in range(0, width, step):
        own = slice(start, start + step)
        values = np.ascontiguousarray(weight[:, own].T, np.float32).reshape(-1, groups, depth // groups)
        scales, codes = _nearest(values, kind)
        by_input = codes.reshape(-1, depth).T
        into.codes[:, own] = by_input if kind == "int8" else pack(by_input, depth // groups)
        into.scales[:, own] = scales.T


def _nearest(values: NDArray[np.float32], kind: str) -> tuple[NDArray[np.float32], NDArray[Any]]:
    """Return scales ``[F, G]`` and codes ``[F, G, D/G]`` of values ``[F, G, D/G]``."""
    largest = np.abs(values).max(axis=-1)
    if kind == "int8":
        scales = largest / np.float32(127)
    elif kind == "int4":
        # The largest weight gets the code of the level -8, which has no counterpart on the positive side.
        signed = np.take_along_axis(values, np.abs(values).argmax(axis=-1)[..., None], axis=-1)[..., 0]
        scales = signed / np.float32(-8)
    else:
        scales = largest
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=np.abs(scales) >= np.finfo(np.float32).tiny)
    scaled = values * inverse[..., None]
    if kind == "nf4":
        codes = np.zeros(values.shape, np.uint8)
        for bound in _NF4_BOUNDS:
            codes += scaled > bound
        return scales, codes
    codes = np.rint(scaled)
    if kind == "int8":
        return scales, np.clip(codes, -127, 127).astype(np.int8)
    return scales, (np.clip(codes, -8, 7) + 8).astype(np.uint8)


def dequantize(kernel: QuantizedKernel, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """Return the values ``[..., D, F]``, computed in float32 and rounded to ``dtype``."""
    values: jax.Array = _grouped(kernel) * kernel.scales[..., None, :]
    if kernel.offsets is not None:
        values = values + kernel.offsets[..., None, :]
    return values.reshape(kernel.shape).astype(dtype)


def _grouped(kernel: QuantizedKernel, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """Return the levels of all codes, ``[..., G, D/G, F]``."""
    *stack, groups, width = kernel.scales.shape
    codes = jnp.reshape(kernel.codes, (*stack, groups, -1, width))
    if kernel.kind == "int8":
        return codes.astype(dtype)
    codes = jnp.concatenate([codes & 15, codes >> 4], axis=-2)
    if kernel.kind == "int4":
        return codes.astype(dtype) - (8 if kernel.offsets is None else 0)
    return jnp.take(jnp.asarray(LEVELS["nf4"], dtype), codes.astype(jnp.int32), axis=0, mode="clip")


@jax.custom_vjp
def matmul(x: jax.Array, kernel: QuantizedKernel) -> jax.Array:
    """Multiply ``x [..., D]`` by a frozen kernel ``[D, F]``.

    The sum is float32 or wider. The kernel gets no gradient. The backward pass of ``x`` computes the kernel's values
    again: plain differentiation would keep the floating-point copies of all kernels until then.

    Returns:
        ``[..., F]`` in the dtype of ``x``.
    """
    x, kernel = _apart(x, kernel)
    accumulate = jnp.promote_types(x.dtype, jnp.float32)
    one_scale = _one_scale(kernel)
    rows = math.prod(x.shape[:-1])
    parts = _count_parts(kernel)
    if parts > 1:
        columns = jnp.moveaxis(x.reshape(*x.shape[:-1], parts, -1), -2, 0)

        def add(y: jax.Array, part: tuple[jax.Array, QuantizedKernel]) -> tuple[jax.Array, None]:
            return y + _product(part[0], _levels(part[1], x.dtype, one_scale), accumulate), None

        y = jnp.zeros((*x.shape[:-1], kernel.shape[-1]), accumulate)
        y, _ = lax.scan(add, y, (columns, _split(kernel, parts)))
    elif not one_scale and kernel.kind != "nf4" and rows <= _FEW_ROWS and target_backend() != "cpu":
        y = _by_group(x, kernel, accumulate)
    else:
        y = _product(x, _levels(kernel, x.dtype, one_scale), accumulate)
    # One scale costs one multiplication per output behind the product, and a GPU reads int8 only.
    return jnp.asarray(y * kernel.scales[0] if one_scale else y, x.dtype)


def _apart(x: jax.Array, kernel: QuantizedKernel) -> tuple[jax.Array, QuantizedKernel]:
    """Give a product its own conversion of the kernel.

    Otherwise XLA merges the conversions for both passes, or for a product and its gradient, and keeps the results.
    """
    return (x, kernel) if target_backend() == "cpu" else lax.optimization_barrier((x, kernel))


def _count_parts(kernel: QuantizedKernel) -> int:
    """Return the number of parts, along the inputs, that a kernel is converted in.

    XLA for CPUs ignores barriers, but it merges nothing across loops. A part also stays in the processor's cache, which
    makes a product with one row up to 15 times faster.
    """
    if target_backend() != "cpu":
        return 1
    depth, width = kernel.shape
    whole = depth if _one_scale(kernel) else kernel.scales.shape[-2]
    return max(count for count in range(1, -(-depth * width // _PART) + 1) if whole % count == 0)


def _split(kernel: QuantizedKernel, parts: int) -> QuantizedKernel:
    """Return the kernel with a leading axis of parts; a single scale is repeated."""
    if _one_scale(kernel):
        scales = jnp.broadcast_to(kernel.scales, (parts, kernel.shape[-1]))
        kernel = QuantizedKernel(kernel.codes, scales, kind=kernel.kind)
    split: QuantizedKernel = jax.tree.map(lambda array: array.reshape(parts, -1, array.shape[-1]), kernel)
    return split


def _levels(kernel: QuantizedKernel, dtype: jax.typing.DTypeLike, one_scale: bool) -> jax.Array:
    """Return the values of a kernel or a part of it; only the codes if the whole kernel has one scale per output."""
    return kernel.codes.astype(dtype) if one_scale else dequantize(kernel, dtype)


def _product(x: jax.Array, matrix: jax.Array, accumulate: jax.typing.DTypeLike) -> jax.Array:
    contract = (((x.ndim - 1,), (0,)), ((), ()))
    return products.dot_general(x, matrix, contract, preferred_element_type=accumulate)


def _by_group(x: jax.Array, kernel: QuantizedKernel, accumulate: jax.typing.DTypeLike) -> jax.Array:
    """Multiply by the codes as a batch of products, one for each group; the scales act on their results."""
    groups = kernel.scales.shape[-2]
    parts = x.reshape(*x.shape[:-1], groups, -1)
    y = jnp.einsum("...gd,gdf->...gf", parts, _grouped(kernel, x.dtype), preferred_element_type=accumulate)
    y *= kernel.scales
    if kernel.offsets is not None:
        y += parts.astype(accumulate).sum(axis=-1)[..., None] * kernel.offsets
    return jnp.asarray(y.sum(axis=-2))


def _one_scale(kernel: QuantizedKernel) -> bool:
    return kernel.kind == "int8" and kernel.scales.shape[-2] == 1 and kernel.offsets is None


def _matmul_forward(x: jax.Array, kernel: QuantizedKernel) -> tuple[jax.Array, QuantizedKernel]:
    return matmul(x, kernel), kernel


def _matmul_backward(kernel: QuantizedKernel, gradient: jax.Array) -> tuple[jax.Array, None]:
    gradient, kernel = _apart(gradient, kernel)
    dtype, one_scale = gradient.dtype, _one_scale(kernel)
    if one_scale:
        gradient = (gradient * kernel.scales[0]).astype(dtype)
    contract = (((gradient.ndim - 1,), (1,)), ((), ()))

    def back(part: QuantizedKernel) -> jax.Array:
        return lax.dot_general(gradient, _levels(part, dtype, one_scale), contract)

    parts = _count_parts(kernel)
    if parts == 1:
        return back(kernel), None
    columns = jnp.moveaxis(lax.map(back, _split(kernel, parts)), 0, -2)
    return columns.reshape(*gradient.shape[:-1], -1), None


matmul.defvjp(_matmul_forward, _matmul_backward)


@jax.custom_vjp
def ragged_dot(rows: jax.Array, kernel: QuantizedKernel, sizes: jax.Array) -> jax.Array:
    """Compute ``jax.lax.ragged_dot`` of ``rows [M, D]`` with a frozen stack ``[E, D, F]``; see :func:`matmul`."""
    rows, kernel = _apart(rows, kernel)
    return lax.ragged_dot(rows, dequantize(kernel, rows.dtype), sizes)


def _ragged_forward(
    rows: jax.Array, kernel: QuantizedKernel, sizes: jax.Array
) -> tuple[jax.Array, tuple[QuantizedKernel, jax.Array]]:
    return ragged_dot(rows, kernel, sizes), (kernel, sizes)


def _ragged_backward(kept: tuple[QuantizedKernel, jax.Array], gradient: jax.Array) -> tuple[jax.Array, None, None]:
    kernel, sizes = kept
    gradient, kernel = _apart(gradient, kernel)
    matrices = dequantize(kernel, gradient.dtype).swapaxes(-1, -2)
    return lax.ragged_dot(gradient, matrices, sizes), None, None


ragged_dot.defvjp(_ragged_forward, _ragged_backward)
