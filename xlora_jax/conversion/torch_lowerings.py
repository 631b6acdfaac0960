"""Operators of PyTorch that torchax 0.0.14.dev20261026 lacks, or lowers otherwise than PyTorch computes them.

Each has the reason for which it is here. A version of torchax that no longer needs one passes the tests without it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import torch
from torchax import tensor

__all__ = ["make_environment", "masks_by_jax"]


def _attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    attn_mask: jax.Array | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> jax.Array:
    """Scaled dot-product attention; axes ``[B, heads, T, width]``.

    torchax's own gives NaN for a row that is masked whole, such as the padding on the left of a prompt, and NaN spreads
    from there. PyTorch gives zero (``_safe_softmax``).
    """
    if dropout_p:
        raise NotImplementedError("attention dropout: put the model in evaluation mode (model.eval())")
    if enable_gqa:
        key, value = (jnp.repeat(x, query.shape[-3] // x.shape[-3], axis=-3) for x in (key, value))
    scores = jnp.einsum("...td,...sd->...ts", query, key, preferred_element_type=jnp.float32)
    scores = scores * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        attn_mask = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    if attn_mask is not None:
        masked = jnp.where(attn_mask, 0, -jnp.inf) if attn_mask.dtype == bool else attn_mask.astype(jnp.float32)
        scores = scores + masked
    highest = jnp.max(scores, axis=-1, keepdims=True)
    # Finite for a row that is masked whole, whose weights are then all exp(-inf) = 0.
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.where(jnp.isfinite(highest), highest, 0)))
    total = weights.sum(axis=-1, keepdims=True)
    weights = weights / jnp.where(total == 0, 1, total)
    return jnp.einsum("...ts,...sd->...td", weights.astype(value.dtype), value)


def _grouped_mm(
    a: jax.Array, b: jax.Array, offs: jax.Array | None = None, bias: jax.Array | None = None, out_dtype: Any = None
) -> jax.Array:
    """Product of each group of rows ``a [rows, D]`` with its own matrix of ``b [groups, D, F]``; torchax has none.

    ``offs [groups]`` are the ends of the groups. Mixtures of experts of transformers 5 use it.
    """
    if offs is None or bias is not None or a.ndim != 2 or b.ndim != 3:
        raise NotImplementedError(f"_grouped_mm of {a.ndim} and {b.ndim} axes: only groups of rows are lowered")
    return jax.lax.ragged_dot(a, b, jnp.diff(offs, prepend=0).astype(jnp.int32))


def _is_all_true(x: jax.Array) -> jax.Array:
    """Whether all elements are true; torchax has none.

    ``torch._check_tensor_all`` reads the answer while the model is traced, when there are no values yet. So the answer
    is yes, and the check is made when the program runs.
    """
    jax.debug.callback(_require, jnp.all(x))
    with jax.ensure_compile_time_eval():
        return jnp.asarray(True)


def _require(holds: bool) -> None:
    if not holds:
        raise ValueError(
            "a check in the model's own code failed on these inputs; for images beside text, expected one image token "
            "for each feature of the images"
        )


@contextmanager
def masks_by_jax(environment: tensor.Environment) -> Iterator[None]:
    """Let transformers make its masks with ``jax.vmap``, within a ``with`` block; torchax has no ``torch.vmap``.

    transformers 5 maps a function of four indices over all of them where a model adds a condition of its own, such as
    Gemma 3 for images.
    """
    masks: Any = sys.modules.get("transformers.masking_utils")
    if not hasattr(masks, "_vmap_expansion_sdpa"):
        yield
        return

    def expanded(mask_function: Any) -> Any:
        def one(*indices: jax.Array) -> jax.Array:
            mask: jax.Array = environment.t2j_iso(environment.v2t_iso(mask_function(*environment.j2t_iso(indices))))
            return mask

        mapped: Any = one
        for axis in (3, 2, 1, 0):
            mapped = jax.vmap(mapped, in_axes=tuple(0 if i == axis else None for i in range(4)))
        return lambda *indices: environment.j2t_iso(mapped(*environment.t2j_iso(environment.v2t_iso(indices))))

    before = masks._vmap_expansion_sdpa
    masks._vmap_expansion_sdpa = expanded
    try:
        yield
    finally:
        masks._vmap_expansion_sdpa = before


def make_environment() -> tensor.Environment:
    """Return a torchax environment with the lowerings of this module; torchax's own default stays as it is."""
    environment = tensor.Environment()

    def lowered(function: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = environment.t2j_iso(environment.v2t_iso((args, kwargs)))
            return environment.j2t_iso(function(*args, **kwargs))

        return run

    attention, aten = lowered(_attention), torch.ops.aten
    for operator in (torch.nn.functional.scaled_dot_product_attention, aten.scaled_dot_product_attention):
        environment.override_op_definition(operator, attention)
    environment.override_op_definition(aten._grouped_mm, lowered(_grouped_mm))
    environment.override_op_definition(aten._is_all_true, lowered(_is_all_true))
    return environment
