"""Registry of transformers' model families: config readers, and the paths of modules in our variables.

Loading, saving, the order of the adapted layers and the documentation's table of families all derive from one table of
names per family. A config field is read, known not to change the output, or refused by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from interop.hf.families import encoders, gpt, llama, multimodal
from interop.hf.families.fields import (
    DECODER_HEADS,
    ENCODER_HEADS,
    READ_UNDECLARED,
    TASKS,
    Fields,
    count_labels,
    declared_fields,
    task_of,
)
from interop.hf.families.table import LEAVES, LM_HEAD, Family
from interop.storage.errors import FormatError, brief
from xlora_jax.models import (
    Decoder,
    DecoderConfig,
    VisionTransformer,
)

__all__ = ["FAMILIES", "classifying", "decoder_config", "family_of", "torchax_hint"]


def decoder_config(family: Family, config: Mapping[str, Any], where: str) -> tuple[DecoderConfig, list[str]]:
    """Read a config of ``transformers`` (``AutoConfig(...).to_dict()``).

    Args:
        family: family of the config's ``model_type``.
        config: mapping with all fields.
        where: name of the config in errors.

    Returns:
        The declaration, and the names of the fields that were skipped because transformers ignores them.

    Raises:
        FormatError: a field is missing or has an unsupported value; the message names it.
    """
    fields = Fields(config, where)
    fields.keep(declared_fields(family.model_type) | READ_UNDECLARED)
    try:
        declared = family.read(fields)
    except FormatError:
        raise
    except (ArithmeticError, KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{where}: a field has no meaning for {family.model_type}: {error}") from error
    fields.finish()
    text = config["text_config"] if family.texts else config
    positions = text.get("max_position_embeddings", text.get("n_positions"))
    declared = dataclasses.replace(declared, context_length=positions)
    head = DECODER_HEADS.get(task_of(config) or "")
    if family.module is Decoder and head is not None:
        # A classification head has its own kernel, and no scaling or cap as after a language model's head.
        declared = dataclasses.replace(
            declared,
            head=head,
            num_labels=count_labels(config),
            padding_token=config.get("pad_token_id"),
            tie_word_embeddings=False,
        )
    return declared, fields.passed_over


def classifying(
    family: Family, config: Mapping[str, Any], task_type: str | None, head: Mapping[str, tuple[int, ...]], where: str
) -> dict[str, Any]:
    """Return a config with the head that an adapter brings.

    Args:
        family: family of the base.
        config: config of the base, with any head.
        task_type: PEFT's task type. If it is not in :data:`TASKS`, the base's class name decides the task.
        head: names and shapes of the head's tensors.
        where: name of the adapter in errors.

    Returns:
        The config of a model with that head: its class name, and one label per row of the head.

    Raises:
        FormatError: the family has no such head.
    """
    task = TASKS.get(task_type or "", task_of(config))
    if family.module is VisionTransformer:
        task = "ImageClassification"  # for which PEFT has no task_type
    if task not in (DECODER_HEADS if family.module is Decoder else ENCODER_HEADS):
        raise FormatError(
            f"{where}: brings a classification head ({', '.join(head)}), but neither its task_type, {task_type!r}, nor "
            f"the base's architectures, {config.get('architectures')!r}, say what for; expected task_type "
            f"{' or '.join(TASKS)} in its adapter_config.json."
        )
    heads = [row for row in family.after if row.kind == "linear" and row != LM_HEAD]
    known = {f"{row.hf}.{suffix}": row for row in heads for suffix, _ in LEAVES[row.kind].values()}
    outputs = [name for name in known if name in head and name.endswith(".weight") and len(head[name]) == 2]
    if not outputs or not head.keys() <= known.keys():
        raise FormatError(
            f"{where}: brings a classification head ({', '.join(head)}) that {family.model_type} has not; expected "
            f"{', '.join(dict.fromkeys(row.hf for row in heads)) or 'none'}, with a weight [labels, width]. It was "
            f"trained on another base, or is more than a head."
        )
    labels = {i: f"LABEL_{i}" for i in range(head[outputs[-1]][0])}
    return {
        **config,
        "architectures": [f"{family.stem}For{task}"],
        "id2label": labels,
        "label2id": {label: i for i, label in labels.items()},
    }


# The documentation's table has the same order.
FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (*llama.FAMILIES, *gpt.FAMILIES, *multimodal.FAMILIES, *encoders.FAMILIES)
}


def torchax_hint() -> str:
    """Return the part of an error message that says how to run a model that is not ported."""
    if find_spec("torchax") is not None and find_spec("torch") is not None:
        return ""
    return (
        " Models of other types run as PyTorch code through torchax: pip install 'xlora-jax[torchax]', with a build of "
        "torch for the CPU."
    )


def family_of(model_type: object, where: str) -> Family:
    """Return the family of a ``model_type``, or raise a FormatError that lists the known ones."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise FormatError(
            f"{where}: field 'model_type': expected one of {', '.join(FAMILIES)}, got {brief(model_type)}."
            f"{torchax_hint()}"
        )
    return FAMILIES[model_type]
