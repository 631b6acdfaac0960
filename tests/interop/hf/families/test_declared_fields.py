"""Which fields of a config.json are settings: declared by transformers' config class, or read by its code.

Both are derived here from the installed transformers, for every family.
"""

from __future__ import annotations

import ast
import copy
import inspect
import json
import re
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from interop import load_base
from interop.hf.families.fields import READ_UNDECLARED, WITHOUT_EFFECT, Fields, declared_fields
from interop.hf.families.registry import FAMILIES
from interop.storage.errors import FormatError
from tests.helpers.encoders import CASES, case_of, make_encoder
from tests.helpers.families import MODELS, make_model

# Of multimodal models the text side alone is built.
VISION = ".*tensors of the vision side"
pytestmark = pytest.mark.filterwarnings(f"ignore:{VISION}")
ENCODERS = {family: case_of(family) for family in dict.fromkeys(case.split(" ")[0] for case in CASES)}


def make(family: str, directory: Path) -> Path:
    if family in MODELS:
        return make_model(directory, family)
    make_encoder(ENCODERS[family], directory)
    return directory


def config_of(family: str) -> Any:
    case = CASES[ENCODERS[family]][1] if family in ENCODERS else MODELS[family].options
    return CONFIG_MAPPING[family](**copy.deepcopy(dict(case)))


def declared(family: str) -> frozenset[str]:
    """Fields that transformers declares for a family, those of nested configs included."""
    config = config_of(family)
    nested = [getattr(config, name) for name in ("text_config", "vision_config") if hasattr(config, name)]
    return declared_fields(family).union(*({*part.to_dict(), *part.attribute_map} for part in nested))


def edit(directory: Path, **changes: Any) -> Path:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return directory


@pytest.fixture(scope="module", params=FAMILIES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, make(request.param, tmp_path_factory.mktemp(request.param))


def attributes_read(node: ast.AST) -> set[str]:
    """Names that a piece of code reads from a `config`, by attribute or by `getattr`."""

    def is_config(value: ast.AST) -> bool:
        name = value.attr if isinstance(value, ast.Attribute) else getattr(value, "id", "")
        return name in ("config", "text_config")

    read = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute) and is_config(part.value):
            read.add(part.attr)
        elif (
            isinstance(part, ast.Call)
            and getattr(part.func, "id", "") in ("getattr", "hasattr")
            and is_config(part.args[0])
            and isinstance(part.args[1], ast.Constant)
        ):
            read.add(part.args[1].value)
    return read


@cache
def fields_read(family: str) -> frozenset[str]:
    """Fields that the code of a family reads, from its heads downwards."""
    folder = Path(inspect.getfile(CONFIG_MAPPING[family])).parent
    (source,) = (path for path in folder.glob("modeling_*.py"))
    defined = {
        node.name: node
        for node in ast.parse(source.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef | ast.FunctionDef)
    }
    ends = ("ForCausalLM", "LMHeadModel", "ForSequenceClassification", "ForTokenClassification")
    stem = FAMILIES[family].stem
    left = [name for name in defined if name in {f"{stem}{end}" for end in (*ends, "ForImageClassification")}]
    left += [name for name in FAMILIES[family].causal_lm.split(" or ") if name in defined]
    assert left
    seen: set[str] = set()
    read: set[str] = set()
    while left:
        name = left.pop()
        # It names all classes of the file, to initialize them.
        if name in seen or name.endswith("PreTrainedModel"):
            continue
        seen.add(name)
        read |= attributes_read(defined[name])
        left += [part.id for part in ast.walk(defined[name]) if isinstance(part, ast.Name) and part.id in defined]
    return frozenset(read)


# Attributes of a config that are no fields of its file.
NO_FIELDS = {"get_text_config", "token_type_ids", "embedding_size", "crossattention", "q_attn", "is_sliding"}
# Half of `local_attention`, a property; a file that sets it has set that.
PROPERTIES = {"modernbert": {"sliding_window"}}


