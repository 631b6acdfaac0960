"""`xlora-jax inspect` on directories that real PEFT made."""

import json
import shutil

import huggingface_hub
import pytest
from typer.testing import CliRunner

from interop.hf.base import open_base
from interop.inspection import inspect_path
from interop.storage.tensors import LazyTensor
from tests.helpers import reference
from tests.helpers.hub import COMMIT, lay_out
from xlora_jax.cli.main import app


@pytest.fixture(scope="module")
def llama(base):
    return base("llama")


@pytest.fixture(scope="module")
def adapters(llama, experts):
    return experts(llama, "unequal")


@pytest.fixture(scope="module")
def checkpoint(llama, adapters, tmp_path_factory):
    """By PEFT 0.21, so without the tensors that it loses."""
    directory = tmp_path_factory.mktemp("xlora")
    reference.peft_xlora(llama, adapters, xlora_depth=2, layerwise_scalings=True, top_k_lora=2).save_pretrained(
        str(directory)
    )
    return directory


def inspect(*args):
    result = CliRunner().invoke(app, ["inspect", *map(str, args)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    # Cells fold: the words are compared without the table's lines and spaces.
    return result.exit_code, "".join(c for c in result.output if c.isalnum() or c in ".,:;_-/()[]>=")


def test_a_base_model_without_reading_it(llama, monkeypatch):
    monkeypatch.setattr(LazyTensor, "read", lambda tensor: pytest.fail(f"reads {tensor.name}"))
    found = inspect_path(llama)
    assert (found.kind, found.refused, found.notes) == ("base model", [], [])
    weights = open_base(llama).params
    assert weights["embed_tokens"]["embedding"].shape == (97, 48)
    assert found.facts == {
        "family": "llama (LlamaForCausalLM)",
        "backend": "flax",
        "parameters": f"{sum(p.numel() for p in reference.torch_base(llama).parameters()):,}",
        "dtype": "float32",
        "files": "model.safetensors",
        "sizes": "layers 3, hidden size 48, heads 6, kv heads 2, head size 12, feed-forward size 80, vocabulary 97",
        "can be adapted": "embed_tokens, lm_head; q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj in "
        "layers 0-2",
    }


def test_adapters(adapters, llama):
    found = [inspect_path(path) for path in adapters]
    assert [(f.kind, f.refused) for f in found] == [("LoRA adapter", [])] * 3
    assert found[1].facts["targets"] == "down_proj, gate_proj, up_proj in layers 0, 2"
    assert found[1].facts["trained on"] == str(llama)
    facts = found[2].facts
    assert (facts["rank"], facts["alpha"], facts["dtype"]) == ("3, 6", "4", "float32")
    assert facts["scale"] == "alpha / sqrt(r), rsLoRA: 1.63299, 2.3094"
    assert facts["parameters"] == f"{3 * (3 * (48 + 72) + 6 * (80 + 48)):,}"
    assert facts["written by"].startswith("PEFT 0.")


def test_all_at_once_against_a_base(llama, adapters, checkpoint):
    code, text = inspect("--base", llama, llama, *adapters, checkpoint)
    assert code == 0, text
    assert text.count("fitsthebase") == 4
    assert "yes,19ofitslayers" in text
    for words in ("top_k_lora2", "layerwise_scalingsTrue", "depth2:48->24->57,complete", "PEFTs", "wererecovered"):
        assert words in text, words


def test_another_base(base, adapters, checkpoint):
    other = base("llama", hidden_size=60, head_dim=10)
    code, text = inspect("--base", other, adapters[1], checkpoint)
    assert code == 1
    for words in ("model.layers.0.mlp.down_proj", "[80,48]", "[80,60]", "hidden_sizeis48"):
        assert words in text, words


def test_what_is_refused(llama, adapters, checkpoint, tmp_path):
    """Each with its reason, and what could still be told."""
    dora = shutil.copytree(adapters[0], tmp_path / "dora")
    config = json.loads((dora / "adapter_config.json").read_text())
    (dora / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    incomplete = shutil.copytree(checkpoint, tmp_path / "incomplete")
    shutil.rmtree(incomplete / "0")
    empty = tmp_path / "empty"
    (empty / "inside").mkdir(parents=True)
    shutil.copy(llama / "config.json", empty / "inside")
    paths = (dora, incomplete, empty, tmp_path / "nowhere", empty / "inside")
    code, text = inspect(adapters[0], *paths)
    assert code == 1
    assert [bool(inspect_path(path).refused) for path in (adapters[0], *paths)] == [False, *[True] * 5]
    for words in ("use_dora=True", "layers.0.weight", "PEFT0.20andlater", "Therearesomeinitsfoldersinside",
                  "nosuchdirectory", "noweights"):  # fmt: skip
        assert words in text, words


def test_experts_that_are_gone(llama, adapters, checkpoint, tmp_path):
    moved = shutil.copytree(checkpoint, tmp_path / "x")
    config = json.loads((moved / "adapter_config.json").read_text())
    config["adapters"]["1"] = "/no/where"
    (moved / "adapter_config.json").write_text(json.dumps(config))
    found = inspect_path(moved)
    assert found.facts["expert 1"] == "not found"
    assert found.facts["expert 0"].startswith("rank 2, k_proj, o_proj, q_proj, v_proj in layers 0-2 (")
    assert "1 at '/no/where'" in found.refused[0]


def test_a_base_that_is_none(adapters):
    code, text = inspect("--base", adapters[0], adapters[0])
    assert code == 1
    assert "noconfig.json" in text


def test_hub_ids_of_which_the_weights_are_not_there(llama, adapters, tmp_path, monkeypatch):
    """Of a base model nothing but its config is needed, nor fetched."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    lay_out(tmp_path, "org/base", COMMIT, {"config.json": (llama / "config.json").read_bytes()})
    lay_out(tmp_path, "org/lora", COMMIT, {p.name: p.read_bytes() for p in adapters[0].iterdir() if p.suffix != ".md"})
    code, text = inspect("--base", "org/base", "org/lora", "org/base", "org/gone")
    assert code == 1
    for words in ("yes,12ofitslayers(org/base)", "float32,byconfig.json;theweightsarenotdownloaded", "org/gone:nosuch"):
        assert words in text, words
