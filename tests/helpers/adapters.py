"""Adapters made by PEFT, for tests that change and compare their files."""

import json

import numpy as np
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file


def fresh_base(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(directory).eval()


def make_adapter(base_dir, directory, r=4, alpha=6, **options):
    """Save an adapter as `reference.make_adapter` does, but with random biases and buffers too."""
    model = get_peft_model(fresh_base(base_dir), LoraConfig(r=r, lora_alpha=alpha, task_type="CAUSAL_LM", **options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    model.save_pretrained(directory)
    return directory


def edit_config(directory, **changes):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return directory


def edit_tensors(directory, change):
    """Replace the stored tensors by the result of `change`, which takes the dict of tensors."""
    path = directory / "adapter_model.safetensors"
    save_file(
        {key: tensor.contiguous().clone() for key, tensor in change(load_file(path)).items()}, path, {"format": "pt"}
    )
    return directory


def run(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def hooked(model, adapter):
    """Return the base model with the adapter's contribution added by hooks, from the loaded arrays."""

    def hook(layer):
        def add(module, args, output):
            a, b = (torch.from_numpy(np.ascontiguousarray(array.astype("f4"))) for array in (layer.a, layer.b))
            if layer.kind == "conv":
                a = a.permute(3, 2, 0, 1)
                delta = torch.nn.functional.conv2d(args[0], a, stride=module.stride, padding=module.padding)
                delta = torch.nn.functional.conv2d(delta, b.T[:, :, None, None])
            else:
                delta = (a[args[0]] if layer.kind == "embedding" else args[0] @ a) @ b
            if layer.bias is not None:
                delta = delta + torch.from_numpy(layer.bias)
            return output + layer.scale * delta

        return add

    return [model.get_submodule(path).register_forward_hook(hook(layer)) for path, layer in adapter.layers.items()]


def assert_same_files(first, second):
    name = "adapter_model.safetensors"
    assert (first / name).read_bytes() == (second / name).read_bytes()
    configs = [json.loads((directory / "adapter_config.json").read_text()) for directory in (first, second)]
    assert configs[0] == configs[1]
