"""Adapters that bring a classification head, and decoders with one: logits, loss, files, as transformers and PEFT."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
from peft import PeftConfig, PeftModel, XLoraConfig, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import xlora_jax
from interop import load_base, load_lora, load_xlora, save_base, save_lora, save_xlora
from interop.experts import fit_adapters
from interop.inspection import inspect_path
from interop.model import open_xlora
from interop.peft.heads import choose_head, head_of
from interop.storage.errors import FormatError
from tests.helpers.encoders import CASES, adapters_on, encoder_inputs, make_encoder, run_encoder
from tests.helpers.families import MODELS
from tests.helpers.reference import peft_run, prompt, randomize, relative_error
from xlora_jax import init_train_state
from xlora_jax.models.decoder import last_token
from xlora_jax.training.classification import classification_loss, make_objective_step

TOLERANCE = 1e-5
LABELS = 5
AUTO: dict[str, Any] = {
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
}
# Families that differ from Llama in names, in what stands behind the blocks, or in what their language models do to
# logits.
DECODERS = [(name, "SEQ_CLS") for name in ("llama", "phi", "gemma2", "gemma3_text", "gpt_neox", "gpt2", "opt")]
DECODERS += [(name, "TOKEN_CLS") for name in ("llama", "gpt2", "gpt_neox")]


def eagerly(model: Any, **inputs: Any) -> Any:
    """Operation by operation: nothing to compile for a model that is called once."""
    with jax.disable_jit():
        return model(**inputs)


def classifier_on(base_dir: Path, task: str) -> Any:
    """The base in transformers with a new head."""
    return AUTO[task].from_pretrained(base_dir, num_labels=LABELS, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def llama(base):
    return base("llama")


@pytest.fixture(scope="module")
def experts(llama, tmp_path_factory):
    """`experts(task)`: directories of three adapters of Llama, each with a head of its own."""
    return {
        task: adapters_on(
            classifier_on(llama, task), ["q_proj", "v_proj", "down_proj"], tmp_path_factory.mktemp(task), task_type=task
        )
        for task in AUTO
    }


# ---------------------------------------------------------------------------------------------------------------------
# Decoders with a head of their own


@pytest.mark.slow
@pytest.mark.parametrize(("family", "task"), DECODERS)
def test_logits_of_decoders(family, task, tmp_path):
    options = {**MODELS[family].options, "num_labels": LABELS}
    model = AUTO[task].from_config(CONFIG_MAPPING[family](**options), dtype=torch.float32).eval()
    randomize(model, 0)
    model.save_pretrained(tmp_path)
    ours = load_base(tmp_path, dtype=jnp.float32, scan_layers=False)
    left, right = prompt(3, 9, "left"), prompt(3, 9, "right", seed=1)
    inputs = {name: np.concatenate([left[name], right[name]]) for name in left}
    out = eagerly(ours, **inputs).logits
    where = inputs["attention_mask"] if task == "TOKEN_CLS" else None
    assert relative_error(out, run_encoder(model, inputs).logits, where) <= TOLERANCE
    with pytest.raises(NotImplementedError, match="does not generate"):
        ours.generate(inputs["input_ids"], max_new_tokens=2)


def test_which_token_is_the_last(llama):
    model = classifier_on(llama, "SEQ_CLS")
    ids, mask = prompt(3, 9, "right").values()
    ids[0, 3:6] = 0  # padding in the middle ends nothing
    embeds = np.random.default_rng(0).normal(size=(2, 7, 48)).astype(np.float32)

    def theirs(**inputs: Any) -> list[int]:
        """The position whose class transformers gives."""
        with torch.no_grad():
            hidden = run_encoder(model.model, inputs).last_hidden_state
            return (model.score(hidden) == run_encoder(model, inputs).logits[:, None]).all(-1).int().argmax(1).tolist()

    assert last_token((3, 9), 0, ids, None).tolist() == theirs(input_ids=ids) == [8, 6, 4]
    assert last_token((3, 9), 0, ids, mask).tolist() == theirs(input_ids=ids, attention_mask=mask)
    assert last_token((2, 7), 0, None, None).tolist() == theirs(inputs_embeds=embeds) == [6, 6]
    model.config.pad_token_id = None
    assert last_token((1, 9), None, ids[:1], None).tolist() == theirs(input_ids=ids[:1]) == [8]
    with pytest.raises(ValueError, match="batch sizes > 1"):
        theirs(input_ids=ids)
    with pytest.raises(ValueError, match="pass attention_mask, or one row at a time"):
        last_token((3, 9), None, ids, None)
    # Where transformers gives up the mask tells.
    assert last_token((3, 9), None, ids, mask).tolist() == [8, 6, 4]


# ---------------------------------------------------------------------------------------------------------------------
# Heads that adapters bring


def assert_is_pefts(base_dir: Path, model: Any, adapter: Path, inputs: dict[str, Any], where: Any) -> None:
    """One expert at gate 1 is PEFT's adapter, its head included; `model` has another head."""
    ours = load_xlora(base_dir, adapters={"only": adapter}, dtype=jnp.float32, scan_layers=False)
    out = eagerly(ours, **inputs, scalings=[1.0]).logits
    own_head = run_encoder(model, inputs).logits
    theirs = run_encoder(PeftModel.from_pretrained(model, str(adapter)).eval(), inputs).logits
    assert relative_error(out, theirs, where) <= TOLERANCE
    assert relative_error(own_head, theirs, where) > 1e-2


