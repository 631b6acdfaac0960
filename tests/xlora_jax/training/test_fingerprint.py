"""A resumed run with other inputs is refused by name; the same inputs go on, however they are held."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.helpers.synthetic import VOCAB, synthetic
from xlora_jax import XLoraModel
from xlora_jax.training.config import TrainConfig
from xlora_jax.training.data import Rows
from xlora_jax.training.fingerprint import differences, run_fingerprint
from xlora_jax.training.trainer import train
from xlora_jax.trees import flatten, unflatten

CONFIG = TrainConfig(
    steps=4, batch_size=4, learning_rate=1e-2, log_every=1, checkpoint_every=2, tensorboard=False, seed=1
)
IDS = np.random.default_rng(0).integers(1, VOCAB, (12, 10))
ROWS = Rows.from_tokens(IDS)


@functools.cache
def made(dtype):
    xlora, params = synthetic(dtype=dtype, xlora_dropout_p=0.1)
    return XLoraModel(xlora.module, params, xlora.config, xlora.layers, tuple(xlora.config.adapters))


def handle(dtype=jnp.float32, **config):
    return made(dtype).replace(config=dataclasses.replace(made(dtype).config, **config))


def changed(model, *path, at=(0,)):
    """The model with one element of one array nudged by the smallest amount."""
    flat = flatten(model.params)
    values = np.array(flat[path])
    values[at] = np.nextafter(values[at], np.float32(np.inf))
    return model.replace(params=unflatten({**flat, path: jnp.asarray(values)}))


def fingerprint(model, rows=ROWS):
    return run_fingerprint(model.xlora, model.params, model.expert_names, rows)


def differs(model, rows=ROWS):
    return differences(fingerprint(handle()), json.loads(json.dumps(fingerprint(model, rows))))


UP = ("layers", "mlp", "up_proj")


def test_the_same_inputs_have_the_same_fingerprint():
    assert differs(handle()) == []
    side_by_side = handle().unstacked()
    assert differs(side_by_side) == []
    half = handle(jnp.bfloat16)
    wide = half.replace(params=jax.tree.map(lambda leaf: leaf.astype(jnp.float32), dict(half.params)))
    assert differences(fingerprint(half), fingerprint(wide)) == []


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        (Rows.from_tokens(IDS[::-1]), "rows: 12 of 10 tokens as there, with other content or in another order"),
        (Rows.from_tokens(IDS[:10]), "rows: 12 of 10 tokens there, 10 of 10 tokens now"),
        (Rows.from_tokens(IDS[:, :8]), "rows: 12 of 10 tokens there, 12 of 8 tokens now"),
        (Rows.from_tokens(IDS, np.where(IDS[3, 3] == IDS, -100, IDS)), "with other content"),
    ],
)
def test_rows_are_named(rows, named):
    (found,) = differs(handle(), rows)
    assert named in found


def test_settings_are_named():
    settings = {
        "top_k_lora": 2,
        "softmax_temperature": 2.0,
        "xlora_dropout_p": 0.2,
        "scaling_pass_value": 0.5,
        "global_scaling_weight": 0.5,
        "enable_softmax": False,
        "use_trainable_adapters": True,
    }
    found = differs(handle(**settings))
    was = handle().config
    wanted = [f"config: {name} {getattr(was, name)} there, {value} now" for name, value in settings.items()]
    assert sorted(found) == sorted(wanted)


def test_one_changed_value_is_named():
    model = handle()
    kernel = ("base", "layers", "mlp", "down_proj", "kernel")
    (found,) = differs(changed(model, *kernel, at=(1, 7, 5)))
    assert found.startswith("base: layers_1/mlp/down_proj/kernel (1 of ")
    (found,) = differs(changed(model, "classifier", "dense_0", "kernel", at=(3, 3)))
    assert found.startswith("classifier: dense_0/kernel (1 of 4")
    # Rank 4 each: column 5 is the second expert's.
    for leaf, at in (("lora_a", (0, 2, 5)), ("lora_b", (1, 5, 2)), ("columns", (0, 1, 5))):
        found = differs(changed(model, "experts", *UP, leaf, at=at))
        assert found == ["expert 'expert 1': other weights, scale, layers or dropout"]


def test_dropout_of_one_adapter_is_named():
    model = handle()
    rates = jnp.zeros((2, 3)).at[:, 2].set(0.1)
    flat = {**flatten(model.params), ("experts", *UP, "lora_dropout"): rates}
    assert differs(model.replace(params=unflatten(flat))) == [
        "expert 'expert 2': other weights, scale, layers or dropout"
    ]


def test_settings_of_the_base_and_order_of_the_experts_are_named():
    model = handle()
    module = model.module.clone(config=dataclasses.replace(model.module.config, norm_eps=1e-5))
    assert differs(dataclasses.replace(model, module=module)) == ["base: norm_eps 1e-06 there, 1e-05 now"]
    names = model.expert_names[::-1]
    (found,) = differs(dataclasses.replace(model, expert_names=names))
    assert found == "experts: expert 0, expert 1, expert 2 there, expert 2, expert 1, expert 0 now"


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run of four steps whose last two are lost, and the result of all four."""
    output = tmp_path_factory.mktemp("run") / "run"
    result = train(handle(), ROWS, CONFIG, output=output)
    shutil.rmtree(output / "checkpoints" / "4")
    return output, result


