"""Tables of attention, from the record of bench/attention.py."""

from __future__ import annotations

from .layout import Record, Row, caption, table

CASES = (True, "causal"), (False, "full")


def _rows(entry: Record, kind: str) -> list[Row]:
    return [row for row in entry["results"]["rows"] if row["kind"] == kind]


def _mask(row: Row) -> str:
    return dict(CASES)[row["causal"]]


def _best(row: Row) -> Row:
    return row["sdpa"][row["best"]]


def _shape(entry: Record) -> str:
    results = entry["results"]
    return f"{results['heads']} heads x {results['head_size']}"


def speeds(entry: Record) -> str:
    """Times, speed-up and memory."""
    header = [
        "tokens", "dtype", "mask", "fastest of PyTorch", "PyTorch, ms", "ours, ms", "speed-up",
        "cold L2", "called from Python", "from tensors", "memory reduction, %",
    ]  # fmt: skip
    lines = []
    for row in _rows(entry, "sequence"):
        mine, theirs, tensors = row["ours"], _best(row), row["ours_torch"]
        known = mine["gpu_warm"] is not None

        def ratio(way: str, side: Row = mine, theirs: Row = theirs) -> str:
            return (
                "-" if side[way] is None else f"{theirs[way]['p50_us'] / side[way]['p50_us']:.2f}"
            )

        memory = row["memory"]
        saved = "-"
        if memory["materialised"] is not None:
            saved = f"{100 * (1 - memory['ours'] / memory['materialised']):.1f}"
        lines.append(
            [
                f"{row['tokens']:,}", row["dtype"], _mask(row), row["best"],
                f"{theirs['gpu_warm']['p50_us'] / 1e3:.3f}",
                f"{mine['gpu_warm']['p50_us'] / 1e3:.3f}" if known else "-", ratio("gpu_warm"),
                ratio("gpu_cold"), ratio("python"), ratio("python", tensors), saved,
            ]
        )  # fmt: skip
    note = (
        f"{_shape(entry)}, beside the fastest backend of PyTorch's scaled_dot_product_attention, "
        "TF32 off; medians of the GPU's time alone, a node of a graph of many calls. Speed-ups: "
        "with the arrays of the call before, with arrays that no cache holds, called one after the "
        "other from Python on CuPy arrays with `out=` and on tensors through gpt2cupy.torch. "
        "Memory: the most that the allocator had beside the inputs, the result included, against "
        "the formula with its T x T matrix. Outside the error rule there is no speed"
    )
    return table(header, lines, text=4) + caption(entry, note)


def correctness(entry: Record) -> str:
    """Errors against float64, ours and PyTorch's."""
    header = [
        "tokens", "dtype", "mask", "max error", "mean error", "RMS error", "PyTorch's max error",
        "PyTorch's mean error", "passed",
    ]  # fmt: skip
    lines = []
    for row in _rows(entry, "sequence"):
        mine, theirs = row["ours"], _best(row)
        lines.append(
            [
                f"{row['tokens']:,}", row["dtype"], _mask(row), f"{mine['max_error']:.1e}",
                f"{mine['mean_error']:.1e}", f"{mine['rms_error']:.1e}",
                f"{theirs['max_error']:.1e}", f"{theirs['mean_error']:.1e}",
                "yes" if mine["inside"] else "no",
            ]
        )  # fmt: skip
    note = (
        f"{_shape(entry)}, standard normal inputs, against float64; passed: within the error rule"
    )
    return table(header, lines, text=3) + caption(entry, note)


def rates(entry: Record) -> str:
    """TFLOP/s of the visible pairs."""
    header = ["tokens", "dtype", "mask", "PyTorch, TFLOP/s", "ours, TFLOP/s"]
    lines = []
    for row in _rows(entry, "sequence"):
        sides = [_best(row)["gpu_warm"], row["ours"]["gpu_warm"]]
        rated = ["-" if s is None else f"{row['flops'] / s['p50_us'] / 1e6:.1f}" for s in sides]
        lines.append([f"{row['tokens']:,}", row["dtype"], _mask(row), *rated])
    note = (
        f"{_shape(entry)}; four operations per channel, query and key that it sees. float32 is "
        "computed as six products of bfloat16, which are not counted"
    )
    return table(header, lines, text=3) + caption(entry, note)


def decode(entry: Record) -> str:
    """One token over a cache, beside a read of it."""
    header = [
        "batch", "tokens", "heads", "key heads", "channels", "dtype", "cache, MB", "PyTorch, µs",
        "ours, µs", "a read, µs", "a read / ours", "GB/s", "max error", "PyTorch's max error",
    ]  # fmt: skip
    lines = []
    for row in _rows(entry, "token"):
        mine, theirs, read = row["ours"], row["sdpa"], row["read"]["p50_us"]
        us = None if mine["gpu"] is None else mine["gpu"]["p50_us"]
        ours = ["-", f"{read:.1f}", "-", "-"]
        if us is not None:
            ours = [
                f"{us:.1f}",
                f"{read:.1f}",
                f"{read / us:.2f}",
                f"{row['bytes'] / us / 1e3:.0f}",
            ]
        batch, room, heads, kv, size = (f"{n:,}" for n in row["cache"])
        lines.append(
            [
                batch, room, heads, kv, size, row["dtype"], f"{row['bytes'] / 1e6:.0f}",
                f"{theirs['gpu']['p50_us']:.1f}", *ours, f"{mine['max_error']:.1e}",
                f"{theirs['max_error']:.1e}",
            ]
        )  # fmt: skip
    note = (
        "One query a sequence over a full cache, in a captured graph; medians. A read: a kernel "
        "that only reads the same bytes. PyTorch: scaled_dot_product_attention, which chooses its "
        "backend"
    )
    return table(header, lines, text=0) + caption(entry, note)
