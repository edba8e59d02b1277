"""What the engine makes of requests, as pieces or as completions."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from ..tokenizer import Tokenizer
from . import prompts, scoring
from .collect import Collector
from .request import Request
from .results import tokens_of
from .session import Session
from .text import Completion, GrowingText, Piece


def pieces(session: Session, tokenizer: Tokenizer, request: Request) -> Iterator[Piece]:
    """One continuation, a piece per token.

    Raises
    ------
    NonFiniteError
        If logits are not finite, in place of the piece that they would have given.
    """
    start = time.perf_counter()
    row, first, count = GrowingText(tokenizer, request.params.stop), 0.0, 0
    last = None
    # Closed by name: a traceback may keep this frame, and the turn with it.
    with contextlib.closing(session.blocks([request], 1)) as blocks:
        for token in (token for block in blocks for token in tokens_of(block)):
            now = time.perf_counter()
            first = first or now
            text, reason = row.push(token.id, token.finish_reason)
            if reason == "error":
                raise scoring.non_finite(
                    session.model, f"new token {count + 1}", failed=(request.key,)
                )
            rate = count / (now - first) if count else 0.0
            count += 1
            drafts = token.drafted, token.accepted
            piece = Piece(
                text, token.id, token.logprob, reason, first - start, rate, token.top, *drafts
            )
            if reason:
                last = piece
                break
            yield piece
    if last is not None:  # when the model is free again: its reader may not come back
        yield last


def complete(
    session: Session,
    tokenizer: Tokenizer,
    requests: list[Request],
    max_batch: int,
    given: list[Any],
    *,
    single: bool,
) -> Any:
    """The completions of requests in the form in which ``generate`` returns them.

    Parameters
    ----------
    session : Session
    tokenizer : Tokenizer
    requests : list of Request
        With keys (number of the prompt, number of the continuation).
    max_batch : int
    given : list
        The prompts, for errors.
    single : bool
        Whether they are one, not in a list.

    Raises
    ------
    NonFiniteError
        If logits are not finite; the other requests are finished first.
    """
    collector = Collector(tokenizer, requests)
    with contextlib.closing(session.blocks(requests, max_batch)) as blocks:
        for block in blocks:
            for key in collector.push(block):
                session.cancel(key)
    done = collector.completions()
    pairs = list(zip(requests, done, strict=True))
    failed = tuple(request.key for request, each in pairs if each.finish_reason == "error")
    found = [None if request.key in failed else each for request, each in pairs]
    n = requests[0].params.n if requests else 1
    result = _grouped(found, n, single)
    if failed:
        number, place = failed[0]
        where = [] if single else [prompts.place_of(number, given[number])]
        where += [f"continuation {place}"] if n > 1 else []
        raise scoring.non_finite(session.model, ", ".join(where), completions=result, failed=failed)
    return result


def _grouped(found: list[Completion | None], n: int, single: bool) -> Any:
    """One, ``n`` of a prompt, or a list of these."""
    groups = [found[i : i + n] for i in range(0, len(found), n)]
    results: list[Any] = [group[0] if n == 1 else group for group in groups]
    return results[0] if single else results
