"""A text with the gates of its tokens: shown in a notebook, in a terminal, and in the page of a report.

Axes: T tokens, L adapted layers (1 if they share their gates), N experts.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xlora_jax.routing.page import render_page

__all__ = ["Part", "RoutedText", "pieces_of"]

_REPLACEMENT = "\ufffd"
_MOST_TOKENS_OF_A_CHARACTER = 12
_FRAME_HEIGHT = 620


@dataclass(frozen=True)
class Part:
    """A part of a text.

    Attributes:
        start: index of its first token.
        kind: ``prompt``, ``generated``, ``answer`` (the learned part of a data record) or ``text``.
    """

    start: int
    kind: str


@dataclass(frozen=True)
class RoutedText:
    """A text and its gates.

    In a notebook it displays itself: each token has the color of its leading expert, and shows all weights when pointed
    at. The page is rendered by jinja2 (extra ``plots``).

    Attributes:
        tokens: text of each token; joined, they are the whole text. A token that ends within a character has no text,
            and the token that completes the character has all of it.
        gates: float ``[T, L or 1, N]``, after top-k, before the global weight.
        expert_names: names of the experts.
        layer_names: module paths of the adapted layers, or one name if they share their gates.
        parts: parts of the text, in order.
        name: title of the text.
    """

    tokens: tuple[str, ...]
    gates: NDArray[Any]
    expert_names: tuple[str, ...]
    layer_names: tuple[str, ...]
    parts: tuple[Part, ...] = (Part(0, "text"),)
    name: str = "text"

    def __post_init__(self) -> None:
        """Check the shape of the gates.

        Raises:
            ValueError: it does not fit the names.
        """
        want = (len(self.tokens), len(self.layer_names), len(self.expert_names))
        if self.gates.shape != want:
            raise ValueError(f"gates: expected shape {list(want)}, got {list(self.gates.shape)}")

    @property
    def shares(self) -> NDArray[np.float64]:
        """Shares of the gates' sum, ``[T, L or 1, N]``, as in :mod:`xlora_jax.routing.metrics`."""
        size = np.abs(np.asarray(self.gates, np.float64))
        total = size.sum(axis=-1, keepdims=True)
        shares: NDArray[np.float64] = size / np.where(total == 0, 1, total)
        return shares

    @property
    def leaders(self) -> NDArray[np.int64]:
        """Index of each token's leading expert over all layers, ``[T]``; -1 if all gates are zero."""
        mean = self.shares.mean(axis=1)
        leaders: NDArray[np.int64] = np.where(mean.sum(axis=-1) > 0, mean.argmax(axis=-1), -1)
        return leaders

    def kind(self, token: int) -> str:
        """Return the kind of the part that a token belongs to."""
        return next((part.kind for part in reversed(self.parts) if part.start <= token), "text")

    def as_json(self) -> dict[str, Any]:
        """Return the text as it is in report.json: tokens, parts, and shares as means over the layers."""
        return {
            "name": self.name,
            "tokens": list(self.tokens),
            "parts": [{"start": part.start, "kind": part.kind} for part in self.parts],
            "shares": [[round(share, 4) for share in row] for row in self.shares.mean(axis=1).tolist()],
        }

    def page_data(self) -> dict[str, Any]:
        """Return the text as the page embeds it: shares of all layers, as bytes 0 to 255 in base64."""
        content = np.round(self.shares * 255).astype(np.uint8).tobytes()
        return {**self.as_json(), "shares": base64.b64encode(content).decode("ascii")}

    def html(self) -> str:
        """Return a page with the token view alone.

        Raises:
            ImportError: jinja2 is missing.
        """
        from xlora_jax import __version__

        report = {
            "title": self.name,
            "version": __version__,
            "experts": list(self.expert_names),
            "layers": list(self.layer_names),
        }
        return render_page(report, [self.page_data()], view="tokens")

    def _repr_html_(self) -> str:
        """Return the token view in a frame of its own, so that the notebook's styles and scripts stay apart."""
        page = html.escape(self.html(), quote=True)
        style = f"width:100%;height:{_FRAME_HEIGHT}px;border:0"
        return f'<iframe srcdoc="{page}" sandbox="allow-scripts" style="{style}" title="routing"></iframe>'

    def __repr__(self) -> str:
        """Return the text with a mark where the leading expert changes."""
        return f"RoutedText({self.marked()!r})"

    def marked(self) -> str:
        """Return the text with the name of the leading expert wherever it changes, for terminals without colors."""
        pieces: list[str] = []
        before: int | None = None
        for token, leader in zip(self.tokens, self.leaders.tolist(), strict=True):
            if token and leader != before:
                pieces.append(f"⟨{self.expert_names[leader] if leader >= 0 else 'none'}⟩")
                before = leader
            pieces.append(token)
        return "".join(pieces)


def pieces_of(ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> tuple[str, ...]:
    """Return the text of each token, such that all together are the decoded text.

    Args:
        ids: token ids.
        decode: function from token ids to text. The text of a token may depend on the tokens before it (a leading
            space), and a character may take several tokens.
    """
    pieces: list[str] = []
    # Each text is decoded together with the last complete piece before it, as the space between them needs.
    start = done = 0
    for end in range(1, len(ids) + 1):
        before, text = decode(ids[start:done]) if done > start else "", decode(ids[start:end])
        if text.endswith(_REPLACEMENT) and end < len(ids) and end - done < _MOST_TOKENS_OF_A_CHARACTER:
            pieces.append("")
            continue
        pieces.append(text[len(before) :] if text.startswith(before) else decode(ids[done:end]))
        start, done = done, end
    return tuple(pieces)
