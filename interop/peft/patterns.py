r"""Regular expressions from an adapter's config, matched in linear time by RE2.

PEFT matches the keys of `rank_pattern` and `alpha_pattern` with `re.match(rf"(.*\.)?({pattern})$", path)`, whose
backtracking can take forever. RE2 gives the same answer wherever both engines read a pattern alike. The grammar here
allows only such patterns: literals, `.`, `|`, `^`, `$`, groups, classes, repetition (greedy or lazy), `\d \w \s \b` and
their opposites, and the flags i, m and s of a group. Constructs that RE2 lacks (lookaround, backreferences, atomic
groups, conditions) or reads differently (possessive repetition, verbose mode) are refused by name.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

import re2

from interop.storage.errors import FormatError, brief

__all__ = ["check_patterns", "first_match"]

_MAX_PATTERN = 10_000
# A match takes about 3 us, and compiling a pattern about 30 us.
_MAX_MATCHES = 3_000_000
# A pattern with repetition can take up to 50 ns for each of its instructions and each character of a path, but hardly
# ever does. So such matches are timed. The memory limit of a pattern's program bounds a single match.
_MAX_SECONDS = 5.0
_MAX_PROGRAM_BYTES = 2**20

_TOKEN = re.compile(
    r"""
      (?P<literal>      [^\\.^$|()\[\]{}*+?] )
    | (?P<escape>       \\[dDwWsSbB] | \\[ -/:-@\[-^`{-~] | \\[nrtfv] )
    | (?P<single>       [.] )
    | (?P<anchor>       [\^$] )
    | (?P<choice>       \| )
    | (?P<open>         \( (?: \?: | \?P<[A-Za-z_]\w*> | \?[ims]*(?:-[ims]+)?: )? (?!\?) )
    | (?P<close>        \) )
    | (?P<class>        \[ \^? \]? (?: \\[dDwWsS] | \\[ -/:-@\[-^`{-~] | \\[nrtfv] | [^\\\[\]] )* \] )
    | (?P<repeat>       [*+?] \?? | \{ [0-9]{1,4} (?: , (?:[0-9]{1,4})? )? \} \?? )
    | (?P<until>        \{ , [0-9]{1,4} \} \?? )
    """,
    re.VERBOSE | re.ASCII | re.DOTALL,
)

_REFUSED = {
    "(?=": "a lookahead",
    "(?!": "a lookahead",
    "(?<=": "a lookbehind",
    "(?<!": "a lookbehind",
    "(?>": "an atomic group",
    "(?P=": "a backreference",
    "(?(": "a condition",
    "(?#": "a comment",
    "(?": "a flag of the whole pattern, or one other than i, m and s",
    "[": "a class that never ends, is empty, or has another '[' in it (write \\[)",
    "{": "a brace that is no repetition (write \\{)",
    "}": "a brace that is no repetition (write \\})",
    "]": "a bracket that closes nothing (write \\])",
    "\\": "an escape that is none of \\d \\w \\s \\b, their opposites, or a punctuation mark",
}


def first_match(patterns: Iterable[str], path: str) -> str:
    """Return the first pattern that matches the path, or its end after a dot; else the path. As in PEFT 0.21."""
    return next((pattern for pattern in patterns if _compiled(pattern).match(path)), path)


def check_patterns(patterns: Mapping[str, Any], paths: Iterable[str], where: str, name: str) -> None:
    """Check that patterns can be matched as in PEFT, in bounded time.

    Args:
        patterns: value of the field, by pattern.
        paths: module paths that the patterns will be matched against.
        where: name of the adapter, for messages.
        name: name of the field, for messages.

    Raises:
        FormatError: a pattern is not a regular expression or can't be matched as in PEFT, or the patterns are so many
            or so large that matching would take too long. The message names field and pattern.
    """
    paths = list(paths)
    ascii_only = all(path.isascii() for path in paths)
    too_long = (
        f"{where}: {name} has {len(patterns)} entries for {len(paths)} stored modules; matching them would take too "
        f"long. Remove entries that match no stored module, or shorten those that repeat."
    )
    if len(paths) * len(patterns) > _MAX_MATCHES:
        raise FormatError(too_long)
    started = time.process_time()
    for pattern in patterns:
        reason = _reason_to_refuse(pattern)
        if reason is None and not (ascii_only and pattern.isascii()) and re.search(r"[\\\[]|\(\?", pattern):
            reason = "a class, an escape or a flag beside letters that are not ASCII"
        if reason is not None:
            raise FormatError(
                f"{where}: {name} holds {brief(pattern)}, which has {reason}: it can't be matched as PEFT does in "
                f"bounded time. Write it with literals, '.*', '|', groups and classes, or list the modules by name."
            )
        try:
            compiled = _compiled(pattern)
        except re2.error as error:
            raise FormatError(
                f"{where}: {name} holds {brief(pattern)}: no regular expression, or too large a one ({error})."
            ) from error
        for path in paths if _repeats(pattern) else ():
            compiled.match(path)
            if time.process_time() - started > _MAX_SECONDS:
                raise FormatError(too_long)


def _tokens(pattern: str) -> list[tuple[str, str]]:
    """Return kind and text of each token; raise ValueError with the reason at the first invalid token."""
    if len(pattern) > _MAX_PATTERN:
        raise ValueError(f"{len(pattern)} characters (at most {_MAX_PATTERN} are allowed)")
    tokens: list[tuple[str, str]] = []
    position = 0
    while position < len(pattern):
        match = _TOKEN.match(pattern, position)
        kind = None if match is None else match.lastgroup
        if match is None or kind is None:
            rest = pattern[position:]
            raise ValueError(next((why for start, why in _REFUSED.items() if rest.startswith(start)), "a syntax error"))
        if kind in ("repeat", "until"):
            before = tokens[-1][0] if tokens else "choice"
            if before in ("repeat", "until"):
                raise ValueError("possessive repetition, or a repetition of a repetition")
            if before in ("choice", "open", "anchor"):
                raise ValueError("a repetition of nothing: no regular expression")
        if kind == "open" and match[0].startswith("(?P") and (kind, match[0]) in tokens:
            raise ValueError("two groups of one name: no regular expression")
        tokens.append((kind, match[0]))
        position = match.end()
    return tokens


def _reason_to_refuse(pattern: str) -> str | None:
    try:
        _tokens(pattern)
    except ValueError as error:
        return str(error)
    return None


def _repeats(pattern: str) -> bool:
    return any(kind in ("repeat", "until") for kind, _ in _tokens(pattern))


@lru_cache(2**15)
def _compiled(pattern: str) -> Any:
    # RE2 reads `{,3}` as text, Python as a repetition.
    translated = "".join(text.replace("{,", "{0,") if kind == "until" else text for kind, text in _tokens(pattern))
    options = re2.Options()
    options.log_errors = False
    options.max_mem = _MAX_PROGRAM_BYTES
    compile_: Callable[..., Any] = re2.compile
    return compile_(rf"(?:.*\.)?(?:{translated})$", options)
