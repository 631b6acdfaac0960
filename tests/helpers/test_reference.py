"""Tests of the reference models that the parity tests use."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.helpers import reference
from tests.helpers.reference import (
    FAMILIES,
    base_run,
    hooked_xlora_logits,
    peft_run,
    peft_xlora,
    prompt,
    relative_error,
)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 1), (2, 2), (3, 1), (3, 2), (3, 3)])
def test_ties_in_top_k_are_broken_alike_by_torch_and_jax_up_to_three(n, k):
    """In a scaling pass with a constant gate and top-k, all gates tie, and the library chooses the experts.

    torch leaves ties undefined. On CPUs it takes the lowest indices for up to three entries, as `jax.lax.top_k` always
    does. From four entries on it takes others (of 4: expert 2 at k = 1, experts 2 and 3 at k = 2).
    """
    for values in itertools.product([0.0, 0.5, 1.0], repeat=n):
        theirs = torch.topk(torch.tensor([values]), k).indices[0].tolist()
        ours = jax.lax.top_k(jnp.array([values]), k)[1][0].tolist()
        assert sorted(ours) == sorted(theirs), values


def test_pairwise_covers_every_pair():
    axes = {"a": [1, 2, 3], "b": "xy", "c": [None, 1, 2], "d": [True, False]}
    rows = reference.pairwise(axes)
    for one, other in itertools.combinations(axes, 2):
        assert {(row[one], row[other]) for row in rows} == set(itertools.product(axes[one], axes[other]))
    assert len(rows) <= 12


@pytest.mark.parametrize("family", FAMILIES)
def test_every_expert_moves_the_logits(family, base, experts):
    base_dir = base(family)
    inputs = prompt(2, 9)
    plain = base_run(base_dir, **inputs)
    for name in reference.EXPERTS:
        for adapter in experts(base_dir, name):
            model = peft_xlora(base_dir, [adapter], xlora_depth=1)
            assert relative_error(peft_run(model, **inputs)[0], plain) > 0.02, (name, adapter.name)


@pytest.mark.parametrize("family", FAMILIES)
def test_gates_of_the_reference_are_far_from_uniform_and_differ_between_layers(family, base, experts):
    base_dir = base(family)
    model = peft_xlora(base_dir, experts(base_dir, "unequal"), xlora_depth=2, layerwise_scalings=True)
    _, scalings = peft_run(model, **prompt(2, 9))
    assert np.abs(scalings - 1 / 3).mean() > 0.1
    assert scalings.std(axis=2).mean() > 0.05
    assert scalings.std(axis=(0, 1)).mean() > 0.05


@pytest.mark.parametrize("family", FAMILIES)
def test_formula_by_hooks_equals_peft(family, base, experts):
    """The formula can then replace PEFT for experts that PEFT refuses: those on `lm_head`."""
    base_dir = base(family)
    adapters = experts(base_dir, "alike")
    model = peft_xlora(base_dir, adapters, layerwise_scalings=True)
    inputs = prompt(2, 9)
    theirs, scalings = peft_run(model, **inputs)
    number = {name: i for i, name in enumerate(reference.peft_layer_names(model))}
    gates = torch.as_tensor(scalings)
    by_hooks = hooked_xlora_logits(base_dir, adapters, lambda name, e: gates[:, :, number[name], e], **inputs)
    assert relative_error(by_hooks, theirs) < 1e-6
    assert relative_error(base_run(base_dir, **inputs), theirs) > 0.05


def test_peft_generate_is_not_the_base_models(base, experts):
    base_dir = base("llama")
    model = peft_xlora(base_dir, experts(base_dir, "unequal"))
    inputs = prompt(1, 7)
    ours = reference.peft_generate(model, 12, **inputs)
    with torch.no_grad():
        plain = reference.torch_base(base_dir).generate(
            **reference.tensors(inputs), max_new_tokens=12, do_sample=False, use_cache=False
        )
    assert ours.shape == (1, 19)
    assert not np.array_equal(ours, plain.numpy())
