"""Experts on PyTorch models of any make, against their formula in PyTorch."""

from __future__ import annotations

import copy

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from xlora_jax import XLoraConfig, convert_torch
from xlora_jax.conversion.linen import Lora


class Net(torch.nn.Module):
    """Every kind of layer: embedding, linear on flattened tokens, convolution over the tokens, tied head."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(11, 6)
        self.conv = torch.nn.Conv1d(6, 6, 3, padding=2, dilation=2)
        self.wide = torch.nn.Linear(6, 10)
        self.narrow = torch.nn.Linear(10, 6, bias=False)
        self.unused = torch.nn.Linear(6, 6)
        self.head = torch.nn.Linear(6, 11, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("shift", torch.arange(6.0))
        self.factor = torch.full((6,), 0.5)  # neither a parameter nor a buffer

    def forward(self, input_ids):
        x = self.table(input_ids) + self.shift * self.factor
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        flat = torch.relu(self.wide(x.reshape(-1, 6)))
        x = x + self.narrow(flat).reshape(x.shape)
        return {"hidden": x, "logits": self.head(x)}


SHAPES = {"table": ((11,), 6), "conv": ((3, 6), 6), "wide": ((6,), 10), "narrow": ((10,), 6), "head": ((6,), 11)}
IDS = np.array([[1, 4, 2, 9], [3, 3, 10, 0]])


def experts(random):
    def lora(name, rank):
        inputs, features = SHAPES[name]
        return Lora(random.normal(size=(*inputs, rank)), random.normal(size=(rank, features)), alpha=3)

    return {"one": {name: lora(name, 2) for name in SHAPES}, "two": {"wide": lora("wide", 4)}}


def converted(model, given, **changes):
    config = XLoraConfig(hidden_size=6, adapters={"one": "", "two": ""}, layerwise_scalings=True, xlora_depth=1)
    arguments = {
        "hidden_states": lambda out: out["hidden"],
        "logits": lambda out: out["logits"],
        "example": {"input_ids": jnp.asarray(IDS)},
    }
    return convert_torch(model, given, config, **{**arguments, **changes})


def test_all_kinds_of_layers_mix_as_the_formula_says():
    torch.manual_seed(0)
    net = Net().eval()
    twin = copy.deepcopy(net)
    given = experts(np.random.default_rng(0))
    model = converted(net, given)
    assert model.layer_names == ("table", "conv", "wide", "narrow", "head")
    out = model(IDS)
    scalings = torch.from_numpy(np.array(out.scalings))

    def add(layer, args, output, name):
        total = output
        for number, loras in enumerate(given.values()):
            if name not in loras:
                continue
            a, b = (torch.from_numpy(np.asarray(x, np.float32)) for x in (loras[name].a, loras[name].b))
            gate = scalings[:, :, model.layer_names.index(name), number, None]
            (x,) = args
            if name == "table":
                delta = gate * a[x] @ b
            elif name == "conv":
                down = torch.nn.functional.conv1d(x, a.permute(2, 1, 0), padding=2, dilation=2).transpose(1, 2)
                delta = (gate * down @ b).transpose(1, 2)
            else:
                delta = gate.reshape(*x.shape[:-1], 1) * x @ a @ b
            total = total + 3 / len(b) * delta
        return total

    with torch.no_grad():
        hidden = twin(torch.from_numpy(IDS))["hidden"]
    dense = model.params["classifier"]["dense_0"]
    scores = (hidden.numpy() @ np.asarray(dense["kernel"]) + np.asarray(dense["bias"])).reshape(2, 4, 5, 2)
    np.testing.assert_allclose(scalings, torch.softmax(torch.from_numpy(scores), -1), atol=1e-6)
    for name in SHAPES:
        twin.get_submodule(name).register_forward_hook(
            lambda layer, args, output, name=name: add(layer, args, output, name)
        )
    with torch.no_grad():
        logits = twin(torch.from_numpy(IDS))["logits"]
    np.testing.assert_allclose(out.logits, logits, rtol=1e-5, atol=1e-4)


def test_a_submodules_output_can_be_the_hidden_states():
    given = {"one": {"wide": experts(np.random.default_rng(0))["one"]["wide"]}, "two": {}}
    torch.manual_seed(0)
    by_function = converted(Net().eval(), given, hidden_states=lambda out: out["hidden"])
    torch.manual_seed(0)
    by_name = converted(Net().eval(), given, hidden_states="table")
    assert by_name(IDS).hidden_states.shape == by_function(IDS).hidden_states.shape
    with pytest.raises(ValueError, match="no submodule 'unused' was called"):
        converted(Net().eval(), given, hidden_states="unused")


def test_mistakes_are_named():
    given = experts(np.random.default_rng(0))
    with pytest.raises(ValueError, match="training mode"):
        converted(Net().train(), given)
    lora = Lora(np.zeros((6, 2)), np.zeros((2, 6)))
    with pytest.raises(ValueError, match=r"layer 'unused' can't be adapted: a call of the model does not reach it"):
        converted(Net().eval(), {"one": {"unused": lora}, "two": {}})
    with pytest.raises(ValueError, match=r"layer 'wide': expected a \[6, 'r'\] and b \['r', 10\]"):
        converted(Net().eval(), {"one": {"wide": lora}, "two": {}})
