"""The picture of quickstart.py: the expert that each token uses, and the losses."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import NullLocator

_INK, _SOFT, _PAPER = "#1f2328", "#6e7781", "#ffffff"
_CENTERED: dict[str, Any] = {"ha": "center", "va": "center"}
_COLUMNS = 108  # characters of a line of the text

Losses = Mapping[str, Mapping[str, float]]


def draw(
    path: Path,
    *,
    tokens: Sequence[str],
    gates: np.ndarray,
    shares: Losses,
    losses: Losses,
    colors: Mapping[str, str],
) -> None:
    """Write the picture.

    Args:
        path: path of the PNG file.
        tokens: T pieces of a text.
        gates: array [T, N], gate of each token for each expert.
        shares: mean gates, domain -> expert -> gate.
        losses: losses, variant -> domain -> loss; "base", "uniform mix", "X-LoRA" and "expert <domain>" are required.
        colors: colors, domain -> color, in the order of the experts.
    """
    plt.rcParams.update({"font.size": 12, "text.color": _INK, "axes.labelcolor": _INK, "font.family": "DejaVu Sans"})
    figure = plt.figure(figsize=(14, 7.875), dpi=150, facecolor=_PAPER)
    figure.text(0.03, 0.935, "X-LoRA asks the right expert, token by token", fontsize=23, weight="bold")
    caption = (
        f"{len(colors)} LoRA experts from PEFT, one gate trained in JAX. "
        "A text that is not in the training data; each token in the colors of its experts:"
    )
    figure.text(0.03, 0.885, caption, color=_SOFT, fontsize=13)
    patches = [Patch(color=color, label=name) for name, color in colors.items()]
    place: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (0.985, 0.92), "ncols": len(patches)}
    figure.legend(handles=patches, frameon=False, handlelength=1, handleheight=1, columnspacing=1.3, **place)
    _text(figure.add_axes((0.03, 0.455, 0.945, 0.41)), tokens, gates, list(colors.values()))
    _shares(figure.add_axes((0.105, 0.07, 0.375, 0.28)), shares, colors)
    _losses(figure.add_axes((0.6, 0.07, 0.37, 0.28)), losses, list(colors))
    figure.savefig(path)
    plt.close(figure)


def _text(axes: Axes, tokens: Sequence[str], gates: np.ndarray, colors: Sequence[str]) -> None:
    """Draw the text as a grid of characters, each token on the colors of its experts, mixed by its gates."""
    palette = np.array([to_rgb(color) for color in colors])
    row = column = 0
    for token, gate in zip(tokens, gates, strict=True):
        # Concentrated gates give a strong color, even gates a pale one.
        strength = 0.1 + 0.5 * (gate.max() * len(gate) - 1) / (len(gate) - 1)
        color = (*(gate @ palette), strength)
        for piece in re.findall(r"\n|[^\n]+", token):
            if piece == "\n":
                row, column = row + 1, 0
                continue
            if column + len(piece) > _COLUMNS:
                row, column = row + 1, 2
            axes.add_patch(Rectangle((column, row), len(piece) - 0.1, 0.92, color=color, linewidth=0))
            for character in piece:
                axes.text(column + 0.45, row + 0.48, character, family="DejaVu Sans Mono", fontsize=12.6, **_CENTERED)
                column += 1
    axes.set_xlim(0, _COLUMNS)
    axes.set_ylim(row + (column > 0), 0)
    axes.axis("off")


def _shares(axes: Axes, shares: Losses, colors: Mapping[str, str]) -> None:
    """Draw a bar for each domain, divided among the experts."""
    axes.set_title("How much each expert is used", loc="left", weight="bold", fontsize=13.5, pad=28)
    axes.text(0, 1.04, "mean gate on held-out text of each domain", color=_SOFT, transform=axes.transAxes)
    for place, row in enumerate(shares.values()):
        left = 0.0
        for expert, share in row.items():
            axes.barh(place, share, left=left, color=colors[expert], height=0.62, edgecolor=_PAPER, linewidth=1.2)
            if share > 0.06:
                axes.text(
                    left + share / 2, place, f"{share:.0%}", ha="center", va="center", color=_PAPER, weight="bold"
                )
            left += share
    axes.set_yticks(range(len(shares)), list(shares))
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100 %"])
    axes.set_xlim(0, 1)
    axes.invert_yaxis()
    _plain(axes)


def _losses(axes: Axes, losses: Losses, domains: Sequence[str]) -> None:
    """Draw the loss of base, uniform mix and X-LoRA relative to each domain's own expert."""
    axes.set_title("Held-out loss against the domain's own expert", loc="left", weight="bold", fontsize=13.5, pad=28)
    axes.axvspan(-1, 0.05, color="#dafbe1", linewidth=0)
    axes.text(0.049, len(domains) - 0.55, "within 5%", color="#1a7f37", fontsize=11, ha="right")
    axes.axvline(0, color=_SOFT, linewidth=1)
    styles: dict[str, dict[str, Any]] = {
        "base": {"marker": "o", "color": "#8c959f", "s": 90},
        "uniform mix": {"marker": "s", "color": "#8c959f", "s": 80, "facecolors": _PAPER, "linewidths": 2},
        "X-LoRA": {"marker": "D", "color": _INK, "s": 95},
    }
    excess = {
        variant: [losses[variant][domain] / losses[f"expert {domain}"][domain] - 1 for domain in domains]
        for variant in styles
    }
    for variant, style in styles.items():
        axes.scatter(excess[variant], range(len(domains)), label=variant, zorder=3, **style)
    values = [value for row in excess.values() for value in row]
    axes.set_yticks(range(len(domains)), domains)
    # The scale is linear up to 5% and logarithmic beyond, because the differences vary in size.
    axes.set_xscale("symlog", linthresh=0.05, linscale=0.5)
    axes.set_xticks([0, 0.05, 0.1, 0.2, 0.5, 1], ["0", "+5%", "+10%", "+20%", "+50%", "+100%"])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(min(-0.01, 1.2 * min(values)), max(2, 1.2 * max(values)))
    axes.set_ylim(len(domains) - 0.5, -0.5)
    axes.grid(axis="y", color="#eaeef2", zorder=0)
    axes.legend(
        frameon=False, loc="lower left", bbox_to_anchor=(-0.02, 0.97), ncols=3, handletextpad=0.2, columnspacing=1.2
    )
    _plain(axes)


def _plain(axes: Axes) -> None:
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
