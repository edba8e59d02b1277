"""What running requests have come to: ids and log-probabilities as arrays, ends by array tests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .request import Request, Token

_GROWTH = 64  # lines that the tables begin with
_EMPTY = {"ends": -1, "stops": -1}  # what a new line of a table holds, else 0


@dataclass(frozen=True)
class Finished:
    """A request that has come to its end.

    Attributes
    ----------
    request : Request
    ids : numpy.ndarray of int32 [N]
        All its tokens, an end token included.
    logprobs : numpy.ndarray of float32 [N]
        Of each token under the raw logits.
    finish_reason : str
        "eos", "stop" (the last id is of ``stop_token_ids``), "length", or "error": the logits
        were not finite, and the last id means nothing.
    drafted, accepted : int
        Draft tokens that steps verified, and those of them that were accepted.
    """

    request: Request
    ids: np.ndarray
    logprobs: np.ndarray
    finish_reason: str
    drafted: int = 0
    accepted: int = 0


@dataclass(frozen=True)
class Block:
    """What one step of an engine brought: one token for each of some requests.

    Attributes
    ----------
    keys : list
        Key of the request that each token belongs to.
    ids : numpy.ndarray of int32 [N]
    logprobs : numpy.ndarray of float32 [N]
        Under the raw logits.
    top : (numpy.ndarray of int32 [N, K], numpy.ndarray of float32 [N, K]) or None
        The most probable tokens and their log-probabilities, where a request asks for them;
        ids of -1 beyond as many as the one asks for.
    finished : list of Finished
        Requests whose last token this block holds.
    """

    keys: list[Any]
    ids: np.ndarray
    logprobs: np.ndarray
    top: tuple[np.ndarray, np.ndarray] | None
    finished: list[Finished]


class Results:
    """Tables with a line for each request that runs.

    A line is used again when no step that was queued for it is unread.

    Parameters
    ----------
    capacity : int
        Tokens that one request may get at most.
    """

    def __init__(self, capacity: int) -> None:
        self.ids = np.zeros((0, capacity), np.int32)
        self.logprobs = np.zeros((0, capacity), np.float32)
        self.counts = np.zeros(0, np.int64)  # tokens that were read
        self.queued = np.zeros(0, np.int64)  # tokens chosen, or asked for
        self.limits = np.zeros(0, np.int64)
        self.tops = np.zeros(0, np.int64)  # most probable tokens to give with each
        self.drafted = np.zeros(0, np.int64)  # draft tokens that were verified
        self.accepted = np.zeros(0, np.int64)  # and of them those that were accepted
        self.alive = np.zeros(0, bool)
        # Tokens that end a text, -1 where there are fewer: ends, and those of stop_token_ids.
        self.ends = np.full((0, 1), -1, np.int32)
        self.stops = np.full((0, 1), -1, np.int32)
        self.requests: list[Request | None] = []
        self._free: list[int] = []

    def open(self, request: Request, limit: int) -> int:
        """A line for a request; returns its number."""
        if not self._free:
            self._grow()
        number = self._free.pop()
        self._set_row("ends", number, request.ends)
        self._set_row("stops", number, request.params.stop_token_ids)
        self.counts[number] = self.queued[number] = 0
        self.drafted[number] = self.accepted[number] = 0
        self.limits[number] = limit
        self.tops[number] = request.params.logprobs or 0
        self.alive[number] = True
        self.requests[number] = request
        return number

    def _set_row(self, name: str, number: int, ids: Sequence[int]) -> None:
        table = getattr(self, name)
        if len(ids) > table.shape[1]:
            more = np.full((len(table), len(ids) - table.shape[1]), -1, np.int32)
            table = np.concatenate([table, more], axis=1)
            setattr(self, name, table)
        table[number] = -1
        table[number, : len(ids)] = ids

    def close(self, number: int) -> None:
        """Give a line back; nothing that is still to be read may name it."""
        self.requests[number] = None
        self._free.append(number)

    def clear(self) -> None:
        """Give all lines back; their memory stays, since making it takes as long as a step."""
        self.alive[:] = False
        self.requests = [None] * len(self.requests)
        self._free = list(range(len(self.requests)))[::-1]

    def _grow(self) -> None:
        old = len(self.requests)
        more = max(old, _GROWTH)
        for name in (
            "ids",
            "logprobs",
            "counts",
            "queued",
            "limits",
            "tops",
            "drafted",
            "accepted",
            "alive",
            "ends",
            "stops",
        ):
            array = getattr(self, name)
            wider = np.full((more, *array.shape[1:]), _EMPTY.get(name, 0), array.dtype)
            setattr(self, name, np.concatenate([array, wider]))
        self.requests += [None] * more
        self._free += range(old + more - 1, old - 1, -1)

    def add(
        self,
        numbers: np.ndarray,
        ids: np.ndarray,
        logprobs: np.ndarray,
        top: tuple[np.ndarray, np.ndarray] | None,
    ) -> Block:
        """Take one token for each of some lines; what comes after an end is thrown away."""
        live = self.alive[numbers]
        if not live.all():
            numbers, ids, logprobs = numbers[live], ids[live], logprobs[live]
            top = None if top is None else (top[0][live], top[1][live])
        if top is not None:
            wanted = np.arange(top[0].shape[1]) < self.tops[numbers, None]
            top = np.where(wanted, top[0], np.int32(-1)), top[1]
        places = self.counts[numbers]
        self.ids[numbers, places] = ids
        self.logprobs[numbers, places] = logprobs
        self.counts[numbers] = places + 1
        ended = (ids[:, None] == self.ends[numbers]).any(axis=1)
        stopped = (ids[:, None] == self.stops[numbers]).any(axis=1)
        failed = np.isnan(logprobs)  # how sampling marks logits that are not finite
        over = ended | stopped | failed | (places + 1 >= self.limits[numbers])
        finished = []
        for index in np.flatnonzero(over).tolist():
            reason = "stop" if stopped[index] else "length"
            reason = "error" if failed[index] else "eos" if ended[index] else reason
            finished.append(self._finish(int(numbers[index]), reason))
        requests = self.requests
        keys = [requests[number].key for number in numbers.tolist()]
        return Block(keys, ids, logprobs, top, finished)

    def ask(self, numbers: np.ndarray) -> np.ndarray:
        """Count a token for each of some lines; returns the places of those with no more to ask."""
        self.queued[numbers] += 1
        return np.flatnonzero(self.queued[numbers] >= self.limits[numbers])

    def _finish(self, number: int, reason: str) -> Finished:
        count = self.counts[number]
        self.alive[number] = False
        request = self.requests[number]
        assert request is not None
        ids, logprobs = self.ids[number, :count].copy(), self.logprobs[number, :count].copy()
        drafts = int(self.drafted[number]), int(self.accepted[number])
        return Finished(request, ids, logprobs, reason, *drafts)


def merged(blocks: list[Block]) -> Block:
    """Blocks of different requests as one."""
    if len(blocks) == 1:
        return blocks[0]
    nothing = np.zeros(0, np.int32), np.zeros(0, np.float32)
    ids = np.concatenate([nothing[0], *(block.ids for block in blocks)])
    logprobs = np.concatenate([nothing[1], *(block.logprobs for block in blocks)])
    top = None
    width = max((block.top[0].shape[1] for block in blocks if block.top), default=0)
    if width:
        shape = len(ids), width
        top = np.full(shape, -1, np.int32), np.full(shape, -np.inf, np.float32)
        start = 0
        for block in blocks:
            if block.top:
                for target, source in zip(top, block.top, strict=True):
                    target[start : start + len(block.ids), : source.shape[1]] = source
            start += len(block.ids)
    keys = [key for block in blocks for key in block.keys]
    return Block(keys, ids, logprobs, top, [done for block in blocks for done in block.finished])


def tokens_of(block: Block) -> Iterator[Token]:
    """A block as single tokens."""
    over = {done.request.key: done for done in block.finished}
    pairs = zip(block.keys, block.ids.tolist(), block.logprobs.tolist(), strict=True)
    for index, (key, id_, logprob) in enumerate(pairs):
        top: list[tuple[int, float]] = []
        if block.top is not None:
            best = zip(block.top[0][index].tolist(), block.top[1][index].tolist(), strict=True)
            top = [pair for pair in best if pair[0] >= 0]
        if (done := over.get(key)) is None:
            yield Token(key, id_, logprob, None, top)
        else:
            yield Token(key, id_, logprob, done.finish_reason, top, done.drafted, done.accepted)
