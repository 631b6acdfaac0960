"""HF tokenizers as the functions that :mod:`xlora_jax.training.data` takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from interop.hf.auto import encode_text, load_tokenizer, render_chat
from xlora_jax.training.data import Codec

__all__ = ["codec_of", "load_codec"]


def load_codec(base: str | Path, **hub_options: Any) -> Codec:
    """Load the tokenizer of an HF model directory or hub id; options as those of :func:`interop.load_base`."""
    return codec_of(load_tokenizer(base, **hub_options))


def codec_of(tokenizer: Any) -> Codec:
    """Make a codec of a transformers tokenizer: its encoding, its chat template, the tokens that begin and end a text.

    A text begins with ``bos`` only where the tokenizer itself would put it there.
    """

    def encode(text: str) -> list[int]:
        return encode_text(tokenizer, text, add_special_tokens=False)

    def chat(messages: Sequence[Mapping[str, str]], answer_follows: bool) -> list[int]:
        text = render_chat(tokenizer, messages, add_generation_prompt=answer_follows)
        # The template writes the special tokens itself.
        return encode_text(tokenizer, text, add_special_tokens=False)

    bos = tokenizer.bos_token_id
    begins = bos is not None and encode_text(tokenizer, "a", add_special_tokens=True)[:1] == [bos]
    template = getattr(tokenizer, "chat_template", None)
    return Codec(encode, bos if begins else None, tokenizer.eos_token_id, chat if template else None)
