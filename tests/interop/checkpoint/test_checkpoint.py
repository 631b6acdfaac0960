"""X-LoRA checkpoints of real PEFT (0.12 to 0.21), of the original layout and of mistral.rs: read, refused, written."""

import copy
import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path
from typing import ClassVar

import jax
import ml_dtypes
import numpy as np
import peft
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file

from interop import classifier_from_torch, classifier_to_torch, load_lora, load_xlora, repoint, save_lora, save_xlora
from interop.checkpoint.read import read_xlora
from interop.checkpoint.write import write_xlora
from interop.storage.errors import FormatError
from tests.helpers import reference
from tests.helpers.adapters import assert_same_files, edit_config, hooked, make_adapter, run
from tests.helpers.hub import COMMIT, lay_out
from tests.helpers.small_checkpoints import BLOCKS, NAMES, small_adapter, small_model
from xlora_jax.config import XLoraConfig

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

FIXTURES = Path(__file__).parent / "fixtures"
IDS = np.array([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])


@pytest.fixture(scope="module")
def llama(base):
    return base("llama")


@pytest.fixture(scope="module")
def expert_dirs(llama, experts):
    return experts(llama, "unequal")


SETTINGS = {
    "plain": {"xlora_depth": 1, "xlora_dropout_p": 0.2},
    "layerwise": {"xlora_depth": 1, "layerwise_scalings": True},
    "deep": {"xlora_depth": 2, "xlora_dropout_p": 0.1, "top_k_lora": 2, "scaling_pass_value": 0.7},
    "deep without dropout": {"xlora_depth": 2, "xlora_dropout_p": 0.0},
    "deeper": {"xlora_depth": 4, "xlora_dropout_p": 0.2, "layerwise_scalings": True, "softmax_temperature": 0.5},
    "deeper without dropout": {"xlora_depth": 4, "xlora_dropout_p": 0.0, "global_scaling_weight": 0.5},
}


@pytest.fixture(scope="module")
def peft_model(llama, expert_dirs):
    made = {}

    def get(name):
        if name not in made:
            made[name] = reference.peft_xlora(llama, expert_dirs, **SETTINGS[name])
        return made[name]

    return get


def live_classifier(model):
    return {
        key: tensor.detach().numpy() for key, tensor in reference.classifier_of(model).state_dict().items()
    }  # fmt: skip


def assert_classifier(checkpoint, model):
    """Every linear layer, in torch's order, transposed."""
    theirs = live_classifier(model)
    assert len(checkpoint.classifier) == checkpoint.config.xlora_depth == len(theirs) // 2
    for (weight, bias), key in zip(checkpoint.classifier, list(theirs)[::2], strict=True):
        np.testing.assert_array_equal(weight.T, theirs[key])
        np.testing.assert_array_equal(bias, theirs[key.replace("weight", "bias")])


def complete(model, directory):
    """PEFT's checkpoint with the tensors that it leaves out put back by hand."""
    model.save_pretrained(directory)
    prefix = "base_model.internal_xlora_classifier."
    state = {prefix + key: tensor for key, tensor in reference.classifier_of(model).state_dict().items()}
    save_file(state, directory / "adapter_model.safetensors", {"format": "pt"})
    return directory


def fresh(base_dir):
    return copy.deepcopy(reference.torch_base(base_dir))


# ---------------------------------------------------------------------------------------------------------------------
# What PEFT wrote


VERSIONS = sorted(path.name for path in FIXTURES.glob("peft-*"))


@pytest.fixture(scope="module")
def computed():
    return {version: dict(np.load(FIXTURES / version / "computed.npz")) for version in VERSIONS}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("expert", ["0", "1"])
def test_adapters_of_old_versions(version, computed, expert):
    base = transformers.AutoModelForCausalLM.from_pretrained(FIXTURES / "base").eval()
    expected, ids = computed[version], torch.from_numpy(computed[version]["input_ids"])
    np.testing.assert_allclose(run(base, ids), expected["base"], rtol=1e-5, atol=1e-5)
    adapter = load_lora(FIXTURES / version / "experts" / expert)
    assert adapter.base_model_name_or_path == "base"
    hooked(base, adapter)
    np.testing.assert_allclose(run(base, ids), expected[f"expert-{expert}"], rtol=1e-5, atol=1e-5)
    assert np.abs(expected[f"expert-{expert}"] - expected["base"]).max() > 0.1


