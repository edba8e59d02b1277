"""Tables of steps against batch and context, and what was asked of them."""

from __future__ import annotations

from collections.abc import Callable

from .layout import Record, Row, caption, left_out, number, spread, table

DTYPES = ("float16", "bfloat16", "float32")
Found = dict[str, Record]


def batches(entry: Record) -> str:
    """Steps against the batch."""
    results = entry["results"]
    rows = [row for row in results["rows"] if row["batch"] > 1 or row["context"] == results["at"]]
    first = results["rows"][0]["dtype"]  # the others have batch 1 alone
    return steps(entry, [row for row in rows if row["dtype"] == first])


def contexts(entry: Record) -> str:
    """Steps of batch 1 against the context."""
    return steps(entry, [row for row in entry["results"]["rows"] if row["batch"] == 1])


def steps(entry: Record, rows: list[Row]) -> str:
    """Rows of bench/batches.py."""
    results = entry["results"]
    lines = []
    for row in sorted(rows, key=lambda row: (DTYPES.index(row["dtype"]), row["batch"])):
        us, read = row["step"]["median_us"], row.get("read", {}).get("median_us")
        share = [number(read), f"{us / read:.2f}"] if read else ["-", "-"]
        names = [row["dtype"], row["batch"], row["context"], row["decode"]]
        lines.append([*names, spread(row["step"]), *share, number(row["tokens_per_second"])])
    header = ["dtype", "batch", "context", "decode", "step, µs (p10 to p90)", "roofline, µs"]
    note = (
        f"GPT-2 {results['rows'][0]['model']}, random weights, medians between events on the "
        f"device. Roofline: a kernel that only reads the weights once and the keys and values of "
        f"the context, in the same run{left_out(results)}"
    )
    return table([*header, "step / roofline", "tokens/s"], lines) + caption(entry, note)


Find = Callable[[Found], float]  # raises LookupError where a record does not have it


def _point(found: Found, dtype: str, batch: int, context: int) -> Row:
    wanted = {"model": "124M", "dtype": dtype, "batch": batch, "context": context}
    return _row(found["batches"], wanted)


def _step(dtype: str, batch: int, context: int) -> Find:
    """Microseconds of batches.json."""
    return lambda found: _point(found, dtype, batch, context)["step"]["median_us"]


def _over_read(batch: int, context: int) -> Find:
    """A step in float16 over the memory roofline."""

    def find(found: Found) -> float:
        row = _point(found, "float16", batch, context)
        return row["step"]["median_us"] / row["read"]["median_us"]

    return find


def _over_context(context: int, other: int) -> Find:
    """A step in float16 at batch 1 over one at another context."""
    steps = _step("float16", 1, context), _step("float16", 1, other)
    return lambda found: steps[0](found) / steps[1](found)


def _size(model: str, name: str = "decode-sizes") -> Find:
    """A step of float16 in that record, by its fastest path, over the memory roofline."""

    def find(found: Found) -> float:
        wanted = {"model": model, "dtype": "float16", "batch": 1, "gemv": "ours"}
        first = [row["steps"][0] for row in _rows(found[name], wanted)]
        return min(step["step"]["median_us"] / step["read"]["median_us"] for step in first)

    return find


def _prompt(tokens: int, what: str) -> Find:
    """Milliseconds of prefill.json."""

    def find(found: Found) -> float:
        wanted = {"model": "124M", "dtype": "float16", "tokens": tokens}
        return _row(found["prefill"], wanted)[what]["median_us"] / 1e3

    return find


def _start(found: Found) -> float:
    return found["startup"]["results"]["warm"]["median_us"] / 1e6


def _row(entry: Record, wanted: Row) -> Row:
    """The row with these values, or LookupError."""
    return _rows(entry, wanted)[0]


def _rows(entry: Record, wanted: Row) -> list[Row]:
    """The rows with these values, or LookupError."""
    rows = entry["results"]["rows"]
    found = [row for row in rows if all(row.get(key) == each for key, each in wanted.items())]
    if not found:
        raise LookupError(wanted)
    return found


# What, its unit and digits, what it must reach on an H200, what is reached for, the figure.
GOALS: tuple[tuple[str, str, float, float, Find], ...] = (
    ("124M float16, batch 1, context 256, a token", "µs", 130, 100, _step("float16", 1, 256)),
    ("124M bfloat16, batch 1, context 256, a token", "µs", 130, 100, _step("bfloat16", 1, 256)),
    ("124M float16, context 1000 over 128", "x", 1.25, 1.15, _over_context(1000, 128)),
    ("124M float32, batch 1, context 256, a token", "µs", 165, 130, _step("float32", 1, 256)),
    (
        "355M float16, batch 1, over the memory roofline",
        "x",
        1.4,
        1.2,
        _size("355M"),
    ),
    (
        "774M float16, batch 1, over the memory roofline",
        "x",
        1.3,
        1.15,
        _size("774M"),
    ),
    (
        "1558M float16, batch 1, over the memory roofline",
        "x",
        1.2,
        1.1,
        _size("1558M"),
    ),
    (
        "1558M int8, batch 1, over the memory roofline",
        "x",
        1.45,
        1.25,
        _size("1558M", "decode-int8"),
    ),
    ("124M float16, batch 4, context 256, a step", "µs", 160, 120, _step("float16", 4, 256)),
    ("124M float16, batch 16, context 256, a step", "µs", 230, 170, _step("float16", 16, 256)),
    ("124M float16, batch 64, context 256, a step", "µs", 420, 340, _step("float16", 64, 256)),
    (
        "124M float16, batch 256, context 512, over the memory roofline",
        "x",
        1.4,
        1.2,
        _over_read(256, 512),
    ),
    ("124M float16, prompt of 128", "ms", 0.4, 0.25, _prompt(128, "device")),
    ("124M float16, prompt of 512", "ms", 0.6, 0.4, _prompt(512, "device")),
    ("124M float16, prompt of 1024", "ms", 0.85, 0.65, _prompt(1024, "device")),
    ("first token of a prompt of 128, in Python", "ms", 0.7, 0.4, _prompt(128, "first_token")),
    ("`gpt2cupy generate`, first token, caches warm", "s", 1.5, 1.0, _start),
)
_DIGITS = {"µs": 0, "ms": 2, "s": 2, "x": 2}


# The records that the figures are taken from, beside batches.json.
GOALS_USE = ("decode-sizes", "decode-int8", "prefill", "startup")


def goals(found: Found) -> str:
    """What was asked for on an H200 beside what the records say."""
    lines = []
    for what, unit, must, reach, find in GOALS:
        try:
            figure: float | None = find(found)
        except LookupError:  # the record or the row is not there yet
            figure = None
        word = "-"
        if figure is not None:
            word = "goal" if figure <= reach else "yes" if figure <= must else "no"
        figures = ["-" if f is None else number(f, _DIGITS[unit]) for f in (must, reach, figure)]
        lines.append([f"{what}, {unit}" if unit != "x" else what, *figures, word])
    absent = any("-" in line for line in lines)
    dash = "; - where no record has the figure yet" if absent else ""
    note = (
        f"Medians{dash}. Over the memory roofline of larger sizes: the faster path at context 128, "
        f"whichever `auto` takes"
    )
    return table(["what", "at most", "goal", "measured", "reached"], lines) + caption(
        found["batches"], note
    )
