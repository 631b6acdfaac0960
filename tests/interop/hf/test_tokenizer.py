"""Chats as documents, for templates of every style and real tokenizers, against marks on characters."""

from __future__ import annotations

import json
import time
import tracemalloc
from collections import Counter

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from interop.hf.tokenizer import codec_of
from tests.helpers.chat_templates import TEMPLATES, make_tokenizer
from xlora_jax.training.data import encode_record, encode_records
from xlora_jax.training.records import BadRecords, RecordError

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
CALL = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": None}}}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    made = {}

    def get(template, **options):
        key = (template, *sorted(options.items()))
        if key not in made:
            made[key] = make_tokenizer(tmp_path_factory.mktemp("tokenizer"), template, **options)
        return made[key]

    return get


def user(content="q"):
    return {"role": "user", "content": content}


def assistant(content="answer", **more):
    return {"role": "assistant", "content": content, **more}


def as_template_input(messages):
    """What a generating program would hand over: no nulls."""
    return [{name: value for name, value in message.items() if value is not None} for message in messages]


def expected(tokenizer, messages, first=0, **options):
    """Each token to be learned, with all the tokens before it: from transformers alone, by marks on characters."""
    messages = as_template_input(messages)
    found = Counter()
    for number, message in enumerate(messages):
        if message["role"] != "assistant" or number < first:
            continue
        prompt = tokenizer.apply_chat_template(
            messages[:number] or [[]], tokenize=False, add_generation_prompt=True, **options
        )
        prompt = prompt if isinstance(prompt, str) else prompt[0]
        whole = tokenizer.apply_chat_template(messages[: number + 1], tokenize=False, **options)
        assert whole.startswith(prompt)
        marks = [False] * len(prompt) + [True] * (len(whole) - len(prompt))
        encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        ids = encoded["input_ids"]
        for place, (start, end) in enumerate(encoded["offset_mapping"]):
            if any(marks[start:end]):
                found[tuple(ids[: place + 1])] += 1
    return found


def learned(documents):
    found = Counter()
    for document in documents:
        ids = document.ids.tolist()
        for place in document.learned.nonzero()[0]:
            found[tuple(ids[: place + 1])] += 1
    return found


def parts(documents, tokenizer):
    """The learned text of each document."""
    return [tokenizer.decode(document.ids[document.learned]) for document in documents]


# Prompts that a template writes as the beginning of what it writes with the answer: all but R1's.
PLAIN = sorted(set(TEMPLATES) - {"r1"})
TURNS = [
    user("one?"),
    assistant("\n\n\nfirst"),
    user("two?"),
    assistant(" second\n"),
    user("three?"),
    assistant("third"),
]


@pytest.mark.parametrize("byte_level", [True, False])
@pytest.mark.parametrize("template", PLAIN)
def test_every_answer_in_the_context_in_which_it_is_generated(tokenizer, template, byte_level):
    made = tokenizer(template, byte_level=byte_level)
    documents = encode_record({"messages": TURNS}, codec_of(made))
    assert learned(documents) == expected(made, TURNS)
    # One document where one can hold all answers.
    assert len(documents) == {"qwen3": 3, "end_after_last": 3}.get(template, 1)
    assert "first" in parts(documents, made)[0]
    assert "third" in parts(documents, made)[-1]


def test_answers_whose_blank_lines_merge_with_their_prompt(tokenizer):
    """The case that comparing lengths gets wrong: the prompt's last token is not there when the answer follows."""
    made = tokenizer("chatml")
    record = {"messages": [user(), assistant("\n\n\nyes")]}
    (document,) = encode_record(record, codec_of(made))
    prompt = made.apply_chat_template(record["messages"][:1], add_generation_prompt=True)["input_ids"]
    assert document.ids[: len(prompt)].tolist() != prompt
    assert made.decode(document.ids[document.learned]) == "\n\n\n\nyes<|im_end|>\n"
    assert learned([document]) == expected(made, record["messages"])


