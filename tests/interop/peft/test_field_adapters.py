"""Adapters as people have them: old heads, stored embeddings, wrapped names, other programs' files."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from interop import load_base, load_lora, load_xlora, save_lora
from interop.experts import fit_adapters
from interop.storage.errors import FormatError
from tests.helpers.adapters import assert_same_files, edit_config, edit_tensors, fresh_base, make_adapter
from tests.helpers.families import make_model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base"), "llama")


@pytest.fixture
def lora(llama: Path, tmp_path: Path) -> Path:
    return make_adapter(llama, tmp_path / "lora", target_modules=["q_proj", "up_proj"])


@pytest.mark.parametrize(
    ("task", "auto"),
    [("SEQ_CLS", AutoModelForSequenceClassification), ("TOKEN_CLS", AutoModelForTokenClassification)],
)
def test_a_head_that_only_the_task_implies(task: str, auto, llama: Path, tmp_path: Path) -> None:
    """As PEFT 0.10 wrote it: the head is stored, and modules_to_save is null."""
    torch.manual_seed(0)
    model = auto.from_pretrained(llama, num_labels=3)
    get_peft_model(model, LoraConfig(task_type=task, r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    whole = load_lora(tmp_path, name="a")
    old = load_lora(edit_config(tmp_path, modules_to_save=None), name="a")
    assert old.head.keys() == whole.head.keys() >= {"score.weight"}
    np.testing.assert_array_equal(old.head["score.weight"], whole.head["score.weight"])
    assert load_xlora(llama, adapters={"a": tmp_path}).module.config.num_labels == 3
    # Without any head of its own it leaves the base's.
    edit_tensors(tmp_path, lambda stored: {key: tensor for key, tensor in stored.items() if "score" not in key})
    assert not load_lora(tmp_path).head


def test_embeddings_that_equal_the_bases(llama: Path, tmp_path: Path) -> None:
    model = get_peft_model(fresh_base(llama), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {key for key in stored if "lora" not in key} == {
        "base_model.model.model.embed_tokens.weight",
        "base_model.model.lm_head.weight",
    }
    adapter = load_lora(tmp_path / "a")
    fit_adapters([adapter], load_base(llama))
    assert load_xlora(llama, adapters={"a": tmp_path / "a"}).expert_names == ("a",)
    save_lora(adapter, tmp_path / "b")
    assert_same_files(tmp_path / "a", tmp_path / "b")
    # Trained or resized ones are another base.
    for change in (lambda table: table + 1, lambda table: torch.cat([table, table[:3]])):
        path = tmp_path / "a" / "adapter_model.safetensors"
        key = "base_model.model.model.embed_tokens.weight"
        save_file({**stored, key: change(stored[key])}, path, {"format": "pt"})
        with pytest.raises(FormatError, match=r"brings its own weights of model\.embed_tokens .* not the base's"):
            load_xlora(llama, adapters={"a": tmp_path / "a"})


def test_modules_to_save_that_the_base_has_not(llama: Path, lora: Path) -> None:
    for name in ("score", "classifier", "a_module_of_another_model"):
        edit_config(lora, modules_to_save=[name])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            PeftModel.from_pretrained(fresh_base(llama), lora)  # so does PEFT
        fit_adapters([load_lora(lora)], load_base(llama))
    edit_config(lora, modules_to_save=["lm_head"])
    with pytest.raises(FormatError, match=r"modules_to_save names 'lm_head', which the base has .* was cut"):
        fit_adapters([load_lora(lora)], load_base(llama))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda key: f"_orig_mod.{key}",
        lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
        lambda key: key.replace(".layers.", "._fsdp_wrapped_module.layers.").replace(
            ".self_attn", "._fsdp_wrapped_module.self_attn"
        ),
        lambda key: key.replace(".self_attn.", "._checkpoint_wrapped_module.self_attn."),
        lambda key: f"_forward_module.module.{key}",
        lambda key: key.replace(".mlp.", "._fsdp_wrapped_module._checkpoint_wrapped_module.mlp."),
    ],
)
def test_names_with_wrappers(wrap, llama: Path, lora: Path) -> None:
    base = load_base(llama)
    (plain,) = fit_adapters([load_lora(lora)], base)
    edit_tensors(lora, lambda stored: {wrap(key): tensor for key, tensor in stored.items()})
    (wrapped,) = fit_adapters([load_lora(lora)], base)
    assert wrapped.layers.keys() == plain.layers.keys()
    for path, layer in plain.layers.items():
        np.testing.assert_array_equal(wrapped.layers[path].b, layer.b)


def test_an_adapter_saved_under_a_name(llama: Path, tmp_path: Path) -> None:
    model = get_peft_model(fresh_base(llama), LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="math")
    model.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"adapters in its folders 'math'"):
        load_lora(tmp_path)
    load_lora(tmp_path / "math")


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("model.layers.0.self_attn.q_proj.lora_a", "MLX adapter"),
        ("layers.0.attn.q_proj.lora_a.weight", "torchtune's keys"),
        ("decoder.layers.0.self_attn.q_proj.lora_A", "as fairseq names them"),
        ("transformer.h.0.attn.lora_A", "loralib's keys"),
        ("lora_unet_down_blocks_0.lora_down.weight", "diffusion model"),
        ("base_model.model.model.layers.0.mlp.lokr_w1", "LoKr"),
        ("decoder.layers.0.self_attention.linear_qkv.adapter.linear_in.weight", "Megatron"),
    ],
)
def test_keys_of_other_programs_are_named(key: str, words: str, lora: Path) -> None:
    edit_tensors(lora, lambda stored: {key: torch.ones(2, 2)})
    with pytest.raises(FormatError, match=words):
        load_lora(lora)


def test_experts_of_the_bases_own_mixture_are_named(llama: Path, lora: Path) -> None:
    edit_tensors(
        lora,
        lambda stored: {key.replace("self_attn.q_proj", "mlp.experts.3.w1"): tensor for key, tensor in stored.items()},
    )
    with pytest.raises(FormatError, match=r"experts of the base's own mixture \(MoE\)"):
        fit_adapters([load_lora(lora)], load_base(llama))


def test_files_of_other_programs_are_named(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"fine_tune_type": "lora", "num_layers": 8, "lora_parameters": {"rank": 8, "scale": 20.0}})
    )
    with pytest.raises(FormatError, match="MLX adapter"):
        load_lora(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    save_file({"model.layers.0.self_attn.q_proj.lora_a": torch.ones(2, 2)}, tmp_path / "adapters.safetensors")
    with pytest.raises(FileNotFoundError, match="MLX adapter"):
        load_lora(tmp_path)


def test_empty_tensors_of_zero_3(lora: Path) -> None:
    edit_tensors(lora, lambda stored: {key: torch.zeros(0, dtype=torch.bfloat16) for key in stored})
    with pytest.raises(FormatError, match=r"hold no values \(shape \[0\]\).*ZeRO-3.*zero_to_fp32"):
        load_lora(lora)


@pytest.mark.parametrize("field", [{"alpha": 32}, {"unsloth_fixed": True}, {"a": 1, "b": [2]}])
def test_fields_that_peft_drops(field: dict, lora: Path, tmp_path: Path) -> None:
    plain = load_lora(lora)
    with pytest.warns(UserWarning, match="fields that PEFT doesn't know") as caught:
        adapter = load_lora(edit_config(lora, **field))
    assert len(caught) == 1
    assert all(name in str(caught[0].message) for name in field)
    assert {path: layer.scale for path, layer in adapter.layers.items()} == {
        path: layer.scale for path, layer in plain.layers.items()
    }
    assert peft.__version__.startswith("0.21")
    with pytest.raises(FormatError, match=r"unknown field .* written by PEFT 0\.99\.0"):
        load_lora(edit_config(lora, peft_version="0.99.0"))
