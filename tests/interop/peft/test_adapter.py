"""LoRA adapters that real PEFT made: every option of its config, read right or refused by name, and written back."""

import dataclasses
import json
import math
import shutil
import time

import numpy as np
import peft
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from interop import load_xlora
from interop.peft.adapter import LoraAdapter, LoraLayer, load_lora, save_lora
from interop.peft.config import _FIELDS
from interop.peft.names import match_module, renamed
from interop.peft.patterns import first_match
from interop.storage.errors import FormatError
from tests.helpers import reference
from tests.helpers.adapters import assert_same_files, edit_config, edit_tensors, fresh_base, hooked, make_adapter, run
from tests.helpers.hub import COMMIT, lay_out

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


@pytest.fixture(scope="module")
def llama(base):
    return base("llama")


@pytest.fixture(scope="module")
def untied(base):
    return base("llama", tie_word_embeddings=False)


@pytest.fixture(scope="module")
def adapter_dir(llama, tmp_path_factory):
    """One with everything plain: unequal widths, a pattern of rank and one of alpha."""
    return reference.make_adapter(
        llama,
        tmp_path_factory.mktemp("adapter"),
        seed=3,
        r=4,
        alpha=6,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"down_proj": 5},
        alpha_pattern={"layers.1.self_attn.q_proj": 3},
        lora_dropout=0.25,
    )


@pytest.fixture
def copied(adapter_dir, tmp_path):
    return shutil.copytree(adapter_dir, tmp_path / "adapter")


def assert_means_what_peft_says(base_model, directory, ids):
    """The loaded arrays in the formula give the logits of PEFT's own model, which are not the base's."""
    plain = run(base_model, ids)
    handles = hooked(base_model, load_lora(directory))
    ours = run(base_model, ids)
    for handle in handles:
        handle.remove()
    theirs = run(PeftModel.from_pretrained(base_model, str(directory)).eval(), ids)
    assert torch.linalg.norm(ours - theirs) <= 1e-5 * torch.linalg.norm(theirs)
    assert torch.linalg.norm(ours - plain) > 1e-2 * torch.linalg.norm(plain)


IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
HANDLED = {
    "plain": {"target_modules": ALL},
    "rank_pattern": {"target_modules": ALL, "rank_pattern": {"q_proj": 7, "layers.1.mlp.up_proj": 2}},
    "alpha_pattern": {"target_modules": ALL, "alpha_pattern": {"v_proj": 1, "layers.2.mlp.up_proj": 16}},
    "both patterns, first match wins": {
        "target_modules": ALL,
        "rank_pattern": {r"layers\.[01]\..*_proj": 3, "q_proj": 6},
        "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 5, "mlp.up_proj": 7, "up_proj": 9},
        "use_rslora": True,
    },
    "rslora": {"target_modules": ALL, "use_rslora": True},
    "lora_bias": {"target_modules": ["q_proj", "o_proj"], "lora_bias": True},
    "regex targets": {"target_modules": r".*layers\.[02]\..*\.(q|up)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "layers_to_transform": {"target_modules": ALL, "layers_to_transform": [1], "layers_pattern": "layers"},
    "exclude_modules": {"target_modules": ALL, "exclude_modules": ["k_proj"]},
    "gaussian": {"target_modules": ALL, "init_lora_weights": "gaussian"},
    "orthogonal": {"target_modules": ALL, "init_lora_weights": "orthogonal"},
    "mica": {"target_modules": ["q_proj"], "init_lora_weights": "mica"},
    "eva": {"target_modules": ALL, "init_lora_weights": "eva", "eva_config": peft.EvaConfig()},
    "velora": {"target_modules": ["q_proj"], "velora_config": peft.tuners.lora.config.VeloraConfig(num_groups=4)},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head"]},
    "head": {"target_modules": ["lm_head", "v_proj"]},
    "dropout": {"target_modules": ALL, "lora_dropout": 0.3},
    "weight tying without embeddings": {"target_modules": ALL, "ensure_weight_tying": True},
}


@pytest.mark.parametrize("option", HANDLED)
def test_handled_options_mean_what_peft_says(untied, tmp_path, option):
    directory = make_adapter(untied, tmp_path, **HANDLED[option])
    assert_means_what_peft_says(fresh_base(untied), directory, IDS)


@pytest.mark.parametrize("option", HANDLED)
def test_one_expert_alone_is_pefts_adapter(untied, tmp_path, option):
    """In our forward pass: the softmax over one expert is 1, so that X-LoRA with it is the plain adapter."""
    directory = make_adapter(untied, tmp_path, **HANDLED[option])
    ours = load_xlora(untied, adapters={"alone": directory})(IDS.numpy())
    theirs = run(PeftModel.from_pretrained(fresh_base(untied), str(directory)).eval(), IDS).numpy()
    assert np.all(np.asarray(ours.scalings) == 1)
    assert np.linalg.norm(ours.logits - theirs) <= 1e-5 * np.linalg.norm(theirs)
    plain = run(fresh_base(untied), IDS).numpy()
    assert np.linalg.norm(theirs - plain) > 1e-2 * np.linalg.norm(plain)


def test_fan_in_fan_out_of_gpt2(tmp_path):
    config = transformers.GPT2Config(
        n_embd=24, n_layer=2, n_head=3, vocab_size=97, bos_token_id=None, eos_token_id=None
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    reference.randomize(model, 0)
    model.save_pretrained(tmp_path / "base")
    directory = reference.make_adapter(
        tmp_path / "base", tmp_path / "lora", 2, 3, 5, ["c_attn", "c_fc", "wte"], fan_in_fan_out=True
    )
    adapter = load_lora(directory)
    assert adapter.layers["transformer.h.0.attn.c_attn"].a.shape == (24, 3)
    assert adapter.layers["transformer.h.0.attn.c_attn"].b.shape == (3, 72)
    assert adapter.layers["transformer.wte"].kind == "embedding"
    assert_means_what_peft_says(fresh_base(tmp_path / "base"), directory, IDS)
    ours = load_xlora(tmp_path / "base", adapters={"alone": directory})(IDS.numpy()).logits
    theirs = run(PeftModel.from_pretrained(fresh_base(tmp_path / "base"), str(directory)).eval(), IDS).numpy()
    assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)


def test_convolution(tmp_path):
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=30, image_size=8, patch_size=4
    )
    base = transformers.ViTModel(config, add_pooling_layer=False).eval()
    reference.randomize(base, 0)
    lora = get_peft_model(base, LoraConfig(r=3, lora_alpha=5, target_modules=["projection"]))
    reference.randomize(lora.base_model.model.embeddings.patch_embeddings.projection.lora_B["default"], 1)
    lora.save_pretrained(tmp_path)
    layer = load_lora(tmp_path).layers["embeddings.patch_embeddings.projection"]
    assert (layer.kind, layer.a.shape, layer.b.shape, layer.scale) == ("conv", (4, 4, 3, 3), (3, 24), 5 / 3)
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = lora.eval()(images).last_hidden_state
        plain = lora.unload()
        before = plain(images).last_hidden_state
        hooked(plain, load_lora(tmp_path))
        ours = plain(images).last_hidden_state
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before, theirs, rtol=1e-2)
    save_lora(load_lora(tmp_path), tmp_path / "again")
    assert_same_files(tmp_path, tmp_path / "again")


