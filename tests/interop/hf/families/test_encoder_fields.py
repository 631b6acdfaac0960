"""Each config field of each encoder, turned away from its value: our output follows that of transformers, or
the field is refused by name. A field that transformers reads and that we drop would show as a difference."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import pytest
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from interop import load_base
from interop.hf.families.fields import declared_fields
from interop.storage.errors import FormatError
from tests.helpers.encoders import CASES, case_of, encoder_inputs, make_encoder, run_encoder
from tests.helpers.reference import relative_error

TOLERANCE = 1e-5
TURNED = {
    "vocab_size": 53,
    "hidden_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "intermediate_size": 28,
    "hidden_act": "relu",
    "dim": 20,
    "n_layers": 1,
    "n_heads": 3,
    "hidden_dim": 28,
    "activation": "relu",
    "max_position_embeddings": 24,
    "hidden_activation": "relu",
    "norm_eps": 0.3,
    "norm_bias": False,
    "attention_bias": False,
    "mlp_bias": False,
    "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    "local_attention": 2,
    "classifier_pooling": "cls",
    "classifier_bias": False,
    "classifier_activation": "gelu",
    "rope_parameters": {
        "sliding_attention": {"rope_type": "linear", "rope_theta": 9.0, "factor": 2.0},
        "full_attention": {"rope_type": "default", "rope_theta": 7.0},
    },
    "type_vocab_size": 5,
    "layer_norm_eps": 0.3,
    "pad_token_id": 4,
    "num_labels": 3,
    "image_size": (12, 8),
    "patch_size": (2, 6),
    "num_channels": 3,
    "qkv_bias": True,
}
# Of training, of other heads, or of what is returned besides logits.
WITHOUT_EFFECT = {
    "initializer_cutoff_factor": 1.0,
    "embedding_dropout": 0.4,
    "mlp_dropout": 0.4,
    "decoder_bias": False,
    "deterministic_flash_attn": True,
    "sparse_prediction": True,
    "sparse_pred_ignore_index": -1,
    "cls_token_id": 7,
    "sep_token_id": 8,
    "sinusoidal_pos_embds": False,
    "dropout": 0.4,
    "attention_dropout": 0.4,
    "qa_dropout": 0.4,
    "seq_classif_dropout": 0.4,
    "hidden_dropout_prob": 0.4,
    "attention_probs_dropout_prob": 0.4,
    "classifier_dropout": 0.4,
    "initializer_range": 0.5,
    "tie_word_embeddings": False,
    "encoder_stride": 8,
    "pooler_output_size": 12,
    "pooler_act": "relu",
    "bos_token_id": 7,
    "eos_token_id": 8,
    "problem_type": "regression",
    "output_hidden_states": True,
}
# What transformers would not build an encoder with, or what changes more than its output.
REFUSED = {
    "is_decoder": True,
    "add_cross_attention": True,
    "is_encoder_decoder": True,
    "chunk_size_feed_forward": 3,
    "position_embedding_type": "relative_key",
    "hidden_act": "mish",
    "activation": "mish",
    "architectures": ["BertForQuestionAnswering"],
}
FAMILIES = {family: case_of(family) for family in ("bert", "roberta", "xlm-roberta", "distilbert", "modernbert", "vit")}
OF_EVERY_CONFIG = frozenset(PreTrainedConfig().to_dict()) | {"use_cache"}


def fields(family):
    own = CONFIG_MAPPING[family]().to_dict().keys() - OF_EVERY_CONFIG
    return sorted(own | {"num_labels", "problem_type", "output_hidden_states"})


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_has_a_second_value(family):
    own = CONFIG_MAPPING[family](**CASES[FAMILIES[family]][1])
    for field in fields(family):
        assert field in REFUSED or {**TURNED, **WITHOUT_EFFECT}[field] != getattr(own, field)


def compared(family, directory, **turned):
    """Logits of transformers, and how far ours are from them."""
    case = FAMILIES[family]
    if family == "modernbert":
        if turned.get("hidden_size"):
            turned["num_attention_heads"] = 5
        if turned.get("num_hidden_layers"):
            turned["layer_types"] = ["sliding_attention"]
    model, inputs = make_encoder(case, directory, **turned), encoder_inputs(case, **turned)
    theirs = run_encoder(model, inputs).logits.numpy()
    with jax.disable_jit():  # operation by operation: nothing to compile anew for each setting
        ours = load_base(directory, dtype=jnp.float32, scan_layers=False)(**inputs).logits
    return theirs, relative_error(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_fields_act_as_in_transformers(family, tmp_path):
    plain, _ = compared(family, tmp_path / "plain")
    wrong = {}
    for field in set(fields(family)) & TURNED.keys():
        try:
            theirs, error = compared(family, tmp_path / field, **{field: TURNED[field]})
            # It does change the output, so that being equal is worth something.
            changed = theirs.shape != plain.shape or relative_error(theirs, plain) > 1e-3
            # ModernBERT has no table of positions.
            acts = (family, field) != ("modernbert", "max_position_embeddings")
            if not (error <= TOLERANCE and changed == acts):
                wrong[field] = (error, changed)
        except Exception as error:
            wrong[field] = f"{type(error).__name__}: {error}".split("\n")[0][:300]
    assert not wrong


@pytest.mark.parametrize("family", FAMILIES)
def test_fields_without_effect_have_none(family, tmp_path):
    turned = {field: WITHOUT_EFFECT[field] for field in set(fields(family)) & WITHOUT_EFFECT.keys()}
    theirs, error = compared(family, tmp_path / "turned", **turned)
    assert error <= TOLERANCE
    assert relative_error(theirs, compared(family, tmp_path / "plain")[0]) <= TOLERANCE


@pytest.mark.parametrize(
    ("family", "field"),
    # Others are no settings, which transformers ignores.
    [(family, field) for family in FAMILIES for field in REFUSED if field in declared_fields(family)],
)
def test_what_is_not_implemented_is_refused_by_name(family, field, tmp_path):
    make_encoder(FAMILIES[family], tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, field: REFUSED[field]}))
    with pytest.raises(FormatError, match=field):
        load_base(tmp_path)