def copy_of(stopped, tmp_path):
    return shutil.copytree(stopped[0], tmp_path / "run")


def equal(a, b):
    return jax.tree.all(jax.tree.map(np.array_equal, a.state.trainable, b.state.trainable))


def test_unchanged_inputs_go_on_bit_for_bit(stopped, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        resumed = train(handle(), ROWS, CONFIG, output=copy_of(stopped, tmp_path))
    assert [entry["step"] for entry in resumed.history if entry["kind"] == "train"] == [3, 4]
    assert equal(resumed, stopped[1])


def test_changed_inputs_are_refused_and_allowed_knowingly(stopped, tmp_path):
    output = copy_of(stopped, tmp_path)
    rows = Rows.from_tokens(IDS[::-1])
    model = handle(top_k_lora=2)
    config = dataclasses.replace(CONFIG, seed=7)
    before = {path: path.read_bytes() for path in output.rglob("*.json*")}
    with pytest.raises(ValueError, match=r"seed: 1 there, 7 now; rows: 12 .* another order; config: top_k_lora None"):
        train(model, rows, config, output=output)
    assert {path: path.read_bytes() for path in output.rglob("*.json*")} == before
    with pytest.warns(UserWarning, match=r"as allowed \(seed: 1 there, 7 now; rows: .*; config: top_k_lora") as caught:
        result = train(model, rows, dataclasses.replace(config, allow_changed=True), output=output)
    assert len([warning for warning in caught if "there" in str(warning.message)]) == 1
    assert [entry["step"] for entry in result.history] == [3, 4]
    assert not equal(result, stopped[1])
    # Allowed once: the new inputs are the run's from here on.
    assert train(model, rows, config, output=output).history == []
    with pytest.raises(ValueError, match="top_k_lora 2 there, None now"):
        train(handle(), rows, config, output=output)


def test_settings_of_an_own_optimizer_do_not_count_and_others_do(tmp_path):
    def run(**changes):
        config = dataclasses.replace(CONFIG, steps=1, checkpoint_every=0, **changes)
        return train(handle(), ROWS, config, output=tmp_path, optimizer=optax.sgd(1e-2))

    run()
    run(learning_rate=1.0)
    with pytest.raises(ValueError, match="seed: 1 there, 2 now"):
        run(seed=2)


def test_other_versions_and_lost_records_are_a_warning(stopped, tmp_path):
    output = copy_of(stopped, tmp_path)
    path = output / "fingerprint.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({**stored, "versions": {**stored["versions"], "jax": "0.1"}}))
    with pytest.warns(UserWarning, match=r"other versions \(jax 0\.1 there"):
        assert equal(train(handle(), ROWS, CONFIG, output=output), stopped[1])
    path.unlink()
    with pytest.warns(UserWarning, match="no record of the inputs"):
        train(handle(), ROWS, CONFIG, output=output)
    assert json.loads(path.read_text()) == stored


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"rows": 5}', "[" * 10**5, '{"rows": {}, "config": []}'])
def test_a_damaged_fingerprint_is_named(stopped, tmp_path, content):
    output = copy_of(stopped, tmp_path)
    (output / "fingerprint.json").write_text(content)
    with pytest.raises(ValueError, match=r"fingerprint\.json"):
        train(handle(), ROWS, CONFIG, output=output)
