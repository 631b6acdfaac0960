"""Directories and hub ids: the hub is a cache laid out by hand, as the hub's own, and nothing is reachable."""

from pathlib import Path

import numpy as np
import pytest

from interop.storage.errors import FormatError
from interop.storage.hub import resolve
from interop.storage.tensors import open_tensors, write_safetensors
from tests.helpers.hub import COMMIT, OTHER, lay_out


@pytest.fixture
def weights(tmp_path):
    write_safetensors(tmp_path / "w.safetensors", {"a": np.arange(3, dtype="f4")})
    return (tmp_path / "w.safetensors").read_bytes()


@pytest.fixture
def cache(tmp_path, weights):
    lay_out(
        tmp_path / "cache", "org/lora", COMMIT, {"adapter_config.json": b"{}", "adapter_model.safetensors": weights}
    )
    return tmp_path / "cache"


def test_a_directory_is_taken_as_it_is(tmp_path):
    (tmp_path / "org" / "lora").mkdir(parents=True)
    assert resolve(tmp_path) == tmp_path
    assert resolve(str(tmp_path)) == tmp_path
    assert resolve(tmp_path, subfolder="org/lora") == tmp_path / "org" / "lora"


def test_a_directory_wins_over_a_hub_id(tmp_path, cache, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "lora").mkdir(parents=True)
    assert resolve("org/lora", cache_dir=cache) == Path("org/lora")


@pytest.mark.parametrize("options", [{"local_files_only": True}, {}])  # the tests run with HF_HUB_OFFLINE=1
def test_cached(cache, options):
    directory = resolve("org/lora", cache_dir=cache, **options)
    assert directory == cache / "models--org--lora" / "snapshots" / COMMIT
    # The links lead out of the snapshot, to the blobs of the same repository, and are followed.
    assert open_tensors(directory, "adapter_model")["a"].read().tolist() == [0, 1, 2]


def test_cached_pickle(tmp_path):
    import torch

    torch.save({"a": torch.ones(2)}, tmp_path / "x.bin")
    lay_out(tmp_path / "cache", "org/old", COMMIT, {"pytorch_model.bin": (tmp_path / "x.bin").read_bytes()})
    assert open_tensors(resolve("org/old", cache_dir=tmp_path / "cache"))["a"].read().tolist() == [1, 1]


def test_links_to_another_repository_are_not_followed(cache):
    stolen = lay_out(cache, "org/evil", COMMIT, {"config.json": b"{}"})
    (stolen / "adapter_model.safetensors").symlink_to(cache / "models--org--lora" / "blobs" / f"{COMMIT[:8]}1")
    with pytest.raises(FormatError, match="a link that leaves the directory"):
        open_tensors(resolve("org/evil", cache_dir=cache), "adapter_model")


def test_revision(tmp_path, cache, weights):
    lay_out(cache, "org/lora", OTHER, {"adapter_model.safetensors": weights}, refs=("v2",))
    snapshots = cache / "models--org--lora" / "snapshots"
    assert resolve("org/lora", cache_dir=cache) == snapshots / COMMIT
    assert resolve("org/lora", cache_dir=cache, revision="v2") == snapshots / OTHER
    assert resolve("org/lora", cache_dir=cache, revision=OTHER) == snapshots / OTHER
    with pytest.raises(FileNotFoundError, match=r"org/lora: .* at revision v3 is neither cached"):
        resolve("org/lora", cache_dir=cache, revision="v3")


def test_subfolder(cache, weights):
    snapshot = lay_out(cache, "org/many", COMMIT, {"experts/math/adapter_model.safetensors": weights})
    directory = resolve("org/many", cache_dir=cache, subfolder="experts/math")
    assert directory == snapshot / "experts" / "math"
    assert list(open_tensors(directory, "adapter_model")) == ["a"]
    with pytest.raises(FileNotFoundError, match="org/many: no folder 'experts/code'"):
        resolve("org/many", cache_dir=cache, subfolder="experts/code")


@pytest.mark.parametrize("subfolder", ["..", "a/../..", "/etc", "", "a\\b"])
def test_subfolder_that_leaves(tmp_path, subfolder):
    with pytest.raises(FormatError, match=r"subfolder .*: expected a relative path within"):
        resolve(tmp_path, subfolder=subfolder)


def test_what_is_asked_for(monkeypatch, tmp_path):
    """Token, revision and patterns reach the hub; pickles are asked for only where no safetensors came."""
    import huggingface_hub

    calls = []

    def download(repo_id, **options):
        calls.append((repo_id, options))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    resolve("org/name", token="secret", revision="v1")
    assert [call[0] for call in calls] == ["org/name", "org/name"]
    assert all(call[1]["token"] == "secret" and call[1]["revision"] == "v1" for call in calls)
    assert calls[0][1]["allow_patterns"] == ["*.json", "*.safetensors"]
    assert calls[1][1]["allow_patterns"] == ["*.bin", "*.pt", "*.json", "*.safetensors"]
    calls.clear()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "x.safetensors").touch()
    resolve("org/name", subfolder="sub", files=["adapter_model.safetensors"])
    assert [call[1]["allow_patterns"] for call in calls] == [["sub/adapter_model.safetensors"]]


def test_neither_cached_nor_reachable(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"org/nothing: no such directory.*offline.*hf download org/nothing"):
        resolve("org/nothing", cache_dir=tmp_path)


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all", "a/b/c", Path("org/name")])
def test_paths_are_not_asked_for_on_the_hub(path):
    with pytest.raises(FileNotFoundError, match="no such directory"):
        resolve(path)


def test_a_file(tmp_path):
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(NotADirectoryError, match="pass the directory"):
        resolve(tmp_path / "adapter_config.json")
