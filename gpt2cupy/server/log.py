"""A line of JSON on stderr for each request; what was asked and answered only where it is asked."""

from __future__ import annotations

import os
import time
from typing import Any

import msgspec

from .settings import Settings


class Log:
    """Writes lines.

    Parameters
    ----------
    settings : Settings
        ``quiet`` leaves out all but errors, ``log_prompts`` adds prompts.
    """

    def __init__(self, settings: Settings) -> None:
        self.prompts = settings.log_prompts
        self._quiet = settings.quiet

    def request(self, status: int, **about: Any) -> None:
        """A request that was answered."""
        if not self._quiet or status >= 500:
            self.line("request", status=status, **about)

    def line(self, event: str, **about: Any) -> None:
        now = time.time()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1e3):03}Z"
        found = {"time": stamp, "event": event, **about}
        os.write(2, msgspec.json.encode(found) + b"\n")
