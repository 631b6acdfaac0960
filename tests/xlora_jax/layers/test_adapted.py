"""Layer numbers as data: who gets which gates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.small_arrays import NAMES, SLOTS
from xlora_jax.layers.adapted import AdaptedLayers, Slot


def test_each_layer_gets_the_gates_of_its_number() -> None:
    gates = jax.random.normal(jax.random.key(0), (2, 5, len(NAMES), 3))
    tree = AdaptedLayers(NAMES, SLOTS).collection(gates, 1.0)
    np.testing.assert_array_equal(tree["embed_tokens"]["gates"], gates[:, :, 0])
    np.testing.assert_array_equal(tree["lm_head"]["gates"], gates[:, :, 5])
    stacked = tree["layers"]["mlp"]["up_proj"]["gates"]
    assert stacked.shape == (3, 2, 5, 3)
    np.testing.assert_array_equal(stacked[0], gates[:, :, 2])
    np.testing.assert_array_equal(stacked[2], gates[:, :, 4])


def test_shared_gates_go_to_every_layer() -> None:
    gates = jax.random.normal(jax.random.key(0), (2, 5, 1, 3))
    tree = AdaptedLayers(NAMES, SLOTS).collection(gates, 1.0)
    for leaf in jax.tree.leaves(tree):
        np.testing.assert_array_equal(leaf, jnp.broadcast_to(gates[:, :, 0], leaf.shape))


def test_the_weight_is_laid_out_only_for_biases() -> None:
    gates = jnp.ones((1, 1, 1, 3))
    assert "weight" not in AdaptedLayers(NAMES, SLOTS).collection(gates, 0.5)["lm_head"]
    tree = AdaptedLayers(NAMES, SLOTS, with_bias=True).collection(gates, 0.5)
    assert tree["lm_head"]["weight"] == 0.5
    np.testing.assert_array_equal(tree["layers"]["mlp"]["up_proj"]["weight"], [0.5, 0.5, 0.5])


@pytest.mark.parametrize("numbers", [(0, 0), (0, 2), (-1, 0)])
def test_numbers_must_be_those_of_the_names(numbers: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"expected each of 0\.\.1 once"):
        AdaptedLayers(("a", "b"), (Slot(("x",), numbers[0]), Slot(("y",), numbers[1])))
