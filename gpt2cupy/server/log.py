"""A line of JSON on stderr for each request; what was asked and answered only where it is asked."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from typing import Any

import msgspec

from .settings import Settings

_MOST = 10_000  # lines that may wait for whoever reads stderr


class Log:
    """Writes lines in a thread of its own: a reader of stderr that halts does not halt the server.

    Parameters
    ----------
    settings : Settings
        ``quiet`` leaves out all but errors, ``log_prompts`` adds prompts.
    """

    def __init__(self, settings: Settings) -> None:
        self.prompts = settings.log_prompts
        self._quiet = settings.quiet
        self._lines: deque[bytes] = deque()
        self._lost = 0
        self._some = threading.Event()
        threading.Thread(target=self._write, daemon=True).start()

    def request(self, status: int, **about: Any) -> None:
        """A request that was answered."""
        if not self._quiet or status >= 500:
            self.line("request", status=status, **about)

    def line(self, event: str, **about: Any) -> None:
        """Any other line."""
        now = time.time()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1e3):03}Z"
        self._add(msgspec.json.encode({"time": stamp, "event": event, **about}))

    def text(self, line: str) -> None:
        """A line for people."""
        self._add(line.encode("utf-8", "replace"))

    def _add(self, line: bytes) -> None:
        if len(self._lines) >= _MOST:
            self._lost += 1
            return
        self._lines.append(line + b"\n")
        self._some.set()

    def flush(self, seconds: float = 1.0) -> None:
        """Wait until all lines are written, but no longer than that."""
        end = time.monotonic() + seconds
        while self._lines and time.monotonic() < end:
            time.sleep(0.005)

    def _write(self) -> None:
        while True:
            self._some.wait()
            self._some.clear()
            while self._lines:
                lines = [self._lines[i] for i in range(min(len(self._lines), 256))]
                with contextlib.suppress(OSError):  # nobody reads any more
                    _write_all(b"".join(lines))
                for _ in lines:
                    self._lines.popleft()
                if lost := self._lost:
                    self._lost = 0
                    self.line("log_lines_lost", count=lost)


def _write_all(data: bytes) -> None:
    while data:
        data = data[os.write(2, data) :]