@pytest.mark.parametrize("family", FAMILIES)
def test_fields_that_are_read_without_being_declared_are_known(family: str) -> None:
    unknown = fields_read(family) - declared(family) - READ_UNDECLARED - WITHOUT_EFFECT - NO_FIELDS
    assert not unknown - PROPERTIES.get(family, set())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reader_takes_settings_only(family: str, made: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A field that transformers ignores must not act here."""
    taken: set[str] = set()
    take = Fields.take

    def recorded(self: Fields, name: str, default: Any = None) -> Any:
        if name in self._left:
            taken.add(name)
        return take(self, name, default)

    monkeypatch.setattr(Fields, "take", recorded)
    config = config_of(family).to_dict()
    architectures = [FAMILIES[family].causal_lm.split(" or ")[0]]
    settings = declared(family) | READ_UNDECLARED
    given = {n: v for n, v in {**config, "architectures": architectures}.items() if n in settings}
    FAMILIES[family].read(Fields(given, "config.json"))
    ropes = config.get("text_config", config).get("rope_parameters") or {}
    assert taken <= settings | set(ropes) | {"full_attention", "sliding_attention"} | {
        name for rope in ropes.values() if isinstance(rope, dict) for name in rope
    }


# Notes, other programs' settings and fields of other models, as found in public configs; and null.
IGNORED = {
    "_model_name_or_path": "org/name",
    "wandb": {"project": "p", "tags": [1]},
    "internal_version": 3,
    "unk_token_id": 0,
    "max_sequence_length": 2048,
    "neftune_noise_alpha": None,
    "transformers.js_config": {"dtype": "q4"},
    "is_llama_config": True,
    "use_mrope": False,
    "full_attn_mod": 1,
    "cache_implementation": "hybrid",
    "n_special": 0,
    "prefix": "</s>",
    "directionality": "bidi",
    "a field of the future": [None, {"deep": float(1)}],
}


def test_undeclared_fields_pass_with_one_warning_that_names_them(made: tuple[str, Path], tmp_path: Path) -> None:
    family, directory = made
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=VISION)
        plain = load_base(directory, dtype=jnp.float32)
    config = (directory / "config.json").read_text()
    injected = {name: value for name, value in IGNORED.items() if name not in declared_fields(family)}
    assert len(injected) > 10
    try:
        for changes in ({**injected}, {"text_config": {**json.loads(config).get("text_config", {}), **injected}}):
            if not FAMILIES[family].texts and "text_config" in changes:
                continue
            with pytest.warns(UserWarning, match="transformers ignores these fields") as caught:
                loaded = load_base(edit(directory, **changes), dtype=jnp.float32)
            (directory / "config.json").write_text(config)
            said = [str(one.message) for one in caught if not re.match(VISION, str(one.message))]
            assert len(said) == 1
            assert all(repr(name) in said[0] for name in injected)
            assert loaded.module == plain.module
    finally:
        (directory / "config.json").write_text(config)


def test_a_field_of_another_model_does_not_act(tmp_path: Path) -> None:
    """A Llama of transformers has no windows, whatever its config says."""
    directory = make_model(tmp_path, "llama")
    plain = load_base(directory)
    with pytest.warns(UserWarning, match="'sliding_window'"):
        loaded = load_base(edit(directory, sliding_window=3, max_window_layers=1, num_local_experts=0))
    assert loaded.module == plain.module


# Declared, and not implemented at these values.
REFUSED = {
    "chunk_size_feed_forward": 3,
    "is_encoder_decoder": True,
    "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "is_causal": False,
    "hidden_act": "mish",
    "hidden_activation": "mish",
    "activation": "mish",
    "activation_function": "mish",
    "use_bidirectional_attention": True,
    "attn_logit_softcapping": None,
}


def test_declared_fields_that_are_not_implemented_are_refused_by_name(made: tuple[str, Path]) -> None:
    family, directory = made
    config = (directory / "config.json").read_text()
    tried = 0
    try:
        for name, value in REFUSED.items():
            if value is None or name not in declared_fields(family) | {"quantization_config", "is_causal"}:
                continue
            tried += 1
            with pytest.raises(FormatError, match=name):
                load_base(edit(directory, **{name: value}))
            (directory / "config.json").write_text(config)
    finally:
        (directory / "config.json").write_text(config)
    assert tried >= 4


def test_a_quantized_base_says_what_to_take(tmp_path: Path) -> None:
    directory = make_model(tmp_path, "llama")
    edit(directory, quantization_config={"quant_method": "hqq"}, _name_or_path="mobiuslabs/Llama-3-8b_hqq-4bit")
    with pytest.raises(FormatError, match=r"quantization_config.*got 'hqq'.*'mobiuslabs/Llama-3-8b' by its name"):
        load_base(directory)


def test_parameters_of_another_kind_of_rope_are_passed_over(tmp_path: Path) -> None:
    directory = make_model(tmp_path, "llama")
    plain = load_base(directory)
    rope = {"rope_type": "default", "rope_theta": 300.0, "beta_fast": 32.0, "finetuned": True}
    with pytest.warns(UserWarning, match="'beta_fast', 'finetuned'"):
        loaded = load_base(edit(directory, rope_parameters=rope))
    assert loaded.module == plain.module
