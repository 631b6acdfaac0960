"""Classification heads of adapters or checkpoints, which replace the base's own head.

PEFT trains such a head whole (`modules_to_save`) and saves it with the factors, because the base's head is random or
belongs to another task. A model has one head, whatever the number of its experts. PEFT's own X-LoRA can't load adapters
with a head (0.21.2: KeyError). Here they load, and one head is used.
"""

from __future__ import annotations

from collections.abc import Sequence

from interop.hf.head import Head
from interop.peft.adapter import LoraAdapter
from interop.storage.errors import FormatError, listed

__all__ = ["choose_head", "head_of"]


def head_of(adapter: LoraAdapter) -> Head | None:
    """Return the classification head of an adapter, or None if it has none."""
    if not adapter.head:
        return None
    return Head(f"adapter {adapter.name!r} ({adapter.path})", adapter.config.get("task_type"), adapter.head)


def choose_head(adapters: Sequence[LoraAdapter], expert: str | None = None) -> Head | None:
    """Choose the head of an X-LoRA model among the heads of its adapters.

    Args:
        adapters: adapters of the experts.
        expert: name of the expert whose head to use; None takes the head the adapters share.

    Returns:
        The head, or None (the base's own head) if no adapter has one and `expert` is None.

    Raises:
        FormatError: the heads differ, and `expert` is None.
        ValueError: `expert` is not among the adapters, or has no head.
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
