"""How a table of the documents is written, its caption, and what says where a page was measured."""

from __future__ import annotations

import json
import re
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
    raise InputError(what, remedy="Take it from git again, or measure it again.")


def table(header: Iterable[str], rows: Iterable[Iterable[Any]], text: int = 1) -> str:
    """A Markdown table; the first ``text`` columns are words, the others are figures."""
    names = [*header]
    lines = [names, ["---"] * text + ["---:"] * (len(names) - text), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def caption(entry: Record, what: str) -> str:
    """What was measured, as it stands under a table; the page says once on which device."""
    if not is_complete(entry):
        what += ". The run was cut off: rows are missing"
    return f"\n{what}.\n"


def environment(found: dict[str, Record]) -> str:
    """Device, versions and dates of the records of a page, the most frequent device first."""
    groups: dict[str, list[str]] = {}
    for name, entry in found.items():
        machine = "; ".join(filter(None, (where(entry), versions(entry))))
        groups.setdefault(machine, []).append(name)
    lines = []
    # A GPU first where as many were measured without one.
    order = sorted(groups.items(), key=lambda group: (-len(group[1]), "driver" not in group[0]))
    for machine, names in order:
        dates = sorted({found[name]["date"] for name in names})
        which = f" ({', '.join(f'{name}.json' for name in sorted(names))})" if lines else ""
        when = " to ".join(dict.fromkeys((dates[0], dates[-1])))
        start = "Also measured" if lines else "Measured"
        lines.append(f"{start} on {machine}; {when}{which}.\n")
    return "\n".join(lines)


def kernel(name: str) -> str:
    """A kernel's name as a table shows it: without result, arguments and template arguments.

    Of the template arguments only the functor stays, which says what an elementwise kernel does.
    """
    if name.startswith("Mem"):  # Memcpy and Memset are no kernels
        return name.partition(" (")[0]
    functor = re.findall(r"\b\w*(?:Functor\w*|[a-z]Ops)\b", name)
    plain, depth = "", 0
    for part in re.split(r"([<>(){}]|\(anonymous namespace\))", name):
        if part in ("<", "(", "{"):
            depth += 1
        elif part in (">", ")", "}"):
            depth -= 1
        elif depth == 0 and part != "(anonymous namespace)":
            plain += part
    words = plain.replace("::::", "::").split()
    short = next((w for w in words[::-1] if re.search(r"\w", w)), name).split("::type")[0]
    short = "::".join(short.split("::")[-2:]).removeprefix("native::").strip(":")
    meant = [each for each in functor if each not in short and "Unary" not in each]
    return f"{short}<{meant[-1]}>" if meant else short


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
