"""BERT, RoBERTa and ViT against transformers: logits, X-LoRA by its formula, and a training step of the gate."""

from __future__ import annotations

import copy
import warnings

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from interop import load_base, load_xlora
from interop.errors import FormatError
from tests.reference import adapter_matrices, randomise, relative_error
from xlora_jax import XLoraConfig, init_train_state
from xlora_jax.objectives import classification_loss, make_objective_step

TOLERANCE = 1e-5
_SHAPE = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
_TEXT = {**_SHAPE, "vocab_size": 61, "max_position_embeddings": 32, "layer_norm_eps": 3e-3, "num_labels": 5}
_TEXT |= {"hidden_act": "gelu_new", "type_vocab_size": 3}
_IMAGE = {**_SHAPE, "image_size": (8, 12), "patch_size": (4, 2), "num_channels": 2, "num_labels": 5}
CASES = {
    "bert sequence": ("BertForSequenceClassification", _TEXT, ["query", "value", "output.dense", "word_embeddings"]),
    "bert token": ("BertForTokenClassification", _TEXT, ["key", "intermediate.dense"]),
    "roberta sequence": ("RobertaForSequenceClassification", {**_TEXT, "pad_token_id": 1}, ["query", "output.dense"]),
    "roberta token": ("RobertaForTokenClassification", {**_TEXT, "pad_token_id": 1}, ["value", "intermediate.dense"]),
    "vit": ("ViTForImageClassification", {**_IMAGE, "qkv_bias": False, "layer_norm_eps": 3e-3}, ["q_proj", "fc2"]),
}


def inputs_of(case):
    random = np.random.default_rng(0)
    if case == "vit":
        return {"pixel_values": random.normal(size=(3, 2, 8, 12)).astype(np.float32)}
    ids = random.integers(3, 61, (3, 9)).astype(np.int32)
    mask = np.ones_like(ids)
    mask[1, 6:] = 0
    mask[2, :2] = 0
    return {"input_ids": np.where(mask, ids, 1).astype(np.int32), "attention_mask": mask} | (
        {"token_type_ids": random.integers(0, 3, (3, 9)).astype(np.int32)}
    )


def made(case, directory):
    name, options, targets = CASES[case]
    model = getattr(transformers, name)
    config = model.config_class(**options)
    model = model(config).eval()
    randomise(model, 0)
    if case == "vit":
        randomise(model.vit, 1)
    model.save_pretrained(directory)
    return model, targets


def run(model, inputs, **more):
    given = {
        name: torch.as_tensor(value.astype(np.int64) if value.dtype.kind == "i" else value)
        for name, value in inputs.items()
    }
    with torch.no_grad():
        return model(**given, **more)


@pytest.mark.parametrize("case", CASES)
def test_logits(case, tmp_path):
    model, _ = made(case, tmp_path)
    inputs = inputs_of(case)
    wanted = run(model, inputs).logits.numpy()
    where = inputs["attention_mask"] if "token" in case else None
    for scan_layers in (True, False):
        ours = load_base(tmp_path, dtype=jnp.float32, scan_layers=scan_layers)
        assert relative_error(ours(**inputs).logits, wanted, where) <= TOLERANCE


def adapters_of(model, targets, directory):
    paths = []
    for number, (rank, own) in enumerate(((2, targets), (3, targets[:1]), (4, targets[-1:]))):
        config = LoraConfig(r=rank, lora_alpha=2 * rank + 1, target_modules=own)
        adapted = get_peft_model(copy.deepcopy(model), config)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if ".lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted.save_pretrained(str(directory / str(number)))
        paths.append(directory / str(number))
    return paths


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case != "bert sequence"])
def test_xlora_is_as_its_formula_and_the_gate_learns(case, tmp_path):
    model, targets = made(case, tmp_path / "base")
    adapters = adapters_of(model, targets, tmp_path)
    inputs = inputs_of(case)
    config = XLoraConfig(hidden_size=24, adapters={}, layerwise_scalings=True)
    ours = load_xlora(
        tmp_path / "base", adapters={str(i): p for i, p in enumerate(adapters)}, config=config, dtype=jnp.float32
    )
    kernel = np.random.default_rng(1).normal(size=(24, 3 * len(ours.layer_names))).astype(np.float32) * 0.3
    classifier = {"dense_0": {"kernel": jnp.asarray(kernel), "bias": jnp.zeros(kernel.shape[1])}}
    ours = ours.replace(params={**ours.params, "classifier": classifier})

    hidden = run(model, inputs, output_hidden_states=True).hidden_states[-1]
    gates = torch.softmax((hidden @ torch.as_tensor(kernel)).reshape(*hidden.shape[:2], -1, 3), dim=-1)
    plain = run(model, inputs).logits.numpy()
    names = list(ours.layer_names)
    handles = []
    for expert, path in enumerate(adapters):
        for name, (a, b, scale) in adapter_matrices(path).items():
            gate = gates[:, :, names.index(name), expert, None]

            def add(module, args, output, gate=gate, a=a, b=b, scale=scale):
                return output + scale * (gate * args[0]) @ a.T @ b.T

            handles.append(model.get_submodule(name).register_forward_hook(add))
    wanted = run(model, inputs).logits.numpy()
    for handle in handles:
        handle.remove()
    assert names == [name for name, _ in model.named_modules() if name in set(names)]
    where = inputs.get("attention_mask")
    out = ours(**inputs)
    assert relative_error(out.scalings, gates, where) <= TOLERANCE
    assert relative_error(out.logits, wanted, where if "token" in case else None) <= TOLERANCE
    assert relative_error(plain, wanted) > 1e-2

    shape = out.logits.shape[:-1]
    labels = jnp.asarray(np.random.default_rng(2).integers(0, 5, shape))
    labels = labels.at[..., -1].set(-100)
    optimizer = optax.adam(3e-2)
    state, frozen = init_train_state(ours.params, ours.config, optimizer)
    step = make_objective_step(ours.xlora, optimizer)
    batch = {**{name: jnp.asarray(value) for name, value in inputs.items()}, "labels": labels}
    losses = []
    for _ in range(12):
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    reference = torch.nn.functional.cross_entropy(
        torch.as_tensor(wanted).reshape(-1, 5), torch.as_tensor(np.array(labels)).long().reshape(-1)
    )
    assert abs(losses[0] - float(reference)) < 1e-4
    assert losses[-1] < losses[0] - 1e-3


