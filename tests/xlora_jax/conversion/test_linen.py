"""Any Flax model: equal to the same model from our layers, through every transform, and clear about what cannot be."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from xlora_jax import XLoraConfig, causal_lm_loss
from xlora_jax.conversion.linen import Lora, convert, find_layers
from xlora_jax.layers.adapted import AdaptedLayers, Slot
from xlora_jax.models import Decoder, DecoderConfig
from xlora_jax.passes import XLora, forward
from xlora_jax.trees import flatten, unflatten


def _example():
    path = Path(__file__).parents[3] / "examples" / "foreign_model.py"
    spec = importlib.util.spec_from_file_location("foreign_model", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


EXAMPLE = _example()
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, EXAMPLE.VOCAB, (2, 9)), jnp.int32)
CONFIG = {"layerwise_scalings": True, "scaling_pass_value": 0.3, "top_k_lora": 2}


def random_experts(layers, names=("a", "b", "c"), seed=0):
    random = np.random.default_rng(seed)
    experts = {name: {} for name in names}
    for rank, loras in enumerate(experts.values(), 2):
        for name, layer in layers.items():
            lead = () if layer.members is None else (layer.members,)
            a = random.normal(size=(*lead, *layer.shape[:-1], rank)) * layer.shape[-2] ** -0.5
            b = random.normal(size=(*lead, rank, layer.shape[-1])) * rank**-0.5
            loras[name] = Lora(a.astype(np.float32), b.astype(np.float32), alpha=3.0)
    return experts


def converted(module, params, experts, hidden, example=TOKENS, width=EXAMPLE.WIDTH, **config):
    config = XLoraConfig(hidden_size=width, adapters={}, **{**CONFIG, **config})
    return convert(module, params, experts, config, hidden_states=hidden, example={"input_ids": example})


# The example's names to those of the decoder; kernels of DenseGeneral are flattened on the way.
NAMES = {
    "tokens": "embed_tokens",
    "positions": "embed_positions",
    "blocks": "layers",
    "attention_norm": "pre_attention_norm",
    "mlp_norm": "pre_mlp_norm",
    "query": "self_attn/q_proj",
    "key": "self_attn/k_proj",
    "value": "self_attn/v_proj",
    "out": "self_attn/o_proj",
    "up": "mlp/up_proj",
    "down": "mlp/down_proj",
    "final_norm": "norm",
    "head": "lm_head",
}


def ours_path(path):
    return tuple(part for name in path for part in NAMES.get(name, name).split("/"))


def test_equals_the_same_model_from_our_layers_and_trains_alike():
    """The example's GPT and our decoder with its parameters: logits, scalings and the classifier's gradients."""
    module = EXAMPLE.GPT()
    params = module.init(jax.random.key(0), TOKENS)["params"]
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), params)
    layers = find_layers(module, params, TOKENS)
    del layers["positions"]
    foreign = converted(module, params, random_experts(layers), "final_norm")

    declared = DecoderConfig(
        vocab_size=EXAMPLE.VOCAB,
        hidden_size=EXAMPLE.WIDTH,
        intermediate_size=4 * EXAMPLE.WIDTH,
        num_layers=EXAMPLE.BLOCKS,
        num_heads=EXAMPLE.HEADS,
        num_kv_heads=EXAMPLE.HEADS,
        head_dim=EXAMPLE.WIDTH // EXAMPLE.HEADS,
        rope=None,
        learned_positions=EXAMPLE.LENGTH,
        mlp="plain",
        activation="gelu_tanh",
        norm="layer",
        **dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), True),
    )
    decoder = Decoder(declared)
    shapes = flatten(decoder.init(jax.random.key(0), TOKENS)["params"])
    base = {ours_path(path): leaf for path, leaf in flatten(params).items()}
    base = unflatten({path: jnp.reshape(leaf, shapes[path].shape) for path, leaf in base.items()})
    experts = unflatten({ours_path(path): leaf for path, leaf in flatten(foreign.params["experts"]).items()})
    slots = tuple(Slot(ours_path(slot.path), slot.numbers) for slot in foreign.layers.slots)
    ours = XLora(decoder, AdaptedLayers(foreign.layer_names, slots), 3, foreign.config)

    def loss(classifier, model, params):
        out = forward(model, {**params, "classifier": classifier}, TOKENS)
        return causal_lm_loss(out.logits, TOKENS), out

    got = jax.value_and_grad(loss, has_aux=True)(foreign.params["classifier"], foreign.xlora, foreign.params)
    theirs = {"base": base, "experts": experts}
    wanted = jax.value_and_grad(loss, has_aux=True)(foreign.params["classifier"], ours, theirs)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-5), got, wanted)
    plain = module.apply({"params": params}, TOKENS)
    assert np.abs(got[0][1].logits - plain).max() > 0.1
    with foreign.disable_adapter():
        np.testing.assert_allclose(foreign(TOKENS).logits, plain, rtol=1e-5, atol=1e-5)


class Layers(nn.Module):
    """One of each kind of layer; the kernels of the last are transposed and split over heads."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 6, name="embed")(tokens)
        x = nn.Dense(10, name="dense")(x)
        x = nn.DenseGeneral((2, 5), name="split")(x)
        x = nn.DenseGeneral(8, axis=(-1, -2), name="joined")(x)
        x = nn.Einsum((3, 8, 4), "btd,hdc->bhtc", name="heads")(x)
        x = nn.Einsum((3, 4, 7), "...hti,hio->...to", name="merged")(x)
        return nn.Dense(11, name="head")(x)


