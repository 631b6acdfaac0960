"""Flax modules of X-LoRA: the classifier, and layers that mix experts.

The arithmetic is in :mod:`xlora_jax.layers.mixing`. An adapted layer reads three collections at its own path:

    params    parameters of the plain Flax layer; the kernel of a dense layer may be quantized
    experts   ``lora_a [D, R]``, ``lora_b [R, F]``, ``columns [N, R]``; if any expert has them, also
              ``lora_bias [N, F]`` with ``bias_scale [N]``, and ``lora_dropout [N]``
              and for Arrow ``directions [D, N]``
    scalings  ``gates [B, T, N]``, or :class:`~xlora_jax.layers.arrow.Arrow` in their place; if any expert has a
              ``lora_bias``, also ``weight``, the global scaling weight

Without ``experts`` or without ``scalings`` the layer is the plain Flax layer. LoRA dropout is on if the caller passes
an rng named ``lora_dropout``. Axes as in :mod:`xlora_jax.layers.mixing`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from jax.ad_checkpoint import checkpoint_name

from xlora_jax.layers import matmul as products
from xlora_jax.layers import mixing, quantized
from xlora_jax.layers.arrow import Arrow
from xlora_jax.layers.quantized import QuantizedKernel

__all__ = [
    "TemperatureScaledSoftmax",
    "XLoraClassifier",
    "XLoraConv",
    "XLoraDense",
    "XLoraEmbed",
    "XLoraTiedHead",
    "add_experts",
    "project_conv",
    "project_dense",
    "quantized_kernel",
]


class TemperatureScaledSoftmax(nn.Module):
    """Softmax over the last axis of ``logits / temperature``; no parameters.

    Attributes:
        temperature: positive number; lower is sharper.
    """

    temperature: float = 1.0

    def __call__(self, logits: jax.Array) -> jax.Array:
        """Return the softmax of ``logits [..., N]`` over the last axis, in the dtype of ``logits``."""
        return mixing.temperature_softmax(logits, self.temperature)


class XLoraClassifier(nn.Module):
    """The gate: maps a hidden state to a weight per adapted layer and expert.

    At depth 1 it is one ``Dense`` layer. At depth d > 1 it has d - 1 ``Dense`` layers of width ``size``, each followed
    by ReLU and dropout, and an output layer. All layers have a bias. Parameters are ``dense_0`` ...
    ``dense_{depth-1}``, each with ``kernel [in, out]`` and ``bias [out]``.

    Attributes:
        num_layers: L, number of adapted layers.
        num_experts: N, number of experts.
        depth: number of ``Dense`` layers, at least 1.
        size: width of the inner layers; unused at depth 1.
        dropout_rate: dropout probability after each ReLU, in ``[0, 1)``; acts only if not ``deterministic``.
        layerwise: one weight per layer (True), or one for all layers (False).
        softmax: whether to apply the temperature softmax over experts.
        temperature: temperature of :class:`TemperatureScaledSoftmax`.
        dtype: dtype of the computation (PEFT uses the base model's); None means that of inputs and parameters.
        param_dtype: dtype of the parameters at initialization.
    """

    num_layers: int
    num_experts: int
    depth: int = 1
    size: int = 2048
    dropout_rate: float = 0.0
    layerwise: bool = False
    softmax: bool = True
    temperature: float = 1.0
    dtype: jax.typing.DTypeLike | None = None
    param_dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, hidden_states: jax.Array, deterministic: bool = True) -> jax.Array:
        """Return the scalings of hidden states.

        Args:
            hidden_states: float ``[B, T, D]``, the base model's output after the final norm.
            deterministic: whether dropout is off; otherwise an rng named ``dropout`` is needed.

        Returns:
            ``[B, T, L, N]`` if ``layerwise``, else ``[B, T, 1, N]``: one gate that all layers share.
        """
        features = self.num_experts * (self.num_layers if self.layerwise else 1)
        x = hidden_states
        for i in range(self.depth - 1):
            x = nn.relu(self._dense(self.size, i)(x))
            x = nn.Dropout(self.dropout_rate)(x, deterministic=deterministic)
        x = self._dense(features, self.depth - 1)(x)
        x = x.reshape(*x.shape[:-1], -1, self.num_experts)
        return TemperatureScaledSoftmax(self.temperature)(x) if self.softmax else x

    def _dense(self, features: int, index: int) -> nn.Dense:
        # torch.nn.Linear draws kernel and bias from U(-1/sqrt(in), 1/sqrt(in)); the variance of the kernel is 1/(3 in).
        return nn.Dense(
            features,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
            bias_init=nn.initializers.zeros_init(),
            name=f"dense_{index}",
        )


def _flat_gates(gates: jax.Array, shape: tuple[int, ...], module: nn.Module) -> jax.Array:
    """Return ``gates [B, T, N]`` as ``[B, *positions, N]`` for a layer with positions ``shape = [B, *positions]``."""
    batch, *positions = shape
    if gates.shape[:-1] == shape:
        return gates
    if not positions and gates.shape[0] * gates.shape[1] == batch:
        # Some models flatten examples and tokens to one axis.
        return gates.reshape(batch, gates.shape[-1])
    count = math.prod(positions)
    ones = [1] * len(positions)
    if gates.ndim == 3 and gates.shape[0] in (1, batch):
        if gates.shape[1] == 1:
            return gates.reshape(gates.shape[0], *ones, gates.shape[-1])
        if len(positions) > 1 and gates.shape[1] in (count, count + 1):
            # The tokens of a vision transformer: a class token, if any, then the patches in row-major order.
            return gates[:, gates.shape[1] - count :].reshape(gates.shape[0], *positions, gates.shape[-1])
    raise ValueError(
        f"gates of layer {'/'.join(module.path)}: expected [{batch}, T, experts] with T = 1 (one gate per example), "
        f"T = {count} (one per output position) or T = {count + 1} (with a class token before them), got "
        f"{list(gates.shape)}; give the layer gates of one of these shapes, or leave it out of the experts' targets."
    )


def _gates_of(module: nn.Module, shape: tuple[int, ...], project: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Return the gates of a layer, as they are given or as its own input makes them."""
    gates: jax.Array | Arrow = module.get_variable("scalings", "gates")
    if not isinstance(gates, Arrow):
        return _flat_gates(gates, shape, module)
    return mixing.direction_gates(
        project(module.get_variable("experts", "directions")),
        (module.get_variable("experts", "columns") != 0).any(axis=-1),
        top_k=gates.top_k,
        temperature=gates.temperature,
        weight=gates.weight,
    )


def add_experts(module: nn.Module, outputs: jax.Array, project: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Add the contribution of the experts at the path of ``module`` to ``outputs``, if experts and gates exist there.

    Args:
        module: bound module, whose collections ``experts`` and ``scalings`` are read.
        outputs: ``[..., F]``, output of the base layer.
        project: function from ``lora_a`` to its product with the layer's input, ``[..., R]``.

    Returns:
        ``[..., F]`` in the dtype of ``outputs``; the sum is taken in the experts' accumulation dtype.
    """
    if not (module.has_variable("experts", "lora_b") and module.has_variable("scalings", "gates")):
        return outputs
    down = project(module.get_variable("experts", "lora_a"))
    delta = mixing.mix_experts(
        down,
        _gates_of(module, outputs.shape[:-1], project),
        module.get_variable("experts", "columns"),
        module.get_variable("experts", "lora_b"),
    )
    if module.has_variable("experts", "lora_bias"):
        # PEFT's gate multiplies the input of lora_A, so the bias of lora_B is added whatever the gate.
        scale: jax.Array = module.get_variable("experts", "bias_scale") * module.get_variable("scalings", "weight")
        bias: jax.Array = module.get_variable("experts", "lora_bias")
        delta = delta + jnp.einsum("n,nf->f", scale, bias.astype(scale.dtype), precision=jax.lax.Precision.HIGHEST)
    return (outputs.astype(delta.dtype) + delta).astype(outputs.dtype)


def project_dense(module: nn.Module, inputs: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """Return the function from ``lora_a [D, R]`` to ``inputs @ lora_a``; an rng ``lora_dropout`` turns dropout on."""

    def project(lora_a: jax.Array) -> jax.Array:
        x = inputs.astype(lora_a.dtype)
        if module.has_rng("lora_dropout") and module.has_variable("experts", "lora_dropout"):
            return mixing.drop_and_project(
                module.make_rng("lora_dropout"),
                x,
                lora_a,
                module.get_variable("experts", "columns"),
                module.get_variable("experts", "lora_dropout"),
            )
        return products.matmul(x, lora_a)

    return project


def project_conv(module: nn.Conv, inputs: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """Return the function from a kernel ``lora_a [kh, kw, D, R]`` to its convolution with ``inputs``.

    Strides, padding and dilation are those of ``module``.
    """

    def project(lora_a: jax.Array) -> jax.Array:
        down = nn.Conv(
            lora_a.shape[-1],
            module.kernel_size,
            strides=module.strides,
            padding=module.padding,
            input_dilation=module.input_dilation,
            kernel_dilation=module.kernel_dilation,
            use_bias=False,
            parent=None,
        )
        return cast(jax.Array, down.apply({"params": {"kernel": lora_a}}, inputs.astype(lora_a.dtype)))

    return project


def quantized_kernel(module: nn.Module) -> QuantizedKernel | None:
    """Return the kernel of ``module`` if it is quantized, else None."""
    kernel: Any = module.get_variable("params", "kernel") if module.has_variable("params", "kernel") else None
    return kernel if isinstance(kernel, QuantizedKernel) else None


class XLoraDense(nn.Dense):
    """A ``flax.linen.Dense`` that mixes the experts at its path, with the same attributes, parameters and errors.

    The base kernel may be a :class:`~xlora_jax.layers.quantized.QuantizedKernel`.
    """

    dot_general: Any = products.dot_general

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Return ``[..., F]`` for ``inputs [..., D]``; with gates ``[B, T, N]`` the inputs are ``[B, T, D]``."""
        kernel = quantized_kernel(self)
        outputs = super().__call__(inputs) if kernel is None else self._quantized(inputs, kernel)
        # Named for rematerialization: the backward pass needs the sum, not its two terms.
        outputs = add_experts(self, outputs, project_dense(self, inputs))
        return cast(jax.Array, checkpoint_name(outputs, "projection"))

    def _quantized(self, inputs: jax.Array, kernel: QuantizedKernel) -> jax.Array:
        """Return the base layer's output."""
        outputs = quantized.matmul(inputs if self.dtype is None else inputs.astype(self.dtype), kernel)
        if not self.use_bias:
            return outputs
        bias: jax.Array = self.get_variable("params", "bias")
        return outputs + bias.astype(outputs.dtype)


class XLoraTiedHead(nn.Module):
    """An output head whose kernel is the embedding table; it mixes the experts at its own path.

    Attributes:
        use_bias: whether the head has its own bias.
        dtype: dtype of the computation; None means that of inputs and table.
        param_dtype: dtype of the bias at initialization.
    """

    use_bias: bool = False
    dtype: jax.typing.DTypeLike | None = None
    param_dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, inputs: jax.Array, embedding: jax.Array) -> jax.Array:
        """Return logits ``[..., V]`` for ``inputs [..., D]`` and the table ``embedding [V, D]``."""
        x, table = promote_dtype(inputs, embedding, dtype=self.dtype)
        logits = jnp.matmul(x, table.T)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros_init(), (table.shape[0],), self.param_dtype)
            logits = logits + bias.astype(logits.dtype)
        return add_experts(self, logits, project_dense(self, inputs))