@pytest.mark.parametrize("task", AUTO)
def test_a_decoders_adapter_with_a_head_is_pefts(task, llama, experts):
    inputs = prompt(3, 9, "left")
    where = inputs["attention_mask"] if task == "TOKEN_CLS" else None
    assert_is_pefts(llama, classifier_on(llama, task), experts[task][0], inputs, where)


@pytest.mark.parametrize("saved_as", ["another head", "no head"])
@pytest.mark.parametrize("case", CASES)
def test_an_encoders_adapter_with_a_head_is_pefts(case, saved_as, tmp_path):
    """The base was saved from another class: what it has of a head is not what the adapter goes with."""
    model = make_encoder(case, tmp_path / "full")
    body = getattr(model, model.base_model_prefix)
    base_dir = tmp_path / "base"
    if saved_as == "no head":
        body.save_pretrained(base_dir)
    else:
        stem = type(model).__name__.split("For")[0]
        other = getattr(transformers, f"{stem}ForMasked{'ImageModeling' if case == 'vit' else 'LM'}")(model.config)
        getattr(other, other.base_model_prefix).load_state_dict(body.state_dict(), strict=False)
        if case.startswith("modernbert"):
            other.head.load_state_dict(model.head.state_dict())
        other.save_pretrained(base_dir)
        if case == "bert sequence":  # which alone needs the pooler, and pretraining has it
            other = transformers.BertForPreTraining(model.config)
            other.bert.load_state_dict(body.state_dict())
            other.save_pretrained(base_dir)
    if case.startswith("bert"):
        # As the hub's oldest files name them.
        tensors = load_file(base_dir / "model.safetensors")
        old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        for new, name in old.items():
            tensors = {key.replace(new, name): tensor for key, tensor in tensors.items()}
        save_file(tensors, base_dir / "model.safetensors", {"format": "pt"})
    task = None if case == "vit" else "SEQ_CLS" if "sequence" in case else "TOKEN_CLS"
    more = {"modules_to_save": ["classifier"]} if task is None else {}
    targets = [name for name in CASES[case][2] if "classifier" not in name and name != "head.dense"]
    adapters = adapters_on(model, targets, tmp_path, task_type=task, **more)
    inputs = encoder_inputs(case)
    where = inputs["attention_mask"] if task == "TOKEN_CLS" else None
    if case.startswith("modernbert") and saved_as == "no head":
        # Its head begins with a layer of pretraining, which PEFT does not save: transformers makes a random one.
        with pytest.raises(FormatError, match=r"Missing: head\.dense"):
            load_xlora(base_dir, adapters={"only": adapters[0]})
        return
    assert_is_pefts(base_dir, model, adapters[0], inputs, where)


def test_distilberts_head_is_two_layers(tmp_path):
    """Both are saved, by name or because PEFT matches the ends of names; the card counts the classes of the second."""
    model = make_encoder("distilbert sequence", tmp_path / "base")
    named = {"task_type": "SEQ_CLS", "modules_to_save": ["pre_classifier", "classifier"]}
    (adapter, *_) = adapters_on(model, ["q_lin", "lin1"], tmp_path, **named)
    inputs = encoder_inputs("distilbert sequence")
    assert_is_pefts(tmp_path / "base", model, adapter, inputs, None)
    ours = load_xlora(tmp_path / "base", adapters={"only": adapter}, dtype=jnp.float32)
    with pytest.warns(UserWarning, match="outside of `model.`"):
        save_xlora(ours, tmp_path / "x")
    assert "num_labels=5" in (tmp_path / "x/README.md").read_text()
    again = load_xlora(tmp_path / "base", checkpoint=tmp_path / "x", dtype=jnp.float32)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, again.params, ours.params)))


