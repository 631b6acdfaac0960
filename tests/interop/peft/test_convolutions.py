"""Experts on convolutions, against the layer that PEFT's X-LoRA puts around its LoRA of a convolution.

PEFT's broadcast of gates is defined for one example with one gate only: so it runs example by example here.
"""

from __future__ import annotations

import copy
import warnings
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.xlora.layer import XLoraConv2dLayer
from safetensors.numpy import load_file

from interop import load_lora, load_xlora, save_lora
from interop.storage.errors import FormatError
from tests.helpers.encoders import adapters_on, encoder_inputs, make_encoder
from tests.helpers.reference import relative_error
from xlora_jax import XLoraConfig
from xlora_jax.layers.modules import XLoraConv
from xlora_jax.layers.stacking import Piece, stack_pieces

TOLERANCE = 1e-5
EXPERTS = 3
GATES = np.random.default_rng(5).uniform(size=(3, EXPERTS)).astype(np.float32)


def with_experts(model: torch.nn.Module, adapters: list[Any]) -> torch.nn.Module:
    """The model with all adapters in it and active, as PEFT's X-LoRA has them."""
    adapted = PeftModel.from_pretrained(model, str(adapters[0]), adapter_name="0")
    for number, path in enumerate(adapters[1:], 1):
        adapted.load_adapter(str(path), str(number))
    adapted.base_model.set_adapter([str(number) for number in range(len(adapters))])
    return adapted.eval()


def pefts(layer: Any) -> XLoraConv2dLayer:
    config = peft.XLoraConfig(hidden_size=24, adapters={str(i): "" for i in range(EXPERTS)})
    return XLoraConv2dLayer(SimpleNamespace(disabled=False), layer, layer.forward, 0, config)


def test_the_patches_of_a_vision_transformer(tmp_path):
    model = make_encoder("vit", tmp_path / "base")
    adapters = adapters_on(model, ["projection"], tmp_path)
    config = XLoraConfig(hidden_size=24, adapters={})
    named = {str(i): path for i, path in enumerate(adapters)}
    ours = load_xlora(tmp_path / "base", adapters=named, config=config, dtype=jnp.float32)
    inputs = encoder_inputs("vit")
    out = ours(**inputs, scalings=GATES[:, None, None]).logits

    pixels = torch.as_tensor(inputs["pixel_values"])
    with torch.no_grad():
        plain = model(pixels).logits
        adapted = with_experts(model, adapters)
        layer = adapted.base_model.model.vit.embeddings.patch_embeddings.projection
        xlora = pefts(layer)
        theirs = []
        for image, gates in zip(pixels[:, None], torch.as_tensor(GATES), strict=True):
            layer.forward = lambda x, gates=gates: xlora.forward(x, scalings=gates[None, None, None])
            theirs.append(adapted(image).logits)
    assert relative_error(out, torch.cat(theirs)) <= TOLERANCE
    assert relative_error(plain, torch.cat(theirs)) > 1e-2


CONVOLUTIONS = {
    "strided": {"stride": (2, 3)},
    "padded": {"padding": (1, 2)},
    "dilated": {"dilation": (2, 1)},
    "grouped": {"groups": 2},
    "all of it": {"stride": (2, 1), "padding": (2, 1), "dilation": (1, 2), "groups": 2},
}


class Net(torch.nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(4, 6, (2, 3), **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


@pytest.fixture(params=CONVOLUTIONS)
def convolution(request, tmp_path):
    """A convolution in torch, and three adapters of it."""
    torch.manual_seed(0)
    net, paths = Net(**CONVOLUTIONS[request.param]).eval(), []
    for number, rank in enumerate((4, 2, 6)):
        with warnings.catch_warnings():
            # PEFT says that it does not merge adapters of grouped convolutions.
            warnings.filterwarnings("ignore", message="LoRA adapter added to ConvNd layer with groups > 1")
            adapted = get_peft_model(copy.deepcopy(net), LoraConfig(r=rank, lora_alpha=3, target_modules=["conv"]))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if ".lora_" in name:
                    parameter.normal_()
        adapted.save_pretrained(str(tmp_path / str(number)))
        paths.append(tmp_path / str(number))
    return net, paths


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1")
def test_convolutions_of_every_kind(convolution):
    """One gate per example is PEFT's layer, where it has one; one per output position acts between A and B."""
    net, paths = convolution
    conv = net.conv
    layers = [load_lora(path).layers["conv"] for path in paths]
    pieces = [Piece(number, layer.a, layer.b, layer.scale) for number, layer in enumerate(layers)]
    stacked = stack_pieces([pieces], (2, 3, 4, 6), EXPERTS, np.dtype(np.float32))
    module = XLoraConv(
        6,
        (2, 3),
        strides=conv.stride,
        padding=[(size, size) for size in conv.padding],
        kernel_dilation=conv.dilation,
        feature_group_count=conv.groups,
    )
    params = {"kernel": conv.weight.detach().numpy().transpose(2, 3, 1, 0), "bias": conv.bias.detach().numpy()}
    experts = {name: leaf[0] for name, leaf in stacked.items()}
    x = np.random.default_rng(1).normal(size=(3, 4, 9, 8)).astype(np.float32)

    def ours(gates: Any) -> Any:
        variables = {"params": params, "experts": experts, "scalings": {"gates": gates}}
        return jnp.moveaxis(module.apply(variables, jnp.moveaxis(x, 1, -1)), -1, 1)

    with torch.no_grad():
        plain = conv(torch.as_tensor(x))
        layer = with_experts(net, paths).base_model.model.conv
        xlora = pefts(layer)
        images = zip(torch.as_tensor(x)[:, None], torch.as_tensor(GATES), strict=True)
        if conv.dilation == (1, 1):
            theirs = torch.cat([xlora.forward(image, scalings=gates[None, None, None]) for image, gates in images])
            assert relative_error(ours(GATES[:, None]), theirs) <= TOLERANCE
            assert relative_error(plain, theirs) > 1e-2
        else:
            # PEFT's A does not take over the dilation, and so gives another shape than the layer.
            with pytest.raises(RuntimeError, match="must match the size"):
                layer(torch.as_tensor(x))
            for a in layer.lora_A.values():
                a.dilation = conv.dilation
        height, width = plain.shape[2:]
        each = np.random.default_rng(2).uniform(size=(3, height * width, EXPERTS)).astype(np.float32)
        for gates in (each, GATES[:, None]):
            laid = torch.as_tensor(np.array(np.broadcast_to(gates, each.shape))).reshape(3, 1, height, width, EXPERTS)
            formula = plain.clone()
            for e, (a, b) in enumerate(zip(layer.lora_A.values(), layer.lora_B.values(), strict=True)):
                formula += layer.scaling[str(e)] * b(laid[..., e] * a(torch.as_tensor(x)))
            assert relative_error(ours(gates), formula) <= TOLERANCE
            assert relative_error(plain, formula) > 1e-2


def test_adapters_of_grouped_convolutions_come_back_as_they_were(convolution, tmp_path):
    _, paths = convolution
    adapter = load_lora(paths[0])
    save_lora(adapter, tmp_path / "again")
    before, after = (load_file(path / "adapter_model.safetensors") for path in (paths[0], tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    layer = adapter.layers["conv"]
    if layer.groups > 1:
        layer.b[0, -1] = 1.0
        with pytest.raises(FormatError, match="'conv' is a convolution of 2 groups, and its B joins"):
            save_lora(adapter, tmp_path / "again")
