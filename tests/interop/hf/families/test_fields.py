"""Each config field of each family, turned away from its value: our output follows that of transformers, or the field
is refused by name. A field that transformers reads and that we drop would show as a difference."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from interop import load_base
from interop.storage.errors import FormatError
from tests.helpers.families import LAYERS, LONGROPE, MODELS, make_model
from tests.helpers.reference import base_run, prompt, relative_error

TOLERANCE = 1e-5
# Of multimodal models the text side alone is built.
pytestmark = pytest.mark.filterwarnings("ignore:.*tensors of the vision side")
FLIPPED = ["full_attention", "sliding_attention", "full_attention"]
# A second value for each field; the first that differs from the model's own is taken.
TURNED: dict[str, tuple[Any, ...]] = {
    "vocab_size": (83,),
    "hidden_size": (36,),
    "n_embd": (36,),
    "intermediate_size": (44,),
    "n_inner": (44,),
    "ffn_dim": (44,),
    "moe_intermediate_size": (20,),
    "word_embed_proj_dim": (32,),
    "num_hidden_layers": (2,),
    "n_layer": (2,),
    "num_attention_heads": (4,),
    "n_head": (4,),
    "num_key_value_heads": (3,),
    "head_dim": (6, None),
    "max_position_embeddings": (64,),
    "original_max_position_embeddings": (8,),
    "n_positions": (64,),
    "hidden_act": ("relu", "quick_gelu"),
    "hidden_activation": ("relu",),
    "activation_function": ("gelu",),
    "rms_norm_eps": (0.3,),
    "layer_norm_eps": (0.3,),
    "layer_norm_epsilon": (0.3,),
    "norm_epsilon": (0.3,),
    "tie_word_embeddings": (True, False),
    "attention_bias": (False, True),
    "mlp_bias": (False, True),
    "use_bias": (False,),
    "enable_bias": (False,),
    "qk_layernorm": (False,),
    "use_qkv_bias": (False,),
    "use_parallel_residual": (False, True),
    "do_layer_norm_before": (False,),
    "layer_norm_elementwise_affine": (False,),
    "_remove_final_layer_norm": (True,),
    "use_sliding_window": (False, True),
    "sliding_window": (3,),
    "max_window_layers": (2,),
    "layer_types": (FLIPPED, [*FLIPPED[1:], "full_attention"]),
    "no_rope_layers": ([0, 1, 1],),
    "no_rope_layer_interval": (2,),
    "_sliding_window_pattern": (2,),
    "query_pre_attn_scalar": (7,),
    "attn_logit_softcapping": (None, 1.5),
    "final_logit_softcapping": (None, 1.5),
    "use_bidirectional_attention": (True,),
    "embedding_multiplier": (0.7,),
    "attention_multiplier": (0.9,),
    "residual_multiplier": (1.3,),
    "logits_scaling": (0.4,),
    "scale_attn_weights": (False,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (True,),
    "num_local_experts": (4,),
    "num_experts_per_tok": (1,),
    "norm_topk_prob": (False,),
    "mlp_only_layers": ([0, 2],),
    "decoder_sparse_step": (2,),
    # Of training, of other heads, or of what is returned besides logits.
    "attention_dropout": (0.3,),
    "resid_pdrop": (0.3,),
    "embd_pdrop": (0.3,),
    "attn_pdrop": (0.3,),
    "hidden_dropout": (0.3,),
    "dropout": (0.3,),
    "layerdrop": (0.3,),
    "residual_dropout": (0.3,),
    "embedding_dropout": (0.3,),
    "classifier_dropout": (0.3,),
    "initializer_range": (0.5,),
    "init_std": (0.5,),
    "output_router_logits": (True,),
    "router_aux_loss_coef": (0.5,),
    "router_jitter_noise": (0.5,),
    "pretraining_tp": (2,),
    "is_decoder": (True,),
    "add_cross_attention": (True,),
    "summary_type": ("first",),
    "summary_use_proj": (False,),
    "summary_activation": ("tanh",),
    "summary_proj_to_labels": (False,),
    "summary_first_dropout": (0.3,),
}
ROPES: dict[str, dict[str, Any]] = {
    "theta": {"rope_type": "default", "rope_theta": 7.0},
    "linear": {"rope_type": "linear", "rope_theta": 300.0, "factor": 2.5},
    "yarn": {"rope_type": "yarn", "rope_theta": 300.0, "factor": 4.0, "original_max_position_embeddings": 16},
}
OF_EVERY_CONFIG = frozenset(PreTrainedConfig().to_dict()) | {"model_type", "tie_word_embeddings", "use_cache"}
SPECIAL_TOKENS = {"pad_token_id", "bos_token_id", "eos_token_id"}


def options(family: str) -> Mapping[str, Any]:
    """The fields of the family's small model, without those of images."""
    return MODELS[family].options.get("text_config", MODELS[family].options)


def own_fields(family: str) -> dict[str, Any]:
    return CONFIG_MAPPING[family](**copy.deepcopy(MODELS[family].options)).get_text_config().to_dict()


def fields(family: str) -> list[str]:
    own = own_fields(family)
    return sorted((own.keys() - OF_EVERY_CONFIG - SPECIAL_TOKENS - {"rope_parameters"}) | {"tie_word_embeddings"})


