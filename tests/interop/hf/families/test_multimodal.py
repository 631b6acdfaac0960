"""Multimodal models, of which the text side is built: files in all their spellings, adapters, and files back."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForImageTextToText

from interop import load_base, load_xlora, save_base, save_lora, save_xlora
from interop.hf.config import read_config
from interop.hf.families.registry import FAMILIES
from interop.hf.generation_config import load_generation_config
from interop.storage.errors import FormatError
from tests.helpers.families import MODELS, make_model
from tests.helpers.ours import our_xlora
from tests.helpers.reference import (
    base_run,
    make_adapter,
    make_experts,
    peft_run,
    prompt,
    relative_error,
    reload_in_peft,
    torch_base,
)
from xlora_jax import BaseModel

TOLERANCE = 1e-5
WARNING = "tensors of the vision side"
MULTIMODAL = [name for name, family in FAMILIES.items() if family.texts]
quietly = pytest.mark.filterwarnings(f"ignore:.*{WARNING}")


@pytest.fixture(scope="module", params=MULTIMODAL)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, make_model(tmp_path_factory.mktemp(request.param), request.param)


def respelled(base_dir: Path, to: Path, spell: Callable[[str], str]) -> Path:
    """A copy of a base whose tensors have other names."""
    shutil.copytree(base_dir, to)
    tensors = load_file(to / "model.safetensors")
    save_file({spell(name): tensor for name, tensor in tensors.items()}, to / "model.safetensors", {"format": "pt"})
    return to


def edited(base_dir: Path, to: Path, **changes: Any) -> Path:
    shutil.copytree(base_dir, to)
    config = json.loads((to / "config.json").read_text())
    config["text_config"] |= changes
    (to / "config.json").write_text(json.dumps(config))
    return to


def same(ours: Any, theirs: Any) -> bool:
    return bool(jax.tree.all(jax.tree.map(np.array_equal, ours, theirs)))


def test_the_vision_side_is_passed_over_with_one_warning(made: tuple[str, Path]) -> None:
    family, base_dir = made
    with pytest.warns(UserWarning, match=WARNING) as caught:
        load_base(base_dir)
    (warning,) = caught
    assert "\n" not in str(warning.message)
    assert all(part in str(warning.message) for part in FAMILIES[family].unread)


@quietly
def test_files_in_every_spelling_are_the_same_model(made: tuple[str, Path], tmp_path: Path) -> None:
    """As this transformers names tensors in memory, as version 4.50 wrote them, and of the class without a head."""
    family, base_dir = made
    plain = load_base(base_dir)
    (_, stored, *_), *_ = FAMILIES[family].starts

    def in_memory(name: str) -> str:
        if FAMILIES[family].is_unread(name):
            return f"model.{name.removeprefix('model.')}"
        if name.startswith(stored):
            return f"model.language_model.{name.removeprefix(stored)}"
        return "lm_head.weight"

    def old(name: str) -> str:
        name = in_memory(name)
        if name.startswith("model.language_model."):
            return name.replace("model.language_model.", "language_model.model.")
        return name.removeprefix("model.")

    names = {in_memory(name) for name in load_file(base_dir / "model.safetensors")}
    assert names <= set(torch_base(base_dir).state_dict())
    for number, spell in enumerate((in_memory, old)):
        assert same(load_base(respelled(base_dir, tmp_path / str(number), spell)).params, plain.params)
    unknown = respelled(base_dir, tmp_path / "unknown", lambda name: name.replace("q_proj", "query"))
    with pytest.raises(FormatError, match=r"Missing: .*q_proj.* Unexpected: .*query"):
        load_base(unknown)


@quietly
def test_adapters_of_the_language_side_load_in_every_spelling(made: tuple[str, Path], tmp_path: Path) -> None:
    _, base_dir = made
    adapter = make_adapter(base_dir, tmp_path / "new", 0, 3, 5, r"model\.language_model.*\.(?:q_proj|down_proj)")
    keys = load_file(adapter / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.model.language_model.layers.") for name in keys)
    loaded = load_xlora(base_dir, adapters={"a": adapter})
    for number, start in enumerate(("language_model.model.", "model.", "language_model.")):
        other = shutil.copytree(adapter, tmp_path / str(number))
        renamed = {name.replace("model.language_model.", start): tensor for name, tensor in keys.items()}
        save_file(renamed, other / "adapter_model.safetensors")
        again = load_xlora(base_dir, adapters={"a": other})
        assert same(again.params["experts"], loaded.params["experts"])
        assert again.layer_names == loaded.layer_names
        # What is written has the names of the whole model, which PEFT reads.
        save_lora(again.origin.adapters[0], tmp_path / f"saved {number}")
        written = load_file(tmp_path / f"saved {number}" / "adapter_model.safetensors")
        assert written.keys() == keys.keys()
        assert all(np.array_equal(written[name], keys[name]) for name in keys)


@quietly
def test_adapters_of_the_vision_side_are_refused_by_name(made: tuple[str, Path], tmp_path: Path) -> None:
    family, base_dir = made
    part = FAMILIES[family].unread[0]
    model = torch_base(base_dir)
    target = next(name for name, module in model.named_modules() if part in name and "Linear" in type(module).__name__)
    get_peft_model(
        AutoModelForImageTextToText.from_pretrained(base_dir), LoraConfig(target_modules=[target])
    ).save_pretrained(str(tmp_path / "vision"))
    base = load_base(base_dir)
    with pytest.raises(
        FormatError, match=rf"'seeing' .*vision side.*{part}.*Expected modules of 'model.language_model'"
    ):
        load_xlora(base, adapters={"seeing": tmp_path / "vision"})


@quietly
def test_a_base_comes_back_whole(made: tuple[str, Path], tmp_path: Path) -> None:
    _, base_dir = made
    base = load_base(base_dir)
    save_base(base, tmp_path / "saved")
    wanted, saved = (load_file(path / "model.safetensors") for path in (base_dir, tmp_path / "saved"))
    assert saved.keys() == wanted.keys()
    assert all(np.array_equal(saved[name], wanted[name]) for name in wanted)
    assert same(load_base(tmp_path / "saved").params, base.params)
    head = base.params["lm_head"]["kernel"] if "lm_head" in base.params else None
    if head is None:
        return
    # A head that differs from the table is a changed model, which transformers loads too.
    changed = BaseModel(base.module, {**base.params, "lm_head": {"kernel": head * 2}}, base.origin)
    save_base(changed, tmp_path / "changed")
    inputs = prompt(2, 9, "left")
    logits = base_run(tmp_path / "changed", **inputs)
    assert relative_error(logits, 2 * base_run(base_dir, **inputs), inputs["attention_mask"]) <= TOLERANCE


@quietly
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_peft_reads_an_export_over_the_whole_model(made: tuple[str, Path], tmp_path: Path) -> None:
    family, base_dir = made
    adapters = make_experts(base_dir, tmp_path, MODELS[family].experts())
    ours = our_xlora(base_dir, adapters, layerwise_scalings=True, top_k_lora=2)
    save_xlora(ours, tmp_path / "x")
    inputs = prompt(2, 9, "left")
    logits, scalings = peft_run(reload_in_peft(base_dir, tmp_path / "x"), **inputs)
    with jax.disable_jit():
        out = ours(**inputs)
    assert relative_error(out.scalings, scalings, inputs["attention_mask"]) <= TOLERANCE
    assert relative_error(out.logits, logits, inputs["attention_mask"]) <= TOLERANCE


@quietly
def test_the_dtype_may_be_that_of_the_text_side(tmp_path: Path) -> None:
    """As in Qwen3-VL's released configs."""
    base_dir = make_model(tmp_path / "base", "qwen3_vl")
    config = json.loads((base_dir / "config.json").read_text())
    config["text_config"]["dtype"] = "bfloat16"
    del config["dtype"]
    (base_dir / "config.json").write_text(json.dumps(config))
    assert load_base(base_dir).module.dtype == jnp.bfloat16


