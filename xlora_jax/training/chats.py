"""Convert records to texts with marked answers: render the chat template and find where each answer begins.

A template may write a message differently once others follow it. For example, it drops the thinking, adds an end token
after the last message only, or names tools before the last question. So each answer has its own text: the prompt that
the model sees when it generates this answer, followed by the answer as the template writes it there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from xlora_jax.training.records import Record, RecordError

__all__ = [
    "REASONING",
    "Answer",
    "Chat",
    "Prefix",
    "Render",
    "TemplateError",
    "TemplateLimitError",
    "answers_of",
    "chat_of",
    "form_of",
    "text_of",
]

Message = Mapping[str, Any]
Prefix = tuple[int, bool]

# Arguments of apply_chat_template that are not variables of the template.
_RESERVED = frozenset(
    (
        *("add_generation_prompt", "chat_template", "continue_final_message", "conversation", "conversations"),
        *("max_length", "messages", "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors"),
        *("sanitize_control_tokens", "tokenize", "tokenizer_kwargs", "tools", "truncation"),
    )
)
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys of a message's thinking. A template reads one of them."""
# Markers that occur in no message. They show where a template puts the content.
_MARK, _ASKED = "Qx7answer7xQ", "Qx7question7xQ"


class TemplateError(ValueError):
    """A chat template that cannot write these messages, or that does not terminate."""


class TemplateLimitError(TemplateError):
    """A chat template that took too much time or memory, so it is not tried again."""


@dataclass(frozen=True)
class Chat:
    """A conversation.

    Attributes:
        messages: mappings, each with ``role`` and the other keys that the template reads.
        tools: JSON schemas of the tools; None for no tools.
        options: mapping of further template variables to values.
        learned: indices of the messages that are to be learned.
        names: place of each message in its record, for errors.
    """

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    learned: Sequence[int] = ()
    names: Sequence[str] = ()


Render = Callable[[Chat, Sequence[Prefix]], Sequence["str | TemplateError"]]
"""``(chat, [(n, answer_follows), ...]) -> texts``: the template's text of the first ``n`` messages. With
``answer_follows`` the text ends where the assistant's next answer begins. If a text cannot be written, the list
has the error in its place.
"""


@dataclass(frozen=True)
class Answer:
    """An answer in its context.

    Attributes:
        text: string of prompt and answer.
        start: index of the answer's first character.
    """

    text: str
    start: int


def form_of(record: Record, place: str) -> str:
    """Return the form of a record: ``messages``, ``conversations``, ``prompt`` or ``text``.

    Fields that are null count as absent. If a record has several forms, the first in this order counts.

    Raises:
        RecordError: the record has none of the forms.
    """
    if not isinstance(record, Mapping):
        raise RecordError(f"{place}: expected an object, got {_shown(record)}")
    there = [str(name) for name, value in record.items() if value is not None]
    for form in ("messages", "conversations"):
        if form in there:
            return form
    if "prompt" in there and "completion" in there:
        return "prompt"
    if "text" in there:
        return "text"
    listed = ", ".join(there) or "no field with a value"
    raise RecordError(f"{place}: expected messages, or prompt and completion, or text; got {listed}")


def text_of(record: Record, name: str, place: str) -> str:
    """Return the text of a field.

    Raises:
        RecordError: the field is not text, or contains half of a surrogate pair.
    """
    value = record[name]
    if not isinstance(value, str):
        raise RecordError(f"{place}: {name}: expected text, got {_shown(value)}")
    _check(value, f"{place}: {name}")
    return value


