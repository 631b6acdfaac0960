"""Greedy generation equals PEFT's token for token; PEFT recomputes everything for every token, we keep two caches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.helpers.ours import our_xlora
from tests.helpers.reference import FAMILIES, peft_generate, peft_xlora, prompt, tensors, torch_base

NEW = 48
CONFIGS = {
    "plain": {},
    "all on": {
        "xlora_depth": 2,
        "layerwise_scalings": True,
        "top_k_lora": 2,
        "scaling_pass_value": 0.7,
        "softmax_temperature": 0.5,
    },
}


def base_generate(base_dir, inputs):
    with torch.no_grad():
        out = torch_base(base_dir).generate(
            **tensors(inputs), max_new_tokens=NEW, do_sample=False, use_cache=False, pad_token_id=0
        )
    return out.numpy()


def models(base_dir, experts, recipes, config):
    adapters = experts(base_dir, recipes)
    theirs = peft_xlora(base_dir, adapters, **config)
    return our_xlora(base_dir, adapters, theirs, **config), theirs


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_single_prompts(family, name, base, experts):
    base_dir = base(family)
    ours, theirs = models(base_dir, experts, "unequal", CONFIGS[name])
    for seed in (1, 2):
        inputs = prompt(1, 7, seed=seed)
        wanted = peft_generate(theirs, NEW, **inputs)
        got = np.asarray(ours.generate(inputs["input_ids"], max_new_tokens=NEW))
        assert got.dtype == np.int32
        np.testing.assert_array_equal(got, wanted)
        assert not np.array_equal(base_generate(base_dir, inputs), wanted)


@pytest.mark.parametrize(("recipes", "name"), [("unequal", "plain"), ("embedding", "all on")])
@pytest.mark.parametrize("family", FAMILIES)
def test_left_padded_batch(family, recipes, name, base, experts):
    """Rows of 9, 7 and 5 tokens."""
    base_dir = base(family)
    ours, theirs = models(base_dir, experts, recipes, CONFIGS[name])
    inputs = prompt(3, 9, "left", seed=4)
    wanted = peft_generate(theirs, NEW, **inputs)
    got = np.asarray(ours.generate(**inputs, max_new_tokens=NEW))
    np.testing.assert_array_equal(got, wanted)
    assert not np.array_equal(base_generate(base_dir, inputs), wanted)


def test_end_of_sequence(base, experts):
    """A token that one row comes to and others don't yet: that row ends there, padding follows, the others go on."""
    base_dir = base("llama")
    ours, theirs = models(base_dir, experts, "unequal", CONFIGS["plain"])
    inputs = prompt(3, 9, "left", seed=4)
    free = peft_generate(theirs, NEW, **inputs)[:, 9:]
    # The token that ends some rows before the others do.
    firsts = {t: [list(row).index(t) if t in row else NEW for row in free.tolist()] for t in np.unique(free).tolist()}
    end = max(firsts, key=lambda t: np.std(firsts[t]))
    assert len(set(firsts[end])) > 1
    with torch.no_grad():
        wanted = theirs.generate(
            **tensors(inputs), max_new_tokens=NEW, do_sample=False, eos_token_id=end, pad_token_id=0
        ).numpy()
    got = np.asarray(ours.generate(**inputs, max_new_tokens=NEW, eos_token_id=end, pad_token_id=0))
    assert got.shape == (3, 9 + NEW)
    np.testing.assert_array_equal(got[:, : wanted.shape[1]], wanted)
    assert (got[:, wanted.shape[1] :] == 0).all()
    assert not np.array_equal(got[:, 9:], free)


def test_across_the_original_length_of_longrope(base, experts):
    """The rotary frequencies of all positions change there; PEFT, which recomputes everything, follows by itself."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 300.0,
        "original_max_position_embeddings": 20,
        "factor": 8.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
        "long_factor": [1.2, 2.0, 3.0, 4.0, 5.0, 6.0],
    }
    base_dir = base("llama", rope_parameters=rope)
    ours, theirs = models(base_dir, experts, "unequal", CONFIGS["plain"])
    ids = prompt(1, 9, seed=4)["input_ids"]
    np.testing.assert_array_equal(ours.generate(ids, max_new_tokens=NEW), peft_generate(theirs, NEW, input_ids=ids))


def test_experts_switched_off_give_the_base_models_text(base, experts):
    base_dir = base("mistral")
    ours, _ = models(base_dir, experts, "unequal", CONFIGS["plain"])
    inputs = prompt(2, 7, "left")
    plain = base_generate(base_dir, inputs)
    assert not np.array_equal(ours.generate(**inputs, max_new_tokens=NEW), plain)
    with ours.disable_adapter():
        np.testing.assert_array_equal(ours.generate(**inputs, max_new_tokens=NEW), plain)
