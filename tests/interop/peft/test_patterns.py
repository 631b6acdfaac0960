"""Regular expressions of adapters: they match as Python's do in PEFT, in linear time, or are refused by name."""

import re
import time
import warnings

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from interop import FormatError
from interop.peft.patterns import check_patterns, first_match

PATHS = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.11.mlp.up_proj",
    "model.embed_tokens",
    "lm_head",
    "q_proj",
    "a.b-c.0",
]


def checked(pattern, paths=PATHS):
    check_patterns({pattern: 1}, paths, "adapter 'x'", "rank_pattern")


def as_peft(pattern, path):
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


ATOMS = st.one_of(
    st.sampled_from(
        [
            *(
                "q_proj",
                "layers",
                "a",
                "b",
                "0",
                "_",
                "-",
                ".",
                r"\.",
                r"\d",
                r"\w",
                r"\W",
                r"\D",
                r"\s",
                r"\b",
                "^",
                "$",
            ),
            *("[ab]", "[^a]", "[a-z_]", "[0-9.]", r"[\w.]", r"[^\d]", "[]a]", "[^]a]", r"[\]a]", "[a-]", "[-a]", r"\-"),
            *(
                "(?i:Q_PROJ)",
                "(?i:[A-F])",
                "(?s:.)",
                "(?-i:a)",
                "(?P<x>a)",
                "()",
                "(|a)",
                "(a|)",
                ",",
                "{",
                "}",
                "]",
                " ",
            ),
        ]
    ),
    st.text("ab.01_-", min_size=1, max_size=3),
)
REPEATS = st.sampled_from(
    ["*", "+", "?", "*?", "+?", "??", "{2}", "{1,2}", "{,2}", "{0,3}?", "{2,}", "*+", "{a", "{,2}{2}"]
)
EXPRESSIONS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map("|".join),
        st.tuples(st.sampled_from(["({})", "(?:{})"]), inner, REPEATS).map(lambda p: p[0].format(p[1]) + p[2]),
        st.tuples(ATOMS, REPEATS).map("".join),
    ),
    max_leaves=6,
)
ANY = st.text(r"ab.\|()[]{}*+?^$-_,:!=<>P1dwWbBsSnxZAQEpC i", max_size=10)


@settings(max_examples=1000, deadline=None)
@given(st.one_of(EXPRESSIONS, ANY), st.one_of(st.sampled_from(PATHS), st.text("ab01._-", min_size=1, max_size=10)))
@example("a{,2}", "aa")
@example("[[:alpha:]]", "a")
@example(r"\pL", "a")
@example(r"\Qa.b\E", "a.b")
@example(r"\C", "a")
@example("a++a", "aa")
@example("(?U)a+", "aa")
def test_what_is_matched_is_matched_as_peft_does(pattern, path):
    try:
        checked(pattern, [path])
    except FormatError:
        assume(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of sets in classes, which Python takes literally
        try:
            want = as_peft(pattern, path)
        except re.error:
            assume(False)
    assert (first_match([pattern], path) == pattern) == (want or pattern == path)


@pytest.mark.parametrize(
    "pattern",
    [
        *(
            "q_proj",
            "layers.0.self_attn.q_proj",
            r"model\.layers\.(0|1|11)\..*",
            r".*\.layers\.\d+\.mlp\.(up|down)_proj",
        ),
        *("^model.layers.0.self_attn.q_proj", "(.*up_proj|lm_head)", "[qkv]_proj", r"layers\.[0-9]{1,2}\..*?_proj$"),
        *(re.escape(path) for path in PATHS),
        *("self_attn", "(?i:LM_HEAD)", r"(?:q|k)_proj", "", ".*"),
    ],
)
def test_patterns_that_people_write_are_all_matched(pattern):
    checked(pattern)
    for path in PATHS:
        assert (first_match([pattern], path) == pattern) == (as_peft(pattern, path) or pattern == path)


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        (r"(?!.*lm_head).*", "a lookahead"),
        (r"(?=q)q_proj", "a lookahead"),
        (r"(?<=x)q_proj", "a lookbehind"),
        (r"(?<!x)q_proj", "a lookbehind"),
        (r"(q)\1", "an escape"),
        (r"(?P<n>q)(?P=n)", "a backreference"),
        (r"(?>a+)b", "an atomic group"),
        (r"(a)?(?(1)b|c)", "a condition"),
        (r"(?#no)a", "a comment"),
        (r"(?x:(a+) +)", "a flag"),
        (r"(?i)a", "a flag"),
        (r"a++", "possessive repetition"),
        (r"a{1,2}+", "possessive repetition"),
        (r"[[:alpha:]]", "a class"),
        (r"[a", "a class"),
        (r"\Z", "an escape"),
        (r"\pL", "an escape"),
        (r"\_", "an escape"),
        ("a{", "a brace"),
        ("a" * 10_001, "10001 characters"),
        ("*a", "no regular expression"),
        ("(", "no regular expression"),
        (")", "no regular expression"),
        ("a{2,1}", "no regular expression"),
        ("(?:(?:a{500}){500}){500}", "no regular expression, or too large a one"),
        ("[a-z]{1000}[a-z]{1000}" * 300, "too large a one"),
    ],
)
def test_what_can_not_be_matched_alike_is_refused_by_name(pattern, reason):
    with pytest.raises(FormatError, match="adapter 'x': rank_pattern holds") as caught:
        checked(pattern)
    assert reason in str(caught.value)


@pytest.mark.parametrize("pattern", [r"\w+", "[a-z]+", "(?i:É)"])
def test_classes_beside_letters_that_are_not_ascii(pattern):
    with pytest.raises(FormatError, match="letters that are not ASCII"):
        checked(pattern, ["modèle.q"])
    checked("modèle.q", ["modèle.q"])


HOSTILE = [
    *("(a+)+", r"((\w|\d)*)*", "(a|a)*b", "([a-z]+.)*", "(x?){40}", "(?:a+){9}", r"(a+[\])]?)+", r"(?:(a+) ?)+x"),
    *(
        ".*" * 30 + "x",
        "a?" * 300 + "a" * 300,
        "(.*.*.*)*x",
        "(a|aa|aaa)+$b",
        "(a|b)*a(a|b){18}x",
        "(?:a|b|ab|ba){200}c",
    ),
    *(r"(\.?\w+)*!", "((a*)*)*b", "(?s:(.|.)*)x", "(?i:(a|A)+)b"),
]


@pytest.mark.parametrize("pattern", HOSTILE)
@pytest.mark.parametrize("path", ["a" * 512, "ab" * 256, "a." * 256])
def test_no_pattern_takes_long(pattern, path):
    paths = [path[i:] + "." + path[: i + 1] for i in range(0, 200, 4)]
    started = time.process_time()
    try:
        checked(pattern, paths)
        for path in paths:
            first_match([pattern], path)
    except FormatError:
        pass
    assert time.process_time() - started < 10


def test_a_pattern_for_each_of_very_many_modules():
    paths = [f"model.layers.{i}.self_attn.q_proj" for i in range(1000)]
    patterns = {path: i for i, path in enumerate(paths)}
    check_patterns(patterns, paths, "x", "rank_pattern")
    assert first_match(patterns, paths[0]) == paths[0]
    with pytest.raises(
        FormatError, match="rank_pattern has 10000 entries for 1000 stored modules; matching them would"
    ):
        check_patterns({f"m{i}": 1 for i in range(10_000)}, paths, "x", "rank_pattern")
