"""One LoRA adapter from an X-LoRA and constant gates: PEFT's own merges, and the formula at every layer."""

from __future__ import annotations

import copy
import dataclasses
import json

import numpy as np
import peft
import pytest
import torch

from interop import as_model, load_lora, merge_experts, save_lora, save_xlora
from tests.helpers.adapters import make_adapter
from tests.helpers.cli import invoke
from tests.helpers.ours import our_xlora
from tests.helpers.reference import Expert, base_run, peft_xlora, prompt, relative_error, tensors, torch_base
from xlora_jax import Rows, mean_gates

TOLERANCE = 1e-5
UNEQUAL = (
    Expert(2, 4, ("q_proj", "down_proj")),
    Expert(5, 5, ("q_proj", "up_proj"), layers=(0, 2)),
    Expert(3, 4, ("q_proj", "down_proj"), more={"use_rslora": True}),
)


@pytest.fixture(scope="module")
def model(base, experts):
    base_dir = base("llama")
    adapters = experts(base_dir, UNEQUAL)
    settings = {"layerwise_scalings": True, "top_k_lora": 2, "global_scaling_weight": 0.7}
    return our_xlora(base_dir, adapters, peft_xlora(base_dir, adapters, **settings), **settings)


def peft_logits(base_dir, adapter, **inputs):
    """Logits of PEFT with the adapter of a directory."""
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(torch_base(base_dir)), str(adapter)).eval()
    with torch.no_grad():
        return theirs(**tensors(inputs)).logits.numpy()


def weighted_in_peft(base_dir, adapters, weights, **options):
    """PEFT's model with its own merge of the adapters, active."""
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(torch_base(base_dir)), str(adapters[0]), adapter_name="0")
    for number, adapter in enumerate(adapters[1:], 1):
        theirs.load_adapter(str(adapter), adapter_name=str(number))
    theirs.add_weighted_adapter([str(n) for n in range(len(adapters))], list(weights), "merged", **options)
    theirs.set_adapter("merged")
    return theirs.eval()