class XLoraEmbed(nn.Embed):
    """A ``flax.linen.Embed`` that mixes the experts at its path.

    The gate acts after the lookup in ``lora_a [V, R]``. As in PEFT, there is no LoRA dropout here.

    Attributes:
        embed_scale: factor of both the embedding and the experts' part (Gemma); 1 for most families.
    """

    embed_scale: float = 1.0

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Return ``[B, T, D]`` for token ids ``inputs [B, T]``."""
        outputs = super().__call__(inputs)
        outputs = add_experts(self, outputs, lambda lora_a: jnp.take(lora_a, inputs, axis=0))
        if self.embed_scale == 1:
            return outputs
        # The factor is rounded to the table's dtype first, as transformers does.
        return outputs * jnp.asarray(self.embed_scale, outputs.dtype)


class XLoraConv(nn.Conv):
    """A ``flax.linen.Conv`` over two spatial axes that mixes the experts at its path.

    ``lora_a`` is a kernel ``[kh, kw, D, R]`` with the layer's strides, padding and dilation. ``lora_b [R, F]`` acts at
    each output position, and the gate acts between the two. T of the gates ``[B, T, N]`` is 1 (one gate per example),
    the number of output positions, or that number plus one for a leading class token, whose gate is not used here.
    """

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Return ``[B, height, width, F]`` for ``inputs [B, height, width, D]``.

        Raises:
            ValueError: the gates are neither per example nor per output position.
        """
        outputs = super().__call__(inputs)
        return add_experts(self, outputs, project_conv(self, inputs))
