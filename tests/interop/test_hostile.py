"""Hostile and broken input through the public names: a clear error in under a second, nothing executed or written."""

import json
import os
import re
import shutil
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from interop import FormatError, load_base, load_lora, load_xlora, repoint
from interop.checkpoint.read import read_xlora
from interop.checkpoint.write import write_xlora
from tests.helpers import reference
from tests.helpers.pickles import RunsCode
from tests.helpers.small_checkpoints import small_model
from xlora_jax import XLoraConfig

NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture
def llama(base, tmp_path):
    return shutil.copytree(base("llama"), tmp_path / "base")


@pytest.fixture
def sharded(base, tmp_path):
    return shutil.copytree(base("llama", max_shard_size="100KB"), tmp_path / "base")


@pytest.fixture
def lora(base, tmp_path):
    return reference.make_adapter(base("llama"), tmp_path / "math", 1, 3, 5, ["q_proj", "down_proj"])


def refused(words, call, *args, **kwargs):
    """The call raises an error with these words, in under a second of work, and changes no file."""
    directory = next(arg for arg in args if isinstance(arg, os.PathLike))
    before = snapshot(directory)
    started = time.process_time()
    with pytest.raises((FormatError, FileNotFoundError), match=words) as caught:
        call(*args, **kwargs)
    assert time.process_time() - started < 1
    assert len(str(caught.value)) < 1500
    assert snapshot(directory) == before


def snapshot(directory):
    return sorted((str(path), path.lstat().st_size, path.lstat().st_mtime_ns) for path in directory.parent.rglob("*"))


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(path, **changes):
    save_file({**load_file(path), **{name.replace("/", "."): tensor for name, tensor in changes.items()}}, path)


