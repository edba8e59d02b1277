"""Beginnings that prompts share: which cache slot holds which tokens, found block by block.

A trie whose edges are blocks of ``BLOCK`` tokens. Each node knows the slots that hold the
tokens up to it, the one that was entered first in front; nothing here is hashed by chance or
depends on a clock, so the same requests find the same slots on every run.
"""

from __future__ import annotations

from typing import Any

import numpy as np

BLOCK = 16  # tokens; beginnings shorter than this are not worth a copy
_BYTES = BLOCK * 4  # of int32
_NOTHING = np.zeros(0, np.int32)


class _Node:
    __slots__ = ("children", "slots")

    def __init__(self) -> None:
        self.children: dict[bytes, _Node] = {}
        self.slots: dict[int, None] = {}  # in the order in which they were entered


class Prefixes:
    """Tokens that the slots of a cache hold, or will hold when their prompts have run.

    Parameters
    ----------
    slots : int

    Attributes
    ----------
    written : list of int
        Tokens of each slot whose keys and values are queued to be written.
    queries, hits : int
        Tokens of prompts that were looked up, and those of them that a slot held.
    """

    def __init__(self, slots: int) -> None:
        self.queries = self.hits = 0
        self._slots = slots
        self.forget()

    def forget(self) -> None:
        """Know nothing of any slot any more."""
        self.written = [0] * self._slots
        self._ids = [_NOTHING] * self._slots
        self._owners: list[Any] = [None] * self._slots
        self._root = _Node()

    def owner(self, slot: int) -> Any:
        """Who entered the slot's tokens."""
        return self._owners[slot]

    def find(self, prompt: np.ndarray, own: int = -1) -> tuple[int, int]:
        """The slot that shares the longest beginning with a prompt, and its length in tokens.

        At most all of the prompt but its last token, whose logits are needed.

        Parameters
        ----------
        prompt : numpy.ndarray of int32 [T]
        own : int
            A slot that holds it already: those that were entered later are left out too, so
            that no two prompts wait for each other.

        Returns
        -------
        (int, int)
            (-1, 0) where no slot shares a block.
        """
        data, node = prompt.tobytes(), self._root
        slot = -1
        end = 0
        while (child := node.children.get(data[end : end + _BYTES])) is not None:
            first = next(iter(child.slots))
            if first == own:
                break
            slot, node, end = first, child, end + _BYTES
        if slot < 0:
            return -1, 0
        shared = end // 4
        ids = self._ids[slot]
        # Behind the last whole block that they share; not all of what may come then is another.
        limit = min(len(prompt) - 1, len(ids), shared + BLOCK)
        if shared < limit:
            other = np.flatnonzero(prompt[shared:limit] != ids[shared:limit])
            shared = shared + int(other[0]) if len(other) else limit
        return slot, min(shared, limit)

    def enter(self, slot: int, ids: np.ndarray, written: int, owner: Any) -> None:
        """Say which tokens a slot will hold, in place of those that it held."""
        self.cut(slot, 0)
        self._owners[slot] = owner
        self.written[slot] = written
        self._add(slot, ids)

    def extend(self, slot: int, owner: Any, ids: np.ndarray) -> None:
        """Add tokens that were generated; nothing happens if the slot is another's by now."""
        if self._owners[slot] is owner:
            self.written[slot] += len(ids)
            self._add(slot, np.concatenate([self._ids[slot], ids]))

    def cut(self, slot: int, length: int) -> None:
        """Forget a slot's tokens beyond the first ``length``."""
        ids = self._ids[slot]
        if length >= len(ids):
            return
        data, node = ids.tobytes(), self._root
        for start in range(0, len(data) - _BYTES + 1, _BYTES):
            block = data[start : start + _BYTES]
            child = node.children[block]
            if start + _BYTES > length * 4:
                del child.slots[slot]
                if not child.slots:  # nor does anybody hold what follows
                    del node.children[block]
            node = child
        self._ids[slot] = ids[:length].copy()
        self.written[slot] = min(self.written[slot], length)

    def _add(self, slot: int, ids: np.ndarray) -> None:
        data, node = ids.tobytes(), self._root
        for start in range(0, len(data) - _BYTES + 1, _BYTES):
            block = data[start : start + _BYTES]
            child = node.children.get(block)
            if child is None:
                child = node.children[block] = _Node()
            child.slots[slot] = None  # one that is there keeps its place
            node = child
        self._ids[slot] = ids
