"""The training step: what learns, accumulation, chunked loss, rematerialization, steps that are not finite."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.helpers.synthetic import VOCAB, batch, synthetic
from xlora_jax import causal_lm_loss, init_train_state, make_train_step, merge_params, split_params
from xlora_jax.models.transformer import REMAT_POLICIES
from xlora_jax.passes import forward
from xlora_jax.training.losses import chunked_cross_entropy, next_token_targets
from xlora_jax.training.regularizers import Regularizers, load_balance_loss, router_entropy, router_z_loss
from xlora_jax.training.step import batch_loss, make_eval_step, make_scaling_step
from xlora_jax.trees import flatten


def gradient(model, params, data, **options):
    trainable, frozen = split_params(params, model.config)
    count = (next_token_targets(jnp.asarray(data["labels"]), data.get("segment_ids")) != -100).sum()

    def loss(trainable):
        total, extra, _ = batch_loss(model, trainable, frozen, data, **options)
        return total / count + extra

    return jax.jit(jax.value_and_grad(loss))(trainable)


def plain_gradient(model, params, data):
    """The same from whole logits."""
    trainable, frozen = split_params(params, model.config)

    def loss(trainable):
        logits = forward(model, merge_params(trainable, frozen), data["input_ids"]).logits
        return causal_lm_loss(logits, data["labels"])

    return jax.jit(jax.value_and_grad(loss))(trainable)


def assert_close(ours, theirs, tolerance=2e-5):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.linalg.norm(b) > 0
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


@pytest.mark.parametrize("everything", [False, True])
def test_chunked_loss_equals_the_whole(everything):
    model, params = synthetic(head=everything, use_trainable_adapters=everything, layerwise_scalings=True)
    data = batch()
    expected = plain_gradient(model, params, data)
    assert_close(gradient(model, params, data, loss_chunk=5), expected)
    assert_close(gradient(model, params, data, loss_chunk=1), expected)


def test_no_logits_of_all_tokens_exist():
    model, params = synthetic()
    trainable, frozen = split_params(params, model.config)
    data = batch(rows=2, tokens=40)

    def loss(trainable, frozen, data):
        return batch_loss(model, trainable, frozen, data, loss_chunk=8)[0]

    text = jax.jit(jax.grad(loss)).lower(trainable, frozen, data).compile().as_text()
    assert f"f32[2,8,{VOCAB}]" in text or f"f32[16,{VOCAB}]" in text
    for whole in (f"f32[2,40,{VOCAB}]", f"f32[80,{VOCAB}]"):
        assert whole not in text


def test_chunk_below_one_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        chunked_cross_entropy(lambda *_: None, {}, {}, jnp.ones((1, 2, 3)), None, jnp.ones((1, 2), int), 0)


@pytest.mark.parametrize("policy", REMAT_POLICIES)
def test_rematerialization_changes_memory_not_results(policy):
    model, params = synthetic(layers=3)
    data = batch()
    expected = gradient(model, params, data)
    again = dataclasses.replace(model, module=model.module.clone(remat=policy))
    assert_close(gradient(again, params, data), expected, 1e-6)


def test_rematerialization_stores_less():
    model, params = synthetic(layers=6)
    trainable, frozen = split_params(params, model.config)
    data = batch(rows=8, tokens=64)
    needed = {}
    for policy in (None, "dots", "full"):
        static = dataclasses.replace(model, module=model.module.clone(remat=policy))
        loss = jax.jit(jax.grad(lambda t, f, d, m=static: batch_loss(m, t, f, d)[0]))
        needed[policy] = loss.lower(trainable, frozen, data).compile().memory_analysis().temp_size_in_bytes
    assert needed["full"] < 0.6 * needed[None]
    # Of each projection, its output alone: not also what its experts add, in a wider dtype.
    assert needed["full"] < needed["dots"] < 0.45 * needed[None]


def test_unknown_policy_and_unknown_key_are_refused():
    model, params = synthetic()
    trainable, frozen = split_params(params, model.config)
    with pytest.raises(ValueError, match=r"batch: expected only .* got tokens as well"):
        batch_loss(model, trainable, frozen, {**batch(), "tokens": np.ones(1)})
    wrong = dataclasses.replace(model, module=model.module.clone(remat="some"))
    with pytest.raises(ValueError, match="remat: expected"):
        batch_loss(wrong, trainable, frozen, batch())


def test_packed_documents_do_not_see_each_other():
    model, params = synthetic()
    trainable, frozen = split_params(params, model.config)
    first, second = batch(1, 5, seed=1), batch(1, 7, seed=2)
    packed = {key: np.concatenate([first[key], second[key]], axis=1) for key in first}
    segments = np.array([[1] * 5 + [2] * 7])
    packed |= {"segment_ids": segments, "positions": np.array([[*range(5), *range(7)]])}
    loss = jax.jit(partial(batch_loss, model))
    total, _, _ = loss(trainable, frozen, packed)
    alone = sum(loss(trainable, frozen, data)[0] for data in (first, second))
    assert abs(total / alone - 1) < 1e-6
    # And it matters: without segments the second document sees the first.
    mixed, _, _ = loss(trainable, frozen, {key: packed[key] for key in ("input_ids", "labels")})
    assert abs(mixed / alone - 1) > 1e-3


def test_accumulated_step_equals_the_large_one():
    model, params = synthetic(use_trainable_adapters=True)
    optimizer = optax.adamw(1e-2)
    data = batch(rows=8)
    data["labels"][:4, 3:] = -100  # micro-batches of very unequal weight
    results = {}
    for parts in (1, 4):
        state, frozen = init_train_state(params, model.config, optimizer)
        step = make_train_step(model, optimizer, accumulate=parts)
        given = data if parts == 1 else {key: a.reshape(parts, 2, -1) for key, a in data.items()}
        for _ in range(2):
            state, metrics = step(state, frozen, given)
        results[parts] = state.trainable, float(metrics["loss"]), float(metrics["tokens"])
    assert results[1][1] == pytest.approx(results[4][1], rel=1e-6)
    assert results[1][2] == results[4][2]
    assert_close(results[1][0], results[4][0], 1e-4)


def test_only_what_learns_has_state():
    for train_experts in (False, True):
        model, params = synthetic(use_trainable_adapters=train_experts)
        state, frozen = init_train_state(params, model.config, optax.adam(1e-3))
        roots = {path[0] for path in flatten(state.trainable)}
        assert roots == ({"classifier", "experts"} if train_experts else {"classifier"})
        assert not any(path[-1] == "columns" for path in flatten(state.trainable))
        learned = len(jax.tree.leaves(state.trainable))
        assert len(jax.tree.leaves(state.opt_state)) == 2 * learned + 1
        # Frozen arrays are the caller's own, not copies.
        own = {id(leaf) for leaf in jax.tree.leaves(params)}
        assert all(id(leaf) in own for leaf in jax.tree.leaves(frozen))


def test_a_step_that_is_not_finite_changes_nothing():
    model, params = synthetic()
    optimizer = optax.adamw(1e-2)
    state, frozen = init_train_state(params, model.config, optimizer)
    step = make_train_step(model, optimizer)
    broken = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan) if leaf.ndim == 1 else leaf, frozen)
    state, metrics = step(state, frozen, batch())
    before = jax.tree.map(np.array, (state.trainable, state.opt_state))
    for count in (1, 2):
        state, metrics = step(state, broken, batch())
        assert not metrics["finite"]
        assert int(state.skipped) == int(state.skipped_in_row) == count
    assert jax.tree.all(jax.tree.map(np.array_equal, (state.trainable, state.opt_state), before))
    state, metrics = step(state, frozen, batch())
    assert metrics["finite"]
    assert (int(state.step), int(state.skipped), int(state.skipped_in_row)) == (4, 2, 0)


@pytest.mark.parametrize("layerwise", [False, True])
def test_kept_scaling_pass_gives_the_same_step(layerwise):
    model, params = synthetic(layerwise_scalings=layerwise)
    optimizer = optax.adamw(1e-2)
    data = batch()
    losses = []
    for kept in (False, True):
        state, frozen = init_train_state(params, model.config, optimizer)
        step = make_train_step(model, optimizer)
        given = {**data, "scaling_hidden": make_scaling_step(model)(frozen, data)} if kept else data
        for _ in range(3):
            state, metrics = step(state, frozen, given)
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_scaling_pass_through_learning_experts_is_not_kept():
    model, _ = synthetic(use_trainable_adapters=True, scaling_pass_value=0.5)
    with pytest.raises(ValueError, match="expected frozen experts"):
        make_scaling_step(model)


def test_evaluation_adds_up():
    model, params = synthetic(xlora_dropout_p=0.5)
    trainable, frozen = split_params(params, model.config)
    evaluate = make_eval_step(model)
    data = batch()
    whole, tokens, gates = evaluate(trainable, frozen, data)
    halves = [evaluate(trainable, frozen, {k: v[i : i + 2] for k, v in data.items()}) for i in (0, 2)]
    assert float(sum(half[0] for half in halves)) == pytest.approx(float(whole), rel=1e-6)
    assert int(tokens) == (data["labels"][:, 1:] != -100).sum()
    assert float(gates.sum() / tokens) == pytest.approx(1, rel=1e-5)


def test_parameters_can_learn_in_another_dtype():
    model, params = synthetic(dtype=jnp.bfloat16)
    model = dataclasses.replace(model, gate_dtype=jnp.float32)
    optimizer = optax.adamw(1e-5)
    state, frozen = init_train_state(params, model.config, optimizer, dtype=jnp.float32)
    before = jax.tree.map(np.array, state.trainable)
    state, _ = make_train_step(model, optimizer)(state, frozen, batch())
    assert {leaf.dtype for leaf in jax.tree.leaves(state.trainable)} == {jnp.dtype("float32")}
    # In bfloat16 a step this small would vanish.
    changed = jax.tree.map(lambda a, b: (np.asarray(a) != b).mean(), state.trainable, before)
    assert min(jax.tree.leaves(changed)) > 0.9


# Regularisers against their formulas, in NumPy and by loops.


@pytest.fixture
def routed():
    random = np.random.default_rng(0)
    logits = random.normal(size=(2, 5, 3, 4)).astype(np.float32)
    weights = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], np.float32)
    tokens = logits[weights > 0]  # [8, L, N]
    p = np.exp(tokens) / np.exp(tokens).sum(-1, keepdims=True)
    return logits, weights, tokens, p


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("per_layer", [True, False])
def test_load_balance_loss(routed, top_k, per_layer):
    logits, weights, tokens, p = routed
    share = np.zeros((3, 4))
    for token in tokens:
        for layer in range(3):
            share[layer, np.argsort(-token[layer])[:top_k]] += 1 / top_k / len(tokens)
    mean = p.mean(0)
    if not per_layer:
        share, mean = share.mean(0, keepdims=True), mean.mean(0, keepdims=True)
    expected = 4 * (share * mean).sum(-1).mean()
    assert float(load_balance_loss(logits, weights, top_k, per_layer)) == pytest.approx(expected, rel=1e-5)


def test_load_balance_loss_at_its_ends():
    even = jnp.zeros((1, 4, 1, 4)).at[0, jnp.arange(4), 0, jnp.arange(4)].set(1e-3)
    assert float(load_balance_loss(even, jnp.ones((1, 4)))) == pytest.approx(1, abs=1e-3)
    collapsed = jnp.zeros((1, 4, 1, 4)).at[..., 2].set(50.0)
    assert float(load_balance_loss(collapsed, jnp.ones((1, 4)))) == pytest.approx(4, rel=1e-5)


def test_entropy_and_z_loss(routed):
    logits, weights, tokens, p = routed
    assert float(router_entropy(logits, weights)) == pytest.approx(-(p * np.log(p)).sum(-1).mean(), rel=1e-5)
    z = np.log(np.exp(tokens).sum(-1)) ** 2
    assert float(router_z_loss(logits, weights)) == pytest.approx(z.mean(), rel=1e-5)


@pytest.mark.parametrize("term", ["load_balance", "entropy", "z_loss"])
def test_regularizers_act_on_the_gate(term):
    model, params = synthetic(layerwise_scalings=True)
    data = batch()
    plain = gradient(model, params, data)
    regularized = gradient(model, params, data, regularizers=Regularizers(**{term: 0.5}))
    assert abs(float(regularized[0] - plain[0])) > 1e-3
    ours, theirs = (np.asarray(tree["classifier"]["dense_1"]["kernel"]) for _, tree in (regularized, plain))
    assert np.linalg.norm(ours - theirs) > 1e-3 * np.linalg.norm(theirs)
    off = gradient(model, params, data, regularizers=Regularizers())
    assert float(off[0]) == float(plain[0])