@pytest.mark.parametrize("layer", ["embed", "dense", "split", "joined", "heads", "merged", "head"])
def test_each_kind_of_layer_is_its_kernel_plus_a_times_b(layer):
    """With one expert at gate one, the mix is the model whose kernel has A B added, in the kernel's own shape."""
    module, tokens = Layers(), TOKENS % 11
    params = module.init(jax.random.key(0), tokens)["params"]
    found = find_layers(module, params, tokens)
    assert list(found) == ["embed", "dense", "split", "joined", "heads", "merged", "head"]
    experts = random_experts({layer: found[layer]}, names=("one",))
    model = converted(module, params, experts, lambda out: out, tokens, 11, top_k_lora=None)
    lora = experts["one"][layer]
    leaf = "embedding" if layer == "embed" else "kernel"
    kernel = params[layer][leaf]
    delta = 3.0 / 2 * (lora.a @ lora.b)
    if layer == "heads":  # kernel [h, d, c]: A takes d, B gives (h, c)
        delta = delta.reshape(8, 3, 4).transpose(1, 0, 2)
    merged = {**params, layer: {**params[layer], leaf: kernel + delta.reshape(kernel.shape)}}
    wanted = module.apply({"params": merged}, tokens)
    got = model(tokens, scalings=[1.0]).logits
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
    assert np.abs(wanted - module.apply({"params": params}, tokens)).max() > 1e-2


class Convolutions(nn.Module):
    """Strided, padded, dilated and grouped convolutions."""

    @nn.compact
    def __call__(self, images):
        x = nn.Conv(6, (3, 2), strides=(2, 1), padding=((1, 0), (2, 1)), name="strided")(images)
        x = nn.Conv(8, (3, 3), kernel_dilation=(2, 1), padding="SAME", name="dilated")(x)
        x = nn.Conv(4, (2, 2), feature_group_count=2, padding="VALID", name="grouped")(x)
        return x.reshape(x.shape[0], -1, 4)


@pytest.mark.parametrize("layer", ["strided", "dilated", "grouped"])
def test_convolutions(layer):
    """A has the layer's strides, padding and dilation and all its input channels; B is a product at each position."""
    images = jax.random.normal(jax.random.key(1), (2, 9, 7, 3))
    module = Convolutions()
    params = module.init(jax.random.key(0), images)["params"]
    found = find_layers(module, params, images)
    experts = random_experts({layer: found[layer]}, names=("one",))
    config = XLoraConfig(hidden_size=4, adapters={})
    model = convert(
        module,
        params,
        experts,
        config,
        hidden_states=lambda out: out,
        example={"pixel_values": images},
        positional=("pixel_values",),
    )
    lora = experts["one"][layer]
    kernel = params[layer]["kernel"]
    delta = 1.5 * jnp.einsum("xydr,rf->xydf", lora.a, lora.b)
    if layer == "grouped":
        # As one dense kernel: each group of outputs sees its own inputs, the experts' part sees all.
        dense = jnp.zeros((2, 2, 8, 4)).at[:, :, :4, :2].set(kernel[..., :2]).at[:, :, 4:, 2:].set(kernel[..., 2:])
        wide = {**params, layer: {**params[layer], "kernel": dense + delta}}
        wanted = Ungrouped().apply({"params": wide}, images)
    else:
        wanted = module.apply({"params": {**params, layer: {**params[layer], "kernel": kernel + delta}}}, images)
    got = model(pixel_values=images, scalings=[1.0]).logits
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