def test_everything_about_a_layer(adapter_dir):
    adapter = load_lora(adapter_dir, name="math")
    stored = load_file(adapter_dir / "adapter_model.safetensors")
    assert adapter.name == "math"
    assert adapter.path == adapter_dir
    assert adapter.config == json.loads((adapter_dir / "adapter_config.json").read_text())
    assert adapter.base_model_name_or_path == adapter.config["base_model_name_or_path"]
    assert list(adapter.layers) == sorted({key.removeprefix("base_model.model.").split(".lora_")[0] for key in stored})
    for path, layer in adapter.layers.items():
        rank = 5 if "down_proj" in path else 4
        alpha = 3 if path == "model.layers.1.self_attn.q_proj" else 6
        assert (layer.r, layer.alpha, layer.scale, layer.dropout) == (rank, alpha, alpha / rank, 0.25)
        assert (layer.kind, layer.bias, layer.base_weight) == ("linear", None, None)
        np.testing.assert_array_equal(layer.a, stored[f"base_model.model.{path}.lora_A.weight"].numpy().T)
        np.testing.assert_array_equal(layer.b, stored[f"base_model.model.{path}.lora_B.weight"].numpy().T)


def test_rslora_scale(llama, tmp_path):
    directory = reference.make_adapter(llama, tmp_path, 1, 5, 6, ["q_proj"], use_rslora=True)
    assert {layer.scale for layer in load_lora(directory).layers.values()} == {6 / math.sqrt(5)}


def test_the_base_weight_beside_an_embedding(llama, tmp_path):
    directory = reference.make_adapter(llama, tmp_path, 1, 3, 3, ["embed_tokens", "q_proj"])
    layers = load_lora(directory).layers
    stored = layers["model.embed_tokens"].base_weight
    np.testing.assert_array_equal(np.asarray(stored), reference.torch_base(llama).model.embed_tokens.weight.detach())
    assert np.asarray(stored, np.float16).dtype == np.float16
    assert all(layer.base_weight is None for path, layer in layers.items() if path != "model.embed_tokens")


# ---------------------------------------------------------------------------------------------------------------------
# Options that are refused


def peft_config(**options):
    return LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **{"target_modules": ["q_proj"], **options})


