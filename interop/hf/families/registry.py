"""Model families of transformers: how each one's config reads and where its modules stand in our variables.

One table of names per family, from which loading, saving, the order of the adapted layers and the README's table of
families all derive. A config field is read, or it is known not to change the output, or it is refused by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
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

__all__ = ["FAMILIES", "classifying", "decoder_config", "family_of"]


def decoder_config(family: Family, config: Mapping[str, Any], where: str) -> tuple[DecoderConfig, list[str]]:
    """Read a config of ``transformers`` (``AutoConfig(...).to_dict()``).

    Args:
        family: the family that its ``model_type`` names.
        config: all its fields.
        where: what to call it in errors.

    Returns:
        The declaration, and the names of the fields that were passed over because transformers ignores them.

    Raises:
        FormatError: a field has a value that is not implemented, or none at all; the message names it.
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
        # A head that classifies has a kernel of its own, and none of what follows the one of a language model.
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
    """Give a config the head that an adapter brings.

    Args:
        family: of the base.
        config: the base's, whatever its own head.
        task_type: PEFT's. Where it is none of :data:`TASKS`, the base's own class tells what the head is for.
        head: names and shapes of the head's tensors.
        where: who brings it, for errors.

    Returns:
        The config of a model with that head: its class, and as many labels as the head has rows.

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


# The order is that of the documentation's table.
FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (*llama.FAMILIES, *gpt.FAMILIES, *multimodal.FAMILIES, *encoders.FAMILIES)
}


def family_of(model_type: object, where: str) -> Family:
    """Return the family of a ``model_type``, or raise a FormatError that lists those there are."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise FormatError(
            f"{where}: field 'model_type': expected one of {', '.join(FAMILIES)}, got {brief(model_type)}"
        )
    return FAMILIES[model_type]
