"""``xlora-jax inspect`` for training data: contents of a file, and the tokens that are learned."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

from rich.console import Console
from rich.table import Table
from rich.text import Text

from xlora_jax.training.chats import form_of
from xlora_jax.training.data import Document, encode_records, lay_out
from xlora_jax.training.records import BadRecords, read_records

__all__ = ["escaped", "show_data"]

_FORMS = {"messages": "messages", "conversations": "conversations", "prompt": "prompt and completion", "text": "text"}
_EXAMPLES = 3
# Number of tokens shown of a long stretch in an example, half of them from its end.
_SHOWN = 120
_OPEN, _CLOSE = "⟦", "⟧"


def show_data(console: Console, path: str, base: str | None, length: int) -> bool:
    """Show the contents of a data file, the tokens that are learned, and three examples.

    Args:
        console: console to print on.
        path: data as in ``train``.
        base: directory or hub id of the base model, for its tokenizer.
        length: number of tokens per row.

    Returns:
        Whether ``train`` would accept the data.
    """
    from interop.hf.tokenizer import load_codec

    table = Table(show_header=False, title=Text(path), title_justify="left")
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    table.add_row("what it is", "training data")
    documents: list[Document] = []
    codec = None
    bad = BadRecords(allowed=2**62)
    refused = []
    try:
        if base is None:
            raise ValueError(f"{path} is training data: give --base, for its tokenizer and chat template")
        codec = load_codec(base)
        records = read_records(path, bad)
        unread = bad.count
        documents = encode_records(records, codec, bad)
        forms = Counter(_form(record) for record in records)
        listed = ", ".join(f"{count:,} of {form}" for form, count in forms.most_common())
        table.add_row("records", f"{len(records) + unread:,} ({listed})")
        for topic, fact in _facts(documents, length):
            table.add_row(topic, fact)
    except (ValueError, OSError, ImportError) as error:
        refused.append(str(error))
    if bad.count:
        first = "\n".join(bad.messages)
        table.add_row(Text("bad records"), Text(f"{bad.count:,}, the first of them:\n{first}", style="red"))
    for reason in refused:
        table.add_row(Text("refused"), Text(reason, style="red"))
    console.print(table)
    if codec is not None and codec.decode is not None:
        plain = not console.is_terminal
        marks = f"between {_OPEN} and {_CLOSE}" if plain else "green"
        for number, document in enumerate([d for d in documents if d.learned.any()][:_EXAMPLES], 1):
            console.print(Text(f"\nexample {number}, learned tokens {marks}:", style="bold"))
            console.print(_marked(document, codec.decode, plain=plain), soft_wrap=True)
    return not (refused or bad.count)


def _form(record: object) -> str:
    try:
        return _FORMS[form_of(record, "")]  # type: ignore[arg-type]
    except ValueError:
        return "no known form"


def _facts(documents: Sequence[Document], length: int) -> Iterator[tuple[str, str]]:
    sizes = [len(document.ids) for document in documents]
    tokens, learned = sum(sizes), sum(int(document.learned.sum()) for document in documents)
    yield "documents", f"{len(documents):,}, the longest of {max(sizes, default=0):,} tokens"
    yield "tokens", f"{tokens:,}"
    yield "learned tokens", f"{learned:,} ({learned / max(tokens, 1):.1%})"
    rows = lay_out(documents, length)
    lost = sum(int(document.learned[length:].sum()) for document in documents if not document.divisible)
    fact = (
        f"{len(rows):,} rows, {rows.fill:.1%} full; documents cut off: {rows.cut:,} ({lost:,} learned tokens lost); "
        f"dropped: {rows.dropped:,} (nothing to learn within that length)"
    )
    yield f"at --length {length}", fact


def _marked(document: Document, decode: Callable[[Sequence[int]], str], *, plain: bool) -> Text:
    """Return a document's text, with learned tokens marked by a style or by brackets."""
    text = Text()
    start = 0
    for learned, group in groupby(document.learned.tolist()):
        stretch = document.ids[start : (start := start + len(list(group)))].tolist()
        if len(stretch) > _SHOWN:
            hidden = len(stretch) - _SHOWN
            half = _SHOWN // 2
            shown = f"{escaped(decode(stretch[:half]))} ... {hidden:,} tokens ... {escaped(decode(stretch[-half:]))}"
        else:
            shown = escaped(decode(stretch))
        if learned:
            text.append(f"{_OPEN}{shown}{_CLOSE}" if plain else shown, style="" if plain else "green")
        else:
            text.append(shown, style="" if plain else "dim")
    return text


def escaped(text: str) -> str:
    r"""Return text with control characters, format characters and the marks as escapes: ``\x1b`` or ``\u27e6``.

    A line feed becomes a visible ``\n`` and a line break.
    """
    return "".join(_escape(character) for character in text)


def _escape(character: str) -> str:
    if character == "\n":
        return "\\n\n"
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") or character in (_OPEN, _CLOSE):
        return (
            character.encode("unicode_escape").decode("ascii") if ord(character) < 2**16 else f"\\U{ord(character):08x}"
        )
    return character