def test_offsets_that_leave_out_spaces(tokenizer):
    """Post-processors with trim_offsets: the same tokens, learned alike."""
    trimmed, plain = (tokenizer("llama3", trim_offsets=trim) for trim in (True, False))
    for answer in ("    four spaces", "\n\n   the", "the   \n\n", "   "):
        for record in ({"messages": [user(), assistant(answer)]}, {"prompt": "the  ", "completion": answer}):
            one, two = (encode_record(record, codec_of(made)) for made in (trimmed, plain))
            assert [d.ids.tolist() for d in one] == [d.ids.tolist() for d in two]
            assert [d.learned.tolist() for d in one] == [d.learned.tolist() for d in two]


def test_prompt_and_completion_as_text(tokenizer):
    made = tokenizer("chatml")
    for prompt, completion in (("assistant\n", "\n\nyes"), ("", "a"), ("the", " words"), ("日", "本")):
        (document,) = encode_record({"prompt": prompt, "completion": completion}, codec_of(made))
        encoded = made(prompt + completion, add_special_tokens=False, return_offsets_mapping=True)
        assert document.ids.tolist() == [*encoded["input_ids"], made.eos_token_id]
        assert document.learned.tolist() == [end > len(prompt) for _, end in encoded["offset_mapping"]] + [True]


def test_thinking_is_learned_and_not_seen_later(tokenizer):
    made = tokenizer("qwen3")
    messages = [
        *(user("a?"), assistant("A", reasoning_content="think a")),
        *(user("b?"), assistant("<think>\nthink b\n</think>\n\nB")),
        *(user("c?"), assistant(None, reasoning_content="think c")),
    ]
    documents = encode_record({"messages": messages}, codec_of(made))
    assert learned(documents) == expected(made, messages)
    assert parts(documents, made) == [
        "<think>\nthink a\n</think>\n\nA<|im_end|>\n",
        "<think>\nthink b\n</think>\n\nB<|im_end|>\n",
        "<think>\nthink c\n</think>\n\n<|im_end|>\n",
    ]
    assert "think a" not in made.decode(documents[1].ids)


def test_thinking_that_the_prompt_opens_and_the_template_leaves_out(tokenizer):
    made = tokenizer("r1")
    messages = [user("a?"), assistant("<think>\nso\n</think>\n\nA"), user("b?"), assistant("<think>\n\n</think>\n\nB")]
    documents = encode_record({"messages": messages}, codec_of(made))
    for number, document in zip((1, 3), documents, strict=True):
        prompt = made.apply_chat_template(messages[:number], tokenize=False, add_generation_prompt=True)
        assert made.decode(document.ids[~document.learned]) == prompt
    assert parts(documents, made) == ["so\n</think>\n\nA<|im_end|>", "</think>\n\nB<|im_end|>"]
    with pytest.raises(RecordError, match=r"x, line 3: messages\[1\]: .* prompt for this answer ends with '.*<think>"):
        encode_record({"messages": [user(), assistant("no thinking")]}, codec_of(made), "x, line 3")


@pytest.mark.parametrize("template", ["qwen3", "llama3", "mistral"])
def test_tools(tokenizer, template):
    made = tokenizer(template)
    messages = [user(), assistant(None, tool_calls=CALL), {"role": "tool", "content": "3"}, assistant("It is 3.")]
    record = {"messages": messages, "tools": TOOLS}
    documents = encode_record(record, codec_of(made))
    assert learned(documents) == expected(made, messages, tools=TOOLS)
    text = made.decode(documents[-1].ids)
    assert '"parameters":{"type":"object"' in "".join(text.split())
    assert '"a": 1, "b": null' in parts(documents, made)[0]
    assert learned(documents) != learned(encode_record({"messages": messages}, codec_of(made)))
    # The same as tables keep them: JSON in strings.
    texts = {"messages": json.dumps(messages), "tools": json.dumps(TOOLS)}
    assert learned(encode_record(texts, codec_of(made))) == learned(documents)