REFUSED = {
    "use_dora": {"use_dora": True},
    "bias": {"bias": "lora_only"},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "trainable_token_indices": {"trainable_token_indices": [1, 2]},
    "layer_replication": {"layer_replication": [[0, 2], [1, 3]]},
    "target_parameters": {"target_parameters": ["mlp.up_proj.weight"], "target_modules": []},
    "alora_invocation_tokens": {"alora_invocation_tokens": [3, 4]},
    "use_bdlora": {"use_bdlora": peft.tuners.lora.config.BdLoraConfig(target_modules_bd_a=["q_proj"], nblocks=2)},
    "kasa_config": {"kasa_config": peft.tuners.lora.config.KasaConfig()},
    "monteclora_config": {"monteclora_config": peft.tuners.lora.config.MontecloraConfig()},
}
# These can't be made in a small model: the field alone has to do.
REFUSED_FIELDS = {
    "use_qalora": True,
    "arrow_config": {"top_k": 3},
    "megatron_config": {"a": 1},
    "enable_lora": [True, False, True],
}
INITIALISATIONS = ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"]


@pytest.mark.parametrize("option", REFUSED)
def test_refused_options(llama, tmp_path, option):
    """Real PEFT makes and saves the adapter; the error names adapter, option and remedy."""
    get_peft_model(fresh_base(llama), peft_config(**REFUSED[option])).save_pretrained(tmp_path / "lora")
    with pytest.raises(
        FormatError, match=rf"adapter 'math' \(.*lora\): {option} = .* can't be an expert.*What you can do"
    ):
        load_lora(tmp_path / "lora", name="math")


@pytest.mark.parametrize("option", REFUSED_FIELDS)
def test_refused_fields(copied, option):
    edit_config(copied, **{option: REFUSED_FIELDS[option]})
    with pytest.raises(FormatError, match=rf"{option} = .* can't be an expert.*What you can do"):
        load_lora(copied)


@pytest.mark.parametrize("initialization", INITIALISATIONS)
def test_refused_initializations(copied, initialization):
    edit_config(copied, init_lora_weights=initialization)
    with pytest.raises(FormatError, match="path_initial_model_for_weight_conversion"):
        load_lora(copied)


@pytest.mark.parametrize("initialization", ["pissa", "olora"])
def test_converted_initializations_are_read(llama, tmp_path, initialization):
    """What the refusal advises works: PEFT's conversion stores a plain LoRA."""
    base = fresh_base(llama)
    model = get_peft_model(base, peft_config(init_lora_weights=initialization))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = initialization
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1)
    model.save_pretrained(tmp_path / "refused")
    with pytest.raises(FormatError, match=f"init_lora_weights = '{initialization}' can't be an expert"):
        load_lora(tmp_path / "refused")
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    assert_means_what_peft_says(fresh_base(llama), tmp_path / "converted", IDS)


def test_bias_all(llama, tmp_path):
    get_peft_model(fresh_base(llama), peft_config(bias="all")).save_pretrained(tmp_path)
    with pytest.raises(FormatError, match="bias = 'all' can't be an expert"):
        load_lora(tmp_path)


