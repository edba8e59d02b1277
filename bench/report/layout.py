"""How a table of the documents is written, and the line under it that says where it comes from."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gpt2cupy.errors import InputError
from gpt2cupy.record import is_complete

_VERSIONS = (
    "driver", "CUDA", "nvrtc", "cupy-cuda12x", "cupy-cuda13x", "numpy", "torch", "transformers",
)  # fmt: skip

_FIELDS = {"command", "date", "environment", "results"}

Record = dict[str, Any]
Row = dict[str, Any]


def read(path: Path) -> Record:
    """A record from its file.

    Raises
    ------
    InputError
        If the file cannot be read, or is no record.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        what = f"{path} cannot be read: {error.strerror}"
    except ValueError as error:
        what = f"{path} is no record of a benchmark: {error}"
    else:
        missing = sorted(_FIELDS - found.keys()) if isinstance(found, dict) else sorted(_FIELDS)
        if not missing:
            return found
        what = f"{path} is no record of a benchmark: it has no {', '.join(missing)}"
    raise InputError(what, remedy="Take it from git again, or measure anew.")


def table(header: Iterable[str], rows: Iterable[Iterable[Any]], text: int = 1) -> str:
    """A Markdown table; the first ``text`` columns are words, the others are figures."""
    names = [*header]
    lines = [names, ["---"] * text + ["---:"] * (len(names) - text), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def source_line(entry: Record, what: str) -> str:
    """What was measured, where and when, as it stands under a table."""
    if not is_complete(entry):
        what += ". The run was cut off: rows are missing"
    return f"\n{what}. {where(entry)}; {versions(entry)}; {entry['date']}.\n"


def device(entry: Record) -> str:
    return entry["environment"].get("gpu") or entry["environment"]["cpu"]


def where(entry: Record) -> str:
    """The device, with its clocks where the record has them."""
    found = entry["environment"]
    if "sm_clock_mhz" not in found:
        return device(entry)
    clocks = f"SMs at {found['sm_clock_mhz']} of {found.get('max_sm_clock_mhz', '?')} MHz"
    return f"{device(entry)}, {clocks}, memory at {found.get('memory_clock_mhz', '?')} MHz"


def versions(entry: Record) -> str:
    """The versions that a figure may depend on, as far as the record has them."""
    found = dict(entry["environment"])
    if number := found.get("cuda_driver"):
        found["CUDA"] = f"{number // 1000}.{number % 1000 // 10}"
    return ", ".join(f"{name} {found[name]}" for name in _VERSIONS if name in found)


def number(value: float, digits: int = 0) -> str:
    return f"{value:,.{digits}f}"


def spread(timing: Row, scale: float = 1.0, digits: int = 0) -> str:
    """Median with p10 and p90, in microseconds over ``scale``."""
    median, low, high = (timing[key] / scale for key in ("median_us", "p10_us", "p90_us"))
    return f"{number(median, digits)} ({number(low, digits)} to {number(high, digits)})"


def rate(batch: int, timing: Row) -> float:
    """Tokens per second of a step."""
    return 1e6 * batch / timing["median_us"]


def left_out(results: Row) -> str:
    """What was skipped, as a clause of the line under a table."""
    found = [f"{name}: {reason}" for name, reason in results.get("skipped", {}).items()]
    return f". Left out: {'; '.join(found)}" if found else ""