def test_tool_calls_where_a_template_joins_every_content(tokenizer):
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{{ m.tool_calls or '' }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    made = tokenizer(template)
    given = [user(), assistant(None, tool_calls=CALL), {"role": "tool", "content": "3"}, assistant("It is 3.")]
    filled = [given[0], assistant("", tool_calls=CALL), *given[2:]]
    assert learned(encode_record({"messages": given}, codec_of(made))) == expected(made, filled)


def test_variables_of_the_template(tokenizer):
    made = tokenizer("qwen3")
    record = {"messages": TURNS, "chat_template_kwargs": {"enable_thinking": False}}
    documents = encode_record(record, codec_of(made))
    assert learned(documents) == expected(made, TURNS, enable_thinking=False)
    assert parts(documents, made)[-1] == "third<|im_end|>\n"
    with pytest.warns(UserWarning, match=r"does not read enable_thinking \(in 2 records\), tools \(in 1 records\)"):
        encode_records([record, {**record, "tools": TOOLS}], codec_of(tokenizer("chatml")))
    with pytest.warns(UserWarning, match=r"does not read reasoning_content \(in 1 records\)"):
        encode_records([{"messages": [user(), assistant(reasoning_content="x")]}], codec_of(tokenizer("chatml")))
    with pytest.raises(RecordError, match="chat_template_kwargs: expected variables of the template, got tokenize"):
        encode_record({**record, "chat_template_kwargs": {"tokenize": True}}, codec_of(made))


def test_prompt_and_completion_as_messages(tokenizer):
    made = tokenizer("chatml")
    record = {"prompt": TURNS[:5], "completion": TURNS[5:]}
    documents = encode_record(record, codec_of(made))
    assert learned(documents) == expected(made, TURNS, first=5)
    assert parts(documents, made) == ["third<|im_end|>\n"]
    for wrong in ({"prompt": "x", "completion": TURNS[5:]}, {"prompt": TURNS[:5], "completion": "x"}):
        with pytest.raises(RecordError, match=r"(prompt|completion): expected a list of messages, as the other"):
            encode_record(wrong, codec_of(made))


def test_forms_that_mean_the_same(tokenizer):
    codec = codec_of(tokenizer("chatml"))
    plain = learned(encode_record({"messages": [{"role": "system", "content": "s"}, *TURNS]}, codec))
    shared = [{"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]} for m in TURNS]
    in_parts = [
        {**m, "content": [{"type": "text", "text": part} for part in (m["content"][:2], m["content"][2:])]}
        for m in TURNS
    ]
    system = {"role": "system", "content": "s", "tool_calls": None, "name": None}
    for record in (
        {"messages": json.dumps([system, *TURNS])},
        {"messages": [system, *in_parts]},
        {"conversations": shared, "system": "s"},
        {"conversations": [{"from": "system", "value": "s"}, *shared]},
        {"messages": [{"from": "system", "value": "s"}, *shared]},
        {"messages": None, "conversations": [system, *TURNS], "text": "not this"},
        {"prompt": "not this", "messages": [system, *TURNS]},
    ):
        assert learned(encode_record(record, codec)) == plain
    text = encode_record({"text": "x"}, codec)
    assert learned(encode_record({"messages": None, "text": "x", "tools": None}, codec)) == learned(text)


def test_templates_that_read_parts_only(tokenizer):
    """They write nothing of content that is text, which would be learned as empty answers."""
    template = TEMPLATES["chatml"].replace(
        "m['content']", "(m['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join)"
    )
    made = tokenizer(template)
    in_parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in TURNS]
    reference = expected(made, in_parts)
    for messages in (TURNS, in_parts):
        assert learned(encode_record({"messages": messages}, codec_of(made))) == reference
    columns = {name: [message[name] for message in TURNS] for name in ("role", "content")}
    assert learned(encode_record({"messages": columns}, codec_of(made))) == reference


def test_templates_that_mark_what_a_model_generates(tokenizer):
    template = TEMPLATES["chatml"].replace("m['content']", "m['content']").replace(
        "{% for m in messages %}", "{% for m in messages %}{% generation %}"
    ).replace("{% endfor %}", "{% endgeneration %}{% endfor %}")  # fmt: skip
    marked, plain = tokenizer(template), tokenizer("chatml")
    documents = encode_record({"messages": TURNS}, codec_of(marked))
    assert learned(documents) == learned(encode_record({"messages": TURNS}, codec_of(plain)))


def test_a_tokenizer_that_does_not_tell_its_characters():
    from transformers import ByT5Tokenizer

    made = ByT5Tokenizer(chat_template=TEMPLATES["chatml"])
    assert not made.is_fast
    documents = encode_record({"messages": TURNS}, codec_of(made))
    assert [made.decode(d.ids[d.learned]) for d in documents] == [
        "".join(f"{message['content']}<|im_end|>\n" for message in TURNS[1::2])
    ]

    class Merging(ByT5Tokenizer):
        """Two letters together are another token than one by one."""

        def _tokenize(self, text):
            return super()._tokenize(text.replace("ab", "!"))

    codec = codec_of(Merging())
    (document,) = encode_record({"prompt": "a", "completion": "c"}, codec)
    assert document.learned.tolist() == [False, True, True]
    with pytest.raises(RecordError, match=r"^e, line 2: tokens merge over .*'b', .*\(Merging\).* use its fast version"):
        encode_record({"prompt": "a", "completion": "b"}, codec, "e, line 2")


def test_templates_whose_answers_cannot_be_told_from_their_prompts(tokenizer):
    """No generation prompt, and the end of a chat is written otherwise than its middle."""
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token if loop.last else '|' }}{% endfor %}"
    with pytest.raises(RecordError, match=r"^f, line 3: messages\[1\]: .*writes no generation prompt"):
        encode_record({"messages": TURNS}, codec_of(tokenizer(template)), "f, line 3")
    # Without one, but with a middle as the end is, the answer's own header is learned too.
    made = tokenizer("{% for m in messages %}{{ m.role }}: {{ m.content }}|{% endfor %}")
    documents = encode_record({"messages": TURNS}, codec_of(made))
    assert learned(documents) == expected(made, TURNS)


