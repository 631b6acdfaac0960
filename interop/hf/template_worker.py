"""A process that renders chat templates, so that one without end, or without measure, can be ended from outside.

Run as a script; it imports neither JAX nor this package. Requests and answers are lines of JSON on standard input and
output: ``{"template", "variables", "messages", "tools", "prefixes"}`` gives ``{"texts": [[text, error], ...]}``.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

__all__ = ["CHARACTERS", "MEMORY", "limit_memory", "main", "render"]

# Far more than any chat, far less than any machine has.
MEMORY = 512 << 20
CHARACTERS = 16 << 20


def limit_memory() -> None:
    """Let this process have `MEMORY` bytes more than it has now, where the system can be told so."""
    try:
        import resource

        with open("/proc/self/statm", encoding="ascii") as file:
            size = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    except (ImportError, OSError, ValueError, AttributeError):
        return


def render(request: dict[str, Any]) -> list[tuple[str | None, str | None]]:
    """Return each text that is asked for, or the reason why it can't be written."""
    from transformers.utils.chat_template_utils import render_jinja_template

    texts: list[tuple[str | None, str | None]] = []
    for count, answer_follows in request["prefixes"]:
        try:
            rendered: Any = render_jinja_template(
                conversations=[request["messages"][:count]],
                tools=request["tools"],
                chat_template=request["template"],
                add_generation_prompt=answer_follows,
                **request["variables"],
            )
            text: str = rendered[0][0]  # (texts, spans of generation)
            text.encode()
            long = len(text) > CHARACTERS
            texts.append((None, f"it writes {len(text):,} characters") if long else (text, None))
        except MemoryError:
            texts.append((None, f"it needs more than {MEMORY >> 20} MiB of memory"))
        except Exception as error:  # a template's errors are of any kind
            texts.append((None, f"{type(error).__name__}: {error}"[:500]))
    return texts


def main() -> None:
    """Answer requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # what libraries print is no answer
    import transformers.utils.chat_template_utils  # noqa: F401

    limit_memory()
    answers.write(json.dumps({"ready": True}) + "\n")
    answers.flush()
    for line in sys.stdin.buffer:
        answers.write(json.dumps({"texts": render(json.loads(line))}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
