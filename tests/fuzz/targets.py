"""One target for each reader of files: how to make valid ones, and how to read them.

A new reader gets an entry in `TARGETS`. `make` fills an empty directory; `read` reads it, and raises AssertionError if
the result is neither right nor an error. Whatever else it raises has to be a ValueError or OSError that names a file.
"""

from __future__ import annotations

import json
import shutil
import string
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["TARGETS", "Target"]


@dataclass(frozen=True)
class Target:
    """A reader.

    Attributes:
        make: writes valid files into an empty directory.
        read: reads them.
    """

    make: Callable[[Path], Any]
    read: Callable[[Path], Any]


def _adapter(directory: Path) -> None:
    from interop.peft.adapter import write_lora
    from tests.helpers.small_checkpoints import small_adapter

    write_lora(small_adapter("a", {"model.layers.0.q": 2, "model.layers.1.q": 3}), directory)


def _adapter_bin(directory: Path) -> None:
    import torch
    from safetensors.torch import load_file

    _adapter(directory)
    torch.save(load_file(directory / "adapter_model.safetensors"), directory / "adapter_model.bin")
    (directory / "adapter_model.safetensors").unlink()


def _adapter_old_bin(directory: Path) -> None:
    import torch

    _adapter_bin(directory)
    state = torch.load(directory / "adapter_model.bin")
    torch.save(state, directory / "adapter_model.bin", _use_new_zipfile_serialization=False)


def _read_adapter(directory: Path) -> None:
    from interop import load_lora

    adapter = load_lora(directory)
    for layer in adapter.layers.values():
        assert layer.a.shape[-1] == layer.r == layer.b.shape[0]
        assert np.isfinite(layer.a).all()
        assert np.isfinite(layer.scale)


def _base_config(directory: Path) -> None:
    from transformers import LlamaConfig

    LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=64
    ).save_pretrained(directory)


def _read_base_config(directory: Path) -> None:
    from interop.hf.config import read_config
    from interop.hf.families.registry import decoder_config
    from interop.storage.files import file_in

    path = file_in(directory, "config.json")
    if path is not None:
        family, config = read_config(path)
        decoder_config(family, config, str(path))


def _sharded(directory: Path) -> None:
    from interop.storage.tensors import write_safetensors

    names = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    for name, file in names.items():
        write_safetensors(directory / file, {name: np.ones((3, 4), np.float32)})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def _read_sharded(directory: Path) -> None:
    from interop.storage.tensors import open_tensors

    for tensor in open_tensors(directory).values():
        assert tensor.read().shape == tensor.shape


def _xlora(layout: str) -> Callable[[Path], None]:
    def make(directory: Path) -> None:
        from interop.checkpoint.write import write_xlora
        from tests.helpers.small_checkpoints import small_model

        write_xlora(directory, layout=layout, **small_model(2))

    return make


def _read_xlora(directory: Path) -> None:
    from interop.checkpoint.read import read_xlora

    trained = read_xlora(directory)
    assert all(np.isfinite(weight).all() for weight, _ in trained.classifier)


def _generation_config(directory: Path) -> None:
    from transformers import GenerationConfig

    _base_config(directory)
    GenerationConfig(do_sample=True, temperature=0.7, top_p=0.9, eos_token_id=[1, 2]).save_pretrained(directory)


def _read_generation_config(directory: Path) -> None:
    from interop.hf.generation_config import load_generation_config

    load_generation_config(directory)


def _tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = ["<pad>", "<eos>", *string.ascii_lowercase]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", chat_template=template
    ).save_pretrained(directory)


def _read_tokenizer(directory: Path) -> None:
    from interop.hf.tokenizer import load_codec
    from xlora_jax.training.chats import Chat

    codec = load_codec(directory)
    codec.encode("abc", 0)
    if codec.chat is not None:
        codec.chat(Chat([{"role": "user", "content": "abc"}]), [(1, True)])


def _settings(directory: Path) -> None:
    import dataclasses

    from xlora_jax.atomic import replace_json
    from xlora_jax.training.config import TrainConfig

    replace_json(directory / "train_config.json", dataclasses.asdict(TrainConfig()))


def _read_settings(directory: Path) -> None:
    from xlora_jax.training.trainer import _read_settings

    _read_settings(directory / "train_config.json")


@cache
def _inputs() -> Any:
    from tests.helpers.synthetic import synthetic
    from xlora_jax.training.data import Rows
    from xlora_jax.training.fingerprint import run_fingerprint

    xlora, params = synthetic()
    return run_fingerprint(xlora, params, tuple(xlora.config.adapters), Rows.from_tokens(np.arange(12).reshape(2, 6)))


def _fingerprint(directory: Path) -> None:
    from xlora_jax.atomic import replace_json

    replace_json(directory / "fingerprint.json", _inputs())


def _read_fingerprint(directory: Path) -> None:
    from xlora_jax.training.fingerprint import differences, read_fingerprint, versions_differ

    now = _inputs()
    stored = read_fingerprint(directory / "fingerprint.json")
    found = differences(stored, now)
    assert bool(found) == any(stored[part] != now[part] for part in now if part != "versions")
    assert all(len(text) < 2000 for text in [*found, *versions_differ(stored, now)])


