"""Scalings and logits against real PEFT: within 1e-5, and different from the base model's in each case."""

from __future__ import annotations

import contextlib
import json

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from interop import classifier_from_torch, classifier_to_torch
from tests.helpers.ours import our_xlora
from tests.helpers.reference import (
    FAMILIES,
    HIDDEN,
    Expert,
    base_run,
    classifier_of,
    hooked_xlora_logits,
    make_experts,
    pairwise,
    peft_run,
    peft_xlora,
    prompt,
    relative_error,
    torch_base,
)

TOLERANCE = 1e-5

# PEFT says so whenever the softmax over the selected is on and top-k is not, or the other softmax is on too; so do we.
# These settings are in the grid because they are allowed.
pytestmark = pytest.mark.filterwarnings("ignore:.*enable_softmax_topk.*")

GATES = {
    "softmax": {},
    "softmax over top-k": {"enable_softmax": False, "enable_softmax_topk": True},
    "neither": {"enable_softmax": False},
}
AXES = {
    "family": list(FAMILIES),
    "xlora_depth": [1, 2, 4],
    "layerwise_scalings": [False, True],
    "top_k_lora": [None, 1, 2],
    "gates": list(GATES),
    "softmax_temperature": [0.5, 1.0, 2.0],
    "scaling_pass_value": [0.0, None, 0.7],  # None means 1/n
    "global_scaling_weight": [0.5, 1.0],
    "padding": [None, "left", "right"],
    "experts": ["alike", "unequal", "embedding"],
}
GATES["both"] = {"enable_softmax": True, "enable_softmax_topk": True}


def cases():
    """Every pair of settings, so every setting in each family; the plainest of all, and the last of all, in each."""
    yield from pairwise(AXES)
    for family in FAMILIES:
        yield {**{name: values[0] for name, values in AXES.items()}, "family": family}
        yield {**{name: values[-1] for name, values in AXES.items()}, "family": family, "gates": "both"}


def name_of(case):
    return "-".join(str(value).replace(" ", "_") for value in case.values())


@pytest.mark.parametrize("case", list(cases()), ids=name_of)
def test_scalings_and_logits(case, base, experts):
    case = dict(case)
    base_dir = base(case.pop("family"))
    padding, recipes = case.pop("padding"), case.pop("experts")
    config = {**GATES[case.pop("gates")], **case}
    adapters = experts(base_dir, recipes)
    theirs = peft_xlora(base_dir, adapters, **config)
    ours = our_xlora(base_dir, adapters, theirs, **config)
    inputs = prompt(3, 12, padding)
    mask = inputs["attention_mask"]

    out = ours(**inputs)
    logits, scalings = peft_run(theirs, **inputs)
    assert relative_error(out.scalings, scalings, mask) <= TOLERANCE
    assert relative_error(out.logits, logits, mask) <= TOLERANCE
    assert relative_error(base_run(base_dir, **inputs), logits, mask) > 1e-2


@pytest.mark.parametrize("recipes", ["unequal", "embedding"])
@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_embeds(family, recipes, base, experts):
    """With embeddings given, experts on the embedding layer have nothing to act on: in PEFT as here."""
    base_dir = base(family)
    adapters = experts(base_dir, recipes)
    config = {"layerwise_scalings": True, "scaling_pass_value": 0.7}
    theirs = peft_xlora(base_dir, adapters, **config)
    ours = our_xlora(base_dir, adapters, theirs, **config)
    embeds = np.random.default_rng(3).normal(size=(2, 9, HIDDEN)).astype(np.float32)
    inputs = {"inputs_embeds": embeds, "attention_mask": prompt(2, 9, "right")["attention_mask"]}

    out = ours(**inputs)
    logits, scalings = peft_run(theirs, **inputs)
    assert relative_error(out.scalings, scalings, inputs["attention_mask"]) <= TOLERANCE
    assert relative_error(out.logits, logits, inputs["attention_mask"]) <= TOLERANCE
    assert relative_error(base_run(base_dir, **inputs), logits, inputs["attention_mask"]) > 1e-2


