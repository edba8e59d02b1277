"""Ours beside other engines: tables and a picture, from peers.json and peers-1558M.json."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .layout import Record, Row, caption, left_out, number, rate, spread, table
from .picture import COLOURS, Points

Found = dict[str, Record]
USE = ("peers-1558M",)  # the largest size, where it was measured in a run of its own
OURS = "gpt2cupy"
# Engines of the first table a reader sees, and how it calls them.
SHOWN = {
    OURS: "**gpt2cupy**",
    "PyTorch step": "PyTorch, hand-written step, compiled, CUDA graph",
    "llama.cpp": "llama.cpp, CUDA, flash attention",
    "transformers compiled": "transformers, compiled, static cache",
    "transformers eager": "transformers",
}
SIZES = ("124M", "1558M")


def rows(found: Found) -> Iterator[tuple[Row, Row]]:
    """(results, row) of each row of the records that are there."""
    for name in ("peers", *USE):
        results = found[name]["results"] if name in found else {"rows": []}
        for row in results["rows"]:
            yield results, row


def rates(found: Found) -> dict[str, dict[str, float]]:
    """Tokens/s of one text in float16, by size and engine; ours by its fastest path."""
    made: dict[str, dict[str, float]] = {}
    for _, row in rows(found):
        if (row["dtype"], row["batch"]) != ("float16", 1):
            continue
        size = made.setdefault(row["model"], {})
        for name, one in row["engines"].items():
            shown = OURS if name.startswith(OURS) else name
            if shown in SHOWN:
                size[shown] = max(size.get(shown, 0.0), rate(1, one["step"]))
    return made


def summary(found: Found) -> str:
    """A row for each engine; of each size that was measured its tokens/s and our lead."""
    speeds = rates(found)
    sizes = [size for size in SIZES if speeds.get(size)]
    lines = []
    for name in SHOWN:
        each = [speeds[size].get(name) for size in sizes]
        if not any(each):
            continue
        line = [SHOWN[name]]
        for size, them in zip(sizes, each, strict=True):
            us = speeds[size].get(OURS)
            lead = f"{us / them:.1f} x" if them and us and name != OURS else ""
            line += [number(them) if them else "not measured", lead]
        lines.append(line)
    header = ["engine"]
    for size in sizes:
        header += [f"GPT-2 {size}, tokens/s", "gpt2cupy is faster by"]
    results = found["peers"]["results"]
    note = (
        f"One text at a time, float16, random weights, {results['tokens']} greedy tokens after "
        f"{results['prompt']}; medians of {results['rounds']} runs"
    )
    if OURS in results["rows"][0]["engines"]:
        note += ". Ours is `LanguageModel.generate`, in wall-clock time"
    if without := [size for size in SIZES if size not in sizes]:
        note += f". The others have not been timed at {' and '.join(without)} yet"
    return table(header, lines) + caption(found["peers"], note)


def peers(found: Found) -> str:
    """Every engine, size and batch."""
    lines: list[list[Any]] = []
    forms: dict[str, str] = {}
    for _, row in rows(found):
        engines = row["engines"]
        ours = [one["step"]["median_us"] for name, one in engines.items() if OURS in name]
        for name, one in engines.items():
            step, compiling = one["step"], one.get("compile_s", 0)  # which load_s holds too
            load, first = one["load_s"] - compiling, compiling + one.get("first_run_s", 0)
            speed, prompt = rate(row["batch"], step), one["prefill"]["median_us"] / 1e3
            ratio = f"{step['median_us'] / min(ours):.2f}" if ours else "-"
            figures = [number(speed), number(prompt, 2), number(load, 1), number(first, 1), ratio]
            names = [row["model"], row["dtype"], name, row["batch"]]
            lines.append([*names, spread(step), *figures])
            if "form" in one:
                forms[f"{row['model']}, {name}, batch {row['batch']}"] = one["form"]
        for name, reason in row["skipped"].items():
            forms[f"{row['model']}, {name}, batch {row['batch']}, left out"] = reason
    header = [
        *("size", "dtype", "engine", "batch", "step, µs (p10 to p90)", "tokens/s"),
        *("prompt, ms", "load, s", "first run, s", "time / ours"),
    ]
    results = found["peers"]["results"]
    note = (
        f"Random weights, {results['tokens']} greedy tokens after {results['prompt']}; "
        f"{results['rounds']} runs of each in turn, each engine in its own process. First run: "
        f"with what is compiled in it{left_out(results)}"
    )
    note += "".join(f". {name}: {form}" for name, form in forms.items())
    return table(header, lines, 3) + caption(found["peers"], note)


# How the picture calls the engines of the table that stands above it.
_LABELS = {
    "PyTorch step": "PyTorch, compiled",
    "transformers compiled": "transformers,\ncompiled",
    "transformers eager": "transformers",
}


def picture_points(found: Found) -> Points:
    """Tokens/s of each engine of the first table, by size; None where there is no record."""
    speeds = rates(found)
    names = [name for name in SHOWN if any(name in of for of in speeds.values())]
    sizes = [size for size in SIZES if size in speeds]
    return {size: [[name, speeds[size].get(name)] for name in names] for size in sizes}


def picture_draw(figure: Any, points: Points) -> None:
    panels = figure.subplots(1, len(points), sharey=True, squeeze=False)[0]
    for axes, (size, rows) in zip(panels, points.items(), strict=True):
        labels = [_LABELS.get(name, name) for name, _ in rows]
        colours = [COLOURS[0] if name == OURS else "#9A9A9A" for name, _ in rows]
        places = range(len(rows))[::-1]
        bars = axes.barh(places, [speed or 0 for _, speed in rows], color=colours)
        shown = [f"{speed:,.0f}" if speed else "not measured" for _, speed in rows]
        axes.bar_label(bars, labels=shown, padding=2, fontsize=9)
        axes.set_yticks(places, labels)
        axes.set(title=f"GPT-2 {size}", xlabel="tokens/s")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.margins(x=0.2)
        axes.set_xlim(0)


def picture_note(points: Points) -> str:
    return f"One text at a time, float16, {' and '.join(points)}; a longer bar is faster"
