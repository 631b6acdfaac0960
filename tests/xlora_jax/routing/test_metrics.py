"""Metrics of routing against plain NumPy, token by token, and their totals over many batches."""

from __future__ import annotations

import gc
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlora_jax.layers.mixing import layer_gates
from xlora_jax.routing.metrics import RoutingMetrics, Total, layer_mean, log_values, routing_sums

B, T, L, N = 3, 7, 4, 5


def gates_of(top_k=None, softmax=True, seed=0):
    logits = 3 * np.random.default_rng(seed).normal(size=(B, T, L, N)).astype(np.float32)
    scalings = jax.nn.softmax(logits) if softmax else jnp.asarray(logits)
    return layer_gates(scalings, top_k=top_k, softmax_selected=False)


def by_hand(gates, counted, segments=None):
    """Return the metrics of the counted tokens as a dict, with loops over tokens and layers."""
    gates = np.asarray(gates, np.float64)
    places = [(b, t) for b in range(B) for t in range(T) if counted[b, t]]
    shares = {p: np.abs(gates[p]) / np.maximum(np.abs(gates[p]).sum(-1, keepdims=True), 1e-300) for p in places}
    entropies = {p: np.array([-sum(x * np.log(x) for x in row if x > 0) for row in shares[p]]) for p in places}
    leaders = {p: [int(np.argmax(row)) if row.sum() else None for row in shares[p]] for p in places}
    neighbors = [
        (p, (p[0], p[1] + 1))
        for p in places
        if (p[0], p[1] + 1) in shares and (segments is None or segments[p] == segments[p[0], p[1] + 1])
    ]
    stacked = np.stack(list(shares.values()))
    mean = stacked.mean(0)
    co_use = np.zeros((L, N, N))
    for layer, i, j in itertools.product(range(L), range(N), range(N)):
        a, b = stacked[:, layer, i], stacked[:, layer, j]
        norms = np.linalg.norm(a) * np.linalg.norm(b)
        co_use[layer, i, j] = a @ b / norms if norms else 0
    same = [[[a is not None and a == b for b in leaders[p]] for a in leaders[p]] for p in places]
    return {
        "tokens": len(places),
        "mean_gate": np.mean([gates[p] for p in places], 0),
        "mean_share": mean,
        "selected": np.mean([gates[p] != 0 for p in places], 0),
        "top1": np.mean([[np.eye(N)[x] if x is not None else np.zeros(N) for x in leaders[p]] for p in places], 0),
        "entropy": np.mean([entropies[p] for p in places], 0) / np.log(N),
        "experts_per_token": np.mean([np.exp(entropies[p]) * (shares[p].sum(-1) > 0) for p in places], 0),
        "experts_in_use": np.exp(
            [-sum(x * np.log(x) for x in row / row.sum() if x > 0) if row.sum() else -np.inf for row in mean]
        ),
        "co_use": co_use,
        "change": np.mean([np.abs(shares[q] - shares[p]).sum(-1) / 2 for p, q in neighbors], 0),
        "agreement": np.mean(same, 0),
    }


