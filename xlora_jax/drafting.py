"""What is worth drafting: guesses from the text itself, and which way to decode is likely to be fastest.

Decoding a token costs the time of its passes, and the time of a pass is mostly that of reading the weights: it grows
little with the number of rows. Each way to make tokens (see :mod:`xlora_jax.decoding`) reads the weights another
number of times per token and runs another number of rows. Which is fastest can be told from the time of its step, known
once it has been timed and estimated before, and from two things that show while decoding: how many stale-gate drafts
are right, and how far the text repeats itself. The last shows without running a draft: it is in the tokens.

Axes: B batch, S slots of the token buffer, K guesses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

__all__ = ["GUESSES", "Chooser", "PassTimes", "Way", "look_up"]

Ints = npt.NDArray[np.int32]
# Plain; a draft from the gates of the token before; several drafts from the text.
Way = Literal["plain", "gates", "lookup"]

# Guesses that one step checks. More repeat rarely, and cost rows.
GUESSES = 7
# Tokens that are compared to find where the text has been before.
_CONTEXT = 3
# Time of a pass by its rows, in units of that of one row: (two rows, each further row); taken for granted until a step
# has been timed. On CPUs a product of few rows does not reach the speed of one row: this is the best CPU seen. On
# accelerators a row is free up to the ratio of their arithmetic to their memory.
_ROWS_ON_CPU, _ROWS = (1.35, 0.055), (1.005, 0.005)
# Weights up to this size stay in a CPU's cache from token to token: rows cost there, not reads, and nothing pays.
_CACHED = 64 * 2**20
# What is taken for granted before anything has been seen: share of stale-gate drafts that are right, and of how many.
_ACCEPTANCE, _SEEN = 0.85, 8.0
# What was seen before the last piece counts this much.
_MEMORY = 0.6
# Another way has to be that much faster than plain decoding.
_GAIN = 0.95


def look_up(tokens: Any, length: Any, count: int = GUESSES) -> Any:
    """Guess the tokens that follow, from an earlier place in the row that looks like its end (arXiv 2304.04487).

    It is the latest place among those that agree with the row's last tokens over the longest stretch, up to three.
    Where it is so near that its continuation runs into the end, the stretch between the two is repeated. Nothing found,
    the last token is.

    Args:
        tokens: int ``[B, S]``, NumPy or JAX.
        length: int ``[B]``, how many of them are there; at least 2.
        count: K.

    Returns:
        int ``[B, K]``, of the kind of ``tokens``.
    """
    xp = np if isinstance(tokens, np.ndarray) else jnp  # NumPy 1.26 has no __array_namespace__
    slots = xp.arange(tokens.shape[1])
    last = length[:, None] - 1
    same, agreed = slots < last, 0
    for back in range(_CONTEXT):
        wanted = xp.take_along_axis(tokens, xp.maximum(last - back, 0), axis=1)
        same = same & (xp.roll(tokens, back, axis=1) == wanted) & (slots >= back)
        agreed = agreed + same.astype("int32")
    place = xp.argmax(xp.where(slots < last, agreed * tokens.shape[1] + slots, -1), axis=1)[:, None]
    return xp.take_along_axis(tokens, place + 1 + xp.arange(count) % (last - place), axis=1)


@dataclass(frozen=True)
class PassTimes:
    """Times of a pass, in units of that of the real pass over one row.

    Attributes:
        scaling: of the scaling pass over one row: it reads neither experts nor output head.
        two_rows: factor from one row to two.
        row: of each further row.
    """

    scaling: float
    two_rows: float
    row: float

    @classmethod
    def of(cls, scaling_bytes: int, real_bytes: int, backend: str) -> PassTimes | None:
        """Make those of a JAX backend, for passes that read so many bytes of weights; None where no draft can pay."""
        if backend == "cpu" and real_bytes < _CACHED:
            return None
        return cls(scaling_bytes / real_bytes, *(_ROWS_ON_CPU if backend == "cpu" else _ROWS))

    def rows(self, count: int) -> float:
        """Give the factor from one row to ``count``."""
        return 1.0 if count == 1 else self.two_rows + self.row * (count - 2)

    def step(self, way: Way, batch: int) -> float:
        """Give the time of one step with ``batch`` rows of text."""
        if way == "gates":
            return self.rows(4 * batch)
        return self.rows(batch if way == "plain" else (GUESSES + 1) * batch) * (self.scaling + 1)


@dataclass
class Chooser:
    """Chooses the way to decode from what has been seen of this text; one for each generation.

    Attributes:
        times: of the passes, as far as they can be told without running them.
        looked: int32 ``[B]``, how far each row's text has been looked at: tokens.
        seconds: shortest time of a step seen, of each way that has been timed; infinite where the way has run once, and
            was compiled then. Outlives this object where more such generations follow.
    """

    times: PassTimes
    looked: Ints
    seconds: dict[Way, float] = field(default_factory=dict)
    _checked: float = field(default=_SEEN, init=False)
    _accepted: float = field(default=_SEEN * _ACCEPTANCE, init=False)
    _steps: float = field(default=1.0, init=False)
    _tokens: float = field(default=1.0, init=False)
    _counted: tuple[int, int] = field(default=(0, 0), init=False)

    def see(self, tokens: Ints, length: Ints, checked: int, accepted: int) -> None:
        """Take in what the last steps gave.

        Args:
            tokens: int32 ``[B, S]``.
            length: int32 ``[B]``.
            checked: stale-gate drafts that were checked since the beginning.
            accepted: those that were right.
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

    def timed(self, way: Way, seconds: float) -> None:
        """Take in what a step of a way took, on average over a call."""
        self.seconds[way] = min(seconds, self.seconds[way]) if way in self.seconds else math.inf

    def choose(self) -> Way:
        """Give the way that is likely to be fastest from here on."""
        batch = len(self.looked)
        timed = {way: seconds for way, seconds in self.seconds.items() if seconds < math.inf}
        # What one unit of time is, by the ways that were timed, the plain one first.
        known = "plain" if "plain" in timed else next(iter(timed), None)
        unit = 1.0 if known is None else timed[known] / self.times.step(known, batch)
        tokens = {"plain": 1.0, "gates": 1 / (2 - self._accepted / self._checked), "lookup": self._tokens / self._steps}

        def expected(way: Way) -> float:
            step = timed.get(way, unit * self.times.step(way, batch))
            return step / tokens[way] / (1 if way == "plain" else _GAIN)

        ways: tuple[Way, ...] = ("plain", "gates", "lookup")
        return min(ways, key=expected)