def test_one_and_five_experts(base, experts):
    """Neither one expert nor more than three is special, as long as no gates tie."""
    base_dir = base("llama")
    inputs = prompt(2, 9)
    five = [Expert(rank, 2 * rank, ("v_proj", "down_proj")) for rank in (1, 2, 3, 4, 7)]
    for recipes, config in ((five[:1], {}), (five, {"top_k_lora": 3, "xlora_depth": 2})):
        adapters = experts(base_dir, recipes)
        theirs = peft_xlora(base_dir, adapters, **config)
        out = our_xlora(base_dir, adapters, theirs, **config)(**inputs)
        logits, scalings = peft_run(theirs, **inputs)
        assert relative_error(out.scalings, scalings) <= TOLERANCE
        assert relative_error(out.logits, logits) <= TOLERANCE
        assert relative_error(base_run(base_dir, **inputs), logits) > 1e-2


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_on_lm_head(family, tied, base, experts):
    """PEFT's X-LoRA can't load these, so the reference is the formula: torch's classifier, and hooks that mix."""
    base_dir = base(family, tie_word_embeddings=tied)
    recipes = (Expert(2, 4, ("q_proj", "lm_head")), Expert(3, 3, ("lm_head",)), Expert(4, 8, ("down_proj",), (1,)))
    with pytest.warns() if tied else contextlib.nullcontext():  # PEFT's, on adapters of tied weights
        adapters = experts(base_dir, recipes)
    config = {"layerwise_scalings": True, "top_k_lora": 2, "softmax_temperature": 0.5}
    ours = our_xlora(base_dir, adapters, **config)
    layers = [
        n for n, _ in torch_base(base_dir).named_modules() if n.endswith(("q_proj", "lm_head", "1.mlp.down_proj"))
    ]
    assert list(ours.layer_names) == layers
    assert layers[-1] == "lm_head"

    torch.manual_seed(5)
    linear = torch.nn.Linear(HIDDEN, len(layers) * 3)
    state = {f"layers.0.{name}": value for name, value in linear.state_dict().items()}
    ours = ours.replace(params={**ours.params, "classifier": classifier_from_torch(state)})
    inputs = prompt(2, 9)
    with torch.no_grad():
        ids = torch.as_tensor(inputs["input_ids"]).long()
        hidden = torch_base(base_dir)(ids, output_hidden_states=True).hidden_states[-1]
        scalings = torch.softmax(linear(hidden).reshape(2, 9, len(layers), 3) / 0.5, dim=-1)
        kept = scalings * (scalings > scalings.min(dim=-1, keepdim=True).values)
    logits = hooked_xlora_logits(base_dir, adapters, lambda name, e: kept[:, :, layers.index(name), e], **inputs)

    out = ours(**inputs)
    assert relative_error(out.scalings, scalings) <= TOLERANCE
    assert relative_error(out.logits, logits) <= TOLERANCE
    plain = hooked_xlora_logits(base_dir, adapters, lambda name, e: kept[:, :, 0, e] * (name != "lm_head"), **inputs)
    assert relative_error(plain, logits) > 1e-2


def test_settings_changed_on_a_living_model(base, experts):
    """Each setter of PEFT's model, on both models in turn; then experts off and on again."""
    base_dir = base("llama")
    adapters = experts(base_dir, "unequal")
    theirs = peft_xlora(base_dir, adapters, layerwise_scalings=True)
    ours = our_xlora(base_dir, adapters, theirs, layerwise_scalings=True)
    inputs = prompt(2, 9)
    previous = base_run(base_dir, **inputs)
    for setter, value in [
        ("set_topk_lora", 1),
        ("set_global_scaling_weight", 0.4),
        ("set_scaling_pass_value", 0.7),
        ("set_scaling_pass_value", None),
        ("set_topk_lora", None),
        ("set_scaling_pass_value", 0.0),
        ("set_global_scaling_weight", 1.0),
    ]:
        getattr(theirs.base_model, setter)(value)
        getattr(ours, setter)(value)
        logits, scalings = peft_run(theirs, **inputs)
        assert relative_error(previous, logits) > 1e-3, f"{setter}({value}) changes nothing"
        out = ours(**inputs)
        assert relative_error(out.logits, logits) <= TOLERANCE, f"{setter}({value})"
        assert relative_error(out.scalings, scalings) <= TOLERANCE, f"{setter}({value})"
        assert relative_error(ours.get_latest_scalings(), scalings) <= TOLERANCE, f"{setter}({value})"
        assert ours.get_global_scaling_weight() == theirs.base_model.get_global_scaling_weight()
        previous = logits

    plain = base_run(base_dir, **inputs)
    with ours.disable_adapter():
        assert relative_error(ours(**inputs).logits, plain) <= TOLERANCE
    ours.disable_adapter_layers()
    assert relative_error(ours(**inputs).logits, plain) <= TOLERANCE
    ours.enable_adapter_layers()
    assert relative_error(ours(**inputs).logits, previous) <= TOLERANCE