@pytest.mark.parametrize("version", [version for version in VERSIONS if version != "peft-0.11.1"])
@pytest.mark.parametrize("name", ["xlora", "xlora-bin"])
def test_checkpoints_of_old_versions(version, computed, name, monkeypatch):
    """The classifier is the one that version had, and what it computed we compute."""
    monkeypatch.chdir(FIXTURES)
    loses = version >= "peft-0.20"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        checkpoint = read_xlora(Path(version) / name)
    assert [("recovered" in str(warning.message)) for warning in caught] == [True] * loses
    written = json.loads((Path(version) / name / "adapter_config.json").read_text())
    assert checkpoint.layout == "peft"
    assert {"adapters": dict(checkpoint.config.adapters)} == {"adapters": written["adapters"]}
    for field, value in checkpoint.config.to_dict().items():
        assert value == written[field]
    assert checkpoint.adapters == {number: f"{version}/experts/{number}" for number in "01"}
    state = {key: array for key, array in computed[version].items() if key.startswith(f"{name}/")}
    assert len(checkpoint.classifier) == len(state) // 2 == written["xlora_depth"]
    for slot, (weight, bias) in enumerate(checkpoint.classifier):
        np.testing.assert_array_equal(weight.T, state[f"{name}/layers.{3 * slot}.weight"])
        np.testing.assert_array_equal(bias, state[f"{name}/layers.{3 * slot}.bias"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*were recovered")
        model = load_xlora("base", checkpoint=Path(version) / name)
    out = model(computed[version]["input_ids"])
    expected = computed[version][name]
    assert np.linalg.norm(out.logits - expected) <= 1e-5 * np.linalg.norm(expected)
    assert np.linalg.norm(expected - computed[version]["base"]) > 1e-2 * np.linalg.norm(expected)


class TestWhatPeftLoses:
    """PEFT 0.20 and later drop classifier tensors whose slot is also an expert's name: with three, slots 0 to 2."""

    LOST: ClassVar = {
        "plain": ["layers.0.weight", "layers.0.bias"],
        "deep": ["layers.0.weight", "layers.0.bias"],
        "deep without dropout": ["layers.0.weight", "layers.0.bias", "layers.2.weight", "layers.2.bias"],
        "deeper": ["layers.0.weight", "layers.0.bias"],
    }

    @pytest.mark.parametrize("name", SETTINGS)
    def test_recovered_from_the_numbered_folders(self, tmp_path, peft_model, name):
        peft_model(name).save_pretrained(tmp_path)
        with pytest.warns(UserWarning, match=r"'layers\.0\.weight', .* were recovered from the numbered folders"):
            checkpoint = read_xlora(tmp_path)
        assert_classifier(checkpoint, peft_model(name))

    @pytest.mark.parametrize("name", LOST)
    def test_refused_where_they_are_gone(self, tmp_path, peft_model, name):
        peft_model(name).save_pretrained(tmp_path)
        for number in range(3):
            shutil.rmtree(tmp_path / str(number))
        listed = ", ".join(repr(tensor) for tensor in self.LOST[name])
        words = re.escape(f"the classifier is incomplete, without {listed}. PEFT 0.20 and later drop tensors")
        with pytest.raises(FormatError, match=words):
            read_xlora(tmp_path)

    def test_recovered_from_pickles(self, tmp_path, peft_model):
        model = peft_model("deep without dropout")
        model.save_pretrained(tmp_path)
        for file in tmp_path.rglob("adapter_model.safetensors"):
            torch.save(load_file(file), file.with_suffix(".bin"))
            file.unlink()
        with pytest.warns(UserWarning, match="were recovered"):
            checkpoint = read_xlora(tmp_path)
        assert_classifier(checkpoint, model)

    def test_a_recovered_tensor_is_checked_too(self, tmp_path, peft_model):
        peft_model("plain").save_pretrained(tmp_path)
        file = tmp_path / "0" / "adapter_model.safetensors"
        state = load_file(file)
        state["base_model.internal_xlora_classifier.layers.weight"] = torch.zeros(7, 48)
        save_file(state, file)
        with (
            pytest.warns(UserWarning, match="were recovered"),
            pytest.raises(FormatError, match=r"has shape \[7, 48\]; expected \[3, 48\]"),
        ):
            read_xlora(tmp_path)

    def test_numbered_folders_that_lead_out(self, tmp_path, peft_model):
        peft_model("plain").save_pretrained(tmp_path / "x")
        (tmp_path / "x" / "0").rename(tmp_path / "outside")
        (tmp_path / "x" / "0").symlink_to("../outside")
        with pytest.raises(FormatError, match="the classifier is incomplete"):
            read_xlora(tmp_path / "x")

    @pytest.mark.parametrize("name", SETTINGS)
    def test_a_complete_one_needs_no_warning(self, tmp_path, peft_model, name):
        checkpoint = read_xlora(complete(peft_model(name), tmp_path))
        assert_classifier(checkpoint, peft_model(name))
        assert checkpoint.layer_names is None
        for field, value in SETTINGS[name].items():
            assert getattr(checkpoint.config, field) == value


def test_extras(tmp_path, peft_model, llama):
    extras = read_xlora(complete(peft_model("plain"), tmp_path)).extras
    assert extras["task_type"] == "CAUSAL_LM"
    assert extras["base_model_name_or_path"] == str(llama)
    assert extras["peft_version"] == peft.__version__


def test_from_the_hub(tmp_path, peft_model, expert_dirs, llama):
    """A repository with the experts inside, as links to blobs."""
    complete(peft_model("deep"), tmp_path / "x")
    adapters = {str(i): f"experts/{i}" for i in range(3)}
    edit_config(tmp_path / "x", adapters=adapters)
    files = {
        name: (tmp_path / "x" / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")
    }
    for i, folder in enumerate(expert_dirs):
        files |= {f"experts/{i}/{p.name}": p.read_bytes() for p in folder.iterdir() if p.suffix != ".md"}
    lay_out(tmp_path / "cache", "org/xlora", COMMIT, files)
    model = load_xlora(llama, checkpoint="org/xlora", cache_dir=tmp_path / "cache")
    logits, _ = reference.peft_run(peft_model("deep"), input_ids=IDS)
    np.testing.assert_allclose(model(IDS).logits, logits, rtol=1e-4, atol=1e-4)


class TestOrderOfExperts:
    def save(self, directory, adapters, n=None):
        n = n or len(adapters)
        directory.mkdir(exist_ok=True)
        config = {"peft_type": "XLORA", "hidden_size": 4, "adapters": adapters, "xlora_dropout_p": 0.0}
        (directory / "adapter_config.json").write_text(json.dumps(config))
        prefix = "base_model.internal_xlora_classifier.layers.0"
        save_file(
            {f"{prefix}.weight": torch.ones(n, 4), f"{prefix}.bias": torch.arange(n).float()},
            directory / "adapter_model.safetensors",
        )
        return directory

    def test_peft_sorts_numbers_as_text(self, tmp_path):
        adapters = dict(sorted({str(i): f"org/expert{i}" for i in range(12)}.items()))
        assert list(adapters)[2] == "10"
        checkpoint = read_xlora(self.save(tmp_path, adapters))
        assert checkpoint.adapters == {str(i): f"org/expert{i}" for i in range(12)}
        assert list(checkpoint.adapters) == [str(i) for i in range(12)]
        assert list(checkpoint.config.adapters) == list(checkpoint.adapters)

    def test_names_that_peft_sorted(self, tmp_path):
        with pytest.warns(UserWarning, match="PEFT sorts the experts by name .*'code', 'math'.*pass adapters="):
            checkpoint = read_xlora(self.save(tmp_path, {"code": "org/a", "math": "org/b"}))
        assert list(checkpoint.adapters.items()) == [("code", "org/a"), ("math", "org/b")]

    def test_names_out_of_order_were_not_sorted(self, tmp_path):
        checkpoint = read_xlora(self.save(tmp_path, {"math": "org/a", "code": "org/b"}))
        assert list(checkpoint.adapters) == ["math", "code"]


class TestPlacesOfExperts:
    def checkpoint(self, directory, **adapters):
        return TestOrderOfExperts().save(directory, {str(i): path for i, path in enumerate(adapters.values())})

    def expert(self, directory):
        directory.mkdir(parents=True)
        (directory / "adapter_config.json").write_text("{}")
        return directory

    def test_inside_wins(self, tmp_path):
        """A copy of an export takes its own experts, though the original's still are where the paths say."""
        old = self.expert(tmp_path / "old" / "experts" / "0")
        new = self.expert(tmp_path / "new" / "experts" / "0")
        checkpoint = read_xlora(self.checkpoint(tmp_path / "new", a=str(old)))
        assert checkpoint.adapters == {"0": str(new)}

    def test_directly_in_the_checkpoint(self, tmp_path):
        path = self.expert(tmp_path / "x" / "math")
        checkpoint = read_xlora(self.checkpoint(tmp_path / "x", a="/gone/math", b="math"))
        assert checkpoint.adapters == {"0": str(path), "1": str(path)}

    def test_outside(self, tmp_path, monkeypatch):
        path = self.expert(tmp_path / "loras" / "math")
        monkeypatch.chdir(tmp_path)
        checkpoint = read_xlora(self.checkpoint(tmp_path / "x", a=str(path), b="loras/math"))
        assert checkpoint.adapters == {"0": str(path), "1": "loras/math"}

    def test_pefts_numbered_folders_are_no_experts(self, tmp_path):
        self.expert(tmp_path / "x" / "0")
        checkpoint = read_xlora(self.checkpoint(tmp_path / "x", a="/gone/0", b="org/name"))
        assert checkpoint.adapters == {"0": None, "1": "org/name"}

    @pytest.mark.parametrize("path", ["../../secret", "/../secret", ".."])
    def test_no_way_out_by_dots(self, tmp_path, path):
        self.expert(tmp_path / "secret")
        assert read_xlora(
            self.checkpoint(tmp_path / "a" / "x", a=path) if False else self.deep(tmp_path, path)
        ).adapters["0"] in (None, path)

    def deep(self, tmp_path, path):
        (tmp_path / "a").mkdir()
        return self.checkpoint(tmp_path / "a" / "x", a=path)


# ---------------------------------------------------------------------------------------------------------------------
# The original layout


class OriginalClassifier(torch.nn.Module):
    """The tensors of the original xlora's classifier, in the order that it has them."""

    def __init__(self, hidden, size, depth, out, relu=True, bias=True):
        super().__init__()
        self.inner = torch.nn.ModuleList()
        for i in range(depth - 1):
            self.inner.append(torch.nn.Linear(hidden if i == 0 else size, size, bias=bias))
            if relu:
                self.inner.extend([torch.nn.ReLU(), torch.nn.Dropout(0.2)])
        self.last = torch.nn.Linear(hidden if depth == 1 else size, out, bias=bias)


def original(directory, classifier, extension=".safetensors", **config):
    directory.mkdir(exist_ok=True)
    if extension == ".pt":
        torch.save(classifier.state_dict(), directory / "xlora_classifier.pt")
    else:
        save_file(classifier.state_dict(), directory / "xlora_classifier.safetensors")
    defaults = {
        "base_model_id": "org/base", "hidden_size": 8, "enable_softmax": True, "enable_softmax_topk": False,
        "layerwise_scalings": False, "xlora_depth": 1, "xlora_size": 6, "enable_relu_and_dropout": True,
        "use_bias": True, "xlora_dropout_p": 0.2, "use_trainable_adapters": False, "softmax_temperature": 1.0,
        "top_k_lora": None, "scaling_pass_value": 0.0, "global_scaling_weight": 1.0, "adapters": ["one", "two"],
    }  # fmt: skip
    content = {key: value for key, value in (defaults | config).items() if value != "absent"}
    (directory / "xlora_config.json").write_text(json.dumps(content))
    return directory


def linears(module):
    return [layer for layer in module.modules() if isinstance(layer, torch.nn.Linear)]


class TestOriginal:
    @pytest.mark.parametrize("extension", [".safetensors", ".pt"])
    @pytest.mark.parametrize("depth", [1, 2, 4])
    @pytest.mark.parametrize("dropout", [0.0, 0.2])
    def test_read(self, tmp_path, extension, depth, dropout):
        """ReLU and Dropout have numbers whatever the dropout's p, other than in PEFT."""
        module = OriginalClassifier(8, 6, depth, 2)
        checkpoint = read_xlora(original(tmp_path, module, extension, xlora_depth=depth, xlora_dropout_p=dropout))
        assert checkpoint.layout == "xlora"
        assert checkpoint.config.xlora_dropout_p == dropout
        assert checkpoint.adapters == {"one": None, "two": None}
        assert checkpoint.extras["base_model_id"] == "org/base"
        for (weight, bias), linear in zip(checkpoint.classifier, linears(module), strict=True):
            np.testing.assert_array_equal(weight, linear.weight.detach().numpy().T)
            np.testing.assert_array_equal(bias, linear.bias.detach().numpy())

    @pytest.mark.parametrize(
        ("experts", "layers", "hidden", "size", "depth"),
        [(9, 32 * 5, 4096, 2048, 1), (4, 28 * 7, 3072, 2048, 2)],
        ids=["lamm-mit/x-lora", "lamm-mit/x-lora-gemma-7b"],
    )
    def test_the_published_shapes(self, tmp_path, experts, layers, hidden, size, depth):
        module = OriginalClassifier(hidden, size, depth, experts * layers).half()
        names = [f"adapter_{i + 1}" for i in range(experts)]
        original(
            tmp_path, module, adapters=names, hidden_size=hidden, xlora_size=size, xlora_depth=depth,
            layerwise_scalings=True, xlora_dropout_p=0.2,
        )  # fmt: skip
        checkpoint = read_xlora(tmp_path)
        assert list(checkpoint.adapters) == names
        assert checkpoint.classifier[-1][0].shape == (size if depth > 1 else hidden, experts * layers)
        assert checkpoint.classifier[0][0].dtype == np.float16
        adapters = [small_adapter(name, {f"model.layers.{i}.q_proj": 2 for i in range(layers)}) for name in names]
        write_xlora(
            tmp_path / "again", layout="xlora", config=checkpoint.config, classifier=checkpoint.classifier,
            adapters=adapters, base_model="org/base", layer_names=list(adapters[0].layers),
        )  # fmt: skip
        ours, theirs = (load_file(d / "xlora_classifier.safetensors") for d in (tmp_path / "again", tmp_path))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)

    def test_experts_beside(self, tmp_path, expert_dirs):
        original(tmp_path, OriginalClassifier(8, 6, 1, 2))
        for name, folder in zip(("one", "two"), expert_dirs, strict=False):
            shutil.copytree(folder, tmp_path / name)
        checkpoint = read_xlora(tmp_path)
        assert checkpoint.adapters == {name: str(tmp_path / name) for name in ("one", "two")}
        assert load_lora(checkpoint.adapters["one"]).name == "one"

    def test_adapters_as_an_object(self, tmp_path, expert_dirs):
        given = {"one": str(expert_dirs[0]), "two": "org/two"}
        checkpoint = read_xlora(original(tmp_path, OriginalClassifier(8, 6, 1, 2), adapters=given))
        assert checkpoint.adapters == given

    @pytest.mark.parametrize("absent", ["absent", None, []])
    def test_adapters_by_their_folders(self, tmp_path, expert_dirs, absent):
        """The original loader lists the folders where the settings name none."""
        original(tmp_path, OriginalClassifier(8, 6, 1, 2), adapters=absent)
        with pytest.raises(FormatError, match="no experts at all"):
            read_xlora(tmp_path)
        for name, folder in zip(("zebra", "ant"), expert_dirs, strict=False):
            shutil.copytree(folder, tmp_path / name)
        with pytest.warns(UserWarning, match="in the order of their folders, 'ant', 'zebra'"):
            checkpoint = read_xlora(tmp_path)
        assert list(checkpoint.adapters) == ["ant", "zebra"]

    def test_no_bias(self, tmp_path):
        module = OriginalClassifier(8, 6, 2, 2, bias=False)
        directory = original(tmp_path, module, xlora_depth=2, use_bias=False)
        zeros = r"Zeros compute the same.*: add inner\.0\.bias \[6\], last\.bias \[\d+\] .*use_bias to true"
        with pytest.raises(FormatError, match=rf"has no bias \(use_bias false\).*{zeros}"):
            read_xlora(directory)

    def test_no_bias_but_zeros(self, tmp_path):
        """The way that the refusal shows."""
        module = OriginalClassifier(8, 6, 2, 2, bias=False)
        directory = original(tmp_path, module, xlora_depth=2, use_bias=True)
        path = directory / "xlora_classifier.safetensors"
        tensors = load_file(path)
        zeros = {f"{name}.bias": torch.zeros(len(tensors[f"{name}.weight"])) for name in ("inner.0", "last")}
        save_file(tensors | zeros, path)
        assert [bias.any() for _, bias in read_xlora(directory).classifier] == [False, False]

    def test_no_relu(self, tmp_path):
        module = OriginalClassifier(8, 6, 3, 2, relu=False)
        original(tmp_path, module, xlora_depth=3, enable_relu_and_dropout=False)
        with pytest.raises(
            FormatError, match="enable_relu_and_dropout is false: a classifier of 3 linear layers without"
        ):
            read_xlora(tmp_path)

    def test_no_relu_at_depth_1(self, tmp_path):
        module = OriginalClassifier(8, 6, 1, 2)
        assert read_xlora(original(tmp_path, module, enable_relu_and_dropout=False)).config.xlora_depth == 1

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"adapters": ["one", "one"]}, "two experts of one name in adapters: 'one', 'one'"),
            ({"adapters": ["../one", "two"]}, r"the expert '\.\./one' is no folder's name"),
            ({"adapters": ["one", ".."]}, r"the expert '\.\.' is no folder's name"),
            ({"adapters": ["one", 2]}, "adapters should be a list of names"),
            ({"adapters": "one"}, "adapters should be a list of names, got 'one'"),
            ({"use_mean_pool": True}, "unknown field 'use_mean_pool' = True"),
            ({"use_bias": "yes"}, "use_bias should be true or false, got 'yes'"),
            ({"enable_relu_and_dropout": 1}, "enable_relu_and_dropout should be true or false"),
            ({"xlora_depth": 2}, r"missing 'inner\.0\.weight', unexpected nothing"),
            ({"xlora_depth": 0}, "xlora_depth must be at least 1, got 0"),
            ({"xlora_depth": 10**9}, "xlora_depth is 1000000000; expected at most 1000"),
            ({"top_k_lora": 3}, "top_k_lora must be at most the number of experts"),
            ({"hidden_size": "8"}, "hidden_size must be an integer, got '8'"),
            ({"hidden_size": 9}, r"'last\.weight' has shape \[2, 8\]; expected \[2, 9\]"),
            ({"adapters": ["a", "b", "c"]}, r"'last\.weight' has shape \[2, 8\]; expected \[3, 8\]"),
            ({"adapters": ["a", "b", "c"], "layerwise_scalings": True}, r"'last\.weight' has shape \[2, 8\]; expected"),
        ],
    )
    def test_broken(self, tmp_path, change, words):
        original(tmp_path, OriginalClassifier(8, 6, 1, 2), **change)
        with pytest.raises(FormatError, match=words):
            read_xlora(tmp_path)

    def test_a_pickle_that_runs_code(self, tmp_path):
        from tests.helpers.pickles import RunsCode

        original(tmp_path, OriginalClassifier(8, 6, 1, 2), ".pt")
        torch.save({"last.weight": RunsCode(str(tmp_path / "it-ran"))}, tmp_path / "xlora_classifier.pt")
        with pytest.raises(FormatError, match="refused by torch's weights-only loader"):
            read_xlora(tmp_path)
        assert not (tmp_path / "it-ran").exists()

    def test_no_classifier(self, tmp_path):
        original(tmp_path, OriginalClassifier(8, 6, 1, 2))
        (tmp_path / "xlora_classifier.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match=r"no xlora_classifier\.safetensors or xlora_classifier\.pt"):
            read_xlora(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def assert_same_model(checkpoint, model, dropout=True):
    config = dataclasses.replace(model["config"], adapters=checkpoint.config.adapters)
    if not dropout:
        config = dataclasses.replace(config, xlora_dropout_p=0.0)
    assert checkpoint.config == config
    assert list(checkpoint.adapters) == [adapter.name for adapter in model["adapters"]]
    assert list(checkpoint.layer_names) == list(model["layer_names"])
    for ours, theirs in zip(checkpoint.classifier, model["classifier"], strict=True):
        for array, expected in zip(ours, theirs, strict=True):
            assert array.dtype == expected.dtype
            np.testing.assert_array_equal(array, expected)
    for place, adapter in zip(checkpoint.adapters.values(), model["adapters"], strict=True):
        read = load_lora(place)
        assert list(read.layers) == sorted(adapter.layers)
        for path, layer in adapter.layers.items():
            np.testing.assert_array_equal(read.layers[path].a, layer.a)
            np.testing.assert_array_equal(read.layers[path].b, layer.b)
            assert read.layers[path].scale == layer.scale


LAYOUTS = ["peft", "xlora", "mistralrs"]


def model_for(layout, *args, **options):
    """A model that the layout keeps as it is: mistral.rs has inner layers of the hidden size, and no top k at first."""
    if layout == "mistralrs":
        options["size"] = 5
        if options.get("top_k_lora") is not None:
            options["scaling_pass_value"] = 0.0
    return small_model(*args, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("layerwise", [True, False])
def test_every_layout_both_ways(tmp_path, layout, depth, layerwise):
    model = model_for(layout, depth, layerwise, top_k_lora=2, scaling_pass_value=0.25, softmax_temperature=0.5)
    write_xlora(tmp_path / "x", layout=layout, **model)
    checkpoint = read_xlora(tmp_path / "x")
    assert_same_model(checkpoint, model, dropout=layout != "mistralrs")
    assert checkpoint.layout == layout


def test_through_all_layouts_and_back(tmp_path):
    model = small_model(4, size=5, xlora_dropout_p=0.0)
    previous = None
    for layout in [*LAYOUTS, "peft"]:
        write_xlora(tmp_path / layout, layout=layout, **(previous or model))
        checkpoint = read_xlora(tmp_path / layout)
        assert_same_model(checkpoint, model)
        adapters = [load_lora(path, name=name) for name, path in checkpoint.adapters.items()]
        previous = {
            "config": checkpoint.config, "classifier": checkpoint.classifier, "adapters": adapters,
            "base_model": "org/base", "layer_names": checkpoint.layer_names,
        }  # fmt: skip


def test_names_of_the_slots(tmp_path):
    """The tensors' names, spelled out."""
    names = {
        ("peft", 0.1): ["layers.0", "layers.3", "layers.6", "layers.9"],
        ("peft", 0.0): ["layers.0", "layers.2", "layers.4", "layers.6"],
        ("xlora", 0.1): ["inner.0", "inner.3", "inner.6", "last"],
        ("xlora", 0.0): ["inner.0", "inner.3", "inner.6", "last"],
        ("mistralrs", 0.1): ["inner.0", "inner.1", "inner.2", "last"],
        ("mistralrs", 0.0): ["inner.0", "inner.1", "inner.2", "last"],
    }
    for (layout, dropout), expected in names.items():
        model = model_for(layout, 4, xlora_dropout_p=dropout)
        write_xlora(tmp_path / layout, layout=layout, **model)
        file = "adapter_model.safetensors" if layout == "peft" else "xlora_classifier.safetensors"
        stored = load_file(tmp_path / layout / file)
        prefix = "base_model.internal_xlora_classifier." if layout == "peft" else ""
        assert set(stored) == {f"{prefix}{name}.{part}" for name in expected for part in ("weight", "bias")}
        np.testing.assert_array_equal(stored[f"{prefix}{expected[1]}.weight"].numpy(), model["classifier"][1][0].T)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtypes_are_kept(tmp_path, dtype, layout):
    model = model_for(layout, dtype=dtype)
    write_xlora(tmp_path / "x", layout=layout, **model)
    assert_same_model(read_xlora(tmp_path / "x"), model, dropout=layout != "mistralrs")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_scaling_pass_of_1_over_n_is_written_as_a_number(tmp_path, layout):
    write_xlora(tmp_path / "x", layout=layout, **small_model(scaling_pass_value=None))
    assert read_xlora(tmp_path / "x").config.scaling_pass_value == 1 / 3


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    layout=st.sampled_from(LAYOUTS),
    depth=st.integers(1, 4),
    layerwise=st.booleans(),
    options=st.fixed_dictionaries(
        {},
        optional={
            "enable_softmax": st.booleans(),
            "xlora_dropout_p": st.sampled_from([0.0, 0.25, 0.5]),
            "use_trainable_adapters": st.booleans(),
            "softmax_temperature": st.floats(1e-3, 1e3),
            "top_k_lora": st.sampled_from([None, 1, 2, 3]),
            "scaling_pass_value": st.floats(-2, 2),
            "global_scaling_weight": st.floats(-2, 2),
        },
    ),
)
def test_written_and_read_is_the_same(tmp_path, layout, depth, layerwise, options):
    model = model_for(layout, depth, layerwise, **options)
    write_xlora(tmp_path / "x", layout=layout, **model)  # over the one of the example before, of any layout
    assert_same_model(read_xlora(tmp_path / "x"), model, dropout=layout != "mistralrs")


class TestExportForPeft:
    """What is written in PEFT's layout, PEFT itself loads: with differences of zero."""

    @pytest.fixture
    def exported(self, tmp_path, peft_model, expert_dirs, llama):
        def export(name, directory="x", **options):
            model = peft_model(name)
            checkpoint = read_xlora(complete(model, tmp_path / "peft"))
            adapters = [load_lora(path, name=n) for n, path in zip(NAMES, expert_dirs, strict=True)]
            write_xlora(
                tmp_path / directory, layout="peft", config=checkpoint.config, classifier=checkpoint.classifier,
                adapters=adapters, base_model=str(llama), layer_names=reference.peft_layer_names(model), **options,
            )  # fmt: skip
            return tmp_path / directory

        return export

    def assert_same_logits(self, loaded, model):
        for ours, theirs in zip(
            reference.peft_run(loaded.eval(), input_ids=IDS), reference.peft_run(model, input_ids=IDS), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)

    @pytest.mark.parametrize("name", SETTINGS)
    def test_loads(self, exported, peft_model, llama, name):
        self.assert_same_logits(PeftModel.from_pretrained(fresh(llama), exported(name)), peft_model(name))

    def test_names_are_kept_beside_the_numbers(self, exported):
        directory = exported("plain")
        written = json.loads((directory / "adapter_config.json").read_text())
        assert list(written["adapters"]) == ["0", "1", "2"]
        assert list(read_xlora(directory).adapters) == list(NAMES)
        assert sorted(entry.name for entry in directory.iterdir()) == [
            "README.md", "adapter_config.json", "adapter_model.safetensors", "experts", "xlora_ordering.json",
        ]  # fmt: skip

    def test_experts_inside_are_the_originals(self, exported, expert_dirs):
        directory = exported("plain")
        for i, folder in enumerate(expert_dirs):
            assert_same_files(folder, directory / "experts" / str(i))

    def test_extras_are_written(self, exported):
        directory = exported("plain", extras={"task_type": "SEQ_CLS", "revision": "v1", "peft_version": "0.1"})
        written = json.loads((directory / "adapter_config.json").read_text())
        assert (written["task_type"], written["revision"]) == ("SEQ_CLS", "v1")
        assert "peft_version" not in written

    def test_moved_with_a_config(self, exported, peft_model, llama, tmp_path):
        """`adapters=` is ignored, but the paths in `config=` are taken: nothing has to be rewritten."""
        shutil.move(exported("deep"), tmp_path / "moved")
        with pytest.raises(ValueError, match=r"Can't find 'adapter_config\.json'"):
            PeftModel.from_pretrained(fresh(llama), tmp_path / "moved")
        config = PeftConfig.from_pretrained(tmp_path / "moved")
        config.adapters = {i: f"{tmp_path}/moved/experts/{i}" for i in config.adapters}
        loaded = PeftModel.from_pretrained(fresh(llama), tmp_path / "moved", config=config)
        self.assert_same_logits(loaded, peft_model("deep"))

    @pytest.mark.parametrize("way", ["interop", "json"])
    def test_moved_and_repointed(self, exported, peft_model, llama, tmp_path, way):
        """Both one-liners of the model card, as they stand there, in a shell."""
        shutil.move(exported("deep"), tmp_path / "moved")
        lines = re.findall(r'^    (python -c "[^"]*")', (tmp_path / "moved" / "README.md").read_text(), re.MULTILINE)
        assert len(lines) == 2
        command = next(line for line in lines if f"import {way}" in line)
        command = command.replace("python ", f"{sys.executable} ", 1).replace("DIR", str(tmp_path / "moved"))
        subprocess.run(command, shell=True, check=True, cwd=FIXTURES.parents[3])
        loaded = PeftModel.from_pretrained(fresh(llama), tmp_path / "moved")
        self.assert_same_logits(loaded, peft_model("deep"))

    def test_moved_is_read_here_without_any(self, exported, tmp_path):
        shutil.move(exported("deep"), tmp_path / "moved")
        expected = {name: str(tmp_path / "moved" / "experts" / str(i)) for i, name in enumerate(NAMES)}
        assert read_xlora(tmp_path / "moved").adapters == expected

    def test_the_cards_python_loads_it(self, exported, peft_model, llama, tmp_path, monkeypatch):
        directory = exported("deep")
        code = re.search(r"### PEFT\n\n```python\n(.*?)```", (directory / "README.md").read_text(), re.DOTALL)[1]
        shutil.move(directory, tmp_path / "moved")
        scope = {}
        exec(code.replace("DIR", str(tmp_path / "moved")), scope)
        self.assert_same_logits(scope["model"], peft_model("deep"))

    def test_heads_are_warned_of(self, tmp_path):
        names = [*BLOCKS, "lm_head"]
        adapters = [small_adapter("a", dict.fromkeys(names, 2))]
        model = small_model(1, False, names=("a",)) | {"adapters": adapters, "layer_names": names}
        with pytest.warns(UserWarning, match="experts adapt lm_head: PEFT itself refuses"):
            write_xlora(tmp_path / "x", layout="peft", **model)
        assert_same_model(read_xlora(tmp_path / "x"), model)

    def test_more_than_ten(self, tmp_path):
        model = small_model(1, names=[f"expert{i}" for i in range(12)])
        write_xlora(tmp_path / "x", layout="peft", **model)
        assert_same_model(read_xlora(tmp_path / "x"), model)
        assert list(PeftConfig.from_pretrained(tmp_path / "x").adapters) == [str(i) for i in range(12)]


class TestRepoint:
    def test_what_is_nowhere(self, tmp_path):
        TestOrderOfExperts().save(tmp_path, {"0": "/gone/a/b"})
        with pytest.raises(FormatError, match=r"not to be found: '0 \(/gone/a/b\)'"):
            repoint(tmp_path)

    def test_hub_ids_and_outside_paths_stay(self, tmp_path, monkeypatch):
        (tmp_path / "loras" / "math").mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        TestOrderOfExperts().save(tmp_path / "x", {"0": "loras/math", "1": "org/name"})
        repoint("x")
        written = json.loads((tmp_path / "x" / "adapter_config.json").read_text())["adapters"]
        assert written == {"0": str(tmp_path / "loras" / "math"), "1": "org/name"}

    def test_what_is_no_checkpoint(self, tmp_path, expert_dirs):
        with pytest.raises(FormatError, match="no X-LoRA checkpoint in PEFT's layout"):
            repoint(tmp_path)
        with pytest.raises(FormatError, match="no X-LoRA checkpoint in PEFT's layout"):
            repoint(expert_dirs[0])


def test_prefixes_of_the_experts_become_the_bases(tmp_path, llama):
    """An adapter with keys one `model.` short is written with the base's names, which PEFT's plain loader wants."""
    directory = make_adapter(llama, tmp_path / "a", target_modules=["q_proj"])
    names = list(load_lora(directory).layers)
    state = load_file(directory / "adapter_model.safetensors")
    state = {key.replace("base_model.model.model.", "base_model.model."): tensor for key, tensor in state.items()}
    save_file(state, directory / "adapter_model.safetensors")
    model = small_model(1, False, names=("a",)) | {"adapters": [load_lora(directory)], "layer_names": names}
    write_xlora(tmp_path / "x", layout="peft", **model)
    assert list(load_lora(tmp_path / "x" / "experts" / "0").layers) == names


class TestMistralrs:
    def test_files(self, tmp_path):
        write_xlora(tmp_path / "x", layout="mistralrs", **small_model(3))
        assert sorted(path.name for path in (tmp_path / "x").iterdir()) == sorted(
            ["README.md", "xlora_config.json", "xlora_classifier.safetensors", "xlora_ordering.json"]
            + [f"{name}.{extension}" for name in NAMES for extension in ("json", "safetensors")]
        )
        ordering = json.loads((tmp_path / "x" / "xlora_ordering.json").read_text())
        assert ordering == {
            "base_model_id": "org/base", "order": list(NAMES), "layers": {name: i for i, name in enumerate(BLOCKS)}
        }  # fmt: skip
        config = json.loads((tmp_path / "x" / "xlora_config.json").read_text())
        assert config["base_model_id"] == "org/base"
        assert config["xlora_size"] == 5  # the hidden size
        assert config["xlora_dropout_p"] == 0.0  # it would be applied when generating
        assert config["use_bias"] is config["enable_relu_and_dropout"] is True

    def test_its_way_of_finding_files(self, tmp_path):
        """For each file of the directory, the first expert whose name is a part of the file's: two for each expert."""
        write_xlora(tmp_path / "x", layout="mistralrs", **small_model(3))
        found = {name: [] for name in NAMES}
        for path in (tmp_path / "x").iterdir():
            for name in NAMES:
                if name in path.name:
                    found[name].append(path.suffix)
                    break
        assert {name: sorted(files) for name, files in found.items()} == {
            name: [".json", ".safetensors"] for name in NAMES
        }

    def test_only_what_it_reads_of_an_adapter(self, tmp_path):
        """r, lora_alpha with scale alpha / r, and a list of targets; rsLoRA's scale becomes an alpha."""
        model = small_model(1, False, names=("aa",))
        layers = {
            path: dataclasses.replace(layer, alpha=6, scale=6 / math.sqrt(2))
            for path, layer in model["adapters"][0].layers.items()
        }
        config = model["adapters"][0].config | {"use_rslora": True, "lora_alpha": 6, "target_modules": "all-linear"}
        model["adapters"] = [dataclasses.replace(model["adapters"][0], layers=layers, config=config)]
        write_xlora(tmp_path / "x", layout="mistralrs", **model)
        written = json.loads((tmp_path / "x" / "aa.json").read_text())
        assert written["target_modules"] == ["q_proj", "up_proj"]
        assert written["use_rslora"] is False
        assert written["lora_alpha"] / written["r"] == pytest.approx(6 / math.sqrt(2))
        read = load_lora(tmp_path / "x" / "aa.safetensors")
        assert read.name == "aa"
        assert read.layers[BLOCKS[0]].scale == pytest.approx(6 / math.sqrt(2))

    def refused(self, tmp_path, words, names=("aa", "bb"), options=None, **changes):
        model = small_model(1, False, names=names, **(options or {}))
        adapters = list(model["adapters"])
        for field, value in changes.items():
            if field == "layer_names":
                model["layer_names"] = value
            else:
                adapters[-1] = value(adapters[-1])
        with pytest.raises(FormatError, match=words):
            write_xlora(tmp_path / "x", layout="mistralrs", **(model | {"adapters": adapters}))
        assert not (tmp_path / "x").exists()

    def test_softmax_over_top_k(self, tmp_path):
        options = {"enable_softmax_topk": True, "enable_softmax": False, "top_k_lora": 1}
        self.refused(tmp_path, "enable_softmax_topk is not implemented in mistral.rs", options=options)

    def test_top_k_in_another_scaling_pass(self, tmp_path):
        options = {"top_k_lora": 1, "scaling_pass_value": 0.5}
        self.refused(tmp_path, "top_k_lora 1 with scaling_pass_value 0.5: PEFT selects", options=options)

    @pytest.mark.parametrize("depth", [2, 3, 4])
    def test_inner_layers_are_widened_to_the_hidden_size(self, tmp_path, depth):
        """mistral.rs takes the hidden size for xlora_size; units of zeros change nothing."""
        model = small_model(depth)
        write_xlora(tmp_path / "x", layout="mistralrs", **model)
        read = read_xlora(tmp_path / "x")
        assert read.config.xlora_size == 5
        assert [weight.shape[0] for weight, _ in read.classifier] == [5] * depth

        def run(classifier, x):
            for number, (weight, bias) in enumerate(classifier):
                x = x @ weight + bias
                x = np.maximum(x, 0) if number < depth - 1 else x
            return x

        x = np.random.default_rng(3).normal(size=(7, 5)).astype("f4")
        np.testing.assert_allclose(run(read.classifier, x), run(model["classifier"], x), rtol=1e-5, atol=1e-6)
        with pytest.raises(FormatError, match="xlora_size 6 is above the hidden size 5"):
            write_xlora(tmp_path / "y", layout="mistralrs", **small_model(depth, size=6))

    def test_other_targets(self, tmp_path):
        fewer = lambda adapter: small_adapter("bb", dict.fromkeys(BLOCKS[::2], 2))  # noqa: E731
        words = r"the expert 'bb' doesn't adapt 'model\.layers\.0\.mlp\.up_proj', 'model\.layers\.1\.mlp\.up_proj'"
        self.refused(tmp_path, words, change=fewer)

    @pytest.mark.parametrize("path", ["lm_head", "model.embed_tokens", "model.layers.0.self_attn.qkv_proj"])
    def test_modules_that_it_lacks(self, tmp_path, path):
        adapters = [small_adapter(name, dict.fromkeys([*BLOCKS, path], 2)) for name in ("aa", "bb")]
        model = small_model(1, False, names=("aa", "bb")) | {"adapters": adapters, "layer_names": [*BLOCKS, path]}
        with pytest.raises(FormatError, match=f"adapts '{re.escape(path)}'; there only these can be adapted: of Llama"):
            write_xlora(tmp_path / "x", layout="mistralrs", **model)

    def test_some_blocks_only(self, tmp_path):
        limited = lambda adapter: dataclasses.replace(  # noqa: E731
            adapter, config={**adapter.config, "layers_to_transform": [0, 1]}
        )
        self.refused(tmp_path, "'bb' adapts 'q_proj', 'up_proj' in some blocks only", change=limited)

    def test_ranks_within_an_expert(self, tmp_path):
        mixed = lambda adapter: small_adapter("bb", {path: 2 + (i == 1) for i, path in enumerate(BLOCKS)})  # noqa: E731
        self.refused(tmp_path, r"'bb' has layers of different \(rank, scale\)", change=mixed)

    def test_lora_bias(self, tmp_path):
        def biased(adapter):
            layers = {
                path: dataclasses.replace(layer, bias=np.ones(2, "f4")) for path, layer in adapter.layers.items()
            }  # fmt: skip
            return dataclasses.replace(adapter, layers=layers, config={**adapter.config, "lora_bias": True})

        self.refused(tmp_path, "'bb' has lora_bias", change=biased)

    @pytest.mark.parametrize(
        "names", [("adapter_1", "adapter_10"), ("lora", "bb"), ("json", "bb"), ("READ", "bb"), ("tensors", "bb")]
    )
    def test_names_that_are_a_part_of_others(self, tmp_path, names):
        self.refused(
            tmp_path, f"finds an expert's files by its name as a part of theirs, and '{names[0]}'", names=names
        )


class TestRefusedWrites:
    @pytest.mark.parametrize("layout", ["xlora", "mistralrs"])
    @pytest.mark.parametrize("name", ["a/b", "..", "-a", "", "a b", "README.md", "ä"])
    def test_names_that_are_no_files(self, tmp_path, layout, name):
        model = small_model(1, False, names=("ok",))
        model["adapters"] = [dataclasses.replace(model["adapters"][0], name=name)]
        with pytest.raises((FormatError, TypeError), match=r"no name for a file|non-empty string"):
            write_xlora(tmp_path / "x", layout=layout, **model)
        assert not (tmp_path / "x").exists()

    def test_peft_takes_any_name(self, tmp_path):
        model = small_model(1, False, names=("a/b", "ü | \n"))
        write_xlora(tmp_path / "x", layout="peft", **model)
        assert_same_model(read_xlora(tmp_path / "x"), model)

    def test_embeddings_in_the_original(self, tmp_path, llama):
        adapter = load_lora(make_adapter(llama, tmp_path / "a", target_modules=["embed_tokens"]))
        model = small_model(1, False, names=("a",)) | {"adapters": [adapter], "layer_names": ["model.embed_tokens"]}
        with pytest.raises(
            FormatError, match=r"layout 'xlora': the expert 'a' adapts the embedding 'model\.embed_tokens'"
        ):
            write_xlora(tmp_path / "x", layout="xlora", **model)

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"layout": "gguf"}, "layout 'gguf'; expected one of peft, xlora, mistralrs"),
            ({"adapters": []}, "no experts"),
            ({"classifier": []}, r"the classifier has layers \(weight, bias\) of \[\]; expected"),
            ({"layer_names": BLOCKS[:3]}, "for 3 experts, 3 adapted layers"),
        ],
    )
    def test_what_does_not_fit(self, tmp_path, changes, words):
        with pytest.raises(FormatError, match=words):
            write_xlora(tmp_path / "x", **({"layout": "peft"} | small_model() | changes))
        assert not (tmp_path / "x").exists()

    def test_two_of_one_name(self, tmp_path):
        model = small_model()
        model["adapters"] = [dataclasses.replace(adapter, name="same") for adapter in model["adapters"]]
        with pytest.raises(FormatError, match="two experts of one name: 'same', 'same', 'same'"):
            write_xlora(tmp_path / "x", layout="peft", **model)

    def test_more_selected_than_there_are(self, tmp_path):
        model = small_model(1, False, names=("a",))
        model["config"] = XLoraConfig(hidden_size=5, adapters={}, xlora_depth=1, top_k_lora=2)
        with pytest.raises(ValueError, match="top_k_lora must be at most the number of experts"):
            write_xlora(tmp_path / "x", layout="peft", **model)

    def test_a_layer_without_a_number(self, tmp_path):
        model = small_model(1, False)
        with pytest.raises(FormatError, match=r"adapter 'math': 'model\.layers\.1\.mlp\.up_proj' is no module"):
            write_xlora(tmp_path / "x", layout="peft", **(model | {"layer_names": BLOCKS[:3]}))