@pytest.mark.slow
@pytest.mark.parametrize("task", AUTO)
def test_xlora_with_a_head_is_pefts_by_way_of_an_export(task, llama, experts, tmp_path):
    """PEFT loads what is written here, its head too; the gate learns, and the head stays."""
    adapters = {name: str(path) for name, path in zip("abc", experts[task], strict=True)}
    # What PEFT's own X-LoRA makes of these adapters, which is why there is nothing of its own to compare with.
    settings = XLoraConfig(task_type=task, hidden_size=48, adapters={"0": adapters["a"]})
    without_cache = classifier_on(llama, task)
    without_cache.config.use_cache = False
    with pytest.raises(KeyError, match=r"model\.score\.weight"):
        get_peft_model(without_cache, settings)
    with pytest.raises(FormatError, match=r"heads that differ .*Choose whose to use: head='a'"):
        load_xlora(llama, adapters=adapters)
    config = xlora_jax.XLoraConfig(hidden_size=48, adapters={}, layerwise_scalings=True, softmax_temperature=0.5)
    ours = load_xlora(llama, adapters=adapters, config=config, head="b", dtype=jnp.float32)
    kernel = np.random.default_rng(1).normal(size=(48, 3 * len(ours.layer_names))).astype(np.float32) * 0.3
    classifier = {"dense_0": {"kernel": jnp.asarray(kernel), "bias": jnp.zeros(kernel.shape[1])}}
    ours = ours.replace(params={**ours.params, "classifier": classifier})
    save_xlora(ours, tmp_path / "x")
    # PEFT's class for tokens can't hold an X-LoRA, its general one can.
    in_peft = json.loads((tmp_path / "x/adapter_config.json").read_text())["task_type"]
    assert in_peft == (None if task == "TOKEN_CLS" else task)
    assert f"AutoModelFor{'Sequence' if task == 'SEQ_CLS' else 'Token'}Classification" in (
        (tmp_path / "x/README.md").read_text()
    )

    without_cache = classifier_on(llama, task)
    without_cache.config.use_cache = False
    theirs = PeftModel.from_pretrained(
        without_cache, tmp_path / "x", config=PeftConfig.from_pretrained(tmp_path / "x")
    ).eval()
    inputs = prompt(3, 9, "left")
    mask = inputs["attention_mask"]
    where = mask if task == "TOKEN_CLS" else None
    logits, scalings = peft_run(theirs, **inputs)
    out = ours(**inputs)
    assert relative_error(out.scalings, scalings, mask) <= TOLERANCE
    assert relative_error(out.logits, logits, where) <= TOLERANCE

    again = load_xlora(llama, checkpoint=tmp_path / "x", dtype=jnp.float32)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, again.params, ours.params)))
    save_xlora(open_xlora(str(llama), checkpoint=tmp_path / "x", dtype="float32"), tmp_path / "unread")
    first, second = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("x", "unread"))
    assert first == second
    with pytest.raises(FormatError, match="layout 'xlora' has no place for a classification head"):
        save_xlora(ours, tmp_path / "original", layout="xlora")

    labels = np.random.default_rng(2).integers(0, LABELS, np.shape(out.logits)[:-1])
    if task == "TOKEN_CLS":
        labels[mask == 0] = -100
    with torch.no_grad():
        given = {name: torch.as_tensor(value).long() for name, value in inputs.items()}
        loss = float(theirs(**given, labels=torch.as_tensor(labels)).loss)
    assert abs(float(classification_loss(out.logits, jnp.asarray(labels))) - loss) <= 1e-5 * loss
    optimizer = optax.adam(3e-2)
    state, frozen = init_train_state(ours.params, ours.config, optimizer)
    step = make_objective_step(ours.xlora, optimizer)
    losses = []
    for _ in range(8):
        state, metrics = step(state, frozen, {**inputs, "labels": labels})
        losses.append(float(metrics["loss"]))
    assert abs(losses[0] - loss) <= 1e-5 * loss
    assert losses[-1] < loss - 1e-2


