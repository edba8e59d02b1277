"""Completions from the blocks that an engine gives: a text is made once, at its end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import TokenizerError
from ..tokenizer import Tokenizer
from .request import Request
from .results import Block
from .text import Completion, text_of

REPLACEMENT = "\ufffd"  # what bytes that are no character become


class _MayEnd(dict[int, bool]):
    """Whether a token can be the one that completes a stop string: it has its last byte.

    Parameters
    ----------
    tokenizer : Tokenizer
    last : frozenset of int
        Last bytes of the stop strings; empty where any token may.
    """

    def __init__(self, tokenizer: Tokenizer, last: frozenset[int]) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._last = last

    def __missing__(self, id_: int) -> bool:
        try:
            found = not self._last or not self._last.isdisjoint(self._tokenizer.decode_bytes([id_]))
        except TokenizerError:  # it has no bytes
            found = False
        self[id_] = found
        return found


class StopFinder:
    """Looks for stop strings in the tokens of growing continuations.

    A token that cannot complete one is not looked at; else the last tokens are decoded, as many
    as a stop string may have bytes.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ends: dict[frozenset[int], _MayEnd] = {}

    def may_end(self, stops: Sequence[str]) -> _MayEnd:
        """Tokens that may complete one of some stop strings."""
        # Bytes of several tokens may become U+FFFD together: any of them may be the last.
        odd = any(REPLACEMENT in stop for stop in stops)
        last = frozenset() if odd else frozenset(stop.encode()[-1] for stop in stops)
        if last not in self._ends:
            self._ends[last] = _MayEnd(self._tokenizer, last)
        return self._ends[last]

    def found(self, stops: Sequence[str], ids: np.ndarray) -> bool:
        """Whether the text of ids has a stop string that their last token completes."""
        if any(REPLACEMENT in stop for stop in stops):
            stream = self._tokenizer.stream()
            text = "".join(map(stream.push, ids.tolist()))
        else:
            depth = max(len(stop.encode()) for stop in stops)
            text = text_of(self._tokenizer, ids[-depth:].tolist())
        return any(stop in text for stop in stops)


class _Tables:
    """What has come of requests whose tokens are needed one by one, a line for each.

    Arrays, since millions of small lists would keep the garbage collector busy.

    Attributes
    ----------
    ids : numpy.ndarray of int32 [lines, tokens]
    logprobs : numpy.ndarray of float32 [lines, tokens]
    top : (int32 [lines, tokens, K], float32 [lines, tokens, K])
        Most probable tokens and their log-probabilities.
    counts : numpy.ndarray of int64 [lines]
        Tokens of each line.
    """

    def __init__(self) -> None:
        self.ids = np.zeros((0, 0), np.int32)
        self.logprobs = np.zeros((0, 0), np.float32)
        self.top = np.zeros((0, 0, 0), np.int32), np.zeros((0, 0, 0), np.float32)
        self.counts = np.zeros(0, np.int64)
        self.lines: dict[Any, int] = {}
        self._free: list[int] = []

    def open(self, key: Any, most: int) -> None:
        """A line for a request, which wants so many of the most probable tokens."""
        if not self._free:
            lines = len(self.counts)
            self._grow(max(2 * lines, 16), self.ids.shape[1], self.top[0].shape[2])
            self._free = list(range(lines, len(self.counts)))
        if most > self.top[0].shape[2]:
            self._grow(*self.ids.shape, most)
        line = self._free.pop()
        self.counts[line] = 0
        self.lines[key] = line

    def close(self, key: Any) -> int:
        """Give a line back; returns its number, which is valid until the next is opened."""
        line = self.lines.pop(key)
        self._free.append(line)
        return line

    def push(self, block: Block) -> None:
        """Take the tokens of a block that belong to lines."""
        get = self.lines.get
        numbers = np.array([get(key, -1) for key in block.keys], np.int64)
        rows: Any = numbers >= 0
        if rows.all():
            rows = slice(None)
        numbers = numbers[rows]
        places = self.counts[numbers]
        if len(places) and (last := int(places.max())) >= self.ids.shape[1]:
            self._grow(len(self.ids), 2 * last + 32, self.top[0].shape[2])
        self.ids[numbers, places] = block.ids[rows]
        self.logprobs[numbers, places] = block.logprobs[rows]
        if block.top is not None:
            # A block is as wide as the request asks for that asks for the most, or as the
            # vocabulary; the tables are as wide as any ever asked for.
            width = min(block.top[0].shape[1], self.top[0].shape[2])
            self.top[0][numbers, places, width:] = -1
            for table, values in zip(self.top, block.top, strict=True):
                table[numbers, places, :width] = values[rows, :width]
        self.counts[numbers] = places + 1

    def _grow(self, lines: int, tokens: int, most: int) -> None:
        def larger(table: np.ndarray, *shape: int) -> np.ndarray:
            new = np.zeros(shape, table.dtype)
            new[tuple(slice(size) for size in table.shape)] = table
            return new

        self.ids = larger(self.ids, lines, tokens)
        self.logprobs = larger(self.logprobs, lines, tokens)
        ids, values = self.top
        self.top = larger(ids, lines, tokens, most), larger(values, lines, tokens, most)
        self.counts = larger(self.counts, lines)


