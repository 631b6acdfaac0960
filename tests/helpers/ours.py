"""Models of this library that equal a reference in PEFT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from interop import classifier_from_torch, load_xlora
from tests.helpers.reference import classifier_of, config_of
from xlora_jax import XLoraConfig, XLoraModel

# PEFT could not use these names: it needs "0", "1", ...
NAMES = ("arithmetic", "prose", "code", "law", "chemistry")


def our_config(base_dir: Path, adapters: Mapping[str, Any], **config: Any) -> XLoraConfig:
    return XLoraConfig(
        hidden_size=config_of(base_dir).get_text_config().hidden_size,
        adapters={name: str(path) for name, path in adapters.items()},
        **{"xlora_size": 24, "xlora_dropout_p": 0.0, **config},
    )


def our_xlora(base_dir: Path, adapters: Sequence[Path], theirs: Any = None, **config: Any) -> XLoraModel:
    """Return our X-LoRA model with the settings of `peft_xlora(base_dir, adapters, **config)`, and its classifier."""
    named = dict(zip(NAMES, map(str, adapters), strict=False))
    model = load_xlora(base_dir, adapters=named, config=our_config(base_dir, named, **config), dtype=jnp.float32)
    return model if theirs is None else with_classifier(model, classifier_of(theirs))


def with_classifier(model: XLoraModel, theirs: Any) -> XLoraModel:
    """Return `model` with a classifier of PEFT (a live one, or its state dict)."""
    return model.replace(params={**model.params, "classifier": classifier_from_torch(theirs)})
