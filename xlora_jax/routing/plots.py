"""The plots of a routing report as PNG and SVG files, drawn by matplotlib from the content of report.json."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xlora_jax.atomic import replacing_file
from xlora_jax.routing.page import expert_colors

__all__ = ["check_matplotlib", "draw_plots"]

_MOST_LABELS = 24
# Names come from files: control characters have no glyph.
_PLAIN: dict[str, Any] = {"parse_math": False}


def check_matplotlib() -> None:
    """Check that plots can be drawn.

    Raises:
        ImportError: matplotlib is missing; the message names the extra.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "the plots of a report are drawn by matplotlib, which is missing: pip install 'xlora-jax[plots]'"
        ) from error


def draw_plots(directory: Path, report: Mapping[str, Any]) -> list[Path]:
    """Write each plot as ``NAME.png`` and ``NAME.svg``, and return the paths.

    Raises:
        ImportError: matplotlib is missing.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    plots: dict[str, Callable[[Any, Mapping[str, Any]], None]] = {
        "gates": _gates,
        "usage": _usage,
        "entropy": _entropy,
        "losses": _losses,
        "co_use": _co_use,
    }
    if len([entry for entry in report["training"] or () if entry["kind"] == "train"]) > 1:
        plots["training"] = _training
    written = []
    for name, draw in plots.items():
        figure = Figure(dpi=150, layout="constrained")
        draw(figure, report)
        for kind in ("png", "svg"):
            path = directory / f"{name}.{kind}"
            buffer = io.BytesIO()
            # Without a date and a random salt, the same report gives the same file.
            options: dict[str, Any] = {"metadata": {"Date": None}} if kind == "svg" else {}
            figure.savefig(buffer, format=kind, **options)
            with replacing_file(path, durable=False) as file:
                file.write(buffer.getvalue())
            written.append(path)
    return written


def _sets(report: Mapping[str, Any]) -> dict[str, Any]:
    texts: dict[str, Any] = dict(report["texts"])
    return {"all texts": report["all"], **texts} if len(texts) > 1 else texts


def _name(text: str, most: int = 24) -> str:
    shown = "".join(character if character.isprintable() else "?" for character in text)
    return shown if len(shown) <= most else shown[: most - 1] + "…"


def _layer_ticks(layers: Sequence[str]) -> tuple[list[int], list[str]]:
    every = -(-len(layers) // _MOST_LABELS)
    places = list(range(0, len(layers), every))
    return places, [_name(layers[place].removeprefix("model.layers."), 32) for place in places]


def _gates(figure: Any, report: Mapping[str, Any]) -> None:
    """Draw the mean gate of each expert at each layer, from none (light) to all (dark)."""
    sets, experts, layers = _sets(report), report["experts"], report["layers"]
    panel_width = 0.7 + 0.36 * len(experts)
    figure.set_size_inches(2.4 + panel_width * len(sets), max(2.6, 1.6 + min(0.16 * len(layers), 9)))
    panels = figure.subplots(1, len(sets), sharey=True, squeeze=False)[0]
    image = None
    for panel, (name, entry) in zip(panels, sets.items(), strict=True):
        image = panel.imshow(
            np.asarray(entry["mean_gates"]), vmin=0, vmax=1, cmap="cividis", aspect="auto", interpolation="nearest"
        )
        panel.set_title(_name(name), fontsize=9, **_PLAIN)
        panel.set_xticks(range(len(experts)), [*map(_name, experts)], rotation=90, fontsize=8, **_PLAIN)
        panel.tick_params(length=0)
    places, names = _layer_ticks(layers)
    panels[0].set_yticks(places, names, fontsize=6, **_PLAIN)
    figure.colorbar(image, ax=list(panels), label="mean gate")


def _usage(figure: Any, report: Mapping[str, Any]) -> None:
    """Draw a bar for each text, divided among the experts."""
    sets, experts = _sets(report), report["experts"]
    figure.set_size_inches(8, 1.4 + 0.42 * len(sets))
    axes = figure.subplots()
    left = np.zeros(len(sets))
    shares = np.array([np.mean(entry["mean_shares"], axis=0) for entry in sets.values()])
    for expert, color, width in zip(experts, expert_colors(len(experts)), shares.T, strict=True):
        axes.barh(range(len(sets)), width, left=left, color=color, edgecolor="white", label=_name(expert))
        left += width
    axes.set_yticks(range(len(sets)), [*map(_name, sets)], **_PLAIN)
    axes.set_xlim(0, 1)
    axes.invert_yaxis()
    axes.set_xlabel("share of the gates")
    _finish(axes)


def _entropy(figure: Any, report: Mapping[str, Any]) -> None:
    """Draw the normalized entropy of each layer."""
    figure.set_size_inches(8, 3.4)
    axes = figure.subplots()
    for name, entry in _sets(report).items():
        whole = name == "all texts"
        style: dict[str, Any] = {"color": "black", "linewidth": 2.2} if whole else {"linewidth": 1.2}
        axes.plot(entry["entropy"], marker="o", markersize=3, label=_name(name), **style)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("adapted layer")
    axes.set_ylabel("entropy / log N")
    _finish(axes)


def _losses(figure: Any, report: Mapping[str, Any]) -> None:
    """Draw the loss of each text with and without the experts."""
    sets, experts = _sets(report), report["experts"]
    figure.set_size_inches(8, 1.4 + 0.45 * len(sets))
    axes = figure.subplots()
    places = range(len(sets))
    entries = list(sets.values())
    if entries[0].get("effects"):
        for number, (expert, color) in enumerate(zip(experts, expert_colors(len(experts)), strict=True)):
            values = [entry["effects"]["alone"][number] for entry in entries]
            axes.scatter(values, places, color=color, marker="|", s=160, linewidths=2.4, label=f"{_name(expert)} alone")
        values = [entry["effects"]["uniform"] for entry in entries]
        axes.scatter(values, places, facecolors="none", edgecolors="gray", marker="s", label="uniform mix")
    axes.scatter([entry["base_loss"] for entry in entries], places, color="gray", label="base")
    axes.scatter([entry["loss"] for entry in entries], places, color="black", marker="D", label="X-LoRA", zorder=3)
    axes.set_yticks(places, [*map(_name, sets)], **_PLAIN)
    axes.invert_yaxis()
    axes.set_xlabel("loss, nats per token")
    _finish(axes)


def _co_use(figure: Any, report: Mapping[str, Any]) -> None:
    """Draw the co-use of each pair of experts, as the mean over the layers."""
    experts = [_name(expert) for expert in report["experts"]]
    figure.set_size_inches(2.6 + 0.4 * len(experts), 1.9 + 0.4 * len(experts))
    axes = figure.subplots()
    image = axes.imshow(np.mean(report["all"]["co_use"], axis=0), vmin=0, vmax=1, cmap="cividis")
    axes.set_xticks(range(len(experts)), experts, rotation=90, **_PLAIN)
    axes.set_yticks(range(len(experts)), experts, **_PLAIN)
    axes.tick_params(length=0)
    figure.colorbar(image, ax=axes, label="co-use")


def _training(figure: Any, report: Mapping[str, Any]) -> None:
    """Draw the loss of the run, and the mean gate of each expert if it was logged."""
    entries = [entry for entry in report["training"] if entry["kind"] == "train"]
    steps = [entry["step"] for entry in entries]
    gates = [[entry.get(f"gate/{expert}") for entry in entries] for expert in report["experts"]]
    logged = all(value is not None for row in gates for value in row)
    figure.set_size_inches(8, 6 if logged else 3.2)
    panels = figure.subplots(2 if logged else 1, 1, squeeze=False)[:, 0]
    panels[0].plot(steps, [np.nan if entry["loss"] is None else entry["loss"] for entry in entries], color="black")
    panels[0].set_ylabel("loss, nats per token")
    if logged:
        names = [_name(expert) for expert in report["experts"]]
        panels[1].stackplot(steps, np.abs(gates), labels=names, colors=expert_colors(len(names)))
        panels[1].set_ylabel("mean gate")
        _finish(panels[1])
    panels[-1].set_xlabel("step")


def _finish(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    legend = axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    for text in legend.get_texts():
        text.set_parse_math(False)
