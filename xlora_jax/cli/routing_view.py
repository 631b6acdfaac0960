"""A text in the terminal, each token in the color of its leading expert."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from xlora_jax.cli.terminal import cell, visible
from xlora_jax.routing.page import expert_colors
from xlora_jax.routing.text import RoutedText

__all__ = ["show_text"]


def show_text(text: RoutedText, console: Console | None = None) -> None:
    """Print a legend and the text: generated tokens are underlined, and a color's strength is the expert's lead.

    Without colors, the name of the leading expert is printed wherever it changes.
    """
    console = Console(highlight=False) if console is None else console
    mean = text.shares.mean(axis=1)
    used = mean.mean(axis=0)
    colors = expert_colors(len(text.expert_names))
    legend = Text()
    for name, color, share in zip(text.expert_names, colors, used, strict=True):
        legend.append("■ ", color)
        legend.append(visible(f"{name} {share:.0%}   "))
    console.print(legend)
    if console.color_system is None:
        console.print(cell(text.marked()), soft_wrap=True)
        return
    shown = Text()
    count = len(colors)
    for number, (token, leader) in enumerate(zip(text.tokens, text.leaders.tolist(), strict=True)):
        style = "underline" if text.kind(number) == "generated" else ""
        if leader >= 0:
            lead = (mean[number, leader] * count - 1) / (count - 1) if count > 1 else 1.0
            style += f" {'bold ' if lead > 0.5 else ''}{colors[leader]}"
        shown.append(visible(token), style.strip())
    console.print(shown, soft_wrap=True)