def test_messages_without_weight_are_context(tokenizer):
    made = tokenizer("chatml")
    messages = [user(), assistant("wrong", weight=0), user(), assistant("right", weight=1)]
    documents = encode_record({"messages": messages}, codec_of(made))
    assert parts(documents, made) == ["right<|im_end|>\n"]
    assert "wrong" in made.decode(documents[0].ids)


def test_an_assistant_who_speaks_first(tokenizer):
    messages = [assistant("Hello!"), user(), assistant("Yes.")]
    for template in ("chatml", "llama3", "end_after_last"):
        made = tokenizer(template)
        assert learned(encode_record({"messages": messages}, codec_of(made))) == expected(made, messages)
    # These fail on an empty chat, but show elsewhere how their answers begin.
    made = tokenizer("qwen3")
    documents = encode_record({"messages": messages}, codec_of(made))
    assert parts(documents, made) == ["Hello!<|im_end|>\n<think>\n\n</think>\n\nYes.<|im_end|>\n"]
    made = tokenizer("qwen2")
    (document,) = encode_record({"messages": messages}, codec_of(made))
    assert made.decode(document.ids) == made.apply_chat_template(messages, tokenize=False)
    assert parts([document], made) == ["Hello!<|im_end|>\nYes.<|im_end|>\n"]


