"""Guesses from the text, and the choice of the way to decode."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from xlora_jax.backend import compile_for
from xlora_jax.generation.drafting import GUESSES, Chooser, Way, look_up


@pytest.mark.parametrize("xp", [np, jnp])
@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        # The longest agreement wins over a later place ...
        ([1, 2, 3, 4, 5, 9, 3, 7, 1, 2, 3], [4, 5, 9, 3]),
        # ... and the latest of those that are equally long.
        ([3, 4, 8, 3, 5, 6, 3], [5, 6, 3, 5]),
        # A short period goes on.
        ([5, 1, 2, 1, 2, 1, 2], [1, 2, 1, 2]),
        ([4, 4], [4, 4, 4, 4]),
        # Nothing found.
        ([1, 2, 3], [3, 3, 3, 3]),
    ],
)
def test_guesses_continue_the_text_from_where_it_was_before(xp: Any, row: list[int], wanted: list[int]) -> None:
    # What stands behind the end of a row is not text; neither does the start of a row follow its end.
    tokens = np.array([row + [3] * (16 - len(row)), [7, 8, *[7] * 13, 8]])
    guesses = look_up(xp.asarray(tokens), xp.asarray([len(row), 3]), 4)
    assert isinstance(guesses, type(xp.zeros(1)))
    np.testing.assert_array_equal(guesses, [wanted, [8, 7, 8, 7]])


def choices(backend: str, text: list[int], *, acceptance: float, piece: int = 16) -> list[Way]:
    """Return what is chosen along a text, were stale-gate drafts right at that rate wherever they are chosen."""
    chooser, ways = Chooser(np.array([2], np.int32)), []
    checked = accepted = 0.0
    with compile_for(backend):
        for length in range(2 + piece, len(text) + 1, piece):
            if ways and ways[-1] == "gates":
                checked, accepted = checked + piece, accepted + piece * acceptance
            chooser.see(np.array([text]), np.array([length]), round(checked), round(accepted))
            ways.append(chooser.choose())
    return ways


RANDOM = np.random.default_rng(0).permutation(400).tolist()
LOOP = [*RANDOM[:20], *[1, 2, 3, 4, 5, 6, 7, 8, 9, 10] * 40]


@pytest.mark.parametrize("backend", ["gpu", "tpu"])
def test_accelerators_draft_from_stale_gates_while_drafts_are_right(backend: str) -> None:
    assert set(choices(backend, RANDOM, acceptance=0.95)) == {"gates"}
    fails = choices(backend, RANDOM, acceptance=0.0)
    assert fails[0] == "gates"
    assert set(fails[6:]) == {"plain"}


def test_many_texts_are_decoded_plainly() -> None:
    with compile_for("gpu"):
        assert Chooser(np.full(32, 2, np.int32)).choose() == "gates"
        assert Chooser(np.full(33, 2, np.int32)).choose() == "plain"


@pytest.mark.parametrize(("backend", "otherwise"), [("gpu", "gates"), ("cpu", "plain")])
def test_a_text_that_repeats_itself_is_looked_up(backend: str, otherwise: str) -> None:
    ways = choices(backend, LOOP, acceptance=0.9)
    assert set(ways[6:]) == {"lookup"}
    turned = choices(backend, LOOP + RANDOM, acceptance=0.9)
    assert set(turned[len(ways) + 4 :]) == {otherwise}


def test_a_cpu_decodes_plainly_where_nothing_repeats() -> None:
    assert set(choices("cpu", RANDOM, acceptance=0.9)) == {"plain"}


def test_weights_in_the_cache_of_a_cpu_are_as_good_as_read() -> None:
    with compile_for("cpu"):
        assert not Chooser.pays(2 * 10**6)
        assert Chooser.pays(10**9)
    with compile_for("gpu"):
        assert Chooser.pays(2 * 10**6)


def test_rows_of_a_batch_count_together() -> None:
    chooser = Chooser(np.array([2, 2], np.int32))
    chooser.see(np.array([[1] * 40, RANDOM[:40]]), np.array([40, 10]), 0, 0)
    np.testing.assert_array_equal(chooser.looked, [40, 10])
    # 38 tokens of the first row in steps of eight, eight of the second one by one.
    steps = -(-38 // (GUESSES + 1)) + 8
    assert chooser._tokens / chooser._steps == pytest.approx((0.6 + 46) / (0.6 + steps))
