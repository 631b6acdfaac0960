"""A classification head that replaces the head of a base model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Head"]


@dataclass(frozen=True, eq=False)
class Head:
    """A classification head.

    Attributes:
        owner: name of the adapter or checkpoint that the head belongs to, for messages.
        task_type: PEFT's task type, SEQ_CLS or TOKEN_CLS; with any other value the base's own class decides the task.
        tensors: tensors by Hugging Face name (`score.weight`), in torch's layout.
    """

    owner: str
    task_type: str | None
    tensors: Mapping[str, NDArray[Any]] = field(repr=False)

    def equals(self, other: Head | None) -> bool:
        """Return whether all tensors of both heads are equal."""
        return (
            other is not None
            and self.task_type == other.task_type
            and self.tensors.keys() == other.tensors.keys()
            and all(np.array_equal(tensor, other.tensors[name]) for name, tensor in self.tensors.items())
        )
