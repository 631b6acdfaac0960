"""Bases that are not ported to Flax: PyTorch code through torchax, against transformers, PEFT and the formula."""

from __future__ import annotations

import dataclasses
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

from interop import load_base, load_xlora, save_xlora
from interop.experts import unstack_experts
from interop.hf.families import registry
from interop.inspection import inspect_path
from interop.storage.errors import FormatError
from tests.helpers.reference import peft_layer_names, peft_run, peft_xlora, reload_in_peft, tensors
from tests.helpers.torch_models import MODELS, V, make_adapters, make_torch_model, reloaded, torch_inputs, torch_xlora
from xlora_jax import Job, TrainConfig, XLoraConfig, run_training
from xlora_jax.passes import forward
from xlora_jax.sharding import RULES, check_rules
from xlora_jax.training.step import causal_lm_loss, init_train_state, make_train_step

CONFIG = {"layerwise_scalings": True, "xlora_depth": 1, "softmax_temperature": 0.3}
NOTE = "is not ported to Flax, so it runs as PyTorch code through torchax"


@pytest.fixture(scope="module", params=MODELS)
def case(request, tmp_path_factory):
    """Name, base, adapters and our model, whose gates are far from uniform."""
    name = request.param
    folder = tmp_path_factory.mktemp(name)
    make_torch_model(name, folder / "base")
    adapters = make_adapters(name, folder / "base", folder)
    names = {str(i): str(path) for i, path in enumerate(adapters)}
    model = load_xlora(
        folder / "base",
        config=XLoraConfig(hidden_size=32, adapters=names, **CONFIG),
        backend="torchax",
    )
    return name, folder / "base", adapters, model


@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_both_passes_are_the_formula(case, padding):
    name, base_dir, adapters, model = case
    inputs = torch_inputs(name, padding)
    with torch.no_grad():
        logits, scalings, _ = torch_xlora(model, base_dir, adapters, inputs)
    out = model(**inputs)
    kept = inputs["attention_mask"] != 0 if name != "t5" else np.ones((2, 6), bool)
    assert scalings.std() > 0.05
    np.testing.assert_allclose(np.asarray(out.scalings)[kept], scalings.numpy()[kept], atol=1e-5)
    np.testing.assert_allclose(np.asarray(out.logits)[kept], logits.numpy()[kept], atol=1e-5, rtol=1e-5)
    assert np.isfinite(np.asarray(out.logits)).all()


def test_gradients_are_those_of_autograd(case):
    """Of a loss of both passes, with respect to the classifier and to the experts' matrices."""
    name, base_dir, adapters, model = case
    inputs = torch_inputs(name)
    weights = np.random.default_rng(1).normal(size=(V,)).astype(np.float32)
    logits, _, leaves = torch_xlora(model, base_dir, adapters, inputs)
    (torch.log_softmax(logits, -1) @ torch.from_numpy(weights)).mean().backward()

    def loss(learned):
        params = {**model.params, **learned}
        out = forward(model.xlora, params, **{key: jnp.asarray(value) for key, value in inputs.items()})
        return (jax.nn.log_softmax(out.logits) @ weights).mean()

    gradient = jax.jit(jax.grad(loss))({key: model.params[key] for key in ("classifier", "experts")})
    ours = {"kernel": gradient["classifier"]["dense_0"]["kernel"], "bias": gradient["classifier"]["dense_0"]["bias"]}
    for expert in unstack_experts(gradient["experts"], model.layers, model.origin.adapters):
        for layer, lora in expert.layers.items():
            ours |= {f"{expert.name} {layer} a": lora.a.T, f"{expert.name} {layer} b": lora.b.T}
    assert ours.keys() == leaves.keys()
    for key, theirs in leaves.items():
        assert float(theirs.grad.abs().max()) > 1e-6, key
        np.testing.assert_allclose(ours[key], theirs.grad.numpy(), atol=2e-5, rtol=2e-5, err_msg=key)


