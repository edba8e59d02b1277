"""Tables of single ops, from the record of bench/ops.py."""

from __future__ import annotations

from collections.abc import Callable

from .layout import Record, Row, caption, table

# As bench/ops.py measures them: (key, title).
WAYS = (
    ("python", "from Python"),
    ("graph", "CUDA graph"),
    ("gpu_warm", "GPU alone, warm L2"),
    ("gpu_cold", "GPU alone, cold L2"),
)


def _us(timing: Row | None, which: str = "p50_us") -> str:
    return "-" if timing is None else f"{timing[which]:.2f}"


def _ratio(ours: Row | None, theirs: Row | None) -> str:
    if ours is None or theirs is None:
        return "-"
    return f"{theirs['p50_us'] / ours['p50_us']:.2f}"


def one_op(name: str) -> Callable[[Record], str]:
    """An op beside PyTorch, by shape, dtype and way of calling."""

    def made(entry: Record) -> str:
        rows = [row for row in entry["results"]["rows"] if row["op"] == name]
        header = [
            "shape", "dtype", "called", "PyTorch eager, µs", "compiled, µs", "ours, µs", "p95",
            "p99", "mean", "from tensors, µs", "speed-up over eager", "over compiled", "GB/s",
            "max error", "mean error", "PyTorch's max error",
        ]  # fmt: skip
        lines = []
        for row in rows:
            ours, eager, errors = row["ours"], row["eager"], row["ours"]
            for way, title in WAYS:
                mine = ours[way]
                rate = "-" if mine is None else f"{row['bytes'] / mine['p50_us'] / 1e3:.0f}"
                lines.append(
                    [
                        " x ".join(map(str, row["shape"])), row["dtype"], title,
                        _us(eager[way]), _us(row["compiled"][way]), _us(mine),
                        _us(mine, "p95_us"), _us(mine, "p99_us"), _us(mine, "mean_us"),
                        _us(row["ours_torch"][way]), _ratio(mine, eager[way]),
                        _ratio(mine, row["compiled"][way]), rate, f"{errors['max_error']:.1e}",
                        f"{errors['mean_error']:.1e}", f"{eager['max_error']:.1e}",
                    ]
                )  # fmt: skip
        note = (
            "Medians, beside PyTorch in the same run, under inference_mode. From Python: calls one "
            "after the other, on CuPy arrays with `out=` and, from tensors, through "
            "gpt2cupy.torch. CUDA graph: a graph of one call, replayed. GPU alone: a node of a "
            "graph of many calls, on the same arrays, or on arrays of its own that no cache holds. "
            "Errors against float64; outside the error rule there is no speed"
        )
        return table(header, lines, text=3) + caption(entry, note)

    return made
