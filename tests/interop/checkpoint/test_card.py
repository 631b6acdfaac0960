"""The model card: whatever names and paths hold, they stay text."""

import dataclasses
import re
import shutil
import subprocess

import pytest

from interop.checkpoint.card import _as_text, _literal, _shell_word, model_card
from tests.helpers.small_checkpoints import small_model

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "a\rb",
    "a\n\n# Heading\n\n```sh\nrm -rf ~\n```",
    "a | b | c",
    r"a \| b",
    "![x](http://example.org/track.png)",
    "[click](javascript:alert(1))",
    "`code`",
    "https://example.org",
    "\x1b]0;title\x07\x1b[31mred",
    "\x9b31m",
    "\u202eabc",
    "a\u2028b",
    "$(touch it-ran) `touch it-ran`",
    "it's; touch it-ran",
    "\\",
    "'",
    "\U0001f600 ü",
    "\ud800",
    "__bold__ *it*",
]


@pytest.mark.parametrize("layout", ["peft", "xlora", "mistralrs"])
@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_name_changes_no_line_of_the_card(text, layout):
    model = small_model(1, False, names=("plain",))
    adapter = model["adapters"][0]

    def card(name):
        named = dataclasses.replace(adapter, name=name, config={**adapter.config, "base_model_name_or_path": name})
        return model_card(layout, model["config"], [named], name, 3)

    got, plain = card(text), card("plain name")
    assert got.isprintable() or all(c.isprintable() or c == "\n" for c in got)
    assert got.isascii() or text.isascii() is False
    assert len(got.split("\n")) == len(plain.split("\n"))
    outside = re.sub(r"```python\n.*?```", "", got, flags=re.DOTALL)
    outside = "\n".join(line for line in outside.split("\n") if not line.startswith("    "))
    assert "<" not in outside
    assert "](" not in outside.replace("[X-LoRA](https://arxiv.org/abs/2402.07148)", "")
    for row, as_before in zip(got.split("\n"), plain.split("\n"), strict=True):
        if row.startswith("| 0 |"):
            assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) == as_before.count("|")


@pytest.mark.parametrize("text", HOSTILE)
def test_literals_and_words_mean_the_text(text):
    assert eval(_literal(text)) == text
    if "\ud800" in text or shutil.which("bash") is None:
        return
    code = f"printf %s {_shell_word(text)}"
    out = subprocess.run(["bash", "-c", code], capture_output=True, check=True, env={"LC_ALL": "C.UTF-8"})
    assert out.stdout.decode() == text


def test_plain_names_stay_plain():
    assert _as_text("org/name_1.5-b") == "org/name_1.5-b"