@pytest.mark.parametrize("name", ["gemma3_text", "olmoe"])
def test_pefts_own_x_lora(name, tmp_path):
    """For bases whose names PEFT's X-LoRA can load: numbers of layers, logits and scalings, and the way back."""
    make_torch_model(name, tmp_path / "base")
    targets = [["q_proj", "embed_tokens"], ["o_proj"]]
    adapters = make_adapters(name, tmp_path / "base", tmp_path, targets)
    given = {str(i): str(path) for i, path in enumerate(adapters)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft_xlora(tmp_path / "base", adapters, **CONFIG)
        theirs.save_pretrained(str(tmp_path / "xlora"))
        model = load_xlora(tmp_path / "base", checkpoint=tmp_path / "xlora", adapters=given, backend="torchax")
    assert list(model.layer_names) == peft_layer_names(theirs)
    for padding in (None, "left", "right"):
        inputs = torch_inputs(name, padding)
        logits, scalings = peft_run(theirs, **inputs)
        out, kept = model(**inputs), inputs["attention_mask"] != 0
        np.testing.assert_allclose(np.asarray(out.scalings)[kept], scalings[kept], atol=1e-5)
        np.testing.assert_allclose(np.asarray(out.logits)[kept], logits[kept], atol=1e-5, rtol=1e-5)
    save_xlora(model, tmp_path / "saved")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        again = reload_in_peft(tmp_path / "base", tmp_path / "saved")
    logits, _ = peft_run(again, **inputs)
    np.testing.assert_allclose(np.asarray(out.logits)[kept], logits[kept], atol=1e-5, rtol=1e-5)


def test_a_classification_head_comes_with_the_adapters(tmp_path):
    make_torch_model("distilbert", tmp_path / "base", kind="DistilBertModel")
    classifier = transformers.AutoModelForSequenceClassification
    paths = {}
    for number in range(2):
        torch.manual_seed(3)  # one head for both
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            base = classifier.from_pretrained(tmp_path / "base", num_labels=3)
        config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_lin"], init_lora_weights=False)
        get_peft_model(base, config).save_pretrained(str(tmp_path / str(number)))
        paths[str(number)] = tmp_path / str(number)
    model = load_xlora(tmp_path / "base", adapters=paths, backend="torchax")
    inputs = torch_inputs("distilbert", "right")
    for number, path in enumerate(paths.values()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            base = classifier.from_pretrained(tmp_path / "base", num_labels=3)
        with torch.no_grad():
            alone = PeftModel.from_pretrained(base, str(path)).eval()(**tensors(inputs)).logits
        gate = np.eye(2, dtype=np.float32)[number]
        np.testing.assert_allclose(model(**inputs, scalings=gate).logits, alone, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_xlora(model, tmp_path / "saved")
    again = load_xlora(tmp_path / "base", checkpoint=tmp_path / "saved", backend="torchax")
    np.testing.assert_array_equal(again(**inputs).logits, model(**inputs).logits)


def test_the_output_head_is_used_in_pieces_only_where_it_is_a_plain_product(tmp_path):
    """T5 scales its hidden states first, and this Gemma caps its logits."""
    heads = {}
    for name in ("falcon", "gemma3_text", "t5"):
        make_torch_model(name, tmp_path / name)
        heads[name] = load_base(tmp_path / name, backend="torchax").module.head
    assert heads == {"falcon": "lm_head", "gemma3_text": None, "t5": None}


def test_a_step_learns_the_loss_of_the_whole_logits(case):
    name, _, _, model = case
    if name in ("distilbert", "t5"):
        pytest.skip("no next token is predicted from input_ids alone")
    ids = torch_inputs(name)["input_ids"]
    batch = {"input_ids": ids, "labels": ids}
    optimizer = optax.adam(1e-2)
    state, frozen = init_train_state(model.params, model.config, optimizer)
    state, metrics = make_train_step(model.xlora, optimizer, loss_chunk=4)(state, frozen, batch)
    whole = causal_lm_loss(model(ids).logits, jnp.asarray(ids))
    np.testing.assert_allclose(metrics["loss"], whole, rtol=1e-5)
    assert metrics["finite"] == 1
    assert metrics["grad_norm"] > 1e-6


def test_layers_that_the_gates_have_no_meaning_for_are_refused_by_name(tmp_path):
    make_torch_model("t5", tmp_path / "base")
    model = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=r"encoder\..*\.q", init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(FormatError, match=r"encoder\.block\.0.*acts on positions \[2, 7\]"):
        load_xlora(tmp_path / "base", adapters={"a": tmp_path / "adapter"}, backend="torchax")


def test_auto_says_which_backend_it_takes(tmp_path):
    make_torch_model("falcon", tmp_path / "base")
    adapters = make_adapters("falcon", tmp_path / "base", tmp_path)
    with pytest.warns(UserWarning, match=NOTE):
        base = load_base(tmp_path / "base")
    ids = torch_inputs("falcon")["input_ids"]
    with torch.no_grad():
        theirs = reloaded(tmp_path / "base")(torch.from_numpy(ids)).logits
    np.testing.assert_allclose(base(ids).logits, theirs, atol=1e-5)
    with pytest.raises(FormatError, match="model_type"):
        load_base(tmp_path / "base", backend="flax")
    found = inspect_path(tmp_path / "base")
    assert found.refused == []
    assert found.facts["backend"].startswith("torchax")
    assert "query_key_value" in found.facts["can be adapted"]
    fits = inspect_path(adapters[0], base=str(tmp_path / "base"))
    assert fits.facts["fits the base"].startswith("yes")


def test_without_torchax_the_error_names_the_extra(tmp_path, monkeypatch):
    make_torch_model("falcon", tmp_path / "base")
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    with pytest.raises(FormatError, match=r"model_type.*xlora-jax\[torchax\]"):
        load_base(tmp_path / "base")


def test_packed_rows_and_missing_inputs_are_refused(tmp_path):
    make_torch_model("falcon", tmp_path / "base")
    base = load_base(tmp_path / "base", backend="torchax")
    with pytest.raises(ValueError, match=r"segment_ids.*pack=False"):
        base(np.ones((1, 3), np.int32), segment_ids=np.ones((1, 3), np.int32))
    with pytest.raises(ValueError, match="embedding"):
        base(np.full((1, 3), V, np.int32))
    make_torch_model("t5", tmp_path / "t5")
    base = load_base(tmp_path / "t5", backend="torchax")
    with pytest.raises(ValueError, match="decoder_input_ids"):
        base(np.ones((1, 3), np.int32))


@pytest.mark.parametrize("name", ["falcon", "gpt_neo"])
def test_generation_recomputes_the_text_and_says_so(name, tmp_path):
    """Left padding, rows that end at different lengths; greedy tokens of the formula, and of transformers alone."""
    make_torch_model(name, tmp_path / "base")
    adapters = make_adapters(name, tmp_path / "base", tmp_path)
    names = {str(i): str(path) for i, path in enumerate(adapters)}
    config = XLoraConfig(hidden_size=32, adapters=names, **CONFIG)
    model = load_xlora(tmp_path / "base", config=config, backend="torchax")
    inputs = torch_inputs(name, "left")
    with pytest.warns(UserWarning, match="runs both passes over the whole text"):
        tokens = np.asarray(model.generate(**inputs, max_new_tokens=5))
    for row, mask in zip(tokens, inputs["attention_mask"], strict=True):
        text = row[: len(mask)][mask != 0]
        for token in row[len(mask) :]:
            given = {"input_ids": text[None], "attention_mask": np.ones((1, len(text)), np.int64)}
            with torch.no_grad():
                logits, _, _ = torch_xlora(model, tmp_path / "base", adapters, given)
            assert int(logits[0, -1].argmax()) == token
            text = np.append(text, token)
    assert model.get_generation_stats().reads_per_token == 2
    with model.disable_adapter(), pytest.warns(UserWarning, match="whole text"):
        alone = np.asarray(model.generate(inputs["input_ids"][1:], max_new_tokens=5))
    theirs = reloaded(tmp_path / "base").generate(
        torch.from_numpy(inputs["input_ids"][1:]), max_new_tokens=5, do_sample=False, eos_token_id=None
    )
    np.testing.assert_array_equal(alone, theirs.numpy())
    with pytest.raises(ValueError, match="need a cache"):
        model.generate(**inputs, max_new_tokens=2, frozen_after=1)


def test_images_run_beside_text(tmp_path):
    """Gemma 3 with pixels: both passes see the image."""
    make_torch_model("gemma3", tmp_path / "base")
    adapters = make_adapters("gemma3", tmp_path / "base", tmp_path)
    names = {str(i): str(path) for i, path in enumerate(adapters)}
    config = XLoraConfig(hidden_size=32, adapters=names, **CONFIG)
    model = load_xlora(tmp_path / "base", config=config, backend="torchax")
    ids = torch_inputs("gemma3")["input_ids"]
    ids[:, 2:6] = V - 1
    pixels = np.random.default_rng(2).normal(size=(2, 3, 16, 16)).astype(np.float32)
    inputs = {"input_ids": ids, "pixel_values": pixels, "token_type_ids": (ids == V - 1).astype(np.int64)}
    with torch.no_grad():
        logits, scalings, _ = torch_xlora(model, tmp_path / "base", adapters, inputs)
    out = model(**inputs)
    np.testing.assert_allclose(out.scalings, scalings, atol=1e-5)
    np.testing.assert_allclose(out.logits, logits, atol=1e-5, rtol=1e-5)
    blank = model(**{**inputs, "pixel_values": 0 * pixels})
    assert np.abs(np.asarray(blank.scalings) - np.asarray(out.scalings)).max() > 1e-4
    with pytest.raises(jax.errors.JaxRuntimeError, match="one image token for each feature"):
        model(**{**inputs, "input_ids": torch_inputs("gemma3")["input_ids"]}).logits.block_until_ready()


@pytest.mark.filterwarnings("ignore:.*is not ported to Flax:UserWarning")
def test_a_whole_job_trains_and_saves(text_files, tmp_path):
    folder, tokenizer_dir, _ = text_files
    make_torch_model("falcon", tmp_path / "base")
    for file in (*tokenizer_dir.glob("tokenizer*"), *tokenizer_dir.glob("chat_template*")):
        shutil.copy(file, tmp_path / "base")
    adapters = make_adapters("falcon", tmp_path / "base", tmp_path)
    job = Job(
        base=str(tmp_path / "base"),
        adapters={str(i): str(path) for i, path in enumerate(adapters)},
        data=folder / "train.jsonl",
        eval_data={"held": folder / "held.jsonl"},
        output=str(tmp_path / "run"),
        xlora={"xlora_depth": 1},
        length=32,
        pack=False,
        train=TrainConfig(steps=4, batch_size=4, learning_rate=0.05),
    )
    with pytest.warns(UserWarning, match="it loads here"):
        result = run_training(job)
    assert result.finished
    again = load_xlora(tmp_path / "base", checkpoint=tmp_path / "run" / "model")
    inputs = torch_inputs("falcon")
    np.testing.assert_array_equal(again(**inputs).logits, result.model(**inputs).logits)
    before = load_xlora(tmp_path / "base", adapters=job.adapters, config=XLoraConfig(32, job.adapters, xlora_depth=1))
    assert np.abs(np.asarray(before(**inputs).scalings) - np.asarray(again(**inputs).scalings)).max() > 0.01
    with pytest.raises(ValueError, match="pack=False"):
        run_training(dataclasses.replace(job, pack=True, output=str(tmp_path / "packed")))
    check_rules(RULES, result.model.params)
