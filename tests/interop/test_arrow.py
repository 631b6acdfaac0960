"""Arrow: gates of each layer from its own input, against PEFT's `lora/arrow.py`."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from peft import ArrowConfig, create_arrow_model
from safetensors.torch import load_file, save_file

from interop import load_lora, load_xlora, save_xlora
from tests.helpers.ours import our_config
from tests.helpers.reference import Expert, base_run, prompt, relative_error, tensors, torch_base
from xlora_jax import Rows, causal_lm_loss, evaluate, make_eval_step, make_train_step
from xlora_jax.layers import mixing
from xlora_jax.layers.arrow import direction

TOLERANCE = 1e-5
ALIKE = tuple(Expert(4, alpha, ("q_proj", "o_proj", "down_proj")) for alpha in (4, 6, 9, 2))


@pytest.fixture(scope="module")
def files(base, experts, tmp_path_factory):
    """A base, and adapters with a first singular value far above the second, which PEFT's power iteration finds."""
    base_dir = base("llama")
    folder = tmp_path_factory.mktemp("arrow")
    made = []
    for number, adapter in enumerate(experts(base_dir, ALIKE)):
        weights = load_file(adapter / "adapter_model.safetensors")
        for key in weights:
            if "lora_B" in key:
                q, _ = torch.linalg.qr(weights[key])
                r, _ = torch.linalg.qr(weights[key.replace("lora_B", "lora_A")].T)
                weights[key] = q.contiguous() * torch.tensor([1.5, 0.5, 0.3, 0.2])
                weights[key.replace("lora_B", "lora_A")] = r.T.contiguous()
        target = folder / str(number)
        target.mkdir()
        (target / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
        save_file(weights, target / "adapter_model.safetensors", {"format": "pt"})
        made.append(target)
    return base_dir, made


def ours(files, **settings):
    base_dir, adapters = files
    named = dict(zip("abcd", map(str, adapters), strict=True))
    return load_xlora(base_dir, adapters=named, config=our_config(base_dir, named, **settings), router="arrow")


@pytest.mark.parametrize(("top_k", "temperature"), [(4, 1.0), (2, 0.3), (1, 1.0)])
def test_logits_equal_pefts(files, top_k, temperature):
    base_dir, adapters = files
    settings = ArrowConfig(top_k=top_k, router_temperature=temperature, rng_seed=1)
    theirs = create_arrow_model(copy.deepcopy(torch_base(base_dir)), [str(path) for path in adapters], settings).eval()
    inputs = prompt(3, 11, "right")
    with torch.no_grad():
        wanted = theirs(**tensors(inputs)).logits.numpy()
    model = ours(files, top_k_lora=top_k, softmax_temperature=temperature)
    out = model(**inputs)
    assert out.scalings is None
    mask = inputs["attention_mask"]
    assert relative_error(out.logits, wanted, mask) <= TOLERANCE
    assert relative_error(base_run(base_dir, **inputs), wanted, mask) > 1e-2
    even = model(**inputs, scalings=np.full(4, 0.25)).logits
    assert relative_error(even, wanted, mask) > 1e-3


def test_experts_of_other_ranks_and_layers_by_the_formula(base, experts):
    """PEFT needs experts of one rank and the same modules. Here an expert that leaves a layer out takes no share."""
    base_dir = base("llama")
    adapters = experts(base_dir, "unequal")
    named = dict(zip("abc", map(str, adapters), strict=True))
    model = load_xlora(base_dir, adapters=named, config=our_config(base_dir, named, top_k_lora=2), router="arrow")
    loaded = [load_lora(path) for path in adapters]
    inputs = prompt(2, 9)
    handles = []
    reference = torch_base(base_dir)
    for name in {name for adapter in loaded for name in adapter.layers}:
        here = [adapter.layers[name] for adapter in loaded if name in adapter.layers]

        def mix(module, args, output, here=here):
            x = args[0].double()
            sizes = torch.stack(
                [(x @ torch.from_numpy(np.linalg.svd(h.a.astype(float) @ h.b)[0][:, 0])).abs() for h in here], -1
            )
            kept, places = sizes.topk(min(2, len(here)), dim=-1)
            gates = torch.zeros_like(sizes).scatter(-1, places, kept.softmax(-1))
            for number, h in enumerate(here):
                change = x @ torch.from_numpy(h.a.astype(float)) @ torch.from_numpy(h.b.astype(float))
                output = output + (h.scale * gates[..., number, None] * change).float()
            return output

        handles.append(reference.get_submodule(name).register_forward_hook(mix))
    try:
        with torch.no_grad():
            wanted = reference(**tensors(inputs)).logits.numpy()
    finally:
        for handle in handles:
            handle.remove()
    assert relative_error(model(**inputs).logits, wanted) <= TOLERANCE
    assert relative_error(base_run(base_dir, **inputs), wanted) > 1e-2


def test_generation_takes_one_pass_and_the_loss_is_that_of_the_logits(files):
    model = ours(files, top_k_lora=2)
    ids = prompt(2, 7)["input_ids"]
    new = 6
    text = np.pad(ids, ((0, 0), (0, new)))
    for at in range(7, 7 + new):
        text[:, at] = np.argmax(model(text).logits[:, at - 1], axis=-1)
    np.testing.assert_array_equal(model.generate(ids, max_new_tokens=new), text)
    assert model.get_generation_stats().reads_per_token == 1
    np.testing.assert_array_equal(model.unstacked().generate(ids, max_new_tokens=new), text)
    with model.disable_adapter():
        alone = np.asarray(model.generate(ids, max_new_tokens=new))
    assert (alone != text).any()
    given = np.asarray(model.generate(ids, max_new_tokens=new, experts={"b": 1.0}))
    assert (given != text).any()
    assert np.argmax(model(ids, scalings=[0, 1, 0, 0]).logits[:, -1], axis=-1).tolist() == given[:, 7].tolist()
    with pytest.raises(ValueError, match="expected some for every row, or none at all"):
        model.generate(ids, experts=[{"b": 1.0}, None])
    loss, _ = evaluate(make_eval_step(model.xlora), {}, model.params, Rows.from_tokens(ids), 2)
    assert loss == pytest.approx(float(causal_lm_loss(model(ids).logits, ids)), rel=1e-5)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_refusals(files, experts, tmp_path):
    base_dir, adapters = files
    model = ours(files)
    with pytest.raises(ValueError, match="router 'arrow' has no trained weights to save"):
        save_xlora(model, tmp_path / "out")
    with pytest.raises(ValueError, match="nothing to train"):
        make_train_step(model.xlora, None)
    with pytest.raises(ValueError, match="router: expected 'classifier' or 'arrow', got 'dart'"):
        load_xlora(base_dir, adapters={"a": adapters[0]}, router="dart")
    with pytest.raises(ValueError, match="not both"):
        load_xlora(base_dir, checkpoint=tmp_path, router="arrow")
    with pytest.raises(ValueError, match="embed_tokens', a module of kind 'embedding'"):
        load_xlora(base_dir, adapters={"a": experts(base_dir, "embedding")[0]}, router="arrow")
    with pytest.raises(ValueError, match="has no classifier"):
        _ = model.xlora.classifier
    assert dataclasses.replace(model.xlora, router="classifier").arrow is None


def test_direction_is_the_first_singular_vector():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(9, 3)), rng.normal(size=(3, 7))
    found = direction(a, b)
    wanted = np.linalg.svd(a @ b)[0][:, 0]
    np.testing.assert_allclose(np.abs(found @ wanted), 1, rtol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(found), 1, rtol=1e-12)
    assert not direction(a, 0 * b).any()


def test_gates_of_one_layer():
    similarities = np.array([[1.0, -3.0, 2.0, 0.5]], np.float32)
    present = np.array([True, True, False, True])
    gates = mixing.direction_gates(similarities, present, top_k=2, temperature=0.5, weight=0.7)
    share = 1 / (1 + np.exp((1 - 3) / 0.5))
    np.testing.assert_allclose(gates, 0.7 * np.array([[1 - share, share, 0, 0]]), rtol=1e-6)
    none = mixing.direction_gates(similarities, np.zeros(4, bool), top_k=2, temperature=1e-9)
    assert np.isfinite(none).all()
