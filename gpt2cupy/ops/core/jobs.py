"""Jobs side by side on all cores, each key once at a time: how compiler.py compiles."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

MOST_THREADS = 32  # each compilation takes about 100 MB of memory

# What a watcher is told: jobs that have ended, and jobs asked for so far.
Watcher = Callable[[int, int], None]


class Jobs:
    """Runs jobs in threads.

    A job whose key is under way is not started again: who asks for it waits for the
    first. Nothing is kept of a job that has ended, so that one that failed may be tried
    again; to find what an earlier one made is the job's own business.

    Parameters
    ----------
    name : str
        Of the threads.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._watchers: list[Watcher] = []
        self._start_anew()
        os.register_at_fork(after_in_child=self._start_anew)

    def _start_anew(self) -> None:
        # The child of a fork has none of its parent's threads, and a lock may have been taken.
        self._lock = threading.Lock()
        self._under_way: dict[Any, Future[Any]] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._ended = self._asked = 0  # since nothing was under way

    def start(self, key: Any, job: Callable[[], Any]) -> Future[Any]:
        """The future of a job, which is started unless its key is under way."""
        with self._lock:
            if (future := self._under_way.get(key)) is not None:
                return future
            if self._pool is None:
                self._pool = ThreadPoolExecutor(threads(), self._name)
            future = self._under_way[key] = self._pool.submit(job)
            self._asked += 1
            self._tell()
        # Not under the lock: a job that has already ended is noticed at once, in this thread.
        future.add_done_callback(lambda _: self._end(key))
        return future

    def _end(self, key: Any) -> None:
        with self._lock:
            del self._under_way[key]
            self._ended += 1
            self._tell()
            if not self._under_way:
                self._ended = self._asked = 0
                if self._pool is not None:
                    self._pool.shutdown(wait=False)  # idle threads would look like work beside us
                    self._pool = None

    def _tell(self) -> None:
        for watcher in self._watchers:
            watcher(self._ended, self._asked)

    @contextlib.contextmanager
    def watched(self, watcher: Watcher) -> Iterator[None]:
        """Tell ``watcher`` of every job that starts or ends meanwhile, from any thread.

        It is told one event after the other, and must ask for no job itself.
        """
        with self._lock:
            self._watchers.append(watcher)
        try:
            yield
        finally:
            with self._lock:
                self._watchers.remove(watcher)


def threads() -> int:
    """Jobs that run at once: one for each core that this process may use."""
    return min(len(os.sched_getaffinity(0)), MOST_THREADS)