def check(metrics, label, want):
    for name, value in want.items():
        np.testing.assert_allclose(getattr(metrics, name)[label], value, rtol=2e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(("top_k", "softmax"), [(None, True), (1, True), (2, True), (2, False)])
def test_metrics_are_those_counted_by_hand(top_k, softmax):
    gates = gates_of(top_k, softmax)
    mask = np.random.default_rng(1).random((B, T)) < 0.7
    metrics = RoutingMetrics.of(routing_sums(gates, jnp.asarray(mask)))
    check(metrics, 0, by_hand(gates, mask))
    if top_k is not None:
        assert metrics.selected.sum(-1) == pytest.approx(top_k)
        assert metrics.experts_per_token.max() <= top_k + 1e-5


def test_tokens_that_do_not_count_are_not_read():
    gates, mask = gates_of(2), np.ones((B, T), bool)
    mask[0, 3:] = mask[2, 0] = False
    spoiled = jnp.where(mask[:, :, None, None], gates, jnp.nan)
    ours, clean = (routing_sums(g, jnp.asarray(mask)) for g in (spoiled, gates))
    jax.tree.map(np.testing.assert_array_equal, ours, clean)
    assert int(clean.tokens[0]) == mask.sum()
    assert int(routing_sums(gates).tokens[0]) == B * T


def test_labels_and_documents_are_kept_apart():
    gates, mask = gates_of(), np.random.default_rng(2).random((B, T)) < 0.8
    labels = np.random.default_rng(3).integers(0, 2, (B, T))
    segments = np.repeat([[1, 1, 1, 2, 2, 3, 3]], B, axis=0)
    sums = routing_sums(
        gates, jnp.asarray(mask), labels=jnp.asarray(labels), num_labels=3, segment_ids=jnp.asarray(segments)
    )
    metrics = RoutingMetrics.of(sums)
    for label in (0, 1):
        check(metrics, label, by_hand(gates, mask & (labels == label), segments))
    assert metrics.tokens[2] == 0
    assert np.isnan(metrics.mean_gate[2]).all()
    # A label of each row is the label of its tokens.
    rows = np.array([1, 0, 1])
    of_rows = routing_sums(gates, labels=jnp.asarray(rows), num_labels=2)
    of_tokens = routing_sums(gates, labels=jnp.asarray(np.repeat(rows[:, None], T, 1)), num_labels=2)
    jax.tree.map(np.testing.assert_array_equal, of_rows, of_tokens)
    with pytest.raises(ValueError, match="labels: expected below 2, got 2"):
        routing_sums(gates, labels=jnp.asarray([0, 1, 2]), num_labels=2)
    with pytest.raises(ValueError, match=r"mask: expected shape \[3, 7\], got \[7, 3\]"):
        routing_sums(gates, jnp.ones((T, B)))


def test_a_token_without_gates_is_led_by_nobody():
    gates = gates_of(1).at[:, 2:].set(0)
    metrics = RoutingMetrics.of(routing_sums(gates))
    check(metrics, 0, by_hand(gates, np.ones((B, T), bool)))
    assert metrics.top1.sum(-1) == pytest.approx(2 / T)
    none = RoutingMetrics.of(routing_sums(jnp.zeros((1, 2, 1, 3))))
    assert not none.entropy.any()
    assert not none.experts_in_use.any()
    assert not none.co_use.any()
    alone = RoutingMetrics.of(routing_sums(jnp.ones((1, 2, 1, 1))))
    assert alone.entropy.item() == 0
    assert alone.experts_per_token.item() == 1


def test_logged_values_are_the_means_over_the_layers():
    sums = routing_sums(gates_of(2))
    metrics, names = RoutingMetrics.of(sums), tuple("abcde")
    values = log_values(layer_mean(sums), names)
    for name, of in (("gate", metrics.mean_gate), ("selected", metrics.selected), ("top1", metrics.top1)):
        assert [values[f"{name}/{expert}"] for expert in names] == pytest.approx(of[0].mean(0), rel=1e-5)
    assert values["entropy"] == pytest.approx(metrics.entropy.mean(), rel=1e-5)
    assert values["experts_per_token"] == pytest.approx(metrics.experts_per_token.mean(), rel=1e-5)
    assert values["change"] == pytest.approx(metrics.change.mean(), rel=1e-5)
    off = ~np.eye(L, dtype=bool)
    assert values["layer_agreement"] == pytest.approx(metrics.agreement[0][off].mean(), rel=1e-5)
    assert 0 < values["co_use"] < 1
    assert 1 < values["experts_in_use"] < N


def test_ten_thousand_batches_take_the_memory_of_one():
    # More tokens than float32 can count, and a value whose sum float32 rounds away.
    values = {"tokens": jnp.float32(4097), "gates": jnp.asarray([0.1, 1e-4], jnp.float32)}
    step = jax.jit(lambda gates: routing_sums(gates, jnp.ones((B, T), bool)))
    first = step(gates_of(seed=0))
    total, routing = Total.of(values), Total.of(first)
    live = None
    for number in range(1, 10_000):
        total, routing = total.add(values), routing.add(first)
        if number == 100:
            gc.collect()
            live = sum(array.nbytes for array in jax.live_arrays())
    gc.collect()
    assert sum(array.nbytes for array in jax.live_arrays()) == live
    assert total.value()["tokens"] == 40_970_000
    np.testing.assert_allclose(total.value()["gates"], np.asarray(values["gates"], np.float64) * 10_000, rtol=1e-12)
    jax.tree.map(
        lambda ours, one: np.testing.assert_allclose(ours, 10_000 * np.asarray(one, np.float64), rtol=1e-9),
        routing.value(),
        first,
    )
