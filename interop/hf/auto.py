"""The only module that calls transformers' `Auto*` classes. Code in a model's directory is never run.

Without `trust_remote_code=False`, transformers asks at the terminal, and takes a `y` on standard input as consent. It
also follows links of a tokenizer's files to any place. Here, links that leave the directory are refused, as those of
weights are.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from interop.storage.errors import FormatError, brief, listed
from interop.storage.files import file_in, read_json
from interop.storage.hub import resolve

__all__ = ["encode_text", "encoding", "load_hf_config", "load_tokenizer", "load_torch_model", "warn_of_added_tokens"]

_CONFIG = "tokenizer_config.json"
_TEMPLATE_FOLDER = "additional_chat_templates"
# Suffixes of all files that tokenizers read: vocabularies, merges, sentencepiece and tiktoken models, templates.
_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".vocab", ".bpe", ".spm"}
_MAX_TOKENIZER_BYTES = 256 * 2**20
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "merges.txt", "spm*", "*.bpe")


def load_hf_config(directory: Path) -> Any:
    """Load the config of a model's directory as an object of transformers.

    Raises:
        Exception: an error of transformers, of any type.
    """
    import transformers

    return _from_pretrained(transformers.AutoConfig, directory)


def load_torch_model(kind: Any, directory: Path, config: Any, dtype: Any) -> tuple[Any, Mapping[str, Any]]:
    """Load a PyTorch model from safetensors.

    Args:
        kind: model class of transformers.
        directory: directory of the model.
        config: config of the model.
        dtype: torch dtype of the parameters.

    Returns:
        The model, and transformers' report of missing, unexpected and mismatched tensors.

    Raises:
        Exception: an error of transformers, of any type.
    """
    options = {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
    loaded: tuple[Any, Mapping[str, Any]] = _from_pretrained(kind, directory, config=config, dtype=dtype, **options)
    return loaded


def load_tokenizer(base: str | Path, **hub_options: Any) -> Any:
    """Load the tokenizer of a model.

    Args:
        base: directory or hub id of the model.
        **hub_options: ``revision``, ``subfolder``, ``token``, ``cache_dir``, ``local_files_only``.

    Returns:
        The transformers tokenizer.

    Raises:
        FileNotFoundError: the directory has no tokenizer.
        FormatError: a file is broken, a link leaves the directory, or the tokenizer needs its own code; the message
            names the file.
    """
    directory = resolve(base, **hub_options)
    files = _checked_files(directory)
    if not any(path.match(pattern) for path in files for pattern in _TOKENIZER_FILES):
        raise FileNotFoundError(
            f"{directory}: no tokenizer; expected tokenizer.json, or a vocabulary and {_CONFIG}. Copy the files of the "
            f"model's tokenizer into it."
        )
    config = _checked_config(directory)
    import transformers

    try:
        tokenizer = _from_pretrained(transformers.AutoTokenizer, directory)
        if not isinstance(tokenizer, transformers.PreTrainedTokenizerBase):
            raise TypeError(f"a {type(tokenizer).__name__}, which is no tokenizer of one text")
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
            raise
        raise _explained(directory, files, config, error) from error
    _check_templates(tokenizer, directory)
    return tokenizer


def warn_of_added_tokens(tokenizer: Any, vocab_size: int | None) -> None:
    """Warn of tokens that have no row in the base's embedding.

    Args:
        tokenizer: transformers tokenizer.
        vocab_size: V, number of rows of the base's embedding; None if unknown.
    """
    if not vocab_size:
        return
    beyond = sorted(token for token, number in tokenizer.get_vocab().items() if number >= vocab_size)
    if beyond:
        warnings.warn(
            f"{getattr(tokenizer, 'name_or_path', 'the tokenizer')}: {len(beyond)} tokens have no row in the base's "
            f"embedding of {vocab_size} ({listed(beyond)}), and a text that holds one is refused. Use the base that "
            f"was resized for them (resize_token_embeddings), or the base's own tokenizer.",
            UserWarning,
            stacklevel=2,
        )


def encode_text(tokenizer: Any, text: str, *, add_special_tokens: bool) -> list[int]:
    """Encode a text to token ids.

    Raises:
        FormatError: the tokenizer fails on it; the message names the tokenizer's directory.
    """
    with encoding(tokenizer, text):
        return list(tokenizer.encode(text, add_special_tokens=add_special_tokens))


@contextmanager
def encoding(tokenizer: Any, text: str) -> Iterator[None]:
    """Turn an error while a text is encoded, within a ``with`` block, into a FormatError that names the tokenizer."""
    try:
        yield
    except Exception as error:  # the tokenizers library has no error class of its own
        raise FormatError(
            f"{getattr(tokenizer, 'name_or_path', '')}: the tokenizer fails on the text {brief(text)} "
            f"({brief(str(error), 300)}); is its vocabulary whole? Download or save it again."
        ) from error


def _from_pretrained(kind: Any, directory: Path, **options: Any) -> Any:
    """Call ``from_pretrained`` of a class of transformers; no code of the directory runs."""
    with _no_questions():
        return kind.from_pretrained(directory, trust_remote_code=False, local_files_only=True, **options)


@contextmanager
def _no_questions() -> Iterator[None]:
    """Keep transformers from asking for consent.

    Some of its classes load others without `trust_remote_code`. With a timeout of zero, these fail without a question.
    """
    from transformers import dynamic_module_utils

    before = getattr(dynamic_module_utils, "TIME_OUT_REMOTE_CODE", 0)
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = before


def _checked_files(directory: Path) -> list[Path]:
    """Return the files that a tokenizer may be read from, after a check of their links and sizes."""
    names = sorted(entry.name for entry in directory.iterdir() if entry.suffix in _SUFFIXES and not entry.is_dir())
    found = [path for name in names if (path := file_in(directory, name)) is not None]
    folder = directory / _TEMPLATE_FOLDER
    if folder.is_symlink():
        raise FormatError(f"{folder}: a link; copy the folder itself into the directory.")
    if folder.is_dir():
        found += [path for entry in sorted(folder.iterdir()) if (path := file_in(folder, entry.name)) is not None]
    for path in found:
        if path.stat().st_size > _MAX_TOKENIZER_BYTES and any(path.match(pattern) for pattern in _TOKENIZER_FILES):
            raise FormatError(f"{path}: {path.stat().st_size} bytes; expected at most {_MAX_TOKENIZER_BYTES}.")
    return found


def _checked_config(directory: Path) -> dict[str, Any]:
    path = file_in(directory, _CONFIG)
    if path is None:
        return {}
    config = read_json(path)
    for name, value in config.items():
        names = value if isinstance(value, list) else [value]
        if not name.endswith(("_file", "_files")):
            continue
        for given in names:
            if isinstance(given, str) and _is_outside(directory, given):
                raise FormatError(
                    f"{path}: {name} is {given!r}, a file outside of the directory; copy it into the directory and "
                    f"remove the field."
                )
    return config


def _is_outside(directory: Path, given: str) -> bool:
    """Return whether a path leads to an existing entry outside the directory."""
    try:
        places = [Path(given).resolve(), (directory / given).resolve()]
        return any(place.exists() and not place.is_relative_to(directory.resolve()) for place in places)
    except (OSError, ValueError, RuntimeError):
        return True


def _explained(directory: Path, files: Sequence[Path], config: Mapping[str, Any], error: BaseException) -> FormatError:
    """Return an error that names the file at fault."""
    reason = brief(f"{type(error).__name__}: {error}", 400)
    if "auto_map" in config and "code" in str(error):
        return FormatError(
            f"{directory / _CONFIG}: this tokenizer needs code of its own, {brief(config['auto_map'])}, and code from "
            f"a model's files is never run. Save it as a tokenizer.json: load it in transformers on a machine that may "
            f"run the code, and write it with save_pretrained."
        )
    for path in files:
        try:
            if path.suffix == ".json" and not isinstance(json.loads(path.read_bytes()), dict):
                raise TypeError("expected an object")
            if path.suffix in (".txt", ".jinja"):
                path.read_text(encoding="utf-8")
        except (ValueError, TypeError, RecursionError) as broken:
            return FormatError(
                f"{path}: broken ({broken}), so the tokenizer can't be loaded; download or save it again."
            )
    likely = [path for path in files if any(path.match(pattern) for pattern in _TOKENIZER_FILES)]
    whole = next((path for path in likely if path.name == "tokenizer.json"), likely[0])
    return FormatError(f"{whole}: transformers can't make a tokenizer of it ({reason}); download or save it again.")


def _check_templates(tokenizer: Any, directory: Path) -> None:
    """Compile the chat templates, so that a broken one is found before anything else is loaded."""
    import jinja2
    from transformers.utils import chat_template_utils

    template = getattr(tokenizer, "chat_template", None)
    if template is None:
        return
    templates = template if isinstance(template, dict) else {"default": template}
    for name, text in templates.items():
        try:
            if not isinstance(text, str):
                raise TypeError(f"expected a text, got {type(text).__name__}")
            chat_template_utils._compile_jinja_template(text)
        except (jinja2.TemplateError, ValueError, TypeError, RecursionError, SyntaxError) as error:
            line = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
            raise FormatError(
                f"{_template_file(directory, name)}: the chat template{line}: {brief(str(error), 300)}; correct or "
                f"remove it."
            ) from error


def _template_file(directory: Path, name: str = "default") -> Path:
    """Return the file that transformers takes a chat template from."""
    own = directory / _TEMPLATE_FOLDER / f"{name}.jinja"
    places = (own, directory / "chat_template.jinja", directory / "chat_template.json", directory / _CONFIG)
    return next((place for place in places if place.is_file()), directory / _CONFIG)
