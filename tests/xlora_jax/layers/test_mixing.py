"""The arithmetic of X-LoRA on plain arrays, against loops that say the same in so many words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlora_jax.layers import mixing

RANKS = (2, 5, 3)
SCALES = (2.0, 0.5, 1.25)


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def stacked() -> tuple[jax.Array, jax.Array, jax.Array]:
    """`lora_a [7, R]`, `columns [3, R]`, `lora_b [R, 4]` of experts with RANKS and SCALES, and one column of nobody."""
    columns = np.zeros((len(RANKS), sum(RANKS) + 1), np.float32)
    first = 0
    for expert, (rank, scale) in enumerate(zip(RANKS, SCALES, strict=True)):
        columns[expert, first : first + rank] = scale
        first += rank
    return normal(1, 7, first + 1), jnp.asarray(columns), normal(2, first + 1, 4)


def own_columns(expert: int) -> slice:
    return slice(sum(RANKS[:expert]), sum(RANKS[: expert + 1]))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_softmax(temperature: float) -> None:
    import torch

    logits = normal(0, 2, 3, 5)
    want = torch.softmax(torch.tensor(np.asarray(logits)) / temperature, -1).numpy()
    np.testing.assert_allclose(mixing.temperature_softmax(logits, temperature), want, rtol=1e-6)


@pytest.mark.parametrize("k", [1, 2, 4, 5])
def test_top_k_keeps_the_largest_as_they_are(k: int) -> None:
    scalings = normal(0, 2, 3, 5)
    got = np.asarray(mixing.mask_top_k(scalings, k))
    for row, kept in zip(np.asarray(scalings).reshape(-1, 5), got.reshape(-1, 5), strict=True):
        largest = np.argsort(row)[-k:]
        np.testing.assert_array_equal(kept[largest], row[largest])
        assert (kept != 0).sum() == k


def test_top_k_keeps_the_first_of_equals() -> None:
    np.testing.assert_array_equal(mixing.mask_top_k(jnp.full((1, 4), 0.25), 2), [[0.25, 0.25, 0, 0]])


@pytest.mark.parametrize("k", [0, -1, 6])
def test_top_k_refuses_what_there_is_not(k: int) -> None:
    with pytest.raises(ValueError, match=f"over 5 experts.*k={k}"):
        mixing.mask_top_k(normal(0, 5), k)


def test_softmax_over_selected_is_that_of_torch() -> None:
    import torch

    scalings = np.array([[0.3, 0.0, -2.0, 5.0], [0.0, 0.0, 1e-3, 0.0], [100.0, -100.0, 0.0, 99.0]], np.float32)
    want = torch.softmax(torch.tensor(scalings).masked_fill(torch.tensor(scalings) == 0, -torch.inf), -1)
    np.testing.assert_allclose(mixing.softmax_over_selected(jnp.asarray(scalings)), want, rtol=1e-6)


def test_a_row_of_zeros_stays_zero_and_its_gradient_is_zero() -> None:
    weight = normal(3, 2, 4)
    scalings = jnp.array([[0.0, 0.0, 0.0, 0.0], [0.5, 0.0, 0.2, 0.0]])
    value, grad = jax.value_and_grad(lambda s: (mixing.softmax_over_selected(s) * weight).sum())(scalings)
    assert np.isfinite(value)
    np.testing.assert_array_equal(grad[0], np.zeros(4))
    assert (np.asarray(grad[1]) != 0).sum() == 2


def test_softmax_over_selected_has_the_gradient_of_torch() -> None:
    import torch

    scalings, weight = np.asarray(normal(1, 3, 5)), np.asarray(normal(2, 3, 5))
    leaf = torch.tensor(scalings, requires_grad=True)
    (torch.softmax(leaf, -1) * torch.tensor(weight)).sum().backward()
    assert leaf.grad is not None
    got = jax.grad(lambda s: (mixing.softmax_over_selected(s) * weight).sum())(jnp.asarray(scalings))
    np.testing.assert_allclose(got, leaf.grad.numpy(), atol=1e-6)


def test_gates_are_top_k_then_softmax_then_weight() -> None:
    scalings = jnp.array([0.5, 0.1, 0.3, 0.1])
    got = mixing.layer_gates(scalings, top_k=2, softmax_selected=True, weight=0.5)
    want = 0.5 * np.exp([0.5, 0.3]) / np.exp([0.5, 0.3]).sum()
    np.testing.assert_allclose(got, [want[0], 0, want[1], 0], rtol=1e-6)


def test_mix_is_the_sum_over_experts() -> None:
    lora_a, columns, lora_b = stacked()
    x, gates = normal(3, 2, 6, 7), normal(4, 2, 6, 3)
    want = sum(
        gates[..., [e]] * SCALES[e] * (x @ lora_a[:, own_columns(e)]) @ lora_b[own_columns(e)]
        for e in range(len(RANKS))
    )
    np.testing.assert_allclose(mixing.mix_experts(x @ lora_a, gates, columns, lora_b), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_mix_of_half_precision_experts_accumulates_in_float32(dtype: jax.typing.DTypeLike) -> None:
    lora_a, columns, lora_b = stacked()
    x, gates = normal(3, 2, 6, 7), normal(4, 2, 6, 3)
    exact = mixing.mix_experts(x @ lora_a, gates, columns, lora_b)
    got = mixing.mix_experts((x @ lora_a).astype(dtype), gates.astype(dtype), columns, lora_b.astype(dtype))
    assert got.dtype == jnp.float32
    assert jnp.linalg.norm(got - exact) / jnp.linalg.norm(exact) < 1e-2


def test_lora_dropout_is_off_at_rate_zero_and_unbiased_above() -> None:
    lora_a, columns, _ = stacked()
    x = normal(3, 4, 7)
    plain = x @ lora_a.at[:, -1].set(0)
    np.testing.assert_allclose(
        mixing.drop_and_project(jax.random.key(0), x, lora_a, columns, jnp.zeros(3)), plain, atol=1e-5
    )
    rates = jnp.array([0.0, 0.5, 0.2])
    draws = jax.vmap(lambda key: mixing.drop_and_project(key, x, lora_a, columns, rates))(
        jax.random.split(jax.random.key(1), 4000)
    )
    np.testing.assert_allclose(draws.mean(0), plain, atol=0.35)
    spread = draws.std(0).mean(0)
    assert spread[own_columns(0)].max() < 1e-6
    assert spread[own_columns(1)].min() > spread[own_columns(2)].min() > 0.1


def test_lora_dropout_masks_are_independent_between_experts() -> None:
    """Two experts with the same A see different masks."""
    lora_a = jnp.tile(normal(1, 7, 1), (1, 2))
    out = mixing.drop_and_project(jax.random.key(0), normal(2, 50, 7), lora_a, jnp.eye(2), jnp.full(2, 0.5))
    assert abs(np.corrcoef(np.asarray(out).T)[0, 1]) < 0.9
