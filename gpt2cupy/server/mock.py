"""An engine that costs nothing, to measure what stands around it and to test it under many."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..generation.request import Request
from ..generation.results import Block, Finished


class _Cache:
    """As full as it never gets."""

    slots = capacity = 1
    lengths = np.zeros(1, np.int64)


@dataclass(frozen=True)
class _Running:
    request: Request


class _Scheduler:
    """What runs and waits in a mock engine."""

    def __init__(self) -> None:
        self.rows: list[_Running] = []
        self.prompts: list[_Running] = []
        self.waiting = 0


class MockEngine:
    """Gives every request the next of its prompt's tokens, again and again.

    Parameters
    ----------
    slots : int
    rate : float
        Steps a second at most.
    """

    def __init__(self, slots: int, rate: float) -> None:
        self.slots = slots
        self.scheduler = _Scheduler()
        self.cache = _Cache()
        self.discarded = 0
        self._seconds = 1 / rate
        self._next = 0.0
        self._waiting: deque[Request] = deque()
        self._ids: dict[Any, list[int]] = {}

    @property
    def idle(self) -> bool:
        return not (self.scheduler.rows or self._waiting)

    def submit(self, request: Request) -> Any:
        self._waiting.append(request)
        return request.key

    def cancel(self, key: Any) -> None:
        self._waiting = deque(each for each in self._waiting if each.key != key)
        self.scheduler.rows = [each for each in self.scheduler.rows if each.request.key != key]
        self._ids.pop(key, None)

    def step(self) -> Block:
        now = time.perf_counter()
        if now < self._next:
            time.sleep(self._next - now)
        self._next = max(now, self._next) + self._seconds
        rows = self.scheduler.rows
        while self._waiting and len(rows) < self.slots:
            rows.append(_Running(self._waiting.popleft()))
        self.scheduler.waiting = len(self._waiting)
        keys = [running.request.key for running in rows]
        ids, finished, left = [], [], []
        for running in rows:
            request = running.request
            own = self._ids.setdefault(request.key, [])
            own.append(int(request.prompt[len(own) % len(request.prompt)]))
            ids.append(own[-1])
            if len(own) >= request.params.limit(1 << 30):
                del self._ids[request.key]
                logprobs = np.full(len(own), -1, np.float32)
                finished.append(Finished(request, np.array(own, np.int32), logprobs, "length"))
            else:
                left.append(running)
        self.scheduler.rows = left
        logprobs = np.full(len(ids), -1, np.float32)
        return Block(keys, np.array(ids, np.int32), logprobs, None, finished)
