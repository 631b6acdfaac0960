"""A watch over the balance of the experts during training: it warns when one dies, or takes all."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["DEAD", "WHOLE", "Balance"]

# An expert with a smaller share of the gates than this is dead; one with a larger share than that has taken all.
DEAD = 0.01
WHOLE = 0.99

_ADVICE = (
    "Set load_balance to 0.01 (--set '{\"load_balance\": 0.01}') or entropy to -0.01, or lower learning_rate. If the "
    "data does not need all experts, train with fewer"
)


class Balance:
    """Counts for how many steps in a row an expert is dead, or has taken all; warns once of each.

    Args:
        expert_names: names of the experts.
        steps: number of steps in a row that gives a warning; 0 gives none.
    """

    def __init__(self, expert_names: tuple[str, ...], steps: int) -> None:
        self.expert_names, self.steps = expert_names, steps
        self._dead, self._whole = np.zeros((2, len(expert_names)), np.int64)
        self._warned: set[str] = set()

    def step(self, number: int, shares: NDArray[np.float64]) -> None:
        """Count one step.

        Args:
            number: number of the step.
            shares: ``[N]``, each expert's mean share of the gates, over tokens and layers.
        """
        if not self.steps or len(self.expert_names) < 2:
            return
        self._dead = np.where(shares < DEAD, self._dead + 1, 0)
        self._whole = np.where(shares > WHOLE, self._whole + 1, 0)
        for expert in np.flatnonzero(self._whole >= self.steps):
            self._warn(
                self.expert_names[expert],
                f"has had over {WHOLE:.0%} of the gates for {self.steps} steps: routing has collapsed",
                number,
            )
        if self._whole.any():  # then all others are dead, which that warning says
            return
        for expert in np.flatnonzero(self._dead >= self.steps):
            self._warn(
                self.expert_names[expert],
                f"has had under {DEAD:.0%} of the gates for {self.steps} steps: it is dead",
                number,
            )

    def _warn(self, name: str, state: str, number: int) -> None:
        key = f"{name} {state}"
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(f"step {number}: expert {name!r} {state}. {_ADVICE}.", UserWarning, stacklevel=4)

    def get_state(self) -> dict[str, Any]:
        """Return the counts, as JSON values."""
        return {"dead": self._dead.tolist(), "whole": self._whole.tolist(), "warned": sorted(self._warned)}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restore the counts that :meth:`get_state` returned."""
        self._dead, self._whole = np.asarray(state["dead"]), np.asarray(state["whole"])
        self._warned = set(state["warned"])
