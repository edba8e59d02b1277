"""What a call asks for: a prompt, a list or an iterator of them, settings for all or for each."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import InputError, shown
from ..sampling import SamplingParams
from .continuations import Groups
from .prompt_forms import is_one, several
from .prompts import PromptEncoder, warn_of_idle
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
    slots : int
        Sequences generated at once.
    """

    groups: Groups
    given: list[Any]
    single: bool
    slots: int

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
    max_batch: Any,
    generation_config: bool | None,
    one: bool = False,
    at_once: bool = False,
) -> Asked:
    """Take the arguments of a call of LanguageModel apart.

    Parameters
    ----------
    encoder : PromptEncoder
    prompt : str, sequence of int, list or iterator of either
    params : SamplingParams, or an iterable of one for each prompt, or None
    options : dict
        Fields that replace those of ``params``.
    max_batch : int
    generation_config : bool, optional
        Whether the defaults are those of generation_config.json.
    one : bool
        Whether each prompt has one continuation.
    at_once : bool
        Whether all prompts must be known, as in the calls of asyncio.
    """
    if at_once and isinstance(prompt, Iterator):
        raise InputError(
            "an iterator of prompts is read by generate() and stream() alone",
            where="prompt",
            remedy="Call once for each prompt: the calls of many tasks run side by side.",
        )
    from_file, slots = encoder.from_file(generation_config), check_max_batch(max_batch)

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
    lazy = isinstance(prompt, Iterator)
    single = not lazy and is_one(prompt)
    given = [] if lazy else [prompt] if single else several(prompt)
    known: list[SamplingParams] = []  # the different settings, for a warning
    if shared:
        known = [whole(params)]  # type: ignore[arg-type]
        all_ = prompt if lazy else given
        groups: Groups = encoder.groups(all_, itertools.repeat(known[0]), single=single)
    elif lazy:
        groups = _lazily(encoder, _paired(prompt, params), whole)  # type: ignore[arg-type]
    else:
        own = _each(list(params), len(given), whole, single=single)  # type: ignore[arg-type]
        known = list({id(each): each for each in own}.values())
        groups = encoder.groups(given, own, single=single)
    groups = groups if lazy else list(groups)
    warn_of_idle(known)
    return Asked(groups, given, single, slots)


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
    if not whole or not 1 <= max_batch <= MAX_BATCH:
        raise InputError(
            f"max_batch={shown(max_batch)} is impossible",
            where="max_batch",
            remedy=f"It must be an integer from 1 to {MAX_BATCH}.",
        )
    return int(max_batch)
