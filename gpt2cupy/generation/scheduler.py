"""Who runs next: waiting requests, cache slots, prompt pieces and the rows of a step.

Nothing here touches a device. Every decision follows from the order of submissions and from the
number of steps that were queued, so that the same requests give the same steps on every run.
"""

from __future__ import annotations

import bisect
import heapq
from typing import Any

import numpy as np

from .prefixes import Prefixes
from .request import Request


class Sequence:
    """A request on its way through the engine.

    Attributes
    ----------
    request : Request
    number : int
        Its line in :class:`gpt2cupy.generation.results.Results`; -1 before it is admitted.
    order : int
        Of its arrival.
    slot : int
        Cache slot; -1 before it is admitted and after its last step is queued.
    home : int
        The same, and kept when it has left.
    row : int
        Row of the decode step; -1 before its prompt has run and after its last step is queued.
    run : int
        Tokens of the prompt whose keys and values its slot has, run or taken from another slot.
    limit : int
        Tokens that it may get in all.
    match : (int, int, Sequence or None)
        Slot with the longest beginning of its prompt, its length, and whose slot it is.
    ended : bool
        Whether the caller has, or will never ask for, its last token.
    """

    __slots__ = (
        "ended", "home", "limit", "match", "number", "order", "request", "row", "run", "slot",
    )  # fmt: skip

    def __init__(self, request: Request, limit: int) -> None:
        self.request = request
        self.limit = limit
        self.number = self.slot = self.home = self.row = -1
        self.order = self.run = 0
        self.match: tuple[int, int, Any] = (-1, 0, None)
        self.ended = False

    @property
    def rest(self) -> np.ndarray:
        """The tokens of the prompt that are still to be run."""
        return self.request.prompt[self.run :]

    @property
    def rank(self) -> tuple[int, int]:
        """Who goes first: a smaller priority, then who came first."""
        return self.request.priority, self.order


class Piece:
    """Prompt tokens that run at once, packed.

    Attributes
    ----------
    copies : list of (int, int, int)
        Beginnings to be copied before: from slot, to slot, tokens.
    sequences : list of Sequence
    tokens : list of numpy.ndarray
        New tokens of each.
    """

    def __init__(self) -> None:
        self.copies: list[tuple[int, int, int]] = []
        self.sequences: list[Sequence] = []
        self.tokens: list[np.ndarray] = []


class Scheduler:
    """Admits sequences to slots, cuts prompts into pieces and keeps the rows of a step compact.

    A prompt that shares its beginning with what a slot holds takes it from there. Where that slot's
    own prompt has not been run so far, the other waits for it, so that what prompts share runs
    once.

    Parameters
    ----------
    slots : int
        Sequences that may hold a cache slot at once.
    budget : int
        Prompt tokens that may run between two decode steps.

    Attributes
    ----------
    prefixes : Prefixes
        What the slots hold, those that are free too until they are given to another sequence.
    """

    def __init__(self, slots: int, budget: int) -> None:
        self.budget = budget
        self.prefixes = Prefixes(slots)
        self.rows: list[Sequence] = []  # of the decode step, without gaps
        self.prompts: list[Sequence] = []  # admitted, prompt not yet run to its end; by rank
        self._waiting: list[tuple[tuple[int, int], Sequence]] = []
        self._order = 0
        self._slots = slots
        self._free = dict.fromkeys(range(slots))  # the least recently used first
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
        sequence.order = self._order
        self._order += 1
        heapq.heappush(self._waiting, (sequence.rank, sequence))

    def admit(self) -> list[Sequence]:
        """Give free slots to waiting sequences; returns them.

        A free slot that holds the longest beginning of the prompt is kept as it is; else the
        one that was used least recently is given away.
        """
        admitted = []
        while self._free and self._waiting:
            sequence = heapq.heappop(self._waiting)[1]
            if sequence.ended:  # cancelled while it waited
                continue
            prompt = sequence.request.prompt
            slot, shared = self.prefixes.find(prompt)
            if slot in self._free:
                sequence.run = shared
                self._count(sequence)
            else:
                if shared:
                    sequence.match = slot, shared, self.prefixes.owner(slot)
                slot = next(iter(self._free))
            del self._free[slot]
            sequence.slot = sequence.home = slot
            self.prefixes.enter(slot, prompt, sequence.run, sequence)
            bisect.insort(self.prompts, sequence, key=lambda each: each.rank)
            admitted.append(sequence)
        return admitted

    def piece(self) -> Piece:
        """The next prompt tokens within the budget, by rank; maybe none."""
        piece, budget = Piece(), self.budget
        taken: set[Sequence] = set()
        for each in self.prompts:
            if not budget:
                break
            sequence, source, shared = self._first(each)
            if sequence in taken:
                continue
            taken.add(sequence)
            if not sequence.run:
                if shared:
                    piece.copies.append((source, sequence.slot, shared))
                    sequence.run = shared
                self._count(sequence)
            tokens = sequence.rest[:budget]
            piece.sequences.append(sequence)
            piece.tokens.append(tokens)
            sequence.run += len(tokens)
            budget -= len(tokens)
        # What this piece writes can be copied only by the next.
        for sequence in piece.sequences:
            self.prefixes.written[sequence.slot] = sequence.run
        return piece

    def _first(self, sequence: Sequence) -> tuple[Sequence, int, int]:
        """The sequence, or the one whose prompt must run before; and what it takes from where."""
        while not sequence.run:
            source, shared, owner = sequence.match
            if owner is None or owner.slot != source:  # not looked up yet, or it has left
                source, shared = self.prefixes.find(sequence.request.prompt, sequence.slot)
                owner = self.prefixes.owner(source) if shared else None
                sequence.match = source, shared, owner
            if not shared or shared <= self.prefixes.written[source]:
                return sequence, source, shared
            sequence = owner
        return sequence, -1, 0

    def _count(self, sequence: Sequence) -> None:
        """Count what a prompt took from a slot, before its first own token runs."""
        self.prefixes.queries += len(sequence.request.prompt)
        self.prefixes.hits += sequence.run

    def enter(self, sequences: list[Sequence]) -> None:
        """Give rows to sequences whose prompts have run: the next ones after those in use."""
        for sequence in sequences:
            self.prompts.remove(sequence)
            sequence.row = len(self.rows)
            self.rows.append(sequence)
            sequence.match = (-1, 0, None)  # else it would keep what it took from, and so on
        self._lines = None

    def leave(self, sequence: Sequence) -> tuple[int, int] | None:
        """Take slot and row from a sequence.

        Returns
        -------
        (int, int) or None
            Row that has to move, and where to, so that no gap is left.
        """
        if sequence.slot >= 0:
            self._free[sequence.slot] = None
            self.prefixes.cut(sequence.slot, sequence.run)
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
        left = [*self.rows, *self.prompts, *(entry[1] for entry in self._waiting)]
        for sequence in left:
            sequence.slot = sequence.row = -1
            sequence.ended = True
        self.rows, self.prompts, self._waiting = [], [], []
        self._free = dict.fromkeys(range(self._slots))
        self.prefixes.forget()
        self._lines = None
        return left


def bucket(rows: int, most: int) -> int:
    """Rows of the step that runs so many: the next power of two, at most ``most``."""
    return min(1 << max(rows - 1, 0).bit_length(), most)
