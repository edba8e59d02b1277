"""Tables of single ops, from the record of bench/ops.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .layout import Record, Row, caption, table
from .picture import COLOURS, Found, Points

# As bench/ops.py measures them: (key, title).
WAYS = (
    ("python", "from Python"),
    ("graph", "CUDA graph"),
    ("gpu_warm", "GPU alone, warm L2"),
    ("gpu_cold", "GPU alone, cold L2"),
)
NORMS = ("layer_norm", "add_rms_norm", "add_layer_norm")
FEW = 64  # rows at most of the tables of few


def _us(timing: Row | None, which: str = "p50_us") -> str:
    return "-" if timing is None else f"{timing[which]:.2f}"


def _ratio(ours: Row | None, theirs: Row | None) -> str:
    if ours is None or theirs is None:
        return "-"
    return f"{theirs['p50_us'] / ours['p50_us']:.2f}"


def of(*names: str, few: bool | None = None) -> Callable[[Row], bool]:
    """Rows of some ops, of at most FEW rows, of more, or of any number."""

    def wanted(row: Row) -> bool:
        rows = math.prod(row["shape"][:-1])
        return row["op"] in names and (few is None or (rows <= FEW) == few)

    return wanted


def _errors(row: Row, side: str) -> tuple[str, str]:
    """Largest and mean error; whether the ids are right, of an op that chooses them."""
    found = row[side]
    if "right" in found:
        return ("right" if found["right"] else "WRONG"), "-"
    return f"{found['max_error']:.1e}", f"{found['mean_error']:.1e}"


def call_cost(entry: Record) -> str:
    """Microseconds of a call from Python above CuPy's bare launches of the same kernels."""
    lines = [
        [
            row["op"], row["launches"], f"{row['bare']['median_us']:.2f}",
            f"{row['ours']['median_us']:.2f}", f"{row['above_us']:+.2f}",
        ]
        for row in entry["results"]["rows"]
    ]  # fmt: skip
    header = ["op", "launches", "bare launches, µs", "a call, µs", "above them, µs"]
    shape = " x ".join(map(str, entry["results"]["shape"]))
    return table(header, lines) + caption(entry, f"Medians; arrays of {shape}, of rope smaller")


def some_ops(wanted: Callable[[Row], bool]) -> Callable[[Record], str]:
    """Ops beside PyTorch, by shape, dtype and way of calling."""

    def made(entry: Record) -> str:
        rows = [row for row in entry["results"]["rows"] if wanted(row)]
        if not rows:
            return "Not measured yet.\n"
        header = [
            "op", "shape", "dtype", "called", "PyTorch eager, µs", "compiled, µs", "ours, µs",
            "p95", "p99", "mean", "from tensors, µs", "speed-up over eager", "over compiled",
            "from tensors over the faster", "GB/s", "of a copy", "max error", "mean error",
            "PyTorch's max error",
        ]  # fmt: skip
        lines = []
        for row in rows:
            ours, eager, compiled = row["ours"], row["eager"], row["compiled"]
            for way, title in WAYS:
                mine, theirs = ours[way], row["ours_torch"][way]
                rate = "-" if mine is None else f"{row['bytes'] / mine['p50_us'] / 1e3:.0f}"
                peers = [each[way] for each in (eager, compiled) if each[way]]
                faster = min(peers, key=lambda each: each["p50_us"], default=None)
                lines.append(
                    [
                        row["op"], " x ".join(map(str, row["shape"])), row["dtype"], title,
                        _us(eager[way]), _us(compiled[way]), _us(mine),
                        _us(mine, "p95_us"), _us(mine, "p99_us"), _us(mine, "mean_us"),
                        _us(theirs), _ratio(mine, eager[way]), _ratio(mine, compiled[way]),
                        _ratio(theirs, faster), rate,
                        _ratio(mine, row["copy"]) if way == "gpu_cold" else "-",
                        *_errors(row, "ours"), _errors(row, "eager")[0],
                    ]
                )  # fmt: skip
        note = (
            "Medians, beside PyTorch in the same run, under inference_mode. From Python: calls one "
            "after the other, on CuPy arrays with `out=` and, from tensors, through "
            "gpt2cupy.torch. CUDA graph: a graph of one call, replayed. GPU alone: a node of a "
            "graph of many calls, on the same arrays, or on arrays of its own that no cache holds; "
            "of a copy: of the time that a copy of as many bytes takes, cold. "
            "Errors against float64; outside the error rule there is no speed"
        )
        failed = sorted(
            f"{row['op']} {' x '.join(map(str, row['shape']))} ({row['compiled']['failed']})"
            for row in rows
            if "failed" in row["compiled"]
        )
        if failed:
            note += f". PyTorch could not compile {'; '.join(failed)}"
        return table(header, lines, text=4) + caption(entry, note)

    return made


# ---------------------------------------------------------------------------------------------
# the picture: how much longer PyTorch takes

PICTURED = (("python", "called from Python"), ("gpu_cold", "GPU alone, cold L2"))


def picture_points(found: Found) -> Points:
    """For each case in float16: its name, and the faster PyTorch's time over ours by way."""
    points = []
    for row in found["ops"]["results"]["rows"]:
        if row["dtype"] != "float16":
            continue
        ratios = []
        for way, _ in PICTURED:
            peers = [row[peer][way]["p50_us"] for peer in ("eager", "compiled") if row[peer][way]]
            mine = row["ours"][way]
            ratios.append(min(peers) / mine["p50_us"] if mine and peers else None)
        points.append([f"{row['op']} {'x'.join(map(str, row['shape']))}", *ratios])
    return points


def picture_draw(figure: Any, points: Points) -> None:
    figure.set_size_inches(8, 1.4 + 0.26 * len(points))
    axes = figure.subplots()
    places = range(len(points))[::-1]
    for number, (_, title) in enumerate(PICTURED):
        ratios = [math.nan if point[1 + number] is None else point[1 + number] for point in points]
        axes.plot(ratios, places, "os"[number], color=COLOURS[number], label=title)
    axes.axvline(1, color="black", lw=0.8)
    axes.set_yticks(list(places), [point[0] for point in points])
    axes.set(xlabel="time of the faster of PyTorch eager and compiled / ours", xscale="log")
    most = max((ratio for point in points for ratio in point[1:] if ratio is not None), default=1)
    ticks = [0.5 * 2**power for power in range(2 + max(1, math.ceil(math.log2(most))))]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)


def picture_note(points: Points) -> str:
    return "float16; right of 1 PyTorch's op takes longer"