class TestSavingOver:
    def test_an_earlier_save_of_any_layout_and_names(self, tmp_path):
        saved = [("xlora", NAMES), ("mistralrs", ("aa", "bb")), ("peft", NAMES), ("xlora", ("odd[1]*", "cc")[1:])]
        for layout, names in saved:
            model = model_for(layout, 3, names=names)
            write_xlora(tmp_path / "x", layout=layout, **model)
            assert_same_model(read_xlora(tmp_path / "x"), model, dropout=layout != "mistralrs")
        assert sorted(os.listdir(tmp_path)) == ["x"]

    def test_an_adapter_is_not_overwritten(self, tmp_path):
        """It has the same two files as a checkpoint in PEFT's layout."""
        save_lora(small_adapter("mine", {"model.layers.0.q_proj": 2}), tmp_path / "mine")
        with pytest.raises(FileExistsError, match=r"adapter_config\.json"):
            write_xlora(tmp_path / "mine", layout="peft", **small_model())
        load_lora(tmp_path / "mine")

    def test_nor_what_stands_beside(self, tmp_path):
        write_xlora(tmp_path / "x", layout="peft", **small_model())
        (tmp_path / "x" / "tokenizer.json").write_text("{}")
        with pytest.raises(FileExistsError, match=r"tokenizer\.json"):
            write_xlora(tmp_path / "x", layout="peft", **small_model())

    def test_nor_by_a_wildcard_in_a_name(self, tmp_path):
        write_xlora(tmp_path / "x", layout="peft", **small_model(1, False, names=("*",)))
        (tmp_path / "x" / "thesis.tex").write_text("")
        with pytest.raises(FileExistsError, match=r"thesis\.tex"):
            write_xlora(tmp_path / "x", layout="peft", **small_model())


