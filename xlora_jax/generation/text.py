"""From tokens to text while they come: pieces for a stream, and stop strings.

Nothing here knows a tokenizer but by a function from tokens to text, such as
``lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

__all__ = ["StopStrings", "TextStream"]

Decode = Callable[[Sequence[int]], str]

# What decoders put where bytes are no whole character yet.
_INCOMPLETE = "\ufffd"


@dataclass(frozen=True)
class StopStrings:
    """Ends a row at the token that completes one of several strings; a ``stop_at`` of a generation.

    Attributes:
        strings: none of them empty.
        decode: from a row's new tokens to text.
    """

    strings: tuple[str, ...]
    decode: Decode

    def __post_init__(self) -> None:
        """Refuse what would end every row at once."""
        if not self.strings or not all(self.strings):
            raise ValueError(f"stop strings: expected at least one, and none empty, got {self.strings!r}")

    def __call__(self, tokens: Sequence[int]) -> int | None:
        """Return how many of ``tokens`` stay, the one that completes a stop string included; None if none occurs."""
        if self._found(self.decode(tokens)) is None:
            return None
        return next(n for n in range(1, len(tokens) + 1) if self._found(self.decode(tokens[:n])) is not None)

    def cut(self, text: str) -> str:
        """Return what stands before the first stop string, or all of ``text``."""
        return text[: self._found(text)]

    def open_end(self, text: str) -> int:
        """Return how many characters at the end of ``text`` a stop string could begin with."""
        starts = (string[:n] for string in self.strings for n in range(1, len(string)))
        return max((len(start) for start in starts if text.endswith(start)), default=0)

    def _found(self, text: str) -> int | None:
        places = [place for place in map(text.find, self.strings) if place >= 0]
        return min(places, default=None)


@dataclass
class TextStream:
    """Text of a row of tokens, piece by piece. The pieces together are the text of all tokens, cut at a stop string.

    A character whose bytes have not all come is held back, and so is what may become a stop string.

    Attributes:
        decode: from tokens to text.
        stop: strings that the text ends before, if any.
    """

    decode: Decode
    stop: StopStrings | None = None
    _tokens: list[int] = field(default_factory=list)
    _given: int = 0

    def push(self, tokens: Iterable[int]) -> str:
        """Take the next tokens, and return the text that is certain by now and was not given yet."""
        self._tokens.extend(int(token) for token in tokens)
        text = self.decode(self._tokens)
        cut = text if self.stop is None else self.stop.cut(text)
        if cut == text:
            cut = text.rstrip(_INCOMPLETE)
            if self.stop is not None:
                cut = cut[: len(cut) - self.stop.open_end(cut)]
        return self._give(cut)

    def close(self) -> str:
        """Return what was held back."""
        text = self.decode(self._tokens)
        return self._give(text if self.stop is None else self.stop.cut(text))

    def _give(self, text: str) -> str:
        piece, self._given = text[self._given :], max(self._given, len(text))
        return piece
