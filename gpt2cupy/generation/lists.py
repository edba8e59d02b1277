"""What a call asks for: a prompt, a list or an iterator of them, settings for all or for each."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..config import GPT2Config
from ..errors import InputError, shown
from ..ids import check_tokens
from ..sampling import SamplingParams
from ..tokenizer import Tokenizer
from . import prompts
from .continuations import Groups
from .prompts import PromptEncoder
from .request import Request

MAX_BATCH = 65536
Params = SamplingParams | Iterable[SamplingParams] | None


@dataclass(frozen=True)
class Asked:
    """Prompts with their settings, checked as far as they are known.

    Attributes
    ----------
    groups : iterable of list of Request
        A list where all prompts are known, else an iterator.
    given : list
        The prompts, for errors; none of an iterator.
    single : bool
        Whether it is one prompt, not in a list.
    settings : list of SamplingParams
        The different ones, where they are known.
    """

    groups: Groups
    given: list[Any]
    single: bool
    settings: list[SamplingParams]

    @property
    def known(self) -> list[list[Request]] | None:
        """The groups, if not of an iterator."""
        return self.groups if isinstance(self.groups, list) else None


def asked(
    encoder: PromptEncoder,
    prompt: Any,
    params: Params,
    options: dict[str, Any],
    *,
    from_file: bool,
    one: bool = False,
) -> Asked:
    """Take the arguments of a call apart.

    Parameters
    ----------
    encoder : PromptEncoder
    prompt : str, sequence of int, list or iterator of either
    params : SamplingParams, or an iterable of one for each prompt, or None
    options : dict
        Fields that replace those of ``params``.
    from_file : bool
        Whether the defaults are those of generation_config.json.
    one : bool
        Whether each prompt has one continuation.
    """

    def whole(each: SamplingParams | None) -> SamplingParams:
        chosen = encoder.params(each, options, from_file)
        if one and chosen.n != 1:
            raise InputError(
                "stream() yields one continuation of each prompt",
                where="n",
                remedy="Use generate.",
            )
        return chosen

    shared = not isinstance(params, list | tuple | Iterator)  # anything else is refused below
    if isinstance(prompt, Iterator):
        if shared:
            chosen = whole(params)  # type: ignore[arg-type]
            return Asked(encoder.groups(prompt, itertools.repeat(chosen)), [], False, [chosen])
        pairs = _paired(prompt, params)  # type: ignore[arg-type]
        return Asked(_lazily(encoder, pairs, whole), [], False, [])
    single = prompts.is_one(prompt)
    given = [prompt] if single else prompts.several(prompt)
    if shared:
        chosen = whole(params)  # type: ignore[arg-type]
        settings, own = [chosen], [chosen] * len(given)
    else:
        own = _each(list(params), len(given), whole, single=single)  # type: ignore[arg-type]
        settings = list({id(each): each for each in own}.values())
    groups = list(encoder.groups(given, own, single=single))
    return Asked(groups, given, single, settings)


def _each(
    params: Sequence[Any],
    count: int,
    whole: Callable[[Any], SamplingParams],
    *,
    single: bool,
) -> list[SamplingParams]:
    """The settings of each prompt of a list."""
    if single or len(params) != count:
        what = "one prompt" if single else f"{count} prompts"
        raise InputError(
            f"there are {len(params)} SamplingParams for {what}",
            where="params",
            remedy="Give one for all prompts, or a list with one for each prompt of a list.",
        )
    known: dict[int, SamplingParams] = {}
    for each in params:
        if id(each) not in known:
            known[id(each)] = whole(each)
    return [known[id(each)] for each in params]


def _paired(given: Iterator[Any], params: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """Prompts of an iterator with their settings, which must be as many."""
    nothing = object()
    both = itertools.zip_longest(given, params, fillvalue=nothing)
    for number, (prompt, own) in enumerate(both):
        if prompt is nothing or own is nothing:
            names = ("prompts", "SamplingParams")[:: 1 if own is nothing else -1]
            raise InputError(
                f"there are more {names[0]} than {names[1]}, of which there are {number}",
                where="params",
                remedy="Give as many of both, or one SamplingParams for all.",
            )
        yield prompt, own


def _lazily(
    encoder: PromptEncoder,
    pairs: Iterator[tuple[Any, Any]],
    whole: Callable[[Any], SamplingParams],
) -> Groups:
    """Requests of prompts that have settings of their own, made when they are asked for."""
    first, second = itertools.tee(pairs)
    settings = (whole(own) for _, own in second)
    return encoder.groups((prompt for prompt, _ in first), settings)


def is_pair(value: Any) -> bool:
    """Whether this is a context and a continuation: a tuple of two, each text or ids."""
    return (
        isinstance(value, tuple)
        and len(value) == 2
        and all(isinstance(each, str | Sequence | np.ndarray) for each in value)
    )


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

    def numbered(self, number: int, given: Any) -> tuple[np.ndarray, int]:
        """:meth:`__call__` for one of several: errors say which."""
        try:
            return self(given)
        except InputError as error:
            place = prompts.place_of(number, given)
            raise InputError(error.what, where=place, remedy=error.remedy) from error

    def __call__(self, given: Any) -> tuple[np.ndarray, int]:
        """Token ids [N], checked, and the number of the first that is scored.

        Raises
        ------
        InputError
            If there is nothing to score, or an id is unknown.
        """
        if is_pair(given):
            ids, scored = self._pair(*given)
            first = len(self._before) + len(ids) - scored
        else:
            ids = list(prompts.to_ids(given, self._tokenizer))
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
            after = list(prompts.to_ids(continuation, self._tokenizer))
            return [*prompts.to_ids(context, self._tokenizer), *after], len(after)
        ids = self._tokenizer.encode(context + continuation)
        # From the end on, as many tokens as have the bytes of the continuation.
        size, count = len(continuation.encode("utf-8", "surrogatepass")), 0
        while size > 0 and count < len(ids):
            count += 1
            size -= len(self._tokenizer.decode_bytes([ids[-count]]))
        return ids, count


def check_max_batch(max_batch: Any) -> int:
    """Sequences generated at once, checked."""
    whole = isinstance(max_batch, int | np.integer) and not isinstance(max_batch, bool)
    if not whole or not 1 <= max_batch <= MAX_BATCH:
        raise InputError(
            f"max_batch={shown(max_batch)} is impossible",
            where="max_batch",
            remedy=f"It must be an integer from 1 to {MAX_BATCH}.",
        )
    return int(max_batch)


@contextlib.contextmanager
def bar(
    progress: Any, total: int | None, *, long: bool, unit: str = "text", initial: int = 0
) -> Iterator[Callable[[int], object]]:
    """A progress bar on stderr; gives what it is told the number of finished ones by.

    Parameters
    ----------
    progress : bool or None
        None shows it for a long list on a terminal.
    total : int or None
    long : bool
    unit : str
    initial : int
        Those that were finished before.
    """
    if progress is not None and not isinstance(progress, bool | np.bool_):
        raise InputError(
            f"progress={shown(progress)} is impossible",
            where="progress",
            remedy="It must be True, False or None.",
        )
    at_terminal = sys.stderr is not None and sys.stderr.isatty()
    if not (long and at_terminal if progress is None else progress):
        yield lambda count: None
        return
    from tqdm import tqdm

    with tqdm(total=total, unit=unit, initial=initial, dynamic_ncols=True) as shown_:
        yield shown_.update
