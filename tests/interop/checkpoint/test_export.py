"""X-LoRA checkpoints in both directions: ours opened by real PEFT, PEFT's opened here, whole and damaged."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from interop import classifier_to_torch, load_xlora, save_xlora
from tests.helpers.ours import NAMES, our_xlora
from tests.helpers.reference import (
    FAMILIES,
    base_run,
    classifier_of,
    peft_layer_names,
    peft_run,
    peft_xlora,
    prompt,
    relative_error,
    reload_in_peft,
)

TOLERANCE = 1e-5
PREFIX = "base_model.internal_xlora_classifier."

CONFIGS = {
    "depth 1": {"xlora_depth": 1},
    "depth 2, dropout": {"xlora_depth": 2, "layerwise_scalings": True, "xlora_dropout_p": 0.2},
    "depth 4": {
        "xlora_depth": 4,
        "layerwise_scalings": True,
        "top_k_lora": 2,
        "scaling_pass_value": 0.7,
        "softmax_temperature": 0.5,
        "global_scaling_weight": 0.8,
    },
}


def trained(model, groups=("classifier",), seed=0):
    """`model` with the parameters of those groups moved, as training moves them."""
    random = np.random.default_rng(seed)

    def moved(path, leaf):
        keys = jax.tree_util.keystr(path)
        learns = "lora_" in keys and "dropout" not in keys if keys.startswith("['experts']") else True
        if keys.split("'")[1] not in groups or not learns:
            return leaf
        # Where a stacked matrix has zeros, an expert has nothing there to learn.
        return np.where(leaf != 0, leaf + 0.5 * random.normal(size=leaf.shape) * (np.std(leaf) + 0.1), 0).astype(
            leaf.dtype
        )

    return model.replace(params=jax.tree_util.tree_map_with_path(moved, model.params))


@pytest.mark.parametrize(
    ("family", "name"),
    [*(("llama", name) for name in CONFIGS), *((family, "depth 4") for family in FAMILIES if family != "llama")],
)
def test_our_checkpoint_in_peft_and_here(family, name, base, experts, tmp_path, monkeypatch):
    base_dir = base(family)
    adapters = experts(base_dir, "embedding" if name == "depth 1" else "unequal")
    fresh = our_xlora(base_dir, adapters, **CONFIGS[name])
    model = trained(fresh)
    inputs = prompt(2, 9)
    ours = model(**inputs)
    assert relative_error(fresh(**inputs).logits, ours.logits) > 1e-3

    save_xlora(model, tmp_path / "out", layout="peft")
    monkeypatch.chdir(tmp_path)  # a relative path to an expert would be taken from here
    theirs = reload_in_peft(base_dir, tmp_path / "out")
    logits, scalings = peft_run(theirs, **inputs)
    assert peft_layer_names(theirs) == list(model.layer_names)
    assert relative_error(ours.scalings, scalings) <= TOLERANCE
    assert relative_error(ours.logits, logits) <= TOLERANCE
    assert relative_error(base_run(base_dir, **inputs), logits) > 1e-2

    back = load_xlora(base_dir, checkpoint=tmp_path / "out")
    assert tuple(back.expert_names) == NAMES[:3]
    assert dataclasses.replace(back.config, adapters={}) == dataclasses.replace(model.config, adapters={})
    assert relative_error(back(**inputs).logits, ours.logits) <= 1e-6


def test_generate_in_peft_from_our_checkpoint(base, experts, tmp_path):
    """What a user does next in PEFT."""
    base_dir = base("llama")
    model = trained(our_xlora(base_dir, experts(base_dir, "unequal"), xlora_depth=2))
    save_xlora(model, tmp_path / "out", layout="peft")
    inputs = prompt(1, 7)
    theirs = reload_in_peft(base_dir, tmp_path / "out")
    with torch.no_grad():
        ids = theirs.generate(
            input_ids=torch.as_tensor(inputs["input_ids"]).long(), max_new_tokens=16, do_sample=False, pad_token_id=0
        )
    np.testing.assert_array_equal(model.generate(inputs["input_ids"], max_new_tokens=16), ids.numpy())


@pytest.mark.parametrize("recipes", ["unequal", "embedding"])
def test_trained_experts_are_exported_too(recipes, base, experts, tmp_path):
    """Where PEFT's own save keeps the classifier only and loses them."""
    base_dir = base("llama")
    untrained = our_xlora(base_dir, experts(base_dir, recipes), use_trainable_adapters=True)
    model = trained(untrained, ("classifier", "experts"))
    inputs = prompt(2, 9)
    ours = model(**inputs).logits
    assert relative_error(trained(untrained)(**inputs).logits, ours) > 1e-3
    save_xlora(model, tmp_path / "out", layout="peft")
    assert relative_error(ours, peft_run(reload_in_peft(base_dir, tmp_path / "out"), **inputs)[0]) <= TOLERANCE
    assert relative_error(load_xlora(base_dir, checkpoint=tmp_path / "out")(**inputs).logits, ours) <= 1e-6