def test_weight_tying_with_embeddings(base, tmp_path):
    tied = base("llama", tie_word_embeddings=True)
    model = get_peft_model(
        fresh_base(tied), peft_config(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    )
    model.save_pretrained(tmp_path)
    with pytest.raises(FormatError, match=r"ensure_weight_tying with 'model.embed_tokens' among the targets can't be"):
        load_lora(tmp_path)


def test_other_kinds_of_adapter(llama, tmp_path):
    get_peft_model(fresh_base(llama), peft.IA3Config(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    with pytest.raises(FormatError, match="peft_type is 'IA3'; expected 'LORA'"):
        load_lora(tmp_path)


def test_every_field_of_peft_stands_in_the_table():
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert fields <= _FIELDS.keys()
    assert sorted(_FIELDS.keys() - fields) == ["enable_lora", "merge_weights"]  # of PEFT 0.2


def test_defaults_of_peft_are_accepted_field_by_field(copied):
    """No field is refused at the value that PEFT writes by default, or where it is absent, as in older versions."""
    written = json.loads((copied / "adapter_config.json").read_text())
    for name in set(written) - {"peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern"}:
        (copied / "adapter_config.json").write_text(json.dumps({key: written[key] for key in written if key != name}))
        load_lora(copied)


class TestUnknownFields:
    @pytest.mark.parametrize("value", [None, False, "", [], {}])
    def test_neutral(self, copied, value):
        load_lora(edit_config(copied, from_the_future=value))

    @pytest.mark.parametrize("value", [True, 1, 0, "on", [1], {"a": 1}, 0.5])
    def test_of_a_later_peft_are_refused(self, copied, value):
        edit_config(copied, from_the_future=value, peft_version="0.22.0")
        with pytest.raises(FormatError, match="unknown field 'from_the_future' = "):
            load_lora(copied)


# ---------------------------------------------------------------------------------------------------------------------
# Patterns

PATTERNS = st.one_of(
    st.sampled_from(
        [
            "q_proj", "proj", "self_attn.q_proj", "^model.layers.0.self_attn.q_proj", "layers.0", r".*\.q_proj",
            r"layers\.\d+\.self_attn\.(q|k)_proj", "q.proj", r"model\.layers\.[12]\..*", "", "$", "^q_proj$", "Q_PROJ",
            "(?i:Q_PROJ)", "mlp|self_attn.q_proj", "_proj", "model.layers.1.mlp.up_proj",
        ]
    ),
    st.from_regex(r"(model\.)?(layers\.[0-2]\.)?(self_attn|mlp)?\.?[qk]?_?proj", fullmatch=True),
)  # fmt: skip
PATHS = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.k_proj",
    "model.layers.1.mlp.up_proj",
    "lm_head",
    "q_proj",
]


@settings(max_examples=300)
@given(st.lists(PATTERNS, max_size=4, unique=True), st.sampled_from(PATHS))
def test_patterns_match_as_in_peft(patterns, path):
    from peft.utils.other import get_pattern_key

    assert first_match(patterns, path) == get_pattern_key(patterns, path)


class TestHostilePatterns:
    @pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
    def test_each_field_is_checked(self, copied, field):
        edit_config(copied, **{field: {"(?!lm_head).*": 4}})
        with pytest.raises(FormatError, match=f"{field} holds .*a lookahead"):
            load_lora(copied)

    @pytest.mark.parametrize("pattern", ["(a+)+", "(?:(a+) ?)+", r"(a+[\])]?)+", ".*" * 8 + "x", "a?" * 30])
    def test_that_would_take_for_ever_by_backtracking(self, copied, pattern):
        edit_config(copied, rank_pattern={pattern: 4, "down_proj": 5})
        started = time.process_time()
        load_lora(copied)
        assert time.process_time() - started < 1

    def test_a_million_entries(self, copied):
        entries = ",".join(f'"layers.{number}.q_proj":4' for number in range(1_000_000))
        (copied / "adapter_config.json").write_text('{"peft_type":"LORA","r":4,"rank_pattern":{' + entries + "}}")
        started = time.process_time()
        with pytest.raises(FormatError, match=r"adapter_config\.json: \d+ bytes of JSON; expected at most"):
            load_lora(copied)
        assert time.process_time() - started < 1

    def test_as_many_entries_as_fit(self, copied):
        edit_config(copied, rank_pattern={f"{number:x}": 1 for number in range(150_000)})
        assert (copied / "adapter_config.json").stat().st_size < 2 * 2**20
        started = time.process_time()
        with pytest.raises(FormatError, match="rank_pattern has 150000 entries; expected at most 10000"):
            load_lora(copied)
        assert time.process_time() - started < 1

    @pytest.mark.parametrize("pattern", ["(", "[a", "*", "a{2,1}", "(?P<x>a)(?P<x>b)", "\\"])
    def test_that_are_none(self, copied, pattern):
        edit_config(copied, rank_pattern={pattern: 4})
        with pytest.raises(FormatError, match="rank_pattern holds "):
            load_lora(copied)

    @pytest.mark.parametrize(
        "pattern",
        [r"(.*\.)?layers\.\d+\.(self_attn|mlp)\.down_proj", r".*\.layers\.\d+\..*down_proj", "(?i:DOWN_PROJ)"],
    )
    def test_common_ones_are_no_such(self, copied, pattern):
        load_lora(edit_config(copied, rank_pattern={pattern: 5}))


# ---------------------------------------------------------------------------------------------------------------------
# Keys


def rekeyed(change):
    return lambda tensors: {change(key): tensor for key, tensor in tensors.items()}


KEY_FORMS = {
    "with the adapter's name": lambda key: key.replace(".weight", ".default.weight"),
    "prefix twice": lambda key: "base_model.model." + key,
    "no prefix": lambda key: key.removeprefix("base_model.model."),
    "one model short": lambda key: key.replace("base_model.model.model.", "base_model.model."),
    "language_model": lambda key: key.replace("base_model.model.model.", "base_model.model.language_model.model."),
    "model.language_model": lambda key: key.replace(
        "base_model.model.model.", "base_model.model.model.language_model."
    ),
}
MODULES = [
    f"model.layers.{i}.{name}" for i in range(3) for name in ("self_attn.q_proj", "mlp.down_proj", "mlp.up_proj")
]


@pytest.mark.parametrize("form", KEY_FORMS)
def test_key_prefixes_in_the_wild(copied, form):
    """Whatever the prefix, the layers are the same, and PEFT loads what is written back."""
    plain = load_lora(copied)
    edit_config(copied, alpha_pattern={"layers.1.self_attn.q_proj": 3})
    loaded = load_lora(edit_tensors(copied, rekeyed(KEY_FORMS[form])))
    adapter = renamed(loaded, MODULES)
    assert list(adapter.layers) == list(plain.layers)
    for path, layer in plain.layers.items():
        assert adapter.layers[path].alpha == layer.alpha
        np.testing.assert_array_equal(adapter.layers[path].a, layer.a)


@pytest.mark.parametrize("form", KEY_FORMS)
def test_renamed_adapters_load_in_peft(llama, copied, tmp_path, form):
    expected = run(PeftModel.from_pretrained(fresh_base(llama), str(copied)).eval(), IDS)
    edit_tensors(copied, rekeyed(KEY_FORMS[form]))
    save_lora(renamed(load_lora(copied), MODULES), tmp_path / "again")
    again = run(PeftModel.from_pretrained(fresh_base(llama), str(tmp_path / "again")).eval(), IDS)
    torch.testing.assert_close(again, expected, rtol=0, atol=0)


def test_embedding_keys_with_the_adapters_name(llama, tmp_path):
    directory = reference.make_adapter(llama, tmp_path, 1, 3, 3, ["embed_tokens"])
    plain = load_lora(directory).layers["model.embed_tokens"]
    edit_tensors(directory, rekeyed(lambda key: key + ".default" if "lora_embedding" in key else key))
    again = load_lora(directory).layers["model.embed_tokens"]
    np.testing.assert_array_equal(again.a, plain.a)
    np.testing.assert_array_equal(again.b, plain.b)


class TestMatchModule:
    KNOWN = (
        "model.embed_tokens",
        "model.layers.0.self_attn.q_proj",
        "model.layers.10.self_attn.q_proj",
        "lm_head",
        "transformer.h.0.attn.c_attn",
        "model.decoder.layers.0.fc1",
        "enc.block.0.q",
        "dec.block.0.q",
    )

    @pytest.mark.parametrize(
        ("path", "module"),
        [
            ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj"),
            ("layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj"),
            ("language_model.model.layers.10.self_attn.q_proj", "model.layers.10.self_attn.q_proj"),
            ("model.language_model.layers.10.self_attn.q_proj", "model.layers.10.self_attn.q_proj"),
            ("embed_tokens", "model.embed_tokens"),
            ("language_model.lm_head", "lm_head"),
            ("h.0.attn.c_attn", "transformer.h.0.attn.c_attn"),
            ("decoder.layers.0.fc1", "model.decoder.layers.0.fc1"),
            ("layers.0.fc1", "model.decoder.layers.0.fc1"),
        ],
    )
    def test_match(self, path, module):
        assert match_module(path, self.KNOWN) == module

    def test_nothing_near(self):
        with pytest.raises(FormatError, match=r"'layers\.0\.self_attn\.qkv_proj' is no module.*nearest: '.*q_proj'"):
            match_module("layers.0.self_attn.qkv_proj", self.KNOWN)
        with pytest.raises(FormatError, match="nearest: none"):
            match_module("?", self.KNOWN)

    def test_a_number_is_not_the_end_of_another(self):
        with pytest.raises(FormatError, match="is no module"):
            match_module("0.self_attn.k_proj", self.KNOWN)
        assert match_module("0.self_attn.q_proj", self.KNOWN) == "model.layers.0.self_attn.q_proj"

    def test_several(self):
        with pytest.raises(FormatError, match=r"'block\.0\.q' could be any of 'enc\.block\.0\.q', 'dec\.block\.0\.q'"):
            match_module("block.0.q", self.KNOWN)

    def test_a_vision_tower_is_not_the_decoder(self):
        with pytest.raises(FormatError, match="is no module"):
            match_module("vision_tower.encoder.layers.0.self_attn.q_proj", self.KNOWN)

    def test_two_that_mean_one(self, copied):
        q_proj = "base_model.model.model.layers.0.self_attn.q_proj"
        edit_tensors(
            copied,
            lambda tensors: (
                tensors
                | {
                    key.replace("base_model.model.model.", "base_model.model."): t
                    for key, t in tensors.items()
                    if q_proj in key
                }
            ),
        )
        with pytest.raises(FormatError, match=r"and another path both mean 'model.layers.0.self_attn.q_proj'"):
            renamed(load_lora(copied), MODULES)


def drop(part):
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if part not in key}


def add(**tensors):
    return lambda old: {**old, **tensors}


Q = "base_model.model.model.layers.0.self_attn.q_proj"
BROKEN_TENSORS = {
    "A without B": (
        drop("layers.1.mlp.down_proj.lora_B"),
        r"'model\.layers\.1\.mlp\.down_proj' has 'lora_A'; expected",
    ),
    "B without A": (
        drop("layers.1.mlp.down_proj.lora_A"),
        r"'model\.layers\.1\.mlp\.down_proj' has 'lora_B'; expected",
    ),
    "a bias not announced": (add(**{f"{Q}.lora_B.bias": torch.ones(72)}), r"has 'bias', 'lora_A', 'lora_B'; expected"),
    "unknown key": (add(**{f"{Q}.lora_C.weight": torch.ones(2)}), r"1 tensors are no part of a LoRA adapter.*lora_C"),
    "trained head": (add(**{"base_model.model.score.weight": torch.ones(2)}), r"score\.weight"),
    "bias of A": (add(**{f"{Q}.lora_A.bias": torch.ones(4)}), r"1 tensors are no part .*lora_A\.bias"),
    "another adapter": (add(**{f"{Q}.lora_A.other.weight": torch.ones(4, 48)}), "are both lora_A of"),
    "nothing": (lambda tensors: {"base_model.model.x": torch.ones(1)}, "1 tensors are no part"),
    "no tensors": (lambda tensors: {}, "no LoRA tensors"),
    "NaN": (add(**{f"{Q}.lora_A.weight": torch.full((4, 48), torch.nan)}), r"q_proj\.lora_A\.weight' holds 192 NaN"),
    "infinity": (
        add(**{f"{Q}.lora_B.weight": torch.full((72, 4), torch.inf)}),
        r"q_proj\.lora_B\.weight' holds 288 NaN",
    ),
    "integers": (
        add(**{f"{Q}.lora_A.weight": torch.ones(4, 48, dtype=torch.int32)}),
        "has dtype int32; expected one of",
    ),
    "one dimension": (add(**{f"{Q}.lora_A.weight": torch.ones(4)}), r"lora_A\.weight' \[4\] and .* are no pair"),
    "three dimensions": (add(**{f"{Q}.lora_A.weight": torch.ones(4, 48, 1)}), "are no pair"),
    "empty": (add(**{f"{Q}.lora_A.weight": torch.ones(4, 0)}), r"hold no values \(shape \[4, 0\]\)"),
    "kernel in B": (
        add(**{f"{Q}.lora_A.weight": torch.ones(4, 3, 2, 2), f"{Q}.lora_B.weight": torch.ones(9, 4, 2, 2)}),
        "are no pair",
    ),
    "rank of A": (add(**{f"{Q}.lora_A.weight": torch.ones(3, 48)}), r"\[3, 48\], so rank 3; expected 4, by r and"),
    "rank of B": (add(**{f"{Q}.lora_B.weight": torch.ones(72, 8)}), r"\[72, 8\], so rank 8; expected 4"),
}


@pytest.mark.parametrize("case", BROKEN_TENSORS)
def test_broken_tensors(copied, case):
    change, words = BROKEN_TENSORS[case]
    edit_tensors(copied, change)
    with pytest.raises(FormatError, match=words):
        load_lora(copied)


def test_lora_bias_of_another_length(llama, tmp_path):
    make_adapter(llama, tmp_path, target_modules=["q_proj"], lora_bias=True)
    edit_tensors(tmp_path, add(**{f"{Q}.lora_B.bias": torch.ones(7)}))
    with pytest.raises(FormatError, match=r"lora_B\.bias' has shape \[7\]; expected \[72\]"):
        load_lora(tmp_path)


def test_lora_bias_missing(copied):
    edit_config(copied, lora_bias=True)
    with pytest.raises(
        FormatError, match=r"has 'lora_A', 'lora_B'; expected 'bias', 'lora_A', 'lora_B' \(lora_bias is true"
    ):
        load_lora(copied)


BROKEN_CONFIGS = [
    ("r", 0, "r should be an integer of at least 1, got 0"),
    ("r", -4, "r should be an integer of at least 1, got -4"),
    ("r", "4", r"r should be an integer of at least 1, got '4' \(str\)"),
    ("r", 4.0, "r should be an integer"),
    ("r", True, "r should be an integer"),
    ("r", None, "r should be an integer"),
    ("r", 2**40, "r should be an integer"),
    ("r", 8, r"so rank 4; expected 8, by r and rank_pattern"),
    ("lora_alpha", "16", "lora_alpha should be a number"),
    ("lora_alpha", None, "lora_alpha should be a number"),
    ("lora_alpha", 1e40, "lora_alpha should be a number"),
    ("lora_dropout", 1.0, "lora_dropout should be a number of at least 0 and below 1"),
    ("lora_dropout", -0.5, "lora_dropout should be a number"),
    ("lora_dropout", "0.1", "lora_dropout should be a number"),
    ("use_rslora", 1, "use_rslora should be true or false, got 1"),
    ("use_rslora", "false", "use_rslora should be true or false"),
    ("lora_bias", "no", "lora_bias should be true or false"),
    ("rank_pattern", [["q_proj", 3]], "rank_pattern should be an object of pattern to value"),
    ("rank_pattern", {"q_proj": 0}, r"rank_pattern\['q_proj'\] should be an integer of at least 1, got 0"),
    ("rank_pattern", {"q_proj": -1}, r"rank_pattern\['q_proj'\] should be"),
    ("rank_pattern", {"q_proj": "8"}, r"rank_pattern\['q_proj'\] should be"),
    ("rank_pattern", {"down_proj": 7}, r"so rank 5; expected 7, by r and rank_pattern"),
    ("alpha_pattern", {"q_proj": "8"}, r"alpha_pattern\['q_proj'\] should be a number"),
    ("alpha_pattern", {"q_proj": None}, r"alpha_pattern\['q_proj'\] should be a number"),
    ("peft_type", None, "peft_type is None; expected 'LORA'"),
    ("peft_type", ["LORA"], "expected 'LORA'"),
    ("base_model_name_or_path", 3, "base_model_name_or_path should be a string, got 3"),
    ("init_lora_weights", 1, "init_lora_weights = 1 can't be an expert"),
    ("init_lora_weights", "magic", "init_lora_weights = 'magic' can't be an expert"),
]


@pytest.mark.parametrize(("field", "value", "words"), BROKEN_CONFIGS)
def test_broken_configs(copied, field, value, words):
    edit_config(copied, **{field: value})
    with pytest.raises(FormatError, match=words) as caught:
        load_lora(copied, name="math")
    assert str(caught.value).startswith(f"adapter 'math' ({copied})")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "expected a JSON object, got list"),
        ("", "not valid JSON"),
        ('{"r": 8, "r": 4}', "the key 'r' stands twice"),
        ('{"lora_alpha": NaN}', "NaN is not a JSON number"),
        ('{"lora_alpha": Infinity}', "Infinity is not a JSON number"),
        ("[" * 100_000, "not valid JSON"),
        ("{}", "peft_type is None"),
        ('{"peft_type": "LORA"}', "the field r"),
    ],
)
def test_broken_json(copied, text, words):
    (copied / "adapter_config.json").write_text(text)
    with pytest.raises(FormatError, match=words):
        load_lora(copied)


