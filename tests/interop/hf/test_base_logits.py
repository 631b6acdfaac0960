"""Logits of the base models alone against transformers: a config field that is read acts as there, or is refused."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from interop import load_base
from tests.helpers.reference import FAMILIES, HIDDEN, base_run, make_base, prompt, relative_error

TOLERANCE = 1e-5
HALF_DIM = {"llama": 6, "mistral": 6, "qwen2": 4}  # of a head: the number of rotary frequencies
ORIGINAL = 16  # the context length "before extension"

ROPE = {
    "default": {},
    "linear": {"factor": 2.5},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "yarn, all options": {
        "factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
        "beta_fast": 8.0,
        "beta_slow": 2.0,
        "mscale": 0.8,
        "mscale_all_dim": 0.5,
        "truncate": False,
    },
    "yarn, attention factor": {"factor": 3.0, "original_max_position_embeddings": ORIGINAL, "attention_factor": 1.3},
    "longrope": {"original_max_position_embeddings": ORIGINAL, "factor": 8.0},
    "longrope, attention factor": {
        "original_max_position_embeddings": ORIGINAL,
        "factor": 8.0,
        "attention_factor": 1.2,
    },
}


def rope_parameters(family, kind):
    parameters = {"rope_type": kind.split(",")[0], "rope_theta": 300.0, **ROPE[kind]}
    if kind.startswith("longrope"):
        count = HALF_DIM[family]
        parameters["short_factor"] = np.linspace(1.0, 1.5, count).tolist()
        parameters["long_factor"] = np.linspace(1.2, 6.0, count).tolist()
    return parameters


@pytest.mark.parametrize("kind", ROPE)
@pytest.mark.parametrize("family", FAMILIES)
def test_rope(family, kind, base):
    """Above the original length, and for longrope below it too; each kind differs from no scaling."""
    base_dir = base(family, rope_parameters=rope_parameters(family, kind), max_position_embeddings=64)
    plain_dir = base(family, rope_parameters=rope_parameters(family, "default"), max_position_embeddings=64)
    ours = load_base(base_dir, dtype=jnp.float32)
    for tokens in (ORIGINAL + 9, ORIGINAL - 4) if kind.startswith("longrope") else (ORIGINAL + 9,):
        inputs = prompt(2, tokens)
        theirs = base_run(base_dir, **inputs)
        assert relative_error(ours(**inputs).logits, theirs) <= TOLERANCE, f"{tokens} tokens"
        if kind != "default":
            assert relative_error(base_run(plain_dir, **inputs), theirs) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_dynamic_rope_is_as_in_transformers_or_refused_by_name(family, base):
    parameters = {"rope_type": "dynamic", "rope_theta": 300.0, "factor": 2.0}
    base_dir = base(family, rope_parameters=parameters, max_position_embeddings=ORIGINAL)
    assert_equal_or_refused(base_dir, "dynamic", (ORIGINAL - 4, ORIGINAL + 9))


def assert_equal_or_refused(base_dir, name, lengths=(9,)):
    try:
        ours = load_base(base_dir, dtype=jnp.float32)
    except (ValueError, NotImplementedError) as refusal:
        assert name in str(refusal)
        return
    for tokens in lengths:
        inputs = prompt(2, tokens)
        assert relative_error(ours(**inputs).logits, base_run(base_dir, **inputs)) <= TOLERANCE


SWITCHES = {
    "llama": {
        "no biases": {"attention_bias": False, "mlp_bias": False},
        "attention bias": {"attention_bias": True, "mlp_bias": False},
        "head_dim from width": {"head_dim": None},
    },
    "mistral": {"no window": {"sliding_window": None}, "window of 3": {"sliding_window": 3}},
    "qwen2": {
        "window in later layers": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
        "window in the middle": {
            "use_sliding_window": True,
            "sliding_window": 3,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
        "explicit head_dim": {"head_dim": 12},
    },
}
SHARED_SWITCHES = {
    "tied": {"tie_word_embeddings": True},
    "as many kv heads": {"num_key_value_heads": 6},
    "one kv head": {"num_key_value_heads": 1},
    "epsilon": {"rms_norm_eps": 0.3},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
    "two layers": {"num_hidden_layers": 2},
}


@pytest.mark.parametrize(
    ("family", "switch"),
    [(family, switch) for family in FAMILIES for switch in (*SHARED_SWITCHES, *SWITCHES.get(family, {}))],
)
def test_config_fields_act_as_in_transformers(family, switch, base):
    options = {**SHARED_SWITCHES, **SWITCHES.get(family, {})}[switch]
    base_dir, plain_dir = base(family, **options), base(family)
    inputs = prompt(2, 11)
    theirs = base_run(base_dir, **inputs)
    assert relative_error(load_base(base_dir, dtype=jnp.float32)(**inputs).logits, theirs) <= TOLERANCE
    assert relative_error(base_run(plain_dir, **inputs), theirs) > 1e-3


@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh", "relu"])
def test_activations_are_as_in_transformers_or_refused_by_name(activation, base):
    assert_equal_or_refused(base("llama", hidden_act=activation), activation)


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding(family, padding, base):
    base_dir = base(family)
    inputs = prompt(3, 12, padding)
    mask = inputs["attention_mask"]
    ours = load_base(base_dir, dtype=jnp.float32)
    out = ours(**inputs)
    assert relative_error(out.logits, base_run(base_dir, **inputs), mask) <= TOLERANCE
    without_mask = relative_error(ours(input_ids=inputs["input_ids"]).logits, out.logits, mask)
    if padding == "left":
        assert without_mask > 1e-3  # padding would be read as text
    else:
        assert without_mask <= TOLERANCE  # no token looks at what follows it


@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_embeds(family, base):
    base_dir = base(family)
    embeds = np.random.default_rng(3).normal(size=(2, 9, HIDDEN)).astype(np.float32)
    ours = load_base(base_dir, dtype=jnp.float32)(inputs_embeds=embeds)
    assert relative_error(ours.logits, base_run(base_dir, inputs_embeds=embeds)) <= TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_sharded_files_give_the_same_model(family, base, tmp_path):
    base_dir = make_base(tmp_path, family, max_shard_size="60KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    inputs = prompt(2, 9)
    sharded = load_base(base_dir, dtype=jnp.float32)(**inputs).logits
    assert relative_error(sharded, base_run(base_dir, **inputs)) <= TOLERANCE
    assert np.array_equal(sharded, load_base(base(family), dtype=jnp.float32)(**inputs).logits)


@pytest.mark.parametrize(("ours_in", "theirs_in"), [(jnp.bfloat16, torch.bfloat16), (jnp.float16, torch.float16)])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision(family, ours_in, theirs_in, tmp_path):
    """Files in half precision: read exactly into float32; and run in it no worse than transformers does."""
    base_dir = make_base(tmp_path, family, dtype=theirs_in)
    inputs = prompt(2, 11)
    exact = base_run(base_dir, **inputs)
    assert relative_error(load_base(base_dir, dtype=jnp.float32)(**inputs).logits, exact) <= TOLERANCE
    half = load_base(base_dir, dtype=ours_in)(**inputs).logits
    ours = relative_error(np.asarray(half, np.float32), exact)
    theirs = relative_error(base_run(base_dir, theirs_in, **inputs), exact)
    assert 1e-5 < ours <= 1.25 * theirs
