"""XLoraConfig: PEFT's fields and defaults, its warnings, and errors for what can't work."""

import copy
import dataclasses
import json
import math
import pathlib
import pickle
import warnings

import numpy as np
import pytest

from xlora_jax.config import XLoraConfig

ADAPTERS = {"math": "/experts/math", "code": "org/code-lora", "prose": "experts/prose"}

ALL_CHANGED = {
    "hidden_size": 48,
    "adapters": ADAPTERS,
    "enable_softmax": False,
    "enable_softmax_topk": True,
    "layerwise_scalings": True,
    "xlora_depth": 3,
    "xlora_size": 24,
    "xlora_dropout_p": 0.1,
    "use_trainable_adapters": True,
    "softmax_temperature": 0.5,
    "top_k_lora": 2,
    "scaling_pass_value": 0.7,
    "global_scaling_weight": 1.5,
}


def config(**changes):
    return XLoraConfig(**{"hidden_size": 48, "adapters": ADAPTERS} | changes)


def test_fields_and_defaults_are_those_of_peft():
    import peft

    theirs = {field.name: field.default for field in dataclasses.fields(peft.XLoraConfig)}
    for inherited in dataclasses.fields(peft.PeftConfig):
        del theirs[inherited.name]
    ours = {field.name: field.default for field in dataclasses.fields(XLoraConfig)}
    assert ours == theirs
    assert len(ours) == 13


def test_every_field_is_read_and_written():
    assert XLoraConfig.from_dict(ALL_CHANGED).to_dict() == ALL_CHANGED
    defaults = config().to_dict()
    unchanged = [name for name in ALL_CHANGED if defaults[name] == ALL_CHANGED[name]]
    assert unchanged == ["hidden_size", "adapters"]  # the two that have no default


def test_json_round_trip():
    first = config(scaling_pass_value=None, top_k_lora=1)
    again = XLoraConfig.from_dict(json.loads(json.dumps(first.to_dict())))
    assert again == first
    assert hash(again) == hash(first)


def test_hashable_and_ordered():
    reordered = {"code": "org/code-lora", "math": "/experts/math", "prose": "experts/prose"}
    assert hash(config()) == hash(config(adapters=dict(ADAPTERS)))
    assert config() == config(adapters=dict(ADAPTERS))
    assert config() != config(adapters=reordered)  # the order is the order of the classifier's outputs
    assert config() != config(top_k_lora=2)
    assert {config(): 1}[config()] == 1


def test_adapters_read_like_a_dict_and_keep_no_alias():
    given = dict(ADAPTERS)
    adapters = config(adapters=given).adapters
    given["late"] = "x"
    assert adapters == ADAPTERS
    assert list(adapters) == list(ADAPTERS)
    assert adapters["code"] == "org/code-lora"
    assert "late" not in adapters
    assert repr(adapters) == repr(ADAPTERS)
    with pytest.raises(TypeError):
        adapters["late"] = "x"  # type: ignore[index]


def test_survives_copy_and_pickle():
    assert copy.deepcopy(config()) == config()
    assert pickle.loads(pickle.dumps(config())) == config()
    assert dataclasses.replace(config(), top_k_lora=2) == config(top_k_lora=2)


def test_numbers_are_normalized():
    made = config(
        hidden_size=np.int64(48),
        softmax_temperature=2,
        adapters={"a": pathlib.PurePosixPath("x/y")},
        scaling_pass_value=np.float32(0.5),
    )
    assert type(made.hidden_size) is int
    assert type(made.softmax_temperature) is float
    assert type(made.scaling_pass_value) is float
    assert made.adapters == {"a": "x/y"}


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        config().top_k_lora = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": None}, "hidden_size.*4096"),
        ({"adapters": None}, "adapters"),
        ({"enable_softmax_topk": True, "enable_softmax": False}, "top_k_lora"),
        ({"enable_softmax_topk": True, "top_k_lora": 2}, "both"),
    ],
)
def test_warnings_of_peft(changes, words):
    import peft

    with pytest.warns(UserWarning, match="hidden_size|adapters|top_k_lora|both"):
        peft.XLoraConfig(**{"hidden_size": 48, "adapters": ADAPTERS} | changes)
    with pytest.warns(UserWarning, match=words) as caught:
        config(**changes)
    assert len(caught) == 1
    with warnings.catch_warnings(record=True) as direct:
        warnings.simplefilter("always")
        XLoraConfig(**{"hidden_size": 48, "adapters": ADAPTERS} | changes)
    assert direct[0].filename == __file__  # the warning points at the caller