def test_scalings_log_and_buckets(base, experts):
    base_dir = base("qwen2")
    adapters = experts(base_dir, "alike")
    theirs = peft_xlora(base_dir, adapters)
    ours = our_xlora(base_dir, adapters, theirs)
    theirs.base_model.enable_scalings_logging()
    ours.enable_scalings_logging()
    for batch, tokens in ((2, 6), (1, 8), (1, 6)):
        inputs = prompt(batch, tokens, seed=tokens + batch)
        peft_run(theirs, **inputs)
        ours(**inputs)
    log, wanted = ours.get_scalings_log(), theirs.base_model.get_scalings_log()
    assert len(log) == len(wanted) == 3
    for mine, other in zip(log, wanted, strict=True):
        assert relative_error(mine, other) <= TOLERANCE
    buckets, wanted = ours.get_bucketed_scalings_log(), theirs.base_model.get_bucketed_scalings_log()
    assert {length: list(places) for length, (places, _) in buckets.items()} == {6: [0, 2], 8: [1]}
    for length, (_, scalings) in buckets.items():
        for mine, other in zip(scalings, wanted[length][1], strict=True):
            assert relative_error(mine, other) <= TOLERANCE
    ours.disable_scalings_logging()
    ours(**prompt(1, 6))
    assert len(ours.get_scalings_log()) == 3
    ours.clear_scalings_log()
    assert len(ours.get_scalings_log()) == 0


def test_adapter_stored_in_half_precision_and_with_lora_bias(tmp_path, base):
    """PEFT computes such adapters in float32; `lora_B.bias` is added without a gate."""
    base_dir = base("llama")
    recipes = (Expert(3, 6, ("q_proj", "up_proj")), Expert(2, 4, ("o_proj",)), Expert(4, 4, ("v_proj", "gate_proj")))
    adapters = make_experts(base_dir, tmp_path, recipes)
    weights = load_file(adapters[0] / "adapter_model.safetensors")
    save_file({k: v.to(torch.bfloat16) for k, v in weights.items()}, adapters[0] / "adapter_model.safetensors")
    config = json.loads((adapters[1] / "adapter_config.json").read_text())
    (adapters[1] / "adapter_config.json").write_text(json.dumps({**config, "lora_bias": True}))
    weights = load_file(adapters[1] / "adapter_model.safetensors")
    for key in [key for key in weights if "lora_B" in key]:
        weights[key.replace("lora_B.weight", "lora_B.bias")] = torch.randn(weights[key].shape[0])
    save_file(weights, adapters[1] / "adapter_model.safetensors")

    theirs = peft_xlora(base_dir, adapters, scaling_pass_value=0.7)
    ours = our_xlora(base_dir, adapters, theirs, scaling_pass_value=0.7)
    inputs = prompt(2, 9)
    logits, scalings = peft_run(theirs, **inputs)
    out = ours(**inputs)
    assert relative_error(out.scalings, scalings) <= TOLERANCE
    assert relative_error(out.logits, logits) <= TOLERANCE
    assert relative_error(base_run(base_dir, **inputs), logits) > 1e-2


def test_classifier_goes_back_to_torch_unchanged(base, experts):
    """`classifier_to_torch` is the exact inverse of `classifier_from_torch`, in PEFT's names."""
    base_dir = base("llama")
    adapters = experts(base_dir, "alike")
    for config in ({"xlora_depth": 1}, {"xlora_depth": 4}, {"xlora_depth": 4, "xlora_dropout_p": 0.3}):
        theirs = peft_xlora(base_dir, adapters, layerwise_scalings=True, **config)
        ours = our_xlora(base_dir, adapters, theirs, layerwise_scalings=True, **config)
        wanted = classifier_of(theirs).state_dict()
        back = classifier_to_torch(ours.params["classifier"], ours.config)
        assert list(back) == list(wanted)
        for name, tensor in back.items():
            assert torch.equal(torch.as_tensor(np.asarray(tensor)), wanted[name]), name
    assert jax.tree.all(jax.tree.map(lambda x: x.dtype == np.float32, ours.params["classifier"]))
