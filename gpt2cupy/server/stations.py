"""Who waits for which of the engine's requests, since when, and how long each part took.

What a step brought is only noted; it is counted for many steps at once, since the step after it
waits for this.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..generation.results import Block
from .metrics import Store

_GROWTH = 256
_STEPS = 64  # noted before they are counted
# Of a request that ended: vLLM's names of our reasons.
_REASONS = {"eos": "stop", "stop": "stop", "length": "length", "error": "error", "abort": "abort"}


class Stations:
    """Tables with a line for each request in the engine; the line is the request's key.

    Attributes
    ----------
    fronts, streams : numpy.ndarray of int64 [N]
        Who reads it; a front of -1 where nobody does.
    arrived, admitted, first, last : numpy.ndarray of float64 [N]
        When the front had it, when it got a slot, and its first and latest tokens; NaN before.
    prompts : numpy.ndarray of int64 [N]
        Tokens of its prompt.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.fronts = np.full(0, -1, np.int64)
        self.streams = np.zeros(0, np.int64)
        self.prompts = np.zeros(0, np.int64)
        self.arrived = np.zeros(0)
        self.admitted = np.zeros(0)
        self.first = np.zeros(0)
        self.last = np.zeros(0)
        self._free: list[int] = []
        # Closed, but a step that was queued or a block that was kept back may still name them.
        self._resting: tuple[list[int], list[int]] = [], []
        self._lines: dict[tuple[int, int], int] = {}
        self._unadmitted: set[int] = set()
        self._noted: list[tuple[float, list[int]]] = []
        self._ended: list[tuple[int, float, str]] = []
        self._discarded = 0
        self._prefixes = 0, 0

    def open(self, front: int, stream: int, arrived: float, prompt: int) -> int:
        """A line for a stream with a prompt of so many tokens."""
        if not self._free:
            self._grow()
        line = self._free.pop()
        self.fronts[line], self.streams[line] = front, stream
        self.arrived[line], self.prompts[line] = arrived, prompt
        self.admitted[line] = self.first[line] = self.last[line] = np.nan
        self._lines[front, stream] = line
        self._unadmitted.add(line)
        return line

    def close(self, line: int, reason: str = "") -> None:
        """Forget who reads a line; ``reason`` counts an end that no block tells."""
        reader = self.reader(line)
        if self._lines.pop(reader, None) is None:
            return
        self.fronts[line] = -1
        self._unadmitted.discard(line)
        self._resting[1].append(line)
        if reason:
            self.store.add("vllm:request_success", value=_REASONS[reason])

    def reader(self, line: int) -> tuple[int, int]:
        """Front and stream of a line."""
        return int(self.fronts[line]), int(self.streams[line])

    def line_of(self, front: int, stream: int) -> int | None:
        return self._lines.get((front, stream))

    def lines_of(self, front: int) -> list[int]:
        return [line for (of, _), line in self._lines.items() if of == front]

    def open_lines(self) -> list[int]:
        return list(self._lines.values())

    def note(self, block: Block, begun: float, now: float, scheduler: Any) -> None:
        """Take what a step, which began at ``begun``, brought at ``now``."""
        if self._unadmitted:
            held = [*scheduler.rows, *scheduler.prompts]
            new = self._unadmitted.intersection([sequence.request.key for sequence in held])
            # Those that came and went in one step were admitted too.
            new |= self._unadmitted.intersection(block.keys)
            self.admitted[list(new)] = begun
            self._unadmitted -= new
        if block.keys:
            self._noted.append((now, block.keys))
        for done in block.finished:
            self._ended.append((done.request.key, now, done.finish_reason))

    def settle(self, engine: Any, *, now: bool) -> None:
        """Count what was noted, if it is much, or ``now``; all blocks that name lines went out."""
        if len(self._noted) < _STEPS and not now:
            return
        if self._noted:
            self._count_tokens()
        if self._ended:
            self._count_ends()
        self._free += self._resting[0]
        self._resting = self._resting[1], []
        self._set_gauges(engine)

    def _count_tokens(self) -> None:
        steps = [len(keys) for _, keys in self._noted]
        lines = np.array([line for _, keys in self._noted for line in keys], np.int64)
        times = np.repeat([now for now, _ in self._noted], steps)
        step = np.repeat(np.arange(len(steps)), steps)
        self._noted.clear()
        order = np.argsort(lines, kind="stable")
        lines, times, step = lines[order], times[order], step[order]
        new = np.diff(lines, prepend=-1) != 0  # the first token of each line here
        before = np.concatenate([[np.nan], times[:-1]])
        before[new] = self.last[lines[new]]
        last = np.append(new[1:], True)
        self.last[lines[last]] = times[last]
        begun = np.isnan(before)
        store = self.store
        prompts = np.zeros(len(steps))
        if begun.any():
            of, at = lines[begun], times[begun]
            self.first[of] = at
            np.add.at(prompts, step[begun], self.prompts[of])
            store.observe("vllm:time_to_first_token_seconds", at - self.arrived[of])
            queued = self.admitted[of] - self.arrived[of]
            store.observe("vllm:request_queue_time_seconds", np.maximum(queued, 0))
            store.observe("vllm:request_prefill_time_seconds", at - self.admitted[of])
        store.observe("vllm:inter_token_latency_seconds", (times - before)[~begun])
        store.add("vllm:prompt_tokens", float(prompts.sum()))
        store.add("vllm:generation_tokens", len(lines))
        store.observe("vllm:iteration_tokens_total", np.array(steps) + prompts)

    def _count_ends(self) -> None:
        lines = np.array([line for line, _, _ in self._ended], np.int64)
        at = np.array([now for _, now, _ in self._ended])
        store = self.store
        store.observe("vllm:e2e_request_latency_seconds", at - self.arrived[lines])
        store.observe("vllm:request_decode_time_seconds", at - self.first[lines])
        for _, _, reason in self._ended:
            store.add("vllm:request_success", value=_REASONS[reason])
        self._ended.clear()

    def _set_gauges(self, engine: Any) -> None:
        set_, scheduler, cache = self.store.set, engine.scheduler, engine.cache
        set_("vllm:num_requests_running", len(scheduler.rows) + len(scheduler.prompts))
        set_("vllm:num_requests_waiting", scheduler.waiting)
        self.store.add("gpt2cupy:discarded_tokens", engine.discarded - self._discarded)
        self._discarded = engine.discarded
        if (prefixes := getattr(engine, "prefixes", None)) is not None:
            found = prefixes.queries, prefixes.hits
            for name, count, before in zip(("queries", "hits"), found, self._prefixes, strict=True):
                self.store.add(f"vllm:prefix_cache_{name}", count - before)
            self._prefixes = found
        used = float(cache.lengths.sum()) / (cache.slots * cache.capacity)
        set_("vllm:kv_cache_usage_perc", used)

    def _grow(self) -> None:
        old = len(self.fronts)
        more = max(old, _GROWTH)
        for name in ("fronts", "streams", "prompts", "arrived", "admitted", "first", "last"):
            array = getattr(self, name)
            fill = -1 if name == "fronts" else 0
            setattr(self, name, np.concatenate([array, np.full(more, fill, array.dtype)]))
        self._free += range(old + more - 1, old - 1, -1)