@pytest.mark.parametrize("layout", ["xlora", "mistralrs"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_models_through_the_other_layouts(llama, experts, tmp_path, layout, dtype):
    """The same logits to the bit, with changed experts too. (PEFT's layout: see `test_export.py`.)"""
    config = XLoraConfig(
        hidden_size=48, adapters={}, xlora_depth=3, xlora_size=24, xlora_dropout_p=0.0, layerwise_scalings=True
    )
    model = load_xlora(
        llama, adapters=dict(zip(NAMES, experts(llama, "alike"), strict=True)), config=config, dtype=dtype
    )
    changed = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * 1.5 if path[-1].key == "lora_a" else leaf, model.params["experts"]
    )
    model = model.replace(params={**model.params, "experts": changed})
    save_xlora(model, tmp_path / "x", layout=layout)
    again = load_xlora(llama, checkpoint=tmp_path / "x", dtype=dtype)
    assert again.expert_names == NAMES
    assert again.layer_names == model.layer_names
    np.testing.assert_array_equal(again(IDS).logits, model(IDS).logits)


SAVER = """
    import os, signal, sys, time
    from interop.checkpoint.write import write_xlora
    from tests.helpers.small_checkpoints import small_model

    for delay in map(float, sys.argv[3:]):
        child = os.fork()
        if child == 0:
            for number in range(1, 10_000):
                write_xlora(sys.argv[1], layout=sys.argv[2], **small_model(2, value=number, size=5))
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        print("killed", flush=True)
        sys.stdin.readline()
"""


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_killed_at_any_moment(tmp_path, layout):
    """A save that is killed leaves a checkpoint that can be read, classifier and experts of one and the same save."""
    write_xlora(tmp_path / "x", layout=layout, **small_model(2, value=0, size=5))
    seen = set()
    delays = [f"{0.1 + 0.053 * attempt:.3f}" for attempt in range(8)]
    command = [sys.executable, "-c", textwrap.dedent(SAVER), str(tmp_path / "x"), layout, *delays]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, cwd=FIXTURES.parents[3], **pipes) as process:
        for _ in delays:
            assert process.stdout.readline() == "killed\n"
            checkpoint = read_xlora(tmp_path / "x")
            values = {float(v) for linear in checkpoint.classifier for array in linear for v in np.unique(array)}
            for path in checkpoint.adapters.values():
                values |= {float(v) for layer in load_lora(path).layers.values() for v in np.unique(layer.a)}
            assert len(values) == 1
            seen |= values
            process.stdin.write("go on\n")
            process.stdin.flush()
    assert len(seen) > 1


