"""The picture of the first page: tokens per second of each engine, from the records of peers."""

from __future__ import annotations

from typing import Any

from peer_tables import OURS, SHOWN, SIZES, USE, rates
from picture import COLOURS, Found, Points

__all__ = ["USE", "draw", "note", "points"]

# How the picture calls the engines of the table that stands above it.
LABELS = {
    "PyTorch step": "PyTorch, compiled",
    "transformers compiled": "transformers,\ncompiled",
    "transformers eager": "transformers",
}


def points(found: Found) -> Points:
    """Tokens/s of each engine of the first table, by size; None where there is no record."""
    speeds = rates(found)
    names = [name for name in SHOWN if any(name in of for of in speeds.values())]
    sizes = [size for size in SIZES if size in speeds]
    return {size: [[name, speeds[size].get(name)] for name in names] for size in sizes}


def draw(figure: Any, points: Points) -> None:
    panels = figure.subplots(1, len(points), sharey=True, squeeze=False)[0]
    for axes, (size, rows) in zip(panels, points.items(), strict=True):
        labels = [LABELS.get(name, name) for name, _ in rows]
        colours = [COLOURS[0] if name == OURS else "#9A9A9A" for name, _ in rows]
        places = range(len(rows))[::-1]
        bars = axes.barh(places, [rate or 0 for _, rate in rows], color=colours)
        shown = [f"{rate:,.0f}" if rate else "not measured" for _, rate in rows]
        axes.bar_label(bars, labels=shown, padding=2, fontsize=9)
        axes.set_yticks(places, labels)
        axes.set(title=f"GPT-2 {size}", xlabel="tokens/s")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.margins(x=0.2)
        axes.set_xlim(0)


def note(points: Points) -> str:
    return f"One text at a time, float16, {' and '.join(points)}; a longer bar is faster"