class TestBase:
    def test_truncated(self, llama):
        path = llama / "model.safetensors"
        os.truncate(path, path.stat().st_size // 2)
        refused(r"model\.safetensors: .*data_offsets", load_base, llama)

    def test_header_beyond_the_file(self, llama):
        path = llama / "model.safetensors"
        path.write_bytes((2**62).to_bytes(8, "little") + path.read_bytes()[8:])
        refused(r"model\.safetensors: truncated or no safetensors file", load_base, llama)

    def test_overlapping_offsets(self, llama):
        path = llama / "model.safetensors"
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        header[NORM]["data_offsets"] = [offset - 4 for offset in header[NORM]["data_offsets"]]
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
        refused(r"the bytes of '.*' overlap those of", load_base, llama)

    @pytest.mark.parametrize(
        ("tensor", "words"),
        [
            (torch.ones(48, dtype=torch.int64), "dtype"),
            (torch.ones(48).to(torch.float8_e4m3fn), "quantized"),
            (torch.ones(47), r"\[48\].*\[47\]"),
            (torch.ones(48, 1), r"\[48\].*\[48, 1\]"),
            (torch.full((48,), torch.nan), "48 NaN or infinite values"),
            (torch.full((48,), torch.inf), "48 NaN or infinite values"),
        ],
    )
    def test_wrong_tensors(self, llama, tensor, words):
        edit_tensors(llama / "model.safetensors", **{NORM.replace(".", "/"): tensor})
        refused(rf"(?s)model\.safetensors: .*{re.escape(NORM)}.*{words}", load_base, llama)

    def test_missing_and_unexpected_tensors(self, llama):
        state = load_file(llama / "model.safetensors")
        state["model.layers.1.magic.weight"] = state.pop(NORM)
        save_file(state, llama / "model.safetensors")
        refused(rf"Missing: {re.escape(NORM)}\. Unexpected: model\.layers\.1\.magic\.weight", load_base, llama)

    def test_missing_shard(self, sharded):
        shard = sorted(sharded.glob("model-*.safetensors"))[1]
        shard.unlink()
        refused(f"the shard {re.escape(shard.name)} is missing", load_base, sharded)

    @pytest.mark.parametrize("where", ["../secret.safetensors", "/etc/hostname"])
    def test_index_outside(self, sharded, where):
        path = sharded / "model.safetensors.index.json"
        index = json.loads(path.read_text())["weight_map"]
        edit_json(path, weight_map=dict.fromkeys(index, where))
        refused("points outside the directory", load_base, sharded)

    def test_link_outside(self, llama):
        shutil.move(llama / "model.safetensors", llama.parent / "elsewhere.safetensors")
        (llama / "model.safetensors").symlink_to("../elsewhere.safetensors")
        refused("a link that leaves the directory", load_base, llama)

    def test_pickle_that_runs_code(self, llama):
        (llama / "model.safetensors").unlink()
        torch.save({"model.norm.weight": RunsCode(str(llama / "it-ran"))}, llama / "pytorch_model.bin")
        refused("refused by torch's weights-only loader", load_base, llama)

    @pytest.mark.parametrize("text", ["[]", "3", "", "{", '{"model_type": "llama", "model_type": "qwen2"}'])
    def test_config_that_is_no_object(self, llama, text):
        (llama / "config.json").write_text(text)
        refused(r"config\.json", load_base, llama)

    @pytest.mark.parametrize("change", [{"model_type": "magic"}, {"model_type": None}, {"model_type": ["llama"]}])
    def test_unknown_architecture(self, llama, change):
        edit_json(llama / "config.json", **change)
        refused("config.json", load_base, llama)

    @pytest.mark.parametrize(
        ("field", "value", "got"),
        [
            ("hidden_size", "48", r"'48'"),
            ("rms_norm_eps", "1e-5", "got str"),
            ("num_hidden_layers", "3", r"'3'"),
            ("num_hidden_layers", -3, r"got -3"),
            ("num_hidden_layers", 0, r"got 0"),
            ("num_hidden_layers", 10**9, r"1 to 1000, got 1000000000"),
            ("num_hidden_layers", 2.5, r"got 2\.5"),
            ("num_hidden_layers", True, r"got True"),
            ("num_attention_heads", 0, r"got 0"),
            ("num_attention_heads", 7, r"7"),
            ("intermediate_size", [80], r"got \[80\]"),
            ("vocab_size", None, "got null"),
            ("hidden_act", "magic", "got 'magic'"),
            ("hidden_act", 3, "got "),
            ("rope_parameters", {"rope_type": "default", "rope_theta": "10000"}, "'10000'"),
            ("rope_parameters", {"rope_type": "linear", "rope_theta": 1e4, "factor": -2.0}, r"-2\.0"),
            ("rope_parameters", [], ""),
            ("attention_bias", "no", "got str"),
            ("dtype", "magic", "magic"),
            ("tie_word_embeddings", 3, "got int"),
            ("head_dim", 2**30, "1 to 65536, got 1073741824"),
        ],
    )
    def test_fields_of_the_config(self, llama, field, value, got):
        """File, field, what was expected, what stands there."""
        edit_json(llama / "config.json", **{field: value})
        name = {"rope_parameters": "rope|factor", "num_attention_heads": "heads"}.get(field, field)
        refused(rf"(?s)config\.json.*({name}).*{got}", load_base, llama)

    @pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"])
    def test_missing_fields_of_the_config(self, llama, field):
        """Where transformers puts in a default of its own."""
        content = json.loads((llama / "config.json").read_text())
        del content[field]
        (llama / "config.json").write_text(json.dumps(content))
        refused(rf"config\.json: field '{field}': expected a whole number .* the field is missing", load_base, llama)

    def test_sizes_of_another_model(self, llama):
        edit_json(llama / "config.json", vocab_size=10**9)
        refused(r"embed_tokens\.weight.*\[1000000000, 48\].*\[97, 48\]", load_base, llama)

    def test_no_config(self, llama):
        (llama / "config.json").unlink()
        refused(r"no config\.json", load_base, llama)


class TestAdapters:
    def test_of_another_base(self, base, lora, tmp_path):
        """Names the first module that doesn't fit, and both shapes."""
        other = base("llama", hidden_size=60, head_dim=10)
        with pytest.raises(FormatError, match=r"(?s)'math'.*model\.layers\.0\.mlp\.down_proj.*\[80, 48\].*\[80, 60\]"):
            load_xlora(other, adapters={"math": lora})

    def test_of_another_architecture(self, base, lora):
        path = lora / "adapter_model.safetensors"
        save_file({key.replace("down_proj", "fc2"): tensor for key, tensor in load_file(path).items()}, path)
        words = r"'model\.layers\.0\.mlp\.fc2' is no module of the base model that can be adapted; nearest: "
        with pytest.raises(FormatError, match=words):
            load_xlora(base("llama"), adapters={"math": lora})

    def test_of_deeper_bases(self, base, lora):
        path = lora / "adapter_model.safetensors"
        save_file({key.replace("layers.2", "layers.7"): tensor for key, tensor in load_file(path).items()}, path)
        with pytest.raises(FormatError, match=r"'model\.layers\.7\.mlp\.down_proj' is no module of the base model"):
            load_xlora(base("llama"), adapters={"math": lora})

    def test_with_a_changed_embedding(self, base, tmp_path):
        lora = reference.make_adapter(base("llama"), tmp_path / "a", 1, 3, 5, ["embed_tokens", "q_proj"])
        path = lora / "adapter_model.safetensors"
        state = load_file(path)
        state["base_model.model.model.embed_tokens.base_layer.weight"][5, 7] += 0.5
        save_file(state, path)
        with pytest.raises(FormatError, match=r"embed_tokens"):
            load_xlora(base("llama"), adapters={"math": lora})

    def test_none_at_all(self, base):
        with pytest.raises(ValueError, match="no experts"):
            load_xlora(base("llama"), adapters={})

    def test_where_there_is_none(self, base, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no adapter_config\.json"):
            load_xlora(base("llama"), adapters={"math": tmp_path})
        with pytest.raises(FileNotFoundError, match="no such directory"):
            load_xlora(base("llama"), adapters={"math": tmp_path / "nowhere"})

    def test_truncated(self, lora):
        path = lora / "adapter_model.safetensors"
        os.truncate(path, path.stat().st_size - 1)
        refused(r"adapter_model\.safetensors", load_lora, lora)

    def test_pickle_that_runs_code(self, lora):
        (lora / "adapter_model.safetensors").unlink()
        torch.save(RunsCode(str(lora / "it-ran")), lora / "adapter_model.bin")
        refused("refused by torch's weights-only loader", load_lora, lora)


class TestCheckpoints:
    def test_more_selected_than_there_are_experts(self, base, lora):
        config = XLoraConfig(hidden_size=48, adapters={}, top_k_lora=2)
        with pytest.raises(ValueError, match="top_k_lora must be at most the number of experts"):
            load_xlora(base("llama"), adapters={"math": lora}, config=config)

    def test_experts_that_are_gone(self, base, tmp_path):
        from interop.checkpoint.write import write_xlora

        write_xlora(tmp_path / "x", layout="peft", **small_model(1, False))
        shutil.rmtree(tmp_path / "x" / "experts")
        with pytest.raises(FormatError, match=r"not where the checkpoint says: math.*code.*prose"):
            load_xlora(base("llama"), checkpoint=tmp_path / "x")

    def test_of_another_base(self, base, lora, tmp_path):
        from interop.checkpoint.write import write_xlora

        write_xlora(tmp_path / "x", layout="peft", **small_model(1, False, names=("math",)))
        with pytest.raises(ValueError, match=r"hidden_size is 5, but the base model's hidden size is 48"):
            load_xlora(base("llama"), checkpoint=tmp_path / "x", adapters={"math": lora})

    def test_of_other_experts(self, base, lora, tmp_path):
        """A layerwise classifier for another number of adapted layers."""
        from interop.checkpoint.write import write_xlora

        model = small_model(1, True, names=("math",))
        model["config"] = XLoraConfig(hidden_size=48, adapters={}, layerwise_scalings=True)
        model["classifier"] = [(np.ones((48, 4), "f4"), np.ones(4, "f4"))]
        write_xlora(tmp_path / "x", layout="peft", **model)
        with pytest.raises(FormatError, match=r"(?s)48 -> 4.*48 -> 6|layer"):
            load_xlora(base("llama"), checkpoint=tmp_path / "x", adapters={"math": lora})


class TestExpertPaths:
    @pytest.fixture
    def checkpoint(self, tmp_path):
        write_xlora(tmp_path / "x", layout="peft", **small_model(1, False, names=("0", "1")))
        return tmp_path / "x"

    @pytest.mark.parametrize(
        "path",
        ["../" * 8000 + "experts/0", "a/" * 20_000, "x" * 5000, "a/../" * 4000, "/" * 9000, "y" * 300, "~/" * 3000],
    )
    @pytest.mark.parametrize("call", [read_xlora, repoint])
    def test_long_ones_are_refused_at_once(self, checkpoint, path, call):
        file = checkpoint / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"adapters": {"0": path, "1": path}}))
        started = time.process_time()
        with pytest.raises(FormatError, match=str(checkpoint)):
            call(checkpoint)
        assert time.process_time() - started < 1

    @pytest.mark.parametrize("path", ["../elsewhere/experts/0", "/old/place/experts/0", "../../x/../y/experts/0"])
    def test_moved_ones_are_found(self, checkpoint, path):
        file = checkpoint / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"adapters": {"0": path, "1": path}}))
        assert set(read_xlora(checkpoint).adapters.values()) == {str(checkpoint / "experts/0")}

    def test_a_planted_link_is_not_written_through(self, checkpoint, tmp_path):
        victim = tmp_path / "victim"
        victim.write_text("untouched")
        (checkpoint / ".adapter_config.json.partial").symlink_to(victim)
        repoint(checkpoint)
        assert victim.read_text() == "untouched"
        assert (checkpoint / ".adapter_config.json.partial").is_symlink()

    def test_a_long_name_in_the_original_layout(self, tmp_path):
        write_xlora(tmp_path / "x", layout="xlora", **small_model(1, False, names=("a", "b")))
        file = tmp_path / "x/xlora_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"adapters": ["n" * 300, "b"]}))
        with pytest.raises(FormatError, match="is no folder's name"):
            read_xlora(tmp_path / "x")

    @pytest.mark.parametrize("place", ["n" * 300, "~nobody-of-that-name/x", "a\0b", "n/" * 5000])
    def test_a_directory_that_can_not_be(self, place):
        with pytest.raises(FileNotFoundError, match="no such directory"):
            load_lora(place)
