"""Where commands print tables."""

from __future__ import annotations

import sys

import rich.console

_WIDTH = 160  # where no terminal says its own: nothing is cut off in a file or a pipe


class Console(rich.console.Console):
    """rich's console on stdout, whose reader may go away as that of any other output."""

    def __init__(self) -> None:
        super().__init__(width=None if sys.stdout.isatty() else _WIDTH, highlight=False)

    def on_broken_pipe(self) -> None:
        # rich would end the process with exit code 1.
        raise BrokenPipeError