def test_two_users_in_a_row(tokenizer):
    messages = [user("a"), user("b"), assistant("c"), assistant("d")]
    for template in ("chatml", "llama3", "mistral", "end_after_last"):
        made = tokenizer(template)
        assert learned(encode_record({"messages": messages}, codec_of(made))) == expected(made, messages)
    # Here the prompt of the last answer shows the one before it otherwise than the whole chat does.
    made = tokenizer("qwen3")
    documents = encode_record({"messages": messages}, codec_of(made))
    prompt = made.apply_chat_template(messages[:3], tokenize=False, add_generation_prompt=True)
    assert made.decode(documents[-1].ids) == prompt + "<think>\n\n</think>\n\nd<|im_end|>\n"
    assert parts(documents, made)[-1].endswith("\n\nc<|im_end|>\n<think>\n\n</think>\n\nd<|im_end|>\n")


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        ("gemma", [{"role": "system", "content": "s"}, *TURNS], r"messages\[2\]: .*System role not supported"),
        ("gemma", [user(), user(), assistant()], r"messages\[2\]: .*must alternate"),
        ("gemma", [assistant(), user()], r"messages\[0\]: .*must alternate"),
        ("llama3", [user(), assistant(None, tool_calls=CALL * 2)], r"messages\[1\]: .*one tool call at a time"),
        (
            "chatml",
            [user(), assistant(None, tool_calls=CALL)],
            r"messages\[1\]\.tool_calls: the chat template does not",
        ),
        (
            "chatml",
            [user(), assistant(None, thinking="x")],
            r"messages\[1\]\.thinking: the chat template does not write",
        ),
        ("chatml", [user(None), assistant()], r"messages\[0\]\.content: expected text, got null"),
        ("chatml", [user(), {"role": "assistant"}], r"messages\[1\]\.content: expected text, got nothing"),
        ("chatml", [user(), {"content": "x"}], r"messages\[1\]\.role: expected system, user, .*got null"),
        ("chatml", [user(), {"role": 3, "content": "x"}], r"messages\[1\]\.role: .*got '3' \(int\)"),
        ("chatml", [user(), assistant(5)], r"messages\[1\]\.content: expected text or .*got '5' \(int\)"),
        ("chatml", [user(), assistant({"a": 1})], r"messages\[1\]\.content: expected text or .*an object with 'a'"),
        ("chatml", [user(), assistant([])], r"messages\[1\]\.content: .*an empty list"),
        (
            "chatml",
            [user([{"type": "image"}]), assistant()],
            r"messages\[0\]\.content\[0\]: expected .*\"type\": \"text\"",
        ),
        ("chatml", [user(), assistant("\ud800")], r"messages\[1\]\.content: .*half of a surrogate pair"),
        ("chatml", [user(), assistant(tool_calls=5)], r"messages\[1\]\.tool_calls: expected a list of objects"),
        ("chatml", [user(), "hi"], r"messages\[1\]: expected an object with role and content, got 'hi'"),
        ("chatml", [{"from": "narrator", "value": "x"}], r"messages\[0\]\.from: expected one of human"),
        ("chatml", [{"from": "human"}], r"messages\[0\]\.value: expected text, got nothing"),
        ("chatml", "hi", r"messages: expected a list or object, also as JSON in a string; got 'hi'"),
        ("chatml", "[" * 100_000, r"messages: .*nested too deeply"),
        ("chatml", "3", r"messages: expected a list of at least one message, got '3' \(int\)"),
        ("chatml", [], "messages: expected a list of at least one message, got an empty list"),
        ("chatml", {}, "messages: expected a list of at least one message, got an empty object"),
        ("chatml", [user(), assistant(x=float("nan"))], r"messages\[1\]\.x: expected a finite number, got nan"),
        ("chatml", [user(), assistant(x=10**5000)], r"messages\[1\]\.x: expected a number of usual size"),
        ("chatml", [user(), assistant(x=b"")], r"messages\[1\]\.x: expected values that JSON has, got bytes"),
        ("{% if %}", TURNS, r"messages\[1\]: .*TemplateSyntaxError"),
        ("{{ messages[9].content.x }}", TURNS, r"messages\[1\]: .*UndefinedError"),
        ("{{ 1 // 0 }}", TURNS, r"messages\[1\]: .*ZeroDivisionError"),
    ],
)
def test_chats_that_cannot_be_learned(tokenizer, template, messages, reason):
    with pytest.raises(RecordError, match=r"^a\.jsonl, line 7: " + reason):
        encode_record({"messages": messages}, codec_of(tokenizer(template)), "a.jsonl, line 7")


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"text": 5}, r"text: expected text, got '5' \(int\)"),
        ({"text": []}, "text: expected text, got an empty list"),
        ({"text": "a\udc00"}, r"text: expected Unicode text, .* as character 1"),
        ({"prompt": 1, "completion": "x"}, r"prompt: expected a list of at least one message, got '1' \(int\)"),
        ({"prompt": "x", "completion": True}, "prompt: expected a list of messages, as the other"),
        ({"prompt": "x", "completion": "\ud83d"}, "completion: expected Unicode text"),
        ({"prompt": "x"}, "expected messages, or prompt and completion, or text; got prompt"),
        ({"text": None}, "got no field with a value"),
        ({}, "got no field with a value"),
        ("hi", r"expected an object, got 'hi' \(text\)"),
        ({"messages": TURNS, "tools": "{"}, "tools: expected a list or object"),
        ({"messages": TURNS, "tools": [3]}, "tools: expected a list of JSON schemas"),
        ({"messages": TURNS, "tools": {"a": 1}}, "tools: expected a list of JSON schemas, got an object with 'a'"),
        ({"messages": TURNS, "chat_template_kwargs": [1]}, "chat_template_kwargs: expected an object, got a list"),
        ({"messages": nested(5000)}, "nested too deeply|expected an object"),
        (
            {"messages": TURNS, "tools": nested(5000)},
            "tools: expected a value of usual depth, got one that is nested too",
        ),
    ],
)
def test_records_that_cannot_be_learned(tokenizer, record, reason):
    with pytest.raises(RecordError, match=rf"^b\.json, index 2: .*({reason})"):
        encode_record(record, codec_of(tokenizer("qwen3")), "b.json, index 2")