def test_one_head_that_all_share_is_used(llama, experts, tmp_path):
    first = load_lora(experts["SEQ_CLS"][0])
    second = load_lora(experts["SEQ_CLS"][1])
    save_lora(replace(second, head=first.head), tmp_path / "same")
    save_lora(second.factors_only(), tmp_path / "none")
    adapters = {"a": first.path, "b": tmp_path / "same", "c": tmp_path / "none"}
    shared = load_xlora(llama, adapters=adapters)
    chosen = load_xlora(llama, adapters={**adapters, "b": second.path}, head="a")
    for model in (shared, chosen):
        assert np.array_equal(model.params["base"]["score"]["kernel"], first.head["score.weight"].T)
        assert "lm_head" not in model.params["base"]
    with pytest.raises(ValueError, match="expected an expert that brings a classification head: 'a', 'b'"):
        load_xlora(llama, adapters=adapters, head="c")
    with pytest.raises(ValueError, match="has not the classification head that adapter 'a'"):
        load_xlora(load_base(llama), adapters=adapters)
    with_head = load_base(llama, head=choose_head([first]))
    assert load_xlora(with_head, adapters=adapters).params["base"] is with_head.params
    with pytest.raises(ValueError, match="make_objective_step"):
        xlora_jax.training.step.batch_loss(shared.xlora, {}, shared.params, {})


def test_inspecting_says_what_head_there_is(llama, experts):
    found = inspect_path(str(experts["SEQ_CLS"][0]), str(llama))
    assert found.facts["head"] == "score.weight [5, 48]"
    assert found.facts["fits the base"].startswith("yes, 9 of its layers")
    assert not found.refused


def test_files_keep_the_head(llama, experts, tmp_path):
    """An adapter comes back bit for bit, and a base with a head that was brought is one that transformers loads."""
    adapter = load_lora(experts["TOKEN_CLS"][0])
    save_lora(adapter, tmp_path / "lora")
    ours, theirs = (
        load_file(path / "adapter_model.safetensors") for path in (tmp_path / "lora", experts["TOKEN_CLS"][0])
    )
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)

    model = load_xlora(llama, adapters={"a": adapter.path}, dtype=jnp.float32)
    save_base(xlora_jax.BaseModel(model.module, model.params["base"], model.origin.base), tmp_path / "base")
    saved = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "base").eval()
    inputs = prompt(2, 7)
    logits = run_encoder(saved, inputs).logits
    assert relative_error(eagerly(load_base(tmp_path / "base", scan_layers=False), **inputs).logits, logits) <= 1e-5
    assert np.array_equal(saved.score.weight.detach().numpy(), adapter.head["score.weight"])


def test_heads_that_cannot_be_are_refused_by_name(llama, experts, tmp_path):
    adapter = load_lora(experts["SEQ_CLS"][0], name="math")

    def saved(config: dict[str, Any], **head: Any) -> Path:
        save_lora(replace(adapter, config={**adapter.config, **config}, head=head), tmp_path / "lora")
        return tmp_path / "lora"

    classifier = load_base(llama, head=head_of(adapter))
    with pytest.raises(FormatError, match=r"modules_to_save names 'score', which the base has .* was cut"):
        fit_adapters([load_lora(saved({}))], classifier)
    with pytest.raises(FormatError, match=r"'math'.*'base_model.model.score.weight' has shape \[5\]"):
        load_lora(saved({}, **{"score.weight": np.ones(5, np.float32)}), name="math")
    table = {"model.embed_tokens.weight": np.ones((80, 48), np.float32)}
    with pytest.raises(FormatError, match=r"modules_to_save = \['embed_tokens'\] can't be an expert"):
        load_lora(saved({"modules_to_save": ["score", "embed_tokens"]}, **adapter.head, **table))
    with pytest.raises(FormatError, match=r"\(classifier.weight\) that llama has not; expected score"):
        load_xlora(llama, adapters={"math": saved({}, **{"classifier.weight": np.ones((5, 48), np.float32)})})
    more = {**adapter.head, "score.out_proj.weight": np.ones((5, 48), np.float32)}
    with pytest.raises(FormatError, match=r"expected score, with a weight .* or is more than a head"):
        load_xlora(llama, adapters={"math": saved({}, **more)})
    with pytest.raises(FormatError, match="neither its task_type, None, nor the base's architectures"):
        load_xlora(llama, adapters={"math": saved({"task_type": None}, **adapter.head)})
    with pytest.raises(FormatError, match=r"'score.weight': expected shape \[5, 48\]"):
        load_xlora(llama, adapters={"math": saved({}, **{"score.weight": np.ones((5, 40), np.float32)})})
