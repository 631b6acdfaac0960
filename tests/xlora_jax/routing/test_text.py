"""Texts with their gates: pieces of tokens, what a notebook and a terminal show, and the page's data."""

from __future__ import annotations

import base64
import html
import json
import re

import numpy as np
import pytest
from rich.console import Console

from xlora_jax.cli.routing_view import show_text
from xlora_jax.routing.text import Part, RoutedText, pieces_of


def routed(tokens=("def", " f", "(x)\n"), names=("code", "law"), **more):
    gates = np.zeros((len(tokens), 3, len(names)))
    gates[:, :, 0] = 0.75
    gates[:, :, 1] = 0.25
    gates[-1, :, 0], gates[-1, :, 1] = 0, 0.5
    return RoutedText(tuple(tokens), gates, tuple(names), ("0/q", "0/v", "1/q"), **more)


def test_pieces_are_the_text_token_by_token():
    # Bytes as tokens: a character may take four of them, and a broken one never ends.
    text = "né 漢😀!"
    ids = list(text.encode())

    def decode(tokens):
        return bytes(tokens).decode("utf-8", "replace")

    pieces = pieces_of(ids, decode)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text
    assert pieces[:4] == ("n", "", "é", " ")
    broken = pieces_of([0xF0] * 40 + [65], decode)
    assert len(broken) == 41
    assert broken[-1].endswith("A")
    # Words that are joined by spaces.
    words = pieces_of([0, 1, 2], lambda ids: " ".join("abc"[i] for i in ids))
    assert words == ("a", " b", " c")


def test_shares_and_leaders():
    text = routed()
    assert text.shares[0, 0].tolist() == [0.75, 0.25]
    assert text.shares[-1, 0].tolist() == [0, 1]
    assert text.leaders.tolist() == [0, 0, 1]
    assert text.marked() == "⟨code⟩def f⟨law⟩(x)\n"
    with pytest.raises(ValueError, match=r"gates: expected shape \[3, 3, 3\], got \[3, 3, 2\]"):
        RoutedText(text.tokens, text.gates, ("a", "b", "c"), text.layer_names)


def test_a_notebook_shows_the_page_of_the_text_alone():
    text = routed(("<script>alert(1)</script>", "\ud800", "&amp;"), ('"><img src=x onerror=alert(1)>', "b"))
    frame = text._repr_html_()
    assert frame.startswith("<iframe srcdoc=")
    assert frame.count("<iframe") == frame.count("</iframe>") == 1
    page = html.unescape(re.fullmatch(r'<iframe srcdoc="([^"]*)" [^<>]*></iframe>', frame)[1])
    assert "<script>alert" not in page
    assert "<img" not in page
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    data = json.loads(data)
    assert data["samples"][0]["tokens"] == list(text.tokens)
    assert data["report"]["experts"] == list(text.expert_names)
    shares = np.frombuffer(base64.b64decode(data["samples"][0]["shares"]), np.uint8).reshape(3, 3, 2)
    np.testing.assert_allclose(shares / 255, text.shares, atol=0.5 / 255)


def test_a_terminal_shows_colors_or_names():
    text = routed(("a\x1b[31m", " b", "[bold]c"), ("[red]x", "y\x07"), parts=(Part(0, "prompt"), Part(1, "generated")))
    for color in (None, "truecolor"):
        console = Console(color_system=color, force_terminal=color is not None, width=60)
        with console.capture() as capture:
            show_text(text, console)
        shown = capture.get()
        assert r"\x1b[31m" in shown
        assert "\x07" not in shown
        assert "[red]x 50%" in shown
        assert r"y\x07 50%" in shown
        assert ("\x1b[" in shown) == (color is not None)
        assert (r"⟨[red]x⟩a" in shown) == (color is None)
        if color:
            # Prompt and generated tokens are told apart, and so are the experts.
            styles = [part.split("m")[0] for part in shown.splitlines()[1].split("\x1b[") if part]
            assert "38;2;0;114;178" in styles
            assert "1;4;38;2;230;159;0" in styles
