"""BERT, RoBERTa and ViT against transformers: logits, X-LoRA by its formula, and a training step of the gate."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
from peft.utils import load_peft_weights

from interop import load_base, load_xlora
from interop.storage.errors import FormatError
from tests.helpers.encoders import CASES, adapters_on, encoder_inputs, make_encoder, run_encoder
from tests.helpers.reference import adapter_matrices, relative_error
from xlora_jax import XLoraConfig, init_train_state
from xlora_jax.training.classification import classification_loss, make_objective_step

TOLERANCE = 1e-5


@pytest.mark.parametrize("case", CASES)
def test_logits(case, tmp_path):
    model = make_encoder(case, tmp_path)
    inputs = encoder_inputs(case)
    wanted = run_encoder(model, inputs).logits.numpy()
    where = inputs["attention_mask"] if "token" in case else None
    for scan_layers in (True, False):
        ours = load_base(tmp_path, dtype=jnp.float32, scan_layers=scan_layers)
        assert relative_error(ours(**inputs).logits, wanted, where) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_xlora_is_as_its_formula_and_the_gate_learns(case, tmp_path):
    model = make_encoder(case, tmp_path / "base")
    adapters = adapters_on(model, CASES[case][2], tmp_path)
    inputs = encoder_inputs(case)
    config = XLoraConfig(hidden_size=24, adapters={}, layerwise_scalings=True)
    ours = load_xlora(
        tmp_path / "base", adapters={str(i): p for i, p in enumerate(adapters)}, config=config, dtype=jnp.float32
    )
    kernel = np.random.default_rng(1).normal(size=(24, 3 * len(ours.layer_names))).astype(np.float32) * 0.3
    classifier = {"dense_0": {"kernel": jnp.asarray(kernel), "bias": jnp.zeros(kernel.shape[1])}}
    ours = ours.replace(params={**ours.params, "classifier": classifier})

    hidden = run_encoder(model, inputs, output_hidden_states=True).hidden_states[-1]
    gates = torch.softmax((hidden @ torch.as_tensor(kernel)).reshape(*hidden.shape[:2], -1, 3), dim=-1)
    plain = run_encoder(model, inputs).logits.numpy()
    names = list(ours.layer_names)
    handles = []
    for expert, path in enumerate(adapters):
        for name, (a, b, scale) in adapter_matrices(path).items():
            gate = gates[:, :, names.index(name), expert, None]

            def add(module, args, output, gate=gate, a=a, b=b, scale=scale):
                if isinstance(module, torch.nn.Embedding):
                    return output + scale * gate * a.T[args[0]] @ b.T
                # A pooler and what follows it see the first position only.
                gate = gate if args[0].ndim == 3 else gate[:, 0]
                return output + scale * (gate * args[0]) @ a.T @ b.T

            handles.append(model.get_submodule(name).register_forward_hook(add))
    wanted = run_encoder(model, inputs).logits.numpy()
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
    model = make_encoder("vit", tmp_path / "base")
    adapters = adapters_on(model, ["projection"], tmp_path)
    inputs = encoder_inputs("vit")
    config = XLoraConfig(hidden_size=24, adapters={})
    ours = load_xlora(
        tmp_path / "base", adapters={str(i): p for i, p in enumerate(adapters)}, config=config, dtype=jnp.float32
    )
    assert ours.layer_names == ("vit.embeddings.patch_embeddings.projection",)
    weights = [load_peft_weights(str(path), device="cpu") for path in adapters]
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
    model = make_encoder("bert token", tmp_path)
    model.config.is_decoder = True
    model.config.save_pretrained(tmp_path)
    with pytest.raises(FormatError, match="is_decoder"):
        load_base(tmp_path)
    model.config.is_decoder = False
    transformers.BertForMaskedLM(model.config).save_pretrained(tmp_path / "lm")
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