def test_experts_on_the_patch_convolution(tmp_path):
    """Of a real ViT: each patch has its own gate; with the same gate everywhere it is PEFT's layer."""
    model, _ = made("vit", tmp_path / "base")
    adapters = adapters_of(model, ["projection"], tmp_path)
    inputs = inputs_of("vit")
    config = XLoraConfig(hidden_size=24, adapters={})
    ours = load_xlora(
        tmp_path / "base", adapters={str(i): p for i, p in enumerate(adapters)}, config=config, dtype=jnp.float32
    )
    assert ours.layer_names == ("vit.embeddings.patch_embeddings.projection",)
    weights = [
        torch.load if False else __import__("peft").utils.load_peft_weights(str(p), device="cpu") for p in adapters
    ]
    pixels = torch.as_tensor(inputs["pixel_values"])

    def mixed(gates):
        """gates: expert -> [B, 1, height, width] or a number."""

        def add(module, args, output):
            for expert, found in enumerate(weights):
                a = next(v for k, v in found.items() if "lora_A" in k)
                b = next(v for k, v in found.items() if "lora_B" in k)
                down = torch.nn.functional.conv2d(args[0], a, stride=module.stride)
                rank = a.shape[0]
                output = output + (2 * rank + 1) / rank * torch.nn.functional.conv2d(gates[expert] * down, b)
            return output

        handle = model.vit.embeddings.patch_embeddings.projection.register_forward_hook(add)
        with torch.no_grad():
            logits = model(pixels).logits.numpy()
        handle.remove()
        return logits

    same = [0.2, 0.5, 0.3]
    assert relative_error(ours(**inputs, scalings=same).logits, mixed(same)) <= TOLERANCE
    each = np.random.default_rng(3).uniform(size=(3, 1 + 12, 1, 3)).astype(np.float32)
    patches = [torch.as_tensor(each[:, 1:, 0, e].reshape(3, 1, 2, 6)) for e in range(3)]
    assert relative_error(ours(**inputs, scalings=each).logits, mixed(patches)) <= TOLERANCE
    assert relative_error(mixed([0, 0, 0]), mixed(same)) > 1e-2
    with pytest.raises(ValueError, match="with a class token"):
        ours(**inputs, scalings=each[:, :5])


def test_what_is_not_implemented_is_refused_by_name(tmp_path):
    model, _ = made("bert token", tmp_path)
    model.config.is_decoder = True
    model.config.save_pretrained(tmp_path)
    with pytest.raises(FormatError, match="is_decoder"):
        load_base(tmp_path)
    transformers.BertForMaskedLM(transformers.BertConfig(**_TEXT)).save_pretrained(tmp_path / "lm")
    with pytest.raises(FormatError, match="architectures"):
        load_base(tmp_path / "lm")


def test_loss_is_torchs():
    random = np.random.default_rng(0)
    for shape in ((4,), (4, 6)):
        logits, labels = random.normal(size=(*shape, 5)), random.integers(0, 5, shape)
        labels[0] = -100
        wanted = torch.nn.functional.cross_entropy(
            torch.as_tensor(logits).reshape(-1, 5), torch.as_tensor(labels).reshape(-1)
        )
        ours = classification_loss(jnp.asarray(logits, jnp.float32), jnp.asarray(labels))
        assert abs(float(ours) - float(wanted)) < 1e-5
    with pytest.raises(ValueError, match="labels: expected shape"):
        classification_loss(jnp.zeros((4, 5)), jnp.zeros((4, 6), jnp.int32))
