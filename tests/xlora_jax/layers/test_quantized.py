"""Quantized kernels: nearest levels, products and gradients as with the kernel's values, nothing large kept."""

from __future__ import annotations

import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tests.helpers.synthetic import batch, synthetic
from xlora_jax.layers import quantized
from xlora_jax.layers.quantized import KINDS, QuantizedKernel, dequantize
from xlora_jax.passes import forward
from xlora_jax.sharding import param_shardings
from xlora_jax.training.step import batch_loss
from xlora_jax.trees import flatten, unflatten


def quantize(weight, kind, group=None):
    """Return a weight [..., D, F] in a grid of this library."""
    kernel = quantized.empty(weight.shape, kind, group or quantized.group_size(weight.shape[-2], kind))
    for index in np.ndindex(weight.shape[:-2]):
        quantized.quantize(weight[index], kind, jax.tree.map(lambda array, index=index: array[index], kernel))
    return kernel


def random_weight(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def with_offsets(kernel, seed=0):
    return kernel.replace(offsets=random_weight(*kernel.scales.shape, seed=seed))


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_gets_the_nearest_level_of_its_group(kind):
    # More columns than one part holds, and sizes that are neither equal nor powers of two.
    weight = random_weight(192, 2 * quantized._CHUNK // 192 + 3)
    kernel = quantize(weight, kind)
    assert (kernel.shape, kernel.ndim) == (weight.shape, 2)
    group = 192 if kind == "int8" else 64
    assert kernel.scales.shape == (192 // group, weight.shape[1])
    assert kernel.codes.nbytes == weight.size // (1 if kind == "int8" else 2)
    levels = np.arange(-127, 128) if kind == "int8" else quantized.LEVELS[kind]
    some = np.linspace(0, weight.shape[1] - 1, 25).astype(int)
    grid = np.repeat(kernel.scales[:, some], group, axis=0)[..., None] * levels
    nearest = np.abs(grid - weight[:, some, None]).min(axis=-1)
    got = np.abs(np.asarray(dequantize(kernel))[:, some] - weight[:, some])
    np.testing.assert_allclose(got, nearest, atol=1e-6)
    # The largest weight of a group is kept as it is.
    by_group = [part.reshape(-1, group, weight.shape[1]) for part in (weight, np.asarray(dequantize(kernel)))]
    largest = np.abs(by_group[0]).argmax(axis=1)[:, None]
    first, second = (np.take_along_axis(part, largest, axis=1) for part in by_group)
    np.testing.assert_allclose(first, second, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_and_tiny_weights_stay_finite(kind):
    weight = np.zeros((64, 3), np.float32)
    weight[:, 1], weight[5, 2] = 1e-45, 3e38
    values = np.asarray(dequantize(quantize(weight, kind)))
    assert np.isfinite(values).all()
    assert not values[:, 0].any()
    np.testing.assert_allclose(values[5, 2], 3e38, rtol=1e-6)


@pytest.mark.parametrize(("kind", "group", "offsets", "backend"), [
    *((kind, None, False, backend) for kind in KINDS for backend in ("cpu", "gpu")),
    ("int8", 16, False, "cpu"), ("int8", 16, True, "gpu"), ("int4", 32, True, "cpu"), ("int4", 32, True, "gpu"),
])  # fmt: skip
def test_product_and_gradient_are_those_of_the_values(monkeypatch, kind, group, offsets, backend):
    monkeypatch.setattr(quantized, "target_backend", lambda: backend)
    # With two or four parts on a CPU, as a large kernel has.
    monkeypatch.setattr(quantized, "_PART", 640)
    kernel = quantize(random_weight(128, 40), kind, group)
    assert (quantized._count_parts(kernel) > 1) == (backend == "cpu")
    kernel = with_offsets(kernel) if offsets else kernel
    values = np.asarray(dequantize(kernel), np.float64)
    for rows in ((1, 1), (2, 3), (5, 20)):
        x, cotangent = random_weight(*rows, 128, seed=1), random_weight(*rows, 40, seed=2)
        y, pull = jax.vjp(lambda x: quantized.matmul(x, kernel), x)
        np.testing.assert_allclose(y, x @ values, atol=2e-4)
        np.testing.assert_allclose(pull(cotangent)[0], cotangent @ values.T, atol=2e-4)
    assert quantized.matmul(x.astype(jnp.bfloat16), kernel).dtype == jnp.bfloat16


def test_the_ragged_product_and_its_gradient_are_those_of_the_values():
    kernel = quantize(random_weight(3, 32, 20), "nf4")
    sizes = jnp.array([2, 0, 5])
    x = random_weight(7, 32, seed=1)
    results = [
        jax.vjp(product, x)
        for product in (
            lambda x: quantized.ragged_dot(x, kernel, sizes),
            lambda x: jax.lax.ragged_dot(x, dequantize(kernel), sizes),
        )
    ]
    (ours, our_pull), (theirs, their_pull) = results
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    np.testing.assert_allclose(our_pull(ours)[0], their_pull(ours)[0], atol=1e-4)


@cache
def plain_synthetic():
    return synthetic(layers=3, layerwise_scalings=True)


def quantized_synthetic(kind):
    """Return a small X-LoRA model, its parameters with quantized kernels, and those with the kernels' values."""
    xlora, params = plain_synthetic()
    flat = {
        path: quantize(np.asarray(leaf), kind) if path[0] == "layers" and path[-1] == "kernel" else leaf
        for path, leaf in flatten(params["base"]).items()
    }
    flat = {path: jax.tree.map(jnp.asarray, leaf) for path, leaf in flat.items()}
    values = {p: dequantize(leaf) if isinstance(leaf, QuantizedKernel) else leaf for p, leaf in flat.items()}
    return xlora, {**params, "base": unflatten(flat)}, {**params, "base": unflatten(values)}


@jax.jit
def logits_and_gradient(params):
    """Return logits, and the loss's gradient with respect to the classifier."""
    xlora, _ = plain_synthetic()
    frozen = {"base": params["base"], "experts": params["experts"]}
    gradient = jax.grad(lambda gate: batch_loss(xlora, {"classifier": gate}, frozen, batch())[0])
    return forward(xlora, params, input_ids=batch()["input_ids"]).logits, gradient(params["classifier"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_with_quantized_kernels_is_the_one_with_their_values(kind):
    _, params, values = quantized_synthetic(kind)
    (ours, our_gradient), (theirs, their_gradient) = logits_and_gradient(params), logits_and_gradient(values)
    assert float(jnp.abs(ours - theirs).max()) < 1e-5 * float(jnp.abs(theirs).max())
    for own, other in zip(*map(jax.tree.leaves, (our_gradient, their_gradient)), strict=True):
        assert float(jnp.abs(other).max()) > 0
        np.testing.assert_allclose(own, other, rtol=1e-4, atol=1e-4 * float(jnp.abs(other).max()))


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_no_kernel_in_floating_point_is_kept_for_the_backward_pass(kind, monkeypatch):
    xlora, params, _ = quantized_synthetic(kind)
    frozen = {"base": params["base"], "experts": params["experts"]}
    stacks = {leaf.shape for leaf in flatten(params["base"]).values() if isinstance(leaf, QuantizedKernel)}

    def kept():
        """Return the shapes of the kernels among the arrays that the backward pass gets."""
        loss = lambda gate: batch_loss(xlora, {"classifier": gate}, frozen, batch())[0]  # noqa: E731
        arrays = jax.tree.leaves(jax.eval_shape(lambda gate: jax.vjp(loss, gate)[1], params["classifier"]))
        return {array.shape for array in arrays if jnp.issubdtype(array.dtype, jnp.floating)} & stacks

    assert not kept()
    # Without a rule of its own, the product does keep them; so this test would notice.
    monkeypatch.setattr(quantized, "matmul", lambda x, kernel: x @ dequantize(kernel, x.dtype))
    assert kept() == stacks


@pytest.mark.parametrize("kind", KINDS)
def test_two_passes_and_a_gradient_share_no_kernel_in_floating_point(kind, monkeypatch):
    monkeypatch.setattr(quantized, "_PART", 2**12)
    kernels = [quantize(random_weight(256, 256, seed=seed), kind) for seed in range(6)]

    def temporaries(product):
        """Return the size of the temporaries of two passes, whose second one is differentiated."""

        def run(x, kernels):
            for kernel in kernels:
                x = jnp.tanh(product(x, kernel))
            return x

        def loss(x, kernels):
            return run(x + run(jax.lax.stop_gradient(x), kernels), kernels).sum()

        return jax.jit(jax.grad(loss)).lower(random_weight(2, 256), kernels).compile().memory_analysis()

    all_kernels = 6 * 256 * 256 * 4
    assert temporaries(quantized.matmul).temp_size_in_bytes < all_kernels / 2
    # Without loops, XLA converts each kernel once and keeps it. So this test would notice.
    assert temporaries(lambda x, kernel: x @ dequantize(kernel)).temp_size_in_bytes >= all_kernels


def test_codes_and_scales_are_split_over_the_axes_of_their_kernel():
    _, params, _ = quantized_synthetic("int4")
    kernel = params["base"]["layers"]["mlp"]["up_proj"]["kernel"]
    mesh = jax.sharding.AbstractMesh((1, 4, 2), ("data", "fsdp", "tensor"))
    split = param_shardings(params, mesh)["base"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.shape == (3, 32, 48)
    assert split.codes.spec == P(None, "fsdp", "tensor")
    # One scale per column and 32 inputs: only the axis of the outputs can be divided.
    assert (kernel.scales.shape, split.scales.spec) == ((3, 1, 48), P(None, None, "tensor"))


def test_the_inputs_are_divided_evenly():
    assert {kind: quantized.group_size(4096, kind) for kind in KINDS} == {"int8": 4096, "int4": 64, "nf4": 64}
    assert quantized.group_size(11008 + 16, "nf4") == math.gcd(11024, 64) == 16
    assert quantized.group_size(4, "int4") is None
    assert quantized.group_size(97, "nf4") is None