# ---------------------------------------------------------------------------------------------------------------------
# The classifier alone


def forward(dense, x):
    """Our classifier's formula on its parameters."""
    for i in range(len(dense)):
        x = x @ dense[f"dense_{i}"]["kernel"] + dense[f"dense_{i}"]["bias"]
        if i < len(dense) - 1:
            x = np.maximum(x, 0)
    return x


@pytest.mark.parametrize("name", SETTINGS)
class TestClassifierAndTorch:
    def test_from_torch(self, peft_model, name):
        """From the live classifier, the model around it, and their state dicts; it computes the same."""
        model = peft_model(name)
        live = reference.classifier_of(model)
        params = classifier_from_torch(live)
        assert list(params) == [f"dense_{i}" for i in range(SETTINGS[name]["xlora_depth"])]
        x = np.random.default_rng(0).normal(size=(5, 48)).astype("f4")
        with torch.no_grad():
            theirs = live.layers(torch.from_numpy(x)).numpy()
        np.testing.assert_allclose(forward(params, x), theirs, rtol=1e-5, atol=1e-5)
        for other in (live.state_dict(), model, model.state_dict(), model.base_model):
            again = classifier_from_torch(other)
            assert list(again) == list(params)
            for layer, parts in params.items():
                np.testing.assert_array_equal(again[layer]["kernel"], parts["kernel"])
                np.testing.assert_array_equal(again[layer]["bias"], parts["bias"])

    def test_to_torch(self, peft_model, name):
        live = reference.classifier_of(peft_model(name))
        config = XLoraConfig(hidden_size=48, adapters={}, xlora_size=24, **({"xlora_dropout_p": 0.0} | SETTINGS[name]))
        params = {
            layer: {part: np.ascontiguousarray(array) + 1 for part, array in parts.items()}
            for layer, parts in classifier_from_torch(live).items()
        }
        state = classifier_to_torch(params, config)
        other = copy.deepcopy(live)
        other.load_state_dict(state)  # strict
        assert list(state) == list(live.state_dict())
        again = classifier_from_torch(other)
        for layer, parts in params.items():
            np.testing.assert_array_equal(again[layer]["kernel"], parts["kernel"])

    def test_bfloat16(self, peft_model, name):
        live = copy.deepcopy(reference.classifier_of(peft_model(name))).to(torch.bfloat16)
        params = classifier_from_torch(live)
        assert params["dense_0"]["kernel"].dtype == ml_dtypes.bfloat16
        config = XLoraConfig(hidden_size=48, adapters={}, xlora_size=24, **({"xlora_dropout_p": 0.0} | SETTINGS[name]))
        for key, tensor in classifier_to_torch(params, config).items():
            assert torch.equal(tensor, live.state_dict()[key])