def _metrics(directory: Path) -> None:
    from xlora_jax.training.metrics import MetricsWriter

    with MetricsWriter(directory, tensorboard=False) as writer:
        for step in range(5):
            writer.write(step, "train", {"loss": 1.5, "grad_norm": float("nan")})


def _read_metrics(directory: Path) -> None:
    from xlora_jax.training.metrics import MetricsWriter

    with MetricsWriter(directory, resumed_at=2, tensorboard=False):
        pass
    for line in (directory / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line)["step"] <= 2


@cache
def _states() -> tuple[dict[int, Any], Any]:
    import jax
    import jax.numpy as jnp
    import optax

    from xlora_jax.training.step import TrainState

    def state(step: int) -> Any:
        trainable = {"classifier": {"kernel": jnp.arange(12.0).reshape(3, 4) * step, "bias": jnp.ones(4) * step}}
        return TrainState(
            step=jnp.int32(step),
            trainable=trainable,
            opt_state=optax.adam(1e-3).init(trainable),
            rng=jax.random.key(step),
            skipped=jnp.int32(0),
            skipped_in_row=jnp.int32(0),
        )

    return {1: state(1), 2: state(2)}, state(0)


def _checkpoints(directory: Path) -> None:
    from xlora_jax.training.checkpoints import Checkpoints

    with Checkpoints(directory) as checkpoints:
        for step, state in _states()[0].items():
            checkpoints.save(state, {"loader": {"next_index": step}})


def _read_checkpoints(directory: Path) -> None:
    import jax

    from xlora_jax.training.checkpoints import Checkpoints

    states, like = _states()
    with Checkpoints(directory) as checkpoints:
        found = checkpoints.restore(like)
    if found is not None:
        state, data = found
        want = states[data["loader"]["next_index"]]
        for got, right in zip(jax.tree.leaves(state), jax.tree.leaves(want), strict=True):
            if got.dtype.name.startswith("key"):
                got, right = jax.random.key_data(got), jax.random.key_data(right)
            assert np.array_equal(got, right)


_BATCH = {"input_ids": np.arange(12).reshape(2, 6)}
_HIDDEN = np.arange(48, dtype=np.float32).reshape(2, 6, 4)


def _scaling_cache(directory: Path) -> None:
    from xlora_jax.training.scaling_cache import ScalingCache

    cache = ScalingCache("m", "float32", directory)
    cache.put(cache.keys(_BATCH), _HIDDEN)


def _read_scaling_cache(directory: Path) -> None:
    from xlora_jax.training.scaling_cache import ScalingCache

    cache = ScalingCache("m", "float32", directory)
    found = cache.get(cache.keys(_BATCH))
    assert found is None or np.array_equal(found, _HIDDEN)


def _inspected(directory: Path) -> None:
    from interop.inspection import inspect_path

    inspect_path(str(directory))


def _records(directory: Path) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    records: list[dict[str, Any]] = [{"text": "abc"}, {"prompt": "a", "completion": "b"}, {"messages": chat}]
    (directory / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (directory / "data.json").write_text(json.dumps(records))
    (directory / "data.csv").write_text("prompt,completion\na,b\n")


def _read_records(directory: Path) -> None:
    from xlora_jax.training.data import Codec, encode_records
    from xlora_jax.training.records import read_records

    def encode(text: str, start: int) -> tuple[list[int], int]:
        return [ord(character) % 97 for character in text], start

    for path in sorted(directory.iterdir()):
        list(encode_records(read_records(path), Codec(encode)))


TARGETS = {
    "adapter": Target(_adapter, _read_adapter),
    "adapter, bin": Target(_adapter_bin, _read_adapter),
    "adapter, bin of old torch": Target(_adapter_old_bin, _read_adapter),
    "base config": Target(_base_config, _read_base_config),
    "sharded tensors": Target(_sharded, _read_sharded),
    "checkpoint, peft": Target(_xlora("peft"), _read_xlora),
    "checkpoint, xlora": Target(_xlora("xlora"), _read_xlora),
    "checkpoint, mistralrs": Target(_xlora("mistralrs"), _read_xlora),
    "generation config": Target(_generation_config, _read_generation_config),
    "tokenizer": Target(_tokenizer, _read_tokenizer),
    "settings of a run": Target(_settings, _read_settings),
    "fingerprint of a run": Target(_fingerprint, _read_fingerprint),
    "metrics": Target(_metrics, _read_metrics),
    "checkpoints of training": Target(_checkpoints, _read_checkpoints),
    "scaling cache": Target(_scaling_cache, _read_scaling_cache),
    "data records": Target(_records, _read_records),
    "inspect": Target(_xlora("peft"), _inspected),
}


def made(name: str, folder: Path) -> Path:
    """The valid files of a target, made once."""
    directory = folder / name.replace(" ", "-").replace(",", "")
    if not directory.exists():
        directory.mkdir(parents=True)
        TARGETS[name].make(directory)
    return directory


def copied(source: Path, to: Path) -> Path:
    """A fresh copy to damage."""
    shutil.rmtree(to, ignore_errors=True)
    return Path(shutil.copytree(source, to))
