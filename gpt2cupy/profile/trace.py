"""A trace in Chrome's format, which Perfetto opens: components nested as they run, and kernels."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from ..output import file_errors
from .result import Profile

Event = dict[str, Any]
_COMPONENTS, _KERNELS = 1, 2  # kernels that overlap take the tracks after these


def events(profile: Profile) -> list[Event]:
    """The events of the last run: a slice per token, per component and per kernel.

    Slices of one track may not overlap: a kernel that starts while another runs goes to
    a track of its own, and a component begins when the one before it has ended.
    """
    timeline, ops = profile.timeline, profile.ops
    tokens = profile.results["settings"]["tokens"]
    start, end = timeline.start[-tokens:], timeline.end[-tokens:]
    origin = float(start[0, 0])
    ended = np.maximum.accumulate(end.reshape(-1))
    # Of each launch: when all before it had ended.
    before = np.concatenate([[origin], ended[:-1]]).reshape(end.shape)
    ended = ended.reshape(end.shape)
    track = tracks(start, end)
    found = [_name("process_name", 0, f"gpt2cupy ({timeline.source})")]
    found += [_name("thread_name", _COMPONENTS, "components")]
    kind = "kernels" if profile.ops[0].launches else "ops"
    for number in range(track.max() + 1):
        name = f"{kind}, overlapping" if number else kind
        found.append(_name("thread_name", _KERNELS + number, name))

    def slice_(thread: int, name: str, begin: float, finish: float, **args: Any) -> None:
        where = {"ph": "X", "pid": 0, "tid": thread, "ts": begin - origin}
        found.append({"name": name, **where, "dur": finish - begin, "args": args})

    for token in range(tokens):
        begins, ends = np.maximum(start, before)[token].tolist(), ended[token].tolist()
        slice_(_COMPONENTS, f"token {token}", begins[0], ends[-1])
        for names, columns in _nested(profile):
            finish = ends[columns[-1]]
            slice_(_COMPONENTS, names, min(begins[columns[0]], finish), finish)
        begins, ends = start[token].tolist(), end[token].tolist()
        for column, (index, part) in enumerate(timeline.owner):
            cost = ops[index].costs[part]
            args: dict[str, Any] = {"component": ops[index].label}
            args |= {} if cost is None else {"bytes": cost.bytes, "flops": cost.flops}
            number = _KERNELS + int(track[token, column])
            slice_(number, timeline.names[column], begins[column], ends[column], **args)
    return found


def tracks(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """The first track of each launch [S, n] on which nothing runs when it starts."""
    free: list[float] = []
    found = []
    for begin, finish in zip(start.reshape(-1).tolist(), end.reshape(-1).tolist(), strict=True):
        number = next((n for n, at in enumerate(free) if at <= begin), len(free))
        free[number : number + 1] = [finish]
        found.append(number)
    return np.array(found).reshape(start.shape)


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
    """Write the trace; the settings go with it.

    Raises
    ------
    Gpt2CupyError
        If the file takes no more.
    """
    trace = {
        "traceEvents": events(profile),
        "displayTimeUnit": "ns",
        "otherData": {key: str(value) for key, value in profile.results["settings"].items()},
    }
    with file_errors(path, "the trace"):
        path.write_text(json.dumps(trace) + "\n")
