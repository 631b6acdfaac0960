"""Rendering of chat templates as in transformers, but with limits of time and memory."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xlora_jax.training.chats import Chat, Prefix, TemplateError, TemplateLimitError

__all__ = ["TIME_LIMIT", "renderer_of"]

TIME_LIMIT = 10.0
"""Seconds that a template may take for one record."""

# Number of texts per chat that the time limit is meant for; a chat with more texts gets more time.
_USUAL = 50

# Seconds for the worker process to import its libraries, on a slow disk.
_START_LIMIT = 300.0


class _Worker:
    """The worker process (:mod:`interop.hf.template_worker`). It is started when needed, and again after it ends."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def ask(self, request: Mapping[str, Any], limit: float) -> dict[str, Any]:
        """Send a request and return the answer.

        Raises:
            TemplateLimitError: there is no answer within ``limit`` seconds, or the process ended.
        """
        with self._lock:
            process = self._process or self._start()
            line = json.dumps(request).encode() + b"\n"
            answer = self._exchange(process, line, limit)
            if answer is None:
                raise TemplateLimitError(f"it does not come to an end within {limit:g} s")
            if not answer:
                raise TemplateLimitError("it ends the process that renders it; it may need too much memory")
            return dict(json.loads(answer))

    def _start(self) -> subprocess.Popen[bytes]:
        script = Path(__file__).with_name("template_worker.py")
        # -P keeps the script's folder out of the import path. PYTHONPATH passes on the paths of this process.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        process = subprocess.Popen(
            [sys.executable, "-P", str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        self._process = process
        if not self._exchange(process, b"", _START_LIMIT):
            raise OSError(f"the process that renders chat templates did not start: {sys.executable} -P {script}")
        return process

    def _exchange(self, process: subprocess.Popen[bytes], line: bytes, limit: float) -> bytes | None:
        """Write a line and read one; return None if that took too long, and an empty line if the process ended."""
        late = threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        assert process.stdin is not None
        assert process.stdout is not None
        timer = threading.Timer(limit, end)
        timer.daemon = True
        timer.start()
        try:
            process.stdin.write(line)
            process.stdin.flush()
            answer = process.stdout.readline()
        except OSError:
            answer = b""
        except BaseException:  # an interrupt; the late answer must not be read as the next one
            self.close()
            raise
        finally:
            timer.cancel()
        if answer:
            return answer
        self.close()
        return None if late.is_set() else b""

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except OSError:
                continue


_WORKER = _Worker()
atexit.register(_WORKER.close)


def renderer_of(tokenizer: Any, limit: float = TIME_LIMIT) -> Any:
    """Return the chat template of a transformers tokenizer as a :data:`xlora_jax.training.chats.Render`.

    The texts are those of ``apply_chat_template(tokenize=False)``, with an empty chat allowed and nulls left out.

    Args:
        tokenizer: transformers tokenizer with a chat template.
        limit: time limit, in seconds, for the texts of one chat of usual length.
    """
    from transformers import PreTrainedTokenizerBase

    if type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
        return _direct(tokenizer)
    name = getattr(tokenizer, "name_or_path", "") or "the tokenizer"

    def render(chat: Chat, prefixes: Sequence[Prefix]) -> list[str | TemplateError]:
        try:
            template = tokenizer.get_chat_template(tools=chat.tools)
        except ValueError as error:
            return [TemplateError(f"{name}: {error}")] * len(prefixes)
        request = {
            "template": template,
            "variables": {**tokenizer.special_tokens_map, **chat.options},
            "messages": list(chat.messages),
            "tools": chat.tools,
            "prefixes": list(prefixes),
        }
        try:
            texts = _WORKER.ask(request, limit * (1 + len(prefixes) // _USUAL))["texts"]
        except TemplateLimitError as error:
            return [TemplateLimitError(f"{error} (chat template of {name})")] * len(prefixes)
        return [
            TemplateError(f"{reason} (chat template of {name})") if text is None else text for text, reason in texts
        ]

    return render


def _direct(tokenizer: Any) -> Any:
    """Return a renderer in this process, for a tokenizer with its own method: library code, not a template."""

    def render(chat: Chat, prefixes: Sequence[Prefix]) -> list[str | TemplateError]:
        texts: list[str | TemplateError] = []
        for count, answer_follows in prefixes:
            try:
                texts.append(
                    tokenizer.apply_chat_template(
                        [dict(message) for message in chat.messages[:count]],
                        tools=chat.tools,
                        tokenize=False,
                        add_generation_prompt=answer_follows,
                        **chat.options,
                    )
                )
            except Exception as error:  # errors of any kind, as for a template
                texts.append(TemplateError(f"{type(error).__name__}: {error}"))
        return texts

    return render
