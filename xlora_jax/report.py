"""The routing report of a model on texts: metrics, losses, sample texts; as JSON, as a page and as plots."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from xlora_jax.atomic import replace_json, replace_text
from xlora_jax.model import XLoraModel
from xlora_jax.routing.metrics import RoutingMetrics, Total
from xlora_jax.routing.page import check_jinja, render_page
from xlora_jax.routing.plots import check_matplotlib, draw_plots
from xlora_jax.routing.text import Part, RoutedText, pieces_of
from xlora_jax.training.data import Codec, Rows
from xlora_jax.training.losses import IGNORED_LABEL
from xlora_jax.training.routing import Routing, make_routing_step

__all__ = ["RoutingReport", "check_report", "report_routing"]

SCHEMA = "xlora-jax routing report 1"
_MOST_POINTS = 400

# Marks each batch of a text as done: (iterable of batches, name of the text, number of batches) -> the same iterable.
Progress = Callable[[Iterable[int], str, int], Iterable[int]]


@dataclass(frozen=True)
class RoutingReport:
    """A routing report.

    Attributes:
        content: content of report.json; ``docs/routing.md`` describes its fields.
        samples: texts of the token view.
    """

    content: Mapping[str, Any]
    samples: tuple[RoutedText, ...]

    def html(self) -> str:
        """Return the page: one file that loads nothing.

        Raises:
            ImportError: jinja2 is missing.
        """
        return render_page(self.content, [sample.page_data() for sample in self.samples])

    def write(self, directory: str | Path) -> Path:
        """Write report.html, report.json, and each plot as PNG and SVG; return the path of the page.

        Raises:
            ImportError: jinja2 or matplotlib is missing; the message names the extra.
            OSError: a file can't be written.
        """
        check_report()
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        page = self.html()
        replace_json(directory / "report.json", self.content)
        draw_plots(directory, self.content)
        replace_text(directory / "report.html", page)
        return directory / "report.html"


def check_report() -> None:
    """Check that a report can be written.

    Raises:
        ImportError: jinja2 or matplotlib is missing; the message names the extra.
    """
    check_jinja()
    check_matplotlib()


def report_routing(
    model: XLoraModel,
    texts: Mapping[str, Rows],
    *,
    codec: Codec | None = None,
    effects: bool = False,
    max_rows: int = 64,
    batch_size: int = 8,
    sample_tokens: int = 256,
    samples: Sequence[RoutedText] = (),
    training: Sequence[Mapping[str, Any]] | None = None,
    title: str = "Which expert does what",
    progress: Progress = lambda batches, name, total: batches,
) -> RoutingReport:
    """Measure the routing of texts.

    Args:
        model: trained model.
        texts: mapping of names (such as domains) to rows.
        codec: tokenizer functions, to show the beginning of each text token by token; None shows no texts of the data.
        effects: whether to measure each expert's effect on the loss too.
        max_rows: number of rows of each text at most; 0 for all.
        batch_size: number of rows at a time.
        sample_tokens: number of tokens of each text to show; 0 shows none.
        samples: further texts to show, such as those of :meth:`~xlora_jax.model.XLoraModel.routing`.
        training: entries of the run's metrics.jsonl, see :func:`xlora_jax.training.metrics.read_metrics`.
        title: title of the page.
        progress: function that marks the batches of each text.

    Raises:
        ValueError: there are no texts, or one has no tokens to predict.
    """
    from xlora_jax import __version__

    if not texts:
        raise ValueError("texts: expected at least one, got none")
    for rows in texts.values():
        rows.check_vocabulary(getattr(model.module.config, "vocab_size", None))
    step = partial(make_routing_step(model.xlora, effects=effects), model.params)
    totals = {
        name: _total(step, rows, max_rows or len(rows), batch_size, name, progress) for name, rows in texts.items()
    }
    shown = [_sample(model, rows, codec, sample_tokens, name) for name, rows in texts.items()] if codec else []
    samples = (*samples, *(sample for sample in shown if sample is not None))
    config = model.config
    content = {
        "schema": SCHEMA,
        "version": __version__,
        "title": title,
        "model": {
            "name": _base_name(model),
            "layerwise": config.layerwise_scalings,
            "top_k": config.top_k_lora,
            "softmax": config.enable_softmax,
            "temperature": config.softmax_temperature,
            "depth": config.xlora_depth,
        },
        "experts": list(model.expert_names),
        "layers": list(model.routing_layers),
        "all": _entry(jax.tree.map(lambda *parts: sum(parts), *totals.values())),
        "texts": {name: _entry(total) for name, total in totals.items()},
        "training": None if training is None else _thinned(training),
        "samples": [sample.as_json() for sample in samples],
    }
    return RoutingReport(content, tuple(samples))


def _base_name(model: XLoraModel) -> str | None:
    name = getattr(getattr(model.origin, "base", None), "name_or_path", None)
    # A path may tell of the user's directories, and a report is passed on.
    return None if name is None else Path(str(name)).name


def _total(
    step: Callable[[Any], Routing], rows: Rows, most: int, batch_size: int, name: str, progress: Progress
) -> Any:
    """Return the sums over a text as float64 NumPy arrays."""
    total: Total | None = None
    count = min(most, len(rows))
    batch_size = min(batch_size, count)
    starts = range(0, count, batch_size)
    for start in progress(starts, name, len(starts)):
        batch = {}
        for field, array in rows.arrays.items():
            part = array[start : min(start + batch_size, count)]
            # The last batch is filled up with rows that predict nothing, so there is only one shape to compile.
            fill = IGNORED_LABEL if field == "labels" else 0
            batch[field] = np.pad(part, ((0, batch_size - len(part)), (0, 0)), constant_values=fill)
        sums = step(batch)
        total = Total.of(sums) if total is None else total.add(sums)
    value = None if total is None else total.value()
    if value is None or not value.sums.tokens.sum():
        raise ValueError(f"{name}: expected text, got no token to predict in the first {count} rows; give other data")
    return value


def _entry(total: Any) -> dict[str, Any]:
    """Return the metrics and losses of a text as JSON values."""
    metrics = RoutingMetrics.of(total.sums)
    tokens = float(metrics.tokens[0])
    entry: dict[str, Any] = {
        "tokens": int(tokens),
        "base_loss": _number(total.base_loss / tokens),
        "loss": _number(total.loss / tokens),
        "mean_gates": _rounded(metrics.mean_gate[0]),
        "mean_shares": _rounded(metrics.mean_share[0]),
        "selected": _rounded(metrics.selected[0]),
        "top1": _rounded(metrics.top1[0]),
        "entropy": _rounded(metrics.entropy[0]),
        "experts_per_token": _rounded(metrics.experts_per_token[0]),
        "experts_in_use": _rounded(metrics.experts_in_use[0]),
        "co_use": _rounded(metrics.co_use[0]),
        "change": _rounded(metrics.change[0]),
        "agreement": _rounded(metrics.agreement[0], 4),
    }
    if total.uniform_loss is not None:
        entry["effects"] = {
            "uniform": _number(total.uniform_loss / tokens),
            "alone": [_number(value / tokens) for value in total.alone_losses],
            "without": [_number(value / tokens) for value in total.without_losses],
        }
    return entry


def _number(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(
            f"expected a finite loss, got {number}: the model's numbers overflow; load it with dtype float32"
        )
    return number


def _rounded(values: Any, digits: int = 6) -> Any:
    """Return an array as lists. JSON has no NaN, so one is an error."""
    if not np.isfinite(values).all():
        raise ValueError("expected finite gates, got NaN or infinity: load the model with dtype float32")
    return np.round(values, digits).tolist()


def _thinned(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the entries of a run, at most some hundred of each kind; numbers that are not finite become null."""
    found: list[dict[str, Any]] = []
    for kind in ("train", "eval"):
        of_kind = [entry for entry in entries if entry.get("kind") == kind]
        every = -(-len(of_kind) // _MOST_POINTS) or 1
        # Counted from the end, so that the last entry is among them.
        found += [_finite(entry) for entry in of_kind[::-1][::every][::-1]]
    return found


def _finite(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in entry.items()
    }


def _sample(model: XLoraModel, rows: Rows, codec: Codec, most: int, name: str) -> RoutedText | None:
    """Return the beginning of a text's first row, with what is learned told apart from what is given."""
    if most < 1 or codec.decode is None:
        return None
    arrays = {field: array[:1] for field, array in rows.arrays.items()}
    segments = arrays.get("segment_ids")
    size = int(rows.lengths[0]) if rows.lengths is not None else arrays["input_ids"].shape[1]
    size = min(size, most)
    gates = model.gates_of(
        arrays["input_ids"], **{key: arrays[key] for key in ("positions", "segment_ids") if key in arrays}
    )
    ids, learned = arrays["input_ids"][0, :size], arrays["labels"][0, :size] != IGNORED_LABEL
    starts = np.flatnonzero(np.diff(segments[0, :size], prepend=0)) if segments is not None else np.array([0])
    tokens: list[str] = []
    parts: list[Part] = []
    for start, end in zip(starts.tolist(), [*starts[1:].tolist(), size], strict=True):
        tokens += pieces_of(ids[start:end].tolist(), codec.decode)
        own = learned[start:end]
        if own[1:].all():
            parts.append(Part(start, "text"))
            continue
        turns = [0, *(np.flatnonzero(np.diff(own)) + 1).tolist()]
        parts += [Part(start + turn, "answer" if own[turn] else "prompt") for turn in turns]
    if all(part.kind == "text" for part in parts):
        parts = [Part(0, "text")]
    return RoutedText(tuple(tokens), gates[0, :size], model.expert_names, model.routing_layers, tuple(parts), name)
