"""Output heads as files have them: beside a tied table, in place of it, and heads that no one uses."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, BertForPreTraining

from interop import load_base, save_base
from interop.inspection import inspect_path
from tests.helpers.encoders import encoder_inputs, make_encoder, run_encoder
from tests.helpers.families import make_model
from tests.helpers.reference import base_run, prompt, relative_error


def change_tensors(directory: Path, change) -> None:
    path = directory / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})


@pytest.mark.parametrize(("family", "table"), [("qwen2", "model.embed_tokens"), ("gpt2", "transformer.wte")])
def test_a_head_that_differs_from_the_tied_table_is_used(family: str, table: str, tmp_path: Path) -> None:
    directory = make_model(tmp_path / "base", family, tie_word_embeddings=True)
    inputs = prompt(2, 11)
    tied = load_base(directory, dtype=jnp.float32)(**inputs).logits
    change_tensors(directory, lambda stored: stored | {"lm_head.weight": stored[f"{table}.weight"].flip(0).clone()})
    with pytest.warns(UserWarning, match="differs from"):
        ours = load_base(directory, dtype=jnp.float32)
    theirs = base_run(directory, **inputs)
    assert relative_error(ours(**inputs).logits, theirs, inputs["attention_mask"]) <= 1e-5
    assert relative_error(tied, theirs, inputs["attention_mask"]) > 0.1
    save_base(ours, tmp_path / "again")
    assert relative_error(base_run(tmp_path / "again", **inputs), theirs, inputs["attention_mask"]) <= 1e-6


def test_an_equal_head_beside_the_tied_table_is_not_worth_a_word(tmp_path: Path) -> None:
    directory = make_model(tmp_path, "llama", tie_word_embeddings=True)
    change_tensors(directory, lambda stored: stored | {"lm_head.weight": stored["model.embed_tokens.weight"].clone()})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_base(directory).module.config.tie_word_embeddings


def test_a_tied_table_stored_as_the_head_only(tmp_path: Path) -> None:
    directory = make_model(tmp_path, "llama", tie_word_embeddings=True)
    inputs = prompt(2, 11)
    wanted = load_base(directory, dtype=jnp.float32)(**inputs).logits
    change_tensors(directory, lambda stored: stored | {"lm_head.weight": stored.pop("model.embed_tokens.weight")})
    theirs = base_run(directory, **inputs)
    ours = load_base(directory, dtype=jnp.float32)(**inputs).logits
    assert relative_error(ours, theirs, inputs["attention_mask"]) <= 1e-5
    np.testing.assert_array_equal(ours, wanted)


@pytest.mark.parametrize(
    ("case", "unused"),
    [
        ("roberta sequence", ("roberta.pooler.dense",)),
        ("vit", ("vit.pooler.dense",)),
        ("bert token", ("bert.pooler.dense", "cls.seq_relationship")),
    ],
)
def test_heads_that_no_one_uses_are_named_in_a_warning(case: str, unused: tuple[str, ...], tmp_path: Path) -> None:
    model, inputs = make_encoder(case, tmp_path), encoder_inputs(case)
    width = model.config.hidden_size
    more = {
        f"{name}.{part}": torch.ones((width, width) if part == "weight" else width)
        for name in unused
        for part in ("weight", "bias")
    }
    change_tensors(tmp_path, lambda stored: stored | more)
    with pytest.warns(UserWarning, match="are not used, as in transformers") as caught:
        ours = load_base(tmp_path, dtype=jnp.float32)
    assert all(name in str(caught[0].message) for name in unused)
    assert relative_error(ours(**inputs).logits, run_encoder(model, inputs).logits.numpy()) <= 1e-5


def test_a_value_head_beside_a_language_model(tmp_path: Path) -> None:
    directory = make_model(tmp_path, "llama")
    change_tensors(directory, lambda stored: stored | {"v_head.summary.weight": torch.ones(1, 48)})
    with pytest.warns(UserWarning, match=r"v_head\.summary\.weight"):
        load_base(directory)
    # A tensor of the body is another matter: a block's norm that the config does not have changes the numbers.
    change_tensors(directory, lambda stored: stored | {"model.layers.0.self_attn.q_norm.weight": torch.ones(12)})
    with pytest.raises(ValueError, match=r"Unexpected: model\.layers\.0\.self_attn\.q_norm\.weight"), pytest.warns():
        load_base(directory)


@pytest.mark.parametrize("model_class", [BertForMaskedLM, BertForPreTraining])
def test_inspect_says_that_a_base_without_a_classifier_takes_an_adapters_head(model_class, tmp_path: Path) -> None:
    config = BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    model_class(config).save_pretrained(tmp_path)
    found = inspect_path(str(tmp_path))
    assert not found.refused
    assert found.kind == "base model"
    assert "adapter" in found.facts["head"]
    assert "query" in found.facts["can be adapted"]
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [model_class.__name__]


def test_transformers_does_the_same(tmp_path: Path) -> None:
    """The rule of the first test, in the reference itself: it may change between versions."""
    directory = make_model(tmp_path, "llama", tie_word_embeddings=True)
    change_tensors(directory, lambda stored: stored | {"lm_head.weight": stored["model.embed_tokens.weight"] + 1})
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
