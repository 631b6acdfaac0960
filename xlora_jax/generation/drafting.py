"""Drafting: guesses from the text itself, and the rule that chooses the way to decode.

:mod:`xlora_jax.generation.decoding` describes the ways. The rule:

- Text that repeats itself is decoded by lookup: on CPUs from 4 tokens per step, on accelerators from 2.5. The number of
  tokens that lookup would have made per step is computed from the text so far, without running the model.
- On accelerators, where a few more rows cost almost nothing, up to 32 texts are decoded with stale gates, as long as at
  least a quarter of the drafts is right.
- Otherwise decoding is plain. It is always plain on a CPU whose cache holds the weights, because reads are cheap there.

Axes: B batch, S slots of the token buffer, K guesses.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from xlora_jax.backend import target_backend

__all__ = ["GUESSES", "Chooser", "Way", "look_up"]

Ints = npt.NDArray[np.int32]
# No drafts; one draft, made with the gates of the previous token; several drafts, from the text.
Way = Literal["plain", "gates", "lookup"]

# Number of guesses that one step checks. Longer repetitions are rare, and each guess costs a row.
GUESSES = 7
# Number of tokens that are compared to find an earlier occurrence of the end of the text.
_CONTEXT = 3
# Tokens per step from which a lookup pays. Its eight rows cost up to four times one row on a CPU (measured on two kinds
# of CPU). On an accelerator they cost little more than one row, but two reads of the weights; stale gates need about
# one.
_REPEATS_ON_CPU, _REPEATS = 4.0, 2.5
# Maximum number of texts that are decoded with stale gates: each takes four rows.
_MOST_TEXTS = 32
# Least share of stale-gate drafts that are right.
_LEAST_ACCEPTANCE = 0.25
# Weights up to this size stay in a CPU's cache from token to token.
_CACHED = 64 * 2**20
# Weight of all earlier text, relative to the last piece of text.
_MEMORY = 0.6
# Prior: number of stale-gate drafts that are counted as checked and right at the start.
_PRIOR = 8.0


def look_up(tokens: Any, length: Any, count: int = GUESSES) -> Any:
    """Guess the next tokens from an earlier place in the row that matches its end (arXiv 2304.04487).

    The place is the latest one that matches the most tokens at the row's end, up to three. If its continuation reaches
    the end of the row, the tokens between the place and the end are repeated. If nothing matches, the last token is
    repeated.

    Args:
        tokens: int ``[B, S]``, NumPy or JAX.
        length: int ``[B]``, number of tokens of each row, at least 2.
        count: K, number of guesses.

    Returns:
        int ``[B, K]``, NumPy or JAX like ``tokens``.
    """
    xp: Any = np if isinstance(tokens, np.ndarray) else jnp  # NumPy 1.26 has no __array_namespace__
    slots = xp.arange(tokens.shape[1])
    last = length[:, None] - 1
    same, agreed = slots < last, 0
    for back in range(_CONTEXT):
        wanted = xp.take_along_axis(tokens, xp.maximum(last - back, 0), axis=1)
        same = same & (xp.roll(tokens, back, axis=1) == wanted) & (slots >= back)
        agreed = agreed + same.astype("int32")
    place = xp.argmax(xp.where(slots < last, agreed * tokens.shape[1] + slots, -1), axis=1)[:, None]
    return xp.take_along_axis(tokens, place + 1 + xp.arange(count) % (last - place), axis=1)


@dataclass
class Chooser:
    """The rule described at the top of this module, applied to one generation.

    Attributes:
        looked: int32 ``[B]``, number of tokens of each row's text that have been examined.
    """

    looked: Ints
    _checked: float = field(default=_PRIOR, init=False)
    _accepted: float = field(default=_PRIOR, init=False)
    _steps: float = field(default=1.0, init=False)
    _tokens: float = field(default=1.0, init=False)
    _counted: tuple[int, int] = field(default=(0, 0), init=False)

    @staticmethod
    def pays(weight_bytes: int) -> bool:
        """Return whether drafts can pay for parameters of ``weight_bytes``."""
        return target_backend() != "cpu" or weight_bytes >= _CACHED

    def see(self, tokens: Ints, length: Ints, checked: int, accepted: int) -> None:
        """Update the rule's estimates with the text so far.

        Args:
            tokens: int32 ``[B, S]``.
            length: int32 ``[B]``, number of tokens of each row.
            checked: number of stale-gate drafts checked since the start.
            accepted: number of these drafts that were right.
        """
        new = (checked - self._counted[0], accepted - self._counted[1])
        self._counted = checked, accepted
        if new[0]:
            self._checked, self._accepted = (
                _MEMORY * old + seen for old, seen in zip((self._checked, self._accepted), new, strict=True)
            )
        steps = made = 0
        while (going := self.looked < length).any():
            guesses = look_up(tokens[going], self.looked[going])
            columns = self.looked[going][:, None] + np.arange(GUESSES + 1)
            left = (length - self.looked)[going]
            true = np.take_along_axis(tokens[going], np.minimum(columns, tokens.shape[1] - 1), axis=1)
            right = (guesses == true[:, :-1]).cumprod(axis=1).sum(axis=1)
            advance = np.minimum(right + 1, left)
            self.looked[going] += advance
            steps, made = steps + len(left), made + int(advance.sum())
        if steps:
            self._steps, self._tokens = _MEMORY * self._steps + steps, _MEMORY * self._tokens + made

    def choose(self) -> Way:
        """Return the way to decode from here on."""
        on_cpu = target_backend() == "cpu"
        if self._tokens / self._steps >= (_REPEATS_ON_CPU if on_cpu else _REPEATS):
            return "lookup"
        if on_cpu or len(self.looked) > _MOST_TEXTS or self._accepted < _LEAST_ACCEPTANCE * self._checked:
            return "plain"
        return "gates"
