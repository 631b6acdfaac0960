"""`xlora-jax export`: from a checkpoint that PEFT made through every layout, and the commands of the model cards."""

import re
import shlex
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from interop.checkpoint.read import read_xlora
from tests.helpers import reference
from xlora_jax.cli.main import app


@pytest.fixture(scope="module")
def bf16(base):
    """Of a coarser dtype than the classifiers below: an export must not round them to it."""
    return base("llama", dtype=torch.bfloat16)


def run(command):
    result = CliRunner().invoke(app, command)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture(scope="module")
def checkpoint(base, experts, tmp_path_factory):
    llama = base("llama")
    directory = tmp_path_factory.mktemp("xlora")
    adapters = experts(llama, "alike")
    reference.peft_xlora(llama, adapters, xlora_depth=2, layerwise_scalings=True).save_pretrained(str(directory))
    return directory, adapters


def export(checkpoint, base, output, *more):
    directory, adapters = checkpoint
    names = [f"--adapter={name}={path}" for name, path in zip(("math", "code", "prose"), adapters, strict=True)]
    return run(["export", "--base", str(base), "--checkpoint", str(directory), "--output", str(output), *names, *more])


def assert_same_classifier(directory, other):
    """Bit by bit; the layout of mistral.rs has inner layers as wide as the hidden state, with zeros in the rest."""
    for ours, theirs in zip(read_xlora(directory).classifier, read_xlora(other).classifier, strict=True):
        for array, wanted in zip(ours, theirs, strict=True):
            own = tuple(slice(size) for size in wanted.shape)
            assert array[own].tobytes() == wanted.tobytes()
            assert np.count_nonzero(array) == np.count_nonzero(wanted)


@pytest.mark.filterwarnings("ignore:.*were recovered from the numbered folders:UserWarning")
def test_through_every_layout_by_the_commands_of_the_cards(checkpoint, bf16, tmp_path):
    result = export(checkpoint, bf16, tmp_path / "peft")
    assert result.exit_code == 0, result.output
    assert "were recovered" in result.stderr
    assert "3 experts, math, code, prose" in result.stdout
    came = "peft"
    for layout in ("xlora", "mistralrs", "peft"):
        card = (tmp_path / came / "README.md").read_text()
        line = next(
            line for line in re.findall(r"^    (xlora-jax .*)", card, re.MULTILINE) if f"--layout {layout}" in line
        )
        output = tmp_path / ("again" if layout == "peft" else layout)
        line = line.replace("OUTPUT", str(output)).replace("DIR", str(tmp_path / came))
        result = run(shlex.split(line)[1:])
        assert result.exit_code == 0, result.output
        assert read_xlora(output).layout == layout
        assert_same_classifier(output, checkpoint[0])
        came = output.name
    for number, adapter in enumerate(checkpoint[1]):
        ours, theirs = (
            load_file(d / "adapter_model.safetensors") for d in (tmp_path / f"again/experts/{number}", adapter)
        )
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.filterwarnings("ignore:.*were recovered from the numbered folders:UserWarning")
def test_refusals_write_nothing(checkpoint, base, experts, tmp_path):
    llama = base("llama")
    result = export((checkpoint[0], experts(llama, "unequal")), llama, tmp_path / "out", "--layout", "mistralrs")
    assert result.exit_code == 1
    assert result.stderr.startswith("xlora-jax export: error: ")
    result = run(
        ["export", "--base", str(llama), "--checkpoint", str(checkpoint[0]), "--output", "x", "--adapter", "m"]
    )
    assert result.exit_code == 1
    assert "--adapter: expected NAME=PATH, got 'm'" in result.stderr
    result = export(checkpoint, llama, tmp_path / "out", "--adapter=math=/elsewhere")  # two experts of one name
    assert result.exit_code == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:.*were recovered from the numbered folders:UserWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_with_experts_on_the_embedding(base, experts, tmp_path):
    """Their copy of the base's embedding is held against the base: the one tensor that is read of it."""
    llama = base("llama")
    adapters = experts(llama, "embedding")
    reference.peft_xlora(llama, adapters).save_pretrained(str(tmp_path / "x"))
    result = export((tmp_path / "x", adapters), llama, tmp_path / "out")
    assert result.exit_code == 0, result.output
    other = shutil.copytree(base("llama", seed=1), tmp_path / "other")
    result = export((tmp_path / "x", adapters), other, tmp_path / "out")
    assert result.exit_code == 1
    assert "brings its own weights of model.embed_tokens" in result.stderr
