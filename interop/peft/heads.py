"""Classification heads that come with adapters or a checkpoint, in place of the base's own.

PEFT trains such a head whole (`modules_to_save`) and saves it beside the factors, for the base's is random or of
another task. A model has one head, whatever the number of its experts. PEFT's own X-LoRA can't load adapters with a
head at all (seen with 0.21.2: KeyError); here they load, and one head is used.
"""

from __future__ import annotations

from collections.abc import Sequence

from interop.hf.head import Head
from interop.peft.adapter import LoraAdapter
from interop.storage.errors import FormatError, listed

__all__ = ["choose_head", "head_of"]


def head_of(adapter: LoraAdapter) -> Head | None:
    """Return the classification head of an adapter, or None where it brings none."""
    if not adapter.head:
        return None
    return Head(f"adapter {adapter.name!r} ({adapter.path})", adapter.config.get("task_type"), adapter.head)


def choose_head(adapters: Sequence[LoraAdapter], expert: str | None = None) -> Head | None:
    """Choose the head of an X-LoRA model from those that its experts bring.

    Args:
        adapters: the experts.
        expert: name of the one whose head to use; None where all that bring one bring the same.

    Returns:
        The head, or None where no expert brings one and none is asked for: the base's own is used then.

    Raises:
        FormatError: heads that differ, and none is chosen.
        ValueError: the expert chosen is none of them, or brings no head.
    """
    heads = {adapter.name: head for adapter in adapters if (head := head_of(adapter)) is not None}
    if expert is not None:
        if expert not in heads:
            raise ValueError(f"head={expert!r}: expected an expert that brings a classification head: {listed(heads)}")
        return heads[expert]
    first = next(iter(heads.values()), None)
    for head in heads.values():
        assert first is not None
        if not head.equals(first):
            raise FormatError(
                f"the experts {listed(heads)} bring classification heads that differ ({first.owner}, {head.owner}), "
                f"and a model has one. Choose whose to use: head={next(iter(heads))!r}, say."
            )
    return first
