"""What a call asks for: a prompt, a list or an iterator of them, settings for all or for each."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import InputError, shown
from ..sampling import SamplingParams
from . import prompts
from .continuations import Groups
from .prompts import PromptEncoder

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
    def lazy(self) -> bool:
        """Whether the prompts come from an iterator."""
        return not isinstance(self.groups, list)


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


def check_max_batch(max_batch: Any) -> int:
    """Sequences generated at once, checked."""
    whole = isinstance(max_batch, int | np.integer) and not isinstance(max_batch, bool)
    if not whole or max_batch < 1:
        raise InputError(
            f"max_batch={shown(max_batch)} is impossible",
            where="max_batch",
            remedy="It must be an integer, 1 or more.",
        )
    return int(max_batch)


@contextlib.contextmanager
def bar(
    progress: Any, total: int | None, *, long: bool, unit: str = "text"
) -> Iterator[Callable[[int], object]]:
    """A progress bar on stderr; gives what it is told the number of finished ones by.

    Parameters
    ----------
    progress : bool or None
        None shows it for a long list on a terminal.
    total : int or None
    long : bool
    unit : str
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

    with tqdm(total=total, unit=unit, unit_scale=False, dynamic_ncols=True) as shown_:
        yield shown_.update
