"""The numbers of the adapted layers: a layerwise classifier trained in PEFT means nothing here if they differ."""

from __future__ import annotations

import pytest

from tests.helpers.ours import our_xlora
from tests.helpers.reference import ATTENTION, FAMILIES, MLP, Expert, peft_layer_names, peft_xlora, torch_base

# Targets in another order than the model's, experts that share no layer, layers out of order, an embedding late.
RECIPES = {
    "all": (Expert(2, 4, (*reversed(MLP), *reversed(ATTENTION))),),
    "apart": (
        Expert(2, 4, ("down_proj",), layers=(2, 0)),
        Expert(3, 4, ("v_proj", "k_proj"), layers=(1,)),
        Expert(1, 4, ("q_proj",)),
    ),
    "embedding": (Expert(2, 4, ("up_proj", "o_proj")), Expert(2, 4, ("gate_proj", "embed_tokens"), layers=None)),
    "regex": (Expert(2, 4, r".*layers\.[12]\.(self_attn\.(v|q)_proj|mlp\.up_proj)"),),
    "all-linear": (Expert(2, 4, "all-linear"), Expert(2, 4, ("embed_tokens",))),
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_layer_names_are_in_pefts_order(family, recipe, base, experts):
    base_dir = base(family)
    adapters = experts(base_dir, RECIPES[recipe])
    wanted = peft_layer_names(peft_xlora(base_dir, adapters, layerwise_scalings=True))
    assert list(our_xlora(base_dir, adapters, layerwise_scalings=True).layer_names) == wanted
    assert len(set(wanted)) == len(wanted) > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_lm_head_comes_last(family, base, experts):
    """In torch's `modules()`, on which PEFT's order rests; PEFT itself can't load experts there."""
    base_dir = base(family)
    targets = (*MLP, *ATTENTION, "lm_head", "embed_tokens")
    wanted = [name for name, _ in torch_base(base_dir).named_modules() if name.endswith(targets)]
    ours = our_xlora(base_dir, experts(base_dir, (Expert(2, 4, targets),)))
    assert list(ours.layer_names) == wanted
    assert wanted[0] == "model.embed_tokens"
    assert wanted[-1] == "lm_head"
