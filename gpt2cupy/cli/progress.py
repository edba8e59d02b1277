"""The line on a terminal while kernels are compiled, which happens once."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

_SHORT = 0.5  # seconds: what took less leaves no line behind
_ERASE = "\r\033[K"


class _Line:
    """Shows how far the compiler is; called as :data:`gpt2cupy.ops.core.jobs.Watcher`."""

    def __init__(self) -> None:
        self._since = 0.0
        self._shown = False

    def __call__(self, ended: int, asked: int) -> None:
        if not self._shown:
            self._since = time.monotonic()
        seconds = time.monotonic() - self._since
        kernels = f"{asked} kernel{'s' if asked > 1 else ''}"
        if ended < asked:
            text = f"compiling {kernels} (once) ... {ended} done, {seconds:.1f} s"
        elif seconds < _SHORT:
            text = ""
        else:
            text = f"compiled {kernels} in {seconds:.1f} s; the next start finds them\n"
        self._write(text)
        self._shown = ended < asked

    def clear(self) -> None:
        if self._shown:
            self._write("")

    def _write(self, text: str) -> None:
        print(_ERASE, text, sep="", end="", file=sys.stderr, flush=True)


@contextmanager
def compiling(*, quiet: bool = False) -> Iterator[None]:
    """Show a line while kernels are compiled inside, where stderr is a terminal."""
    if quiet or sys.stderr is None or not sys.stderr.isatty():
        yield
        return
    from ..ops.core import compiler

    line = _Line()
    try:
        with compiler.watched(line):
            yield
    finally:
        line.clear()
