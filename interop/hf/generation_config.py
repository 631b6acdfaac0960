"""``generation_config.json`` of an HF model: the settings that its authors recommend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from interop.storage.errors import FormatError
from interop.storage.files import file_in, read_json
from interop.storage.hub import resolve
from xlora_jax.generation.generate import GenerationConfig

__all__ = ["load_generation_config"]

_READ = (
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"),
    *("max_new_tokens", "num_return_sequences", "eos_token_id", "pad_token_id"),
)
# How transformers fills what the file leaves open, where that is not our default.
_DEFAULTS = {"top_k": 50}
# The value at which a field that is not implemented changes nothing.
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


def load_generation_config(base: str | Path, **hub_options: Any) -> GenerationConfig:
    """Read the defaults of ``generate`` that come with an HF model.

    Args:
        base: directory or hub id. Without a ``generation_config.json`` the end of sequence and the padding token are
            those of its config.json, as in transformers.
        **hub_options: ``revision``, ``subfolder``, ``token``, ``cache_dir``, ``local_files_only``.

    Returns:
        The settings; ``dataclasses.replace`` changes some of them. ``max_length`` is not read: the length is the
        caller's.

    Raises:
        FormatError: a field has a value that is not implemented, or without meaning; the message names it.
    """
    directory = resolve(base, **hub_options)
    path = file_in(directory, "generation_config.json")
    if path is None:
        path = file_in(directory, "config.json")
        if path is None:
            raise FormatError(f"{directory}: no config.json; expected the directory of an HF base model.")
        fields = {name: value for name, value in read_json(path).items() if name in ("eos_token_id", "pad_token_id")}
    else:
        fields = read_json(path)
    for name, neutral in _NEUTRAL.items():
        value = fields.get(name)
        if value is not None and value not in neutral:
            raise FormatError(
                f"{path}: field {name!r}: expected it absent{''.join(f' or {v!r}' for v in neutral)}, the only value "
                f"that is implemented, got {value!r}; remove it, or pass your own settings."
            )
    read = {name: fields[name] for name in _READ if fields.get(name) is not None}
    if read.get("do_sample"):
        read = {**_DEFAULTS, **read}
    try:
        config = GenerationConfig(**read)
        config.settings()
    except (TypeError, ValueError) as error:
        raise FormatError(f"{path}: {error}") from error
    return config
