"""Taking turns: one call of a model at a time, whichever thread it comes from."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from ..errors import BusyError


class SessionLock:
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
        self._changed = threading.Condition()
        self._taken = self._over = False
        self._forks = 0  # since this began
        # Not its number, which the next thread may get when this one has ended.
        self._holder: threading.Thread | None = None

    @contextlib.contextmanager
    def take(self) -> Iterator[None]:
        """Wait for the turn and hold it; after :meth:`end` nobody waits.

        Raises
        ------
        BusyError
            If the calling thread holds it already.
        """
        with self._changed:
            self.check_not_mine()
            self._changed.wait_for(lambda: self._over or not self._taken)
            self._taken, forks = True, self._forks
            self.carry()
        try:
            yield
        finally:
            if forks == self._forks:  # else it is the parent's turn that ends
                with self._changed:
                    self._taken, self._holder = False, None
                    self._changed.notify()

    def check_not_mine(self) -> None:
        """Raise BusyError if the calling thread holds the turn: it would wait for itself."""
        if self._holder is threading.current_thread() and not self._over:
            raise BusyError(
                "a stream of this model is still open in this thread",
                where=self._name,
                remedy="Finish it or call its close() first, or load the model once more.",
            )

    def carry(self) -> None:
        """Note that the turn is now this thread's: a stream may be read by several in turn."""
        self._holder = threading.current_thread()

    def after_fork(self) -> None:
        """In a child: nobody has the turn, for the parent's threads are not there."""
        self._changed = threading.Condition()
        self._taken, self._holder = False, None
        self._forks += 1

    def end(self) -> None:
        """Let everyone through: what was shared is gone, and each caller finds that out."""
        with self._changed:
            self._over = True
            self._changed.notify_all()
