"""The table of the GPU tests, and which of them a record is of."""

from __future__ import annotations

import itertools
import shlex

from .layout import Record, caption, device, table


def gpu_tests(entry: Record) -> str:
    results = entry["results"]
    counts = [results["passed"], len(results["failed"]), len(results["skipped"])]
    header = ["GPU tests", "passed", "failed", "skipped"]
    chip = results.get("chip")
    who = device(entry) + (f", as {chip} with {results['sms']} SMs" if chip else "")
    note = f"`{entry['command']}`{_selection(entry)}"
    return table(header, [[who, *counts]]) + caption(entry, note)


def _selection(entry: Record) -> str:
    """In words what of the tests ran, where it was not all of them."""
    words = shlex.split(entry["command"])
    keywords = [after for word, after in itertools.pairwise(words) if word == "-k"]
    files = [word.removeprefix("tests/") for word in words if word.startswith("tests/")]
    parts = [f"those of {', '.join(files)}"] if files else []
    parts += [f"selected by -k {shlex.quote(keyword)}" for keyword in keywords]
    missing = entry["results"].get("not_run", 0)
    if not parts and not missing:
        return ""
    only = ", ".join(["Not all of the GPU tests", *parts])
    return f". {only}" + (f"; {missing:,} did not run" if missing else "")