def test_bad_records_are_counted_up_to_a_limit(tokenizer):
    codec = codec_of(tokenizer("chatml"))
    records = [{"text": "a"}, {"text": 1}, {"messages": [user(), assistant()]}, {"body": "b"}, {"text": "c"}]
    bad = BadRecords(2)
    assert len(encode_records(records, codec, bad)) == 3
    with pytest.warns(UserWarning, match=r"^2 bad records were left out: record 1: text: .*; record 3: expected mess"):
        bad.warn()
    with pytest.raises(RecordError, match=r"^record 3: .*\(before it 1 bad records were left out"):
        encode_records(records, codec, BadRecords(1))
    with pytest.raises(RecordError, match=r"^record 1: "):
        encode_records(records, codec)
    with pytest.raises(ValueError, match="--skip-bad-records: expected 0 or more, got -1"):
        BadRecords(-1)
    many = BadRecords(100)
    encode_records([{"text": n} for n in range(30)], codec, many)
    with pytest.warns(UserWarning, match=r"^30 bad records were left out: record 0: .*record 4: .*; and 25 more$"):
        many.warn()


ENDLESS = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
EXPLODING = (
    "{% set n = namespace(s='x' * 1000) %}{% for a in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}"
)


@pytest.mark.parametrize(
    ("template", "seconds", "reason"),
    [
        (ENDLESS, 2, "does not come to an end within 2 s"),
        ("{{ 9 ** (9 ** 9) }}", 2, "does not come to an end within 2 s"),
        (EXPLODING, 60, "memory|process that renders"),
        ("{{ 'x' * 10 ** 12 }}", 60, "memory|process that renders"),
        ("{{ messages[1].role * (2 * 10 ** 6) }}", 60, "it writes 18,000,000 characters"),
    ],
)
def test_templates_without_end_or_measure(tokenizer, template, seconds, reason):
    codec = codec_of(tokenizer(template), template_seconds=seconds)
    tracemalloc.start()
    begun = time.monotonic()
    with pytest.raises(
        RecordError, match=rf"c\.jsonl, line 1: messages\[1\]: .*({reason}).*\(chat template of .*tokenizer"
    ):
        encode_record({"messages": TURNS}, codec, "c.jsonl, line 1")
    assert time.monotonic() - begun < 60
    assert tracemalloc.get_traced_memory()[1] < 2**29
    tracemalloc.stop()
    # And the next template is rendered.
    assert len(encode_record({"messages": TURNS}, codec_of(tokenizer("chatml")))) == 1