def chat_of(record: Record, form: str, place: str) -> Chat:
    """Return a record's conversation.

    Args:
        record: mapping of field names to values.
        form: ``messages``, ``conversations`` or ``prompt`` (then ``prompt`` and ``completion`` are lists of messages).
        place: location of the record, for errors.

    Raises:
        RecordError: a field has an unclear meaning.
    """
    tools = _parsed(record.get("tools"), f"{place}: tools")
    if tools is not None:
        _check(tools, f"{place}: tools")
        if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
            raise RecordError(f"{place}: tools: expected a list of JSON schemas, got {_shown(tools)}")
    options = _parsed(record.get("chat_template_kwargs"), f"{place}: chat_template_kwargs")
    if options is not None:
        _check(options, f"{place}: chat_template_kwargs")
        if not isinstance(options, Mapping):
            raise RecordError(f"{place}: chat_template_kwargs: expected an object, got {_shown(options)}")
        if reserved := _RESERVED & set(options):
            raise RecordError(
                f"{place}: chat_template_kwargs: expected variables of the template, got {', '.join(sorted(reserved))}"
            )
    messages: list[Message] = []
    names: list[str] = []
    for part in ("prompt", "completion") if form == "prompt" else (form,):
        found = _messages(record[part], part, place)
        if part == "conversations" and isinstance(record.get("system"), str) and found[0]["role"] != "system":
            messages.append({"role": "system", "content": text_of(record, "system", place)})
            names.append("system")
        messages += found
        names += [f"{part}[{number}]" for number in range(len(found))]
    learned = [
        number
        for number, (message, name) in enumerate(zip(messages, names, strict=True))
        if message["role"] == "assistant" and not name.startswith("prompt") and message.get("weight") != 0
    ]
    return Chat(messages, tools or None, options or {}, learned, names)


def _parsed(value: Any, where: str) -> Any:
    """Parse a value that may be JSON in a string."""
    if not isinstance(value, str):
        return list(value) if isinstance(value, tuple) else value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        reason = "JSON that is nested too deeply" if isinstance(error, RecursionError) else f"{value[:40]!r} ({error})"
        raise RecordError(f"{where}: expected a list or object, also as JSON in a string; got {reason}") from error


def _messages(value: Any, name: str, place: str) -> list[Message]:
    where = f"{place}: {name}"
    if isinstance(value, str) and name in ("prompt", "completion"):
        raise RecordError(
            f"{where}: expected a list of messages, as the other of prompt and completion is one; got text"
        )
    value = _parsed(value, where)
    columns = list(value.values()) if isinstance(value, Mapping) else []
    if columns and all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
        # HF datasets may store a sequence of objects as one list for each name.
        value = [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
    if not isinstance(value, list) or not value:
        raise RecordError(f"{where}: expected a list of at least one message, got {_shown(value)}")
    return [_message(message, f"{where}[{number}]") for number, message in enumerate(value)]


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, Mapping):
        raise RecordError(f"{where}: expected an object with role and content, got {_shown(value)}")
    _check(value, where)
    # Arrow gives each message the keys of all others, with null; chat servers write `"tool_calls": null`.
    message = {name: inner for name, inner in value.items() if inner is not None}
    if "role" not in message and "from" in message:
        role = _SHAREGPT_ROLES.get(message["from"]) if isinstance(message["from"], str) else None
        if role is None:
            raise RecordError(
                f"{where}.from: expected one of {', '.join(_SHAREGPT_ROLES)}, got {_shown(message['from'])}"
            )
        if "value" not in message:
            raise RecordError(f"{where}.value: expected text, got nothing")
        if not isinstance(message["value"], str):
            raise RecordError(f"{where}.value: expected text, got {_shown(message['value'])}")
        weight = {"weight": message["weight"]} if "weight" in message else {}
        message = {"role": role, "content": message["value"], **weight}
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise RecordError(f"{where}.role: expected system, user, assistant or tool, got {_shown(role)}")
    if "tool_calls" in message:
        calls = message["tool_calls"] = _parsed(message["tool_calls"], f"{where}.tool_calls")
        if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
            raise RecordError(f"{where}.tool_calls: expected a list of objects, got {_shown(calls)}")
        if not calls:
            del message["tool_calls"]
    if "content" in message:
        message["content"] = _content(message["content"], f"{where}.content")
    elif not (role == "assistant" and ("tool_calls" in message or any(name in message for name in REASONING))):
        raise RecordError(f"{where}.content: expected text, got {'null' if 'content' in value else 'nothing'}")
    return message


