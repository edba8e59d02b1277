"""Taking turns: one call of a model at a time, whichever thread it comes from."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from .errors import BusyError


class Turns:
    """A lock for calls that may be left open, as a stream is between two pieces.

    Other threads wait. A thread that waited for a stream of its own would wait
    for ever: it gets an error.

    Parameters
    ----------
    name : str
        What is shared, for the error.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._holder = 0

    @contextlib.contextmanager
    def take(self) -> Iterator[None]:
        """Wait for the turn and hold it.

        Raises
        ------
        BusyError
            If the calling thread holds it already.
        """
        if self._holder == threading.get_ident():
            raise BusyError(
                "a stream of this model is still open in this thread",
                where=self._name,
                remedy="Finish it or call its close() first, or load the model once more.",
            )
        with self._lock:
            self.carry()
            try:
                yield
            finally:
                self._holder = 0

    def carry(self) -> None:
        """Note that the turn is now this thread's: a stream may be read by several in turn."""
        self._holder = threading.get_ident()
