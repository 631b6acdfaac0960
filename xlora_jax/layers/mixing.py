"""Array functions of X-LoRA: from classifier logits to gates, and from gates to mixed experts.

Plain arrays in, plain arrays out; no Flax, no classes. Axes used in every comment and docstring:

    B batch   T tokens   D input width   F output width
    L adapted layers     N experts       R stacked ranks (the sum over the experts of one layer)

Formulas follow PEFT's ``peft.tuners.xlora`` (X-LoRA, arXiv 2402.07148).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from xlora_jax.layers import matmul as products

__all__ = [
    "constant_scalings",
    "direction_gates",
    "drop_and_project",
    "layer_gates",
    "mask_top_k",
    "mix_experts",
    "softmax_over_selected",
    "temperature_softmax",
]


def temperature_softmax(logits: jax.Array, temperature: float = 1.0) -> jax.Array:
    """Return the softmax of ``logits / temperature`` over the last axis (the experts).

    Args:
        logits: float array ``[..., N]``.
        temperature: positive number; lower is sharper.

    Returns:
        Array of the shape and dtype of ``logits``; rows sum to one.
    """
    return jax.nn.softmax(logits / temperature, axis=-1)


def mask_top_k(scalings: jax.Array, k: int) -> jax.Array:
    """Keep the ``k`` largest entries of the last axis and set the others to zero, without renormalization.

    Among equal entries, the one with the lowest index is kept. (``torch.topk`` leaves ties undefined: its choice
    depends on the device and on N. Ties arise in practice only for a constant scaling pass.)

    Args:
        scalings: float array ``[..., N]``.
        k: number of experts to keep, ``1 <= k <= N``.

    Returns:
        Array of the shape and dtype of ``scalings``.

    Raises:
        ValueError: ``k`` is not within ``1..N``.
    """
    n = scalings.shape[-1]
    if not 1 <= k <= n:
        raise ValueError(f"top-k over {n} experts: expected 1 <= k <= {n}, got k={k}")
    if k == n:
        return scalings
    _, indices = lax.top_k(scalings, k)
    keep = (indices[..., :, None] == jnp.arange(n)).any(axis=-2)
    return jnp.where(keep, scalings, jnp.zeros_like(scalings))


def softmax_over_selected(scalings: jax.Array) -> jax.Array:
    """Return the softmax over the nonzero entries of the last axis; zeros stay zero.

    A row of zeros stays zero, and so does its gradient. The softmax is computed on finite numbers only, so that no NaN
    reaches the gradient through the branch that is not taken.

    Args:
        scalings: float array ``[..., N]``.

    Returns:
        Array of the shape and dtype of ``scalings``.
    """
    selected = scalings != 0
    # The largest selected entry is subtracted as a constant: it changes neither the softmax nor its gradient.
    largest = lax.stop_gradient(jnp.max(jnp.where(selected, scalings, -jnp.inf), axis=-1, keepdims=True))
    largest = jnp.where(jnp.isfinite(largest), largest, 0)
    weights = jnp.where(selected, jnp.exp(jnp.where(selected, scalings - largest, 0)), 0)
    total = weights.sum(axis=-1, keepdims=True)
    return weights / jnp.where(total == 0, 1, total)


def layer_gates(
    scalings: jax.Array, *, top_k: int | None, softmax_selected: bool, weight: float | jax.Array = 1.0
) -> jax.Array:
    """Return gates of the adapted layers: top-k, softmax over the selected, and global weight, in that order.

    Args:
        scalings: ``[..., N]``, from the classifier or :func:`constant_scalings`.
        top_k: number of experts to keep per token and layer, or None for all (PEFT's ``top_k_lora``).
        softmax_selected: whether to apply a softmax over the selected experts (PEFT's ``enable_softmax_topk``).
        weight: factor of all gates (PEFT's ``global_scaling_weight``).

    Returns:
        Gates ``[..., N]`` in the dtype of ``scalings``.
    """
    if top_k is not None:
        scalings = mask_top_k(scalings, top_k)
    if softmax_selected:
        scalings = softmax_over_selected(scalings)
    # PEFT multiplies each expert's output by the weight; an output is linear in its gate.
    return scalings if isinstance(weight, (int, float)) and weight == 1 else scalings * weight


def direction_gates(
    similarities: jax.Array, present: jax.Array, *, top_k: int | None, temperature: float, weight: float = 1.0
) -> jax.Array:
    """Return gates of one layer from its own input: Arrow (arXiv 2405.11157), as in PEFT's ``lora/arrow.py``.

    The gate is the softmax over ``|similarity| / temperature`` of the ``top_k`` most similar experts; the sign of a
    direction has no meaning.

    Args:
        similarities: ``[..., N]``, product of the layer's input with each expert's direction, the first right singular
            vector of its weight change.
        present: bool ``[N]``, whether an expert adapts the layer; other experts take no share.
        top_k: number of experts to keep, or None for all.
        temperature: positive number; lower is sharper.
        weight: factor of all gates.

    Returns:
        Gates ``[..., N]`` in the dtype of ``similarities``.
    """
    sizes = jnp.abs(similarities)
    n = sizes.shape[-1]
    keep = jnp.broadcast_to(present, sizes.shape)
    if top_k is not None and top_k < n:
        _, indices = lax.top_k(jnp.where(keep, sizes, -1), top_k)
        keep &= (indices[..., :, None] == jnp.arange(n)).any(axis=-2)
    # A finite number, so that a layer without experts gets finite gates too.
    return jax.nn.softmax(jnp.where(keep, sizes / temperature, -1e30), axis=-1) * weight


def constant_scalings(shape: tuple[int, ...], value: float, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Return the scalings of the scaling pass: ``value`` for every token, layer and expert.

    Args:
        shape: ``(B, T, L, N)``, or ``(B, T, 1, N)`` if all layers share their gates.
        value: constant gate (PEFT's ``scaling_pass_value``).
        dtype: dtype of the classifier.
    """
    return jnp.full(shape, value, dtype)


def mix_experts(down: jax.Array, gates: jax.Array, columns: jax.Array, lora_b: jax.Array) -> jax.Array:
    """Mix all experts of one layer: ``(down * (gates @ columns)) @ lora_b``.

    ``columns`` gives the expert and the scale of each of the R stacked columns. ``columns[e, c]`` is the LoRA scale
    (alpha/r, or alpha/sqrt(r) for rsLoRA) if column c belongs to expert e, else 0. So all experts of a layer together
    cost two matrix products, whatever their ranks, and an expert may be absent from the layer.

    Args:
        down: ``[..., R]``, the input times the stacked ``lora_a`` (or its rows, for an embedding).
        gates: ``[..., N]``, with as many leading axes as ``down``.
        columns: float32 ``[N, R]``.
        lora_b: ``[R, F]``; its dtype is that of the products' operands. The products accumulate in float32.

    Returns:
        float32 ``[..., F]`` (float64 for float64 experts), to be added to the base layer's output.
    """
    # Each column has one expert, so this product only selects and scales. It is written as a sum, which is exact on
    # every backend (a matrix product of default precision would round the gates on a TPU) and fuses with the operations
    # around it.
    column_gates = (gates.astype(columns.dtype)[..., :, None] * columns).sum(axis=-2)
    gated = (down * column_gates).astype(lora_b.dtype)
    return products.matmul(gated, lora_b)


def drop_and_project(
    rng: jax.Array, inputs: jax.Array, lora_a: jax.Array, columns: jax.Array, rates: jax.Array
) -> jax.Array:
    """Return ``inputs @ lora_a`` with LoRA dropout: an independent mask over the inputs for each expert, as in PEFT.

    Each expert has its own masked input, so the stacked product is computed once per expert. That is the cost of
    training with ``lora_dropout``. Inference does not use this function.

    Args:
        rng: PRNG key.
        inputs: ``[..., D]``.
        lora_a: ``[D, R]``.
        columns: ``[N, R]``, see :func:`mix_experts`; only the positions of its zeros matter here.
        rates: float32 ``[N]``, each expert's dropout probability, in ``[0, 1)``.

    Returns:
        ``[..., R]``, float32 or wider.
    """
    accumulate = jnp.promote_types(lora_a.dtype, jnp.float32)

    def one_expert(total: jax.Array, expert: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        key, rate, row = expert
        keep = jax.random.bernoulli(key, 1 - rate, inputs.shape)
        dropped = jnp.where(keep, inputs / (1 - rate).astype(inputs.dtype), jnp.zeros_like(inputs))
        own = jnp.where(row != 0, lora_a, jnp.zeros_like(lora_a))
        return total + jnp.matmul(dropped, own, preferred_element_type=accumulate), None

    keys = jax.random.split(rng, columns.shape[0])
    start = jnp.zeros((*inputs.shape[:-1], lora_a.shape[-1]), accumulate)
    total, _ = lax.scan(one_expert, start, (keys, rates, columns))
    return total