@pytest.mark.parametrize("scan", [True, False])
def test_exact_merge_in_peft_equals_the_model_with_these_gates(model, base, scan, tmp_path):
    """A gate for each layer and expert, some of them zero, one layer without any."""
    base_dir = base("llama")
    gates = np.random.default_rng(0).normal(size=(len(model.layers), 3))
    gates[1, 2] = 0
    gates[4] = 0
    adapter = merge_experts(model if scan else model.unstacked(), gates)
    save_lora(adapter, tmp_path / "merged")
    inputs = prompt(2, 9)
    wanted = dataclasses.replace(model, config=dataclasses.replace(model.config, top_k_lora=None,
                                 global_scaling_weight=1.0))(**inputs, scalings=gates).logits  # fmt: skip
    assert relative_error(peft_logits(base_dir, tmp_path / "merged", **inputs), wanted) <= TOLERANCE
    assert relative_error(as_model(load_lora(tmp_path / "merged"), model)(**inputs).logits, wanted) <= TOLERANCE
    assert relative_error(base_run(base_dir, **inputs), wanted) > 1e-2
    config = json.loads((tmp_path / "merged" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 10
    assert not config.get("rank_pattern")
    # up_proj is adapted in two of the three blocks, so short names would select too many modules.
    assert set(config["target_modules"]) == set(model.layer_names)


@pytest.mark.parametrize("rank", [None, 4])
def test_same_as_pefts_own_merge(base, experts, rank, tmp_path):
    """Of experts in all blocks: it fails where a module of the targets has none."""
    base_dir = base("llama")
    adapters = experts(base_dir, [dataclasses.replace(expert, layers=None) for expert in UNEQUAL])
    weights = (0.5, 0.2, 0.9)
    options = {"combination_type": "cat"} if rank is None else {"combination_type": "svd", "svd_rank": rank}
    theirs = weighted_in_peft(base_dir, adapters, weights, **options)
    save_lora(merge_experts(our_xlora(base_dir, adapters), weights, rank=rank), tmp_path / "merged")
    inputs = prompt(2, 9)
    with torch.no_grad():
        wanted = theirs(**tensors(inputs)).logits.numpy()
    assert relative_error(peft_logits(base_dir, tmp_path / "merged", **inputs), wanted) <= TOLERANCE
    if rank is not None:
        assert load_lora(tmp_path / "merged").config["r"] == rank
        exact = weighted_in_peft(base_dir, adapters, weights, combination_type="cat")
        with torch.no_grad():
            assert relative_error(exact(**tensors(inputs)).logits, wanted) > 1e-2


def test_a_cut_is_the_best_of_its_rank(model):
    """Its error is that of the singular values left out, at every layer."""
    gates = np.random.default_rng(1).uniform(0.1, 1, (len(model.layers), 3))
    exact, cut = merge_experts(model, gates), merge_experts(model, gates, rank=3)
    for path in model.layer_names:
        whole = exact.layers[path].a.astype(np.float64) @ exact.layers[path].b
        part = cut.layers[path].a.astype(np.float64) @ cut.layers[path].b
        left = np.linalg.svd(whole, compute_uv=False)[3:]
        assert np.isclose(np.linalg.norm(whole - part), np.linalg.norm(left), rtol=1e-4, atol=1e-5)
        assert cut.layers[path].a.shape[-1] == 3


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.filterwarnings("ignore:Adapter 'default'. .* LoRA tensor.s. have invalid shape")
@pytest.mark.parametrize("kind", ["embedding", "lora_bias"])
def test_embeddings_and_biases(kind, base, experts, tmp_path):
    base_dir = base("llama")
    if kind == "embedding":
        adapters = experts(base_dir, "embedding")
    else:
        # A bias in some of the layers that the merged adapter has.
        options = {
            "one": {"target_modules": ["q_proj", "down_proj"], "lora_bias": True},
            "two": {"target_modules": ["o_proj"]},
        }
        adapters = [make_adapter(base_dir, tmp_path / name, **more) for name, more in options.items()]
    ours = our_xlora(base_dir, adapters)
    gates = np.random.default_rng(2).uniform(0.1, 1, (len(ours.layers), len(adapters)))
    save_lora(merge_experts(ours, gates), tmp_path / "merged")
    inputs = prompt(2, 9)
    wanted = ours(**inputs, scalings=gates).logits
    assert relative_error(peft_logits(base_dir, tmp_path / "merged", **inputs), wanted) <= TOLERANCE
    assert relative_error(base_run(base_dir, **inputs), wanted) > 1e-2


def test_mean_gates_are_those_of_the_predicted_tokens(model):
    inputs = prompt(5, 12)
    labels = np.where(np.arange(12) < np.arange(5)[:, None], -100, inputs["input_ids"])
    labels[2, 5:] = -100
    gates = mean_gates(model.xlora, model.params, Rows.from_tokens(inputs["input_ids"], labels), batch_size=2)
    scalings = np.asarray(model(inputs["input_ids"]).scalings, np.float64)
    kept = np.where(scalings > scalings.min(axis=-1, keepdims=True), scalings, 0) * 0.7
    predicts = np.zeros((5, 12), bool)
    predicts[:, :-1] = labels[:, 1:] != -100
    np.testing.assert_allclose(gates, kept[predicts].mean(axis=0), rtol=1e-5)
    with pytest.raises(ValueError, match="expected rows with tokens to predict"):
        mean_gates(model.xlora, model.params, Rows.from_tokens(inputs["input_ids"], np.full_like(labels, -100)))


def test_refusals(model):
    with pytest.raises(ValueError, match=r"gates: expected \[\d+, 3\]"):
        merge_experts(model, np.ones(4))
    with pytest.raises(ValueError, match="expected finite numbers"):
        merge_experts(model, [1, np.nan, 1])
    with pytest.raises(ValueError, match="rank: expected at least 1"):
        merge_experts(model, 1.0, rank=0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_command(text_files, tmp_path):
    folder, base_dir, adapters = text_files
    model = our_xlora(base_dir, adapters[:2], peft_xlora(base_dir, adapters[:2]))
    save_xlora(model, tmp_path / "xlora")
    given = ["merge", "--base", base_dir, "--checkpoint", tmp_path / "xlora", "--data", folder / "train.jsonl"]
    given += ["--eval", f"held={folder / 'held.jsonl'}", "--length", 32, "--output", tmp_path / "merged"]
    done = invoke([*given, "--rank", 2])
    assert done.exit_code == 0, done.output
    assert load_lora(tmp_path / "merged").config["r"] == 2
    (line,) = (line for line in done.output.splitlines() if line.startswith("│ held"))
    base_loss, xlora_loss, exact_loss, cut_loss = (float(cell) for cell in line.strip("│").split("│")[1:])
    assert len({base_loss, xlora_loss, exact_loss, cut_loss}) == 4

    # The loss of the table is PEFT's with the written adapter, on the tokens that are learned.
    from interop import load_codec
    from xlora_jax import encode_records, lay_out, read_records

    records = encode_records(read_records(folder / "held.jsonl"), load_codec(base_dir))
    rows = lay_out(records, 32, pack=False).arrays
    logits = peft_logits(base_dir, tmp_path / "merged", input_ids=rows["input_ids"])
    labels = torch.as_tensor(rows["labels"][:, 1:].astype(np.int64))
    loss = torch.nn.functional.cross_entropy(torch.as_tensor(logits[:, :-1]).transpose(1, 2), labels, ignore_index=-100)
    assert cut_loss == pytest.approx(loss.item(), abs=1e-4)

    (tmp_path / "merged" / "mine.txt").write_text("")
    refused = invoke(given)
    assert refused.exit_code == 1
    assert "mine.txt" in refused.output
