"""Tables of feed-forward networks and whole layers, from the record of bench/layers.py."""

from __future__ import annotations

from collections.abc import Iterable

from .layout import Record, Row, caption, number, table

FEW = 64  # tokens up to which weights are read faster than multiplied
_KINDS = ("float32", "float16", "bfloat16")
_NOTE = (
    "GPU time in a captured graph, medians, beside PyTorch in the same run, under inference_mode, "
    "TF32 off"
)


def _rows(entry: Record, layer: str, few: bool = False) -> list[Row]:
    found = [r for r in entry["results"]["rows"] if r["layer"] == layer]
    found = [r for r in found if (r["tokens"] <= FEW) == few]
    return sorted(found, key=lambda r: _KINDS.index(r["dtype"]))


def _us(side: Row, way: str = "gpu_warm") -> float | None:
    return side[way]["p50_us"] if side[way] else None


def _ms(us: float | None) -> str:
    return "-" if us is None else f"{us / 1e3:.3f}"


def _ratio(theirs: float | None, ours: float | None) -> str:
    return "-" if theirs is None or ours is None else f"{theirs / ours:.2f}"


def _teraflops(row: Row, side: str) -> str:
    us = _us(row[side])
    return "-" if us is None else number(row["flops"] / us / 1e6)


def _kernels(row: Row) -> str:
    names = dict.fromkeys(row["kernels"])
    return ", ".join(name if name == "cuBLASLt" else f"`{name}`" for name in names)


def _errors(row: Row) -> Iterable[str]:
    ours, eager = row["ours"], row["eager"]
    return (f"{e:.1e}" for e in (ours["max_error"], ours["mean_error"], eager["max_error"]))


def _beside(entry: Record, rows: list[Row], about: str, *, stored: bool = False) -> str:
    header = [
        "widths", "dtype", "tokens", "PyTorch eager, ms", "compiled, ms", "ours, ms",
        "speed-up over eager", "over the faster",
        *(["MB not stored"] if stored else []),
        "TFLOP/s", "max error", "mean error", "PyTorch's max error", "kernels",
    ]  # fmt: skip
    lines = []
    for row in rows:
        ours, eager, compiled = (_us(row[name]) for name in ("ours", "eager", "compiled"))
        assert eager is not None and compiled is not None
        saved = [number(row["not_stored_bytes"] / 1e6, 1)] if stored else []
        lines.append(
            [
                row["size"], row["dtype"], row["tokens"], _ms(eager), _ms(compiled), _ms(ours),
                _ratio(eager, ours), _ratio(min(eager, compiled), ours), *saved,
                _teraflops(row, "ours"), *_errors(row), _kernels(row),
            ]
        )  # fmt: skip
    return table(header, lines, text=2) + caption(entry, f"{about} {_NOTE}")


def ffn(entry: Record) -> str:
    """Row k of the earlier projects: three operators against two launches."""
    return _beside(
        entry,
        _rows(entry, "ffn"),
        "PyTorch: linear, tanh GELU, linear. Not stored: the values before the activation, "
        "tokens x inner size. Rows whose kernel is cuBLASLt are the library's, with the activation "
        "in its epilogue.",
        stored=True,
    )


def few(entry: Record) -> str:
    """A few tokens: the weights are read once from memory."""
    header = [
        "widths", "dtype", "tokens", "PyTorch eager, µs", "compiled, µs", "ours, µs",
        "speed-up over the faster", "the same, warm L2",
        "read of the weights, µs", "share of the read", "max error", "PyTorch's max error",
        "kernels",
    ]  # fmt: skip
    lines = []
    for row in _rows(entry, "ffn", few=True):
        sides = [row[name] for name in ("ours", "eager", "compiled")]
        ours, eager, compiled = (_us(side, "gpu_cold") for side in sides)
        warm, *others = (_us(side) for side in sides)
        assert eager is not None and compiled is not None
        read, error = row["read"]["p50_us"], [*_errors(row)]
        shown = ["-" if us is None else f"{us:.1f}" for us in (eager, compiled, ours)]
        lines.append(
            [
                row["size"], row["dtype"], row["tokens"], *shown,
                _ratio(min(eager, compiled), ours), _ratio(min(others), warm), f"{read:.1f}",
                _ratio(read, ours), error[0], error[2], _kernels(row),
            ]
        )  # fmt: skip
    note = (
        "Each call of a graph takes weights of its own, which no cache holds; with a warm L2 all "
        f"take the same. {_NOTE}"
    )
    return table(header, lines, text=2) + caption(entry, note)


def plain(entry: Record) -> str:
    """Row l: layer norms, causal attention, GELU."""
    return _beside(
        entry,
        _rows(entry, "plain"),
        "Layer norm, qkv, causal attention, projection, layer norm, feed-forward network with tanh "
        "GELU, all with biases; batch 1.",
    )


def llama(entry: Record) -> str:
    """A true Llama layer."""
    return _beside(
        entry,
        _rows(entry, "llama"),
        "RMS norm, q, k and v in one product, rotary embedding, causal attention (8 heads of keys "
        "and values at 70B), projection, RMS norm, SwiGLU; batch 1.",
    )


def errors(entry: Record) -> str:
    """Row m, the part of the feed-forward network."""
    header = [
        "widths", "dtype", "tokens", "max error", "mean error", "PyTorch's max error",
        "PyTorch's mean error", "inside the error rule",
    ]  # fmt: skip
    lines = []
    for row in [*_rows(entry, "ffn", few=True), *_rows(entry, "ffn")]:
        sides = row["ours"], row["eager"]
        found = [f"{side[key]:.1e}" for side in sides for key in ("max_error", "mean_error")]
        inside = "yes" if row["ours"]["inside"] else "no"
        lines.append([row["size"], row["dtype"], row["tokens"], *found, inside])
    note = (
        "Against float64 on the same weights. The rule: at most twice PyTorch's error, and an ulp "
        "of the largest value; without it a speed is not shown"
    )
    return table(header, lines, text=2) + caption(entry, note)


def rates(entry: Record) -> str:
    """Row n, the part of the feed-forward network: TFLOP/s at 2048 tokens."""
    header = ["widths", "dtype", "tokens", "ours", "PyTorch eager", "PyTorch compiled"]
    lines = [
        [row["size"], row["dtype"], row["tokens"]]
        + [_teraflops(row, side) for side in ("ours", "eager", "compiled")]
        for row in _rows(entry, "ffn")
        if row["tokens"] == 2048
    ]
    note = f"TFLOP/s: 2 operations for each weight and token. {_NOTE}"
    return table(header, lines, text=2) + caption(entry, note)