def test_what_peft_fills_in():
    with pytest.warns(UserWarning, match="is not given"):
        made = XLoraConfig()
    assert made.hidden_size == 4096
    assert made.adapters == {}


def test_no_warning_without_cause():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config(top_k_lora=3)
        config(enable_softmax=False, enable_softmax_topk=True, top_k_lora=2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"xlora_depth": 0}, "xlora_depth must be at least 1, got 0"),
        ({"xlora_depth": -2}, "xlora_depth must be at least 1, got -2"),
        ({"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
        ({"top_k_lora": 0}, "top_k_lora must be at least 1"),
        ({"top_k_lora": 4}, r"top_k_lora must be at most the number of experts \(3\), got 4"),
        ({"softmax_temperature": 0.0}, "softmax_temperature must be above 0"),
        ({"softmax_temperature": -1.0}, "softmax_temperature must be above 0"),
        ({"softmax_temperature": math.nan}, "softmax_temperature must be finite"),
        ({"softmax_temperature": 10**400}, "softmax_temperature must be finite"),
        ({"xlora_dropout_p": 1.0}, "xlora_dropout_p must be at least 0 and below 1"),
        ({"xlora_dropout_p": -0.1}, "xlora_dropout_p must be at least 0 and below 1"),
        ({"xlora_depth": 2, "xlora_size": 0}, "xlora_size must be at least 1"),
        ({"scaling_pass_value": math.inf}, "scaling_pass_value must be finite"),
        ({"global_scaling_weight": -math.inf}, "global_scaling_weight must be finite"),
    ],
)
def test_values_that_cannot_work(changes, words):
    with pytest.raises(ValueError, match=words):
        config(**changes)


def test_inner_width_is_of_no_effect_at_depth_1():
    assert config(xlora_size=0).xlora_size == 0


@pytest.mark.parametrize("name", [name for name in ALL_CHANGED if name != "adapters"])
@pytest.mark.parametrize("kind", ["text", "opposite", "list"])
def test_wrong_types_are_named(name, kind):
    is_bool = isinstance(ALL_CHANGED[name], bool)
    wrong = {"text": "1", "opposite": 1 if is_bool else True, "list": [1]}[kind]
    with pytest.raises(TypeError, match=f"^{name} must be .*, got .*{type(wrong).__name__}"):
        config(**{name: wrong})


@pytest.mark.parametrize("name", ["hidden_size", "xlora_depth", "xlora_size", "top_k_lora"])
def test_integers_are_not_rounded(name):
    with pytest.raises(TypeError, match=f"{name} must be an integer, got 2.0"):
        config(**{name: 2.0})


@pytest.mark.parametrize(
    ("adapters", "words"),
    [
        (["math"], "adapters must be a mapping"),
        ("math", "adapters must be a mapping"),
        ({1: "x"}, "expert's name in adapters must be a non-empty string, got 1"),
        ({"": "x"}, "expert's name in adapters must be a non-empty string"),
        ({"math": 3}, r"adapters\['math'\] must be a directory or hub id, got 3"),
        ({"math": None}, r"adapters\['math'\] must be a directory or hub id"),
    ],
)
def test_wrong_adapters(adapters, words):
    with pytest.raises(TypeError, match=words):
        config(adapters=adapters)


def test_unknown_field_is_named():
    with pytest.raises(ValueError, match="unknown field in an X-LoRA config: 'xlora_dept'"):
        XLoraConfig.from_dict({"hidden_size": 48, "xlora_dept": 2})


def test_scaling_pass_gate():
    assert config().scaling_pass_gate(3) == 0.0
    assert config(scaling_pass_value=None).scaling_pass_gate(4) == 0.25
    assert config(scaling_pass_value=0.7).scaling_pass_gate(4) == 0.7
    with pytest.raises(ValueError, match="at least one expert"):
        config().scaling_pass_gate(0)


def test_validate_experts():
    config(top_k_lora=3).validate_experts(3)
    with pytest.raises(ValueError, match=r"number of experts \(2\), got 3"):
        config(top_k_lora=3).validate_experts(2)