@quietly
def test_old_configs_of_qwen2_5_vl_are_flat(tmp_path: Path) -> None:
    base_dir = make_model(tmp_path / "new", "qwen2_5_vl")
    plain = load_base(base_dir)
    old = shutil.copytree(base_dir, tmp_path / "old")
    config = json.loads((old / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    text |= {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
    }
    (old / "config.json").write_text(json.dumps({**text, **config, "model_type": "qwen2_5_vl"}))
    with warnings.catch_warnings():
        # The fields are declared of the text side, and transformers has them in its config.
        warnings.filterwarnings("error", message=".*transformers ignores these fields")
        loaded = load_base(old)
    assert loaded.module == plain.module


def test_a_text_side_that_is_no_such_thing_is_refused_by_name(made: tuple[str, Path], tmp_path: Path) -> None:
    family, base_dir = made
    with pytest.raises(FormatError, match=r"field 'hidden_size': expected a whole number of at least 1, got null"):
        load_base(edited(base_dir, tmp_path / "size", hidden_size=None))
    with pytest.raises(FormatError, match=r"'vocab_size': expected a whole number from 1 to .*, got -3"):
        load_base(edited(base_dir, tmp_path / "vocabulary", vocab_size=-3))
    if family == "mistral3":  # the only one whose text side transformers builds by its own `model_type`
        with pytest.raises(FormatError, match=r"text_config: field 'model_type': expected 'mistral', got 'llama'"):
            load_base(edited(base_dir, tmp_path / "kind", model_type="llama"))
    config = json.loads((base_dir / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "text_config": [1]}))
    with pytest.raises(FormatError, match=r"field 'text_config': expected an object"):
        load_base(tmp_path)


def test_released_configs_leave_out_what_transformers_fills_in(tmp_path: Path) -> None:
    """As Gemma 3's of 4B do."""
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    vision = {"model_type": "siglip_vision_model", "hidden_size": 1152, "num_hidden_layers": 27}
    config = {"model_type": "gemma3", "text_config": text, "vision_config": vision}
    (tmp_path / "config.json").write_text(json.dumps(config))
    family, read = read_config(tmp_path / "config.json")
    assert family.model_type == "gemma3"
    assert read["text_config"]["num_attention_heads"] == 8


def test_softcapping_that_transformers_does_not_apply_is_refused(tmp_path: Path) -> None:
    base_dir = make_model(tmp_path / "base", "gemma3")
    with pytest.raises(FormatError, match="final_logit_softcapping"):
        load_base(edited(base_dir, tmp_path / "capped", final_logit_softcapping=3.0))


def test_generation_stops_at_the_token_of_the_nested_config(tmp_path: Path) -> None:
    base_dir = make_model(tmp_path / "base", "qwen3_vl")
    (base_dir / "generation_config.json").unlink()
    assert load_generation_config(edited(base_dir, tmp_path / "end", eos_token_id=7)).eos_token_id == 7
