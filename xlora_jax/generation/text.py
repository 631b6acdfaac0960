"""Text during generation: pieces of a stream, and stop strings.

The tokenizer is passed in as a function from tokens to text, such as
``lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

__all__ = ["Decode", "StopStrings", "TextStream"]

Decode = Callable[[Sequence[int]], str]

# Decoders put this character in place of the bytes of an incomplete character.
_INCOMPLETE = "\ufffd"


@dataclass(frozen=True)
class StopStrings:
    """A ``stop_at`` function that ends a row at the token that completes one of several strings.

    Attributes:
        strings: strings to stop at, none of them empty.
        decode: function from a row's new tokens to text.
    """

    strings: tuple[str, ...]
    decode: Decode

    def __post_init__(self) -> None:
        """Validate the fields."""
        if not self.strings or not all(self.strings):
            raise ValueError(f"stop strings: expected at least one, and none empty, got {self.strings!r}")

    def __call__(self, tokens: Sequence[int]) -> int | None:
        """Return the number of ``tokens`` up to the end of the first stop string; None if no stop string occurs."""
        if self._found(self.decode(tokens)) is None:
            return None
        return next(n for n in range(1, len(tokens) + 1) if self._found(self.decode(tokens[:n])) is not None)

    def cut(self, text: str) -> str:
        """Return the text before the first stop string, or all of ``text``."""
        return text[: self._found(text)]

    def open_end(self, text: str) -> int:
        """Return the number of characters at the end of ``text`` that could be the beginning of a stop string."""
        starts = (string[:n] for string in self.strings for n in range(1, len(string)))
        return max((len(start) for start in starts if text.endswith(start)), default=0)

    def _found(self, text: str) -> int | None:
        places = [place for place in map(text.find, self.strings) if place >= 0]
        return min(places, default=None)


@dataclass
class TextStream:
    """Text of a row of tokens, piece by piece. The pieces together are the text of all tokens, cut at a stop string.

    Incomplete characters, and text that may become a stop string, are held back.

    Attributes:
        decode: function from tokens to text.
        stop: strings that end the text; they are not part of it. None for no such strings.
    """

    decode: Decode
    stop: StopStrings | None = None
    _tokens: list[int] = field(default_factory=list)
    _given: int = 0

    def push(self, tokens: Iterable[int]) -> str:
        """Take the next tokens, and return the new text that is certain by now."""
        self._tokens.extend(int(token) for token in tokens)
        text = self.decode(self._tokens)
        cut = text if self.stop is None else self.stop.cut(text)
        if cut == text:
            cut = text.rstrip(_INCOMPLETE)
            if self.stop is not None:
                cut = cut[: len(cut) - self.stop.open_end(cut)]
        return self._give(cut)

    def close(self) -> str:
        """Return the text that was held back."""
        text = self.decode(self._tokens)
        return self._give(text if self.stop is None else self.stop.cut(text))

    def _give(self, text: str) -> str:
        piece, self._given = text[self._given :], max(self._given, len(text))
        return piece
