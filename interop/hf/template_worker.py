"""A process that renders chat templates, so that a template that runs forever can be killed from outside.

It runs as a script, and imports neither JAX nor this package. Requests and answers are lines of JSON on standard input
and output: ``{"template", "variables", "messages", "tools", "prefixes"}`` gives ``{"texts": [[text, error], ...]}``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

__all__ = ["CHARACTERS", "MEMORY", "limit_memory", "main", "render"]

# Limits far above the needs of any chat, and far below the memory of any machine.
MEMORY = 512 << 20
CHARACTERS = 16 << 20


def limit_memory() -> None:
    """Limit this process to `MEMORY` bytes more than it has now, if the system supports limits."""
    try:
        import resource

        size = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    except (ImportError, OSError, ValueError, AttributeError):
        return


def render(request: dict[str, Any]) -> list[tuple[str | None, str | None]]:
    """Return each requested text, or the reason why the template fails."""
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
            text: str = rendered[0][0]  # (texts, spans of generated text)
            text.encode()
            long = len(text) > CHARACTERS
            texts.append((None, f"it writes {len(text):,} characters") if long else (text, None))
        except MemoryError:
            texts.append((None, f"it needs more than {MEMORY >> 20} MiB of memory"))
        except Exception as error:  # a template can raise errors of any kind
            texts.append((None, f"{type(error).__name__}: {error}"[:500]))
    return texts


def main() -> None:
    """Answer requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # keep the output of libraries out of the answers
    import transformers.utils.chat_template_utils  # noqa: F401

    limit_memory()
    answers.write(json.dumps({"ready": True}) + "\n")
    answers.flush()
    for line in sys.stdin.buffer:
        answers.write(json.dumps({"texts": render(json.loads(line))}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
