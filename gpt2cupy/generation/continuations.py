"""What the engine makes of requests, as pieces or as completions."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import chain
from typing import Any

from ..tokenizer import Tokenizer
from . import scoring
from .collect import Collector
from .progress import bar
from .prompt_forms import place_of
from .request import Request, Token
from .results import Block, tokens_of
from .session import Session
from .text import Completion, GrowingText, Piece

_AHEAD = 4  # prompts per slot that may be read before the completion of an earlier one is given

Groups = Iterable[list[Request]]


class Source:
    """Requests of prompts, made as slots become free.

    Parameters
    ----------
    groups : iterable of list of Request
        The requests of each prompt.
    begin : callable
        Called with each of them before it is run.
    full : callable
        Whether no more may be read at present.

    Attributes
    ----------
    ended : bool
        Whether every request has been given.
    error : Exception or None
        What the iterator of prompts raised, which ends it; those before are finished.
    """

    def __init__(
        self,
        groups: Groups,
        begin: Callable[[list[Request]], None],
        full: Callable[[], bool] = lambda: False,
    ) -> None:
        self._groups = groups
        self._count = len(groups) if isinstance(groups, list) else None
        self._begin = begin
        self._full = full
        self.ended = self._count == 0
        self.error: Exception | None = None

    def __iter__(self) -> Iterator[Request | None]:
        try:
            for number, group in enumerate(self._groups, 1):
                self._begin(group)
                self.ended = number == self._count
                yield from (r for r in group if r.params.max_new_tokens != 0)
                while self._full():
                    yield None
        except Exception as error:
            self.error = error
        self.ended = True

    def blocks(self, session: Session, slots: int) -> Generator[Block, None, None]:
        """What the engine makes of them, of so many at once; of a list no more than it has."""
        if isinstance(self._groups, list):
            wanted = sum(r.params.max_new_tokens != 0 for group in self._groups for r in group)
            slots = min(slots, wanted)
        if not slots:  # nothing is asked of the model
            deque(self, maxlen=0)
            return
        with contextlib.closing(session.blocks(iter(self), slots)) as blocks:
            yield from blocks

    def raise_error(self) -> None:
        """Raise what the iterator of prompts raised."""
        if self.error is not None:
            raise self.error


class Growing:
    """A continuation that is streamed."""

    def __init__(self, tokenizer: Tokenizer, request: Request, start: float) -> None:
        self.text = GrowingText(tokenizer, request.params.stop)
        self.start = start
        self.first = 0.0
        self.count = 0

    def push(self, token: Token) -> Piece:
        """The piece that a token makes."""
        now = time.perf_counter()
        self.first = self.first or now
        text, reason = self.text.push(token.id, token.finish_reason)
        rate = self.count / (now - self.first) if self.count else 0.0
        self.count += 1
        waited, drafts = self.first - self.start, (token.drafted, token.accepted)
        return Piece(text, token.id, token.logprob, reason, waited, rate, token.top, *drafts)


def pieces(
    session: Session, tokenizer: Tokenizer, groups: Groups, slots: int
) -> Generator[tuple[int, Piece], None, None]:
    """A piece per token, each with the number of its prompt.

    Parameters
    ----------
    session : Session
    tokenizer : Tokenizer
    groups : iterable of list of Request
        One request of each prompt, with the key (number of the prompt, 0).
    slots : int

    Raises
    ------
    NonFiniteError
        If logits are not finite, when the other texts are done; of one text, in place of the
        piece that they would have given.
    """
    start = time.perf_counter()
    growing: dict[Any, Growing] = {}

    def begin(group: list[Request]) -> None:
        for request in group:
            if request.params.max_new_tokens != 0:
                growing[request.key] = Growing(tokenizer, request, start)

    source = Source(groups, begin)
    last: tuple[int, Piece] | None = None
    failed: dict[tuple[int, int], str] = {}
    # Closed by name: a traceback may keep this frame, and the turn with it.
    with contextlib.closing(source.blocks(session, slots)) as blocks:
        for token in chain.from_iterable(map(tokens_of, blocks)):
            if (text := growing.get(token.key)) is None:
                continue  # past its stop string
            piece = text.push(token)
            if piece.finish_reason:
                del growing[token.key]
                if not token.finish_reason:
                    session.cancel(token.key)
            if piece.finish_reason == "error":
                failed[token.key] = f"new token {text.count}"
                continue
            if source.ended and not growing:
                last = token.key[0], piece
                break
            yield token.key[0], piece
    if last is not None:  # when the model is free again: its reader may not come back
        yield last
    source.raise_error()
    if failed:
        (number, _), where = next(iter(failed.items()))
        several = not isinstance(groups, list) or len(groups) > 1
        where = f"prompt {number}, {where}" if several else where
        raise scoring.non_finite(session.model, where, failed=tuple(failed))


def completions(
    session: Session,
    tokenizer: Tokenizer,
    groups: Groups,
    slots: int,
    done: Callable[[int], object] = lambda count: None,
) -> Generator[list[Completion], None, None]:
    """The completions of each prompt, in the order of the prompts.

    Prompts of an iterator are read as slots become free, and not too far ahead of the
    completions that were given: memory does not grow with their number.

    Parameters
    ----------
    session : Session
    tokenizer : Tokenizer
    groups : iterable of list of Request
        With keys (number of the prompt, number of the continuation).
    slots : int
    done : callable, optional
        Called with the number of continuations that have come to their ends.

    Yields
    ------
    list of Completion
        Those whose logits were not finite have the finish reason "error".
    """
    collector = Collector(tokenizer)
    waiting: deque[list[Request]] = deque()
    made: dict[Any, Completion] = {}
    lazy = not isinstance(groups, list)

    def begin(group: list[Request]) -> None:
        waiting.append(group)
        for request in group:
            collector.add(request)

    def ready() -> Iterator[list[Completion]]:
        finished = collector.take()
        made.update((request.key, completion) for request, completion in finished)
        if finished:
            done(len(finished))
        while waiting and all(request.key in made for request in waiting[0]):
            yield [made.pop(request.key) for request in waiting.popleft()]

    source = Source(groups, begin, lambda: lazy and len(waiting) >= _AHEAD * slots)
    with contextlib.closing(source.blocks(session, slots)) as blocks:
        for block in blocks:
            for key in collector.push(block):
                session.cancel(key)
            yield from ready()
    yield from ready()
    source.raise_error()


def complete(
    session: Session,
    tokenizer: Tokenizer,
    groups: list[list[Request]],
    slots: int,
    given: list[Any],
    progress: bool | None,
    *,
    single: bool,
) -> Any:
    """The completions of a list of prompts, in the form in which ``generate`` returns them.

    Parameters
    ----------
    session, tokenizer, groups, slots
        As :func:`completions` takes them.
    given : list
        The prompts, for errors.
    progress : bool, optional
        As :func:`bar` takes it.
    single : bool
        Whether they are one, not in a list.

    Raises
    ------
    NonFiniteError
        If logits are not finite; the other requests are finished first.
    """
    count = sum(map(len, groups))
    with bar(progress, count, long=count > slots) as done:
        found = list(completions(session, tokenizer, groups, slots, done))
    return as_given(session, groups, found, given, single=single)


def as_given(
    session: Session,
    groups: list[list[Request]],
    found: list[list[Completion]],
    given: list[Any],
    *,
    single: bool,
) -> Any:
    """The completions of each prompt in the form in which ``generate`` returns them.

    Raises
    ------
    NonFiniteError
        If logits were not finite.
    """
    failed: list[tuple[int, int]] = []
    kept: list[Any] = []
    for number, texts in enumerate(found):
        bad = [place for place, each in enumerate(texts) if each.finish_reason == "error"]
        failed += [(number, place) for place in bad]
        good = [None if place in bad else each for place, each in enumerate(texts)]
        kept.append(good if len(good) > 1 else good[0])
    result = kept[0] if single else kept
    if failed:
        number, place = failed[0]
        where = [] if single else [place_of(number, given[number])]
        where += [f"continuation {place}"] if len(groups[number]) > 1 else []
        raise scoring.non_finite(
            session.model, ", ".join(where), completions=result, failed=tuple(failed)
        )
    return result


def one_by_one(
    session: Session,
    tokenizer: Tokenizer,
    groups: Groups,
    slots: int,
    progress: bool | None,
) -> Iterator[Any]:
    """What ``generate`` yields for an iterator of prompts: a completion, or ``n``, of each.

    Raises
    ------
    NonFiniteError
        In place of the completion whose logits are not finite.
    """
    with (
        bar(progress, None, long=False) as done,
        contextlib.closing(completions(session, tokenizer, groups, slots, done)) as found,
    ):
        for number, texts in enumerate(found):
            if any(each.finish_reason == "error" for each in texts):
                raise scoring.non_finite(session.model, f"prompt {number}", failed=((number, 0),))
            yield texts if len(texts) > 1 else texts[0]
