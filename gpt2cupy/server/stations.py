"""Who waits for which of the engine's requests, since when, and how long each part took."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..generation.results import Block
from .metrics import Store

_GROWTH = 256
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
        self._discarded = 0
        self._waiting = 0  # lines that have not been admitted

    def open(self, front: int, stream: int, arrived: float) -> int:
        """A line for a stream."""
        if not self._free:
            self._grow()
        line = self._free.pop()
        self.fronts[line], self.streams[line], self.arrived[line] = front, stream, arrived
        self.admitted[line] = self.first[line] = self.last[line] = np.nan
        self._lines[front, stream] = line
        self._waiting += 1
        return line

    def close(self, line: int, reason: str) -> None:
        """Forget who reads a line; ``reason`` counts an end that no block tells."""
        reader = self.reader(line)
        if self._lines.pop(reader, None) is None:
            return
        self.fronts[line] = -1
        if np.isnan(self.admitted[line]):
            self._waiting -= 1
            self.admitted[line] = 0
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

    def admit(self, scheduler: Any, now: float) -> None:
        """Note who has got a slot in the step that began at ``now``."""
        if not self._waiting:
            return
        held = [*scheduler.rows, *scheduler.prompts]
        lines = np.array([sequence.request.key for sequence in held], np.int64)
        new = lines[np.isnan(self.admitted[lines])]
        self.admitted[new] = now
        self._waiting -= len(new)

    def note(self, block: Block, now: float) -> None:
        """Count what a step brought."""
        lines = np.array(block.keys, np.int64)
        store, last = self.store, self.last[lines]
        begun = np.isnan(last)
        if begun.any():
            new = lines[begun]
            self.first[new] = now
            missed = new[np.isnan(self.admitted[new])]  # admitted and gone in one step
            self.admitted[missed] = now
            self._waiting -= len(missed)
            store.observe("vllm:time_to_first_token_seconds", now - self.arrived[new])
            store.observe("vllm:request_queue_time_seconds", self.admitted[new] - self.arrived[new])
            store.observe("vllm:request_prefill_time_seconds", now - self.admitted[new])
            last = last[~begun]
        if len(last):
            store.observe("vllm:inter_token_latency_seconds", now - last)
        self.last[lines] = now
        prompts = float(self.prompts[lines[begun]].sum())
        store.add("vllm:prompt_tokens", prompts)
        store.add("vllm:generation_tokens", len(lines))
        store.observe("vllm:iteration_tokens_total", np.array([len(lines) + prompts]))
        if block.finished:
            ended = np.array([done.request.key for done in block.finished], np.int64)
            store.observe("vllm:e2e_request_latency_seconds", now - self.arrived[ended])
            store.observe("vllm:request_decode_time_seconds", now - self.first[ended])
            for done in block.finished:
                store.add("vllm:request_success", value=_REASONS[done.finish_reason])

    def sent(self) -> None:
        """All blocks went out: lines that were closed before the step before may be used again."""
        self._free += self._resting[0]
        self._resting = self._resting[1], []

    def gauges(self, engine: Any) -> None:
        """Set what can be looked up in the engine at any time."""
        set_ = self.store.set
        running = len(engine.scheduler.rows) + len(engine.scheduler.prompts)
        set_("vllm:num_requests_running", running)
        set_("vllm:num_requests_waiting", engine.scheduler.waiting)
        cache = engine.cache
        set_(
            "vllm:kv_cache_usage_perc", float(cache.lengths.sum()) / (cache.slots * cache.capacity)
        )

    def _grow(self) -> None:
        old = len(self.fronts)
        more = max(old, _GROWTH)
        for name in ("fronts", "streams", "prompts", "arrived", "admitted", "first", "last"):
            array = getattr(self, name)
            fill = -1 if name == "fronts" else 0
            setattr(self, name, np.concatenate([array, np.full(more, fill, array.dtype)]))
        self._free += range(old + more - 1, old - 1, -1)
