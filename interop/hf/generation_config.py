"""``generation_config.json`` of an HF model: the settings that its authors recommend."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from interop.storage.errors import FormatError, brief
from interop.storage.files import file_in, read_json
from interop.storage.hub import resolve
from xlora_jax.generation.generate import GenerationConfig

__all__ = ["load_generation_config"]

_READ = (
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"),
    *("max_new_tokens", "num_return_sequences", "eos_token_id", "pad_token_id"),
)
# Defaults of transformers for fields that the file leaves out, if they differ from ours.
_DEFAULTS = {"top_k": 50}
# Values of unimplemented fields that have no effect, besides null.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "penalty_alpha": (0.0,),
    "typical_p": (1.0,),
    "top_h": (),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "bad_words_ids": (),
    "sequence_bias": (),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "guidance_scale": (1.0,),
    "stop_strings": (),
    "watermarking_config": (),
}


def load_generation_config(
    base: str | Path,
    *,
    file: str | Path | None = None,
    changes: Mapping[str, Any] | None = None,
    **hub_options: Any,
) -> GenerationConfig:
    """Read the generation settings that come with an HF model.

    Args:
        base: directory or hub id. Without a ``generation_config.json``, the end-of-sequence and padding tokens are
            those of its config.json, as in transformers.
        file: file to read in place of the model's ``generation_config.json``.
        changes: fields to set, by the names in the file or of :class:`~xlora_jax.GenerationConfig`. They replace the
            file's values before the check.
        **hub_options: ``revision``, ``subfolder``, ``token``, ``cache_dir``, ``local_files_only``.

    Returns:
        The settings; ``dataclasses.replace`` changes some of them. ``max_length`` is not read, because the caller
        decides the length. If ``do_sample`` is false, invalid settings of a draw are left out, as in transformers.

    Raises:
        FormatError: a field has a value that is invalid or not implemented; the message names the field.
    """
    if file is not None:
        path = Path(file).expanduser()
        fields = read_json(path)
    else:
        path, fields = _stored_fields(base, **hub_options)
    changes = dict(changes or {})
    ours = {field.name for field in dataclasses.fields(GenerationConfig)} - {"logits_processors", "stop_at"}
    if unknown := sorted(changes.keys() - ours - _NEUTRAL.keys()):
        raise FormatError(
            f"unknown settings of generation: {', '.join(map(brief, unknown))}; expected some of "
            f"{', '.join(sorted(ours))}."
        )
    fields = {**fields, **changes}
    for name, neutral in _NEUTRAL.items():
        value = fields.get(name)
        if value is not None and value not in neutral:
            allowed = "".join(f" or {v!r}" for v in neutral)
            raise FormatError(
                f"{path}: field {name!r}: expected it absent{allowed}, the only value that is implemented, got "
                f"{brief(value)}. Set it to {json.dumps(neutral[0] if neutral else None)} in the file, or by changes= "
                f"(on the command line --set), to generate without it."
            )
    read = {name: fields[name] for name in _READ if fields.get(name) is not None}
    for name in _READ:
        if name in read:
            _check_kind(path, name, read[name])
    if read.get("do_sample"):
        read = {**_DEFAULTS, **read}
    else:
        # Without a draw these fields have no effect: transformers decodes greedily.
        given = set(_READ) - set(_OF_A_DRAW) | changes.keys()
        read = {name: value for name, value in read.items() if name in given or _means(name, value)}
    read |= {name: changes[name] for name in changes.keys() & ours - set(_READ)}
    try:
        config = GenerationConfig(**read)
        config.settings()
    except (TypeError, ValueError) as error:
        raise FormatError(f"{path}: {error}") from error
    return config


_OF_A_DRAW = ("temperature", "top_k", "top_p", "min_p")


def _means(name: str, value: Any) -> bool:
    """Return whether a setting of a draw has a valid value."""
    try:
        GenerationConfig(**{name: value}).settings()
    except (TypeError, ValueError):
        return False
    return True


def _check_kind(path: Path, name: str, value: Any) -> None:
    """Raise FormatError for a value of the wrong type."""
    kind: tuple[type, ...] = (int,)
    expected = "a whole number"
    if name == "do_sample":
        kind, expected = (bool,), "true or false"
    elif name in ("temperature", "top_p", "min_p", "repetition_penalty"):
        kind, expected = (int, float), "a number"
    values = value if name == "eos_token_id" and isinstance(value, list) else [value]
    if not all(type(one) in kind and (not isinstance(one, float) or math.isfinite(one)) for one in values):
        raise FormatError(f"{path}: field {name!r}: expected {expected}, got {brief(value)}.")


def _stored_fields(base: str | Path, **hub_options: Any) -> tuple[Path, dict[str, Any]]:
    """Return a model's generation fields, and the file that they are from."""
    directory = resolve(base, **hub_options)
    path = file_in(directory, "generation_config.json")
    if path is not None:
        return path, dict(read_json(path))
    path = file_in(directory, "config.json")
    if path is None:
        raise FormatError(f"{directory}: no config.json; expected the directory of an HF base model.")
    content = read_json(path)
    text = content.get("text_config")
    if isinstance(text, dict):  # of a multimodal model
        content = {**text, **content}
    return path, {name: value for name, value in content.items() if name in ("eos_token_id", "pad_token_id")}