def test_missing_files(copied, tmp_path):
    (copied / "adapter_model.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"no weights; looked for adapter_model\.safetensors, adapter_model\.bin"
    ):
        load_lora(copied)
    (copied / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no adapter_config\.json"):
        load_lora(copied)


def test_links_out_of_the_directory(copied, tmp_path):
    secret = shutil.copy(copied / "adapter_config.json", tmp_path / "secret.json")
    (copied / "adapter_config.json").unlink()
    (copied / "adapter_config.json").symlink_to(secret)
    with pytest.raises(FormatError, match="a link that leaves the directory"):
        load_lora(copied)


def test_pickle(adapter_dir, copied):
    torch.save(load_file(copied / "adapter_model.safetensors"), copied / "adapter_model.bin")
    (copied / "adapter_model.safetensors").unlink()
    ours, theirs = load_lora(copied), load_lora(adapter_dir)
    assert list(ours.layers) == list(theirs.layers)
    for path in ours.layers:
        np.testing.assert_array_equal(ours.layers[path].b, theirs.layers[path].b)


def test_from_the_hub(adapter_dir, tmp_path):
    files = {f"math/{path.name}": path.read_bytes() for path in adapter_dir.iterdir()}
    lay_out(tmp_path, "org/adapters", COMMIT, files)
    adapter = load_lora("org/adapters", subfolder="math", cache_dir=tmp_path)
    assert adapter.name == "math"
    assert len(adapter.layers) == 6
    lay_out(tmp_path, "org/math-lora", COMMIT, {path.name: path.read_bytes() for path in adapter_dir.iterdir()})
    assert load_lora("org/math-lora", cache_dir=tmp_path).name == "math-lora"


def test_name_is_the_directorys(copied, monkeypatch):
    assert load_lora(copied).name == "adapter"
    monkeypatch.chdir(copied)
    assert load_lora(".").name == "adapter"


# ---------------------------------------------------------------------------------------------------------------------
# Writing


@pytest.mark.parametrize("option", HANDLED)
def test_what_is_unchanged_comes_back_bit_by_bit(untied, tmp_path, option):
    directory = make_adapter(untied, tmp_path / "a", **HANDLED[option])
    save_lora(load_lora(directory), tmp_path / "b")
    assert_same_files(directory, tmp_path / "b")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_are_kept(copied, tmp_path, dtype):
    edit_tensors(copied, lambda tensors: {key: tensor.to(dtype) for key, tensor in tensors.items()})
    adapter = load_lora(copied)
    layer = next(iter(adapter.layers.values()))
    assert str(layer.a.dtype) == str(dtype).removeprefix("torch.")
    save_lora(adapter, tmp_path / "again")
    assert_same_files(copied, tmp_path / "again")


def test_trained_layers_are_written(llama, adapter_dir, tmp_path):
    adapter = load_lora(adapter_dir)
    trained = {
        path: dataclasses.replace(layer, a=layer.a + 1, b=np.asarray(layer.b * 2))
        for path, layer in adapter.layers.items()
    }
    save_lora(dataclasses.replace(adapter, layers=trained), tmp_path / "trained")
    assert_means_what_peft_says(fresh_base(llama), tmp_path / "trained", IDS)
    again = load_lora(tmp_path / "trained")
    for path, layer in adapter.layers.items():
        np.testing.assert_array_equal(again.layers[path].a, layer.a + 1)
        np.testing.assert_array_equal(again.layers[path].b, layer.b * 2)
    assert again.config == adapter.config


def test_a_rank_or_alpha_of_its_own_becomes_a_pattern(llama, adapter_dir, tmp_path):
    adapter = load_lora(adapter_dir)
    path = "model.layers.1.mlp.down_proj"
    layer = adapter.layers[path]
    grown = dataclasses.replace(
        layer,
        a=np.concatenate([layer.a, layer.a[:, :2]], 1),
        b=np.concatenate([layer.b, layer.b[:2]], 0),
        r=7,
        alpha=9.0,
        scale=9 / 7,
    )
    save_lora(dataclasses.replace(adapter, layers={**adapter.layers, path: grown}), tmp_path / "grown")
    again = load_lora(tmp_path / "grown")
    assert [(x.r, x.alpha) for x in again.layers.values()] == [
        (7, 9.0) if p == path else (x.r, x.alpha) for p, x in adapter.layers.items()
    ]
    assert_means_what_peft_says(fresh_base(llama), tmp_path / "grown", IDS)


def test_a_scale_that_no_alpha_gives(adapter_dir, tmp_path):
    adapter = load_lora(adapter_dir)
    layers = {path: dataclasses.replace(layer, scale=3.0) for path, layer in adapter.layers.items()}
    with pytest.raises(FormatError, match=r"has scale 3.0, but its r and alpha give"):
        save_lora(dataclasses.replace(adapter, layers=layers), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_saving_over(copied, tmp_path):
    adapter = load_lora(copied)
    save_lora(adapter, tmp_path / "x")
    save_lora(adapter, tmp_path / "x")
    (copied / "tokenizer.json").write_text("{}")
    with pytest.raises(FileExistsError, match=r"tokenizer\.json"):
        save_lora(adapter, copied)


CONFIGS = st.fixed_dictionaries(
    {
        "r": st.integers(1, 3),
        "lora_alpha": st.one_of(st.integers(-3, 40), st.floats(-8, 64, allow_nan=False)),
        "lora_dropout": st.floats(0, 0.99),
        "use_rslora": st.booleans(),
        "init_lora_weights": st.sampled_from([True, False, "gaussian", "eva"]),
        "fan_in_fan_out": st.booleans(),
    },
    optional={
        "rank_pattern": st.dictionaries(st.sampled_from(["q", "a.0.q", "^a.1.q", r"a\.\d\.k", "b"]), st.integers(1, 4)),
        "alpha_pattern": st.dictionaries(st.sampled_from(["q", "a.0.q", "k", ".*k"]), st.floats(0, 9)),
        "task_type": st.sampled_from([None, "CAUSAL_LM", "SEQ_CLS"]),
        "target_modules": st.one_of(st.none(), st.text(), st.lists(st.text())),
        "base_model_name_or_path": st.one_of(st.none(), st.text()),
        "peft_version": st.text(),
        "layers_to_transform": st.one_of(st.none(), st.integers(), st.lists(st.integers())),
        "auto_mapping": st.dictionaries(st.text(), st.text()),
        "lora_bias": st.just(False),
        "modules_to_save": st.sampled_from([None, []]),
        "a_new_field": st.sampled_from([None, False, [], {}, ""]),
    },
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=CONFIGS, paths=st.sets(st.sampled_from(["a.0.q", "a.1.q", "a.0.k", "a.1.k", "b", "c.b"]), min_size=1))
def test_load_save_load_gives_the_same(tmp_path, config, paths):
    """Over adapter configs: what is written is read as it was, and once more as it was."""
    import itertools

    directory = tmp_path / next(str(i) for i in itertools.count() if not (tmp_path / str(i)).exists())
    rng = np.random.default_rng(0)
    config = {"peft_type": "LORA", **config}
    layers = {}
    for path in sorted(paths):
        r = next((v for p, v in config.get("rank_pattern", {}).items() if first_match([p], path) == p), config["r"])
        alpha = next(
            (v for p, v in config.get("alpha_pattern", {}).items() if first_match([p], path) == p),
            config["lora_alpha"],
        )
        scale = alpha / (math.sqrt(r) if config["use_rslora"] else r)
        a, b = rng.normal(size=(5, r)).astype("f4"), rng.normal(size=(r, 3)).astype("f2")
        layers[path] = LoraLayer("linear", a, b, None, r, alpha, scale, config["lora_dropout"])
    first = LoraAdapter("x", tmp_path, config, layers)
    save_lora(first, directory)
    second = load_lora(directory, name="x")
    save_lora(second, directory)
    third = load_lora(directory, name="x")
    for adapter in (second, third):
        assert adapter.config == first.config
        assert list(adapter.layers) == sorted(first.layers)
        for path, layer in first.layers.items():
            read = adapter.layers[path]
            for field in dataclasses.fields(LoraLayer):
                np.testing.assert_array_equal(getattr(read, field.name), getattr(layer, field.name))
