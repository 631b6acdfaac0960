"""Training against torch: gradients, and twenty steps of AdamW from the same start on the same batches."""

from __future__ import annotations

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from safetensors.torch import load_file, save_file

from interop import classifier_from_torch
from tests.helpers.ours import our_xlora
from tests.helpers.reference import FAMILIES, classifier_of, peft_xlora, prompt, relative_error, tensors
from xlora_jax import causal_lm_loss, init_train_state, make_train_step, merge_params, split_params
from xlora_jax.passes import forward

TOLERANCE = 1e-4

pytestmark = pytest.mark.filterwarnings("ignore:.*enable_softmax_topk.*")

CONFIGS = {
    "plain": {"xlora_depth": 1},
    "layerwise, top-k": {"xlora_depth": 2, "layerwise_scalings": True, "top_k_lora": 2, "softmax_temperature": 0.5},
    "deep, softmax over top-k": {
        "xlora_depth": 4,
        "layerwise_scalings": True,
        "enable_softmax": False,
        "enable_softmax_topk": True,
        "top_k_lora": 2,
        "scaling_pass_value": 0.7,
    },
    "no softmax": {"xlora_depth": 2, "enable_softmax": False, "global_scaling_weight": 0.5},
}


def batch(seed, tokens=14):
    """A padded batch whose labels leave out the padding and the first tokens of each row (a prompt)."""
    inputs = prompt(4, tokens, "right" if seed % 2 else "left", seed)
    labels = np.where(inputs["attention_mask"] == 0, -100, inputs["input_ids"])
    for row in range(4):
        labels[row, np.flatnonzero(inputs["attention_mask"][row])[: 3 + row]] = -100
    return {**inputs, "labels": labels.astype(np.int32)}


def torch_loss(model, data):
    return model(**tensors(data)).loss


