"""What changed between two records, beyond the noise of either."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

# What names a row, in this order; everything else in it is a figure or a remark.
IDENTITY = (
    "model", "dtype", "batch", "shape", "tokens", "context", "decode", "decoder", "gemv", "off",
    "component", "kernel", "name", "kind", "causal", "what", "engine", "layer", "rate", "clients",
    "lengths", "part", "size", "rows", "cache",
)  # fmt: skip
TIMING = {"median_us", "p10_us", "p90_us"}


def timings(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, dict[str, float]]]:
    """(name, timing) of every timing in a record's results, wherever it stands."""
    if isinstance(value, dict):
        if value.keys() >= TIMING:
            yield " / ".join(path), value
            return
        for key, inner in value.items():
            yield from timings(inner, (*path, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from timings(inner, (*path, _label(inner) or str(number)))


def _label(row: Any) -> str:
    if not isinstance(row, dict):
        return ""
    return " ".join(f"{key} {row[key]}" for key in IDENTITY if row.get(key) not in (None, ""))


def compared(a: dict[str, Any], b: dict[str, Any]) -> Iterator[str]:
    """A line per timing that changed beyond the noise, then what only one record has.

    Two timings differ beyond the noise when the range from p10 to p90 of one lies
    wholly above that of the other.
    """
    before, after = dict(timings(a["results"])), dict(timings(b["results"]))
    for key in ("gpu", "driver", "sm_clock_mhz", "memory_clock_mhz", "nvrtc", "cpu"):
        values = [str(entry["environment"].get(key, "-")) for entry in (a, b)]
        if values[0] != values[1]:
            yield f"{key}: {values[0]} -> {values[1]}"
    both = [name for name in before if name in after]
    changed = 0
    for name in both:
        old, new = before[name], after[name]
        slower, faster = new["p10_us"] > old["p90_us"], new["p90_us"] < old["p10_us"]
        if slower or faster:
            changed += 1
            change = new["median_us"] / old["median_us"] - 1
            word = "slower" if slower else "faster"
            yield f"{word} {change:+.1%}: {name}: {_range(old)} -> {_range(new)}"
    for where, names in (("first", before.keys() - after), ("second", after.keys() - before)):
        yield from (f"only in the {where}: {name}" for name in sorted(names))
    if not before and not after:
        yield "neither record holds a timing with its spread"
    elif not both:
        yield "the records have no timing in common: nothing was compared"
    else:
        yield f"{changed} of {len(both)} timings changed beyond the noise"


def _range(timing: dict[str, float]) -> str:
    low, high = timing["p10_us"], timing["p90_us"]
    return f"{timing['median_us']:.1f} us ({low:.1f} to {high:.1f})"