# Any text that a tokenizer takes, often with blanks at its ends, where tokens merge.
TEXTS = st.builds(
    "{}{}{}".format,
    st.sampled_from(["", " ", "\n", "\n\n\n", "  \n "]),
    st.one_of(st.sampled_from(["the", "yes", "answer"]), st.text(st.characters(exclude_categories=["Cs"]), max_size=8)),
    st.sampled_from(["", " ", "\n\n", "   "]),
)


@st.composite
def chats(draw):
    messages = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(TEXTS)})
    for _ in range(draw(st.integers(1, 3))):
        messages.append(user(draw(TEXTS)))
        if draw(st.booleans()):
            call = {"type": "function", "function": {"name": "add", "arguments": {"a": draw(st.integers())}}}
            content = draw(st.one_of(st.none(), st.just(""), TEXTS))
            messages += [assistant(content, tool_calls=[call]), {"role": "tool", "content": draw(TEXTS)}]
        content = draw(TEXTS)
        # Thinking alone, with a template that does not write any, is an error.
        thoughts = draw(st.one_of(st.none(), TEXTS)) if content else None
        messages.append(assistant(content, reasoning_content=thoughts, name=None))
    return messages


@pytest.mark.parametrize("template", ["llama3", "qwen3", "mistral"])
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(messages=chats(), tools=st.sampled_from([None, TOOLS]))
def test_any_chat_with_tools(tokenizer, template, messages, tools):
    made = tokenizer(template)
    documents = encode_record({"messages": messages, "tools": tools}, codec_of(made))
    assert learned(documents) == expected(made, messages, tools=tools)


@pytest.mark.parametrize("template", ["chatml", "qwen2", "gemma", "end_after_last"])
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(messages=chats())
def test_any_chat_without_tools(tokenizer, template, messages):
    made = tokenizer(template)
    messages = [m for m in messages if m["role"] != "tool" and not m.get("tool_calls")]
    assume(template != "gemma" or messages[0]["role"] != "system")
    documents = encode_record({"messages": messages}, codec_of(made))
    assert learned(documents) == expected(made, messages)
    if template in ("chatml", "qwen2", "gemma"):
        assert len(documents) == 1


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(st.characters(), max_size=4)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["role", "content", "tool_calls", "from", "value", "type", "text"]), inner),
        st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": inner}),
    ),
    max_leaves=8,
)
FIELDS = ["messages", "conversations", "prompt", "completion", "text", "tools", "chat_template_kwargs", "system"]


@pytest.mark.parametrize("template", ["qwen3", "gemma"])
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(record=st.one_of(JSON, st.dictionaries(st.sampled_from(FIELDS), JSON)))
def test_any_record_is_learned_or_an_error_that_names_its_place(tokenizer, template, record):
    try:
        documents = encode_record(record, codec_of(tokenizer(template)), "d.jsonl, line 5")
    except RecordError as error:
        assert str(error).startswith("d.jsonl, line 5: ")
        assert len(str(error)) < 2000
    else:
        assert all(document.ids.shape == document.learned.shape for document in documents)