def test_classifier_of_the_original_package():
    module = OriginalClassifier(8, 6, 3, 2)
    params = classifier_from_torch(module)
    for dense, linear in zip(params.values(), linears(module), strict=True):
        np.testing.assert_array_equal(dense["kernel"], linear.weight.detach().numpy().T)


def state(*slots, last=False):
    tensors = {f"layers.{slot}.{part}": torch.ones(2, 2) for slot in slots for part in ("weight", "bias")}
    return tensors | ({"last.weight": torch.ones(2, 2), "last.bias": torch.ones(2)} if last else {})


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({}, "an incomplete X-LoRA classifier"),
        (state(3), "an incomplete X-LoRA classifier"),
        (state(2, 4), "an incomplete X-LoRA classifier"),
        (state(0, 3, 9), "an incomplete X-LoRA classifier"),
        ({"layers.0.weight": torch.ones(2, 2)}, "an incomplete X-LoRA classifier"),
        ({"layers.0.weight": torch.ones(3, 2), "layers.0.bias": torch.ones(3)} | {
            key.replace(".0.", ".2."): tensor for key, tensor in state(0).items()
        }, "a layer of 3 outputs stands before one of 2 inputs"),
        ({"lm_head.weight": torch.ones(2, 2)}, "'lm_head.weight' is no tensor of an X-LoRA classifier"),
    ],
)  # fmt: skip
def test_incomplete_classifiers(tensors, words):
    with pytest.raises(FormatError, match=words):
        classifier_from_torch(tensors)


