"""What a gate does with a text, against NumPy on the model's own outputs."""

from __future__ import annotations

import numpy as np
import pytest

from tests.helpers.synthetic import batch, synthetic
from xlora_jax.passes import base_forward, forward, unembed
from xlora_jax.training.routing import make_routing_step


def log_probabilities(logits, ids):
    logits = np.asarray(logits, np.float64)[:, :-1]
    logits = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.take_along_axis(logits, ids[:, 1:, None], axis=-1)[..., 0]


@pytest.mark.parametrize("config", [{"layerwise_scalings": True, "top_k_lora": 2}, {}])
def test_routing_is_what_the_layers_see(config):
    model, params = synthetic(global_scaling_weight=0.7, **config)
    data = [batch(seed=seed) for seed in (0, 1)]
    step = make_routing_step(model, loss_chunk=5)
    routing = (step(params, data[0]) + step(params, data[1])).mean()

    losses, base_losses, gates = [], [], []
    for one in data:
        counted = one["labels"][:, 1:] != -100
        out = forward(model, params, one["input_ids"])
        losses.append(-log_probabilities(out.logits, one["input_ids"])[counted])
        base = base_forward(model, params, input_ids=one["input_ids"])
        base_losses.append(-log_probabilities(unembed(model, params, base.hidden_states), one["input_ids"])[counted])
        gates.append(np.asarray(out.scalings, np.float64)[:, :-1][counted])
    gates = np.concatenate(gates)
    if not model.config.layerwise_scalings:
        gates = gates[:, :1]
    if model.config.top_k_lora is not None:
        gates = np.where(gates >= np.sort(gates, axis=-1)[..., -2:-1], gates, 0)
    assert int(routing.tokens) == len(gates)
    assert float(routing.loss) == pytest.approx(np.concatenate(losses).mean(), rel=1e-5)
    assert float(routing.base_loss) == pytest.approx(np.concatenate(base_losses).mean(), rel=1e-5)
    assert abs(float(routing.loss / routing.base_loss) - 1) > 1e-3
    np.testing.assert_allclose(routing.gates, gates.mean(0), rtol=1e-5)
    np.testing.assert_allclose(routing.leads, np.eye(3)[gates.argmax(-1)].mean(0), rtol=1e-5)
    shares = gates / gates.sum(-1, keepdims=True)
    entropy = -(shares * np.log(np.where(shares > 0, shares, 1))).sum(-1)
    np.testing.assert_allclose(routing.entropy, entropy.mean(0), rtol=1e-4)


def test_no_gates_at_all_have_no_entropy():
    # A gate without softmax can be zero for every expert.
    model, params = synthetic(enable_softmax=False)
    params["classifier"] = {name: {k: v * 0 for k, v in part.items()} for name, part in params["classifier"].items()}
    routing = make_routing_step(model)(params, batch()).mean()
    assert np.array_equal(routing.entropy, [0.0])
    assert float(routing.loss) == pytest.approx(float(routing.base_loss), rel=1e-6)
