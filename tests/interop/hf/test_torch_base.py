"""Bases that are not ported to Flax: transformers' PyTorch code through torchax, against transformers and the formula."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from interop import load_base, load_xlora
from interop.experts import unstack_experts
from tests.helpers.torch_models import MODELS, V, make_adapters, make_torch_model, reloaded, torch_inputs, torch_xlora
from xlora_jax import XLoraConfig
from xlora_jax.passes import forward

CONFIG = {"layerwise_scalings": True, "xlora_depth": 1, "softmax_temperature": 0.3}
NOTE = "is not ported to Flax, so it runs as PyTorch code through torchax"


@pytest.fixture(scope="module", params=MODELS)
def case(request, tmp_path_factory):
    """Name, base, adapters and our model, whose gates are far from uniform."""
    name = request.param
    folder = tmp_path_factory.mktemp(name)
    make_torch_model(name, folder / "base")
    adapters = make_adapters(name, folder / "base", folder)
    names = {str(i): str(path) for i, path in enumerate(adapters)}
    model = load_xlora(
        folder / "base",
        config=XLoraConfig(hidden_size=32, adapters=names, **CONFIG),
        backend="torchax",
    )
    return name, folder / "base", adapters, model


@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_both_passes_are_the_formula(case, padding):
    name, base_dir, adapters, model = case
    inputs = torch_inputs(name, padding)
    with torch.no_grad():
        logits, scalings, _ = torch_xlora(model, base_dir, adapters, inputs)
    out = model(**inputs)
    kept = inputs["attention_mask"] != 0 if name != "t5" else np.ones((2, 6), bool)
    assert scalings.std() > 0.05
    np.testing.assert_allclose(np.asarray(out.scalings)[kept], scalings.numpy()[kept], atol=1e-5)
    np.testing.assert_allclose(np.asarray(out.logits)[kept], logits.numpy()[kept], atol=1e-5, rtol=1e-5)
    assert np.isfinite(np.asarray(out.logits)).all()


def test_gradients_are_those_of_autograd(case):
    """Of a loss of both passes, with respect to the classifier and to the experts' matrices."""
    name, base_dir, adapters, model = case
    inputs = torch_inputs(name)
    weights = np.random.default_rng(1).normal(size=(V,)).astype(np.float32)
    logits, _, leaves = torch_xlora(model, base_dir, adapters, inputs)
    (torch.log_softmax(logits, -1) @ torch.from_numpy(weights)).mean().backward()

    def loss(learned):
        params = {**model.params, **learned}
        out = forward(model.xlora, params, **{key: jnp.asarray(value) for key, value in inputs.items()})
        return (jax.nn.log_softmax(out.logits) @ weights).mean()

    gradient = jax.jit(jax.grad(loss))({key: model.params[key] for key in ("classifier", "experts")})
    ours = {"kernel": gradient["classifier"]["dense_0"]["kernel"], "bias": gradient["classifier"]["dense_0"]["bias"]}
    for expert in unstack_experts(gradient["experts"], model.layers, model.origin.adapters):
        for layer, lora in expert.layers.items():
            ours |= {f"{expert.name} {layer} a": lora.a.T, f"{expert.name} {layer} b": lora.b.T}
    assert ours.keys() == leaves.keys()
    for key, theirs in leaves.items():
        assert float(theirs.grad.abs().max()) > 1e-6, key
        np.testing.assert_allclose(ours[key], theirs.grad.numpy(), atol=2e-5, rtol=2e-5, err_msg=key)