def test_classifier_of_another_depth():
    params = {"dense_0": {"kernel": np.ones((4, 2)), "bias": np.ones(2)}}
    with pytest.raises(FormatError, match="the classifier has 'dense_0'; expected 'dense_0', 'dense_1'"):
        classifier_to_torch(params, XLoraConfig(hidden_size=4, adapters={}, xlora_depth=2))


# ---------------------------------------------------------------------------------------------------------------------
# Broken and hostile


@pytest.fixture
def exported(tmp_path):
    write_xlora(tmp_path / "x", layout="peft", **small_model(2))
    return tmp_path / "x"


PREFIX = "base_model.internal_xlora_classifier."
BROKEN = {
    "no object": (lambda c: [], "expected a JSON object, got list"),
    "kind": (lambda c: c | {"peft_type": "LORA"}, "peft_type is 'LORA'; expected 'XLORA'"),
    "unknown field": (lambda c: c | {"magic": 1}, "unknown field 'magic' = 1"),
    "adapters a list": (lambda c: c | {"adapters": ["a"]}, "adapters should be an object of name to path"),
    "path a number": (lambda c: c | {"adapters": {"0": 1}}, "adapters should be an object of name to path"),
    "no experts": (lambda c: c | {"adapters": {}}, "no experts at all"),
    "fewer experts": (lambda c: c | {"adapters": {"0": "org/a"}}, r"has shape \[12, 4\]; expected \[4, 4\]"),
    "number as text": (lambda c: c | {"xlora_depth": "2"}, "xlora_depth must be an integer, got '2'"),
    "negative": (lambda c: c | {"xlora_depth": -2}, "xlora_depth must be at least 1, got -2"),
    "huge depth": (lambda c: c | {"xlora_depth": 10**12}, "expected at most 1000"),
    "other depth": (lambda c: c | {"xlora_depth": 3}, r"incomplete, without 'layers\.6\.weight'"),
    "other dropout": (lambda c: c | {"xlora_dropout_p": 0.0}, r"incomplete, without 'layers\.2\.weight'"),
    "other width": (lambda c: c | {"hidden_size": 6}, r"layers\.0\.weight' has shape \[4, 5\]; expected \[4, 6\]"),
    "huge width": (lambda c: c | {"xlora_size": 10**15}, r"layers\.0\.weight' has shape \[4, 5\]; expected"),
    "temperature": (lambda c: c | {"softmax_temperature": 0}, "softmax_temperature must be above 0"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_settings(exported, case):
    change, words = BROKEN[case]
    path = exported / "adapter_config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    started = time.process_time()
    with pytest.raises(FormatError, match=words) as caught:
        read_xlora(exported)
    assert time.process_time() - started < 1
    assert str(exported) in str(caught.value)


def test_an_expert_twice(exported):
    path = exported / "adapter_config.json"
    path.write_text('{"peft_type": "XLORA", "adapters": {"0": "a/b", "0": "c/d"}}')
    with pytest.raises(FormatError, match="the key '0' stands twice in one object"):
        read_xlora(exported)


BROKEN_TENSORS = {
    "NaN": ({"layers.3.weight": torch.full((12, 4), torch.nan)}, r"layers\.3\.weight' holds 48 NaN or infinite values"),
    "infinity": ({"layers.0.bias": torch.full((4,), torch.inf)}, r"layers\.0\.bias' holds 4 NaN or infinite values"),
    "integers": ({"layers.0.weight": torch.ones(4, 5, dtype=torch.int64)}, "has dtype int64; expected one of"),
    "unexpected": ({"layers.4.weight": torch.ones(1)}, r"missing nothing, unexpected 'layers\.4\.weight'"),
    "transposed": ({"layers.0.weight": torch.ones(5, 4)}, r"\[5, 4\]; expected \[4, 5\]"),
    "scalar": ({"layers.3.weight": torch.ones(())}, r"has shape \[\]; expected"),
    "bias": ({"layers.3.bias": torch.ones(11)}, r"layers\.3\.bias' has shape \[11\]; expected \[12\]"),
}


@pytest.mark.parametrize("case", BROKEN_TENSORS)
def test_broken_tensors(exported, case):
    changes, words = BROKEN_TENSORS[case]
    path = exported / "adapter_model.safetensors"
    save_file(load_file(path) | {PREFIX + key: tensor for key, tensor in changes.items()}, path)
    with pytest.raises(FormatError, match=words):
        read_xlora(exported)


@pytest.mark.parametrize(
    ("ordering", "words"),
    [
        ("[]", "expected a JSON object"),
        ({"order": "math"}, "order should be a list of the experts' names"),
        ({"order": ["a", "a", "b"]}, "two experts of one name in order"),
        ({"order": list(NAMES), "layers": ["q"]}, "layers should number the adapted layers from 0"),
        ({"order": list(NAMES), "layers": {"q": 1}}, "layers should number the adapted layers from 0"),
        ({"order": list(NAMES), "layers": {"q": 0, "k": 0}}, "layers should number"),
        ({"order": list(NAMES), "layers": {"q": "0"}}, "layers should number"),
        ({"order": list(NAMES), "layers": {"q": True, "k": False}}, "layers should number"),
        ({"order": list(NAMES), "layers": {"q": 0}}, r"has shape \[12, 4\]; expected \[3, 4\]"),
    ],
)
def test_broken_orderings(exported, ordering, words):
    text = ordering if isinstance(ordering, str) else json.dumps(ordering)
    (exported / "xlora_ordering.json").write_text(text)
    with pytest.raises(FormatError, match=words):
        read_xlora(exported)


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no X-LoRA checkpoint; expected adapter_config\.json"):
        read_xlora(tmp_path)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_flipped_bytes_in_settings_never_crash(tmp_path, data):
    if not (tmp_path / "x").exists():
        write_xlora(tmp_path / "x", layout="peft", **small_model(2))
        shutil.copy(tmp_path / "x" / "adapter_config.json", tmp_path / "original.json")
    content = bytearray((tmp_path / "original.json").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "x" / "adapter_config.json").write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            checkpoint = read_xlora(tmp_path / "x")
        except FormatError:
            return
    assert len(checkpoint.classifier) == checkpoint.config.xlora_depth