def _content(value: Any, where: str) -> str:
    """Return a content that is text, or join the text of its parts."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list | tuple) or not value:
        raise RecordError(f"{where}: expected text or a list of text parts, got {_shown(value)}")
    parts = []
    for number, part in enumerate(value):
        if not isinstance(part, Mapping) or part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
            raise RecordError(f'{where}[{number}]: expected {{"type": "text", "text": ...}}, got {_shown(part)}')
        parts.append(part["text"])
    return "".join(parts)


def _check(value: Any, where: str) -> None:
    """Refuse values that a tokenizer, a template or JSON cannot represent."""
    try:
        _check_inside(value, where)
    except RecursionError as error:
        raise RecordError(f"{where}: expected a value of usual depth, got one that is nested too deeply") from error


def _check_inside(value: Any, where: str) -> None:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise RecordError(
                f"{where}: expected Unicode text, got half of a surrogate pair, {value[error.start]!r}, as character "
                f"{error.start}; write characters beyond U+FFFF as UTF-8 or as both halves"
            ) from error
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            if not isinstance(name, str):
                raise RecordError(f"{where}: expected text as names, got {_shown(name)}")
            _check_inside(name, f"{where}: a name")
            _check_inside(inner, f"{where}.{name}")
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            _check_inside(inner, f"{where}[{number}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise RecordError(f"{where}: expected a finite number, got {value}")
    elif not (value is None or isinstance(value, bool | int | float)):
        raise RecordError(f"{where}: expected values that JSON has, got {_shown(value)}")
    elif isinstance(value, int) and value.bit_length() > 1024:
        raise RecordError(f"{where}: expected a number of usual size, got an integer of {value.bit_length()} bits")


def _shown(value: Any) -> str:
    """Return a short description of a value, for errors."""
    if value is None:
        return "null"
    if isinstance(value, bool | int | float | str | list | tuple | Mapping):
        if isinstance(value, int) and value.bit_length() > 1024:
            return f"an integer of {value.bit_length()} bits"
        if isinstance(value, list | tuple | Mapping):
            if not value:
                return f"an empty {'object' if isinstance(value, Mapping) else 'list'}"
            return f"an object with {', '.join(map(repr, list(value)[:5]))}" if isinstance(value, Mapping) else "a list"
        return f"{str(value)[:40]!r} ({'text' if isinstance(value, str) else type(value).__name__})"
    return type(value).__name__


def answers_of(chat: Chat, render: Render, place: str) -> Iterator[Answer]:
    """Yield each answer to be learned, in the context in which the model would generate it.

    Raises:
        RecordError: the template cannot write the messages, or an answer cannot be separated from its prompt.
    """
    wanted = [prefix for number in chat.learned for prefix in ((number, True), (number + 1, False))]
    if not wanted:
        return
    texts = list(render(chat, wanted))
    retry = not isinstance(texts[1], TemplateLimitError)
    failed = sum(isinstance(text, TemplateError) for text in texts)
    if retry and failed and any("content" not in message for message in chat.messages):
        # The simplest templates concatenate the content of every message with other text, even if it has tool calls.
        filled = _changed(chat, {n: "" for n, m in enumerate(chat.messages) if "content" not in m})
        again = list(render(filled, wanted))
        if sum(isinstance(text, TemplateError) for text in again) < failed:
            chat, texts = filled, again
    if retry and not _all_written(chat, texts):
        # Templates of vision models may read lists of parts only, and write nothing if the content is text.
        in_parts = _changed(
            chat, {n: [{"type": "text", "text": m["content"]}] for n, m in enumerate(chat.messages) if m.get("content")}
        )
        again = list(render(in_parts, wanted))
        if _all_written(chat, again):
            chat, texts = in_parts, again
    for number, prompt, whole in zip(chat.learned, texts[::2], texts[1::2], strict=True):
        where = f"{place}: {chat.names[number]}"
        if isinstance(whole, TemplateError):
            raise RecordError(
                f"{where}: the chat template cannot write the messages up to this one: {whole}"
            ) from whole
        if isinstance(prompt, str) and whole.startswith(prompt):
            yield Answer(whole, len(prompt))
        else:
            yield _found(chat, number, prompt, whole, render, where)


def _all_written(chat: Chat, texts: Sequence[str | TemplateError]) -> bool:
    """Return whether every answer's content is in its text."""
    contents = (chat.messages[number].get("content") or "" for number in chat.learned)
    return all(isinstance(w, str) and c.strip() in w for c, w in zip(contents, texts[1::2], strict=True))