class Collector:
    """Makes completions of what an engine gives.

    Parameters
    ----------
    tokenizer : Tokenizer
    decimals : int, optional
        Digits of log-probabilities after the point, for those who write them: a number of seven
        digits takes half the time of one of seventeen. They are exact by default.
    """

    def __init__(self, tokenizer: Tokenizer, decimals: int | None = None) -> None:
        self.tokenizer = tokenizer
        self._decimals = decimals
        self._finder = StopFinder(tokenizer)
        self._done: list[tuple[Request, Completion]] = []
        self._tables = _Tables()
        self._expected: set[Any] = set()
        self._watched: dict[Any, tuple[Request, _MayEnd]] = {}  # those with stop strings

    def add(self, request: Request) -> None:
        """Expect tokens of a request; one that asks for none is done."""
        params = request.params
        if params.max_new_tokens == 0:
            self._complete(request, np.zeros(0, np.int32), np.zeros(0, np.float32), "length")
            return
        self._expected.add(request.key)
        if params.stop:
            self._watched[request.key] = request, self._finder.may_end(params.stop)
        if params.stop or params.logprobs:
            self._tables.open(request.key, params.logprobs or 0)

    def push(self, block: Block) -> list[Any]:
        """Take a block; returns the keys of requests that have met a stop string."""
        if self._tables.lines:
            self._tables.push(block)
        stopped = self._stopped(block) if self._watched else []
        for done in block.finished:
            if done.request.key not in self._expected:
                continue
            self._watched.pop(done.request.key, None)
            drafts = done.drafted, done.accepted
            self._complete(done.request, done.ids, done.logprobs, done.finish_reason, drafts)
        return stopped

    def _stopped(self, block: Block) -> list[Any]:
        """Complete those that have met a stop string."""
        found, stopped, tables = self._watched, [], self._tables
        finished = {done.request.key for done in block.finished}
        for key, id_ in zip(block.keys, block.ids.tolist(), strict=True):
            # The last token of a text is looked at with its end.
            if (watched := found.get(key)) is None or not watched[1][id_] or key in finished:
                continue
            request, line = watched[0], tables.lines[key]
            ids = tables.ids[line, : tables.counts[line]]
            if self._finder.found(request.params.stop, ids):
                del found[key]
                logprobs = tables.logprobs[line, : len(ids)]
                self._complete(request, ids, logprobs, "stop string")
                stopped.append(key)
        return stopped

    def forget(self, key: Any) -> None:
        """Expect no more of a request that was cancelled."""
        self._expected.discard(key)
        self._watched.pop(key, None)
        if key in self._tables.lines:
            self._tables.close(key)

    def _complete(
        self,
        request: Request,
        ids: np.ndarray,
        logprobs: np.ndarray,
        reason: str,
        drafts: tuple[int, int] = (0, 0),
    ) -> None:
        self._expected.discard(request.key)
        params, tokens = request.params, ids.tolist()
        shown = tokens if reason in ("length", "stop string") else tokens[:-1]
        text = "" if reason == "error" else text_of(self.tokenizer, shown)
        ends = [place for stop in params.stop if (place := text.find(stop)) >= 0]
        if ends:
            text, reason = text[: min(ends)], "stop"
        values, top = self._listed(logprobs), self._top(request, len(tokens))
        prompt, seed = request.prompt.tolist(), seed_of(request)
        made = Completion(text, tokens, values, reason, prompt, top, seed, *drafts)
        self._done.append((request, made))

    def _top(self, request: Request, count: int) -> list[list[tuple[int, float]]]:
        """The most probable tokens of each step; gives the line of a request back."""
        if request.key not in self._tables.lines:
            return [[]] * count
        line, most = self._tables.close(request.key), request.params.logprobs
        if not most or not count:
            return [[]] * count
        ids, values = (table[line, :count, :most] for table in self._tables.top)
        steps = zip(ids.tolist(), self._listed(values), strict=True)
        if ids[:, -1].min() >= 0:
            return [list(zip(*step, strict=False)) for step in steps]
        # A vocabulary may have fewer tokens than are asked for.
        return [[pair for pair in zip(*step, strict=False) if pair[0] >= 0] for step in steps]

    def _listed(self, logprobs: np.ndarray) -> list[Any]:
        if self._decimals is not None:
            logprobs = logprobs.astype(np.float64).round(self._decimals)
        return logprobs.tolist()

    def take(self) -> list[tuple[Request, Completion]]:
        """Requests that have come to their ends since it was last called."""
        done, self._done = self._done, []
        return done


def seed_of(request: Request) -> int | None:
    """What a request's random numbers come from; None in greedy decoding."""
    params = request.params
    if params.greedy or params.seed is None:
        return None
    return (params.seed + request.index) % 2**64
