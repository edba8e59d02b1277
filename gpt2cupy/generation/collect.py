"""Completions from the blocks that an engine gives: a text is made once, at its end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..tokenizer import Tokenizer
from .request import Request
from .results import Block
from .text import Completion, GrowingText, text_of

Top = list[list[tuple[int, float]]]


class _Watched:
    """A continuation with stop strings, which are looked for after each of its tokens."""

    def __init__(self, tokenizer: Tokenizer, request: Request) -> None:
        self.request = request
        self.text = GrowingText(tokenizer, request.params.stop)
        self.parts: list[str] = []
        self.ids: list[int] = []
        self.logprobs: list[float] = []

    def push(self, id_: int, logprob: float, finish_reason: str | None) -> str | None:
        """Take a token; returns the finish reason, "stop" at a stop string."""
        text, reason = self.text.push(id_, finish_reason)
        self.parts.append(text)
        self.ids.append(id_)
        self.logprobs.append(logprob)
        return reason


class Collector:
    """Completions of many requests.

    Parameters
    ----------
    tokenizer : Tokenizer
    requests : sequence of Request
    """

    def __init__(self, tokenizer: Tokenizer, requests: Sequence[Request]) -> None:
        self.tokenizer = tokenizer
        self.requests = requests
        self._done: dict[Any, Completion] = {}
        self._watched = {r.key: _Watched(tokenizer, r) for r in requests if r.params.stop}
        self._tops: dict[Any, Top] = {r.key: [] for r in requests if r.params.logprobs}

    def push(self, block: Block) -> list[Any]:
        """Take a block; returns the keys of requests that have met a stop string."""
        if block.top is not None:
            self._push_top(block)
        for done in block.finished:
            if done.request.key not in self._watched:
                ids, logprobs = done.ids.tolist(), done.logprobs.tolist()
                drafts = done.drafted, done.accepted
                self._complete(done.request, None, ids, logprobs, done.finish_reason, *drafts)
        return self._push_watched(block) if self._watched else []

    def _push_top(self, block: Block) -> None:
        assert block.top is not None
        columns = block.top[0].tolist(), block.top[1].tolist()
        for key, ids, logprobs in zip(block.keys, *columns, strict=True):
            if key in self._tops:
                pairs = zip(ids, logprobs, strict=True)
                self._tops[key].append([pair for pair in pairs if pair[0] >= 0])

    def _push_watched(self, block: Block) -> list[Any]:
        reasons = {done.request.key: done.finish_reason for done in block.finished}
        stopped = []
        columns = block.ids.tolist(), block.logprobs.tolist()
        for key, id_, logprob in zip(block.keys, *columns, strict=True):
            watched = self._watched.get(key)
            if watched is None:
                continue
            if reason := watched.push(id_, logprob, reasons.get(key)):
                del self._watched[key]
                text = "".join(watched.parts)
                self._complete(watched.request, text, watched.ids, watched.logprobs, reason)
                if key not in reasons:
                    stopped.append(key)
        return stopped

    def _complete(
        self,
        request: Request,
        text: str | None,
        ids: list[int],
        logprobs: list[float],
        reason: str,
        drafted: int = 0,
        accepted: int = 0,
    ) -> None:
        if text is None:
            shown = ids if reason == "length" else ids[:-1]
            text = text_of(self.tokenizer, shown)
        top = (self._tops.get(request.key) or [[]] * len(ids))[: len(ids)]
        prompt, seed = request.prompt.tolist(), seed_of(request)
        self._done[request.key] = Completion(
            text, ids, logprobs, reason, prompt, top, seed, drafted, accepted
        )

    def completions(self) -> list[Completion]:
        """Of all requests, in their order; one that was to get no token is empty."""
        for request in self.requests:
            if request.key not in self._done:
                self._complete(request, "", [], [], "length")
        return [self._done[request.key] for request in self.requests]


def seed_of(request: Request) -> int | None:
    """What a request's random numbers come from; None in greedy decoding."""
    params = request.params
    if params.greedy or params.seed is None:
        return None
    return (params.seed + request.index) % 2**64