def _found(chat: Chat, number: int, prompt: str | TemplateError, whole: str, render: Render, where: str) -> Answer:
    """Find an answer whose prompt is not a prefix of the text that ends with the answer.

    The opening is the template's own text between the messages and an answer. It shows where the answer begins. To find
    the opening, the template is rendered with a marker in place of the answer.
    """
    before = chat.messages[:number]
    marked = render(_changed(chat, {number: _MARK}), [(number + 1, False)])[0]
    opening = _opening(chat, number, prompt, render)
    if opening is None:
        raise RecordError(f"{where}: the chat template cannot write the prompt of this message: {prompt}")
    if isinstance(marked, str) and _MARK in marked:
        mark = marked.index(_MARK)
        at = marked.rfind(opening, 0, mark) if opening else -1
        start = at + len(opening)
        # This has to be the opening of this answer, not of an answer before the last question.
        asked = render(_changed(chat, {number - 1: _ASKED, number: _MARK}), [(number + 1, False)])[0] if before else ""
        if isinstance(asked, str) and 0 <= asked.find(_ASKED) > asked.rfind(opening, 0, max(asked.find(_MARK), 0)):
            at = -1
        if at >= 0 and whole[:start] == marked[:start]:
            context = prompt if isinstance(prompt, str) else whole[:start]
            return Answer(context + whole[start:], len(context))
        if isinstance(prompt, str):
            # The prompt opens the model's thinking, but the template leaves thinking out of the message.
            thinking = prompt[_common(prompt, whole) :].strip()
            content = str(chat.messages[number].get("content", "")).strip()
            if thinking and content.startswith(thinking):
                rest = content[len(thinking) :].lstrip("\n")
                return Answer(prompt + rest + marked[mark + len(_MARK) :], len(prompt))
    if not opening:
        raise RecordError(
            f"{where}: the chat template writes no generation prompt, and it writes the messages before this answer "
            f"differently once the answer follows, so the answer cannot be told from its prompt; use a template that "
            f"reads add_generation_prompt, or prompt and completion as text"
        )
    raise RecordError(
        f"{where}: the chat template's prompt for this answer ends with {opening[-60:]!r}, but the template writes the "
        f"answer without that, so it cannot be told from its prompt; write the answer as the model is to generate it "
        f"(with its thinking), or use prompt and completion as text"
    )


def _opening(chat: Chat, number: int, prompt: str | TemplateError, render: Render) -> str | None:
    """Return the text that a template adds to the messages before an answer; None if it can't write it."""
    if isinstance(prompt, str):
        bare = render(chat, [(number, False)])[0]
        return prompt[_common(bare, prompt) if isinstance(bare, str) else 0 :]
    # Few templates support a chat that the assistant begins. One question shows how answers begin.
    bare, prompt = render(
        Chat([{"role": "user", "content": _ASKED}], chat.tools, chat.options), [(1, False), (1, True)]
    )
    return prompt[_common(bare, prompt) :] if isinstance(bare, str) and isinstance(prompt, str) else None


def _changed(chat: Chat, contents: Mapping[int, Any]) -> Chat:
    """Return a copy of the conversation with the contents of some messages replaced."""
    messages = [
        {**message, "content": contents[number]} if number in contents else message
        for number, message in enumerate(chat.messages)
    ]
    return Chat(messages, chat.tools, chat.options, chat.learned, chat.names)


def _common(first: str, second: str) -> int:
    """Return the length of the longest common prefix."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((number for number, (one, other) in pairs if one != other), min(len(first), len(second)))
