"""Byte pair merges in whatever order their file has them.

tiktoken, which is faster, stands for merges that are in the order in which
they were learnt. Where a merge uses what only a later one makes, as in a file
in which a merge stands twice, the rule is that of the ``tokenizers`` library:
of the pairs that stand side by side, the one of the lowest rank is merged
first, at equal ranks the leftmost; of a pair that stands twice the last rank counts.
"""

from __future__ import annotations

import functools
import heapq

import regex

from .vocabulary import WHITE_SPACE

_WORDS = regex.compile(
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++"
    rf"| ?[^{WHITE_SPACE}\p{{L}}\p{{N}}]++|[{WHITE_SPACE}]+(?![^{WHITE_SPACE}])|[{WHITE_SPACE}]+"
)


class Merger:
    """Encodes text by merges.

    Parameters
    ----------
    alphabet : list of int
        Id of each of the 256 bytes.
    rules : list of (int, int, int)
        Left, right and joined token of each merge, in the order of the file.
    """

    def __init__(self, alphabet: list[int], rules: list[tuple[int, int, int]]) -> None:
        self.alphabet = alphabet
        self.rules = {(left, right): (rank, made) for rank, (left, right, made) in enumerate(rules)}
        self._cached = functools.lru_cache(1 << 16)(self._word)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text."""
        ids: list[int] = []
        for word in _WORDS.findall(text):
            # Long ones are rare and would fill the memory.
            ids += (self._cached if len(word) < 200 else self._word)(word)
        return ids

    def _word(self, word: str) -> tuple[int, ...]:
        """Ids of one word: a heap of pairs over a linked list, n log n in its length."""
        ids = [self.alphabet[byte] for byte in word.encode()]
        count = len(ids)
        before, behind = list(range(-1, count - 1)), list(range(1, count + 1))
        heap: list[tuple[int, int, int, int]] = []

        def meet(left: int, right: int) -> None:
            rule = self.rules.get((ids[left], ids[right]))
            if rule is not None:
                heapq.heappush(heap, (rule[0], left, ids[left], ids[right]))

        for place in range(count - 1):
            meet(place, place + 1)
        while heap:
            _, left, first, second = heapq.heappop(heap)
            right = behind[left]
            # The pair may be gone: ids of merged places are -1.
            if right >= count or ids[left] != first or ids[right] != second:
                continue
            ids[left], ids[right] = self.rules[first, second][1], -1
            behind[left] = behind[right]
            if behind[left] < count:
                before[behind[left]] = left
            for one, other in ((before[left], left), (left, behind[left])):
                if one >= 0 and other < count:
                    meet(one, other)
        return tuple(id_ for id_ in ids if id_ >= 0)
