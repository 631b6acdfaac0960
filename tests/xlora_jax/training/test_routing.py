"""Routing of a batch, against the model's own outputs with other gates."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from tests.helpers.synthetic import batch, synthetic
from xlora_jax.passes import base_forward, forward, unembed
from xlora_jax.routing.metrics import RoutingMetrics, Total
from xlora_jax.training.routing import make_routing_step


def summed_loss(logits, data):
    logits = np.asarray(logits, np.float64)[:, :-1]
    logits = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    losses = -np.take_along_axis(logits, data["input_ids"][:, 1:, None], axis=-1)[..., 0]
    return losses[data["labels"][:, 1:] != -100].sum()


@pytest.mark.parametrize("config", [{"layerwise_scalings": True, "top_k_lora": 2}, {}])
def test_losses_and_gates_are_those_of_the_model(config):
    model, params = synthetic(global_scaling_weight=0.7, head=True, **config)
    data = [batch(seed=seed) for seed in (0, 1)]
    step = make_routing_step(model, effects=True, loss_chunk=5)
    routing = Total.of(step(params, data[0])).add(step(params, data[1])).value()
    # The same model, which takes its scalings as gates.
    plain = dataclasses.replace(model, config=dataclasses.replace(model.config, top_k_lora=None))
    run = jax.jit(forward, static_argnums=0)

    @jax.jit
    def run_base(params, ids):
        return unembed(model, params, base_forward(model, params, input_ids=ids).hidden_states)

    want = dict.fromkeys(("loss", "base", "uniform", *range(3), *(f"without {e}" for e in range(3))), 0.0)
    gates = []
    for one in data:
        out = run(model, params, one["input_ids"])
        want["loss"] += summed_loss(out.logits, one)
        want["base"] += summed_loss(run_base(params, one["input_ids"]), one)
        own = np.asarray(out.scalings)
        if config:
            own = np.where(own >= np.sort(own, axis=-1)[..., -2:-1], own, 0)
        gates.append(own[:, :-1][one["labels"][:, 1:] != -100])
        for name, other in [
            ("uniform", np.full(3, 1 / 3)),
            *((e, np.eye(3)[e]) for e in range(3)),
            *((f"without {e}", own * (1 - np.eye(3)[e])) for e in range(3)),
        ]:
            other = np.broadcast_to(other, own.shape).astype(np.float32)
            want[name] += summed_loss(run(plain, params, one["input_ids"], scalings=other).logits, one)
    found = {
        "loss": routing.loss,
        "base": routing.base_loss,
        "uniform": routing.uniform_loss,
        **dict(enumerate(routing.alone_losses)),
        **{f"without {e}": value for e, value in enumerate(routing.without_losses)},
    }
    assert found == pytest.approx(want, rel=1e-5)
    assert len({round(value, 3) for value in want.values()}) == len(want)
    gates = np.concatenate(gates)
    metrics = RoutingMetrics.of(routing.sums)
    assert metrics.tokens[0] == len(gates)
    layers = metrics.mean_gate.shape[1]
    assert layers == (gates.shape[1] if config else 1)
    np.testing.assert_allclose(metrics.mean_gate[0], gates.mean(0)[:layers], rtol=1e-5)
    assert metrics.selected[0].sum(-1) == pytest.approx(2 if config else 3)
