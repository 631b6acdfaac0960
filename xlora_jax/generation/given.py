"""Scalings that a caller gives for the rows of a generation, in place of the classifier's.

Axes: B rows, L adapted layers (1 if all layers share their scalings), N experts.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Given", "read_given"]


@dataclass(frozen=True)
class Given:
    """Constant scalings of some rows.

    Attributes:
        scalings: float32 ``[B, L or 1, N]``; zero in rows that use the classifier.
        rows: bool ``[B]``, whether a row has its own scalings.
    """

    scalings: NDArray[np.float32]
    rows: NDArray[np.bool_]

    def repeat(self, count: int) -> Given:
        """Return the scalings with each row ``count`` times."""
        return Given(np.repeat(self.scalings, count, axis=0), np.repeat(self.rows, count))


def read_given(scalings: Any, experts: Any, batch: int, layers: int, names: Sequence[str]) -> Given | None:
    """Read the arguments ``scalings`` and ``experts`` of a generation.

    Args:
        scalings: array that broadcasts to ``[B, 1, L, N]``; or a list with one entry per row, None or an array that
            broadcasts to ``[L, N]``.
        experts: mapping of expert names to scalings for all rows; or a list with one entry per row, None or a mapping.
            An expert without an entry gets 0.
        batch: B.
        layers: L.
        names: names of the N experts.

    Returns:
        The scalings, or None if no row has its own.

    Raises:
        ValueError: both arguments are given, or shapes, names or values do not fit.
        TypeError: an entry has the wrong type.
    """
    if scalings is not None and experts is not None:
        raise ValueError("give either scalings (arrays) or experts (by name), not both")
    if scalings is None and experts is None:
        return None
    shape = (layers, len(names))
    if experts is not None:
        entries = [experts] * batch if isinstance(experts, Mapping) else _per_row("experts", experts, batch)
        found = [None if e is None else _by_name(f"experts[{i}]", e, names) for i, e in enumerate(entries)]
    elif isinstance(scalings, list | tuple) and not all(isinstance(entry, numbers.Real) for entry in scalings):
        entries = _per_row("scalings", scalings, batch)
        found = [None if e is None else _broadcast(f"scalings[{i}]", e, shape) for i, e in enumerate(entries)]
    else:
        found = [*_broadcast("scalings", scalings, (batch, 1, *shape))[:, 0]]
    rows = np.array([entry is not None for entry in found])
    if not rows.any():
        return None
    whole = np.stack([np.zeros(shape, np.float32) if e is None else np.broadcast_to(e, shape) for e in found])
    same = (whole == whole[:, :1]).all()
    return Given(whole[:, :1] if same else whole, rows)


def _per_row(name: str, entries: Any, batch: int) -> Sequence[Any]:
    if not isinstance(entries, list | tuple):
        raise TypeError(
            f"{name}: expected a mapping, or a list with one entry per prompt, got {type(entries).__name__}"
        )
    if len(entries) != batch:
        raise ValueError(f"{name}: expected one entry for each of the {batch} prompts, got {len(entries)}")
    return entries


def _by_name(where: str, weights: Any, names: Sequence[str]) -> NDArray[np.float32]:
    if not isinstance(weights, Mapping):
        raise TypeError(f"{where}: expected a mapping of expert names to numbers, or None, got {weights!r:.100}")
    for name, weight in weights.items():
        if name not in names:
            raise ValueError(f"{where}: no expert {name!r}; the experts are {', '.join(names)}")
        if isinstance(weight, bool) or not isinstance(weight, numbers.Real):
            raise TypeError(f"{where}: {name!r}: expected a number, got {weight!r:.100}")
    return _broadcast(where, [float(weights.get(name, 0)) for name in names], (1, len(names)))


def _broadcast(where: str, given: Any, shape: tuple[int, ...]) -> NDArray[np.float32]:
    try:
        array = np.broadcast_to(np.asarray(given, np.float32), shape)
    except (ValueError, TypeError):
        expected = "[rows, 1, adapted layers, experts]" if len(shape) == 4 else "[adapted layers, experts]"
        raise ValueError(
            f"{where}: expected numbers {expected} = {list(shape)}, or a shape that broadcasts to it, got "
            f"{type(given).__name__} of shape {list(np.shape(given))}"
        ) from None
    if not np.isfinite(array).all():
        raise ValueError(f"{where}: expected finite numbers, got NaN or infinity")
    return array
