"""An NNX model gives what the same model in Linen gives, whose conversion is tested in `test_convert.py`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from xlora_jax import XLoraConfig, causal_lm_loss
from xlora_jax.conversion.linen import Lora, convert, find_layers
from xlora_jax.conversion.nnx import convert_nnx, find_nnx_layers
from xlora_jax.passes import forward

VOCAB, WIDTH, BLOCKS = 11, 6, 3
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (2, 5)), jnp.int32)


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.DenseGeneral((2, 4), name="split")(nn.LayerNorm(name="norm")(x))
        y = nn.DenseGeneral(WIDTH, axis=(-2, -1), name="join")(nn.gelu(y))
        return x + nn.Einsum((WIDTH, WIDTH), "...a,ab->...b", name="turn")(y), None


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(VOCAB, WIDTH, name="tokens")(ids)
        axes = {"params": 0, "experts": 0, "scalings": 0}
        split = {"params": True, "lora_dropout": True}
        x, _ = nn.scan(LinenBlock, variable_axes=axes, split_rngs=split, length=BLOCKS)(name="stack")(x, None)
        x = nn.Conv(WIDTH, (3,), padding="CAUSAL", name="conv")(x)
        return nn.Dense(VOCAB, name="head")(nn.LayerNorm(name="norm")(x))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.split = nnx.LinearGeneral(WIDTH, (2, 4), rngs=rngs)
        self.join = nnx.LinearGeneral((2, 4), WIDTH, axis=(-2, -1), rngs=rngs)
        self.turn = nnx.Einsum("...a,ab->...b", (WIDTH, WIDTH), (WIDTH,), rngs=rngs)

    def __call__(self, x):
        return x + self.turn(self.join(nnx.gelu(self.split(self.norm(x)))))


class Net(nnx.Module):
    axes = 0

    def __init__(self, rngs):
        self.tokens = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.stack = nnx.split_rngs(splits=BLOCKS)(nnx.vmap(Block, in_axes=0, out_axes=0))(rngs)
        self.conv = nnx.Conv(WIDTH, WIDTH, (3,), padding="CAUSAL", rngs=rngs)
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCAB, rngs=rngs)

    def __call__(self, ids):
        run = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, self.axes), out_axes=nnx.Carry)
        return self.head(self.norm(self.conv(run(self.tokens(ids), self.stack))))


class KeepsParametersOnly(Net):
    axes = nnx.StateAxes({nnx.Param: 0, ...: None})


def experts_of(layers):
    random = np.random.default_rng(0)
    experts = {"a": {}, "b": {}, "c": {}}
    for rank, loras in enumerate(experts.values(), 2):
        for name, layer in layers.items():
            lead = () if layer.members is None else (layer.members,)
            a = random.normal(size=(*lead, *layer.shape[:-1], rank)) * 0.4
            b = random.normal(size=(*lead, rank, layer.shape[-1])) * 0.4
            loras[name] = Lora(a.astype(np.float32), b.astype(np.float32), alpha=3.0, dropout=0.5)
    return experts


@pytest.mark.slow
def test_equals_the_same_model_in_linen():
    """Through a scan, and every kind of layer: logits, scalings, and the classifier's gradients."""
    net = Net(nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(net, nnx.Param))
    found = find_layers(LinenNet(), params, TOKENS)
    layers = find_nnx_layers(net, TOKENS)
    assert layers == found
    assert list(layers) == list(found)
    config = XLoraConfig(hidden_size=WIDTH, adapters={}, layerwise_scalings=True, scaling_pass_value=0.3, top_k_lora=2)
    experts, example = experts_of(found), {"input_ids": TOKENS}
    linen = convert(LinenNet(), params, experts, config, hidden_states="norm", example=example)
    ours = convert_nnx(net, experts, config, hidden_states="norm", example=example)
    assert ours.layer_names == linen.layer_names
    wanted, out = linen(TOKENS), ours(TOKENS)
    np.testing.assert_allclose(out.logits, wanted.logits, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(out.scalings, wanted.scalings, rtol=1e-5, atol=1e-6)
    assert jnp.abs(out.logits - net(TOKENS)).max() > 0.1
    with ours.disable_adapter():
        np.testing.assert_allclose(ours(TOKENS).logits, net(TOKENS), rtol=1e-5, atol=1e-6)

    def gradient(model):
        def loss(classifier):
            logits = forward(model.xlora, {**model.params, "classifier": classifier}, TOKENS).logits
            return causal_lm_loss(logits, TOKENS)

        return jax.jit(jax.grad(loss))(model.params["classifier"])

    for got, want in zip(jax.tree.leaves(gradient(ours)), jax.tree.leaves(gradient(linen)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
        assert jnp.abs(want).max() > 1e-4

    @jax.jit
    def dropped(key):
        return forward(ours.xlora, ours.params, TOKENS, rngs={"lora_dropout": key}).logits

    assert jnp.abs(dropped(jax.random.key(0)) - dropped(jax.random.key(1))).max() > 1e-3


def test_what_cannot_be_is_refused_by_name():
    net = Net(nnx.Rngs(0))
    found, example = find_nnx_layers(net, TOKENS), {"input_ids": TOKENS}
    config = XLoraConfig(hidden_size=WIDTH, adapters={})
    with pytest.raises(ValueError, match="no submodule 'final'"):
        convert_nnx(net, experts_of(found), config, hidden_states="final", example=example)
    with pytest.raises(ValueError, match=r"'stack/split'.*In NNX the transform has to treat all variables"):
        convert_nnx(KeepsParametersOnly(nnx.Rngs(0)), experts_of(found), config, hidden_states="norm", example=example)
