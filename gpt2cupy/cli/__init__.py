"""The command line: ``gpt2cupy generate``, ``score``, ``tokenize``, ``info`` and others.

Text goes to stdout, everything else to stderr. Exit codes: 0 done, 1 an error of
gpt2cupy, 2 wrong usage (an option that is not there, or a value that it cannot have),
130 Ctrl-C, 141 the reader of the output went away.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the ``gpt2cupy`` command."""
    try:
        from .app import app

        app()
    except KeyboardInterrupt:
        # Before a command began; afterwards the command itself ends so.
        sys.exit(130)
