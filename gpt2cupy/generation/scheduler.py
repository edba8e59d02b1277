"""Who runs next: waiting requests, cache slots, prompt pieces and the rows of a step.

Nothing here touches a device. Every decision follows from the order of submissions and from the
number of steps that were queued, so that the same requests give the same steps on every run.
"""

from __future__ import annotations

import heapq

import numpy as np

from .request import Request


class Sequence:
    """A request on its way through the engine.

    Attributes
    ----------
    request : Request
    number : int
        Its line in :class:`gpt2cupy.generation.results.Results`; -1 before it is admitted.
    slot : int
        Cache slot; -1 before it is admitted.
    row : int
        Row of the decode step; -1 before its prompt has run and after its last step is queued.
    run : int
        Tokens of the prompt that were run.
    limit : int
        Tokens that it may get in all.
    ended : bool
        Whether the caller has, or will never ask for, its last token.
    """

    __slots__ = ("ended", "limit", "number", "request", "row", "run", "slot")

    def __init__(self, request: Request, limit: int) -> None:
        self.request = request
        self.limit = limit
        self.number = self.slot = self.row = -1
        self.run = 0
        self.ended = False

    @property
    def rest(self) -> np.ndarray:
        """The tokens of the prompt that are still to be run."""
        return self.request.prompt[self.run :]


class Piece:
    """Prompt tokens that run at once, packed.

    Attributes
    ----------
    sequences : list of Sequence
    tokens : list of numpy.ndarray
        New tokens of each.
    """

    def __init__(self) -> None:
        self.sequences: list[Sequence] = []
        self.tokens: list[np.ndarray] = []


class Scheduler:
    """Admits sequences to slots, cuts prompts into pieces and keeps the rows of a step compact.

    Parameters
    ----------
    slots : int
        Sequences that may hold a cache slot at once.
    budget : int
        Prompt tokens that may run between two decode steps.
    """

    def __init__(self, slots: int, budget: int) -> None:
        self.budget = budget
        self.rows: list[Sequence] = []  # of the decode step, without gaps
        self.prompts: list[Sequence] = []  # admitted, prompt not yet run to its end
        self._waiting: list[tuple[int, int, Sequence]] = []
        self._order = 0
        self._slots = slots
        self._free = list(range(slots))[::-1]
        self._lines: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def lines(self) -> tuple[np.ndarray, np.ndarray]:
        """Number and cache slot of the sequence in each row."""
        if self._lines is None:
            numbers = np.array([sequence.number for sequence in self.rows], np.int64)
            self._lines = numbers, np.array([sequence.slot for sequence in self.rows], np.int64)
        return self._lines

    @property
    def waiting(self) -> int:
        """Sequences without a slot."""
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        """Whether no sequence waits or runs."""
        return not (self._waiting or self.prompts or self.rows)

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait: smaller ``request.priority`` first, then in order of arrival."""
        heapq.heappush(self._waiting, (sequence.request.priority, self._order, sequence))
        self._order += 1

    def admit(self) -> list[Sequence]:
        """Give free slots to waiting sequences; returns them."""
        admitted = []
        while self._free and self._waiting:
            sequence = heapq.heappop(self._waiting)[2]
            if sequence.ended:  # cancelled while it waited
                continue
            sequence.slot = self._free.pop()
            self.prompts.append(sequence)
            admitted.append(sequence)
        return admitted

    def piece(self) -> Piece:
        """The next prompt tokens within the budget, in order of admission; maybe none."""
        piece, budget = Piece(), self.budget
        for sequence in self.prompts:
            if not budget:
                break
            tokens = sequence.rest[:budget]
            piece.sequences.append(sequence)
            piece.tokens.append(tokens)
            sequence.run += len(tokens)
            budget -= len(tokens)
        return piece

    def enter(self, sequences: list[Sequence]) -> None:
        """Give rows to sequences whose prompts have run: the next ones after those in use."""
        for sequence in sequences:
            self.prompts.remove(sequence)
            sequence.row = len(self.rows)
            self.rows.append(sequence)
        self._lines = None

    def leave(self, sequence: Sequence) -> tuple[int, int] | None:
        """Take slot and row from a sequence.

        Returns
        -------
        (int, int) or None
            Row that has to move, and where to, so that no gap is left.
        """
        if sequence.slot >= 0:
            self._free.append(sequence.slot)
            sequence.slot = -1
        if sequence in self.prompts:
            self.prompts.remove(sequence)
        row, sequence.row = sequence.row, -1
        if row < 0:
            return None
        last = self.rows.pop()
        self._lines = None
        if last is sequence:
            return None
        moved, last.row = last.row, row
        self.rows[row] = last
        return moved, row

    def clear(self) -> list[Sequence]:
        """Forget everything; returns the sequences that waited or ran."""
        left = [*self.rows, *self.prompts, *(entry[2] for entry in self._waiting)]
        for sequence in left:
            sequence.slot = sequence.row = -1
            sequence.ended = True
        self.rows, self.prompts, self._waiting = [], [], []
        self._free = list(range(self._slots))[::-1]
        self._lines = None
        return left


def bucket(rows: int, most: int) -> int:
    """Rows of the step that runs so many: the next power of two, at most ``most``."""
    return min(1 << max(rows - 1, 0).bit_length(), most)