class Ungrouped(Convolutions):
    @nn.compact
    def __call__(self, images):
        x = nn.Conv(6, (3, 2), strides=(2, 1), padding=((1, 0), (2, 1)), name="strided")(images)
        x = nn.Conv(8, (3, 3), kernel_dilation=(2, 1), padding="SAME", name="dilated")(x)
        x = nn.Conv(4, (2, 2), padding="VALID", name="grouped")(x)
        return x.reshape(x.shape[0], -1, 4)


class Wrapped(nn.Module):
    """A dense layer under the transforms asked for."""

    how: str

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 6, name="embed")(tokens)
        carried = {"params": 0, "experts": 0, "scalings": 0} if "carried" in self.how else {"params": 0}
        step = nn.remat(Step) if "remat" in self.how else Step
        if "scan" in self.how:
            x, _ = nn.scan(step, variable_axes=carried, split_rngs={"params": True}, length=3)(name="steps")(x)
        else:
            x, _ = (nn.jit(step) if "jit" in self.how else step)(name="steps")(x)
        return x


class Step(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Nested(name="nested")(x), None


class Nested(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.tanh(nn.Dense(6, name="dense")(x))


@pytest.mark.parametrize("how", ["plain", "remat", "jit", "carried scan", "carried scan remat", "scan"])
def test_lifted_transforms(how):
    module, tokens = Wrapped(how), TOKENS % 11
    params = module.init(jax.random.key(0), tokens)["params"]
    found = find_layers(module, params, tokens)
    layer = {"steps/nested/dense": found["steps/nested/dense"]}
    experts = random_experts(layer)
    if how == "scan":
        with pytest.raises(ValueError, match=r"variable_axes=\{'params': 0, 'experts': 0, 'scalings': 0\}"):
            converted(module, params, experts, "steps", tokens, 6)
        return
    model = converted(module, params, experts, lambda out: out, tokens, 6, top_k_lora=None)
    assert len(model.layer_names) == (3 if "scan" in how else 1)
    lora = experts["b"]["steps/nested/dense"]
    kernel = params["steps"]["nested"]["dense"]
    merged = {**kernel, "kernel": kernel["kernel"] + 3.0 / 3 * lora.a @ lora.b}
    wanted = module.apply({"params": {**params, "steps": {"nested": {"dense": merged}}}}, tokens)
    np.testing.assert_allclose(model(tokens, scalings=[0.0, 1.0, 0.0]).logits, wanted, rtol=1e-4, atol=1e-5)


def test_errors_name_what_is_wrong():
    module = EXAMPLE.GPT()
    params = module.init(jax.random.key(0), TOKENS)["params"]
    experts = random_experts(find_layers(module, params, TOKENS))
    head = {"a": {"head": experts["a"]["head"]}}
    with pytest.raises(ValueError, match="no such layer"):
        converted(module, params, {"a": {"nowhere": experts["a"]["head"]}}, "final_norm")
    with pytest.raises(ValueError, match=r"expected a \[32, 'r'\]"):
        converted(module, params, {"a": {"head": experts["a"]["tokens"]}}, "final_norm")
    with pytest.raises(ValueError, match="no submodule 'norm' was called"):
        converted(module, params, head, "norm", top_k_lora=None)
    with pytest.raises(ValueError, match=r"hidden_states: expected \[B, T, 32\]"):
        converted(module, params, head, lambda out: out, top_k_lora=None)
    with pytest.raises(ValueError, match="no layer at all"):
        converted(module, params, {"a": {}}, "final_norm", top_k_lora=None)
    model = converted(module, params, head, "final_norm", top_k_lora=None)
    with pytest.raises(NotImplementedError, match="does not generate"):
        model.module.empty_cache(1, 8)
    with pytest.raises(ValueError, match="one gate per example"):
        converted(module, params, {"a": {"positions": experts["a"]["positions"]}}, "final_norm", top_k_lora=None)(
            TOKENS
        )


@pytest.mark.slow
def test_the_example_learns_which_expert_each_domain_needs():
    losses = EXAMPLE.main()
    for domain, of in losses.items():
        other = next(name for name in losses if name != domain)
        assert of[domain] < of["X-LoRA"] < 0.3 * min(of["base"], of[other])
