"""HF tokenizers as codecs for :mod:`xlora_jax.training.data`."""

from __future__ import annotations

import copy
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from interop.hf.auto import encode_text, encoding, load_tokenizer
from interop.hf.templates import TIME_LIMIT, renderer_of
from xlora_jax.training.data import Codec

__all__ = ["codec_of", "load_codec"]


def load_codec(base: str | Path, **hub_options: Any) -> Codec:
    """Load the codec of an HF model directory or hub id; same options as :func:`interop.load_tokenizer`."""
    return codec_of(load_tokenizer(base, **hub_options))


def codec_of(tokenizer: Any, template_seconds: float = TIME_LIMIT) -> Codec:
    """Make a codec of a tokenizer: its encoding, its chat template, and the tokens at the start and end of a text.

    A text begins with ``bos`` only if the tokenizer itself adds it.

    Args:
        tokenizer: transformers tokenizer.
        template_seconds: time limit, in seconds, of the chat template for one record.
    """
    template = getattr(tokenizer, "chat_template", None)
    sources = list(template.values()) if isinstance(template, dict) else [template or ""]

    def reads(name: str) -> bool:
        return any(re.search(rf"\b{re.escape(name)}\b", source) for source in sources)

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    bos = tokenizer.bos_token_id
    begins = bos is not None and encode_text(tokenizer, "a", add_special_tokens=True)[:1] == [bos]
    return Codec(
        encode=_encoder(tokenizer),
        bos=bos if begins else None,
        eos=tokenizer.eos_token_id,
        chat=renderer_of(tokenizer, template_seconds) if template else None,
        reads=reads,
        decode=decode,
    )


def _encoder(tokenizer: Any) -> Callable[[str, int], tuple[list[int], int]]:
    if not getattr(tokenizer, "is_fast", False):
        return _encoder_by_parts(tokenizer)
    backend = None
    if b'"trim_offsets":true' in _state_of(tokenizer.backend_tokenizer.post_processor):
        # This post-processor trims spaces from a token's offsets, so a copy without it is used.
        backend = copy.deepcopy(tokenizer.backend_tokenizer)
        backend.post_processor = None
        backend.no_truncation()
        backend.no_padding()

    def encode(text: str, start: int) -> tuple[list[int], int]:
        if backend is not None:
            with encoding(tokenizer, text):
                encoded = backend.encode(text, add_special_tokens=False)
            ids, offsets = encoded.ids, encoded.offsets
        else:
            with encoding(tokenizer, text):
                encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        # Tokens are in the order of their characters. The first that ends after `start` is the first of the answer.
        return list(ids), bisect_right([end for _, end in offsets], start)

    return encode


def _state_of(processor: Any) -> bytes:
    return b"" if processor is None else bytes(processor.__getstate__())


def _encoder_by_parts(tokenizer: Any) -> Callable[[str, int], tuple[list[int], int]]:
    """Return an encoder that needs no offsets: it encodes the text before an answer separately, to count its tokens."""

    def ids_of(text: str) -> list[int]:
        return encode_text(tokenizer, text, add_special_tokens=False)

    def encode(text: str, start: int) -> tuple[list[int], int]:
        whole = ids_of(text)
        if not start:
            return whole, 0
        before = ids_of(text[:start])
        if whole[: len(before)] != before:
            raise ValueError(
                f"tokens merge over the beginning of the answer {text[start : start + 40]!r}, and this tokenizer "
                f"({type(tokenizer).__name__}) does not say which characters a token holds; use its fast version"
            )
        return whole, len(before)

    return encode
