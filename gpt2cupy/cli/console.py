"""Where commands print tables."""

from __future__ import annotations

import sys
from typing import Any

import rich.console

from ..output import stdout_errors

_WIDTH = 160  # where no terminal says its own: nothing is cut off in a file or a pipe


class Console(rich.console.Console):
    """rich's console on stdout, whose reader may go away as that of any other output."""

    def __init__(self) -> None:
        at_terminal = sys.stdout is not None and sys.stdout.isatty()
        super().__init__(width=None if at_terminal else _WIDTH, highlight=False)

    def print(self, *objects: Any, **options: Any) -> None:
        with stdout_errors():
            super().print(*objects, **options)

    def on_broken_pipe(self) -> None:
        # rich would end the process with exit code 1.
        raise BrokenPipeError
