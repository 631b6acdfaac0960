"""What is worth drafting: guesses from the text itself, and which way to decode is likely to be fastest.

Decoding a token costs the time of its passes, and the time of a pass is mostly that of reading the weights: it grows
little with the number of rows. Each way to make tokens (see :mod:`xlora_jax.decoding`) reads the weights another
number of times per token and runs another number of rows, so their times can be told beforehand from two things that
show while decoding: how many stale-gate drafts are right, and how far the text repeats itself. The second can be told
without running a single draft: it is a property of the tokens that are there.

Axes: B batch, S slots of the token buffer, K guesses.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import lax

from xlora_jax import products

__all__ = ["GUESSES", "Chooser", "PassTimes", "Way", "look_up"]

Ints = npt.NDArray[np.int32]
# Plain; a draft from the gates of the token before; several drafts from the text.
Way = Literal["plain", "gates", "lookup"]

# Guesses that one step checks. More repeat rarely, and cost rows.
GUESSES = 7
# Tokens that are compared to find where the text has been before.
_CONTEXT = 3
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
    xp = tokens.__array_namespace__()
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
    def of(cls, scaling_bytes: int, real_bytes: int, dtype: jax.typing.DTypeLike) -> PassTimes | None:
        """Make those of passes that read so many bytes of weights; None where no draft can pay.

        What rows cost is measured on the default device when a process asks first, which takes about a second.
        """
        if jax.default_backend() == "cpu" and real_bytes < _CACHED:
            return None
        return cls(scaling_bytes / real_bytes, *_measured_rows(jnp.dtype(dtype)))

    def rows(self, count: int) -> float:
        """Give the factor from one row to ``count``."""
        return 1.0 if count == 1 else self.two_rows + self.row * (count - 2)

    def per_token(self, way: Way, batch: int, *, acceptance: float, advance: float) -> float:
        """Give the time per token of a row.

        Args:
            way: how to decode.
            batch: B.
            acceptance: share of stale-gate drafts that are right.
            advance: tokens that a step of ``lookup`` makes.
        """
        if way == "plain":
            return self.rows(batch) * (self.scaling + 1)
        if way == "gates":
            return self.rows(4 * batch) * (2 - acceptance)
        return self.rows((GUESSES + 1) * batch) * (self.scaling + 1) / advance


@cache
def _measured_rows(dtype: np.dtype[Any]) -> tuple[float, float]:
    """Time products of few rows with matrices that no cache holds: factor of two rows, and of each further one.

    They differ between machines far more than a formula could tell: on one CPU four rows take 1.5 times as long as one,
    on another twice; in bfloat16, where a CPU spends its time on conversions, hardly longer.
    """
    width, repeats = 2048, 4
    # Rows of ones stay rows of ones.
    matrices = [jnp.full((width, width), 1 / width, dtype) for _ in range(2**27 // (width**2 * dtype.itemsize))]

    @jax.jit
    def chain(rows: jax.Array, matrices: list[jax.Array]) -> jax.Array:
        def all_matrices(_: Any, rows: jax.Array) -> jax.Array:
            for matrix in matrices:
                rows = products.matmul(rows, matrix).astype(dtype)
            return rows

        out: jax.Array = lax.fori_loop(0, repeats, all_matrices, rows)
        return out

    times: dict[int, list[float]] = {}
    for _ in range(4):
        for count in (1, 2, GUESSES + 1):
            rows = jnp.ones((count, width), dtype)
            started = time.perf_counter()
            chain(rows, matrices).block_until_ready()
            times.setdefault(count, []).append(time.perf_counter() - started)
    # The first compiles.
    one, two, most = (min(values[1:]) for values in times.values())
    return max(two / one, 1.0), max(most - two, 0.0) / one / (GUESSES - 1)


@dataclass
class Chooser:
    """Chooses the way to decode from what has been seen of this text; one for each generation.

    Attributes:
        times: of the passes.
        looked: int32 ``[B]``, how far each row's text has been looked at: tokens.
    """

    times: PassTimes
    looked: Ints
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

    def choose(self) -> Way:
        """Give the way that is likely to be fastest from here on."""
        seen = {"acceptance": self._accepted / self._checked, "advance": self._tokens / self._steps}

        def expected(way: Way) -> float:
            return self.times.per_token(way, len(self.looked), **seen) / (1 if way == "plain" else _GAIN)

        ways: tuple[Way, ...] = ("plain", "gates", "lookup")
        return min(ways, key=expected)
