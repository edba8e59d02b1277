"""What LanguageModel.score does: from texts, and pairs of them, to the scores of their tokens."""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from ..config import GPT2Config
from ..errors import InputError, NoTokenizerError, not_a_flag
from ..ids import check_tokens
from ..model import GPT2
from ..tokenizer import Tokenizer
from . import scoring
from .progress import bar
from .prompt_forms import is_one, place_of, several, to_ids
from .prompts import PromptEncoder
from .session import Session
from .text import Score
from .windows import check_window

_LONG = 1000  # texts of a list that are worth a progress bar


def score(
    session: Session,
    encoder: PromptEncoder,
    text: Any,
    *,
    window: int | None,
    stride: int | None,
    bos: bool,
    progress: bool | None,
) -> Any:
    """The scores of one text or many, as :meth:`gpt2cupy.LanguageModel.score` describes it.

    Parameters
    ----------
    session : Session
    encoder : PromptEncoder
    text, window, stride, bos, progress
        The arguments of the call, not yet checked.
    """
    session.check_open()
    if not isinstance(bos, bool | np.bool_):
        raise not_a_flag("bos", bos)
    size = check_window(window, stride, encoder.config)
    encode = ScoredEncoder(encoder.tokenizer, encoder.config, _before(encoder, bos))
    if isinstance(text, Iterator):
        tokens = map(encode.numbered, itertools.count(), text)
        return _one_by_one(session, tokens, *size, progress)
    if isinstance(text, tuple) and list(map(type, text)) == [str, str]:
        raise InputError(
            "a pair by itself could also be two texts",
            where="score: text",
            remedy="Write [(context, continuation)] for a pair, and a list for two texts.",
        )
    single = is_one(text)
    given = [text] if single else several(text)
    # Made while the GPU runs those before: an error may come after some passes.
    each = (encode(text),) if single else map(encode.numbered, itertools.count(), given)
    with bar(progress, len(given), long=len(given) > _LONG) as done:
        found = list(_scores(session, each, *size, done))
    failed = tuple((i, 0) for i, score in enumerate(found) if score is None)
    result = found[0] if single else found
    if failed:
        where = "score" if single else place_of(failed[0][0], given[failed[0][0]])
        raise scoring.non_finite(session.model, where, completions=result, failed=failed)
    return result


def _before(encoder: PromptEncoder, bos: bool) -> list[int]:
    """What stands before a text that is scored."""
    try:
        return [encoder.bos_token_id] if bos else []
    except NoTokenizerError as error:
        raise InputError(
            "no file of this model names a beginning-of-text token",
            where="bos",
            remedy="Pass bos=False, or put the token before the ids yourself.",
        ) from error


def _scores(
    session: Session,
    tokens: Iterable[tuple[np.ndarray, int]],
    window: int,
    stride: int,
    done: Callable[[int], object],
) -> Generator[Score | None, None, None]:
    """The scores of tokens, None where logits are not finite."""

    def scored(model: GPT2) -> Iterator[Score | None]:
        given: deque[np.ndarray] = deque()

        def noted() -> Iterator[tuple[np.ndarray, int]]:
            for ids, first in tokens:
                given.append(ids[first:])
                yield ids, first

        scorer = scoring.Scorer(model)
        for logprobs in scoring.token_logprobs(scorer, noted(), window, stride):
            ids = given.popleft()
            done(1)
            yield None if np.isnan(logprobs).any() else Score(ids.tolist(), logprobs)

    return session.items(scored)


def _one_by_one(
    session: Session,
    tokens: Iterator[tuple[np.ndarray, int]],
    window: int,
    stride: int,
    progress: bool | None,
) -> Iterator[Score]:
    """The scores of an iterator of texts."""
    with (
        bar(progress, None, long=False) as done,
        contextlib.closing(_scores(session, tokens, window, stride, done)) as scores,
    ):
        for number, found in enumerate(scores):
            if found is None:
                raise scoring.non_finite(session.model, f"text {number}", failed=((number, 0),))
            yield found


def _is_pair(value: Any) -> bool:
    """Whether this is a context and a continuation: a tuple of two, each text or ids."""
    return (
        isinstance(value, tuple)
        and len(value) == 2
        and all(isinstance(each, str | Sequence | np.ndarray) for each in value)
    )


class _Sizes(dict[int, int]):
    """Bytes of each token, found when it is first asked for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, id_: int) -> int:
        size = self[id_] = len(self._tokenizer.decode_bytes([id_]))
        return size


class ScoredEncoder:
    """Makes tokens, and the first of them that is scored, of what :meth:`score` takes.

    Parameters
    ----------
    tokenizer : Tokenizer
    config : GPT2Config
    before : list of int
        Tokens that stand before each text.
    """

    def __init__(self, tokenizer: Tokenizer, config: GPT2Config, before: list[int]) -> None:
        self._tokenizer = tokenizer
        self._config = config
        self._before = before
        self._sizes = _Sizes(tokenizer)

    def numbered(self, number: int, given: Any) -> tuple[np.ndarray, int]:
        """:meth:`__call__` for one of several: errors say which."""
        try:
            return self(given)
        except InputError as error:
            place = place_of(number, given)
            raise InputError(error.what, where=place, remedy=error.remedy) from error

    def __call__(self, given: Any) -> tuple[np.ndarray, int]:
        """Token ids [N], checked, and the number of the first that is scored.

        Raises
        ------
        InputError
            If there is nothing to score, or an id is unknown.
        """
        if _is_pair(given):
            ids, scored = self._pair(*given)
            first = len(self._before) + len(ids) - scored
        else:
            ids = list(to_ids(given, self._tokenizer))
            first = max(len(self._before), 1)
        tokens = check_tokens([*self._before, *ids], self._config)
        if first >= len(tokens):
            raise InputError("there is nothing to score", where="text", remedy="Pass more text.")
        if first == 0:
            raise InputError(
                "nothing stands before the continuation",
                where="text",
                remedy="Give a context of at least one token, or bos=True.",
            )
        return tokens, first

    def _pair(self, context: Any, continuation: Any) -> tuple[list[int], int]:
        """Ids of both, and how many of them the continuation has."""
        if not (isinstance(context, str) and isinstance(continuation, str)):
            after = list(to_ids(continuation, self._tokenizer))
            return [*to_ids(context, self._tokenizer), *after], len(after)
        ids = self._tokenizer.encode(context + continuation)
        # From the end on, as many tokens as have the bytes of the continuation.
        size, count = len(continuation.encode("utf-8", "surrogatepass")), 0
        while size > 0 and count < len(ids):
            count += 1
            size -= self._sizes[ids[-count]]
        return ids, count
