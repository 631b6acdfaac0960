"""Bases quantized while they are loaded: same results as with the kernels' values, little memory, honest files."""

from __future__ import annotations

import gc
import shutil
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from interop import load_base, load_xlora, save_base, save_xlora
from interop.model import open_xlora
from interop.storage.errors import FormatError
from tests.helpers.ours import our_config
from tests.helpers.reference import prompt
from xlora_jax.layers.quantized import KINDS, QuantizedKernel, dequantize
from xlora_jax.trees import flatten, unflatten


@pytest.fixture(scope="module")
def small(base, experts):
    source = base("llama")
    return source, {name: str(path) for name, path in zip("ab", experts(source, "unequal"), strict=False)}


def with_values(model):
    """Return a model with its quantized kernels in floating point."""
    base = {
        path: dequantize(leaf, model.module.dtype) if isinstance(leaf, QuantizedKernel) else leaf
        for path, leaf in flatten(model.params["base"]).items()
    }
    return model.replace(params={**model.params, "base": unflatten(base)})


@pytest.mark.parametrize(("kind", "scan"), [("int8", True), ("int4", False), ("nf4", True)])
def test_logits_are_those_of_the_kernels_values(small, kind, scan):
    source, adapters = small
    model = load_xlora(source, adapters=adapters, config=our_config(source, adapters), quantize=kind, scan_layers=scan)
    leaves = flatten(model.params["base"])
    kernels = {path for path, leaf in leaves.items() if isinstance(leaf, QuantizedKernel)}
    assert kernels == {path for path in leaves if path[-1] == "kernel" and path != ("lm_head", "kernel")}
    assert len(kernels) == (7 if scan else 21)
    assert {leaf.dtype for path, leaf in leaves.items() if path not in kernels} == {jnp.dtype("float32")}
    inputs = prompt(2, 9)
    ours, theirs = model(**inputs).logits, with_values(model)(**inputs).logits
    assert float(jnp.abs(ours - theirs).max()) < 1e-5 * float(jnp.abs(theirs).max())
    # The grid does change the model: otherwise this test would say nothing.
    plain = load_xlora(source, adapters=adapters, config=our_config(source, adapters), scan_layers=scan)
    assert float(jnp.abs(ours - plain(**inputs).logits).max()) > 1e-3 * float(jnp.abs(theirs).max())


def test_greedy_tokens_are_those_of_the_kernels_values(small):
    source, adapters = small
    model = load_xlora(source, adapters=adapters, config=our_config(source, adapters), quantize="nf4")
    options = {"max_new_tokens": 12, "do_sample": False}
    ids = prompt(2, 7)["input_ids"]
    tokens = model.unstacked().generate(ids, **options)
    assert tokens.shape == (2, 19)
    np.testing.assert_array_equal(tokens, with_values(model).generate(ids, **options))


def test_a_saved_gate_tells_of_its_base(small, tmp_path):
    source, adapters = small
    model = load_xlora(source, adapters=adapters, config=our_config(source, adapters), quantize="int4")
    save_xlora(model, tmp_path / "gate")
    card = (tmp_path / "gate" / "README.md").read_text()
    assert 'checkpoint="DIR", quantize="int4")' in card
    assert "quantized kernels (int4)" in card
    # Another layout keeps the record, although it is written without the base's weights.
    save_xlora(open_xlora(source, checkpoint=tmp_path / "gate"), tmp_path / "export", layout="xlora")
    assert "quantized kernels (int4)" in (tmp_path / "export" / "README.md").read_text()
    plain = load_xlora(source, adapters=adapters, config=our_config(source, adapters))
    save_xlora(plain, tmp_path / "plain")
    assert "quantize" not in (tmp_path / "plain" / "README.md").read_text()
    # All else is the same: experts and classifier don't depend on the base's grid.
    for file in ("adapter_model.safetensors", "adapter_config.json", "experts/1/adapter_model.safetensors"):
        first, second = ((tmp_path / name / file).read_bytes() for name in ("gate", "plain"))
        assert first.replace(b"/gate/", b"/plain/") == second


def test_mistakes_are_named(small, tmp_path):
    source, adapters = small
    with pytest.raises(ValueError, match="quantize: expected None or one of int8, int4, nf4, got 'fp8'"):
        load_base(source, quantize="fp8")
    loaded = load_base(source, quantize="int8")
    with pytest.raises(FormatError, match=r"save_base: this base is quantized \(int8\).*without quantize="):
        save_base(loaded, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    with pytest.raises(ValueError, match=r"quantize 'nf4': the base model given is loaded already, as int8"):
        load_xlora(loaded, adapters=adapters, quantize="nf4")
    assert load_xlora(loaded, adapters=adapters, quantize="int8").params["base"] is loaded.params


def test_kernels_that_can_not_be_divided_are_named(base):
    source = base("llama", intermediate_size=81)
    with pytest.warns(UserWarning, match=r"quantized as nf4, 'layers/mlp/down_proj/kernel' are held in float32"):
        model = load_base(source, quantize="nf4")
    kernels = model.params["layers"]["mlp"]
    assert isinstance(kernels["up_proj"]["kernel"], QuantizedKernel)
    assert kernels["down_proj"]["kernel"].dtype == jnp.float32


def test_a_base_that_is_not_finite_is_refused(small, tmp_path):
    source, _ = small
    shutil.copytree(source, tmp_path / "base")
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 4] = np.nan
    save_file(tensors, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    with pytest.raises(FormatError, match=rf"'{name}' holds 1 NaN"):
        load_base(tmp_path / "base", quantize="int8")


@pytest.mark.parametrize("kind", KINDS)
def test_loading_takes_the_quantized_size_and_one_tensor(base, kind):
    source = base("llama", hidden_size=512, intermediate_size=2048, num_hidden_layers=6, num_attention_heads=8)
    load_base(source, quantize=kind)  # what is loaded once, such as transformers' modules, doesn't count
    gc.collect()
    tracemalloc.start()
    model = load_base(source, quantize=kind)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    own = sum(array.nbytes for array in jax.tree.leaves(model.params))
    tensor = 512 * 2048 * 4
    stack = 6 * tensor
    assert own + tensor + 0.1 * own + 4 * 2**20 < own + stack / 2, "too small to tell a tensor from a stack"
    assert peak <= own + tensor + 0.1 * own + 4 * 2**20