def write_complete(theirs, directory, kind="safetensors"):
    """A PEFT checkpoint as PEFT up to 0.19.1 writes it: every tensor of the classifier."""
    theirs.save_pretrained(str(directory))
    for name in os.listdir(directory):
        if os.path.isdir(directory / name):
            shutil.rmtree(directory / name)
    weights = {PREFIX + name: tensor.contiguous() for name, tensor in classifier_of(theirs).state_dict().items()}
    if kind == "safetensors":
        save_file(weights, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    else:
        os.remove(directory / "adapter_model.safetensors")
        torch.save(weights, directory / "adapter_model.bin")


@pytest.mark.parametrize(("name", "kind"), [*((name, "safetensors") for name in CONFIGS), ("depth 2, dropout", "bin")])
def test_pefts_complete_checkpoint_here(name, kind, base, experts, tmp_path):
    base_dir = base("mistral")
    theirs = peft_xlora(base_dir, experts(base_dir, "unequal"), **CONFIGS[name])
    write_complete(theirs, tmp_path / "peft", kind)
    inputs = prompt(2, 9)
    logits, scalings = peft_run(theirs, **inputs)

    ours = load_xlora(base_dir, checkpoint=tmp_path / "peft")
    out = ours(**inputs)
    assert relative_error(out.scalings, scalings) <= TOLERANCE
    assert relative_error(out.logits, logits) <= TOLERANCE
    assert relative_error(base_run(base_dir, **inputs), logits) > 1e-2
    for field, value in CONFIGS[name].items():
        assert getattr(ours.config, field) == value


def test_experts_given_beside_a_checkpoint_replace_its_paths(base, experts, tmp_path):
    """The paths in the JSON are those of the machine that trained it."""
    base_dir = base("llama")
    adapters = experts(base_dir, "unequal")
    theirs = peft_xlora(base_dir, adapters, xlora_depth=2)
    write_complete(theirs, tmp_path / "peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    config["adapters"] = {name: f"/nowhere/{name}" for name in config["adapters"]}
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config))

    ours = load_xlora(
        base_dir, checkpoint=tmp_path / "peft", adapters=dict(zip(NAMES, map(str, adapters), strict=False))
    )
    inputs = prompt(2, 9)
    assert tuple(ours.expert_names) == NAMES[:3]
    assert relative_error(ours(**inputs).logits, peft_run(theirs, **inputs)[0]) <= TOLERANCE
    with pytest.raises(ValueError, match=r"0 at '/nowhere/0', .* Pass adapters="):
        load_xlora(base_dir, checkpoint=tmp_path / "peft")


# Slots of the classifier's Sequential whose number is also an expert's name: what PEFT 0.20 and later leave out.
LOST = {"depth 1": (0,), "depth 2, dropout": (0,), "depth 4": (0, 2)}


@pytest.mark.parametrize("name", CONFIGS)
def test_incomplete_checkpoint_is_completed_from_the_numbered_folders_with_a_warning(name, base, experts, tmp_path):
    base_dir = base("llama")
    theirs = peft_xlora(base_dir, experts(base_dir, "unequal"), **CONFIGS[name])
    theirs.save_pretrained(str(tmp_path))
    stored = load_file(tmp_path / "adapter_model.safetensors")
    lost = {PREFIX + f"layers.{slot}.{part}" for slot in LOST[name] for part in ("weight", "bias")}
    assert {PREFIX + key for key in classifier_of(theirs).state_dict()} - set(stored) == lost

    with pytest.warns(UserWarning, match=r"layers\.0\.weight"):
        ours = load_xlora(base_dir, checkpoint=tmp_path)
    inputs = prompt(2, 9)
    logits, scalings = peft_run(theirs, **inputs)
    out = ours(**inputs)
    assert relative_error(out.scalings, scalings) <= TOLERANCE
    assert relative_error(out.logits, logits) <= TOLERANCE
    state = classifier_to_torch(ours.params["classifier"], ours.config)
    for key, tensor in classifier_of(theirs).state_dict().items():
        np.testing.assert_array_equal(np.asarray(state[key]), tensor.numpy())


@pytest.mark.parametrize("name", CONFIGS)
def test_incomplete_checkpoint_is_refused_where_nothing_is_left(name, base, experts, tmp_path):
    """PEFT itself loads it without a word, with random numbers in the place of what was trained."""
    base_dir = base("llama")
    theirs = peft_xlora(base_dir, experts(base_dir, "unequal"), **CONFIGS[name])
    theirs.save_pretrained(str(tmp_path))
    slot = LOST[name][-1]
    shutil.rmtree(tmp_path / str(slot))
    with pytest.raises(ValueError, match=rf"layers\.{slot}\.weight") as refusal:
        load_xlora(base_dir, checkpoint=tmp_path)
    message = str(refusal.value)
    assert f"layers.{slot}.bias" in message
    assert "PEFT 0.20" in message
    assert str(tmp_path) in message


def test_unknown_tensor_in_a_checkpoint_is_refused_by_name(base, experts, tmp_path):
    base_dir = base("llama")
    theirs = peft_xlora(base_dir, experts(base_dir, "unequal"))
    write_complete(theirs, tmp_path / "peft")
    weights = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    save_file(
        {**weights, PREFIX + "layers.7.weight": torch.ones(3, 4)}, tmp_path / "peft" / "adapter_model.safetensors"
    )
    with pytest.raises(ValueError, match=r"layers\.7\.weight"):
        load_xlora(base_dir, checkpoint=tmp_path / "peft")
