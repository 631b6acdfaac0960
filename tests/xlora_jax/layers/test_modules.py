"""The Flax modules: what they compute, which variables they have, and that without experts they are Flax's own."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from xlora_jax.layers.modules import (
    TemperatureScaledSoftmax,
    XLoraClassifier,
    XLoraConv,
    XLoraDense,
    XLoraEmbed,
    XLoraTiedHead,
)

B, T, N, R = 2, 5, 3, 6
COLUMNS = jnp.zeros((N, R)).at[0, :1].set(2.0).at[1, 1:4].set(0.5).at[2, 4:].set(1.5)


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def experts(down: tuple[int, ...], out: int) -> dict[str, jax.Array]:
    return {"lora_a": normal(10, *down, R), "lora_b": normal(11, R, out), "columns": COLUMNS}


def mixed(down: jax.Array, gates: jax.Array, variables: dict[str, jax.Array]) -> jax.Array:
    return (down * (gates @ COLUMNS)) @ variables["lora_b"]


def test_dense_adds_its_experts() -> None:
    x, gates, own = normal(0, B, T, 7), normal(1, B, T, N), experts((7,), 4)
    module = XLoraDense(4)
    params = module.init(jax.random.key(2), x)["params"]
    plain = nn.Dense(4).apply({"params": params}, x)
    got = module.apply({"params": params, "experts": own, "scalings": {"gates": gates}}, x)
    np.testing.assert_allclose(got, plain + mixed(x @ own["lora_a"], gates, own), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("given", [[], ["experts"], ["scalings"]])
def test_without_experts_or_without_gates_dense_is_plain(given: list[str]) -> None:
    x = normal(0, B, T, 7)
    variables: dict[str, Any] = {"experts": experts((7,), 4), "scalings": {"gates": normal(1, B, T, N)}}
    module = XLoraDense(4)
    params = module.init(jax.random.key(2), x)["params"]
    got = module.apply({"params": params} | {name: variables[name] for name in given}, x)
    np.testing.assert_array_equal(got, nn.Dense(4).apply({"params": params}, x))


def test_bias_of_lora_b_is_scaled_but_not_gated() -> None:
    x, own = normal(0, B, T, 7), experts((7,), 4)
    own |= {"lora_bias": normal(5, N, 4), "bias_scale": jnp.array([2.0, 0.5, 0.0])}
    scalings = {"gates": jnp.zeros((B, T, N)), "weight": jnp.float32(0.5)}
    module = XLoraDense(4)
    params = module.init(jax.random.key(2), x)["params"]
    got = module.apply({"params": params, "experts": own, "scalings": scalings}, x)
    want = 0.5 * (2.0 * own["lora_bias"][0] + 0.5 * own["lora_bias"][1])
    np.testing.assert_allclose(
        got - nn.Dense(4).apply({"params": params}, x), np.broadcast_to(want, got.shape), atol=1e-5
    )


def test_dense_in_bfloat16_with_float32_experts_sums_in_float32() -> None:
    x, gates, own = normal(0, B, T, 7), normal(1, B, T, N), experts((7,), 4)
    module = XLoraDense(4, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    params = module.init(jax.random.key(2), x)["params"]
    got = module.apply({"params": params, "experts": own, "scalings": {"gates": gates}}, x.astype(jnp.bfloat16))
    assert got.dtype == jnp.bfloat16
    x32 = x.astype(jnp.bfloat16).astype(jnp.float32)
    plain = nn.Dense(4, dtype=jnp.bfloat16).apply({"params": params}, x).astype(jnp.float32)
    want = (plain + mixed(x32 @ own["lora_a"], gates, own)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(got, want)


def test_lora_dropout_acts_only_with_an_rng_for_it() -> None:
    x, own = normal(0, B, T, 7), experts((7,), 4) | {"lora_dropout": jnp.full(N, 0.5)}
    module = XLoraDense(4)
    params = module.init(jax.random.key(2), x)["params"]
    variables = {"params": params, "experts": own, "scalings": {"gates": normal(1, B, T, N)}}
    still = [module.apply(variables, x) for _ in range(2)]
    drawn = [module.apply(variables, x, rngs={"lora_dropout": jax.random.key(seed)}) for seed in (0, 1)]
    np.testing.assert_array_equal(still[0], still[1])
    assert jnp.abs(drawn[0] - drawn[1]).max() > 0.1
    assert jnp.abs(drawn[0] - still[0]).max() > 0.1


def test_embed_scales_base_and_experts_alike() -> None:
    ids, gates, own = jnp.array([[1, 4, 0, 2, 2], [3, 3, 8, 7, 5]]), normal(1, B, T, N), experts((9,), 4)
    module = XLoraEmbed(9, 4, embed_scale=2.5)
    params = module.init(jax.random.key(2), ids)["params"]
    got = module.apply({"params": params, "experts": own, "scalings": {"gates": gates}}, ids)
    want = 2.5 * (params["embedding"][ids] + mixed(own["lora_a"][ids], gates, own))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    assert jnp.abs(got - 2.5 * params["embedding"][ids]).max() > 0.1


def test_tied_head_uses_the_table_and_adds_its_experts() -> None:
    x, table, gates, own = normal(0, B, T, 7), normal(3, 9, 7), normal(1, B, T, N), experts((7,), 9)
    got = XLoraTiedHead().apply({"experts": own, "scalings": {"gates": gates}}, x, table)
    np.testing.assert_allclose(got, x @ table.T + mixed(x @ own["lora_a"], gates, own), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 12, 13])
def test_conv_gates_are_per_example_or_per_position(tokens: int) -> None:
    x, gates, own = normal(0, B, 7, 9, 2), normal(1, B, tokens, N), experts((2, 3, 2), 5)
    module = XLoraConv(5, (2, 3), strides=(2, 2), padding="VALID")
    params = module.init(jax.random.key(2), x)["params"]
    got = module.apply({"params": params, "experts": own, "scalings": {"gates": gates}}, x)
    assert got.shape == (B, 3, 4, 5)
    down = nn.Conv(R, (2, 3), strides=(2, 2), padding="VALID", use_bias=False).apply(
        {"params": {"kernel": own["lora_a"]}}, x
    )
    laid = gates if tokens == 1 else gates[:, -12:]
    laid = jnp.broadcast_to(laid[:, :, None], (B, laid.shape[1], 12 // laid.shape[1], N)).reshape(B, 3, 4, N)
    plain = nn.Conv(5, (2, 3), strides=(2, 2), padding="VALID").apply({"params": params}, x)
    np.testing.assert_allclose(got, plain + mixed(down, laid, own), rtol=1e-4, atol=1e-4)


def test_conv_refuses_gates_that_fit_nothing() -> None:
    x, own = normal(0, B, 7, 9, 2), experts((2, 3, 2), 5)
    module = XLoraConv(5, (2, 3), strides=(2, 2), padding="VALID")
    params = module.init(jax.random.key(2), x)["params"]
    with pytest.raises(ValueError, match=r"T = 12 .*T = 13 .*got \[2, 5, 3\]"):
        module.apply({"params": params, "experts": own, "scalings": {"gates": normal(1, B, 5, N)}}, x)


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("layerwise", [False, True])
def test_classifier_shapes_and_rows(depth: int, layerwise: bool) -> None:
    module = XLoraClassifier(num_layers=4, num_experts=N, depth=depth, size=11, layerwise=layerwise)
    hidden = normal(0, B, T, 7)
    params = module.init(jax.random.key(1), hidden)["params"]
    widths = [7, *[11] * (depth - 1), N * (4 if layerwise else 1)]
    assert {k: v["kernel"].shape for k, v in params.items()} == {
        f"dense_{i}": (widths[i], widths[i + 1]) for i in range(depth)
    }
    out = module.apply({"params": params}, hidden)
    assert out.shape == (B, T, 4 if layerwise else 1, N)
    np.testing.assert_allclose(out.sum(-1), 1, rtol=1e-5)


def test_classifier_dropout_needs_depth_and_an_rng() -> None:
    hidden = normal(0, B, T, 7)
    for depth, moves in ((1, False), (3, True)):
        module = XLoraClassifier(num_layers=4, num_experts=N, depth=depth, size=11, dropout_rate=0.5)
        params = module.init(jax.random.key(1), hidden)["params"]
        still = module.apply({"params": params}, hidden)
        drawn = module.apply({"params": params}, hidden, deterministic=False, rngs={"dropout": jax.random.key(3)})
        assert (jnp.abs(still - drawn).max() > 1e-3) == moves


def test_softmax_module_is_the_function() -> None:
    logits = normal(0, 3, 4)
    np.testing.assert_array_equal(TemperatureScaledSoftmax(0.5).apply({}, logits), jax.nn.softmax(logits * 2))