def learning(model):
    """PEFT's parameters that learn, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def as_our_tree(base_dir, adapters, model, out_dir, pick, **config):
    """`pick(parameter)` of all of PEFT's classifier and experts as our tree of what learns.

    The experts go through files of PEFT's own layout, so that nothing here knows how we lay them out.
    """
    state = {name: pick(parameter) for name, parameter in classifier_of(model).named_parameters()}
    tree = {"classifier": classifier_from_torch(state)}
    if config.get("use_trainable_adapters"):
        inner = model.base_model.lora_model.model
        copies = []
        for expert, adapter in enumerate(adapters):
            copies.append(shutil.copytree(adapter, out_dir / str(expert)))
            weights = load_file(adapter / "adapter_model.safetensors")
            for key in weights:
                if ".lora_" not in key:
                    continue
                name, kind = key.removeprefix("base_model.model.").split(".lora_")
                container = getattr(inner.get_submodule(name), "lora_" + kind.removesuffix(".weight"))[str(expert)]
                weights[key] = pick(container if kind.startswith("embedding") else container.weight).clone()
            save_file(weights, copies[-1] / "adapter_model.safetensors")
        loaded = our_xlora(base_dir, copies, **config)
        tree["experts"] = split_params(loaded.params, loaded.config)[0]["experts"]
    return tree


def assert_leaves_close(ours, theirs, tolerance):
    ours, theirs = jax.tree.leaves_with_path(ours), jax.tree.leaves_with_path(theirs)
    assert [path for path, _ in ours] == [path for path, _ in theirs]
    for (path, mine), (_, other) in zip(ours, theirs, strict=True):
        assert np.linalg.norm(other) > 0, f"{jax.tree_util.keystr(path)} of the reference is zero"
        error = relative_error(mine, other)
        assert error <= tolerance, f"{jax.tree_util.keystr(path)}: {error:.2e}"


# Families differ in the base model only: all settings for the first, one for each of the others.
GRADIENTS = [("llama", name) for name in CONFIGS] + [(family, "plain") for family in FAMILIES if family != "llama"]


@pytest.mark.parametrize("train_experts", [False, True])
@pytest.mark.parametrize(("family", "name"), GRADIENTS)
def test_gradients(family, name, train_experts, base, experts, tmp_path):
    base_dir = base(family)
    adapters = experts(base_dir, "embedding" if name == "plain" else "unequal")
    config = {**CONFIGS[name], "use_trainable_adapters": train_experts}
    theirs = peft_xlora(base_dir, adapters, **config)
    ours = our_xlora(base_dir, adapters, theirs, **config)
    data = batch(1)

    wanted = torch_loss(theirs.train(), data)
    wanted.backward()
    assert any("lora_A" in name for name in learning(theirs)) == train_experts
    trainable, frozen = split_params(ours.params, ours.config)

    def loss_of(trainable):
        out = forward(
            ours.xlora,
            merge_params(trainable, frozen),
            jnp.asarray(data["input_ids"]),
            attention_mask=jnp.asarray(data["attention_mask"]),
        )
        return causal_lm_loss(out.logits, jnp.asarray(data["labels"]))

    loss, gradients = jax.jit(jax.value_and_grad(loss_of))(trainable)
    assert abs(float(loss) - wanted.item()) <= 1e-5 * wanted.item()
    reference = as_our_tree(base_dir, adapters, theirs, tmp_path, lambda p: p.grad, **config)
    assert_leaves_close(gradients, reference, TOLERANCE)


@pytest.mark.parametrize(
    ("name", "train_experts"),
    [*((name, False) for name in CONFIGS), ("plain", True), ("deep, softmax over top-k", True)],
)
def test_twenty_steps_of_adamw(name, train_experts, base, experts, tmp_path):
    base_dir = base("llama")
    adapters = experts(base_dir, "unequal")
    config = {**CONFIGS[name], "use_trainable_adapters": train_experts}
    theirs = peft_xlora(base_dir, adapters, **config).train()
    ours = our_xlora(base_dir, adapters, theirs, **config)
    before = jax.tree.map(np.array, ours.params)
    settings = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    optimizer = torch.optim.AdamW(learning(theirs).values(), **settings)
    ours_optimizer = optax.adamw(3e-3, b1=0.9, b2=0.95, eps=1e-6, weight_decay=0.1)
    state, frozen = init_train_state(ours.params, ours.config, ours_optimizer)
    step = make_train_step(ours.xlora, ours_optimizer)

    losses, wanted = [], []
    for number in range(20):
        data = batch(number % 4)
        optimizer.zero_grad()
        loss = torch_loss(theirs, data)
        loss.backward()
        optimizer.step()
        wanted.append(loss.item())
        state, metrics = step(state, frozen, data)
        losses.append(float(metrics["loss"]))
    assert np.abs(np.array(losses) / wanted - 1).max() <= TOLERANCE
    # The steps matter: the four batches cost less at the end than at the start.
    assert np.mean(wanted[-4:]) < np.mean(wanted[:4]) - 0.03

    # What has been learned is the same thing, and nothing else has moved.
    reference = as_our_tree(base_dir, adapters, theirs, tmp_path, lambda p: p.detach(), **config)
    learned_before, frozen_before = split_params(before, ours.config)
    moved = jax.tree.map(relative_error, state.trainable, learned_before)
    assert min(jax.tree.leaves(moved)) > 10 * TOLERANCE
    for path, leaf in jax.tree.leaves_with_path(state.trainable):
        other = dict(jax.tree.leaves_with_path(reference))[path]
        assert relative_error(leaf, other) <= 10 * TOLERANCE, jax.tree_util.keystr(path)
    assert jax.tree.all(jax.tree.map(np.array_equal, frozen, frozen_before))


def test_dropout_acts_in_training_only(base, experts):
    """The classifier's dropout: another key, another loss; without keys none. (PEFT's masks can't be redrawn here.)"""
    base_dir = base("llama")
    adapters = experts(base_dir, "unequal")
    config = {"xlora_depth": 2, "xlora_dropout_p": 0.4}
    theirs = peft_xlora(base_dir, adapters, **config)
    ours = our_xlora(base_dir, adapters, theirs, **config)
    data = batch(0)
    optimizer = optax.sgd(0.0)
    step = make_train_step(ours.xlora, optimizer)
    losses = []
    for seed in (0, 1, 1):
        state, frozen = init_train_state(ours.params, ours.config, optimizer, seed=seed)
        losses.append(float(step(state, frozen, data)[1]["loss"]))
    assert losses[0] != losses[1] == losses[2]
    with torch.no_grad():
        evaluated = torch_loss(theirs.eval(), data).item()
    inputs = {name: data[name] for name in ("input_ids", "attention_mask")}
    ours_evaluated = float(causal_lm_loss(ours(**inputs).logits, jnp.asarray(data["labels"])))
    assert abs(ours_evaluated / evaluated - 1) <= 1e-5
    assert ours_evaluated not in losses
