"""Experts added to a trained X-LoRA and removed from it: logits and scalings before and after."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from interop import add_expert, load_xlora, remove_expert, save_xlora
from tests.helpers.cli import invoke
from tests.helpers.ours import NAMES, our_config, our_xlora
from tests.helpers.reference import Expert, peft_xlora, prompt, relative_error
from xlora_jax import Rows, TrainConfig, train
from xlora_jax.training.evaluation import evaluate
from xlora_jax.training.step import make_eval_step, split_params

TOLERANCE = 1e-5
SETTINGS = {
    "layerwise": {"layerwise_scalings": True, "xlora_depth": 2, "softmax_temperature": 0.5},
    "shared": {"layerwise_scalings": False},
    "top-k": {"layerwise_scalings": True, "top_k_lora": 2, "enable_softmax": False, "enable_softmax_topk": True},
    "raw": {"enable_softmax": False, "xlora_depth": 3},
}
# It adapts layers that the experts of the set "unequal" don't: k_proj has experts in all blocks, up_proj in two.
NEW = Expert(4, 8, ("k_proj", "up_proj"))


@pytest.fixture(scope="module")
def files(base, experts):
    base_dir = base("llama")
    return base_dir, experts(base_dir, "unequal"), experts(base_dir, (NEW,), 7)[0]


def trained(files, **settings):
    base_dir, adapters, _ = files
    return our_xlora(base_dir, adapters, peft_xlora(base_dir, adapters, **settings), **settings)


@pytest.mark.parametrize("name", SETTINGS)
def test_added_and_removed_again(name, files):
    """Outputs stay within the prior; the gate of the new expert has the given size; removing it restores the model."""
    before = trained(files, **SETTINGS[name])
    inputs = prompt(2, 9)
    wanted = before(**inputs)
    after = add_expert(before, "new", files[2])
    assert after.expert_names == (*before.expert_names, "new")
    assert len(after.layers) == len(before.layers) + 1  # up_proj of the block in the middle
    out = after(**inputs)
    assert relative_error(out.logits, wanted.logits) <= TOLERANCE
    kept = [after.layer_names.index(layer) for layer in before.layer_names]
    assert relative_error(np.asarray(out.scalings)[:, :, kept, :3], wanted.scalings) <= TOLERANCE
    back = remove_expert(after, "new")
    assert back.layer_names == before.layer_names
    assert relative_error(back(**inputs).logits, wanted.logits) <= TOLERANCE
    assert back.config == before.config


@pytest.mark.parametrize("name", ["layerwise", "shared", "raw"])
def test_a_prior_is_the_size_of_the_new_gate(name, files):
    before = trained(files, **SETTINGS[name])
    inputs = prompt(2, 9)
    after = add_expert(before, "new", files[2], prior=0.3)
    gate = np.asarray(after(**inputs).scalings)[..., 3]
    if name == "raw":
        np.testing.assert_allclose(gate, 0.3, rtol=1e-5)
    else:
        assert gate.max() <= 0.3 + 1e-6
        assert gate.max() > 0.2
    assert relative_error(after(**inputs).logits, before(**inputs).logits) > 1e-2


def test_where_all_gates_are_equal_the_prior_is_met(files):
    before = trained(files, layerwise_scalings=True, softmax_temperature=2.0)
    zeros = {"dense_0": {part: 0 * array for part, array in before.params["classifier"]["dense_0"].items()}}
    after = add_expert(before.replace(params={**before.params, "classifier": zeros}), "new", files[2], prior=0.4)
    scalings = np.asarray(after(**prompt(1, 3)).scalings)
    np.testing.assert_allclose(scalings[..., 3], 0.4, rtol=1e-5)
    np.testing.assert_allclose(scalings[..., :3], 0.2, rtol=1e-5)


@pytest.mark.parametrize("number", [0, 1])
def test_removing_renormalizes(number, files):
    """The softmax over the logits that are left; layers that only the removed expert adapted are gone."""
    before = trained(files, **SETTINGS["layerwise"])
    inputs = prompt(2, 9)
    old = np.asarray(before(**inputs).scalings, np.float64)
    after = remove_expert(before, NAMES[number])
    kept = [before.layer_names.index(layer) for layer in after.layer_names]
    others = [i for i in range(3) if i != number]
    assert after.expert_names == tuple(NAMES[i] for i in others)
    assert len(kept) < len(before.layers)
    wanted = old[:, :, kept][..., others]
    wanted /= wanted.sum(axis=-1, keepdims=True)
    assert relative_error(after(**inputs).scalings, wanted) <= TOLERANCE
    # The logits are those of all experts with these gates.
    full = np.zeros_like(old)
    full[:, :, kept] = np.insert(wanted, number, 0, axis=-1)
    assert relative_error(after(**inputs).logits, before(**inputs, scalings=full).logits) <= TOLERANCE


def test_only_the_new_expert_learns(files, tmp_path):
    """Its column of the classifier changes, and nothing else; the loss on other texts stays."""
    before = trained(files, **SETTINGS["layerwise"])
    after = add_expert(before, "new", files[2], prior=0.05)
    ids = prompt(6, 9)["input_ids"]
    settings = TrainConfig(
        steps=3, batch_size=2, learning_rate=0.05, weight_decay=0.1, only_expert="new", tensorboard=False
    )
    result = train(after, Rows.from_tokens(ids), settings).model
    for (name, old), (_, new) in zip(
        sorted(after.params["classifier"].items()), sorted(result.params["classifier"].items()), strict=True
    ):
        for part in old:
            changed = np.asarray(old[part] != new[part]).reshape(*old[part].shape[:-1], -1, 4)
            assert not changed[..., :3].any()
            assert changed[..., 3].any() == (name == "dense_1")
    with pytest.raises(ValueError, match="no expert 'newer'"):
        train(after, Rows.from_tokens(ids), dataclasses.replace(settings, only_expert="newer"))


def loss(model, rows):
    return evaluate(make_eval_step(model.xlora), *split_params(model.params, model.config), rows, len(rows))[0]


@pytest.mark.filterwarnings("ignore:.*take.? part in it:UserWarning")
def test_warnings_and_refusals(files):
    base_dir, adapters, new = files
    before = trained(files)
    with pytest.raises(ValueError, match="has an expert 'prose' already"):
        add_expert(before, "prose", new)
    with pytest.raises(ValueError, match="prior: expected a number above 0 and below 1, got 1"):
        add_expert(before, "new", new, prior=1)
    with pytest.raises(ValueError, match="no expert 'new'; the experts are arithmetic, prose, code"):
        remove_expert(before, "new")
    alone = load_xlora(base_dir, adapters={"a": adapters[0]}, config=our_config(base_dir, {"a": adapters[0]}))
    with pytest.raises(ValueError, match="the only expert"):
        remove_expert(alone, "a")
    constant = before.replace(config=dataclasses.replace(before.config, scaling_pass_value=0.7))
    with pytest.warns(UserWarning, match=r"experts at a gate of 0\.7"):
        add_expert(constant, "new", new)
    narrow = before.replace(config=dataclasses.replace(before.config, top_k_lora=3))
    with pytest.warns(UserWarning, match="top_k_lora is 2 now"):
        assert remove_expert(narrow, "prose").config.top_k_lora == 2


def test_commands(files, tmp_path):
    base_dir, _, new = files
    before = trained(files, **SETTINGS["layerwise"])
    inputs = prompt(2, 9)
    save_xlora(before, tmp_path / "before")
    given = ["--base", base_dir, "--checkpoint", tmp_path / "before", "--output", tmp_path / "after"]
    done = invoke(["experts", "add", *given, "--new", f"new={new}", "--prior", 0.2])
    assert done.exit_code == 0, done.output
    assert "4 experts, arithmetic, prose, code, new" in done.output
    ours = load_xlora(base_dir, checkpoint=tmp_path / "after")
    wanted = add_expert(before, "new", new, prior=0.2)(**inputs).logits
    assert relative_error(ours(**inputs).logits, wanted) <= TOLERANCE
    given[3:] = [tmp_path / "after", "--output", tmp_path / "removed"]
    done = invoke(["experts", "remove", *given, "--name", "prose", "--layout", "xlora"])
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "removed" / "xlora_config.json").read_text())["adapters"] == [
        *("arithmetic", "code", "new")
    ]
    refused = invoke(["experts", "remove", *given, "--name", "prose2"])
    assert refused.exit_code == 1
    assert "xlora-jax experts remove: error: name: no expert 'prose2'" in refused.output
