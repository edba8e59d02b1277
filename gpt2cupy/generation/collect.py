"""Completions from the blocks that an engine gives: a text is made once, at its end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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

    def found(self, stops: Sequence[str], ids: Sequence[int]) -> bool:
        """Whether the text of ids has a stop string that their last token completes."""
        if any(REPLACEMENT in stop for stop in stops):
            stream = self._tokenizer.stream()
            text = "".join(map(stream.push, ids))
        else:
            depth = max(len(stop.encode()) for stop in stops)
            text = text_of(self._tokenizer, ids[-depth:])
        return any(stop in text for stop in stops)


class _Watched:
    """A continuation with stop strings, which are looked for after each of its tokens."""

    __slots__ = ("ids", "logprobs", "may_end", "request")

    def __init__(self, request: Request, may_end: _MayEnd) -> None:
        self.request = request
        self.may_end = may_end
        self.ids: list[int] = []
        self.logprobs: list[float] = []


class Collector:
    """Makes completions of what an engine gives.

    Parameters
    ----------
    tokenizer : Tokenizer
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._finder = StopFinder(tokenizer)
        self._done: list[tuple[Request, Completion]] = []
        self._watched: dict[Any, _Watched] = {}
        # Ids and log-probabilities of the most probable tokens, a pair of lists for each step.
        self._tops: dict[Any, list[tuple[list[int], list[float]]]] = {}

    def add(self, request: Request) -> None:
        """Expect tokens of a request; one that asks for none is done."""
        params = request.params
        if params.max_new_tokens == 0:
            self._complete(request, [], [], "length")
            return
        if params.stop:
            self._watched[request.key] = _Watched(request, self._finder.may_end(params.stop))
        if params.logprobs:
            self._tops[request.key] = []

    def push(self, block: Block) -> list[Any]:
        """Take a block; returns the keys of requests that have met a stop string."""
        if block.top is not None and self._tops:
            tops, columns = self._tops, (block.top[0].tolist(), block.top[1].tolist())
            for key, ids, logprobs in zip(block.keys, *columns, strict=True):
                if key in tops:
                    tops[key].append((ids, logprobs))
        stopped = self._push_watched(block) if self._watched else []
        for done in block.finished:
            watched = self._watched.pop(done.request.key, None)
            if watched is None:
                ids, logprobs = done.ids.tolist(), done.logprobs.tolist()
            else:
                ids, logprobs = watched.ids, watched.logprobs
            self._complete(done.request, ids, logprobs, done.finish_reason)
        return stopped

    def _push_watched(self, block: Block) -> list[Any]:
        found, stopped = self._watched, []
        finished = {done.request.key for done in block.finished}
        columns = block.ids.tolist(), block.logprobs.tolist()
        for key, id_, logprob in zip(block.keys, *columns, strict=True):
            if (watched := found.get(key)) is None:
                continue
            watched.ids.append(id_)
            watched.logprobs.append(logprob)
            # The last token of a text is looked at with its end.
            if not watched.may_end[id_] or key in finished:
                continue
            if self._finder.found(watched.request.params.stop, watched.ids):
                del found[key]
                self._complete(watched.request, watched.ids, watched.logprobs, "stop string")
                stopped.append(key)
        return stopped

    def forget(self, key: Any) -> None:
        """Expect no more of a request that was cancelled."""
        self._watched.pop(key, None)
        self._tops.pop(key, None)

    def _complete(
        self, request: Request, ids: list[int], logprobs: list[float], reason: str
    ) -> None:
        params, whole = request.params, reason in ("length", "stop string")
        text = "" if reason == "error" else text_of(self.tokenizer, ids if whole else ids[:-1])
        ends = [place for stop in params.stop if (place := text.find(stop)) >= 0]
        if ends:
            text, reason = text[: min(ends)], "stop"
        top: list[list[tuple[int, float]]] = [[]] * len(ids)
        if steps := self._tops.pop(request.key, None):
            most = params.logprobs
            top = [list(zip(i[:most], values, strict=False)) for i, values in steps]
        prompt, seed = request.prompt.tolist(), seed_of(request)
        made = Completion(text, ids, logprobs, reason, prompt, top, seed)
        self._done.append((request, made))

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
