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
    __slots__ = ("block", "children", "parent", "slots")

    def __init__(self, parent: _Node | None = None, block: bytes = b"") -> None:
        self.parent, self.block = parent, block
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
        self.written = [0] * slots
        self._ids = [_NOTHING] * slots
        self._owners: list[Any] = [None] * slots
        self._root = _Node()
        self._paths: list[list[_Node]] = [[] for _ in range(slots)]  # a node for each block

    def forget(self) -> None:
        """Know nothing of any slot any more."""
        # One by one: nodes know their parents, and a trie thrown away as a whole would stay until
        # a garbage collection.
        for slot in range(len(self._ids)):
            self.cut(slot, 0)
            self._owners[slot] = None

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
        slot, shared = -1, 0
        while (child := node.children.get(data[shared * 4 : shared * 4 + _BYTES])) is not None:
            first = next(iter(child.slots))
            if first == own:
                break
            # It may share more than the block: on from where it parts.
            slot, ids = first, self._ids[first]
            limit = min(len(prompt), len(ids))
            differ = prompt[:limit] != ids[:limit]
            common = int(differ.argmax()) if differ.any() else limit
            whole = common // BLOCK
            node, shared = self._paths[slot][whole - 1], whole * BLOCK
        return (slot, min(common, len(prompt) - 1)) if slot >= 0 else (-1, 0)

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
        ids, path = self._ids[slot], self._paths[slot]
        if length >= len(ids):
            return
        for node in path[length // BLOCK :]:
            del node.slots[slot]
            if not node.slots and node.parent is not None:  # nor does anybody hold what follows
                node.parent.children.pop(node.block, None)
        del path[length // BLOCK :]
        self._ids[slot] = ids[:length].copy()
        self.written[slot] = min(self.written[slot], length)

    def _add(self, slot: int, ids: np.ndarray) -> None:
        path = self._paths[slot]
        data, node = ids.tobytes(), path[-1] if path else self._root
        for start in range(len(path) * _BYTES, len(data) - _BYTES + 1, _BYTES):
            block = data[start : start + _BYTES]
            child = node.children.get(block)
            if child is None:
                child = node.children[block] = _Node(node, block)
            child.slots[slot] = None
            path.append(child)
            node = child
        self._ids[slot] = ids
