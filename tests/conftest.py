"""Settings for every test, and the small models that many of them share (see `reference.py`)."""

from __future__ import annotations

import importlib
import os

# Before anything imports these libraries: no test may reach for the network, and numbers are to be the same anywhere.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import gc
import json
import shutil
import string
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import pytest

from tests.helpers import core

if TYPE_CHECKING:
    from tests.helpers.reference import Expert

jax.config.update("jax_default_matmul_precision", "highest")

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}.{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--core", action="store_true", help="only tests that need neither torch nor Hugging Face packages")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if config.getoption("--core") and collection_path.suffix == ".py" and core.file_needs_foreign(collection_path):
        return True
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--core"):
        left_out = [item for item in items if isinstance(item, pytest.Function) and core.item_needs_foreign(item)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--core"):
        return
    torch, transformers = (importlib.import_module(name) for name in ("torch", "transformers"))
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


# Linux gives a process 65,530 memory mappings, and a compiled program takes up to ten: a worker that kept those of two
# thousand tests would crash.
_MAX_MAPPINGS = 20_000


@pytest.fixture(scope="module", autouse=True)
def _few_compiled_programs() -> Iterator[None]:
    yield
    mappings = Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > _MAX_MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`base(family, seed=0, **options)`: the directory of such a base model, made once a session."""

    made: dict[Any, Path] = {}

    def get(family: str, seed: int = 0, **options: Any) -> Path:
        key = (family, seed, repr(sorted(options.items())))
        if key not in made:
            from tests.helpers import reference

            made[key] = reference.make_base(tmp_path_factory.mktemp(f"base-{family}"), family, seed, **options)
        return made[key]

    return get


@pytest.fixture(scope="session")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Path]]:
    """`experts(base_dir, set, seed=0)`: directories of the adapters of that set, made once a session."""

    made: dict[Any, list[Path]] = {}

    def get(base_dir: Path, recipes: str | Sequence[Expert], seed: int = 0) -> list[Path]:
        key = (base_dir, repr(recipes), seed)
        if key not in made:
            from tests.helpers import reference

            made[key] = reference.make_experts(base_dir, tmp_path_factory.mktemp("experts"), recipes, seed)
        return made[key]

    return get


@pytest.fixture(scope="session")
def text_files(
    base: Callable[..., Path], experts: Callable[..., list[Path]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, list[Path]]:
    """A folder with train.jsonl and held.jsonl of all kinds of records, a base with a tokenizer, two adapters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    source = base("llama")
    adapters = experts(source, "unequal")
    folder = tmp_path_factory.mktemp("texts")
    base_dir = shutil.copytree(source, folder / "base")
    characters = ["<pad>", "<eos>", *string.ascii_letters, *" .,:!?0123456789"]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", chat_template=CHAT_TEMPLATE
    ).save_pretrained(base_dir)
    random = np.random.default_rng(0)
    lines = []
    for number in range(40):
        word = "".join(random.choice(list("abcdef"), 12))
        lines.append(
            [
                {"text": word},
                {"prompt": word, "completion": word[::-1]},
                {"messages": [{"role": "user", "content": word}, {"role": "assistant", "content": word.upper()}]},
            ][number % 3]
        )
    for name, part in (("train", lines[:32]), ("held", lines[32:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in part))
    return folder, base_dir, adapters
