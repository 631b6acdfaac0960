"""The routing report as one self-contained HTML page: a template, a style, a script and the data.

The page loads nothing, and its content security policy forbids it to. Data is embedded as JSON in which ``<``, ``>``
and ``&`` are escaped, and the script sets it as text, never as markup. So names and tokens may hold anything.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

__all__ = ["check_jinja", "expert_colors", "render_page"]

# The palette of Okabe and Ito (2008), which the common forms of color blindness keep apart, then that of Paul Tol.
_PALETTE = (
    *("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00"),
    *("#b8a800", "#332288", "#882255", "#44aa99", "#999933", "#aa4499", "#661100"),
)
_ESCAPES = {ord(character): f"\\u{ord(character):04x}" for character in "<>&"}


def expert_colors(count: int) -> list[str]:
    """Return a color for each expert, as ``#rrggbb``; beyond 13 they repeat, so show names beside them."""
    return [_PALETTE[number % len(_PALETTE)] for number in range(count)]


def check_jinja() -> None:
    """Check that the template can be rendered.

    Raises:
        ImportError: jinja2 is missing; the message names the extra.
    """
    try:
        import jinja2  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "the page of a report is rendered by jinja2, which is missing: pip install 'xlora-jax[plots]'"
        ) from error


def render_page(report: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], *, view: str = "report") -> str:
    """Return the HTML page.

    Args:
        report: content of report.json; for the view ``tokens`` only ``experts``, ``layers``, ``title`` and ``version``
            are read.
        samples: texts for the token view, as :meth:`xlora_jax.routing.text.RoutedText.page_data` returns them.
        view: ``report``, or ``tokens`` for the token view alone.

    Raises:
        ImportError: jinja2 is missing.
    """
    check_jinja()
    import jinja2
    from markupsafe import Markup

    assets = resources.files("xlora_jax.routing") / "assets"
    read = {name: (assets / name).read_text(encoding="utf-8") for name in ("page.html.j2", "page.css", "page.js")}
    content = {key: value for key, value in report.items() if key != "samples"}
    content = {"texts": {}, "all": None, "training": None, "model": {}, **content}
    data = {"report": content, "samples": list(samples), "colors": expert_colors(len(report["experts"]))}
    written = json.dumps(data, allow_nan=False, separators=(",", ":")).translate(_ESCAPES)
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(read["page.html.j2"])
    return template.render(
        view=view,
        # Half of a surrogate pair can't be written to a file.
        title=str(report["title"]).encode("utf-8", "replace").decode("utf-8"),
        version=report["version"],
        style=Markup(read["page.css"]),
        script=Markup(read["page.js"]),
        data=Markup(written),
    )
