"""Samplers: what can be set, in which order it acts, and that a draw depends on seed, row and position alone."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlora_jax.generation.sampling import MinP, RepetitionPenalty, Sampler, Temperature, TopK, TopP

LOGITS = jnp.asarray(np.random.default_rng(0).normal(size=(3, 11)) * 2, jnp.float32)
TOKENS, LENGTH = jnp.asarray([[1, 2, 5, 5], [3, 0, 0, 7], [9, 9, 9, 9]]), jnp.asarray([3, 1, 4])


def test_only_what_changes_something_is_kept_and_in_the_order_of_transformers() -> None:
    assert Sampler.of() == Sampler()
    assert Sampler.of(temperature=0.5, top_k=3, top_p=0.9, min_p=0.1) == Sampler()
    assert Sampler.of(do_sample=True, top_k=0, top_p=1.0, min_p=0.0) == Sampler(True)
    full = Sampler.of(
        do_sample=True, temperature=0.5, top_k=3, top_p=0.9, min_p=0.1, repetition_penalty=1.3, extra=[TopK(9)]
    )
    assert full.processors == (RepetitionPenalty(1.3), TopK(9), Temperature(0.5), TopK(3), TopP(0.9), MinP(0.1))
    assert hash(full) == hash(Sampler(True, full.processors))


def test_the_penalty_sees_the_row_up_to_its_length() -> None:
    out = RepetitionPenalty(2.0)(LOGITS, TOKENS, LENGTH)
    changed = [np.flatnonzero(row).tolist() for row in np.asarray(out != LOGITS)]
    assert changed == [[1, 2, 5], [3], [9]]
    assert (out <= LOGITS).all()


def test_greedy_takes_the_first_of_the_largest() -> None:
    tied = jnp.asarray([[0.0, 2.0, 2.0]])
    assert Sampler()(jax.random.key(0), tied, jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32)).tolist() == [1]


def test_a_draw_depends_on_seed_row_and_position() -> None:
    sampler, flat = Sampler(True), jnp.zeros((3, 4000))

    def draw(seed: int, length: list[int]) -> list[int]:
        tokens = jnp.zeros((3, 9), jnp.int32)
        return sampler(jax.random.key(seed), flat, tokens, jnp.asarray(length)).tolist()

    first = draw(0, [1, 1, 2])
    assert len(set(first)) == 3
    assert draw(0, [1, 1, 2]) == first
    moved = draw(0, [1, 3, 2])
    assert [a == b for a, b in zip(first, moved, strict=True)] == [True, False, True]
    assert draw(1, [1, 1, 2]) != first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature: expected > 0; for greedy"),
        ({"top_k": -1}, "top_k: expected >= 1"),
        ({"top_p": 0.0}, r"top_p: expected within \(0, 1\]"),
        ({"top_p": 1.5}, "top_p"),
        ({"min_p": 1.1}, r"min_p: expected within \[0, 1\]"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: expected > 0"),
    ],
)
@pytest.mark.parametrize("do_sample", [False, True])
def test_settings_without_meaning(options: dict[str, Any], message: str, do_sample: bool) -> None:
    with pytest.raises(ValueError, match=message):
        Sampler.of(do_sample=do_sample, **options)