def changes(family: str, field: str) -> dict[str, Any]:
    """The field at its other value, and what has to change with it to be a model at all."""
    own = own_fields(family).get(field)
    turned: dict[str, Any] = {field: next(value for value in TURNED[field] if value != own)}
    if field in ("num_hidden_layers", "n_layer"):
        turned |= {
            name: options(family)[name][:2] for name in ("layer_types", "no_rope_layers") if name in options(family)
        }
    if field == "no_rope_layer_interval":
        turned["no_rope_layers"] = None
    resolved = field in ("max_window_layers", "_sliding_window_pattern", "use_sliding_window") and family != "smollm3"
    if resolved and "layer_types" in own_fields(family):
        turned["layer_types"] = None
    if field == "hidden_size" and family == "opt":
        turned["word_embed_proj_dim"] = turned[field]
    if family == "qwen2_5_vl" and field in ("num_attention_heads", "hidden_size"):
        section = {"num_attention_heads": [2, 2, 2], "hidden_size": [1, 1, 1]}[field]
        turned["rope_parameters"] = {**options(family)["rope_parameters"], "mrope_section": section}
    if family == "phi3" and field in ("num_attention_heads", "hidden_size"):
        turned["rope_parameters"] = {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.5}
    if field == "hidden_size" and family in ("phi", "phi3", "gpt_neox", "stablelm"):
        turned["num_attention_heads"] = 3
        turned["num_key_value_heads"] = 3
    return {name: value for name, value in turned.items() if family != "gpt_neox" or name != "num_key_value_heads"}


def same_or_refused(family: str, turned: dict[str, Any], named: str, directory: Any) -> None:
    base_dir = make_model(directory, family, **turned)
    try:
        # Block by block and operation by operation: nothing to compile anew for each setting.
        ours = load_base(base_dir, dtype=jnp.float32, scan_layers=False)
    except ValueError as refusal:
        assert named in str(refusal)
        return
    inputs = prompt(2, 19, "left")
    inputs["input_ids"] %= 80
    with jax.disable_jit():
        logits = ours(**inputs).logits
    assert relative_error(logits, base_run(base_dir, **inputs), inputs["attention_mask"]) <= TOLERANCE


@pytest.mark.parametrize("family", MODELS)
def test_every_field_has_a_second_value(family):
    assert set(fields(family)) <= TURNED.keys()
    assert options(family).get("num_hidden_layers", LAYERS) == LAYERS


@pytest.mark.slow
@pytest.mark.parametrize("family", MODELS)
def test_fields_act_as_in_transformers_or_are_refused(family, tmp_path):
    wrong = {}
    for field in fields(family):
        try:
            same_or_refused(family, changes(family, field), field, tmp_path / field)
        except Exception as error:
            wrong[field] = f"{type(error).__name__}: {error}".split("\n")[0][:300]
    assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize(
    "family",
    # Phi-3 has a test of its own.
    [name for name in MODELS if "rope_parameters" in options(name) and name != "phi3"],
)
def test_rope(family, kind, tmp_path):
    rope = dict(ROPES[kind])
    own = options(family)["rope_parameters"]
    rope |= {name: own[name] for name in ("mrope_section", "mrope_interleaved") if name in own}
    if "partial_rotary_factor" in own:
        rope["partial_rotary_factor"] = own["partial_rotary_factor"]
    if "full_attention" in own:
        rope = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": 11.0}}
    same_or_refused(family, {"rope_parameters": rope}, "rope_type", tmp_path)


def test_phi3_has_the_kinds_of_rope_that_transformers_has_for_it(tmp_path):
    """Plain, and longrope, in the old way too; another is refused there and here."""
    plain = {"rope_type": "default", "rope_theta": 7.0, "partial_rotary_factor": 0.5}
    same_or_refused("phi3", {"rope_parameters": plain}, "none", tmp_path / "plain")
    base_dir = make_model(tmp_path / "phi3", "phi3")
    config = json.loads((base_dir / "config.json").read_text())
    longrope = config.pop("rope_parameters")
    old = {name: longrope[name] for name in ("short_factor", "long_factor")} | {"type": "longrope"}
    more = {name: longrope[name] for name in ("rope_theta", "partial_rotary_factor")}
    inputs, ours = prompt(2, 19), load_base(base_dir, scan_layers=False)
    (base_dir / "config.json").write_text(json.dumps({**config, **more, "rope_scaling": old}))
    in_the_old_way = load_base(base_dir, scan_layers=False)
    assert in_the_old_way.module == ours.module
    with jax.disable_jit():
        logits = in_the_old_way(**inputs).logits
    assert relative_error(logits, base_run(base_dir, **inputs), inputs["attention_mask"]) <= TOLERANCE
    for kind in ("linear", "yarn"):
        rope = {**ROPES[kind], "partial_rotary_factor": 0.5}
        (base_dir / "config.json").write_text(json.dumps({**config, "rope_parameters": rope}))
        with pytest.raises((KeyError, ValueError, StrictDataclassError)):
            AutoConfig.from_pretrained(base_dir)
        with pytest.raises(FormatError, match=r"transformers can't read it: .*rope"):
            load_base(base_dir)


def test_longrope_is_in_one_of_the_models():
    assert MODELS["phi3"].options["rope_parameters"] == LONGROPE["rope_parameters"]
