"""A trace in Chrome's format, which Perfetto opens: components nested as they run, and kernels."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

from .result import Profile

Event = dict[str, Any]
_COMPONENTS, _KERNELS = 1, 2


def events(profile: Profile) -> list[Event]:
    """The events of the last run: a slice per token, per component and per kernel."""
    timeline, ops = profile.timeline, profile.ops
    tokens = profile.results["settings"]["tokens"]
    start, end = timeline.start[-tokens:], timeline.end[-tokens:]
    origin = float(start[0, 0])
    found = [_name("process_name", 0, f"gpt2cupy ({timeline.source})")]
    found += [_name("thread_name", _COMPONENTS, "components")]
    found += [_name("thread_name", _KERNELS, "kernels" if profile.ops[0].launches else "ops")]

    def slice_(thread: int, name: str, begin: float, finish: float, **args: Any) -> None:
        where = {"ph": "X", "pid": 0, "tid": thread, "ts": begin - origin}
        found.append({"name": name, **where, "dur": finish - begin, "args": args})

    for token in range(tokens):
        begins, ends = start[token].tolist(), end[token].tolist()
        slice_(_COMPONENTS, f"token {token}", begins[0], ends[-1])
        for names, columns in _nested(profile):
            slice_(_COMPONENTS, names, begins[columns[0]], ends[columns[-1]])
        for column, (index, part) in enumerate(timeline.owner):
            cost = ops[index].costs[part]
            args: dict[str, Any] = {"component": ops[index].label}
            args |= {} if cost is None else {"bytes": cost.bytes, "flops": cost.flops}
            slice_(_KERNELS, timeline.names[column], begins[column], ends[column], **args)
    return found


def _nested(profile: Profile) -> list[tuple[str, list[int]]]:
    """(name, columns) of each component of a step, outer ones before what is in them."""
    owner, ops = profile.timeline.owner, profile.ops
    found = []
    for depth in (1, 2, 3):
        columns = range(len(owner))

        def key(column: int, depth: int = depth) -> tuple[Any, ...]:
            op = ops[owner[column][0]]
            return (op.layer, *op.path[:depth]) if len(op.path) >= depth else ()

        for (layer, *path), group in ((k, list(g)) for k, g in groupby(columns, key) if k):
            name = path[-1] if depth > 1 or layer is None else f"block {layer}"
            found.append((name, group))
    return found


def _name(kind: str, thread: int, name: str) -> Event:
    return {"name": kind, "ph": "M", "pid": 0, "tid": thread, "args": {"name": name}}


def write(profile: Profile, path: Path) -> None:
    """Write the trace; the settings go with it."""
    trace = {
        "traceEvents": events(profile),
        "displayTimeUnit": "ns",
        "otherData": {key: str(value) for key, value in profile.results["settings"].items()},
    }
    path.write_text(json.dumps(trace) + "\n")
