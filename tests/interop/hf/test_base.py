"""Base models as files: back bit for bit, in shards, and loaded without a second copy in memory."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from interop import load_base, save_base
from tests.helpers.families import make_model


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("scan_layers", [True, False])
def test_round_trip_is_bit_identical(base: Callable[..., Path], tmp_path: Path, family: str, scan_layers: bool) -> None:
    source = base(family)
    save_base(load_base(source, scan_layers=scan_layers), tmp_path / "out")
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        np.testing.assert_array_equal(tensor, after[name])


def test_transformers_reads_what_is_written_in_shards(base: Callable[..., Path], tmp_path: Path) -> None:
    source = base("llama", tie_word_embeddings=True)
    save_base(load_base(source, dtype="bfloat16"), tmp_path / "out", max_shard_bytes=40_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.dtype == torch.bfloat16
    want = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).state_dict()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, want[name])


@pytest.mark.parametrize(("family", "first"), [("gpt2", "transformer."), ("llama", "model."), ("opt", "model.")])
def test_names_may_lack_their_first_part(tmp_path: Path, family: str, first: str) -> None:
    """As the hub's gpt2 has them, with the buffers of its time: saved from the class without an output head."""
    whole = make_model(tmp_path / "whole", family, tie_word_embeddings=True)
    AutoModelForCausalLM.from_pretrained(whole).base_model.save_pretrained(tmp_path / "bare")
    tensors = load_file(tmp_path / "bare/model.safetensors")
    assert not any(name.startswith(first) for name in tensors)
    if family == "gpt2":
        old = {"h.0.attn.bias": np.ones((1, 1, 4, 4), np.float32), "h.0.attn.masked_bias": np.ones(1, np.float32)}
        save_file({**tensors, **old}, tmp_path / "bare/model.safetensors", {"format": "pt"})
    bare, wanted = load_base(tmp_path / "bare"), load_base(whole)
    assert bare.module == wanted.module
    assert jax.tree.all(jax.tree.map(np.array_equal, bare.params, wanted.params))


def test_an_earlier_save_is_replaced_and_other_files_are_not(base: Callable[..., Path], tmp_path: Path) -> None:
    model = load_base(base("llama"))
    save_base(model, tmp_path / "out", max_shard_bytes=40_000)
    save_base(model, tmp_path / "out")
    assert not list((tmp_path / "out").glob("model-*"))
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        save_base(model, tmp_path / "out")


def test_parameters_are_placed_as_they_are_read(base: Callable[..., Path]) -> None:
    mesh = Mesh(np.array(jax.devices()[:1]), ("x",))
    seen: list[tuple[str, ...]] = []

    def place(path: tuple[str, ...], leaf: Any) -> jax.Array:
        seen.append(path)
        return jax.device_put(leaf, NamedSharding(mesh, P()))

    model = load_base(base("llama"), place=place)
    assert ("base", "layers", "mlp", "up_proj", "kernel") in seen
    assert all(leaf.sharding == NamedSharding(mesh, P()) for leaf in jax.tree.leaves(model.params))


SHARDED = """
import sys
import jax, numpy as np
from interop import load_base
from xlora_jax.sharding import make_mesh, placer
ids = np.arange(14).reshape(2, 7)
whole = load_base(sys.argv[1])
parts = load_base(sys.argv[1], place=placer(make_mesh(data=1, fsdp=2, tensor=4)))
kernel = parts.params["layers"]["mlp"]["up_proj"]["kernel"]
assert len(jax.devices()) == 8 and kernel.addressable_shards[0].data.size * 8 == kernel.size
np.testing.assert_allclose(parts(ids).logits, whole(ids).logits, rtol=1e-4, atol=1e-5)
"""


@pytest.mark.slow
def test_a_mesh_gets_its_shards_straight_from_the_files(base: Callable[..., Path]) -> None:
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    subprocess.run([sys.executable, "-c", SHARDED, str(base("llama"))], env=environment, check=True, timeout=280)


# VmHWM is this process's own; ru_maxrss would begin with that of the process that started it.
PEAK = """
import re, sys
import jax, numpy as np
from transformers import AutoConfig
from interop import load_base
AutoConfig.from_pretrained(sys.argv[1])
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
jax.numpy.zeros(1).block_until_ready()
before = peak()
model = load_base(sys.argv[1], dtype="bfloat16")
leaves = jax.tree.leaves(jax.block_until_ready(model.params))
print(peak() - before, sum(leaf.nbytes for leaf in leaves), max(leaf.nbytes for leaf in leaves))
"""


@pytest.mark.slow
def test_peak_memory_is_the_model_and_one_stacked_tensor(tmp_path: Path) -> None:
    """A model of more than 1 GB in its target dtype, stored in float32 in several files."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000, hidden_size=1536, intermediate_size=6144, num_hidden_layers=13, num_attention_heads=12
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    model.save_pretrained(tmp_path / "base", max_shard_size="500MB")
    del model
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "base")], capture_output=True, text=True, check=True, timeout=280
    )
    peak, total, largest = map(int, done.stdout.split())
    assert total > 1e9
    assert peak <= total + largest, (peak, total, largest)
