"""Every family against transformers: base logits, X-LoRA's scalings and logits, layer order, greedy tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from interop import load_base
from interop.hf.families.registry import FAMILIES
from tests.helpers.families import MODELS, Formula, make_model
from tests.helpers.ours import our_xlora
from tests.helpers.reference import (
    base_run,
    make_experts,
    peft_layer_names,
    peft_run,
    peft_xlora,
    prompt,
    relative_error,
    torch_base,
)
from xlora_jax.models import Decoder

TOLERANCE = 1e-5
# Of multimodal models the text side alone is built.
pytestmark = pytest.mark.filterwarnings("ignore:.*tensors of the vision side")
CONFIG = {"layerwise_scalings": True, "top_k_lora": 2, "softmax_temperature": 0.7, "scaling_pass_value": 0.4}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`made(family)`: the directory of the family's model."""
    done: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in done:
            done[family] = make_model(tmp_path_factory.mktemp(family), family)
        return done[family]

    return get


def test_every_decoder_family_is_here():
    assert MODELS.keys() == {name for name, family in FAMILIES.items() if family.module is Decoder}


@pytest.mark.parametrize("family", MODELS)
def test_base_logits(family, made):
    """With scanned blocks and without, with padding and without, below and above a switch of frequencies."""
    base_dir = made(family)
    for scan_layers, padding, tokens in ((True, "left", 21), (False, None, 12)):
        ours = load_base(base_dir, dtype=jnp.float32, scan_layers=scan_layers)
        inputs = prompt(3, tokens, padding)
        theirs = base_run(base_dir, **inputs)
        assert relative_error(ours(**inputs).logits, theirs, inputs["attention_mask"]) <= TOLERANCE


@pytest.mark.slow
# PEFT's, on adapters of tied weights.
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("family", [name for name, model in MODELS.items() if model.in_peft])
def test_xlora_is_pefts(family, made, tmp_path):
    """Experts on attention, MLP and the embedding, which Gemma scales."""
    base_dir = made(family)
    adapters = make_experts(base_dir, tmp_path, MODELS[family].experts())
    theirs = peft_xlora(base_dir, adapters, **CONFIG)
    ours = our_xlora(base_dir, adapters, theirs, **CONFIG)
    assert list(ours.layer_names) == peft_layer_names(theirs)
    inputs = prompt(3, 12, "left")
    mask = inputs["attention_mask"]
    logits, scalings = peft_run(theirs, **inputs)
    out = ours(**inputs)
    assert relative_error(out.scalings, scalings, mask) <= TOLERANCE
    assert relative_error(out.logits, logits, mask) <= TOLERANCE
    assert relative_error(base_run(base_dir, **inputs), logits, mask) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("family", MODELS)
def test_xlora_is_as_its_formula_and_greedy_tokens_are_equal(family, made, tmp_path):
    """Hooks on the model of transformers mix the experts; no cache there, two caches here."""
    base_dir = made(family)
    recipes = dataclasses.replace(MODELS[family], in_peft=False).experts()
    adapters = make_experts(base_dir, tmp_path, recipes)
    ours = our_xlora(base_dir, adapters, **CONFIG)
    count, width = len(ours.layer_names) * len(adapters), ours.config.hidden_size
    random = np.random.default_rng(7)
    weight, bias = random.normal(size=(count, width)) * width**-0.5, random.normal(size=count)
    classifier = {"kernel": jnp.asarray(weight.T, jnp.float32), "bias": jnp.asarray(bias, jnp.float32)}
    ours = ours.replace(params={**ours.params, "classifier": {"dense_0": classifier}})
    formula = Formula(
        torch_base(base_dir),
        adapters,
        torch.as_tensor(weight).float(),
        torch.as_tensor(bias).float(),
        CONFIG["softmax_temperature"],
        CONFIG["top_k_lora"],
        CONFIG["scaling_pass_value"],
    )
    assert list(ours.layer_names) == formula.layers
    inputs = prompt(2, 13, "left")
    mask = inputs["attention_mask"]
    logits, scalings = formula(**inputs)
    out = ours(**inputs)
    assert relative_error(out.scalings, scalings, mask) <= TOLERANCE
    assert relative_error(out.logits, logits, mask) <= TOLERANCE
    assert relative_error(base_run(base_dir, **inputs), logits, mask) > 1e-2
    tokens = formula.greedy(8, **inputs)
    assert np.array_equal(ours.generate(**inputs, max_new_tokens=8), tokens)
    assert len(np.unique(tokens[:, -8:])) > 2
